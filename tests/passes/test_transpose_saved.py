"""TransposeSaved: a cast along the rows from the BF16 value, where that is saved for another reader."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes import TransposeSaved
from dsv3c.passes.contract import run, text

FLOOR = 1e-4
ops = torch.ops.dsv3c


def program(x, dy, *, again):
    rows = x.permute(1, 0, 2).view(-1, 256)
    pair = ops.quantize_tile(rows, FLOOR, False)
    return *ops.requantize_t(*pair, None, FLOOR, False), (x * dy if again else dy * 2)


@pytest.mark.parametrize("again", [True, False])
def test_only_where_backward_reads_the_value_itself(again):
    x, dy = torch.randn(200, 4, 64).transpose(0, 1), torch.randn(4, 200, 64)  # two tiles
    gm = make_fx(lambda x, dy: program(x, dy, again=again), tracing_mode="fake")(x, dy)
    for node in gm.graph.nodes:
        if node.target in (torch.ops.aten.mul.Tensor, ops.requantize_t.default):
            node.meta["partitioner_tag"] = "is_backward"
    (record,) = run(gm, [TransposeSaved()])
    assert record.sites == again
    if again:
        assert "requantize_t" not in text(gm)
        expected = ops.quantize_tile_t(x.permute(1, 0, 2).view(-1, 256), None, FLOOR, False)
        for found, reference in zip(gm(x, dy), expected, strict=False):
            assert torch.equal(found.float(), reference.float())
    assert run(gm, [TransposeSaved()])[0].sites == 0
