"""What a worker is given in the tests: a kernel that is right, one that is wrong, one that hangs, one that crashes."""

import os
import time
from types import SimpleNamespace

PEAK_US = 100.0
poisoned: list[bool] = []


def double(x):
    return 2 * x


def measure(choices, rounds):
    """Times by configuration; on request it hangs, crashes or is wrong instead."""
    (_, config), *_ = choices
    if config.get("x") == 5:
        time.sleep(60)
    if config.get("x") == 6:
        os.abort()
    if config.get("x") == 8:
        poisoned.append(True)
    if poisoned:  # as a GPU's context after an illegal access
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if config.get("x") == 7:
        raise AssertionError("bits differ from another configuration's")
    return [time_of(*choice) for choice in choices]


def time_of(name, config):
    us = PEAK_US + 10 * abs(config.get("x", 4) - 3) + abs(config.get("y", 2) - 8)
    return SimpleNamespace(median_us=us, p20_us=us - 1, p80_us=us + 1)


def measure_problem(problem, choices, rounds):
    return measure(choices, rounds)
