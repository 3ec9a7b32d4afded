"""Where speech comes from when it is not a text: sound files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from .errors import InputError
from .media import Int16

FORMATS = (
    "wav,w64,mp3,ogg,flac,mov,mp4,m4a,3gp,matroska,webm,aac,aiff,au,caf,amr,ac3,eac3,wv,tta,avi,asf"
)
"""What a sound may be taken for. Playlists and the like are left out: they name other files and
addresses, which FFmpeg would open for whoever sent them."""


def decode_audio(source: Path | bytes) -> Iterator[tuple[Int16, int]]:
    """int16 mono pieces and their rate in Hz, of any sound that PyAV reads. Blocks: use a thread.

    Raises InputError, at the first piece where possible, for what holds no sound or is damaged.
    What comes before a damage is given first.
    """
    try:
        file = source if isinstance(source, Path) else io.BytesIO(source)
        rules = {"format_whitelist": FORMATS}
        with av.open(str(file) if isinstance(file, Path) else file, options=rules) as container:
            if not container.streams.audio:
                raise InputError("the file holds no sound: send WAV, MP3, Ogg, FLAC or M4A")
            stream = container.streams.audio[0]
            inner: av.AudioResampler | None = None
            for frame in container.decode(stream):
                if inner is None:
                    inner = av.AudioResampler(format="s16", layout="mono", rate=frame.sample_rate)
                for out in inner.resample(frame):
                    yield _mono(out), out.sample_rate
            if inner is None:
                raise InputError("the sound is empty: there is not one sample in it")
            for out in inner.resample(None):
                yield _mono(out), out.sample_rate
    except FileNotFoundError:
        raise InputError(f"there is no file {source!r}") from None
    except (av.FFmpegError, ValueError) as error:
        raise InputError(
            f"the sound can't be decoded ({error.strerror if isinstance(error, OSError) else error}"
            "): send WAV, MP3, Ogg, FLAC or M4A"
        ) from None


def _mono(frame: av.AudioFrame) -> Int16:
    return frame.to_ndarray().reshape(-1).astype(np.int16, copy=False)
