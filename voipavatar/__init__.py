"""Real-time talking avatars: give a voice agent a face."""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import Persona
    from .plugin import AvatarSession

__all__ = ["AvatarSession", "Persona", "__version__"]

_HOMES = {"AvatarSession": "plugin", "Persona": "config"}


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are asked for, so that importing stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
