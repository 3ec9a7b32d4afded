"""Everything that voipavatar raises on purpose.

VoipAvatarError
├── ConfigError                 a persona, a setting or an installation: the caller can mend it
├── InputError                  a text, sound or message that can't be used: only it fails
├── AvatarError                 a portrait or its prepared cache
├── EngineError                 an engine, a runtime or a device
│   └── CapacityError           no room for another session just now
├── StageError                  an illegal move of a stage, or a call to one that is closed
└── TransportError(retryable)   a room, a broker, an ingest or a voice that is out of reach

Messages say what went wrong and what to do next; they never hold speech or secrets.
"""

from __future__ import annotations


class VoipAvatarError(Exception):
    """Root of the tree."""


class ConfigError(VoipAvatarError):
    """A persona, a setting or an installation is wrong; the message names place and mend."""


class InputError(VoipAvatarError):
    """One text, sound or message can't be used. Whatever else is running goes on."""


class AvatarError(VoipAvatarError):
    """A portrait can't be used, or its prepared cache is damaged."""


class EngineError(VoipAvatarError):
    """An engine, a runtime or a device failed."""


class CapacityError(EngineError):
    """Another session would not keep up in real time; the message gives the reason."""


class StageError(VoipAvatarError):
    """An illegal move of a stage, or a call to one that is closed."""


class TransportError(VoipAvatarError):
    """Something at the other end of a wire failed.

    `retryable` is False for what time doesn't heal: a refused key, a wrong address, a bad token.
    """

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable
