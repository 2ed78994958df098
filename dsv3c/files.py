"""Files that are written at the end of some work: whether they can be is asked at its start."""

import errno
import os
from pathlib import Path
from tempfile import TemporaryFile

from dsv3c.errors import Dsv3cError


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
