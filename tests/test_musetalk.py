"""The MuseTalk engine on its reduced model: the contract, and what published code gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from voipavatar.config import Settings
from voipavatar.engines.musetalk import MuseTalk

from .contract import EngineContract, Kit
from .faces import save_face
from .musetalk_parts import needs, small_recipe


def make_kit(folder: Path, **options: Any) -> Kit:
    needs("torch")
    source = folder / "face.png"
    marks = save_face(source, width=480, height=360)
    options = {
        "recipe": "musetalk-tiny",
        "width": 480,
        "height": 360,
        "fps": 25,
        "landmarks": marks,
    } | options
    text = folder / "text.png"
    text.write_text("this is no picture")
    empty = folder / "empty.png"
    empty.write_bytes(b"")
    half = folder / "half.png"
    half.write_bytes(source.read_bytes()[:400])
    small = save_face(folder / "small.png", width=480, height=360, unit=10)
    wide = save_face(folder / "wide.png", width=1280, centre=(1100, 300))
    return Kit(
        make=lambda: MuseTalk(Settings(cache_dir=folder / "cache"), device="cpu"),
        source=source,
        options=options,
        folder=folder,
        bad_sources={
            "missing": (folder / "nowhere.png", options),
            "folder": (folder, options),
            "text": (text, options),
            "empty": (empty, options),
            "half": (half, options),
            "tiny": (folder / "small.png", options | {"landmarks": small}),
            "elsewhere": (source, options | {"landmarks": wide}),
        },
        bad_options={
            "recipe": {"recipe": "musetalk-v99"},
            "runtime": {"runtime": "abacus"},
            "shift": {"shift": 3},
            "landmarks.jaw": {"landmarks": {k: v for k, v in marks.items() if k != "jaw"}},
            "landmarks": {"landmarks": [1, 2, 3]},
            "models": {"recipe": "musetalk-v15"},
        },
        open_seconds=2.0,
    )


class TestStreaming(EngineContract):
    """As it is used: sound comes in pieces, pictures go out with the least delay."""

    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        kit = make_kit(tmp_path_factory.mktemp("musetalk"))
        yield kit
        kit.engine.close()


class TestOffline(EngineContract):
    """As MuseTalk's scripts hear: in stretches that know nothing of each other (here of 1 s)."""

    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        folder = tmp_path_factory.mktemp("offline")
        recipe = small_recipe(folder, max_source_positions=50)
        kit = make_kit(folder, recipe=str(recipe), audio="offline")
        yield kit
        kit.engine.close()
