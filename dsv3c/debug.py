"""The environment variables, all of them, read here and nowhere else."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv3c.errors import Dsv3cError
from dsv3c.files import make_folder

_instead: list[TemporaryDirectory] = []  # caches that end with this process


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


def use_writable_caches(tell: Callable[[str], None]) -> None:
    """Where torch's or Triton's cache of compiled code cannot be written, this process has one of its own; `tell` is
    told, in a line."""
    triton = str(Path(os.environ.get("TRITON_HOME", "~"), ".triton", "cache"))
    for variable, default in (("TORCHINDUCTOR_CACHE_DIR", ""), ("TRITON_CACHE_DIR", triton)):
        folder = os.environ.get(variable, default)
        try:
            if folder:
                make_folder(variable, Path(folder).expanduser())
        except (Dsv3cError, RuntimeError) as error:  # RuntimeError: nobody's home
            _instead.append(TemporaryDirectory(prefix="dsv3c-"))
            os.environ[variable] = _instead[-1].name
            tell(f"{error}; until this process ends {_instead[-1].name} is used")
