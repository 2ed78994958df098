"""Which configurations a target can run well, found out without a GPU: each is compiled for it here.

What is compiled stays in Triton's cache, where a launch with the same types finds it.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from random import Random
from typing import Any

from dsv3c.errors import TuneError
from dsv3c.kernels.implementations import Implementation, implementations
from dsv3c.kernels.offline import Resources, resources
from dsv3c.tuning.targets import Target

# Two halves of a tile use all 255 registers, and two versions of one compiler differ by a few: those cost nothing that
# could be measured, and the fastest configurations of 128 rows have them.
SPILLS = 4

Of = tuple[str, str]  # operator, name of an implementation


@dataclass(frozen=True)
class Verdict:
    """A configuration, and why it is dropped (None: it is not)."""

    config: dict[str, Any]
    reason: str | None


def everything(operators: Iterable[str], most: int | None = None) -> dict[Of, list[dict[str, Any]]]:
    """Every valid configuration of the operators' implementations, or `most` of each: those that are known to be good,
    and others at random, the same each time and for implementations that share a kernel."""
    return {
        (operator, name): list(found.configs()) if most is None else _some(found, most)
        for operator in operators
        for name, found in implementations(operator).items()
    }


def _some(implementation: Implementation, most: int) -> list[dict[str, Any]]:
    known = [dict(config) for config in implementation.known[:most]]
    others = [config for config in implementation.configs() if config not in known]
    return known + Random(0).sample(others, min(most - len(known), len(others)))


def prefilter(
    configs: Mapping[Of, Sequence[dict[str, Any]]],
    target: Target,
    progress: Callable[[int, int], None] = lambda done, kernels: None,
) -> dict[Of, list[Verdict]]:
    """A verdict on each, compiled in as many processes as there are cores.

    Several configurations may be one kernel: some knobs belong to the launch alone, and operators share kernels.
    `progress` is told how many kernels of how many are compiled.

    Raises:
        TuneError: Triton's cache cannot be written.
    """
    names = {of: [_name(of, config) for config in given] for of, given in configs.items()}
    jobs = {name: (of, config) for of in configs for name, config in zip(names[of], configs[of], strict=True) if name}
    reasons: dict[str | None, str | None] = {None: None}  # of a library there is nothing to compile
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        found = {name: pool.submit(_compile, *job) for name, job in jobs.items()}
        for name, future in found.items():
            reasons[name] = _reason(future.result(), jobs[name][1].get("num_warps", 4), target)
            progress(len(reasons) - 1, len(jobs))
    return {
        of: [Verdict(config, reasons[name]) for name, config in zip(names[of], configs[of], strict=True)]
        for of in configs
    }


def _name(of: Of, config: dict[str, Any]) -> str | None:
    variant = implementations(of[0])[of[1]].variant
    return variant and variant(config).name


def _compile(of: Of, config: dict[str, Any]) -> Resources | str:
    """In a process of the pool. Its resources, or the compiler's complaint.

    Raises:
        TuneError: Triton's cache cannot be written, which says nothing of the configuration.
    """
    variant = implementations(of[0])[of[1]].variant
    assert variant is not None
    try:
        return resources(variant(config).compile())
    except OSError as error:
        where = error.filename or "Triton's cache"
        raise TuneError(f"{where}: expected a file to write, found: {error}; try another TRITON_CACHE_DIR") from error
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
