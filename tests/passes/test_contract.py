"""Every pass keeps the contract: the count agrees with the graph, a second run finds nothing, values and regions
stay."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from dsv3c import passes
from dsv3c.passes.contract import Level, PassError, Tier, leave, run, select, text
from dsv3c.passes.pipeline import default


def traced(function, *inputs) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


@dataclass(frozen=True)
class SaysItDid:
    """Reports a site and rewrites none."""

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm):
        return 1


@dataclass(frozen=True)
class HidesIt:
    """Turns addition into multiplication and reports nothing."""

    tier: ClassVar[Tier] = Tier.EXACT
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm):
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.add.Tensor:
                node.target = torch.ops.aten.mul.Tensor
                leave(node, "a reason")
        return 0


@dataclass(frozen=True)
class Multiply(HidesIt):
    def __call__(self, gm):
        super().__call__(gm)
        return 1


@dataclass(frozen=True)
class DoesNothing(SaysItDid):
    def __call__(self, gm):
        return 0


@pytest.mark.parametrize("liar", [SaysItDid(), HidesIt()])
def test_a_lying_pass_is_caught(liar):
    gm = traced(lambda x: x + x, torch.ones(2))
    with pytest.raises(PassError, match=type(liar).__name__):
        run(gm, [liar])


def test_the_price_is_asked_before_and_after_each_change():
    gm, asked = traced(lambda x: x + x, torch.ones(2)), []

    def price(gm):
        asked.append(text(gm))
        return len(asked)

    records = run(gm, [DoesNothing(), Multiply(), DoesNothing()], price=price)
    assert [record.priced for record in records] == [(1, 1), (1, 2), (2, 2)]
    assert ["mul" in found for found in asked] == [False, True]
    assert run(gm, [DoesNothing()])[0].priced is None


def test_record_and_dump(tmp_path):
    gm = traced(lambda x: x + x, torch.ones(2))
    (record,) = run(gm, [Multiply()], dump=tmp_path)
    assert (record.sites, record.tier) == (1, "exact")
    assert record.added == {"aten.mul.Tensor": 1}
    assert record.removed == {"aten.add.Tensor": 1}
    assert record.skipped[0].reason == "a reason"
    assert "aten.add" in (tmp_path / "00_Multiply.before.txt").read_text()
    assert "aten.mul" in (tmp_path / "00_Multiply.after.txt").read_text()
    assert gm(torch.full((2,), 3.0)).tolist() == [9.0, 9.0]


def test_text_is_free_of_names():
    def one(x):
        return (x @ x).relu()

    def other(renamed):
        return torch.relu(torch.mm(renamed, renamed))

    assert text(traced(one, torch.ones(2, 2))) == text(traced(other, torch.ones(2, 2)))
    assert text(traced(one, torch.ones(2, 2))) != text(traced(one, torch.ones(3, 3)))


def test_passes_are_values():
    for step in default("fp8"):
        assert step == type(step)(**vars(step))
        assert isinstance(step, passes.Pass)
        assert step.__class__.__name__ in repr(step)


def test_select_by_name():
    steps = default("fp8")
    assert select(steps, ()) == steps
    assert passes.QuantizeLinear not in map(type, select(steps, ["QuantizeLinear"]))
    with pytest.raises(PassError, match="try QuantizeLinear"):
        select(steps, ["QuantizeLinaer"])
