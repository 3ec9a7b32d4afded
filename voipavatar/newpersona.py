"""A persona from a picture or a clip: the YAML that stands beside it."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import yaml

from .config import load_persona
from .errors import ConfigError


def persona_name(path: Path) -> str:
    """A name that a persona may have, from a file's: `Anna Müller.jpg` gives `anna-muller`."""
    plain = unicodedata.normalize("NFKD", path.stem).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:64].rstrip("-")
    return name or "portrait"


def persona_text(
    name: str,
    portrait: Path,
    *,
    title: str = "",
    voice: tuple[str, ...] = ("piper", "espeak"),
    size: tuple[int, int] = (1280, 720),
    face_at: tuple[float, float] | None = None,
) -> str:
    """The YAML of a persona whose portrait lies beside it."""
    data: dict[str, object] = {
        "name": name,
        "title": title or name.replace("-", " ").title(),
        "engine": "viseme",
        "portrait": portrait.name,
        "voice": list(voice),
    }
    if size != (1280, 720):
        data["width"], data["height"] = size
    if face_at is not None:
        data["engine_options"] = {"face_at": [round(face_at[0]), round(face_at[1])]}
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return (
        f"# `voipavatar render --persona {name}.yaml --text 'Hello' --out hello.mp4` shows it.\n"
        "# Every key is in `voipavatar personas schema`.\n" + text
    )


def write_persona(file: Path, text: str, *, force: bool = False) -> None:
    """Write a persona's YAML and read it back; ConfigError when one is there or it is wrong."""
    if file.exists() and not force:
        raise ConfigError(f"{file} is there already: give another --name, or --force to replace it")
    try:
        file.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"{file} can't be written: {error.strerror}") from error
    load_persona(file)
