"""The gate behind its product, and the sort of token copies by expert: three launches, no atomics on memory.

A row of logits is small, so the gate is arithmetic and latency, not bytes. One warp has whole rows: nothing waits at a
barrier. Scores are compared as integers in the same order, because Hopper reduces integers over a warp in one
instruction; the best expert of the rest is then two of them, the greatest key and the lowest place that has it.

The sort cuts the copies into at most 128 tiles, and counts each tile's experts. Then each tile reads all counts: those
of all tiles say where an expert's rows begin, those of the tiles before it where its own do. One launch in which each
expert reads all of topk_idx and keeps its copies in order took 31 µs instead of 9 (H200, 4096 tokens); the gate, 8.
Each launch begins while the one before it ends, and waits for it: with 4096 tokens all three take 20.3 µs, one behind
the other 21.8 (in another run).
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I32, Variant
from dsv3c.numerics import ceil_div, round_up

GATE_TOKENS, BACKWARD_TOKENS = 2, 4  # of one program, which is one warp
MOST_TILES, COUNT_BLOCK, SORT = 128, 256, {"BLOCK": 32, "CHUNK": 64}
LOWEST = tl.constexpr(-(2**31))  # less than the key of any number
MINUS_INFINITY = tl.constexpr(-2139095041)  # its key


@triton.jit
def _key(x):
    """Integers in the order of the floats x, without −0; NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _number(key):
    return tl.where(key >= 0, key, key ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def _best(key, place):
    """Of each row the greatest key, and the first place that has it."""
    top = tl.max(key, 1)
    return top, tl.min(tl.where(key == tl.expand_dims(top, 1), place, 0x7FFFFFFF), 1)


@triton.jit
def _sigmoid(x):
    """torch's bits: its exp and a true division, not the fast ones of tl.sigmoid."""
    return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@launched
@triton.jit(do_not_specialize=["T"])
def _gate_kernel(
    logits_ptr, bias_ptr, weights_ptr, idx_ptr, T, logits_stride, factor, E: tl.constexpr, N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr, TOP_K: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Rows of GROUPS × WIDTH places, each group's experts first; powers of two, places without an expert never win."""
    SIZE: tl.constexpr = E // N_GROUP
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    logits_ptr += token[:, None].to(tl.int64) * logits_stride
    place = tl.arange(0, GROUPS * WIDTH)[None, :]
    expert = place // WIDTH * SIZE + place % WIDTH
    real = (place < N_GROUP * WIDTH) & (place % WIDTH < SIZE)
    inside = (token < T)[:, None]
    x = tl.load(logits_ptr + expert, mask=inside & real, other=float("-inf"))
    if bias_ptr is None:
        top = tl.max(x, 1)[:, None]
        total = tl.sum(libdevice.exp(x - top), 1)[:, None]
        choice = tl.div_rn(libdevice.exp(x - top), total)
    else:
        choice = _sigmoid(x) + tl.load(bias_ptr + expert, mask=real, other=0.0)
    key = tl.where(real, _key(choice), LOWEST)

    if N_GROUP > 1:
        in_group = tl.reshape(key, (TOKENS * GROUPS, WIDTH))
        best, at = _best(in_group, tl.arange(0, WIDTH)[None, :])
        if bias_ptr is not None:
            rest = tl.where(tl.arange(0, WIDTH)[None, :] == at[:, None], LOWEST, in_group)
            best = _key(_number(best) + _number(tl.max(rest, 1)))
        group = tl.arange(0, GROUPS)[None, :]
        best = tl.where(group < N_GROUP, tl.reshape(best, (TOKENS, GROUPS)), LOWEST)
        dropped = best == best
        for _ in tl.static_range(TOPK_GROUP):
            _, at = _best(best, group)
            dropped = dropped & (group != at[:, None])
            best = tl.where(group == at[:, None], LOWEST, best)
        dropped = tl.broadcast_to(dropped[:, :, None], (TOKENS, GROUPS, WIDTH))
        key = tl.where(tl.reshape(dropped, (TOKENS, GROUPS * WIDTH)) & real, MINUS_INFINITY, key)

    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((TOKENS, SLOTS), tl.int32)
    for k in tl.static_range(TOP_K):
        _, at = _best(key, place)
        chosen = tl.where(slot == k, at[:, None], chosen)
        key = tl.where(place == at[:, None], LOWEST, key)
    gdc_launch_dependents()  # from the start, those that wait would take the place of rows to come
    chosen = chosen // WIDTH * SIZE + chosen % WIDTH
    filled = inside & (slot < TOP_K)
    score = tl.load(logits_ptr + chosen, mask=filled, other=float("-inf"))
    if bias_ptr is None:
        score = tl.div_rn(libdevice.exp(score - top), total)
    else:
        score = _sigmoid(score)
    if NORM:
        score = tl.div_rn(score, tl.sum(score, 1)[:, None] + 1e-20)
    out = token[:, None].to(tl.int64) * TOP_K + slot
    tl.store(weights_ptr + out, score * factor, mask=filled)
    tl.store(idx_ptr + out, chosen, mask=filled)


@launched
@triton.jit(do_not_specialize=["T"])
def _gate_backward_kernel(
    dweights_ptr, logits_ptr, idx_ptr, dlogits_ptr, T, logits_stride, factor, E: tl.constexpr, TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr, NORM: tl.constexpr, PLACES: tl.constexpr, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = token[:, None].to(tl.int64)
    slot = tl.arange(0, SLOTS)[None, :]
    expert = tl.arange(0, PLACES)[None, :]
    filled = (token < T)[:, None] & (slot < TOP_K)
    inside = (token < T)[:, None] & (expert < E)
    idx = tl.load(idx_ptr + row * TOP_K + slot, mask=filled, other=-1)
    dscore = tl.load(dweights_ptr + row * TOP_K + slot, mask=filled, other=0.0) * factor
    score = tl.load(logits_ptr + row * logits_stride + idx, mask=filled, other=float("-inf"))
    if SOFTMAX:
        x = tl.load(logits_ptr + row * logits_stride + expert, mask=inside, other=float("-inf"))
        top = tl.max(x, 1)[:, None]
        scores = libdevice.exp(x - top)
        total = tl.sum(scores, 1)[:, None]
        scores = tl.div_rn(scores, total)
        score = tl.div_rn(libdevice.exp(score - top), total)
    else:
        score = _sigmoid(score)
    score = tl.where(filled, score, 0.0)
    if NORM:
        total = tl.sum(score, 1)[:, None] + 1e-20
        dscore = tl.div_rn(dscore - tl.div_rn(tl.sum(dscore * score, 1)[:, None], total), total)
    if not SOFTMAX:
        dscore = dscore * score * (1.0 - score)
    dlogits = tl.zeros((TOKENS, PLACES), tl.float32)
    for k in tl.static_range(TOP_K):
        mine = tl.sum(tl.where(slot == k, dscore, 0.0), 1)[:, None]
        at = tl.sum(tl.where(slot == k, idx, 0), 1)[:, None]
        dlogits = tl.where(expert == at, mine, dlogits)
    if SOFTMAX:
        dlogits = scores * (dlogits - tl.sum(tl.where(filled, dscore * score, 0.0), 1)[:, None])
    tl.store(dlogits_ptr + row * E + expert, dlogits, mask=inside)


@launched
@triton.jit(do_not_specialize=["R", "tile"])
def _count_experts_kernel(idx_ptr, counts_ptr, R, tile, E: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    gdc_launch_dependents()
    expert = tl.arange(0, PLACES)
    counts = tl.zeros((PLACES,), tl.int32)
    gdc_wait()
    first = tl.program_id(0) * tile
    end = tl.minimum(first + tile, R)
    for start in range(first, end, BLOCK):
        copy = start + tl.arange(0, BLOCK)
        idx = tl.load(idx_ptr + copy, mask=copy < end, other=0)
        counts += tl.histogram(idx, PLACES, mask=copy < end)
    tl.store(counts_ptr + tl.program_id(0) * E + expert, counts, mask=expert < E)


@launched
@triton.jit(do_not_specialize=["R", "tiles", "tile"])
def _sort_by_expert_kernel(
    idx_ptr, counts_ptr, num_tokens_ptr, offs_ptr, permutation_ptr, inverse_ptr, R, tiles, tile,
    E: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    expert = tl.arange(0, PLACES)
    gdc_wait()
    num_tokens = tl.zeros((PLACES,), tl.int32)
    before = tl.zeros((PLACES,), tl.int32)
    for first in range(0, tiles, CHUNK):
        row = first + tl.arange(0, CHUNK)[:, None]
        mask = (row < tiles) & (expert < E)[None, :]
        counts = tl.load(counts_ptr + row * E + expert[None, :], mask=mask, other=0)
        num_tokens += tl.sum(counts, 0)
        before += tl.sum(tl.where(row < program, counts, 0), 0)
    end = tl.cumsum(num_tokens, 0)
    if program == 0:
        tl.store(num_tokens_ptr + expert, num_tokens, mask=expert < E)
        tl.store(offs_ptr + expert, end, mask=expert < E)
    next_row = end - num_tokens + before
    at = tl.arange(0, BLOCK)
    for start in range(program * tile, tl.minimum((program + 1) * tile, R), BLOCK):
        copy = start + at
        idx = tl.load(idx_ptr + copy, mask=copy < R, other=0)
        earlier = (idx[:, None] == idx[None, :]) & (at[None, :] < at[:, None])
        row = tl.gather(next_row, idx, 0) + tl.sum(earlier.to(tl.int32), 1)
        next_row += tl.histogram(idx, PLACES, mask=copy < R)
        tl.store(permutation_ptr + row, copy, mask=copy < R)
        tl.store(inverse_ptr + copy, row, mask=copy < R)


def gate(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    top_k: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::gate`."""
    T, E = logits_TE.shape
    if T == 0:
        return
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    bias_E = bias_E if bias_E is None else bias_E.contiguous()
    _gate_kernel[(ceil_div(T, GATE_TOKENS),)](
        logits_TE, bias_E, *out, T, logits_TE.stride(0), routed_scaling_factor,
        *_gate_constants(E, n_group, topk_group, top_k, norm_topk_prob).values(), GATE_TOKENS, num_warps=1,
    )  # fmt: skip


def _gate_constants(E: int, n_group: int, topk_group: int, top_k: int, norm: bool) -> dict[str, int | bool]:
    sizes = {"E": E, "N_GROUP": n_group, "TOPK_GROUP": topk_group, "TOP_K": top_k, "NORM": norm}
    padded = {"GROUPS": n_group, "WIDTH": E // n_group, "SLOTS": top_k}
    return sizes | {name: triton.next_power_of_2(size) for name, size in padded.items()}


def gate_backward(
    dtopk_weights_TK: Tensor,
    logits_TE: Tensor,
    topk_idx_TK: Tensor,
    is_softmax: bool,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    out: Tensor,
) -> None:
    """Launcher of `dsv3c::gate_backward`."""
    (T, E), top_k = logits_TE.shape, topk_idx_TK.shape[1]
    if T == 0:
        return
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    _gate_backward_kernel[(ceil_div(T, BACKWARD_TOKENS),)](
        dtopk_weights_TK.contiguous(), logits_TE, topk_idx_TK.contiguous(), out, T, logits_TE.stride(0),
        routed_scaling_factor, E, top_k, is_softmax, norm_topk_prob, triton.next_power_of_2(E),
        triton.next_power_of_2(top_k), BACKWARD_TOKENS, num_warps=1,
    )  # fmt: skip


def sort_by_expert(topk_idx_TK: Tensor, num_experts: int, out: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Launcher of `dsv3c::sort_by_expert`."""
    topk_idx_TK, R = topk_idx_TK.contiguous(), topk_idx_TK.numel()
    tile = round_up(max(ceil_div(R, MOST_TILES), 1), SORT["BLOCK"])
    tiles = max(ceil_div(R, tile), 1)
    counts = topk_idx_TK.new_empty((tiles, num_experts))
    sizes = {"E": num_experts, "PLACES": _places(num_experts)}
    _count_experts_kernel[(tiles,)](topk_idx_TK, counts, R, tile, **sizes, BLOCK=COUNT_BLOCK, launch_pdl=True)
    _sort_by_expert_kernel[(tiles,)](topk_idx_TK, counts, *out, R, tiles, tile, **sizes, **SORT, launch_pdl=True)


def _places(num_experts: int) -> int:
    return max(triton.next_power_of_2(num_experts), 32)


def variants() -> Iterator[Variant]:
    operands = {"logits_ptr": F32, "weights_ptr": F32, "idx_ptr": I32, "factor": "fp32"}
    biased, plain = ({"bias_ptr": F32}, {}), ({}, {"bias_ptr": None})
    for (bias, none), sizes in [
        (biased, (256, 8, 4, 8, True)),  # V3
        (biased, (384, 1, 1, 8, True)),  # Kimi-K2
        (plain, (160, 8, 3, 6, False)),  # V2
        (plain, (64, 1, 1, 6, False)),  # V2-Lite
    ]:
        constants = none | _gate_constants(*sizes) | {"TOKENS": GATE_TOKENS}
        yield Variant(_gate_kernel, operands | bias, constants, num_warps=1)
    for softmax in (False, True):
        constants = {"E": 256, "TOP_K": 8, "SOFTMAX": softmax, "NORM": True, "PLACES": 256, "SLOTS": 8}
        constants |= {"TOKENS": BACKWARD_TOKENS}
        arguments = {"dweights_ptr": F32, "logits_ptr": F32, "idx_ptr": I32, "dlogits_ptr": F32, "factor": "fp32"}
        yield Variant(_gate_backward_kernel, arguments, constants, num_warps=1)
    sizes = {"E": 256, "PLACES": 256}
    counted = {"idx_ptr": I32, "counts_ptr": I32}
    yield Variant(_count_experts_kernel, counted, sizes | {"BLOCK": COUNT_BLOCK})
    results = {f"{name}_ptr": I32 for name in ("num_tokens", "offs", "permutation", "inverse")}
    yield Variant(_sort_by_expert_kernel, counted | results, sizes | SORT)
