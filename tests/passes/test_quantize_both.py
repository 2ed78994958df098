"""QuantizeBoth: one operator for two casts of one value, and of one value only."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes import QuantizeBoth
from dsv3c.passes.contract import run, text

FLOOR, OFFS = 2.0**-64, torch.tensor([3, 3, 130], dtype=torch.int32)
ops = torch.ops.dsv3c


def traced(function, *inputs):
    return make_fx(function, tracing_mode="fake")(*inputs)


def before(x, offs=None):
    along_rows = ops.quantize_tile_t(x, offs, FLOOR, False)
    return *along_rows, *ops.quantize_tile(x, FLOOR, False)


def after(x, offs=None):
    fp8, scale_inv, fp8_t, scale_inv_t = ops.quantize_tile_both(x, offs, FLOOR, False)
    return fp8_t, scale_inv_t, fp8, scale_inv


@pytest.mark.parametrize("offs", [(), (OFFS,)])
def test_rewrites_to_the_expected_program_bit_for_bit(offs):
    x = torch.randn(130, 200) * torch.logspace(-3, 3, 130)[:, None]
    gm = traced(before if offs else lambda x: before(x), x, *offs)
    (record,) = run(gm, [QuantizeBoth()])
    assert record.sites == 1
    assert sorted(text(gm).count(f"{name}.default(") for name in ("quantize_tile", "quantize_tile_both")) == [0, 1]
    for found, expected, same in zip(gm(x, *offs), before(x, *offs), after(x, *offs), strict=True):
        assert torch.equal(found.float(), expected.float())
        assert torch.equal(found.float(), same.float())
        assert found.stride() == expected.stride()
    assert run(gm, [QuantizeBoth()])[0].sites == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (*ops.quantize_tile(x, FLOOR, False), *ops.quantize_tile_t(x + 1, None, FLOOR, False)),
        lambda x: (*ops.quantize_tile(x, FLOOR, False), *ops.quantize_tile_t(x, None, 1e-4, False)),
        lambda x: (*ops.quantize_tile(x, FLOOR, False), *ops.quantize_tile_t(x, None, FLOOR, True)),
        lambda x: ops.quantize_tile_t(x, None, FLOOR, False),
    ],
)
def test_leaves_casts_of_other_values_and_recipes_alone(function):
    assert run(traced(function, torch.randn(130, 200)), [QuantizeBoth()])[0].sites == 0
