"""JoinKeys on transformers' keys, and on what it must leave alone."""

import pytest
import torch

from dsv3c.numerics import distance, reordered_bound
from dsv3c.passes import JoinKeys
from dsv3c.passes.contract import run, text

B, T, H, NOPE, ROPE, V = 2, 5, 3, 16, 8, 12


def captured(function, *inputs):
    graphs = []

    def backend(gm, example_inputs):
        before, sites = text(gm), [run(gm, [JoinKeys()])[0].sites for _ in range(2)]
        graphs.append((before, text(gm), sites))
        return gm.forward

    torch._dynamo.reset()
    out = torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return *graphs[0], out


def expand_kv(kv, rope, nope=NOPE, dim=-1, before=lambda keys: None):
    """As transformers 5 does."""
    kv = kv.view(B, T, H, -1).transpose(1, 2)
    k_nope, values = torch.split(kv, [NOPE, V], dim=dim)
    rope = rope.view(B, 1, T, ROPE).expand(-1, H, -1, -1)
    keys = kv.new_empty(*kv.shape[:-1], NOPE + ROPE)
    keys[..., :nope].copy_(k_nope if nope == NOPE else k_nope[..., :nope])
    extra = before(keys)
    keys[..., NOPE:].copy_(rope)
    return (keys, values) if extra is None else (keys, values, extra)


@pytest.fixture
def operands():
    return torch.randn(B, T, H * (NOPE + V), requires_grad=True), torch.randn(B, T, ROPE, requires_grad=True)


def test_the_same_keys_and_gradients(operands):
    before, after, sites, out = captured(expand_kv, *operands)
    assert sites == [1, 0]
    assert "copy_" in before
    for name in ("copy_", "new_empty"):
        assert name not in after
    expected = expand_kv(*operands)
    assert all(torch.equal(f, e) for f, e in zip(out, expected, strict=True))
    assert out[0].transpose(1, 2).is_contiguous()
    gradients = [torch.randn_like(x) for x in out]
    found, truth = (torch.autograd.grad(results, operands, gradients) for results in (out, expected))
    assert torch.equal(found[0], truth[0])
    assert distance(found[1], truth[1])[1] <= reordered_bound(1, H, torch.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"nope": NOPE - 1},  # a gap, or what copies are of is not what was split off
        {"before": lambda keys: keys[..., 0].sum()},  # read between the copies
        {"before": lambda keys: keys.zero_()},
    ],
)
def test_leaves_alone(operands, changes):
    operands = [x.detach() for x in operands]
    before, after, sites, _ = captured(lambda *inputs: expand_kv(*inputs, **changes), *operands)
    assert (sites, after) == ([0, 0], before)


def test_leaves_our_keys_alone(operands):
    def ours(kv, rope):
        nope, values = kv.view(B, T, H, -1).split((NOPE, V), dim=-1)
        return torch.cat((nope, rope[:, :, None].expand(-1, -1, H, -1)), -1).transpose(1, 2), values.new_empty(3).sum()

    before, after, sites, _ = captured(ours, *operands)
    assert (sites, after) == ([0, 0], before)
