"""Self-hosted talking avatars for LiveKit agents.

from livekit.plugins import voipavatar

avatar = voipavatar.AvatarSession(persona="default")
await avatar.start(session, ctx.room)
"""

from livekit.agents import Plugin

from voipavatar.plugin import AvatarJoinTimeout, AvatarSession, VoipAvatarException, logger
from voipavatar.version import __version__

__all__ = [
    "AvatarJoinTimeout",
    "AvatarSession",
    "VoipAvatarException",
    "VoipAvatarPlugin",
    "__version__",
]


class VoipAvatarPlugin(Plugin):
    """What `python agent.py download-files` and livekit-agents know of this package."""

    def __init__(self) -> None:
        super().__init__(__name__, __version__, __package__ or __name__, logger)

    def download_files(self) -> None:
        """Prepare every persona that is found, and bring what that takes, so that none of it
        happens in a call. What is there already is only checked.
        """
        from voipavatar.plugin import download

        download()


Plugin.register_plugin(VoipAvatarPlugin())
