"""A mixture of experts through AOTAutograd, with and without the passes: the same operators in every form of the model,
the same numbers but for the order of sums."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c
import dsv3c.operators
from dsv3c.layers import MoE
from dsv3c.numerics import distance, reordered_bound
from dsv3c.passes.contract import run, text
from dsv3c.passes.fuse_permute import FusePermute
from dsv3c.passes.fuse_routing import FuseRouting
from dsv3c.passes.quantize_before_gather import QuantizeBeforeGather

PASSES = [FuseRouting(), FusePermute()]
TINY = replace(dsv3c.preset("tiny"), hidden_size=64, moe_intermediate_size=32)
V2 = {"scoring_func": "softmax", "norm_topk_prob": False}
TRAINING = Counter(gate=1, gate_backward=1, sort_by_expert=1, unpermute=2, unpermute_backward=1)


class Layer(nn.Module):
    """A residual stream around a mixture of experts."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        out = self.moe(x)
        return x + (out[0] if isinstance(out, tuple) else out)


def ours(**changes):
    return MoE(replace(TINY, **changes))


def theirs(**changes):
    transformers = pytest.importorskip("transformers", reason="their model: pip install 'dsv3c[hf]'")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    names = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    config = transformers.DeepseekV3Config(**{name: getattr(TINY, name) for name in names}, **changes)
    config._experts_implementation = "grouped_mm"
    return DeepseekV3MoE(config)


MODELS = {
    "ours": ours,
    "one group": lambda: ours(n_group=1, topk_group=1),
    "unnormalised": lambda: ours(norm_topk_prob=False),
    "V2": lambda: ours(topk_method="group_limited_greedy", **V2),
    "V2-Lite": lambda: ours(topk_method="greedy", **V2),
}


def make(name, dtype=torch.float32):
    layer = Layer((MODELS | {"theirs": theirs})[name]())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    if (bias := getattr(layer.moe.gate, "e_score_correction_bias", None)) is not None:
        nn.init.normal_(bias, std=0.2)
    return layer.to(dtype)


def traced(function, *inputs):
    gm = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    gm.graph.eliminate_dead_code()
    return gm


def names(gm):
    calls = [str(node.target).split(".") for node in gm.graph.nodes if node.op == "call_function"]
    return Counter(call[1] for call in calls if call[0] == "dsv3c" and "linear" not in call[1])


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_but_for_the_order_of_sums(name, rewritten, step):
    layer = make(name)
    x, found = torch.randn(2, 20, 64), Counter()
    expected = step(rewritten(layer, []), x)
    results = step(rewritten(layer, PASSES, found), x)
    assert found == TRAINING
    for result, reference in zip(results, expected, strict=True):
        assert distance(result, reference)[1] <= reordered_bound(1, 64, torch.float32)


@pytest.mark.parametrize(
    "wrong",
    [("gate", 1, True), ("sort_by_expert", 0), ("unpermute", 1), ("unpermute", 2), ("unpermute_backward", 2),
     ("unpermute_backward", 3), ("gate_backward", 0), ("gate_backward", 2)],
)  # fmt: skip
def test_a_mutant_breaks_the_bound(wrong, rewritten, step, mutant):
    """Experts chosen without their bias; rows, weights and gradients of the token before."""
    layer, x = make("ours"), torch.randn(2, 20, 64)
    expected = step(rewritten(layer, []), x)
    results = step(rewritten(layer, [*PASSES, mutant(*wrong)]), x)
    errors = [distance(result, reference)[1] for result, reference in zip(results, expected, strict=True)]
    assert not max(errors) <= reordered_bound(1, 64, torch.float32)


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_in_bfloat16(name, rewritten, step):
    """As the models run; transformers' experts take nothing else on a CPU."""
    found = Counter()
    layer = make(name, torch.bfloat16)
    x = torch.randn(2, 20, 64, dtype=torch.bfloat16)
    expected = step(rewritten(layer, []), x)
    results = step(rewritten(layer, PASSES, found), x)
    assert found == TRAINING
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        assert distance(result, reference)[1] <= reordered_bound(1, 64, torch.bfloat16)


def permuted(x, idx, rows=lambda order: order, experts=None):
    """What QuantizeBeforeGather finds, in a graph that has a sort by expert."""
    expert = idx.flatten()
    order = expert.argsort(stable=True)
    counts = idx.new_zeros(16).scatter_add(0, expert, torch.ones_like(expert))
    fp8, scale_inv = torch.ops.dsv3c.quantize_tile(x[rows(order) // (experts or idx.shape[1])], 1e-4, False)
    return fp8, scale_inv, counts.cumsum(0, dtype=torch.int32)


def test_permute_moves_the_same_bits():
    x, idx = torch.randn(30, 200), torch.stack([torch.randperm(16)[:4] for _ in range(30)])
    gm = traced(lambda x, idx: permuted(x, idx), x, idx)
    run(gm, [QuantizeBeforeGather(), *PASSES])
    assert names(gm) == Counter(quantize_tile=1, sort_by_expert=1, permute=1)
    for found, expected in zip(gm(x, idx), permuted(x, idx), strict=True):
        assert found.stride() == expected.stride()
        assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize(
    ("rows", "experts", "permutes"),
    [
        (lambda order: order, 4, 1),
        (lambda order: order, 5, 0),
        (lambda order: order.flip(0), 4, 0),
        (lambda order: order.argsort(), 4, 0),
    ],
    ids=["by expert", "of other tokens", "last expert first", "as they were"],
)
def test_leaves_rows_in_another_order_alone(rows, experts, permutes):
    x, idx = torch.randn(30, 200), torch.stack([torch.randperm(16)[:4] for _ in range(30)])
    gm = traced(lambda x, idx: permuted(x, idx, rows, experts), x, idx)
    run(gm, [QuantizeBeforeGather(), FuseRouting()])
    before = text(gm)
    (record,) = run(gm, [FusePermute()])
    assert record.sites == permutes
    assert (text(gm) != before) is bool(permutes)
    assert names(gm)["sort_by_expert"] == 1


def gate(x, change):
    """V3's gate, but for one thing."""
    scores = x.tanh() if change == "scores" else x.sigmoid()
    choice = (scores + torch.ones(16)).view(-1, 4, 4)
    group = choice.topk(3 if change == "three best" else 2).values.sum(-1)
    kept = group.topk(2, sorted=False).indices
    mask = torch.ones_like(group, dtype=torch.bool).scatter(1, kept, change == "dropped ones")
    fill = 0.0 if change == "fill" else -torch.inf
    idx = choice.masked_fill(mask[..., None], fill).flatten(1).topk(4, sorted=False).indices
    weights = (scores if change != "weights" else choice.flatten(1)).gather(1, idx)
    return weights * 2.5, idx


@pytest.mark.parametrize("change", ["scores", "three best", "dropped ones", "fill", "weights"])
def test_leaves_other_gates_alone(change):
    x = torch.randn(10, 16)
    for changed, sites in ((change, 0), (None, 1)):
        gm = traced(gate, x, changed)
        assert sum(record.sites for record in run(gm, PASSES)) == sites, changed


def test_a_gradient_of_the_logits_from_outside(rewritten):
    """A balance loss on logits that the layer returns: it is added to what the gate's operator computes."""

    class Routed(Layer):
        def forward(self, x):
            out, logits, _ = self.moe(x)
            return x + out, logits

    def both(layer, x):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        out, logits = layer(x)
        (out.sin().sum() + logits.sigmoid().square().sum()).backward()
        return x.grad, *(p.grad.clone() for p in layer.parameters())

    layer = Routed(make("ours").moe)
    x, found = torch.randn(2, 20, 64), Counter()
    expected = both(rewritten(layer, []), x)
    results = both(rewritten(layer, PASSES, found), x)
    assert found == TRAINING
    for result, reference in zip(results, expected, strict=True):
        assert distance(result, reference)[1] <= reordered_bound(1, 64, torch.float32)


def test_leaves_another_gradient_of_the_scores_alone(rewritten, step):
    """A gate with a loss of its own: its weights' gradient is not all that its logits get."""

    class Balanced(Layer):
        def forward(self, x):
            logits, weights, idx = self.moe.gate(x.flatten(0, 1))
            return x + self.moe.experts(x.flatten(0, 1), idx, weights).view_as(x) + logits.sigmoid().mean()

    layer = Balanced(make("ours").moe)
    x, found = torch.randn(2, 20, 64), Counter()
    expected = step(rewritten(layer, []), x)
    results = step(rewritten(layer, PASSES, found), x)
    assert found == TRAINING - Counter(gate_backward=1)
    for result, reference in zip(results, expected, strict=True):
        assert distance(result, reference)[1] <= reordered_bound(1, 64, torch.float32)
