"""MLA decode at V3's sizes: ours, absorbed in plain torch, and what eager does (keys and values expanded, then SDPA).

    python -m dsv3c.benchmarks.bench_mla_decode --out results/

Every contender is checked against float64 attention of two sequences before any is timed. TFLOPS count 2·(576 + 512)
operations a head and key, also for contenders that do more; TB/s the latents, once. Prints a table; the last line is JSON.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dsv3c.operators  # noqa: F401
from dsv3c.benchmarks.timing import interleaved
from dsv3c.kernels.reference.mla_decode import RANK, mla_decode_ref
from dsv3c.numerics import attention_bounds

SCALE = 192**-0.5
NOPE, V_DIM = 128, 128
EXPANDED_LIMIT = 50e9  # bytes of keys and values that a contender may make
# B, T, H, S: all heads on one GPU, two tokens a step, TP8, one sequence
CASES = [
    (128, 1, 128, 4096), (128, 1, 128, 16384), (128, 1, 128, 32768), (128, 2, 128, 4096), (128, 1, 16, 4096),
    (128, 1, 16, 32768), (1, 1, 128, 4096), (1, 1, 16, 4096), (16, 1, 128, 8192),
]  # fmt: skip


def contenders(q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> dict[str, Callable[[], Tensor]]:
    B, T, H, L = q.shape
    S = table.shape[1] * 64
    latent_BSL = cache[table.long()].view(B, S, L)

    def absorbed() -> Tensor:
        scores = torch.bmm(q.flatten(1, 2), latent_BSL.mT).view(B, T, H, S) * SCALE
        if T > 1:
            seen = torch.arange(S) <= S - T + torch.arange(T)[:, None]
            scores = scores.masked_fill(~seen[None, :, None], -torch.inf)
        p = scores.float().softmax(-1).to(q.dtype)
        return torch.bmm(p.flatten(1, 2), latent_BSL[..., :RANK]).view(B, T, H, RANK)

    def expanded() -> Tensor:
        k_nope, v = (latent_BSL[..., :RANK] @ kv_b).view(B, S, H, NOPE + V_DIM).split((NOPE, V_DIM), -1)
        k = torch.cat((k_nope, latent_BSL[..., None, RANK:].expand(-1, -1, H, -1)), -1)
        return scaled_dot_product_attention(expanded_q, k.transpose(1, 2), v.transpose(1, 2), scale=SCALE)

    found = {"ours": lambda: torch.ops.dsv3c.mla_decode(q, cache, table, lengths, SCALE)[0], "absorbed": absorbed}
    if T == 1 and B * S * H * (2 * NOPE + V_DIM + 64) * 2 <= EXPANDED_LIMIT:
        kv_b = torch.randn(RANK, H * (NOPE + V_DIM), dtype=q.dtype) * RANK**-0.5
        expanded_q = torch.randn(B, H, T, NOPE + L - RANK, dtype=q.dtype)
        found["expanded"] = expanded
    return found


def check(out: Tensor, q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> None:
    for b in (0, len(q) - 1):
        one = (
            q[b : b + 1].double(),
            cache.double() if len(cache) < 4096 else cache,
            table[b : b + 1],
            lengths[b : b + 1],
        )
        keys = cache[table[b].long()].double()
        order = torch.arange(len(keys), dtype=torch.int32)[None]
        reference, lse = mla_decode_ref(one[0], keys, order, lengths[b : b + 1], SCALE)
        keys = keys.flatten(0, 1)
        scores = one[0] @ keys.T * SCALE
        p = (scores - lse[..., None]).exp()
        size = (one[0].square() @ keys.T.square()).sqrt() * SCALE
        norm = (p.square() @ keys[:, :RANK].square()).sqrt()
        score = max(float(scores.abs().max()), float(size.max()))
        element, rms, _ = attention_bounds(reference, norm, score, len(keys), q.shape[-1])
        error = (out[b : b + 1].double() - reference).abs()
        if not bool((error <= element).all()) or not float((error / norm).square().mean().sqrt()) <= rms:
            raise AssertionError(
                f"beyond the bound: RMS {float((error / norm).square().mean().sqrt()):.3g}, bound {rms:.3g}"
            )
