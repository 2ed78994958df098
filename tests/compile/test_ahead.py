"""The operators that a unit begins with are started before torch calls them, and those alone."""

import threading
import weakref

import pytest
import torch

from dsv3c import ahead
from dsv3c.compiler import compilation_of
from dsv3c.operators import define

pytestmark = pytest.mark.usefixtures("without_codegen")
ops, FLOOR = torch.ops.dsv3c, 1e-4
FRONT = ["quantize_tile", "gemm", "swiglu_quantize_save", "gemm", "wide_mm", "gate"]  # a cast of torch's follows


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(ahead, "DEVICES", ("cpu",))


@pytest.fixture
def calls(monkeypatch):
    """Operators in the order of their calls, and whether each was handed its result."""
    found, result = [], ahead.result

    def watching(name, args):
        handed = result(name, args)
        found.append((name, handed is not None))
        return handed

    monkeypatch.setattr(ahead, "result", watching)
    return found


@pytest.fixture
def moe(make_model, compiled):
    """A MoE alone, and call(x): its output and all gradients."""
    alone = compiled(make_model(torch.bfloat16).model.layers[-1].mlp, "fp8")

    def call(x):
        alone.zero_grad()
        leaf = x.clone().requires_grad_()
        out = alone(leaf)
        out = out if isinstance(out, torch.Tensor) else out[0]
        out.backward(torch.ones_like(out))
        return [out.detach(), leaf.grad, *(p.grad.clone() for p in alone.parameters() if p.grad is not None)]

    call.module = alone
    return call


def fronts(module) -> list[ahead.Front]:
    return [way.front for ways in compilation_of(module).units.ways.values() for way in ways.values()]


def equal(found, expected) -> bool:
    return all(map(torch.equal, found, expected))


def test_the_front_of_a_moe_layer(moe, calls, monkeypatch):
    x, other = torch.randn(2, 1, 24, 256).bfloat16()
    monkeypatch.setattr(ahead, "LONGEST", 0)
    expected = [moe(inputs) for inputs in (x, other) for _ in range(3)][2::3]
    for front in fronts(moe.module):
        front.steps = None
    monkeypatch.setattr(ahead, "LONGEST", 10)
    assert equal(moe(x), expected[0])  # watched
    (front,) = fronts(moe.module)
    assert [step.name for step in front.steps] == FRONT
    for inputs, results in ((other, expected[1]), (x, expected[0])):
        calls.clear()
        assert equal(moe(inputs), results)
        assert calls[: 2 * len(FRONT)] == [(name, handed) for handed in (False, True) for name in FRONT]
        assert not any(handed for _, handed in calls[2 * len(FRONT) :])
    assert getattr(ahead._here, "started", None) is None


def test_parameters_are_those_of_the_call(moe):
    x = torch.randn(1, 24, 256).bfloat16()
    for _ in range(3):
        moe(x)
    with torch.no_grad():
        for parameter in moe.module.parameters():
            parameter.mul_(1.5)
    found = moe(x)
    for ways in compilation_of(moe.module).units.ways.values():
        ways.clear()
    assert equal(found, moe(x))


def front_of(function, *inputs) -> list[str]:
    front = ahead.Front()
    with front, ahead.begin(inputs):
        function(*inputs)
    return [step.name for step in front.steps]


def test_where_a_front_ends():
    x = torch.randn(4, 256)

    def cast(x):
        return ops.quantize_tile(x, FLOOR, False)

    assert front_of(lambda x: cast(x.view(2, 512).view(4, 256)), x) == ["quantize_tile"]
    assert front_of(lambda x: (cast(x), cast(x.neg())), x) == ["quantize_tile"]  # an operator of torch's, its result
    assert front_of(lambda x: (x.neg_(), cast(x)), x) == []
    assert front_of(lambda x: cast(torch.ones(4, 256)), x) == []  # a tensor of its own
    assert front_of(lambda x: (cast(x[:2]), cast(x)), x) == []  # a part
    assert front_of(lambda x: cast(x.expand(4, 256)), torch.randn(256)) == []
    assert front_of(lambda x: ops.quantize_weights([x], [1], FLOOR, False, False), torch.randn(128, 128)) == []
    angles = torch.randn(2, 4, 4)
    written = lambda x, cos, sin: (ops.rotate_heads_(x, cos, sin, False), cast(x.view(4, 16)))  # noqa: E731
    assert front_of(written, torch.randn(4, 2, 8).bfloat16(), *angles) == []
    assert len(front_of(lambda x: [cast(x) for _ in range(20)], x)) == ahead.LONGEST
    same_bits = x.view(torch.int32).view(torch.float32)  # as an input: what is seen as another type is not known
    assert front_of(lambda x: cast(x.view(torch.float32)), same_bits.view(torch.int32)) == []
    base = torch.randn(4, 256)
    assert front_of(lambda wide, x: cast(x), base[:1].expand(4, 256), base) == ["quantize_tile"]
    front = ahead.Front()
    with front, ahead.begin([base[:1].expand(4, 256), base]):
        cast(base)
    assert [step.args[0].source for step in front.steps] == [1]
    front, weight = ahead.Front(), torch.nn.Parameter(x)
    with front, ahead.begin([weight]):
        cast(weight.detach())
    assert front.steps[0].args[0].shape == x.shape  # a view of its own: what is started has nothing to do with autograd


def test_no_front_on_other_devices(monkeypatch):
    monkeypatch.setattr(ahead, "DEVICES", ("cuda",))
    assert front_of(lambda x: ops.quantize_tile(x, FLOOR, False), torch.randn(4, 256)) == []


def test_a_watched_call_keeps_nothing_that_the_graph_has_dropped():
    x, front = torch.randn(4, 256), ahead.Front()
    with front, ahead.begin([x]):
        made = ops.quantize_tile(x, FLOOR, False)
        dropped = weakref.ref(made[0])
        del made
        x.neg()
        assert dropped() is None


def test_a_call_that_fails_shows_no_front():
    x, front = torch.randn(4, 256), ahead.Front()
    with pytest.raises(ZeroDivisionError), front, ahead.begin([x]):
        1 / 0  # noqa: B018
    assert front.steps is None


def test_without_memory_to_start_it_all_the_graph_runs_alone(calls):
    x, front = torch.randn(4, 256), ahead.Front()
    with front, ahead.begin([x]):
        ops.quantize_tile(x, FLOOR, False)

    def full(*args):
        raise torch.OutOfMemoryError

    front.steps.append(ahead._Step("quantize_tile", full, []))
    with front, ahead.begin([x]):
        calls.clear()
        ops.quantize_tile(x, FLOOR, False)
        assert calls == [("quantize_tile", False)]


def test_an_end_at_a_kernel_of_inductor_s(monkeypatch):
    heuristics = pytest.importorskip("torch._inductor.runtime.triton_heuristics")
    monkeypatch.setattr(heuristics.CachingAutotuner, "run", lambda self: "launched")
    before, launch = heuristics.CachingAutotuner.run, []
    elsewhere = threading.Thread(target=lambda: heuristics.CachingAutotuner.run(None))

    def function(x):
        elsewhere.start()
        elsewhere.join()
        ops.quantize_tile(x, FLOOR, False)
        launch.append(heuristics.CachingAutotuner.run(None))
        ops.quantize_tile(x, FLOOR, False)

    assert front_of(function, torch.randn(4, 256)) == ["quantize_tile"]
    assert launch == ["launched"]
    assert heuristics.CachingAutotuner.run is before


def test_another_call_than_the_one_that_was_started(calls):
    """It gets its own result, and so does everything after it."""
    x, y = torch.randn(2, 4, 256)
    expected = ops.quantize_tile(y, FLOOR, False)
    square = torch.randn(256, 256)
    others = ((x, y, FLOOR), (x, x, 1.0), (x, x.view(8, 128), FLOOR), (square, square.t(), FLOOR))
    for x, other, floor in others:
        front = ahead.Front()
        with front, ahead.begin([x]):
            for _ in range(2):
                ops.quantize_tile(x, FLOOR, False)
        with front, ahead.begin([x]):
            calls.clear()
            found = ops.quantize_tile(other, floor, False)
            ops.quantize_tile(x, FLOOR, False)
            assert not any(handed for _, handed in calls)
            if other is y:
                assert torch.equal(found[1], expected[1])
    with front, ahead.begin([x]):
        calls.clear()
        ops.quantize_block(x, FLOOR, False)  # the same arguments
        ops.quantize_tile(x, FLOOR, False)
        assert not any(handed for _, handed in calls)
    with front, ahead.begin([x]):
        calls.clear()
        ops.quantize_tile(x, FLOOR, False)
        ops.quantize_tile(x, FLOOR, False)
        ops.quantize_tile(x, FLOOR, False)
        assert [handed for _, handed in calls] == [True, True, False]


def test_nothing_is_left_after_an_error():
    front, x = ahead.Front(), torch.randn(4, 256)
    with front, ahead.begin([x]):
        ops.quantize_tile(x, FLOOR, False)
    with pytest.raises(ZeroDivisionError), front, ahead.begin([x]):
        1 / 0  # noqa: B018
    assert ahead.result("quantize_tile", (x, FLOOR, False)) is None
    front.steps += [ahead._Step("quantize_tile", ops.quantize_tile.default, [torch.ones(2, 2, 128), FLOOR, False])]
    with pytest.raises(define.OperatorError), front, ahead.begin([x]):  # while it is started
        pass
    assert not ahead._here.started
    with ahead.begin([x]):  # of no unit
        assert ahead._here.front is None
        assert not ahead._here.started


def test_one_thread_watches_at_a_time():
    x, fronts = torch.randn(4, 256), [ahead.Front(), ahead.Front()]

    def other():
        with fronts[1], ahead.begin([x]):
            ops.quantize_tile(x, FLOOR, False)

    with fronts[0], ahead.begin([x]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        ops.quantize_tile(x, FLOOR, False)
    assert len(fronts[0].steps) == 1
    assert fronts[1].steps is None
    other()
    assert len(fronts[1].steps) == 1
