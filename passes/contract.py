"""What a pass is, how a list of them is run, and how a graph is written down.

A pass is a frozen dataclass: its fields are its knobs, its repr is its line in the log and its part of the cache key,
its class name is the only name it has. It edits the graph in place and returns how many sites it rewrote. It reads
targets and metadata only: no node names, no environment, no rank. A site it leaves alone is noted with the reason
(`leave`).
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized

from dsv3c.errors import Dsv3cError
from dsv3c.passes.regions import region_of


class PassError(Dsv3cError):
    """A pass lied about its work, met a graph it must not meet, or has an unknown name."""


class Tier(Enum):
    """EXACT keeps every result bitwise; NUMERIC changes roundings, within the bounds of dsv3c/numerics.py."""

    EXACT = "exact"
    NUMERIC = "numeric"


class Level(Enum):
    """The graph a pass works on: torch functions as Dynamo captured them, or aten, forward and backward together
    (in inference: forward alone)."""

    CAPTURED = "L0"
    JOINT = "L1"


@runtime_checkable
class Pass(Protocol):
    """Rewrites `gm` in place; returns the number of sites rewritten, 0 if and only if the canonical text is
    unchanged."""

    tier: ClassVar[Tier]
    level: ClassVar[Level]

    def __call__(self, gm: fx.GraphModule) -> int: ...


@dataclass(frozen=True)
class Skipped:
    """A site that a pass could have rewritten and did not."""

    where: str
    reason: str


@dataclass
class Record:
    """What one pass did to one graph."""

    name: str
    knobs: str
    tier: str
    sites: int
    time_us: float
    skipped: list[Skipped] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    priced: tuple[Any, Any] | None = None  # what `run`'s `price` said of the graph before and after


def name_of(step: Pass) -> str:
    return type(step).__name__


def leave(node: fx.Node, reason: str) -> None:
    """Notes that the calling pass leaves `node` as it is, for the report."""
    region = region_of(node)
    where = f"{region.path} ({region.kind})" if region else str(node.target)
    node.graph.owning_module.meta.setdefault("dsv3c_left", []).append(Skipped(where, reason))


def select(passes: Sequence[Pass], skip: Collection[str]) -> tuple[Pass, ...]:
    """`passes` without those named in `skip`.

    Raises:
        PassError: a name in `skip` is no pass of the list.
    """
    names = [name_of(step) for step in passes]
    for name in skip:
        if name not in names:
            near = get_close_matches(name, names, 1) or names
            raise PassError(f"skip: expected the name of a pass, found {name!r}; try {', '.join(near)}")
    return tuple(step for step in passes if name_of(step) not in skip)


def run(
    gm: fx.GraphModule,
    passes: Iterable[Pass],
    *,
    dump: Path | None = None,
    price: Callable[[fx.GraphModule], Any] | None = None,
) -> list[Record]:
    """Runs `passes` over `gm` in order, in place. On an error the graph is to be thrown away.

    Each pass's count is held against the graph: a pass that reports no site must leave the text as it was, and the
    other way round. With `dump`, the graph before and after each changing pass is written to
    `dump/NN_Name.{before,after}.txt`. `price` is asked what the graph costs between passes.

    Raises:
        PassError: a pass reported a count that the graph contradicts.
    """
    records = []
    before = text(gm)
    cost = price(gm) if price else None
    for number, step in enumerate(passes):
        histogram = _operators(gm)
        gm.meta["dsv3c_left"] = []
        start = time.perf_counter()
        sites = step(gm)
        time_us = (time.perf_counter() - start) * 1e6
        if step.level is Level.JOINT:  # a captured graph mutates in place: what looks dead there need not be
            gm.graph.eliminate_dead_code()
        gm.graph.lint()
        after = text(gm)
        if (sites == 0) != (before == after):
            raise PassError(
                f"{step!r}: expected a count that agrees with the graph, found {sites} sites and "
                f"{'an unchanged' if before == after else 'a changed'} graph; try DSV3C_DUMP to see it"
            )
        if dump and sites:
            dump.mkdir(parents=True, exist_ok=True)
            (dump / f"{number:02}_{name_of(step)}.before.txt").write_text(before)
            (dump / f"{number:02}_{name_of(step)}.after.txt").write_text(after)
        now = _operators(gm)
        cost_now = price(gm) if price and sites else cost
        records.append(
            Record(
                name=name_of(step),
                knobs=repr(step),
                tier=step.tier.value,
                sites=sites,
                time_us=time_us,
                skipped=gm.meta.pop("dsv3c_left"),
                added=dict(now - histogram),
                removed=dict(histogram - now),
                priced=(cost, cost_now) if price else None,
            )
        )
        before, cost = after, cost_now
    gm.recompile()
    return records


def _operators(gm: fx.GraphModule) -> Counter[str]:
    return Counter(operator_name(node) for node in gm.graph.nodes if node.op in ("call_function", "call_method"))


def operator_of(node: fx.Node):
    """The target; of the form that stands for an operator that writes to a copy of its argument: the operator."""
    return node.args[0] if node.target is auto_functionalized else node.target


def operator_name(node: fx.Node) -> str:
    """`aten.mm.default`, `dsv3c.gemm.default`, `getitem`, …"""
    operator = operator_of(node)
    if isinstance(operator, str):
        return operator
    if isinstance(operator, torch._ops.OpOverload):
        return str(operator)
    return getattr(operator, "__name__", str(operator))


def text(gm: fx.GraphModule) -> str:
    """The canonical text of a graph: one line a node, numbered in order, with its value's type and its region.

    Free of node names, paths and addresses, so that equal programs have equal texts.
    """
    number = {node: f"%{i}" for i, node in enumerate(gm.graph.nodes)}
    symbols: Symbols = {}, {}

    def written(value) -> str:
        if isinstance(value, fx.Node):
            return number[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(written, value))}]"
        if isinstance(value, dict):
            return ", ".join(f"{key}={written(item)}" for key, item in value.items())
        return str(value)

    lines = []
    for node in gm.graph.nodes:
        again = " (computed again in backward)" if "recompute" in node.meta else ""
        arguments = ", ".join(filter(None, [", ".join(map(written, node.args)), written(node.kwargs)]))
        name = node.op if node.op in ("placeholder", "output") else operator_name(node)
        region = region_of(node)
        lines.append(
            f"{number[node]} = {name}({arguments if node.op != 'placeholder' else ''})"
            f"{_typed(node.meta.get('val', node.meta.get('example_value')), symbols)}{again}"
            f"{f'  # {region.path} ({region.kind})' if region else ''}\n"
        )
    return "".join(lines)


Symbols = tuple[dict[str, str], dict[Any, str]]  # their names in a text, and the expressions in it as written


def _typed(value, symbols: Symbols) -> str:
    """` : bf16[s0, 7168]`, with symbols renamed in order of appearance."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, symbols) for size in value.shape)
        strides = ", ".join(_size(stride, symbols) for stride in value.stride())
        dense = value.is_contiguous() if not any(isinstance(s, torch.SymInt) for s in value.shape) else True
        return f" : {str(value.dtype).removeprefix('torch.')}[{sizes}]{'' if dense else f' strides [{strides}]'}"
    if isinstance(value, (list, tuple)):
        return " :" + ",".join(filter(None, (_typed(item, symbols).removeprefix(" :") for item in value)))
    if isinstance(value, torch.SymInt):
        return f" : {_size(value, symbols)}"
    return ""


def _size(size, symbols: Symbols) -> str:
    if not isinstance(size, torch.SymInt):
        return str(size)
    expression = size.node.expr
    names, texts = symbols
    if expression not in texts:  # few are, and writing one takes a while
        renamed = {
            symbol: names.setdefault(str(symbol), f"s{len(names)}")
            for symbol in sorted(expression.free_symbols, key=str)
        }
        texts[expression] = str(expression.xreplace({symbol: type(symbol)(name) for symbol, name in renamed.items()}))
    return texts[expression]


def fingerprint(*folders: Path) -> str:
    """SHA-256 over the sources in `folders`: what a cache entry depends on beyond the graph."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
