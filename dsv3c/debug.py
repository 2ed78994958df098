"""The environment variables, all of them, read here and nowhere else."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DebugConfig:
    """DSV3C_DUMP=DIR: write the graph before and after each pass that changed it. DSV3C_SKIP=NAME,NAME: leave out
    passes."""

    dump: Path | None = None
    skip: tuple[str, ...] = ()


def debug_config() -> DebugConfig:
    dump = os.environ.get("DSV3C_DUMP")
    return DebugConfig(Path(dump) if dump else None, tuple(filter(None, os.environ.get("DSV3C_SKIP", "").split(","))))
