"""Arguments that do not fit together are named, before anything is computed, by fake tensors too."""

import pytest
import torch

from dsv3c.numerics import Recipe
from dsv3c.operators import OperatorError

ops = torch.ops.dsv3c
CAST = Recipe().amax_floor, False
BF16 = torch.bfloat16


def tiles(*shape):
    return ops.quantize_tile(torch.ones(shape), *CAST)


def blocks(*shape):
    return ops.quantize_block(torch.ones(shape), *CAST)


def heads(dtype=BF16, size=16, columns=4):
    return torch.ones(4, 2, size, dtype=dtype), torch.ones(4, columns), torch.ones(4, columns), False


def pages(dtype):
    q, cache = torch.ones(1, 1, 2, 576).to(dtype), torch.ones(1, 64, 576).to(dtype)
    return q, cache, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 1.0


def offs(*ends):
    return torch.tensor(ends, dtype=torch.int32)


def meta(pair):
    return tuple(x.to("meta") for x in pair)


RANK = "number of dimensions of {}: expected {}, found {}"
DTYPE = "dtype of {}: expected floating point of 16 bits or more, found torch.{}"
CASES = {
    "a device": ("gemm", lambda: (*tiles(4, 128), *meta(blocks(128, 128)), BF16),
                 "device of w_fp8: expected cpu, found meta"),
    "a device in a list": ("quantize_weights", lambda: ([torch.ones(128, 128), torch.ones(4, 8, device="meta")],
                                                        [1, 1], *CAST, False),
                           "device of weights: expected cpu, found meta"),
    "a device of what may be None": ("quantize_tile_t", lambda: (torch.ones(4, 128), offs(4).to("meta"), *CAST),
                                     "device of offs: expected cpu, found meta"),
    "gemm of a stack": ("gemm", lambda: (*tiles(4, 128), *blocks(1, 128, 128), BF16), RANK.format("w", 2, 3)),
    "gemm of a vector": ("gemm", lambda: (*tiles(4, 128), *(x[0] for x in blocks(128, 128)), BF16),
                         RANK.format("w", 2, 1)),
    "dgrad of a stack": ("gemm_dgrad", lambda: (*tiles(4, 128), *blocks(1, 128, 128), BF16), RANK.format("w", 2, 3)),
    "groups of one matrix": ("grouped_gemm", lambda: (*tiles(4, 128), *blocks(128, 128), offs(4), BF16),
                             RANK.format("w", 3, 2)),
    "dgrad of one matrix": ("grouped_gemm_dgrad", lambda: (*tiles(4, 128), *blocks(128, 128), offs(4), BF16),
                            RANK.format("w", 3, 2)),
    "a block of a vector": ("quantize_block", lambda: (torch.ones(128), *CAST), RANK.format("w", "at least 2", 1)),
    "weights that are vectors": ("quantize_weights", lambda: ([torch.ones(128)], [1], *CAST, False),
                                 RANK.format("a weight", "at least 2", 1)),
    "blocks of a vector": ("dequantize_block", lambda: (*(x[0] for x in blocks(128, 128)), BF16),
                           RANK.format("w", "at least 2", 1)),
    "an empty stack": ("quantize_weights", lambda: ([torch.ones(128, 128)], [0, 1], *CAST, False),
                       "whether each of stacks has a weight: expected True, found False"),
    "no groups of experts": ("gate", lambda: (torch.ones(4, 8), None, 0, 1, 2, True, 1.0),
                             "n_group: expected 1 to 8, found 0"),
    "choices in a row": ("gate_backward", lambda: (torch.ones(4), torch.ones(4, 8), torch.ones(4).int(), False, True,
                                                   1.0),
                         RANK.format("topk_idx", 2, 1)),
    "no experts": ("sort_by_expert", lambda: (torch.ones(4, 2).int(), -1),
                   "whether there are experts: expected True, found False"),
    "a narrow head": ("rotate_heads", lambda: heads(size=4), "size of a head: expected at least 8, .*, found 4"),
    "a narrow head in place": ("rotate_heads_", lambda: heads(size=4), "size of a head: expected at least 8"),
    "integers for angles": ("rotate_heads", lambda: (heads()[0], *(x.int() for x in heads()[1:3]), False),
                            DTYPE.format("cos", "int32")),
    "angles of two kinds": ("rotate_heads_", lambda: (*heads()[:2], heads()[2].bfloat16(), False),
                            "dtype of sin: expected torch.float32, found torch.bfloat16"),
    "integers in a cache": ("mla_decode", lambda: pages(torch.int32), DTYPE.format("q", "int32")),
    "numbers of pages": ("read_pages", lambda: (torch.ones(1, 64, 576), torch.zeros(1, 1).long(),
                                                torch.ones(1).int(), 1),
                         "dtypes of block_table and lengths: expected .*, found .torch.int64"),
    "an integer gradient": ("embedding_backward", lambda: (torch.ones(4, 8).int(), torch.zeros(4).long(), 10),
                            DTYPE.format("dy", "int32")),
    "E5M6 with wrong scales": ("dequantize_e5m6", lambda: (
        *(x.double() if x.dtype == torch.float32 else x for x in ops.quantize_e5m6(torch.ones(4, 128), CAST[0])), BF16),
        "dtype of scale_inv: expected torch.float32, found torch.float64"),
    "an integer result": ("gemm", lambda: (*tiles(4, 128), *blocks(128, 128), torch.int32),
                          DTYPE.format("the result", "int32")),
    "an FP8 result": ("gemm_wgrad", lambda: (*tiles(128, 128), *tiles(128, 128), torch.float8_e4m3fn),
                      DTYPE.format("the result", "float8_e4m3fn")),
    "a grouped integer result": ("grouped_gemm_wgrad", lambda: (*tiles(128, 128), *tiles(128, 128), offs(0),
                                                                torch.int8),
                                 DTYPE.format("the result", "int8")),
    "integers from blocks": ("dequantize_block", lambda: (*blocks(128, 128), torch.int64),
                             DTYPE.format("the result", "int64")),
}  # fmt: skip
CASES |= {
    f"{name} of {dtype}": (name, lambda dtype=dtype, rest=rest: (torch.ones(4, 128).to(dtype), *rest),
                           DTYPE.format("[xw]", str(dtype).removeprefix("torch.")))
    for name, *rest in [("quantize_tile", *CAST), ("quantize_tile_t", None, *CAST), ("quantize_tile_both", None, *CAST),
                        ("quantize_block", *CAST), ("quantize_e5m6", CAST[0])]
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
}  # fmt: skip


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named(case, fake):
    name, make, message = CASES[case]
    args = make()
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.no_grad()
    with mode, pytest.raises(OperatorError, match=f"{message}.*; try"):
        getattr(ops, name)(*args)


@pytest.mark.gpu
def test_a_gpu_does_not_read_what_is_elsewhere():
    x, w = (tuple(t.cuda() for t in pair) for pair in (tiles(4, 128), blocks(128, 128)))
    for args in ((*x, *(t.cpu() for t in w)), (*(t.cpu() for t in x), *w)):
        with pytest.raises(OperatorError, match=r"device of w_fp8: expected .*, found .*; try w_fp8\.to"):
            ops.gemm(*args, BF16)
