"""Attention over the paged latent cache, for decoding: absorbed, or its operands spelt out for attention that is not.
What they mean: `kernels/reference/mla_decode.py`."""

import torch
from torch import Tensor

from dsv3c.kernels.reference.mla_decode import LATENT, RANK, mla_decode_ref, read_pages_ref
from dsv3c.operators.define import OperatorError, check_rank, check_wide, define, expect

PAGE = 64  # tokens


def _mla_decode(q_BTHL, cache_NPL, block_table, lengths, softmax_scale) -> tuple[Tensor, Tensor]:
    check_rank("q", q_BTHL, 4)
    check_rank("cache", cache_NPL, 3)
    check_rank("block_table", block_table, 2)
    B, T, H, _ = q_BTHL.shape
    expect("columns of q", q_BTHL.shape[3], LATENT)
    expect("page of the cache", tuple(cache_NPL.shape[1:]), (PAGE, LATENT))
    check_wide("q", q_BTHL.dtype)
    expect("dtype of the cache", cache_NPL.dtype, q_BTHL.dtype)
    expect("rows of block_table", block_table.shape[0], B)
    expect("shape of lengths", tuple(lengths.shape), (B,))
    expect("dtypes of block_table and lengths", (block_table.dtype, lengths.dtype), (torch.int32, torch.int32))
    if cache_NPL.shape[0] == 0 or block_table.shape[1] == 0:
        raise OperatorError("cache and block_table: expected a page at least, found none; try an unused one")
    if not softmax_scale > 0:
        raise OperatorError(f"softmax_scale: expected a positive number, found {softmax_scale:g}; try 192**-0.5")
    wide = torch.promote_types(q_BTHL.dtype, torch.float32)
    return q_BTHL.new_empty((B, T, H, RANK)), q_BTHL.new_empty((B, T, H), dtype=wide)


def _read_pages(cache_NPL, block_table, lengths, num_new) -> tuple[Tensor, Tensor]:
    check_rank("cache", cache_NPL, 3)
    check_rank("block_table", block_table, 2)
    expect("shape of lengths", tuple(lengths.shape), (block_table.shape[0],))
    expect("dtypes of block_table and lengths", (block_table.dtype, lengths.dtype), (torch.int32, torch.int32))
    B, S = block_table.shape[0], block_table.shape[1] * cache_NPL.shape[1]
    return cache_NPL.new_empty((B, S, cache_NPL.shape[2])), cache_NPL.new_empty((B, 1, num_new, S), dtype=torch.bool)


def _flops(q_shape, cache_shape, table_shape, *args, out_shape=None, **kwargs) -> int:
    """For sequences that fill their rows of the block table: lengths are known to the device only."""
    B, T, H, _ = q_shape
    return 2 * B * T * H * table_shape[1] * PAGE * (LATENT + RANK)


define(
    "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor lengths, float softmax_scale) -> (Tensor, Tensor)",
    _mla_decode,
    mla_decode_ref,
    "mla_decode",
    _flops,
)
define(
    "read_pages(Tensor cache, Tensor block_table, Tensor lengths, SymInt num_new) -> (Tensor, Tensor)",
    _read_pages,
    read_pages_ref,
    "mla_decode",
)
