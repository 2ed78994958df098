"""Absorbed attention over the latent cache: definition, schedule and kernels against the textbook in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import dsv3c.operators  # noqa: F401
from dsv3c.errors import Dsv3cError
from dsv3c.numerics import attention_bounds

ops = torch.ops.dsv3c
SCALE = 192**-0.5
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs an NVIDIA GPU of compute capability 9.0")]
# T, H, lengths: ragged and empty sequences, fewer keys than queries, sizes off a page and off 64 rows, one sequence
# that all programs share, more sequences than programs
CASES = [
    (1, 128, [300, 0, 65, 64]),
    (2, 16, [1, 2, 700, 128, 0]),
    (2, 128, [129, 1000]),
    (1, 40, [333]),
    (3, 24, [4, 127, 190]),
    (1, 128, [20000]),
    (1, 16, [(37 * i) % 200 for i in range(150)]),
]


def problem(T, H, lengths, device="cpu", growth=0.0):
    """Columns of a magnitude each; pages in no order; NaN and pages that do not exist behind every end.

    With `growth`, keys get longer along the sequence, so that the maximum moves all the time.
    """
    B, columns = len(lengths), -(-max(lengths) // 64) + 1
    cache_SL = torch.randn(B, columns * 64, 576) * torch.exp2(torch.randint(-3, 2, (576,)).float())
    cache_SL *= (1 + growth * torch.arange(columns * 64))[:, None]
    table = (torch.randperm(B * columns) + 2).view(B, columns).int()
    for b, n in enumerate(lengths):
        cache_SL[b, n:] = torch.nan
    cache = torch.full((B * columns + 3, 64, 576), torch.nan)
    cache[table.long()] = cache_SL.view(B, columns, 64, 576)
    for b, n in enumerate(lengths):
        table[b, -(-n // 64) :] = -1
    q = (2 * torch.randn(B, T, H, 576)).bfloat16()
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return *(x.to(device) for x in (q, cache.bfloat16(), table, lengths)), SCALE


def assert_attention(out, lse, q, cache, table, lengths, scale):
    """One query at a time."""
    for b, n in enumerate(lengths.tolist()):
        keys_SL = torch.cat([cache[page] for page in table[b, : -(-n // 64)].tolist()] or [cache[0]])[:n].double()
        for t in range(q.shape[1]):
            k = keys_SL[: max(n - q.shape[1] + 1 + t, 0)]
            if len(k) == 0:
                assert not out[b, t].any()
                assert bool((lse[b, t] == -torch.inf).all())
                continue
            query, v = q[b, t].double(), k[:, :512]
            scores, size = query @ k.T * scale, (query.square() @ k.T.square()).sqrt() * scale
            p = scores.softmax(-1)
            reference, norm = p @ v, (p.square() @ v.square()).sqrt()
            bounds = attention_bounds(reference, norm, float(torch.maximum(scores.abs(), size).max()), len(k), 576)
            error = (out[b, t].double() - reference).abs()
            assert bool((error <= bounds[0]).all()), (
                f"worst {float((error / bounds[0]).nan_to_num(torch.inf).max()):.3g}"
            )
            found = float((error / norm).square().mean().sqrt())
            assert found <= bounds[1], f"RMS {found:.3g}, bound {bounds[1]:.3g}"
            assert float((lse[b, t] - scores.logsumexp(-1)).abs().max()) <= bounds[2]


@pytest.mark.parametrize("case", CASES[:5])
def test_definition(case):
    arguments = problem(*case)
    assert_attention(*ops.mla_decode(*arguments), *arguments)


def test_a_contiguous_cache_is_one_with_its_pages_in_order():
    q, cache_BSL = torch.randn(2, 1, 16, 576).bfloat16(), torch.randn(2, 192, 576).bfloat16()
    table, lengths = torch.arange(6, dtype=torch.int32).view(2, 3), torch.tensor([192, 100], dtype=torch.int32)
    arguments = q, cache_BSL.view(6, 64, 576), table, lengths, SCALE
    assert_attention(*ops.mla_decode(*arguments), *arguments)


def test_shapes_flops_and_errors():
    arguments = problem(2, 16, [100, 70])
    q, cache, table, lengths, scale = arguments
    with FakeTensorMode() as mode:
        fake = ops.mla_decode(*(mode.from_tensor(x) for x in arguments[:4]), scale)
    for found, expected in zip(fake, ops.mla_decode(*arguments), strict=True):
        assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)
    with FlopCounterMode(display=False) as counter:
        ops.mla_decode(*arguments)
    assert counter.get_total_flops() == 2 * 2 * 2 * 16 * table.shape[1] * 64 * (576 + 512)
    torch.library.opcheck(ops.mla_decode, arguments)
    for wrong in [
        (q[..., :512], cache, table, lengths, scale),
        (q, cache[:, :32], table, lengths, scale),
        (q, cache.float(), table, lengths, scale),
        (q, cache, table.long(), lengths, scale),
        (q, cache, table[:1], lengths, scale),
        (q, cache, table, lengths[:1], scale),
        (q, cache, table, lengths, -scale),
        (q, cache, table[:, :0], lengths, scale),
    ]:
        with pytest.raises(Dsv3cError, match=r"expected .*, found .*; try"):
            ops.mla_decode(*wrong)


PROGRAM = """
import sys
from types import SimpleNamespace

import torch

sys.path.insert(0, sys.argv[1])
from gluon_on_cpu import Kernel
from test_mla_decode import assert_attention, problem
from dsv3c.kernels import mla_decode, mla_decode_gluon

mla_decode.mla_decode_kernel = Kernel(mla_decode_gluon.__file__, "mla_decode_kernel")
torch.manual_seed(0)
cases = [(3, 1, 72, [300, 0, 65]), (5, 2, 16, [1, 2, 700, 128, 0]), (2, 3, 24, [4, 127, 190]), (9, 1, 8, [1500])]
for i, (programs, T, H, lengths) in enumerate(cases):
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=programs)
    arguments = problem(T, H, lengths, growth=0.2 * (i % 2))
    out = torch.full((len(lengths), T, H, 512), torch.nan), torch.full((len(lengths), T, H), torch.nan)
    mla_decode.mla_decode(*arguments, out)
    assert_attention(*out, *arguments)
"""


def test_kernels_on_the_cpu(interpreted):
    """Threads run the first kernel, Triton's interpreter the second: chosen as Triton is imported, hence a process."""
    interpreted(PROGRAM)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("growth", [0.0, 0.02, 0.2])
    @pytest.mark.parametrize("case", CASES)
    def test_kernel(self, case, growth):
        arguments = problem(*case, device="cuda", growth=growth)
        out, lse = ops.mla_decode(*arguments)
        assert_attention(out, lse, *arguments)
        again = ops.mla_decode(*arguments)
        assert torch.equal(out, again[0])
        assert torch.equal(lse, again[1])

    def test_strided_arguments(self):
        q, cache, table, lengths, scale = problem(2, 16, [100, 200, 300], device="cuda")
        q2, table2, lengths2 = (torch.stack([x, x], -1)[..., 0] for x in (q, table, lengths))
        strided = q2, torch.cat([cache, cache], 1)[:, :64], table2, lengths2
        for found, expected in zip(
            ops.mla_decode(*strided, scale), ops.mla_decode(q, cache, table, lengths, scale), strict=True
        ):
            assert torch.equal(found, expected)

    def test_in_a_cuda_graph(self):
        """Lengths and tables that change after the capture are the ones that count."""
        q, cache, table, lengths, scale = problem(1, 128, [1000, 70, 0, 3000], device="cuda")
        ops.mla_decode(q, cache, table, lengths, scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = ops.mla_decode(q, cache, table, lengths, scale)
        lengths.copy_(torch.tensor([1, 69, 0, 2999]))
        table[0, 0] = table[3, 5]
        graph.replay()
        assert_attention(out, lse, q, cache, table, lengths, scale)

    def test_pages_beyond_32_bits(self):
        """The last page begins 2^31 numbers behind the first."""
        q, pages, table, lengths, scale = problem(1, 16, [500], device="cuda")
        cache = torch.empty(2**31 // (64 * 576) + 1 + len(pages), 64, 576, dtype=torch.bfloat16, device="cuda")
        cache[-len(pages) :] = pages
        arguments = q, cache, torch.where(table < 0, table, table + len(cache) - len(pages)), lengths, scale
        assert_attention(*ops.mla_decode(*arguments), *arguments)
