"""dsv3c: a compiler for DeepSeek-V3. ``compiled_model = dsv3c.compile(model)``."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Imported at first use, so that `import dsv3c`, `dsv3c --help` and dsv3c.schedules need no torch.
_HOME = {
    "DeepseekV3": "dsv3c.model",
    "LatentCache": "dsv3c.cache",
    "MainGradOptimizer": "dsv3c.main_grad",
    "ModelConfig": "dsv3c.config",
    "Recipe": "dsv3c.numerics",
    "compile": "dsv3c.compiler",
    "cross_entropy": "dsv3c.losses",
    "explain": "dsv3c.report",
    "generate": "dsv3c.generation",
    "load": "dsv3c.checkpoint",
    "preset": "dsv3c.config",
    "save": "dsv3c.checkpoint",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from dsv3c.cache import LatentCache
    from dsv3c.checkpoint import load, save
    from dsv3c.compiler import compile
    from dsv3c.config import ModelConfig, preset
    from dsv3c.generation import generate
    from dsv3c.losses import cross_entropy
    from dsv3c.main_grad import MainGradOptimizer
    from dsv3c.model import DeepseekV3
    from dsv3c.numerics import Recipe
    from dsv3c.report import explain


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3c' has no attribute {name!r}")
    if name == "compile":  # importing torch's compiler fails if its cache cannot be written
        from functools import partial
        from warnings import warn

        from dsv3c.debug import use_writable_caches

        use_writable_caches(partial(warn, stacklevel=3))
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
