"""The environment variables, all of them, read here and nowhere else."""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DebugConfig:
    """DSV3C_DUMP=DIR: write the graph before and after each pass that changed it. DSV3C_SKIP=NAME,NAME: leave out
    passes. DSV3C_TABLES=DIR: the user's own tuning tables."""

    dump: Path | None = None
    skip: tuple[str, ...] = ()
    tables: Path = Path("~/.cache/dsv3c/tables")


def debug_config() -> DebugConfig:
    dump = os.environ.get("DSV3C_DUMP")
    skip = tuple(filter(None, os.environ.get("DSV3C_SKIP", "").split(",")))
    tables = os.environ.get("DSV3C_TABLES")
    return DebugConfig(Path(dump) if dump else None, skip, Path(tables) if tables else DebugConfig.tables)
