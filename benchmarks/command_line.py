"""The command line of the scripts that measure kernels. What they cannot do is said in a line, with exit code 2."""

import argparse
from collections.abc import Callable, Collection
from functools import partial

import torch


def parser(doc: str | None, sections: Collection[str] = ()) -> argparse.ArgumentParser:
    """Described by the script's own docstring; with --only where the script has sections."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if sections:
        known: Callable[[str], list[str]] = partial(_known, tuple(sections))
        made.add_argument("--only", type=known, default=list(sections), metavar="SECTION,…", help=", ".join(sections))
    made.add_argument("--record", action="store_true", help="append the result to benchmarks/results")
    return made


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, found {text!r}")
    return int(text)


def need_gpu(parser: argparse.ArgumentParser) -> None:
    """Exits where nothing can be measured."""
    found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if found == "none" or torch.cuda.get_device_capability() < (9, 0):
        parser.error(f"expected an NVIDIA GPU of compute capability 9.0 or higher, found {found}")


def _known(sections: tuple[str, ...], text: str) -> list[str]:
    chosen = text.split(",")
    for section in chosen:
        if section not in sections:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(sections)}, found {section!r}")
    return chosen
