"""A gradient added to its float32 sum: one rounding, and nothing beside it."""

import pytest
import torch

import dsv3c.operators

ops = torch.ops.dsv3c
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = [(0,), (1,), (2047,), (2048,), (3, 5, 137), (2049,), (1000, 4099)]


def make(size, device):
    """Of all magnitudes, subnormals among them, and what a training step may not hide."""
    total, x = (torch.randn(size) * torch.exp2(torch.randint(-140, 100, size).float()) for _ in range(2))
    total, x = total.to(device), x.bfloat16().to(device)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 0.0)):
        x.view(-1)[i::97] = value
    total.view(-1)[1::194] = -torch.inf  # and a sum that has none
    return total, x


def same(found, expected) -> bool:
    return torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)) and torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES)
def test_one_float32_addition(size, device):
    total, x = make(size, device)
    expected = total + x.float()
    ops.accumulate_(total, x)
    assert same(total, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_in_the_midst_of_others(offset, device):
    """As a bucket of gradients holds them; what lies beside stays."""
    total, x = make((5000,), device)
    before, part = total.clone(), slice(offset, offset + 2100)
    ops.accumulate_(total[part], x[part])
    assert same(total[part], before[part] + x[part].float())
    for beside in (slice(0, offset), slice(offset + 2100, None)):
        assert same(total[beside], before[beside])


def test_fake_agrees_with_real():
    arguments = torch.randn(3, 5), torch.randn(3, 5).bfloat16()
    torch.library.opcheck(ops.accumulate_.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("total", "x", "message"),
    [
        (torch.zeros(3).bfloat16(), torch.zeros(3).bfloat16(), "dtype of total"),
        (torch.zeros(3), torch.zeros(3), "dtype of x"),
        (torch.zeros(3), torch.zeros(1).bfloat16(), "shape of x"),
        (torch.zeros(3, 3).t(), torch.zeros(3, 3).bfloat16(), "contiguous"),
        (torch.zeros(3, 3), torch.zeros(3, 3).bfloat16().t(), "contiguous"),
    ],
)
def test_bad_input(total, x, message):
    with pytest.raises(dsv3c.operators.OperatorError, match=message):
        ops.accumulate_(total, x)


@pytest.mark.gpu
class TestOnGpu:
    def test_64_bit_offsets(self):
        total = torch.zeros(2**31 + 4099, device="cuda")
        x = torch.zeros(total.shape, dtype=torch.bfloat16, device="cuda")
        at = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 4098], device="cuda")
        x[at] = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda").bfloat16()
        ops.accumulate_(total, x)
        assert total[at].tolist() == [1, 2, 3, 4]
        assert total.count_nonzero() == 4

    def test_in_a_cuda_graph(self):
        total, x = make((3, 2051), "cuda")
        ops.accumulate_(total.clone(), x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.accumulate_(total, x)
        expected = total.clone()
        for _ in range(3):
            graph.replay()
            expected += x.float()
        assert same(total, expected)
