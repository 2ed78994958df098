"""grouped_linear: both ways of computing it, against float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3c.grouped_linear import grouped_linear
from dsv3c.numerics import gemm_bounds

ENDS = ([3, 3, 10, 12], [0, 0, 12, 12], [12, 12, 12, 12], [3, 6, 9, 12])


def inputs(dtype, ends, K=32, N=24):
    torch.manual_seed(sum(ends))
    offs = torch.tensor(ends, dtype=torch.int32)
    return torch.randn(12, K, dtype=dtype), torch.randn(4, N, K, dtype=dtype), offs


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "K", "N"),
    [
        (torch.float64, 32, 24),
        (torch.float32, 32, 24),
        (torch.float32, 31, 7),
        (torch.bfloat16, 32, 24),
        (torch.bfloat16, 33, 24),
    ],
)
def test_against_float64(dtype, K, N, ends):
    x, w, offs = inputs(dtype, ends, K, N)
    expert = torch.searchsorted(offs, torch.arange(12), right=True)
    x64, w64 = x.double(), w[expert].double()
    expected = (w64 @ x64[..., None])[..., 0]
    norm = (w64.square() @ x64.square()[..., None])[..., 0].sqrt()
    element, _ = gemm_bounds(expected, norm, dtype, K)
    assert ((grouped_linear(x, w, offs).double() - expected).abs() <= element).all()


@pytest.mark.parametrize("ends", ENDS, ids=str)
def test_gradient(ends):
    x, w, offs = inputs(torch.float64, ends, K=3, N=2)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, offs), (x.requires_grad_(), w.requires_grad_()))


def test_operators_are_registered_right():
    """Schema, fake shapes, autograd, and tracing with sizes that vary, as torch checks them."""
    x, w, offs = inputs(torch.float32, ENDS[0])
    torch.library.opcheck(torch.ops.dsv3c.grouped_linear, (x.requires_grad_(), w.requires_grad_(), offs))
    torch.library.opcheck(torch.ops.dsv3c.grouped_linear_wgrad, (torch.randn(12, 24), x.detach(), offs))


def test_flops():
    x, w, offs = inputs(torch.float32, ENDS[0])
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x.requires_grad_(), w.requires_grad_(), offs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 32 * 24
