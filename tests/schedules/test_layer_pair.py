"""The order of phases inside a layer pair, and DeepSeek's trace as one case."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3c.schedules import DEEPSEEK, LayerCost, ScheduleError, best_order, simulate_pairs
from dsv3c.schedules.layer_pair import COMPUTE, NETWORK

# Microseconds that each phase keeps its resource busy, in each of the four layer pairs of the published trace
# (github.com/deepseek-ai/profile-data @ae7fc07, train.json: kernels by the annotation they were launched in, the union
# of their times; H800, EP64, 4096 tokens). In all 129.0 ms: compute 124.3, communication 114.5, of that exposed 4.2.
TRACE = {
    "attention_forward": (4311, 4263, 4438, 4467),
    "dispatch_forward": (6059, 5706, 7077, 7919),
    "experts_forward": (4250, 4384, 5175, 4606),
    "combine_forward": (7325, 8260, 9521, 9630),
    "combine_backward": (4380, 5224, 6207, 7266),
    "experts_input": (5693, 5408, 5407, 4716),
    "experts_weight": (5325, 5050, 5249, 4627),
    "dispatch_backward": (7302, 7909, 7271, 7465),
    "attention_input": (9018, 9368, 9452, 9525),
    "attention_weight": (2375, 2382, 2392, 2405),
}
COSTS = [LayerCost(**{phase: ticks[pair] for phase, ticks in TRACE.items()}) for pair in range(4)]


def test_deepseeks_exposed_communication_within_two_points_of_the_traces():
    """Predicted 1.6 %, traced 3.3 %: launch gaps between kernels inside a phase, 1.5 %, are no part of the costs."""
    timeline = simulate_pairs(DEEPSEEK, COSTS)
    per_mille = 1000 * timeline.exposed // timeline.makespan
    assert per_mille == 15
    assert abs(per_mille - 33) <= 20
    assert 1000 * abs(timeline.makespan - 129_012) < 25 * 129_012  # 2.5 % of the trace's span


def test_deepseeks_order_is_the_best_for_its_costs():
    assert best_order(COSTS) == DEEPSEEK


def test_an_order_without_overlap_exposes_all():
    one_by_one = (
        *("attention_forward", "dispatch_forward", "experts_forward", "combine_forward"),
        *("combine_backward", "experts_input", "dispatch_backward", "attention_input"),
        *("experts_weight", "attention_weight"),
    )
    cost = LayerCost(*[10] * 10)
    assert simulate_pairs(DEEPSEEK, [cost]).exposed < simulate_pairs(one_by_one, [cost]).exposed


costs = st.lists(st.builds(LayerCost, *[st.integers(0, 9)] * 10), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(costs, st.randoms(use_true_random=False))
def test_no_random_order_beats_the_best(costs, random):
    best = simulate_pairs(best_order(costs), costs)
    for _ in range(20):
        order = tuple(random.sample(COMPUTE + NETWORK, 10))
        try:
            assert simulate_pairs(order, costs).makespan >= best.makespan
        except ScheduleError:
            continue
    work = [sum(getattr(cost, phase) for cost in costs for phase in resource) for resource in (COMPUTE, NETWORK)]
    assert best.makespan >= max(work)
    assert 0 <= best.exposed <= work[1]


def test_exposed_by_hand():
    """attention 3, then dispatch 5 beside experts of the other chunk 2: 3 exposed; the rest takes no time."""
    cost = LayerCost(3, 5, 0, 0, 0, 2, 0, 0, 0, 0)
    timeline = simulate_pairs(DEEPSEEK, [cost])
    assert (timeline.makespan, timeline.exposed) == (8, 3)


def test_bad_orders_and_costs():
    with pytest.raises(ScheduleError, match=r"layer pair: expected the phases combine_backward, .*, found attention"):
        simulate_pairs(COMPUTE, COSTS)
    with pytest.raises(ScheduleError, match="found none"):
        simulate_pairs(DEEPSEEK, [])
    with pytest.raises(ScheduleError, match="layer cost experts_input: expected whole ticks from 0, found -1"):
        LayerCost(1, 1, 1, 1, 1, -1, 1, 1, 1, 1)
    with pytest.raises(ScheduleError, match="expected an order that runs, found waiting in a circle"):
        simulate_pairs(tuple(reversed(DEEPSEEK)), COSTS)
