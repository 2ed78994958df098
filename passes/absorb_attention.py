"""Decode over the latent cache as it is, instead of over keys and values expanded from it."""

import operator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import fx

import dsv3c.attention
import dsv3c.operators  # noqa: F401
from dsv3c.operators.mla_decode import LATENT, PAGE, RANK
from dsv3c.passes.contract import Level, Tier, leave
from dsv3c.passes.rewrite import aten, insert, size, through_transposes, value

_LAYOUT = (aten.permute.default, aten.view.default, aten.alias.default, aten.unsqueeze.default, aten.expand.default)
_END = 2**63 - 1


@dataclass(frozen=True)
class AbsorbAttention:
    """Before: `attention(q, [latent w_k | rope], latent w_v)` of one new token and a cache, w the layer's kv_b_proj;
    of several if the cache is in pages.
    After: `mla_decode([q w_k | q_rope], [latent | rope]) w_v`, associated the other way around; over the pages
    themselves if the latents and the mask are what `read_pages` found in them.

    The expanded form multiplies every cached token by kv_b_proj in every step (64 sequences of 4096: 8.8 TFLOP and
    21 GB a layer of V3), this one reads 576 values a token. NUMERIC because the products round elsewhere. Leaves alone:
    other masks, several new tokens without pages, training, and a latent of other than V3's 512 + 64 values, which the
    kernel is for.

    Source: DeepSeek-V2 report, section 2.1.2 ("absorbed"); FlashMLA.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        sites = 0
        for node in list(gm.graph.nodes):
            if node.target is not torch.ops.dsv3c.attention.default:
                continue
            q, k, v, mask, scale, is_causal = node.args
            one_token = isinstance(value(q).shape[2], int) and value(q).shape[2] == 1
            if is_causal or not (one_token or _reads_pages(mask)):
                continue  # a prefill
            expansion = _expansion(k, v)
            if expansion is None:
                leave(node, "decoding, but not from a latent of 512 + 64 values")
                continue
            pages = _pages_of(expansion, mask)
            if (mask is not None and pages is None) or any(user.args[1] != 0 for user in node.users):
                leave(node, "decoding with a mask, or in training")
                continue
            out = _absorbed(node, q, scale, expansion, pages)
            for user in list(node.users):
                user.replace_all_uses_with(out)
                gm.graph.erase_node(user)
            gm.graph.erase_node(node)
            sites += 1
        return sites


class _Expansion(NamedTuple):
    latent: fx.Node  # [.., S, RANK]
    rope: fx.Node  # [.., S, LATENT - RANK]
    weight: fx.Node  # [H * (nope + v), RANK]
    nope: int


def _expansion(k: fx.Node, v: fx.Node) -> _Expansion | None:
    """What keys and values are made of, if they are those of multi-head latent attention."""
    parts = _concatenated(_under(k))
    values = _half(_under(v), 1)
    keys = parts and _half(_under(parts[0]), 0)
    if values is None or keys != values:
        return None
    product = _under(values.args[0])
    if product.target is not aten.mm.default or value(parts[1]).shape[-1] != LATENT - RANK:
        return None
    weight, transposed = through_transposes(product.args[1])
    latent = _under(product.args[0])
    if not transposed or value(weight).shape[1] != RANK:
        return None
    return _Expansion(latent, _under(parts[1]), weight, values.args[1][0])


def _under(node: fx.Node) -> fx.Node:
    """What `node` is a view of, slices that take all included."""
    while node.target in _LAYOUT or (node.target is aten.slice.Tensor and node.args[2:] == (0, _END)):
        node = node.args[0]
    return node


def _half(node: fx.Node, index: int) -> fx.Node | None:
    """The split in two of the last dimension whose result number `index` is `node`."""
    if node.target is not operator.getitem or node.args[1] != index:
        return None
    split = node.args[0]
    is_split = split.target is aten.split_with_sizes.default and len(split.args[1]) == 2
    return split if is_split and split.args[2] in (-1, value(split.args[0]).dim() - 1) else None


def _concatenated(k: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two parts of k along its last dimension, put together by `cat`, or by copies into an empty tensor."""
    last = value(k).dim() - 1
    if k.target is aten.cat.default and len(k.args[0]) == 2 and k.args[1] in (-1, last):
        return tuple(k.args[0])
    if k.target is not aten.slice_scatter.default or k.args[0].target is not aten.slice_scatter.default:
        return None
    first, second = k.args[0], k
    width = value(first.args[1]).shape[-1]
    whole = first.args[2:] == (last, 0, width) and second.args[2:] == (last, width, _END)
    copies = first.args[1], second.args[1]
    if not whole or any(copy.target is not aten.copy.default for copy in copies):
        return None
    return copies[0].args[1], copies[1].args[1]


def _reads_pages(mask: fx.Node | None) -> bool:
    """Whether the mask is the one that comes with the latents of pages."""
    seen = mask and _under(mask)
    return (
        seen is not None
        and seen.target is operator.getitem
        and (seen.args[0].target, seen.args[1]) == (torch.ops.dsv3c.read_pages.default, 1)
    )


def _pages_of(expansion: _Expansion, mask: fx.Node | None) -> tuple[fx.Node, ...] | None:
    """Pages, their table and the lengths, if latents and mask were read from them in one."""
    split = _half(expansion.latent, 0)
    if split is None or _half(expansion.rope, 1) is not split or not _reads_pages(mask):
        return None
    read, latents = _under(mask).args[0], _under(split.args[0])
    return read.args[:3] if (latents.target, latents.args) == (operator.getitem, (read, 0)) else None


def _absorbed(
    at: fx.Node, q: fx.Node, scale: float, expansion: _Expansion, pages: tuple[fx.Node, ...] | None
) -> fx.Node:
    """Nodes for the output [B, H, T, v], before `at`. N = B * T."""
    latent, rope, weight, nope = expansion
    op = partial(insert, at)
    B, H, T = (size(at, q, dim) for dim in range(3))
    N = _compute(at, operator.mul, B, T)
    w_HdL = op(aten.view.default, weight, [H, -1, RANK])
    w_k_HdL, w_v_HdL = (op(aten.slice.Tensor, w_HdL, 1, *part) for part in ((0, nope), (nope, _END)))
    q_BTHd = op(aten.permute.default, q, [0, 2, 1, 3])
    q_nope_BTHd, q_rope_BTHd = (op(aten.slice.Tensor, q_BTHd, 3, *part) for part in ((0, nope), (nope, _END)))
    q_HNd = op(aten.view.default, op(aten.permute.default, q_nope_BTHd, [2, 0, 1, 3]), [H, N, nope])
    q_HBTL = op(aten.view.default, op(aten.bmm.default, q_HNd, w_k_HdL), [H, B, T, RANK])
    q_BTHL = op(aten.cat.default, [op(aten.permute.default, q_HBTL, [1, 2, 0, 3]), q_rope_BTHd], -1)

    paged = pages or _pages(at, _joined(at, latent, rope))
    out_BTHL = op(operator.getitem, op(torch.ops.dsv3c.mla_decode.default, q_BTHL, *paged, scale), 0)
    out_HNL = op(aten.view.default, op(aten.permute.default, out_BTHL, [2, 0, 1, 3]), [H, N, RANK])
    out_HNv = op(aten.bmm.default, out_HNL, op(aten.permute.default, w_v_HdL, [0, 2, 1]))
    out_HBTv = op(aten.view.default, out_HNv, [H, B, T, value(w_v_HdL).shape[1]])
    out_BTHv = op(aten.permute.default, out_HBTv, [1, 2, 0, 3])
    if N != 1:  # one token's heads lie as its features should
        out_BTHv = op(aten.clone.default, out_BTHv, memory_format=torch.contiguous_format)
    return op(aten.permute.default, out_BTHv, [0, 2, 1, 3])


def _joined(at: fx.Node, latent: fx.Node, rope: fx.Node) -> fx.Node:
    """[B, S, LATENT]: the tensor that both are the halves of, or a new one."""
    split = _half(latent, 0)
    if split is not None and _half(rope, 1) is split:
        return split.args[0]
    parts = []
    for part in (latent, rope):
        rank = value(part).dim()
        sizes = [size(at, part, 0), size(at, part, rank - 2), value(part).shape[-1]]
        parts.append(insert(at, aten.view.default, part, sizes))
    return insert(at, aten.cat.default, parts, -1)


def _pages(at: fx.Node, cache_BSL: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The cache in pages [B·P, PAGE, LATENT], sequence after sequence; its block table, and its lengths."""
    op, compute = partial(insert, at), partial(_compute, at)
    batch, tokens = size(at, cache_BSL, 0), size(at, cache_BSL, 1)
    pages = compute(operator.floordiv, compute(operator.add, tokens, PAGE - 1), PAGE)
    padding = compute(operator.sub, compute(operator.mul, pages, PAGE), tokens)
    count = compute(operator.mul, batch, pages)
    cache = value(cache_BSL)
    zeros = op(aten.full.default, [batch, padding, LATENT], 0, dtype=cache.dtype, device=cache.device)
    padded = op(aten.cat.default, [cache_BSL, zeros], 1)
    numbers = {"start": 0, "step": 1, "dtype": torch.int32, "device": cache.device, "requires_grad": False}
    table = op(torch.ops.prims.iota.default, count, **numbers)
    # Not views: those compare sizes, with the first call's for hints, and would bind the unit to one page.
    return (
        op(aten.as_strided.default, padded, [count, PAGE, LATENT], [PAGE * LATENT, LATENT, 1]),
        op(aten.as_strided.default, table, [batch, pages], [pages, 1]),
        op(aten.full.default, [batch], tokens, dtype=torch.int32, device=cache.device),
    )


def _compute(at: fx.Node, function, *sizes: fx.Node | int) -> fx.Node | int:
    return insert(at, function, *sizes) if any(isinstance(size, fx.Node) for size in sizes) else function(*sizes)
