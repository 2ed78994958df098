"""Cast to FP8 where the value is computed, instead of writing it in BF16 and reading it again."""

import operator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import fx

import dsv3c.operators  # noqa: F401
from dsv3c.numerics import TILE
from dsv3c.passes.contract import Level, Tier
from dsv3c.passes.fuse_routing import is_call
from dsv3c.passes.rewrite import aten, insert, is_backward, replace, replace_results, size, value

prims, ops = torch.ops.prims, torch.ops.dsv3c


@dataclass(frozen=True)
class FuseQuantize:
    """Before: `quantize_tile` of an RMSNorm, or of a SwiGLU of stacked gate and up. After: one operator for both, which
    also adds the residual in front of a norm, and writes the norm in BF16 if that has readers too (the router). In
    training it adds only for those: backward computes the norm again, which is quicker from the sum.

    NUMERIC because the fused operators round less often: silu is not rounded before it is multiplied. 1/rms, which
    backward needs, comes from the fused operator too. Leaves alone: sizes that are no multiple of 128, a norm that is
    read in BF16 and has no residual in front, and a gate and up from two linears.
    """

    tier: ClassVar[Tier] = Tier.NUMERIC
    level: ClassVar[Level] = Level.JOINT

    def __call__(self, gm: fx.GraphModule) -> int:
        casts = list(gm.graph.find_nodes(op="call_function", target=ops.quantize_tile.default))
        return sum(_fuse_norm(cast) or _fuse_swiglu(cast) for cast in casts if not is_backward(cast))


class Norm(NamedTuple):
    x: fx.Node
    weight: fx.Node
    normed: fx.Node  # x/rms in BF16
    eps: float
    rstd: fx.Node  # 1/rms, [.., 1]


def _fuse_norm(cast: fx.Node) -> int:
    y = _under_view(cast.args[0])
    norm = norm_of(y)
    if norm is None or value(cast.args[0]).shape[1] % TILE:
        return 0
    normed = any(reader is not cast and not is_backward(reader) for reader in readers(y))
    total = norm.x
    terms = total.args if total.target is aten.add.Tensor and not total.kwargs else ()
    both = [isinstance(t, fx.Node) and value(t).shape == value(total).shape for t in terms] == [True, True]
    if both and (normed or not any(map(is_backward, norm.rstd.users))):
        rows = [as_rows(total, term) for term in terms]
        settings = norm.weight, norm.eps, *cast.args[1:], normed
        call = insert(total, ops.add_rms_norm_quantize.default, *rows, *settings)
        replace_rstd(norm, insert(total, operator.getitem, call, 4))
        replace_results(cast, call, first=2)
        if normed:
            replace(y, shaped(total, insert(total, operator.getitem, call, 1), terms[0]))
        replace(total, shaped(total, insert(total, operator.getitem, call, 0), terms[0]))
        return 1
    if normed:
        return 0
    x_RK = as_rows(cast, norm.x)
    call = insert(cast, ops.rms_norm_quantize.default, x_RK, norm.weight, norm.eps, *cast.args[1:])
    replace_rstd(norm, insert(cast, operator.getitem, call, 2))
    replace_results(cast, call, first=0)
    return 1


def _fuse_swiglu(cast: fx.Node) -> int:
    a = _under_view(cast.args[0])
    h = _stacked(a)
    if h is None or value(a).shape[-1] % TILE or any(reader is not cast for reader in readers(a)):
        return 0
    h_RK = as_rows(cast, h)
    replace_results(cast, insert(cast, ops.swiglu_quantize.default, h_RK, None, *cast.args[1:]), first=0)
    return 1


def norm_of(y: fx.Node) -> Norm | None:
    """`weight · bf16(x/rms)`, with the sums in float32, of x and weight in BF16."""
    weight, normed = _operands(y, aten.mul.Tensor, lambda node: value(node).dim() == 1)
    if normed is None or not _casts(normed, torch.bfloat16):
        return None
    x32, rstd = _operands(normed.args[0], aten.mul.Tensor, lambda node: _casts(node, torch.float32))
    if rstd is None or rstd.target is not aten.rsqrt.default:
        return None
    shifted = rstd.args[0]
    mean = shifted.args[0] if shifted.target in (aten.add.Scalar, aten.add.Tensor) else None
    if mean is None or mean.target is not aten.mean.dim or not isinstance(shifted.args[1], float):
        return None
    square = mean.args[0]
    last = [dim % value(square).dim() for dim in mean.args[1]] == [value(square).dim() - 1]
    if not last or square.target is not aten.pow.Tensor_Scalar or square.args != (x32, 2):
        return None
    x = x32.args[0]
    ours = value(x).dtype == value(weight).dtype == torch.bfloat16
    return Norm(x, weight, normed, shifted.args[1], rstd) if ours else None


def _stacked(a: fx.Node) -> fx.Node | None:
    """h of `silu(gate) · up`, where gate and up are the halves of h [.., 2I] in BF16."""
    silu, up = _operands(a, aten.mul.Tensor, lambda node: _casts(node, torch.bfloat16))
    if up is None or up.target is not operator.getitem or up.args[1] != 1 or silu.args[0].target is not aten.div.Tensor:
        return None
    gate32, below = silu.args[0].args
    gate = gate32.args[0] if _casts(gate32, torch.float32) else None
    exp = below.args[0] if below.target is aten.add.Tensor and below.args[1] == 1 else None
    if exp is None or exp.target is not aten.exp.default or exp.args[0].target is not aten.neg.default:
        return None
    halves = up.args[0]
    is_half = gate is not None and gate.target is operator.getitem and gate.args == (halves, 0)
    if not is_half or exp.args[0].args[0] is not gate32 or halves.target is not aten.split.Tensor:
        return None
    h, width = halves.args[0], value(up).shape[-1]
    last = halves.args[2] % value(h).dim() == value(h).dim() - 1 if len(halves.args) > 2 else value(h).dim() == 1
    return h if last and value(h).shape[-1] == 2 * width else None


def _operands(node: fx.Node, target, is_first) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
    """The two operands of a commutative operator, the one that `is_first` first."""
    if isinstance(node, fx.Node) and node.target is target and all(isinstance(a, fx.Node) for a in node.args):
        a, b = node.args
        if is_first(a):
            return a, b
        if is_first(b):
            return b, a
    return None, None


def _casts(node: fx.Node, dtype: torch.dtype) -> bool:
    return node.target is prims.convert_element_type.default and node.args[1] == dtype


def _under_view(node: fx.Node) -> fx.Node:
    while node.target is aten.view.default:
        node = node.args[0]
    return node


def readers(node: fx.Node):
    """What reads the values, be it through views."""
    for user in node.users:
        if user.target is aten.view.default:
            yield from readers(user)
        else:
            yield user


def as_rows(at: fx.Node, x: fx.Node) -> fx.Node:
    """x [.., K] as [R, K]: where it lies, be it columns of larger rows, as a part of a merged product is."""
    return columns_as_rows(at, *columns_of(x), value(x).shape[-1])


def columns_as_rows(at: fx.Node, x: fx.Node, first: int, columns: int) -> fx.Node:
    if value(x).dim() > 2:
        if not value(x).is_contiguous():  # some of a sequence's tokens, as MTP takes them
            x = insert(at, aten.clone.default, x, memory_format=torch.contiguous_format)
        x = insert(at, aten.view.default, x, [-1, value(x).shape[-1]])
    if columns == value(x).shape[1]:
        return x
    return insert(at, aten.slice.Tensor, x, 1, first, first + columns)


def columns_of(x: fx.Node) -> tuple[fx.Node, int]:
    """What has x among its columns, a matrix or contiguous, and the first of them; x and 0 if there is none."""
    whole, first = x, 0
    while value(whole).dim() > 2 and whole.args:
        source, last = whole.args[0], value(whole).dim() - 1
        if whole.target is aten.view.default and value(source).shape[-1] == value(whole).shape[-1]:
            whole = source
        elif is_call(source, aten.split_with_sizes.default) and source.args[2:] in ((-1,), (last,)):
            whole, first = source.args[0], first + sum(source.args[1][: whole.args[1]])
        elif whole.target is aten.slice.Tensor and whole.args[1] == last and len(whole.args) == 4:
            whole, first = source, first + whole.args[2]
        else:
            break
    return (whole, first) if value(whole).dim() == 2 or value(whole).is_contiguous() else (x, 0)


def shaped(at: fx.Node, rows: fx.Node, like: fx.Node) -> fx.Node:
    """`rows` [R, K], before `at`, as [.., K] with the other sizes of `like`."""
    if value(like).dim() == 2:
        return rows
    sizes = [size(at, like, dim) for dim in range(value(like).dim() - 1)]
    return insert(at, aten.view.default, rows, [*sizes, value(rows).shape[1]])


def replace_rstd(norm: Norm, rstd_R: fx.Node) -> None:
    """In backward. Forward's readers go away with the norm."""
    for reader in [user for user in norm.rstd.users if is_backward(user)]:
        sizes = [size(reader, norm.x, dim) for dim in range(value(norm.x).dim() - 1)]
        reader.replace_input_with(norm.rstd, insert(reader, aten.view.default, rstd_R, [*sizes, 1]))
