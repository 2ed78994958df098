"""TransposePermuted: experts' rows cast along the rows from their tokens."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dsv3c.operators  # noqa: F401
from dsv3c.passes import TransposePermuted
from dsv3c.passes.contract import run, text

FLOOR = 1e-4
ops = torch.ops.dsv3c


def inputs(T=50, K=4, H=256):
    permutation = torch.randperm(T * K).int()
    inverse = permutation.argsort().int().view(T, K)
    return torch.randn(T, H), permutation, inverse, torch.tensor([70, 70, T * K], dtype=torch.int32)


def program(x, permutation, inverse, offs):
    pair = ops.quantize_tile(x, FLOOR, False)
    return ops.requantize_t(*ops.permute(*pair, permutation, inverse), offs, FLOOR, True)


def test_rewrites_to_the_same_bits():
    arguments = inputs()
    gm = make_fx(program, tracing_mode="fake")(*arguments)
    (record,) = run(gm, [TransposePermuted()])
    assert record.sites == 1
    assert "dsv3c.permute.default" not in text(gm)
    assert "dsv3c.requantize_t.default" not in text(gm)
    for found, expected in zip(gm(*arguments), program(*arguments), strict=True):
        assert torch.equal(found.float(), expected.float())
        assert found.stride() == expected.stride()
    assert run(gm, [TransposePermuted()])[0].sites == 0


def other_scales(x, permutation, inverse, offs):
    pair = ops.permute(*ops.quantize_tile(x, FLOOR, False), permutation, inverse)
    other = ops.permute(*ops.quantize_tile(x * 2, FLOOR, False), permutation, inverse)
    return *ops.requantize_t(pair[0], other[1], offs, FLOOR, False), pair[1], other[0]


def no_permutation(x, permutation, inverse, offs):
    return ops.requantize_t(*ops.quantize_tile(x, FLOOR, False), None, FLOOR, False)


def no_groups(x, permutation, inverse, offs):
    pair = ops.permute(*ops.quantize_tile(x, FLOOR, False), permutation, inverse)
    return ops.requantize_t(*pair, None, FLOOR, False)


@pytest.mark.parametrize("function", [other_scales, no_permutation, no_groups])
def test_leaves_casts_of_other_values_alone(function):
    gm = make_fx(function, tracing_mode="fake")(*inputs())
    assert run(gm, [TransposePermuted()])[0].sites == 0
