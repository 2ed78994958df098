"""Which kernels take more than 1.3x their roofline, and what is said about it."""

import pytest

from dsv3c import report_roofline
from dsv3c.measure import Launch
from dsv3c.passes.regions import Region
from dsv3c.pricing import FUSED, Cost
from dsv3c.report_roofline import START_US, against_rooflines, roofline_table
from dsv3c.tuning import targets

H200 = targets.load("h200")
REGION = Region("linear", "mlp.up_proj")


def cost(operator="dsv3c.gemm.default", flops=0, moved=0, rate="fp8", backward=False):
    return Cost(operator, REGION, backward, 1, flops, moved, H200.roofline_us(flops, moved, rate))


def launch(cost, time_us, kernels=1, backward=False):
    operator = cost.operator if cost else "aten.copy_.default"
    known = None if operator == FUSED else cost
    return Launch("layer", backward, operator, ("kernel",) * kernels, (), 0.0, time_us, known)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(report_roofline, "is_here", lambda target: True)


def of(*pairs):
    launches = [launch(c, *rest) for c, *rest in pairs]
    return against_rooflines(launches, [c for c, *_ in pairs if c], H200)


BIG = {"flops": 2 * 4096**3, "moved": 3 * 4096**2}
COPY = {"moved": 10**9}


@pytest.mark.parametrize(
    ("amounts", "excess", "kernels", "says"),
    [
        (BIG, 1.29, 1, None),
        (BIG, 2.0, 1, "compute-bound: 643 TFLOPS, 50% of a large product's"),
        (COPY, 2.0, 1, "memory-bound: 2.16 TB/s, 50% of a copy's"),
        (COPY, 2.0, 3, "memory-bound: 2.16 TB/s, 50% of a copy's; 3 kernels"),
        ({"moved": 10**6}, 10.0, 1, "launch-bound: 1 kernel, 3.2 us each for nothing"),
        ({"moved": 2 * 10**7}, 1.5, 1, "launch-bound: 1 kernel, 3.2 us each for nothing"),
        ({"moved": 10**6}, 40.0, 1, "latency-bound: work for 0.2 us, less than 1 launch"),
        ({"moved": 2 * 10**7}, 40.0, 2, "latency-bound: work for 4.6 us, less than 2 launches"),
        ({"moved": 2 * 10**7}, 40.0, 1, "memory-bound: 0.11 TB/s, 2% of a copy's"),
    ],
)
def test_the_reason_follows_from_the_numbers(amounts, excess, kernels, says):
    found = cost(**amounts)
    (against,) = of((found, excess * found.predicted_us, kernels))
    assert against.why == says
    assert (against.roofline_us, against.kernels, against.region) == (found.predicted_us, kernels, "mlp.up_proj")


def test_sums_of_fused_groups_are_of_memory():
    """Whose rooflines do not add up to their sum's in the last bit."""
    for number in range(2, 40):
        groups = [cost(FUSED, moved=10**8 + 7 * i) for i in range(number)]
        (against,) = of(*((group, 2 * group.predicted_us) for group in groups))
        assert against.why.startswith("memory-bound")


def test_launches_of_one_operator_and_region_are_one_line_and_the_largest_excess_is_first():
    product, copy = cost(**BIG), cost("dsv3c.permute.default", **COPY)
    found = of((product, 300.0), (product, 100.0), (copy, 1000.0))
    assert [(x.operator, x.measured_us) for x in found] == [(copy.operator, 1000.0), (product.operator, 400.0)]
    assert found[1].roofline_us == 2 * product.predicted_us


def test_fused_kernels_stand_against_the_groups_of_their_direction():
    groups = [cost(FUSED, **COPY), cost(FUSED, moved=2 * 10**9, backward=True)]
    launches = [launch(groups[0], 300.0), launch(groups[0], 200.0), launch(groups[1], 500.0, 1, True)]
    forward, backward = sorted(against_rooflines(launches, groups, H200), key=lambda x: x.backward)
    assert (forward.measured_us, forward.roofline_us) == (500.0, groups[0].predicted_us)
    assert (backward.measured_us, backward.roofline_us) == (500.0, groups[1].predicted_us)
    assert forward.kernels == 2
    assert backward.why is None


def test_what_is_in_no_graph_is_named_and_has_no_ratio():
    (against,) = of((None, START_US))
    assert against.ratio is None
    assert "in no graph" in str(roofline_table((against,)))


def test_what_was_measured_elsewhere_is_not_compared(monkeypatch):
    monkeypatch.undo()
    product = cost(**BIG)
    assert against_rooflines([launch(product, 1e9)], [product], targets.load("cpu")) == ()
