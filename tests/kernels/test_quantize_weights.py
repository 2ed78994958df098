"""A layer's weights quantised in one call: each stack as `quantize_block` would, twice if transposed, bit for bit."""

import pytest
import torch

import dsv3c.operators  # noqa: F401
from dsv3c.kernels.reference import casts as reference
from dsv3c.numerics import Recipe
from dsv3c.operators import OperatorError

FLOOR = Recipe().amax_floor
ops = torch.ops.dsv3c
# Sizes of multiples of 16, off the block too.
ALIGNED = (((128, 144), (384, 144), (80, 144)), ((272, 80),), ((3, 144, 272),), ((16, 16),), ((256, 128), (128, 128)))
# Of each stack the shapes of its weights.
STACKS = (
    ((128, 256), (384, 256), (72, 256)),
    ((130, 257),),
    ((3, 256, 384),),
    ((2, 130, 48),),
    ((256, 128), (128, 128)),
    ((1, 1),),
)


def layer(check, stacks=STACKS, dtype=torch.bfloat16, device="cpu"):
    def weight(*batch_rows, columns):
        rows = torch.Size(batch_rows).numel()
        w = check.varied(rows, columns, dtype, device).view(*batch_rows, columns)
        w[..., ::7] = -0.0
        return w

    weights = [weight(*shape[:-1], columns=shape[-1]) for stack in stacks for shape in stack]
    return weights, [len(stack) for stack in stacks]


def same(found, expected) -> bool:
    return (
        (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
        and torch.equal(found.double(), expected.double())
        and torch.equal(found.double().signbit(), expected.double().signbit())
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pow2", [False, True])
def test_each_stack_as_one_weight(check, pow2, transposed):
    weights, stacks = layer(check)
    copies, rest = iter(ops.quantize_weights(weights, stacks, FLOOR, pow2, transposed)), iter(weights)
    for count in stacks:
        expected = ops.quantize_block(torch.cat([next(rest) for _ in range(count)], -2), FLOOR, pow2)
        assert all(same(next(copies), e) for e in expected)
        for e in expected if transposed else ():
            t = next(copies)
            assert t.mT.is_contiguous()
            assert not t._is_view()
            assert torch.equal(t.double(), e.double())
    assert next(copies, None) is None


def test_fake_agrees_with_real(check):
    weights, stacks = layer(check)
    args = weights, stacks, FLOOR, False, True
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = ops.quantize_weights(list(map(mode.from_tensor, weights)), *args[1:])
    for fake, real in zip(fakes, ops.quantize_weights(*args), strict=True):
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize(
    ("shapes", "stacks", "message"),
    [
        (((100, 256), (128, 256)), [2], "multiple of 128"),
        (((128, 256), (128, 128)), [2], "rows apart"),
        (((2, 128, 256), (2, 128, 256)), [2], "rows apart"),
        (((128, 256), (128, 256)), [1], "number of weights"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(shapes, stacks, message):
    with pytest.raises(OperatorError, match=message):
        ops.quantize_weights([torch.zeros(shape) for shape in shapes], stacks, FLOOR, False, False)


# Triton's interpreter on the CPU, chosen as Triton is imported: hence a process of its own. Its casts to FP8 round
# otherwise, and it knows no assembly: small integers times a power of two for each block are exact in FP8.
INDEXING = """
import torch, triton
import triton.language as tl
import dsv3c.operators
from dsv3c.kernels import quantize_weights as family

@triton.jit
def _reciprocal(x):
    return 1 / x

@triton.jit
def _divide(x, divisor, reciprocal):
    return x / divisor

family._reciprocal, family._divide = _reciprocal, _divide
tensor = torch.tensor
torch.tensor = lambda *args, pin_memory=False, **kwargs: tensor(*args, **kwargs)
torch.manual_seed(0)

def weight(*shape):
    w = torch.randint(-15, 16, shape).float()
    blocks = torch.exp2(torch.randint(-9, 9, (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))).float())
    return w * blocks.repeat_interleave(128, -2)[..., : shape[-2], :].repeat_interleave(128, -1)[..., : shape[-1]]

for stacks in ([[(384, 144), (80, 144)], [(144, 16)]], [[(2, 130, 140)]]):
    weights, counts = [weight(*shape) for stack in stacks for shape in stack], list(map(len, stacks))
    expected = torch.ops.dsv3c.quantize_weights(weights, counts, 2.0**-40, True, True)
    found = [torch.empty_like(e).fill_(torch.nan) for e in expected]
    family.quantize_weights(weights, counts, 2.0**-40, True, True, found)
    assert all(f.stride() == e.stride() and torch.equal(f.float(), e.float()) for f, e in zip(found, expected))
"""


def test_indices_and_masks(interpreted):
    interpreted(INDEXING)


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kernel_against_definition(check, dtype, transposed):
    for stacks in (STACKS, STACKS[2:3], STACKS[4:5], (((256, 64), (128, 64), (640, 64)),), ALIGNED):
        weights, counts = layer(check, stacks, dtype, "cuda")
        weights[0] = torch.cat([weights[0]] * 2, -1)[..., : weights[0].shape[-1]]  # rows apart
        for pow2 in (False, True):
            found = ops.quantize_weights(weights, counts, FLOOR, pow2, transposed)
            expected = reference.quantize_weights_ref(weights, counts, FLOOR, pow2, transposed)
            assert all(map(same, found, expected))


@pytest.mark.gpu
def test_kernel_on_weights_of_several_dtypes_empty_ones_and_nan(check):
    weights, counts = layer(check, STACKS[1:], device="cuda")
    weights = [w.float() if i % 2 else w for i, w in enumerate(weights)]
    weights[0][3, 5] = torch.nan
    weights, counts = [*weights, torch.empty(0, 256, device="cuda")], [*counts, 1]
    assert_nan_stays(weights, counts)
    weights, counts = layer(check, ALIGNED[1:], device="cuda")
    weights[0][3, 5] = torch.nan
    assert_nan_stays(weights, counts)


def assert_nan_stays(weights, counts):
    """In the first block of the first weight."""
    found = ops.quantize_weights(weights, counts, FLOOR, False, True)
    expected = reference.quantize_weights_ref(weights, counts, FLOOR, False, True)
    assert bool(found[0].float().isnan()[:128, :128].all())
    assert not found[0].float().isnan()[128:].any()
    for f, e in zip(found, expected, strict=True):
        assert same(f.nan_to_num() if f.dtype == torch.float32 else f.float().nan_to_num(), e.float().nan_to_num())


@pytest.mark.gpu
def test_offsets_of_64_bits():
    w = torch.zeros(17, 16384, 8192, dtype=torch.bfloat16, device="cuda")  # 2^31.1 values
    w[16, 16383, 8000:] = 3.0
    found = ops.quantize_weights([w], [1], FLOOR, False, True)
    for q, scale_inv in (found[:2], found[2:]):
        assert bool((q[16, 16383, 8000:].float() == 448).all())
        assert bool((q[16, 16383, :8000] == 0).all())
        assert float(scale_inv[16, 127, 63]) == float(scale_inv.max())
