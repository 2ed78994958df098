"""The choice at launch: of the table where it has one that can be used, else by rule, and cheap."""

import warnings
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace

import pytest

from dsv3c.errors import CompileError
from dsv3c.kernels import implementations as module
from dsv3c.kernels.implementations import FILES, Implementation, Problem, Tile, choose, default, implementations
from dsv3c.kernels.launch import _here
from dsv3c.tuning import tables, targets
from dsv3c.tuning.tables import Entry, Row

PROBLEM = Problem("gemm", 4096, 4096, 7168)


def nothing(*operands, **config):
    raise AssertionError("nothing is launched when choosing")


KERNEL = Implementation(
    "kernel", {"x": (1, 2), "y": (1, 2)}, nothing, valid=lambda config: config != {"x": 2, "y": 2},
    tile=lambda config: Tile(128, 128 * config["x"]),
)  # fmt: skip
LIBRARY = Implementation("library", {}, nothing, takes=lambda problem: problem.rows % 4 == 0)


@pytest.fixture(autouse=True)
def two_implementations(monkeypatch, tmp_path):
    """Instead of the real ones; this machine is an H200 without tables."""
    module.choose.cache_clear()
    module._table.cache_clear()
    module._complain.cache_clear()
    monkeypatch.setattr(module, "implementations", lambda operator: {"kernel": KERNEL, "library": LIBRARY})
    monkeypatch.setattr(module, "default", lambda problem: (KERNEL, {"x": 1, "y": 1}))
    monkeypatch.setattr(targets, "resolve", lambda name: targets.load("h200"))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    monkeypatch.setenv("DSV3C_TABLES", str(tmp_path / "mine"))
    yield tmp_path / "h200.json"
    module.choose.cache_clear()
    module._table.cache_clear()


def write(path, name, config, runner_up=None):
    best = Entry(name, config, 100.0, 99.0, 101.0)
    row = Row("gemm", 4096, 7168, 1, 4096, 4096, best, runner_up, 1, "2.11.0", tables.triton_version())
    tables.write(path, "h200", [row])


def test_without_a_row_the_rule_decides():
    assert choose(PROBLEM) == (KERNEL, {"x": 1, "y": 1})


def test_a_row_decides_and_always_alike(two_implementations):
    write(two_implementations, "kernel", {"x": 2, "y": 1})
    assert {id(choose(PROBLEM)[1]) for _ in range(3)} == {id(choose(Problem(*PROBLEM))[1])}
    assert choose(PROBLEM) == (KERNEL, {"x": 2, "y": 1})
    assert choose(PROBLEM._replace(N=512)) == (KERNEL, {"x": 1, "y": 1})


def test_the_runner_up_where_the_best_cannot(two_implementations):
    write(two_implementations, "library", {}, Entry("kernel", {"x": 1, "y": 2}, 105.0, 104.0, 106.0))
    assert choose(PROBLEM) == (LIBRARY, {})
    assert choose(PROBLEM._replace(rows=4095)) == (KERNEL, {"x": 1, "y": 2})


@pytest.mark.parametrize(("kernel", "expected"), [(102.0, KERNEL), (104.0, LIBRARY)])
def test_a_library_is_faster_by_what_its_calls_cost(two_implementations, kernel, expected):
    write(two_implementations, "library", {}, Entry("kernel", {"x": 1, "y": 2}, kernel, kernel, kernel))
    assert choose(PROBLEM)[0] is expected


@pytest.mark.parametrize(
    ("rows", "expected"),  # waves of 128×256 and of 128×128 tiles
    [(4096, KERNEL), (3712, KERNEL), (3328, LIBRARY), (3072, KERNEL), (256, LIBRARY)],  # 4, 8; 4, 8; 4, 7; 3, 6; 1, 1
)
def test_the_runner_up_where_the_best_has_waves_to_fill(two_implementations, rows, expected):
    write(two_implementations, "kernel", {"x": 2, "y": 1}, Entry("library", {}, 110.0, 109.0, 111.0))
    assert choose(PROBLEM._replace(rows=rows))[0] is expected


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gone", {}),
        ("kernel", {"x": 3, "y": 1}),
        ("kernel", {"x": 1}),
        ("kernel", {"x": 2, "y": 2}),
        ("library", {"x": 1}),
    ],
)
def test_a_row_of_another_version_is_passed_over_and_it_says_so_once(two_implementations, name, config):
    write(two_implementations, name, config)
    with pytest.warns(UserWarning, match=f"found {name} .*; built-in defaults are used") as caught:
        chosen = [choose(PROBLEM._replace(rows=rows)) for rows in (4096, 4000)]
    assert chosen == [(KERNEL, {"x": 1, "y": 1})] * 2
    assert len(caught) == 1


def test_what_other_numbers_of_rows_take_is_compiled_with_the_first(two_implementations, monkeypatch):
    """Each once, and never a library; and again for what else decides, and for another device, which has its own."""
    launched, kernel = [], replace(KERNEL, variant=lambda config: None)
    monkeypatch.setattr(module, "_prepared", set())

    def pick(problem):
        return (LIBRARY, {}) if problem.rows % 4 == 0 else (kernel, {"x": 1 + (problem.rows > 3000), "y": 1})

    def launch(implementation, config):
        launched.append((implementation.name, *config.values(), getattr(_here, "compiling", False)))

    def out(dtype="bfloat16", device=0):
        return SimpleNamespace(dtype=dtype, get_device=lambda: device)

    for problem in (PROBLEM, PROBLEM._replace(rows=17), PROBLEM._replace(rows=3001)):
        module.start(problem, launch, out(), pick)
    compiled = [("kernel", 1, 1, True), ("kernel", 2, 1, True)]
    assert launched == [*compiled, ("library", False), ("kernel", 1, 1, False), ("kernel", 2, 1, False)]
    launched.clear()
    module.start(PROBLEM, launch, out(), pick, "accumulate")
    module.start(PROBLEM._replace(N=512), launch, out(), pick)
    module.start(PROBLEM, launch, out("float32"), pick)
    module.start(PROBLEM, launch, out(device=1), pick)
    assert launched == 4 * [*compiled, ("library", False)]
    launched.clear()
    module.start(PROBLEM, launch, out(device=1), pick)
    assert launched == [("library", False)]


def test_a_corrupt_table_is_a_line_and_the_defaults(two_implementations):
    two_implementations.write_text("{")
    with pytest.warns(
        UserWarning, match=r"h200\.json: expected a tuning table.*; built-in defaults are used"
    ) as caught:
        chosen = [choose(PROBLEM._replace(rows=rows)) for rows in (4096, 1)]
    assert chosen == [(KERNEL, {"x": 1, "y": 1})] * 2
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_an_unknown_device_is_a_line_and_the_defaults(monkeypatch):
    def unknown(name):
        raise CompileError("target: expected a GPU of h100, found NVIDIA B200; try target='h100'")

    monkeypatch.setattr(targets, "resolve", unknown)
    with pytest.warns(UserWarning, match="found NVIDIA B200.*; built-in defaults are used") as caught:
        chosen = [choose(PROBLEM._replace(rows=rows)) for rows in (4096, 1)]
    assert chosen == [(KERNEL, {"x": 1, "y": 1})] * 2
    assert len(caught) == 1


def test_a_machine_without_a_gpu_needs_no_table(monkeypatch):
    monkeypatch.setattr(targets, "resolve", lambda name: targets.load("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(PROBLEM)[0] is KERNEL


def test_a_choice_costs_little_at_launch(two_implementations):
    """Less than two microseconds, the best of many since other processes may be at work."""
    write(two_implementations, "kernel", {"x": 2, "y": 1})
    choose(PROBLEM)

    def seconds() -> float:
        start = perf_counter()
        for _ in range(1000):
            choose(Problem("gemm", 4096, 4096, 7168))
        return perf_counter() - start

    assert min(seconds() for _ in range(20)) * 1e6 / 1000 < 2


@pytest.mark.parametrize("operator", FILES)
def test_what_is_registered(operator, monkeypatch, request):
    monkeypatch.undo()
    request.getfixturevalue("hopper")
    found = implementations(operator)
    for rows in (1, 64, 4096):
        implementation, config = default(Problem(operator, rows * 8, 4096, 7168, 8 if "grouped" in operator else 1))
        assert found[implementation.name] is implementation
        assert implementation.holds(config)
    for implementation in found.values():
        assert all(implementation.holds(config) for config in (*implementation.configs(), *implementation.known))
    assert max(len(list(implementation.configs())) for implementation in found.values()) >= 200


@pytest.mark.parametrize(("rows", "groups", "expected"), [(256 * 128, 256, 1), (8 * 4096, 8, 2), (64, 8, None)])
def test_the_rule_for_groups(rows, groups, expected, monkeypatch, request):
    """The specialised kernel was fastest for 128 rows a group and more, in clusters for thousands."""
    monkeypatch.undo()
    request.getfixturevalue("hopper")
    implementation, config = default(Problem("grouped_gemm", rows, 4096, 7168, groups))
    assert implementation.name == ("warp_specialized" if expected else "triton")
    assert not expected or config == {"cluster": expected, "band": 8}


@pytest.mark.parametrize(
    ("rows", "N", "K", "expected"),
    [
        (4096, 7168, 2048, "cublaslt"),
        (4096, 7168, 2112, "warp_specialized"),  # the library wants whole blocks of 128
        (4095, 7168, 2048, "warp_specialized"),  # and rows in fours
        (4096, 7166, 2112, "triton"),  # rows of the result that no bulk copy can store
    ],
)
def test_the_rule_for_dense_products(rows, N, K, expected, monkeypatch, request):
    monkeypatch.undo()
    request.getfixturevalue("hopper")
    assert default(Problem("gemm", rows, N, K))[0].name == expected
