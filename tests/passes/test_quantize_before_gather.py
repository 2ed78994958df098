"""Quantising before a gather is the same bits as after it."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c import passes
from dsv3c.passes.contract import run

FLOOR = 1e-4


def traced(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def before(x, rows):
    return torch.ops.dsv3c.quantize_tile(x[rows], FLOOR, False)


def after(x, rows):
    fp8, scale_inv = torch.ops.dsv3c.quantize_tile(x, FLOOR, False)
    # scale_inv is column-major: rows are chosen along the contiguous dimension.
    return fp8[rows], scale_inv.permute(1, 0)[:, rows].permute(1, 0)


def targets(gm):
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


X, ROWS = torch.randn(6, 200) * torch.logspace(-3, 3, 6)[:, None], torch.tensor([5, 0, 0, 3])


def test_rewrites_to_the_expected_program_bit_for_bit():
    gm = traced(before, X, ROWS)
    (record,) = run(gm, [passes.QuantizeBeforeGather()])
    assert record.sites == 1
    assert sorted(targets(gm)) == sorted(targets(traced(after, X, ROWS)))
    for out, expected in zip(gm(X, ROWS), before(X, ROWS), strict=True):
        assert torch.equal(out.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
        assert out.stride() == expected.stride()
    assert run(gm, [passes.QuantizeBeforeGather()])[0].sites == 0


def test_leaves_other_gathers_alone():
    for function in (
        lambda x, rows: torch.ops.dsv3c.quantize_tile(x[:, rows], FLOOR, False),
        lambda x, rows: torch.ops.dsv3c.quantize_tile(x[x[:, 0] > 0], FLOOR, False),
        lambda x, rows: torch.ops.dsv3c.quantize_tile(x + 1, FLOOR, False),
    ):
        gm = make_fx(function, tracing_mode="real")(X, ROWS)
        assert run(gm, [passes.QuantizeBeforeGather()])[0].sites == 0
