"""What the worker process does: one configuration of one problem, checked first, then timed."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dsv3c.benchmarks.timing import Timing, interleaved, replayed
from dsv3c.kernels.implementations import Problem, implementations
from dsv3c.tuning import workloads

Choice = tuple[str, dict[str, Any]]


@lru_cache(maxsize=1)
def _workload(problem: Problem) -> tuple[workloads.Workload, dict[str, Tensor]]:
    """And the results so far, by implementation."""
    torch.cuda.empty_cache()
    return workloads.make(problem), {}


def verified(problem: Problem, choice: Choice) -> Callable[[], None]:
    """A call of it, whose result was checked.

    Raises:
        AssertionError: the result is beyond the bound of its float64 value, or is not bitwise that of another
            configuration of the same implementation.
    """
    workload, results = _workload(problem)
    name, config = choice
    call = partial(implementations(problem.operator)[name].launch, *workload.operands, workload.out, **config)
    workload.out.fill_(torch.nan)
    call()
    if name not in results:
        workload.check()
        results[name] = workload.out.clone()
    elif not torch.equal(workload.out, results[name]):
        raise AssertionError("bits differ from another configuration's")
    return call


def measure(problem: Problem, choices: Sequence[Choice], rounds: int) -> list[Timing]:
    """Times of the choices, in turns, on this process's GPU; verified first. Of the GPU alone: with a busy host, two
    launches lose up to 100 µs to one."""
    calls = {str(number): replayed(verified(problem, choice)) for number, choice in enumerate(choices)}
    return list(interleaved(calls, rounds=rounds).values())
