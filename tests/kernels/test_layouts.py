"""Operands where they lie: slices of larger tensors, every second number, columns before rows, addresses that no copy
engine takes. Each operator gives the bits that it gives of contiguous operands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import Recipe

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0"),
    pytest.mark.usefixtures("poisoned"),
]
ops = torch.ops.dsv3c
FLOOR, EPS = Recipe().amax_floor, 2.0**-20
E, N, H = 5, 320, 256  # experts, columns in and out


def samples(check, T: int, K: int) -> dict[str, list[Any]]:
    """Arguments of operators, for T tokens with K experts each."""
    R = T * K
    x, y = check.varied(R, H, torch.bfloat16, "cuda"), check.varied(R, H, torch.bfloat16, "cuda")
    weight, weights = check.varied(1, H, torch.bfloat16, "cuda")[0], torch.rand(T, K, device="cuda")
    scale, row_weights = (FLOOR, False), torch.rand(R, device="cuda")
    q, tokens = ops.quantize_tile(x, *scale), ops.quantize_tile(x[:T], *scale)
    dy = ops.quantize_tile(check.varied(R, N, torch.bfloat16, "cuda"), *scale)
    block = ops.quantize_block(check.varied(N, H, device="cuda"), *scale)
    blocks = ops.quantize_block(check.varied(E * N, H, device="cuda").view(E, N, H), *scale)
    idx = torch.rand(T, E, device="cuda").argsort(-1)[:, :K].int()
    _, offs, permutation, inverse = ops.sort_by_expert(idx, E)
    xt, gxt = (ops.requantize_t(*q, o, *scale) for o in (None, offs))
    dyt, gdyt = (ops.requantize_t(*dy, o, *scale) for o in (None, offs))
    angle = torch.rand(R, 32, device="cuda")
    angles, heads = [angle.cos(), angle.sin()], check.varied(R, 192 * 2, torch.bfloat16, "cuda").view(R, 2, 192)
    packed = ops.quantize_e5m6(x, FLOOR)
    latent = check.varied(R, H + 64, torch.bfloat16, "cuda")
    rstd = ops.rms_norm_quantize(x, weight, EPS, *scale)[2]
    logits, total = torch.randn(T, 64, device="cuda"), torch.randn(E, N, H, device="cuda")
    pages = torch.randn(6, 64, 576, device="cuda").bfloat16(), torch.randperm(6, device="cuda").int().view(2, 3)
    queries = torch.randn(2, 1, 16, 576, device="cuda").bfloat16()
    turned = torch.rand(2, 32, device="cuda"), torch.rand(2, 32, device="cuda")
    appended = torch.randn(6, 64, H + 64, device="cuda").bfloat16(), check.varied(2, H + 64, torch.bfloat16, "cuda")
    return {
        "quantize_tile": [x, *scale],
        "quantize_tile_t": [x, offs, *scale],
        "quantize_tile_both": [x, offs, *scale],
        "requantize_t": [*q, offs, *scale],
        "quantize_block": [x, *scale],
        "dequantize_block": [*block, torch.bfloat16],
        "quantize_e5m6": [x, FLOOR],
        "dequantize_e5m6": [*packed, torch.bfloat16],
        "permute": [*tokens, permutation, inverse],
        "permute_requantize_t": [*tokens, permutation, inverse, offs, *scale],
        "unpermute": [x, inverse, weights, x[:T].clone(), y[:T].clone()],
        "unpermute_backward": [x[:T].clone(), y, inverse, weights],
        "gemm": [*q, *block, torch.bfloat16],
        "gemm_keys": [
            *q,
            *ops.quantize_block(check.varied(256, H, device="cuda"), *scale),
            heads.view(1, R, 384)[:, :, :64].clone(),
        ],
        "gemm_dgrad": [*dy, *block, torch.bfloat16],
        "gemm_wgrad": [*dyt, *xt, torch.float32],
        "gemm_wgrad_accumulate": [*dyt, *xt, total[0].clone()],
        "grouped_gemm": [*q, *blocks, offs, torch.bfloat16],
        "grouped_gemm_dgrad": [*dy, *blocks, offs, torch.bfloat16],
        "grouped_gemm_wgrad": [*gdyt, *gxt, offs, torch.bfloat16],
        "grouped_gemm_wgrad_accumulate": [*gdyt, *gxt, offs, total],
        "rms_norm_quantize": [x, weight, EPS, *scale],
        "add_rms_norm_quantize": [x, y, weight, EPS, *scale, True],
        "rms_norm_backward": [x, y, weight, rstd, x.clone()],
        "latent_quantize": [latent, weight, *angles, EPS, *scale],
        "latent_append_": [*appended, weight, *turned, EPS, pages[1], torch.tensor([70, 150], device="cuda").int()],
        "rotate_heads_": [heads, *angles, False],
        "rotate_heads": [heads, *angles, True],
        "rotate_quantize_both": [heads, *angles, *scale],
        "join_quantize_both": [heads, heads[..., :128].clone(), 128, *scale],
        "swiglu_quantize": [x, row_weights, *scale],
        "swiglu_quantize_save": [x, row_weights, *scale],
        "swiglu_quantize_backward": [*q, y[:, : H // 2].clone(), row_weights, offs, FLOOR, *scale],
        "gate": [logits, torch.randn(64, device="cuda"), 4, 2, 3, True, 2.5],
        "gate_backward": [weights, logits, idx, False, True, 2.5],
        "sort_by_expert": [idx, E],
        "embedding_backward": [x, torch.randint(50, (R,), device="cuda"), 50],
        "mla_decode": [queries, *pages, torch.tensor([70, 150], device="cuda").int(), 0.07],
        "read_pages": [*pages, torch.tensor([70, 150], device="cuda").int(), 1],
    }


WRITTEN = {"rotate_heads_": 0, "latent_append_": 0, "gemm_wgrad_accumulate": 4, "grouped_gemm_wgrad_accumulate": 5}


def around(shape: list[int], x: Tensor) -> Tensor:
    """What `x` is to be a part of: numbers that would be noticed."""
    if not x.is_floating_point():
        return torch.ones(shape, dtype=x.dtype, device=x.device)
    size = torch.Size(shape).numel() * x.itemsize
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=x.device).view(x.dtype).view(shape)


def inside(x: Tensor) -> Tensor:
    return around([n + 3 for n in x.shape], x)[tuple(slice(2, 2 + n) for n in x.shape)].copy_(x)


def rows(x: Tensor) -> Tensor:
    """Of more: scales of 1×128 tiles, which lie column by column, get gaps."""
    return inside(x.mT).mT if x.dim() > 1 and x.stride(-2) == 1 else around([len(x) + 2, *x.shape[1:]], x)[2:].copy_(x)


def off(x: Tensor) -> Tensor:
    return around([x.numel() + 1], x)[1:].view(x.shape).copy_(x)


def foreign(x: Tensor) -> Tensor:
    """Off, but for all that its storage says; as another library would hand it over."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return torch.from_dlpack(off(x).view(bits)).view(x.dtype)


def stepped(x: Tensor) -> Tensor:
    return around([*x.shape, 2], x)[..., 0].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else stepped(x)


def alike(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def run(name: str, args: list[Any]) -> list[Tensor]:
    """Results, and what the operator wrote to."""
    out = getattr(ops, name)(*args)
    written = [args[WRITTEN[name]].clone()] if name in WRITTEN else []
    return written + ([] if out is None else [out] if isinstance(out, Tensor) else list(out))


def bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


LAYOUTS = (inside, rows, off, foreign, stepped, transposed, alike)
PARTS = 8


def layouts(args: list[Any], at: int, written: bool) -> list[Callable[[Tensor], Tensor]]:
    """For the operand `at`. What is written to has to be contiguous; indices are not to be alike."""
    if written:
        return [off, foreign]
    numbers = args[at].is_floating_point() and args[at].dim() > 1
    return [layout for layout in LAYOUTS if layout is not alike or numbers]


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    "size", [(96, 3), (1, 1)]
)  # cuBLASLt has products of 288 rows, and strides of one mean nothing
def test_each_operand(check, size, part):
    wrong = []
    for name, args in list(samples(check, *size).items())[part::PARTS]:
        for at in (at for at, x in enumerate(args) if isinstance(x, Tensor)):
            for layout in layouts(args, at, at == WRITTEN.get(name)):
                contiguous, lying = ([a.clone() if isinstance(a, Tensor) else a for a in args] for _ in range(2))
                lying[at] = layout(args[at])
                contiguous[at] = torch.empty_like(args[at]).copy_(lying[at])
                what = f"{name}, operand {at}, {layout.__name__}"
                try:
                    expected, found = run(name, contiguous), run(name, lying)
                    for _ in range(0 if name in WRITTEN else 2):  # replayed
                        found = run(name, lying)
                except RuntimeError as error:
                    if "CUDA error" in str(error):  # nothing runs after it
                        raise RuntimeError(what) from error
                    wrong.append(f"{what}: {error}")
                    continue
                if not all(torch.equal(bits(f), bits(e)) for f, e in zip(found, expected, strict=True)):
                    wrong.append(what)
    assert not wrong, "\n".join(wrong)
