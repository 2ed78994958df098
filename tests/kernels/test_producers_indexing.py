"""The fused producers' indices and masks without a GPU: Triton's interpreter runs them on the CPU, program by program.

It has no inline assembly, and its casts to BF16 and FP8 are wrong. So what `tiles.py` does on words is written out
here, with E4M3 replaced by a quarter of the quotient in 8 bits; what is compared is where numbers go, within a few of
those roundings. Gluon is not interpreted: cross-entropy and the SwiGLU gradient are left to the GPU tests, the norm and
its gradient run as torch (`gluon_on_cpu.py`).
A process of its own, since the interpreter is chosen as Triton is imported.
"""

PROGRAM = """
import sys
import torch, triton
import triton.language as tl
import dsv3c.operators
from dsv3c.kernels import accumulate, embedding, norm, norm_backward, rotary, swiglu, tiles
from dsv3c.kernels.reference.embedding import embedding_backward_ref
from dsv3c.numerics import Recipe, unit_roundoff

sys.path.insert(0, sys.argv[1])
from gluon_on_cpu import GL, Kernel

@triton.jit
def pack(low, high):
    return (low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF | high.to(tl.int32, bitcast=True) & -65536

@triton.jit
def larger(a, b):
    return tl.maximum((a >> 16) & 0x7FFF, (b >> 16) & 0x7FFF) << 16 | tl.maximum(a & 0x7FFF, b & 0x7FFF)

@triton.jit
def plus(a, b):
    return pack(tiles.low(a) + tiles.low(b), tiles.high(a) + tiles.high(b))

@triton.jit
def times(a, b):
    return pack(tiles.low(a) * tiles.low(b), tiles.high(a) * tiles.high(b))

@triton.jit
def reciprocal(x):
    return 1.0 / x, x * 0.0

@triton.jit
def to_fp8(word, first, second):
    low, high = (tiles.low(word) * first * 0.25).to(tl.int32), (tiles.high(word) * first * 0.25).to(tl.int32)
    return (low & 0xFF | (high & 0xFF) << 8).to(tl.int16)

@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))

@triton.jit
def gdc_wait():
    pass

for module in (tiles, norm, norm_backward, rotary, swiglu):
    for function in (pack, larger, plus, times, reciprocal, to_fp8, sigmoid, gdc_wait):
        if hasattr(module, function.__name__):
            setattr(module, function.__name__, function)

ops, floor, ulp, eps = torch.ops.dsv3c, Recipe().amax_floor, 2 * unit_roundoff(torch.bfloat16), 2.0**-20
torch.manual_seed(0)

def normal(*shape):
    each = torch.randn(shape) * torch.exp2(torch.randint(-3, 4, (shape[0],) + (1,) * (len(shape) - 1)).float())
    return each.bfloat16()

def close(found, expected, size=None):
    # a few roundings of numbers no larger than `size`
    size = expected.float().abs() if size is None else size
    assert bool(((found.float() - expected.float()).abs() <= 8 * ulp * size + 1e-30).all())

def tiles_close(found, x):
    q, scale_inv = found[0].view(torch.int8).float() * 4, found[1].repeat_interleave(128, 1)
    amax = x.float().abs().unflatten(1, (-1, 128)).amax(-1)
    close(found[1], amax.clamp(min=floor) / 448)
    assert bool(((q * scale_inv - x.float()).abs() <= (4 + 448 * 8 * ulp) * scale_inv).all())

def empty(outputs):
    # NaN in memory that must be written
    for out in outputs:
        if out.numel():
            out.untyped_storage().fill_(255)
    return outputs

from dsv3c.operators import norm as norm_op, rotary as rotary_op, swiglu as swiglu_op

WORDS = dict(
    low=lambda word: (word << 16).view(torch.float32), high=lambda word: (word & -65536).view(torch.float32),
    pack=lambda *pair: torch.stack(pair, -1).bfloat16().view(torch.int32)[..., 0], gdc_launch_dependents=lambda: None,
)
unpacked = lambda words: words.view(torch.bfloat16).float()
packed = lambda numbers: numbers.bfloat16().view(torch.int32)

def store_tiles(words, q_at, scale_inv_at, inside, amax_floor, pow2):
    numbers = unpacked(words)
    scale_inv = numbers.abs().amax(1).clamp(min=amax_floor) / 448
    cast = (numbers / (4 * scale_inv[:, None])).to(torch.int8).view(torch.int16)
    GL.store(q_at, cast, mask=inside[:, None])
    GL.store(scale_inv_at, scale_inv, mask=inside)

norm._norm_kernel = Kernel(
    norm.__file__, "_norm_kernel", store_tiles=store_tiles,
    squares=lambda words, sums: sums + unpacked(words).square().unflatten(1, (-1, 2)).sum(-1),
    scaled=lambda words, factor: packed(unpacked(words) * factor),
    plus=lambda a, b: packed(unpacked(a) + unpacked(b)), times=lambda a, b: packed(unpacked(a) * unpacked(b)),
)
# Chunks that are full, that are not, and fewer tiles than a chunk has; rows that begin anywhere.
for R, K, normed in [(1, 128, True), (5, 640, False), (3, 2048, True), (2, 2176, True), (2, 4096, False)]:
    wide, weight = normal(R, 2 * K + 16), normal(1, K)[0]
    x, residual = wide[:, 8 : K + 8], wide[:, K + 8 : 2 * K + 8]
    out = empty(norm_op._rms_norm_quantize(x, weight, eps, floor, False))
    norm.rms_norm_quantize(x, weight, eps, floor, False, out)
    tiles_close(out[:2], norm_op.norm.rms_norm(x, weight, eps)[0])
    close(out[2], norm_op.norm.rms_norm(x, weight, eps)[1])
    out = empty(norm_op._add_rms_norm_quantize(x, residual, weight, eps, floor, False, normed))
    norm.add_rms_norm_quantize(x, residual, weight, eps, floor, False, normed, out)
    expected, rstd = norm_op.norm.rms_norm(x + residual, weight, eps)
    assert torch.equal(out[0], x + residual)
    if normed:
        close(out[1], expected)
    tiles_close(out[2:4], expected)
    close(out[4], rstd)

norm_backward._norm_backward_kernel = Kernel(norm_backward.__file__, "_norm_backward_kernel", **WORDS)
norm_backward.multiprocessors = lambda: 2
# More turns than there is room for; rows without a last chunk, or a last turn's; rows that begin anywhere, x's behind
# each other.
for R, K, add in [(1, 128, True), (203, 256, False), (90, 256, True), (19, 1536, True), (37, 1536, False),
                  (30, 1152, True), (11, 4224, False), (20, 2176, True), (3, 10240, True)]:
    wide = normal(R, 3 * K + (3 if add else 16))
    dy, x, dsum = wide[:, :K], wide[:, K : 2 * K].contiguous(), wide[:, 2 * K : 3 * K] if add else None
    weight, rstd = normal(1, K)[0], torch.rand(R)
    out = empty(norm_op._rms_norm_backward(dy, x, weight, rstd, dsum))
    norm_backward.rms_norm_backward(dy, x, weight, rstd, dsum, out)
    expected = norm_op.norm.rms_norm_backward_ref(dy, x, weight, rstd, dsum)
    close(out[0], expected[0], expected[0].float().abs().max())
    close(out[1], expected[1], expected[1].abs().max())

for R, width in [(1, 128), (17, 256)]:
    h, weight = normal(R, 2 * width), torch.rand(R)
    out = empty(swiglu_op._swiglu_quantize_save(h, weight, floor, False))
    swiglu.swiglu_quantize_save(h, weight, floor, False, out)
    tiles_close(out[:2], swiglu_op.swiglu.swiglu(h, weight))
    tiles_close(out[2:], h)

for R, H, nope, pairs in [(3, 5, 16, 4), (1, 130, 32, 8)]:
    angle = torch.rand(R, pairs) * 6
    cos, sin = angle.cos(), angle.sin()
    for inverse in (False, True):
        x = normal(R, H, nope + 2 * pairs)
        expected, size = x.clone(), x.abs().max()
        rotary_op.rotary.rotate_heads_ref(expected, cos, sin, inverse)
        rotary.rotate_heads_(x, cos, sin, inverse)
        assert torch.equal(x[..., :nope], expected[..., :nope])
        close(x, expected, size)

for R, K, pairs in [(2, 384, 8)]:
    angle = torch.rand(R, pairs) * 6
    x, weight, cos, sin = normal(R, K + 2 * pairs), normal(1, K)[0], angle.cos(), angle.sin()
    out = empty(rotary_op._latent_quantize(x, weight, cos, sin, eps, floor, False))
    rotary.latent_quantize(x, weight, cos, sin, eps, floor, False, out)
    expected = rotary_op.rotary.latent_quantize_ref(x, weight, cos, sin, eps, floor, False)
    close(out[0], expected[0], expected[0].float().abs().max(1, keepdim=True).values)
    tiles_close(out[1:3], expected[0][:, :K])
    close(out[3], expected[3])
    pages, table, lengths = normal(6, 4, K + 2 * pairs), torch.randperm(6).int().view(2, 3), torch.tensor([3, 9]).int()
    places = table[torch.arange(2), lengths // 4], lengths % 4
    latent, before = empty([torch.empty(R, K + 2 * pairs).bfloat16()])[0], pages.clone()
    rotary.latent_append_(pages, x, weight, cos, sin, eps, table, lengths, latent)
    before[places] = latent
    assert torch.equal(latent, out[0]) and torch.equal(pages, before)

# Bits: float32 sums in one order. Runs of one token that end before, at and behind what is read at a time.
for R, V, H in [(1, 1, 16), (37, 100, 200), (300, 33, 1040), (16, 17, 32), (17, 17, 32), (18, 17, 32), (0, 5, 16)]:
    for ids in (torch.randint(V, (R,)), torch.randint(min(V, 9), (R,)), torch.full((R,), V - 1),
                torch.randint(-3, V + 3, (R,))):
        dy = torch.randn(R, 2 * H)[:, ::2] if R == 17 else torch.randn(R, 2 * H)[:, :H]
        memory = torch.full((V + 6, H), torch.nan)
        out = memory[3:-3]
        embedding.embedding_backward(dy, ids, V, out)
        assert torch.equal(out, embedding_backward_ref(dy, ids, V))
        assert memory[:3].isnan().all() and memory[-3:].isnan().all()

for N in (1, 2047, 2048, 2049, 5000):
    memory, x = torch.full((N + 6,), torch.nan), torch.randn(N).bfloat16()
    total = memory[3:-3].normal_()
    expected = total + x.float()
    accumulate.accumulate_(total, x)
    assert torch.equal(total, expected) and memory[:3].isnan().all() and memory[-3:].isnan().all()
"""


def test_indices_and_masks(interpreted):
    interpreted(PROGRAM)
