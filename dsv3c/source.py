"""CHECKPOINT|PRESET, what the commands take: the config behind the word. Needs no torch."""

from difflib import get_close_matches
from pathlib import Path

from dsv3c.config import PRESETS, ModelConfig, preset
from dsv3c.errors import ConfigError


def model_config(source: str) -> ModelConfig:
    """The config of a preset, or of a folder that holds a config.json.

    Raises:
        ConfigError: neither, naming the nearest preset or folder; or a config.json that cannot be used.
    """
    path = Path(source)
    if source in PRESETS:
        return preset(source)
    if path.is_dir():
        return ModelConfig.from_folder(path)
    if path.exists():
        raise ConfigError(f"{source}: expected a checkpoint's folder, found a file; try {path.parent}")
    if "/" not in source:
        return preset(source)  # raises, with the nearest name
    beside = [item.name for item in path.parent.iterdir() if item.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.parent / near[0]}?" if near else f"or a preset: {', '.join(PRESETS)}"
    raise ConfigError(f"{source}: expected a checkpoint's folder, found nothing there; {hint}")
