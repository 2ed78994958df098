"""FP8 cast again along its rows, transposed, for weight gradients: `requantize_t`, and `permute_requantize_t`, which
reads tokens' rows, an eighth as many, where `permute` would have put their copies.

Neighbouring programs take neighbouring rows of the same columns. A token's row is read once for each of its experts,
from the L2 cache if that is soon: 128 columns of 4096 tokens are half a megabyte. With neighbouring columns beside each
other, all of x went through the cache before a row was read again: 237 MB came from memory in place of 30.

What is scarce then are instructions and the L1 cache, of which shared memory is a part. So a quotient takes two
instructions (`quantize._reciprocal_and_rest`); a loop casts a quarter of the tile's columns at a time, two a thread, in
64 registers, which leaves room for 32 warps; four threads load half a line; and scales of rows lie so that 16 bytes a
thread are read without bank conflicts. Which rows a tile has is found by a launch before, once instead of for each 128
columns: among 256 groups that was a seventh of all instructions by count, and loading their ends a word at a time took
17 of 195 µs.

Nor should the first group that reads columns wait for memory. What is loaded of x brings the line beside it into the
L2 cache (8 groups 95 -> 93.5 µs, 256 groups 152 -> 146); and the last programs of every second tile of columns bring
the two tiles that follow, 256 bytes of each token: in 8, 32 and 256 groups 90 -> 88.5 µs, 103 -> 95 and 144 -> 143,
16384 tokens in 8 and 256 groups 367 -> 338 and 462 -> 430. Worse: one tile at a time (147 µs in 256 groups; 151 if all
programs bring a few tokens each), four tiles (92 in 8), by the copy engine (91), earlier (16384 tokens 350 to 365),
scales as well (16384 tokens 342).

H200, 4096 tokens of 7168 with 8 experts each: `permute_requantize_t` takes 86.5 µs in 8 groups, 92 in 32 and 142 in
256, where a copy of as many bytes takes 70, 75 and 124; loads and stores without arithmetic take 79 in 8.
`requantize_t` has 0.85 to 0.92 of a copy's speed. How the assembler orders the loop makes up to 5 %, in either
direction: fewer instructions were as often slower.

No faster (µs in 8 groups, for 90 or what is given): conversions by tensor cores (102); rows by the copy engine (101),
by `cp.async`, past the L1 cache, by eight threads a line (98), whole tiles without predicates (91.4 for 88.5); results
by the copy engine (91.2 for 87.7), marked to leave the L2 cache; rows' scales read again, for room for 40 warps (95);
other numbers of warps, rows and columns (95 to 121); several tiles a program, of the same tokens (100, 119) or not;
columns beside each other (102 to 109); the loop unrolled; the last tiles in halves, so that all programs end together,
which they do within 2 µs anyway (93 to 96 for 88); first columns brought by the launch that finds rows; empty tiles
first (94).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv3c.kernels.columns import column_layout, pack_rows, quarters, unpack
from dsv3c.kernels.groups import find_tile, groups_of
from dsv3c.kernels.launch import launched
from dsv3c.kernels.offline import F32, I16, I32, Variant
from dsv3c.kernels.quantize import _maximum, _reciprocal_and_rest, _scale_inv, column_major, dense, store_nothing
from dsv3c.kernels.tiles import divide
from dsv3c.numerics import TILE, ceil_div

WARPS, REGISTERS = 4, 64  # room for 32 warps
AHEAD = 512  # programs: half of those that an H200 runs at once


@gluon.constexpr_function
def _part_layout() -> gl.SharedLinearLayout:
    """128 rows of 16 words of two columns. Chunks of 16 bytes as in `columns.shared_layout`, but those that a warp
    reads are together, a kibibyte, the eight of a matrix beside each other: their addresses take fewer instructions.
    They are exchanged so that sixteen threads, which write 8 bytes each to all four warps' chunks, meet in no bank."""
    inside, matrix, matrices = [[0, 1], [0, 2], [64, 0]], [[1, 0], [16, 0], [32, 0]], [[2, 0], [4, 0], [8, 0]]
    return gl.SharedLinearLayout([*inside, *matrix, *matrices, [16, 4], [32, 8]])


@gluon.constexpr_function
def _tile_layout() -> gl.SharedLinearLayout:
    """A tile of 128 rows of 32 words, each of four columns: four parts of 8 words, every other two of 16."""
    bases = [[row, (word % 4 + word // 4 * 8) // 2] for row, word in _part_layout().offset_bases[1:]]
    return gl.SharedLinearLayout([*bases, [0, 2], [0, 16]])


@gluon.constexpr_function
def _load_layout() -> gl.DistributedLinearLayout:
    """16 bytes a load, half a line of a row four threads; each writes 8 bytes to either of two parts."""
    registers = [[0, 1], [0, 2], [16, 0], [32, 0], [0, 16]]
    lanes = [[0, 4], [0, 8], [64, 0], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[4, 0], [8, 0]], [], [128, 32])


@gluon.constexpr_function
def _vector_layout() -> gl.DistributedLinearLayout:
    """Of those 16 bytes."""
    registers = [[16, 0], [32, 0], [0, 4]]
    lanes = [[0, 1], [0, 2], [64, 0], [1, 0], [2, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[4, 0], [8, 0]], [], [128, 8])


@gluon.jit
def _row_at(place):
    """Of a tile's rows, those 16 apart are beside each other in memory: a thread's, when it loads x."""
    return place // 64 * 64 + place // 4 % 16 + place % 4 * 16


@gluon.jit
def _in_order(x):
    """Numbers that lie as `_row_at` says, in the rows' order; nothing moves."""
    return gl.reshape(gl.permute(gl.reshape(x, (2, 16, 4)), (0, 2, 1)), (128,))


_PREFETCH = gl.constexpr("""{
    .reg .pred mine;
    setp.ne.u32 mine, $2, 0;
    @mine prefetch.global.L2 [$1];
    mov.u32 $0, 0;
}""")


@gluon.jit
def _prefetch(at, mine):
    """The lines at these addresses, into the L2 cache, where `mine`."""
    operands = [at.to(gl.int64, bitcast=True), mine.to(gl.int32)]
    gl.inline_asm_elementwise(_PREFETCH, "=r,l,r", operands, dtype=gl.int32, is_pure=False, pack=1)


@launched
@gluon.jit(do_not_specialize=["R"])
def _rows_kernel(offs_ptr, permutation_ptr, rows_ptr, E, R, GROUPS: gl.constexpr, TOP_K: gl.constexpr):
    """One program: which rows of x a tile has, -1 behind them. What follows may begin, and wait."""
    gdc_launch_dependents()
    tile = gl.program_id(0)
    place = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    if TOP_K:  # the programs' lines of the permutation, all together; which are its own, a program does not know yet
        line = tile * 128 + place
        _prefetch(permutation_ptr + line, (place % 32 == 0) & (line < R))
    start, rows, _ = find_tile(offs_ptr, tile, E, 128, GROUPS)
    row = _row_at(place)
    x_row = start + row
    if TOP_K:
        x_row = (gl.load(permutation_ptr + x_row, mask=row < rows, other=0).to(gl.uint32) // TOP_K).to(gl.int32)
    gl.store(rows_ptr + tile * 128 + place, gl.where(row < rows, x_row, -1))


# Of the line and the one beside it, what the L2 cache does not have comes with what is asked for.
_LOAD = gl.constexpr("""{
    .reg .pred mine;
    setp.ge.s32 mine, $5, 0;
    mov.b32 $0, 0;
    mov.b32 $1, 0;
    mov.b32 $2, 0;
    mov.b32 $3, 0;
    @mine ld.global.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];
}""")


@gluon.jit
def _unsigned(x):
    """For products of 64 bits that take one instruction."""
    return gl.to_tensor(x).to(gl.uint32).to(gl.uint64)


@gluon.jit
def _load_tile(x_ptr, x_row, column, x_stride):
    """Words [128, 32], zero where x_row [128] is negative."""
    VECTORS: gl.constexpr = _vector_layout()
    x_row = gl.convert_layout(x_row, gl.SliceLayout(1, VECTORS), assert_trivial=True)
    vector = gl.arange(0, 8, gl.SliceLayout(0, VECTORS))
    first = x_ptr.to(gl.uint64, bitcast=True) + _unsigned(column + 16 * vector)
    source = first[None, :] + (_unsigned(x_row) * _unsigned(16 * x_stride))[:, None]
    a, b, c, d = gl.inline_asm_elementwise(
        _LOAD, "=r,=r,=r,=r,l,r", [source, x_row[:, None]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    x = gl.reshape(gl.join(gl.join(a, c), gl.join(b, d)), (128, 32))
    return gl.convert_layout(x, _load_layout(), assert_trivial=True)


@gluon.jit
def _bring(x_ptr, tile, first, column, place, tokens, K, x_stride):
    """From tile `first` on, in every second tile of columns: 128 tokens' columns of the next two, into the L2 cache."""
    begin = (tile - first) * 128
    if (begin >= 0) & (begin < tokens) & (column % 256 == 128):
        token, column = begin + place, column + 128
        at = x_ptr + ((token.to(gl.uint32) * x_stride).to(gl.int64) * 8 + column // 2)
        _prefetch(at, (token < tokens) & (column < K))
        _prefetch(at + 64, (token < tokens) & (column + 128 < K))


@gluon.jit
def _scaled(x, scales):
    return x * gl.convert_layout(scales, gl.SliceLayout(1, x.type.layout), assert_trivial=True)[:, None]


@gluon.jit
def _largest(x0, x1, x2, x3):
    """Of a thread's rows, [8, columns]."""
    amax = _maximum(_maximum(gl.abs(x0), gl.abs(x1)), _maximum(gl.abs(x2), gl.abs(x3)))
    return gl.reduce(gl.reshape(amax, (8, 4, amax.shape[1])), 1, _maximum)


_EXCHANGE = gl.constexpr("""{
    .reg .pred odd;
    .reg .f32 own, other;
    setp.ne.u32 odd, $3, 0;
    selp.f32 own, $2, $1, odd;
    selp.f32 other, $1, $2, odd;
    shfl.sync.bfly.b32 other, other, 1, 31, -1;
    max.NaN.f32 own, own, other;
    shfl.sync.bfly.b32 other, own, 2, 31, -1;
    max.NaN.f32 own, own, other;
    shfl.sync.bfly.b32 other, own, 16, 31, -1;
    max.NaN.f32 $0, own, other;
}""")
_BOTH = gl.constexpr("""{
    shfl.sync.idx.b32 $0, $2, 0, 0x1e1f, -1;
    shfl.sync.idx.b32 $1, $2, 1, 0x1e1f, -1;
}""")


@gluon.jit
def _both(x):
    """Of two neighbouring lanes, that of the even one and that of the odd one."""
    return gl.inline_asm_elementwise(_BOTH, "=f,=f,f", [x], dtype=(gl.float32, gl.float32), is_pure=False, pack=1)


@gluon.jit
def _rows(x):
    """[32, C] as [8, 4, C]: a thread's four words; nothing moves."""
    return gl.reshape(x, (8, 4, x.shape[1]))


@gluon.jit
def _divided(x0, x1, x2, x3, first, second):
    x0, x1, x2, x3 = _rows(x0), _rows(x1), _rows(x2), _rows(x3)
    first = gl.convert_layout(first, gl.SliceLayout(1, x0.type.layout), assert_trivial=True)[:, None, :]
    second = gl.convert_layout(second, gl.SliceLayout(1, x0.type.layout), assert_trivial=True)[:, None, :]
    words = pack_rows(
        divide(x0, first, second), divide(x1, first, second), divide(x2, first, second), divide(x3, first, second)
    )
    return gl.reshape(words, (32, words.shape[2]))


@gluon.jit
def _store_part(
    words, scales0, scales1, scales2, scales3, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor,
    POW2: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """words [128, 16]: columns x and y of 8 columns of each 16. Of eight lanes that have both columns, the even ones
    compute what belongs to x, the others what belongs to y."""
    C: gl.constexpr = words.shape[1]
    words0, words1, words2, words3 = quarters(words)
    x0, y0 = unpack(words0)
    x1, y1 = unpack(words1)
    x2, y2 = unpack(words2)
    x3, y3 = unpack(words3)
    x0, x1, x2, x3 = _scaled(x0, scales0), _scaled(x1, scales1), _scaled(x2, scales2), _scaled(x3, scales3)
    y0, y1, y2, y3 = _scaled(y0, scales0), _scaled(y1, scales1), _scaled(y2, scales2), _scaled(y3, scales3)
    amax_x, amax_y = _largest(x0, x1, x2, x3), _largest(y0, y1, y2, y3)
    OWN: gl.constexpr = amax_x.type.layout
    lane = gl.arange(0, 8, gl.SliceLayout(1, OWN))[:, None]
    amax = gl.inline_asm_elementwise(
        _EXCHANGE, "=f,f,f,r", [amax_x, amax_y, lane & 1], dtype=gl.float32, is_pure=False, pack=1
    )
    scale_inv = _scale_inv(amax, amax_floor, POW2)
    pair = gl.arange(0, C, gl.SliceLayout(0, OWN))[None, :]
    column = 2 * pair + 8 * (pair // 4) + (lane & 1)
    mine = (lane < 2) if WHOLE else (lane < 2) & (column < columns)
    gl.store(t_scale_inv_ptr + column, scale_inv, mask=mine)
    first, second = _reciprocal_and_rest(scale_inv)
    first_x, first_y = _both(first)
    second_x, second_y = _both(second)
    x, y = _divided(x0, x1, x2, x3, first_x, second_x), _divided(y0, y1, y2, y3, first_y, second_y)
    WORDS: gl.constexpr = x.type.layout
    pair = gl.arange(0, C, gl.SliceLayout(0, WORDS))[None, :]
    column = 2 * pair + 8 * (pair // 4)
    # Unsigned, and y stored first: 0.2 % faster together, by the assembler's order; either alone is slower.
    at = (column * P_words + gl.arange(0, 32, gl.SliceLayout(1, WORDS))[:, None]).to(gl.uint32)
    gl.store(t_ptr + P_words + at, y, mask=None if WHOLE else column + 1 < columns)
    gl.store(t_ptr + at, x, mask=None if WHOLE else column < columns)


@launched
@gluon.jit(do_not_specialize=["R", "scale_stride", "tokens", "first"])
def _requantize_kernel(
    x_ptr, x_scale_inv_ptr, t_ptr, t_scale_inv_ptr, rows_ptr, R, K, x_stride, scale_stride, P_words, amax_floor,
    tokens, first, POW2: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """One program: 128 rows of a group × 128 columns, which is less of the last tile if not WHOLE. x has words of two
    columns, x_stride times eight of them a row, in 2^32 times 16 bytes. Tiles without rows are zero. Of so many tokens,
    programs from tile `first` on bring what follows."""
    tile, column = gl.program_id(0), gl.program_id(1) * 128
    COLUMNS: gl.constexpr = column_layout(16, gl.num_warps())
    SCALES: gl.constexpr = gl.SharedLinearLayout([[1], [2], [16], [32], [64], [4], [8]])  # a load of 16 bytes is a line
    PLACES: gl.constexpr = gl.DistributedLinearLayout([[1], [2]], [[0], [0], [64], [4], [8]], [[16], [32]], [], [128])
    columns = K - column
    t_ptr += column.to(gl.int64) * P_words + tile * 32
    t_scale_inv_ptr += tile.to(gl.int64) * K + column
    place = gl.arange(0, 128, PLACES)
    own_place = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    if rows_ptr is None:
        x_row, scale_row = tile * 128 + _row_at(place), tile * 128 + _row_at(own_place)
        x_row, scale_row = gl.where(x_row < R, x_row, -1), gl.where(scale_row < R, scale_row, -1)
    else:
        gdc_wait()
        rows_ptr += tile * 128
        x_row, scale_row = gl.load(rows_ptr + place), gl.load(rows_ptr + own_place)
        _bring(x_ptr, tile, first, column, own_place, tokens, K, x_stride)
        if gl.load(rows_ptr) < 0:
            store_nothing(128, t_ptr, t_scale_inv_ptr, columns, P_words, amax_floor, POW2)
            return
    x = _load_tile(x_ptr, _in_order(x_row), column, x_stride)
    x_scale_inv_ptr += (column // 128).to(gl.int64) * scale_stride
    x_scale_inv = gl.load(x_scale_inv_ptr + scale_row, mask=scale_row >= 0, other=0.0)
    shared = gl.allocate_shared_memory(gl.int32, (128, 32), _tile_layout(), x)
    row_scales = gl.allocate_shared_memory(gl.float32, (128,), SCALES, _in_order(x_scale_inv))
    scales02, scales13 = gl.split(gl.reshape(row_scales.load(gl.SliceLayout(1, COLUMNS)), (32, 2, 2)))
    scales0, scales2 = gl.split(scales02)
    scales1, scales3 = gl.split(scales13)
    parts = shared._reinterpret(gl.int16, (4, 128, 16), _part_layout())
    for part in range(4):  # unrolled it is 3 % slower
        at = part % 2 * 8 + part // 2 * 64  # a part has 8 columns of each 16 of 64
        _store_part(
            parts.index(part).load(COLUMNS), scales0, scales1, scales2, scales3, t_ptr + at * P_words,
            t_scale_inv_ptr + at, columns - at, P_words, amax_floor, POW2, WHOLE,
        )  # fmt: skip


def requantize_t(
    x_fp8_RK: Tensor,
    x_scale_inv: Tensor,
    offs: Tensor | None,
    amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::requantize_t`."""
    _requantize(x_fp8_RK, x_scale_inv, len(x_fp8_RK), None, 0, offs, amax_floor, pow2, out)


def permute_requantize_t(
    x_fp8_TH: Tensor,
    x_scale_inv: Tensor,
    permutation_R: Tensor,
    inverse_TK: Tensor,
    offs: Tensor,
    amax_floor: float,
    pow2: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Launcher of `dsv3c::permute_requantize_t`."""
    permutation_R, R, top_k = permutation_R.contiguous(), len(permutation_R), inverse_TK.shape[1]
    _requantize(x_fp8_TH, x_scale_inv, R, permutation_R, top_k, offs, amax_floor, pow2, out)


def _requantize(x, x_scale_inv, R, permutation_R, top_k, offs, amax_floor, pow2, out) -> None:
    t_KP, t_scale_inv = out
    K, P = t_KP.shape
    if t_KP.numel() == 0:
        return
    x, x_scale_inv, rows = _words(x), column_major(x_scale_inv), None
    if offs is not None:
        offs, rows = offs.contiguous(), torch.empty(P, dtype=torch.int32, device=x.device)
        _rows_kernel[(P // TILE,)](offs, permutation_R, rows, len(offs), R, groups_of(offs), top_k, num_warps=WARPS)
    tokens, first = len(x) if top_k else 0, max(P // TILE - AHEAD, 0)
    _requantize_kernel[(P // TILE, ceil_div(K, TILE))](
        x, x_scale_inv, t_KP.view(torch.int32), t_scale_inv, rows, R, K, x.stride(0) // 8, x_scale_inv.stride(1),
        P // 4, amax_floor, tokens, first, pow2, K % TILE == 0, num_warps=WARPS, maxnreg=REGISTERS,
        launch_pdl=rows is not None,
    )  # fmt: skip


def _words(x_fp8: Tensor) -> Tensor:
    """x as words of two columns; copied if its rows do not begin at 16 bytes, or end within a tile."""
    whole = x_fp8.stride(1) == 1 and x_fp8.stride(0) % 16 == 0 and x_fp8.data_ptr() % 16 == 0
    if not whole or x_fp8.shape[1] % TILE:
        x_fp8 = dense(pad(x_fp8.view(torch.uint8), (0, -x_fp8.shape[1] % TILE)))
    return x_fp8.view(torch.int16)


def variants() -> Iterator[Variant]:
    for grouped in (True, False):
        pointers = {"x_ptr": I16, "x_scale_inv_ptr": F32, "t_ptr": I32, "t_scale_inv_ptr": F32}
        pointers |= {"rows_ptr": I32} if grouped else {}
        flags = {"POW2": False, "WHOLE": True} | ({} if grouped else {"rows_ptr": None})
        arguments = pointers | {"amax_floor": "fp32"}
        yield Variant(_requantize_kernel, arguments, flags, num_warps=WARPS, maxnreg=REGISTERS)
    for top_k in (0, 8):
        pointers = {"offs_ptr": I32, "rows_ptr": I32} | ({"permutation_ptr": I32} if top_k else {})
        flags = {"GROUPS": 256, "TOP_K": top_k} | ({} if top_k else {"permutation_ptr": None})
        yield Variant(_rows_kernel, pointers, flags, num_warps=WARPS)
