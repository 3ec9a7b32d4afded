"""What the tests of MuseTalk share: whether its packages are there, and a small recipe."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import yaml

from voipavatar.models import load_recipe

from . import servers


def needs(*packages: str) -> None:
    """Skip (fail where CI=true) without these packages."""
    lacking = [name for name in packages if importlib.util.find_spec(name) is None]
    if lacking:
        servers.missing(
            f"not installed: {', '.join(lacking)}: pip install voipavatar[musetalk,dev]"
        )
    if "torch" in packages:
        import torch

        torch.set_num_threads(1)  # networks this small only lose time by sharing it


def small_recipe(folder: Path, name: str = "small", **whisper: Any) -> Path:
    """The reduced recipe with another whisper, as a file of its own."""
    recipe = load_recipe("musetalk-tiny").model_dump(mode="json", exclude_none=True)
    recipe["configs"]["tiny/whisper.json"].update(whisper)
    recipe["name"] = name
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path
