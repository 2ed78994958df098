"""Which configurations a target can run well, found out without a GPU: each is compiled for it here.

What is compiled stays in Triton's cache, where a launch with the same types finds it.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from dsv3c.kernels import implementations
from dsv3c.kernels.implementations import Implementation
from dsv3c.kernels.offline import Resources, resources
from dsv3c.tuning.targets import Target

# Two halves of a tile use all 255 registers, and two versions of one compiler differ by a few: those cost nothing that
# could be measured, and the fastest configurations of 128 rows have them.
SPILLS = 4


@dataclass(frozen=True)
class Verdict:
    """A configuration, and why it is dropped (None: it is not)."""

    config: dict[str, Any]
    reason: str | None


def num_kernels(implementation: Implementation) -> int:
    """How many kernels its configurations are: some knobs belong to the launch alone."""
    if implementation.variant is None:
        return 0
    return len({implementation.variant(config).name for config in implementation.configs()})


def prefilter(
    operator: str,
    implementation: Implementation,
    target: Target,
    *,
    configs: Iterable[dict[str, Any]] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> list[Verdict]:
    """A verdict on each of `configs`, by default all valid ones, compiled in as many processes as there are cores.

    `progress` is called for each kernel compiled.
    """
    configs = list(implementation.configs() if configs is None else configs)
    if implementation.variant is None:
        return [Verdict(config, None) for config in configs]
    names = [implementation.variant(config).name for config in configs]
    distinct = dict(zip(names, configs, strict=True))  # see `num_kernels`
    reasons = {}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = {
            name: pool.submit(_compile, operator, implementation.name, config) for name, config in distinct.items()
        }
        for name, future in found.items():
            reasons[name] = _reason(future.result(), distinct[name].get("num_warps", 4), target)
            progress()
    return [Verdict(config, reasons[name]) for name, config in zip(names, configs, strict=True)]


def _compile(operator: str, name: str, config: dict[str, Any]) -> Resources | str:
    """In a process of the pool. Its resources, or the compiler's complaint."""
    variant = implementations.implementations(operator)[name].variant
    assert variant is not None
    try:
        return resources(variant(config).compile())
    except Exception as error:  # whatever the compiler's stages raise
        return str(error).strip().partition("\n")[0] or type(error).__name__


def _reason(found: Resources | str, num_warps: int, target: Target) -> str | None:
    if isinstance(found, str):
        return "does not compile"
    if found.shared_bytes > target.shared_memory_per_block_bytes:
        return "shared memory"
    if found.registers * 32 * num_warps > target.registers_per_sm:
        return "registers"
    return "spills" if found.spills > SPILLS else None
