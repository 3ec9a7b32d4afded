"""Real-time talking avatars: give a voice agent a face."""

from .version import __version__

__all__ = ["__version__"]
