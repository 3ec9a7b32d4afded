"""`python agent.py download-files`: what personas need is brought once, and then only checked."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from livekit.agents import Plugin

from voipavatar import plugin as module
from voipavatar.config import Settings, list_personas
from voipavatar.errors import TransportError
from voipavatar.facemodels import DETECTOR, IRIS, MESH, face_models
from voipavatar.plugin import VoipAvatarException
from voipavatar.speech import voices

from . import portraits
from .servers import missing

pytestmark = pytest.mark.slow

State = dict[str, tuple[int, str]]


def state(cache: Path) -> State:
    """Every file of the cache: when it was written, and what it holds."""
    return {
        str(one.relative_to(cache)): (
            one.stat().st_mtime_ns,
            hashlib.sha256(one.read_bytes()).hexdigest(),
        )
        for one in sorted(cache.rglob("*"))
        if one.is_file()
    }


def download() -> None:
    """As livekit-agents calls it."""
    importlib.import_module("livekit.plugins.voipavatar")
    [ours] = [one for one in Plugin.registered_plugins if "voipavatar" in one.title]
    ours.download_files()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the built-in persona and two of the user's own, and no network at all."""
    usual = Settings.from_env()
    try:
        face_models(usual)
    except TransportError as error:
        missing(str(error))
    here = tmp_path / "personas"
    here.mkdir()
    for name in ("clara", "nora"):
        shutil.copy(portraits.PERSONAS / name / "portrait.png", here / f"{name}.png")
    size = "width: 640\nheight: 360\nvoice: espeak\n"
    (here / "own.yaml").write_text(  # a portrait whose face has to be found, and another look
        f"portrait: clara.png\n{size}idles: {{other: {{portrait: nora.png}}}}\n"
    )
    (here / "mute.yaml").write_text("engine: musetalk\nportrait: clara.png\n")  # without weights
    monkeypatch.setenv("VOIPAVATAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VOIPAVATAR_PERSONAS", str(here))
    monkeypatch.setenv("VOIPAVATAR_FACE_MODELS", str(usual.cache_dir / "face"))

    def few(settings: Settings) -> list[Any]:
        wanted = ("default", "own", "mute")
        return [one for one in list_personas(settings) if one.name in wanted]

    monkeypatch.setattr(module, "list_personas", few)

    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)  # pip, which would fetch the face models
    return tmp_path / "cache"


def test_what_is_needed_is_brought_once_and_mended(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    download()
    first = state(cache)
    avatars = [name for name in first if name.endswith("manifest.json")]
    assert len(avatars) == 3, "default, own, and own's other look"
    assert {f"face/{name}" for name in (DETECTOR, MESH, IRIS)} <= set(first)
    piper = next(one for one in voices(Settings.from_env()) if one.name == "piper")
    networks = [name for name in first if name.startswith("voices/piper/")]
    assert len(networks) == (3 if piper.ready else 0)
    left = [one for one in caplog.records if one.getMessage() == "a persona was left out"]
    assert [one.__dict__["persona"] for one in left] == ["mute"]
    assert "models pull" in left[0].__dict__["error"]

    # Again: nothing is asked for and nothing written, with no folder to take models from either.
    monkeypatch.setenv("VOIPAVATAR_FACE_MODELS", str(cache / "none"))
    download()
    assert state(cache) == first

    # One of each kind is damaged: it is as it was, and nothing else is touched.
    monkeypatch.setenv("VOIPAVATAR_FACE_MODELS", str(Settings().cache_dir.expanduser() / "face"))
    rig = next(name for name in first if name.endswith(".npz"))
    hurt = [rig, f"face/{MESH}", *[name for name in networks if name.endswith("decoder.onnx")]]
    for name in hurt:
        data = bytearray((cache / name).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (cache / name).write_bytes(data)
    download()
    mended = state(cache)
    assert {name: held for name, (_, held) in mended.items() if not name.startswith("avatars")} == {
        name: held for name, (_, held) in first.items() if not name.startswith("avatars")
    }
    folder = rig.rsplit("/", 1)[0]
    about = (folder, "face/", "voices/piper/")
    assert set(mended) == set(first)
    assert {n: s for n, s in mended.items() if not n.startswith(about)} == {
        n: s for n, s in first.items() if not n.startswith(about)
    }
    download()
    assert state(cache) == mended


def test_what_failed_is_told_when_the_rest_is_done(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's build must not go through without what its calls will need."""
    monkeypatch.setenv("VOIPAVATAR_FACE_MODELS", str(cache / "none"))
    with pytest.raises(VoipAvatarException, match="own: the face models can't be had"):
        download()
    assert sum(name.endswith("manifest.json") for name in state(cache)) == 1
