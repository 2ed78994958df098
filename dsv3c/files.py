"""What is written during some work or at its end: whether it can be is asked at its start."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from dsv3c.errors import Dsv3cError

_instead: list[TemporaryDirectory] = []  # caches that end with this process


def check_writable(option: str, path: Path) -> None:
    """Raises Dsv3cError where no file can be written; leaves none behind."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise Dsv3cError(f"{option}: expected a file that can be written, found {path}: {error.strerror}") from error


def make_folder(option: str, path: Path) -> None:
    """Raises Dsv3cError where there is no folder to write to, nor can be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Dsv3cError(f"{option}: expected a folder to write to, found {path}: {error.strerror}") from error


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
