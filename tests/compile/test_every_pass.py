"""The contract of all passes, on the layers of both models."""

from dataclasses import is_dataclass

import pytest
import torch
from torch import fx

from dsv3c import passes
from dsv3c.compiler import compilation_of
from dsv3c.passes.contract import Level, Pass, Tier, name_of, run
from dsv3c.passes.pipeline import default

ALL = default("fp8", deterministic=True)
# What these layers give no occasion for: decoding, what other versions of torch and transformers write, other layouts.
RARE = {"AbsorbAttention", "DropSentinels", "RaiseGroupedLinear"}
ELSEWHERE = {"make_model": RARE | {"JoinKeys"}, "make_their_model": RARE | {"FoldLinear", "FuseLatent"}}


@pytest.mark.parametrize("step", ALL, ids=name_of)
def test_is_a_value_that_says_what_it_does(step):
    assert isinstance(step, Pass)
    assert isinstance(step.tier, Tier)
    assert isinstance(step.level, Level)
    assert is_dataclass(step)
    assert type(step).__dataclass_params__.frozen
    assert (hash(step), repr(step)) == (hash(type(step)()), repr(type(step)()))
    with pytest.raises(AttributeError):
        step.other = 1


@pytest.mark.parametrize("step", ALL, ids=name_of)
def test_leaves_another_program_alone(step):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = x.meta["example_value"] = torch.zeros(3)
    call = graph.call_function(torch.relu if step.level is Level.CAPTURED else torch.ops.aten.relu.default, (x,))
    call.meta = dict(x.meta)
    graph.output((call,))
    (record,) = run(fx.GraphModule({}, graph), [step])  # which holds the count against the graph
    assert record.sites == 0


@pytest.mark.parametrize("make", ELSEWHERE)
def test_finds_nothing_behind_itself(make, request, compiled, logits, monkeypatch, without_codegen):
    """Each pass is run twice where it stands in the pipeline, forward and training."""
    found = set()

    def twice(gm, steps, **kwargs):
        records = []
        for step in steps:
            records += run(gm, [step])
            (again,) = run(gm, [step])
            assert again.sites == 0, step
            found.update([name_of(step)] * bool(records[-1].sites))
        return records

    monkeypatch.setattr(passes, "run", twice)
    heads = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    model = request.getfixturevalue(make)(torch.bfloat16, num_hidden_layers=2, **heads)
    model = compiled(model, "fp8", deterministic=True)
    ids = torch.randint(0, 256, (1, 20))
    with torch.no_grad():
        logits(model, ids)
    logits(model, ids).float().square().mean().backward()
    assert len(compilation_of(model).backends) == 10
    assert set(map(name_of, ALL)) - found <= ELSEWHERE[make]
