"""Agents in YAML: what is made of an `agent:` section, what is wrong in one, and whole talks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import runpy
import sys
import time
import types
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import livekit.plugins
import numpy as np
import pytest
import yaml
from livekit import api, rtc
from livekit.agents import inference, llm, stt, tts, utils
from livekit.agents.utils import is_given

from voipavatar.config import Persona, Settings, load_persona, persona_schema
from voipavatar.doctor import examine
from voipavatar.errors import ConfigError
from voipavatar.livekit_server import LiveKitServer
from voipavatar.parts import Parts, build, rehearse
from voipavatar.viewer import Viewer
from voipavatar.worker import Order, Worker

from . import hearing, realtime, standins
from .scripted import Joined, tone
from .workers import registered, settings_of

server = pytest.mark.server

HEAD = "engine: clapper\nwidth: 320\nheight: 180\nvoice: espeak\n"
LLM = "{use: tests.hearing.Script, options: {lines: [yes]}}"


def write(folder: Path, agent: str, name: str = "talker", head: str = HEAD) -> Path:
    """A persona's file with this agent section; the section begins in line 6."""
    file = folder / f"{name}.yaml"
    lines = "".join(f"  {line}\n" for line in agent.strip().splitlines())
    file.write_text(f"{head}agent:\n{lines}", "utf-8")
    return file


def persona_of(folder: Path, agent: str) -> Persona:
    return load_persona(write(folder, agent))


@contextlib.asynccontextmanager
async def built(persona: Persona) -> AsyncIterator[Parts]:
    async with utils.http_context.open():
        parts = await build(persona, Settings.from_env({}))
        try:
            yield parts
        finally:
            await parts.aclose()


# --- what can be said in it -----------------------------------------------------------------------


def test_short_and_long_forms(tmp_path: Path) -> None:
    persona = persona_of(
        tmp_path,
        """
        instructions: Be brief.
        greeting: Hello.
        llm: openai
        stt: [deepgram, {use: google, options: {languages: en-US}}]
        vad: false
        turn_detection: stt
        tools: tests.hearing.look_up
        session: {turn_handling: {endpointing: {min_delay: 0.3}}}
        """.replace("        ", ""),
    )
    agent = persona.agent
    assert agent is not None and agent.llm is not None and agent.stt is not None
    assert [one.use for one in agent.llm] == ["openai"]
    assert agent.stt[1].options == {"languages": "en-US"}
    assert agent.vad is not None and agent.vad.use == "none"
    assert agent.greeting is not None and agent.greeting.say == "Hello."
    assert [tool.use for tool in agent.tools] == ["tests.hearing.look_up"]


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ("llm: openai", r":5: agent.instructions: Field required"),
        ("instructions: x", r":5: agent: give one of llm and realtime"),
        ("instructions: x\nllm: a\nrealtime: b", r":5: agent: give one of llm and realtime"),
        ("instructions: x\nllm: a\nlmm: b", r":8: agent.lmm: unknown key; known are instructions"),
        (
            "instructions: x\nllm: {use: a, option: {}}",
            r":7: agent.llm.0.option: unknown key; known are use, options",
        ),
        (
            "instructions: x\nllm: a\nsession:\n  max_steps: 3",
            r":9: agent.session.max_steps: unknown key; known are turn_handling, max_tool",
        ),
        (
            "instructions: x\nllm: a\nsession: {turn_handling: {endpointing: {min: 3}}}",
            r":8: agent.session.turn_handling.endpointing.min: unknown key; known are mode, min_d",
        ),
        ("instructions: x\nllm: a\nstay: long", r":8: agent.stay: Input should be a valid number"),
        ("instructions: x\nllm: a\ngreeting: {}", r":8: agent.greeting: give one of say and inst"),
        ("instructions: x\nllm: []", r":7: agent.llm: "),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path: Path, agent: str, said: str) -> None:
    file = write(tmp_path, agent)
    with pytest.raises(ConfigError, match=said) as caught:
        load_persona(file)
    assert str(caught.value).startswith(f"{file}:")


def test_the_schema_knows_the_short_forms() -> None:
    schema = persona_schema()
    agent = schema["$defs"]["AgentSection"]
    assert agent["additionalProperties"] is False and "instructions" in agent["required"]
    assert {"type": "string"} in agent["properties"]["llm"]["anyOf"]
    assert {"const": False} in agent["properties"]["vad"]["anyOf"]
    json.dumps(schema)


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    persona = persona_of(
        tmp_path, "instructions: x\nllm: {use: a, options: {api_key: hush, model: m}}"
    )
    assert "hush" not in repr(persona) and "hush" not in str(persona)
    assert "'model': 'm'" in repr(persona)


# --- what is made of it ---------------------------------------------------------------------------


async def test_parts_are_made_by_name_and_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "from-the-environment")
    persona = persona_of(
        tmp_path,
        """
instructions: x
llm:
  - {use: openai, options: {api_key: "${SOME_SECRET}", base_url: "http://127.0.0.1:9/v1"}}
  - {use: openai.LLM, options: {api_key: a, model: gpt-4o}}
  - {use: tests.hearing.Script, options: {lines: [a]}}
stt: [tests.hearing.Ear, tests.hearing.StreamingEar]
tts: [espeak, {use: tests.hearing.Words, options: {rate: 22050}}]
vad: {use: silero, options: {min_silence_duration: 0.4}}
turn_detection: vad
tools:
  - tests.hearing.look_up
  - tests.hearing.plain
  - {use: tests.hearing.tools, options: {prefix: nice}}
  - {use: livekit.agents.beta.tools.EndCallTool, options: {delete_room: false}}
session: {max_tool_steps: 5, user_away_timeout: null}
""",
    )
    async with built(persona) as parts:
        assert isinstance(parts.llm, llm.FallbackAdapter)
        first, second, third = parts.llm._llm_instances
        assert first.provider == "127.0.0.1:9" and second.model == "gpt-4o"
        assert isinstance(third, hearing.Script)
        assert isinstance(parts.stt, stt.FallbackAdapter) and parts.stt.capabilities.streaming
        assert isinstance(parts.tts, tts.FallbackAdapter)
        assert isinstance(parts.vad, inference.VAD) and parts.vad.min_silence_duration == 0.4
        assert parts.turn_detection == "vad"
        names = [getattr(getattr(tool, "info", tool), "name", tool) for tool in parts.tools]
        assert names[:3] == ["look_up", "plain", "nice_tool"]
        assert isinstance(parts.tools[3], llm.Toolset)
        assert parts.options["max_tool_steps"] == 5 and parts.options["user_away_timeout"] is None
        interruption = parts.options["turn_handling"]["interruption"]
        assert interruption == {"resume_false_interruption": False}


async def test_what_is_not_given_is_found(tmp_path: Path) -> None:
    async with built(
        persona_of(tmp_path, f"instructions: x\nllm: {LLM}\nstt: tests.hearing.Ear")
    ) as parts:
        assert isinstance(parts.stt, stt.StreamAdapter), "whole utterances are cut by a VAD"
        assert parts.tts is not None and parts.tts.provider == "espeak-ng", (
            "the persona's own voice"
        )
        assert parts.tts.capabilities.aligned_transcript
        assert not is_given(parts.turn_detection)
    async with built(
        persona_of(tmp_path, "instructions: x\nrealtime: {use: google, options: {api_key: a}}")
    ) as parts:
        assert parts.realtime and parts.tts is None, "it speaks by itself"


async def test_modules_beside_the_yaml_are_found(tmp_path: Path) -> None:
    name = f"beside_{uuid.uuid4().hex[:6]}"
    (tmp_path / f"{name}.py").write_text("from tests.hearing import Script, look_up\n")
    use = f"{{use: {name}.Script, options: {{lines: [yes]}}}}"
    agent = f"instructions: x\nllm: {use}\ntools: {name}.look_up"
    async with built(persona_of(tmp_path, agent)) as parts:
        assert len(parts.tools) == 1


@pytest.mark.parametrize(
    ("agent", "said"),
    [
        ("llm: nobody", r':7: agent.llm.0: needs a plugin: pip install "livekit-plugins-nobody"'),
        (
            "llm: {use: openai, options: {api_key: '${NOT_SET_HERE}'}}",
            r":7: agent.llm.0.options.api_key: the environment variable NOT_SET_HERE is not set",
        ),
        ("llm: nowhere.to.be_found", r":7: agent.llm.0: there is no module 'nowhere'"),
        ("llm: tests.hearing.Skript", r":7: agent.llm.0: tests.hearing has no Skript: did you m"),
        ("llm: tests.hearing.Ear", r":7: agent.llm.0: tests.hearing.Ear gives an Ear: a livekit"),
        ("llm: not a path", r":7: agent.llm.0: 'not a path' is no import path"),
        (
            "llm: {use: tests.hearing.Script, options: {line: [a]}}",
            r":7: agent.llm.0.options.line: .* did you mean lines\? It takes api_key, bro",
        ),
        ("llm: tests.hearing.needs_key", r":7: agent.llm.0: .*api_key is missing: pass it or set"),
        ("llm: openai", r":7: agent.llm.0: openai: .*OPENAI_API_KEY"),
        (f"llm: {LLM}\nstt: tests.hearing.Ear\nvad: none", r":9: agent.vad: .*whole utterances"),
        (f"llm: {LLM}\nturn_detection: stt", r":8: agent.turn_detection: .* needs an stt"),
        (f"llm: {LLM}\nturn_detection: realtime_llm", r":8: agent.turn_detection: .* realtime mod"),
        (f"llm: {LLM}\ntools: tests.hearing.HEARD", r":8: agent.tools.0: .* can't be called"),
        (f"llm: {LLM}\ntools: tests.hearing.Ear", r":8: agent.tools.0: .* an Ear, no tool"),
        (f"llm: {LLM}\ntools: look_up", r":8: agent.tools.0: 'look_up' is no import path"),
    ],
)
async def test_what_cannot_be_made_names_file_line_and_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: str, said: str
) -> None:
    for name in ("OPENAI_API_KEY", "SOME_KEY"):
        monkeypatch.delenv(name, raising=False)
    file = write(tmp_path, f"instructions: x\n{agent}")
    with pytest.raises(ConfigError, match=said) as caught:
        await rehearse(load_persona(file), Settings.from_env({}))
    assert str(caught.value).startswith(f"{file}:")


async def test_a_plugin_that_shows_its_key_does_not_get_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "hush-hush")
    for value in ("'${SOME_SECRET}'", "hush-hush"):
        persona = persona_of(
            tmp_path,
            f"instructions: x\nllm: {{use: tests.hearing.leaks, options: {{api_key: {value}}}}}",
        )
        with pytest.raises(ConfigError, match=r"the key \.\.\. is refused") as caught:
            await rehearse(persona, Settings.from_env({}))
        assert "hush" not in str(caught.value)


def test_doctor_tells_what_is_wrong(tmp_path: Path) -> None:
    write(tmp_path, "instructions: x\nllm: nobody", "broken")
    write(tmp_path, f"instructions: x\nllm: {LLM}", "whole")
    settings = dataclasses.replace(Settings.from_env(), persona_dirs=(tmp_path,))
    found = {check.name: check for check in examine(settings)}
    assert found["agent whole"].state == "ok"
    assert found["agent broken"].state == "fail"
    assert "livekit-plugins-nobody" in found["agent broken"].detail


# --- whole conversations --------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def working(
    livekit: LiveKitServer, folder: Path, *personas: str, **more: Any
) -> AsyncIterator[Worker]:
    name = f"w-{uuid.uuid4().hex[:6]}"
    options: dict[str, Any] = {"agent_name": name, "capacity": 1, "drain": 10.0, **more}
    settings = settings_of(livekit, folder)
    async with registered(settings, personas=personas, **options) as (worker, _):
        yield worker


class User(Joined):
    """Somebody who speaks, types and reads."""

    def __init__(self, livekit: LiveKitServer, room: str, identity: str = "user") -> None:
        super().__init__(livekit, room, identity, "standard")
        self.read: list[tuple[float, str, str]] = []
        """(when, who said it, text) of the captions, piece by piece."""
        self._mic = rtc.AudioSource(48_000, 1)
        self._readers: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> User:  # type: ignore[override]
        self.room.register_text_stream_handler("lk.transcription", self._opened)
        await super().__aenter__()
        track = rtc.LocalAudioTrack.create_audio_track("mic", self._mic)
        await self.room.local_participant.publish_track(
            track, rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._mic.aclose()

    def _opened(self, reader: rtc.TextStreamReader, who: str) -> None:
        self._readers.add(asyncio.create_task(self._reading(reader, who)))

    async def _reading(self, reader: rtc.TextStreamReader, who: str) -> None:
        async for piece in reader:
            self.read.append((time.monotonic(), who, piece))

    def captions(self, who: str = "voipavatar-agent") -> str:
        return "".join(piece for _, name, piece in self.read if name == who).strip()

    async def say(self, pcm: Any, silence: float = 1.0) -> None:
        pcm = np.concatenate([pcm, np.zeros(round(silence * 48_000), np.int16)])
        for at in range(0, len(pcm), 960):
            piece = np.ascontiguousarray(pcm[at : at + 960])
            await self._mic.capture_frame(rtc.AudioFrame(piece.tobytes(), 48_000, 1, len(piece)))

    async def type(self, text: str) -> None:
        await self.room.local_participant.send_text(text, topic="lk.chat")


async def until(what: Callable[[], Any], seconds: float = 15.0, why: str = "") -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why or "it did not come about"
        await asyncio.sleep(0.05)


def viewer(livekit: LiveKitServer, room: str, whom: str = "voipavatar") -> Viewer:
    return Viewer(livekit.url, room, livekit.api_key, livekit.api_secret, publisher=whom)


async def dispatched(livekit: LiveKitServer, worker: Worker, room: str, **order: Any) -> None:
    async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
        await lk.agent_dispatch.create_dispatch(
            api.CreateAgentDispatchRequest(
                agent_name=worker.agent_name, room=room, metadata=json.dumps(order)
            )
        )


TALK = """
instructions: Follow the script.
greeting: hello there
llm:
  use: tests.hearing.Script
  options: {lines: ["LONG", "good bye", "welcome back"], api_key: "${SOME_SECRET}"}
stt: tests.hearing.StreamingEar
tts: tests.hearing.Words
turn_detection: stt
tools: [tests.hearing.look_up]
stay: 3
session: {aec_warmup_duration: 0, turn_handling: {endpointing: {min_delay: 0.1},
          interruption: {min_duration: 0.2}}}
""".replace("LONG", " ".join(["word"] * 30))


@server
async def test_a_conversation_without_a_line_of_python(
    livekit: LiveKitServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Greeted, typed to, cut short by voice, left, come back to, left for good."""
    monkeypatch.setenv("SOME_SECRET", "hush-hush")
    caplog.set_level(logging.DEBUG)
    room = f"talk-{uuid.uuid4().hex[:6]}"
    file = write(tmp_path, TALK)
    async with working(livekit, tmp_path, str(file)) as worker:
        await dispatched(livekit, worker, room)
        seen = viewer(livekit, room)
        async with contextlib.AsyncExitStack() as there:
            user = await there.enter_async_context(User(livekit, room))
            await until(lambda: user.captions().endswith("there"), why="no greeting")
            await there.enter_async_context(seen)  # later: it talks with who came first
            await seen.wait()
            [script] = hearing.Script.made[-1:]
            assert script.api_key == "hush-hush"

            others = user.room.remote_participants
            assert set(others) - {"viewer"} == {"voipavatar", "voipavatar-agent"}
            assert others["voipavatar"].attributes["lk.publish_on_behalf"] == "voipavatar-agent"
            assert others["voipavatar"].name == "talker"
            assert not others["voipavatar-agent"].track_publications, "two voices"
            assert worker.health()["conversations"] == worker.health()["sessions"] == 1

            await until(
                lambda: others["voipavatar-agent"].attributes["lk.agent.state"] != "speaking"
            )
            pictures = len(seen.flashes())
            await user.type("please go on")
            await until(
                lambda: user.captions().count("word") >= 3, why="no answer to what is typed"
            )
            assert script.asked[-1] == "please go on"
            assert len(seen.flashes()) > pictures, "it does not move as it speaks"

            begin = time.monotonic()
            await user.say(tone(0.8, 48_000, 300.0))
            await until(lambda: script.asked[-1] == hearing.HEARD)
            await until(lambda: "bye" in user.captions(), why="the voice was not answered")
            assert user.captions().count("word") < 30, "it was not interrupted"
            print(f"voice to the answer's caption: {time.monotonic() - begin:.1f} s")

        # The page is loaded anew: another identity, and the same conversation.
        await asyncio.sleep(0.5)
        async with User(livekit, room, "user-2") as user:
            await until(lambda: "voipavatar-agent" in user.room.remote_participants, 3)
            await asyncio.sleep(0.3)  # the agent has been told who came
            await user.type("again")
            await until(lambda: script.asked[-1] == "again", why="what is typed did not arrive")
            await until(lambda: "back" in user.captions(), why="who comes back is not answered")
        begin = time.monotonic()
        await until(lambda: not worker.health()["taken"], 20, "the conversation did not end")
        print(f"ended {time.monotonic() - begin:.1f} s after the last one left")
        assert not worker.health()["sessions"] and not worker.health()["conversations"]
        async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
            rooms = (await lk.room.list_rooms(api.ListRoomsRequest(names=[room]))).rooms
            assert not rooms, "the room stayed behind"
    # Of each record all that a collector would get, not only the line that is printed.
    for record in caplog.records:
        assert "hush" not in f"{record.getMessage()} {vars(record)}"
        open_fields = {key: value for key, value in vars(record).items() if ".pii." not in key}
        if "voipavatar" in record.name:
            assert "please go on" not in str(open_fields) and room not in str(open_fields)
    assert "failed to emit" not in caplog.text, "something of the avatar could not be called"


@server
async def test_it_talks_on_without_its_face_and_ends_with_the_worker(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    """Somebody throws the avatar out; later the time to drain is over while somebody is there."""
    write(
        tmp_path,
        "instructions: x\ngreeting: hello\nstay: 30\n"
        "llm: {use: tests.hearing.Script, options: {lines: [still here]}}",
    )
    room = f"faceless-{uuid.uuid4().hex[:6]}"
    async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
        async with User(livekit, room) as user:
            async with working(livekit, tmp_path, "talker", drain=1.0) as worker:
                await dispatched(livekit, worker, room)
                await until(lambda: "hello" in user.captions(), why="no greeting")
                agent = user.room.remote_participants["voipavatar-agent"]
                assert not agent.track_publications
                await until(lambda: agent.attributes["lk.agent.state"] != "speaking")
                await lk.room.remove_participant(
                    api.RoomParticipantIdentity(room=room, identity="voipavatar")
                )
                await until(lambda: "voipavatar" not in user.room.remote_participants, 5)
                await user.type("are you there")
                await until(lambda: "still here" in user.captions(), why="it fell silent")
                [sound] = agent.track_publications.values()
                assert sound.kind == rtc.TrackKind.KIND_AUDIO, "its own voice"
                begin = time.monotonic()
            took = time.monotonic() - begin
            print(f"ended {took:.1f} s after the worker was told to, 1.0 s of which were its drain")
            assert took < 10
            await until(lambda: not user.room.remote_participants, 5, "somebody stayed behind")


@server
async def test_the_dispatch_says_how_its_picture_is_coded(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    write(
        tmp_path,
        "instructions: x\ngreeting: hello\nstay: 1\n"
        "llm: {use: tests.hearing.Script, options: {lines: []}}",
    )
    room = f"coded-{uuid.uuid4().hex[:6]}"
    async with working(livekit, tmp_path, "talker") as worker, User(livekit, room) as user:
        await dispatched(livekit, worker, room, video={"codec": "h264"})
        await until(lambda: "voipavatar" in user.room.remote_participants, why="no face")
        face = user.room.remote_participants["voipavatar"]
        await until(lambda: len(face.track_publications) == 2)
        kinds = [one.mime_type.lower() for one in face.track_publications.values()]
        assert "video/h264" in kinds


@server
async def test_a_model_that_may_see_gets_the_users_picture(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    write(
        tmp_path,
        "instructions: x\nvision: true\nstay: 1\n"
        "realtime: {use: tests.realtime.Speaking, options: {seconds: 0.5}}",
    )
    room = f"vision-{uuid.uuid4().hex[:6]}"
    async with working(livekit, tmp_path, "talker") as worker:
        await dispatched(livekit, worker, room)
        async with User(livekit, room) as user:
            camera = rtc.VideoSource(320, 192)
            track = rtc.LocalVideoTrack.create_video_track("camera", camera)
            await user.room.local_participant.publish_track(
                track, rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_CAMERA)
            )
            picture = bytearray(320 * 192 * 3 // 2)
            end = time.monotonic() + 20
            while not any(one.saw[0] for one in realtime.Speaking.made[-1].sessions):
                assert time.monotonic() < end, "it saw nothing"
                frame = rtc.VideoFrame(320, 192, rtc.VideoBufferType.I420, picture)
                camera.capture_frame(frame)
                await asyncio.sleep(0.1)
            # The face of its own is no user's picture.
            assert realtime.Speaking.made[-1].sessions[-1].saw == (320, 192)
            await camera.aclose()
        await until(lambda: not worker.health()["taken"], 20, "the conversation did not end")


@server
async def test_a_speech_to_speech_model_has_the_face(
    livekit: LiveKitServer, tmp_path: Path
) -> None:
    """It greets, answers what is typed, and is cut short by its own ear."""
    write(
        tmp_path,
        "instructions: x\ngreeting: {instructions: Greet.}\nstay: 1\n"
        "realtime: {use: tests.realtime.Speaking, options: {seconds: 1.5}}\n"
        "session: {aec_warmup_duration: 0}",
    )
    room = f"realtime-{uuid.uuid4().hex[:6]}"
    async with working(livekit, tmp_path, "talker") as worker:
        await dispatched(livekit, worker, room)
        seen = viewer(livekit, room)
        async with contextlib.AsyncExitStack() as there:
            user = await there.enter_async_context(User(livekit, room))
            await until(lambda: "word" in user.captions(), why="no greeting")
            await there.enter_async_context(seen)
            await seen.wait()
            [model] = realtime.Speaking.made[-1:]
            [session] = model.sessions
            agent = user.room.remote_participants["voipavatar-agent"]
            await until(lambda: agent.attributes["lk.agent.state"] != "speaking")
            assert not agent.track_publications, "two voices"
            # How long it is heard: by the picture, which is white while it speaks.
            count = len(seen.flashes())
            await user.type("please go on")
            await until(lambda: session.replies == 2, why="what is typed is not answered")
            await until(lambda: len(seen.flashes()) > count, why="it was not seen to speak")
            begin, end = seen.flashes()[-1]
            assert end - begin == pytest.approx(1.5, abs=0.3)
            assert not session.truncated

            model.seconds = 6.0
            await user.type("and at length")
            await until(lambda: agent.attributes["lk.agent.state"] == "speaking")
            speaking = time.monotonic()
            await asyncio.sleep(1.5)
            count = len(seen.flashes())
            session.loop.call_soon_threadsafe(session.user_begins)
            await until(lambda: len(session.truncated) > 0, 3, "it was not cut short")
            took = time.monotonic() - speaking
            await until(lambda: len(seen.flashes()) > count, 3, "it spoke on")
            print(f"cut {session.truncated[0]} ms into it, {took:.2f} s after it began")
            assert session.truncated[0] / 1000 == pytest.approx(took, abs=0.5)

            model.seconds = 0.5
            count = len(seen.flashes())
            await user.type("once more")
            await until(lambda: len(seen.flashes()) > count, why="it is silent since then")
        await until(lambda: not worker.health()["taken"], 20, "the conversation did not end")


@server
async def test_a_real_plugin_thinks_and_whole_utterances_are_heard(
    livekit: LiveKitServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LiveKit's OpenAI plugin against a stand-in of the service, an STT that takes whole
    utterances behind the built-in VAD, and the persona's own voice."""
    monkeypatch.setenv("SOME_SECRET", "hush-hush")
    room = f"real-{uuid.uuid4().hex[:6]}"
    behaviour = standins.Behaviour()
    speech, _ = standins.spoken("Would you tell me something about it, please?", 48_000)
    async with standins.chat(behaviour, "Certainly, with pleasure.") as url:
        agent = f"""
instructions: You are a test.
llm: [{{use: tests.hearing.Script, options: {{lines: [no], broken: true}}}},
      {{use: openai, options: {{model: m, base_url: "{url}", api_key: "${{SOME_SECRET}}"}}}}]
stt: tests.hearing.Ear
turn_detection: vad
stay: 1
"""
        write(tmp_path, agent)
        async with working(livekit, tmp_path, "talker") as worker:
            await dispatched(livekit, worker, room, persona="talker", identity="marcus")
            seen = viewer(livekit, room, "marcus")
            async with contextlib.AsyncExitStack() as there:
                user = await there.enter_async_context(User(livekit, room))
                await until(lambda: "marcus" in user.room.remote_participants)
                await asyncio.sleep(0.5)
                await there.enter_async_context(seen)  # later: it talks with who came first
                await seen.wait()
                await user.say(speech, 1.5)
                await until(lambda: behaviour.texts, why="the voice was not heard")
                await until(lambda: "pleasure" in user.captions("marcus-agent"), why="no answer")
                await until(lambda: seen.flashes(), why="nothing moved")
                assert user.captions("user").endswith(hearing.HEARD), "what was heard is shown too"
            await until(lambda: not worker.health()["taken"], 20)
    [request] = behaviour.requests
    assert request["messages"][0]["content"] == "You are a test."
    assert behaviour.texts == [hearing.HEARD] and behaviour.keys == ["Bearer hush-hush"]


@server
async def test_every_room_and_no_more_than_there_is_room_for(
    make_livekit: Any, tmp_path: Path
) -> None:
    livekit = await make_livekit()  # every room of it
    write(tmp_path, f"instructions: x\nllm: {LLM}\nvad: none\nstay: 0.5")
    write(tmp_path, "instructions: x\nllm: nobody", "broken")
    async with working(livekit, tmp_path, "talker", every_room=True) as worker:
        async with User(livekit, "first") as user:
            await until(lambda: "voipavatar-agent" in user.room.remote_participants)
            async with User(livekit, "second"):
                await until(lambda: worker.refused == 1)
                assert worker.health()["taken"] == 1
        await until(lambda: not worker.health()["taken"], 20)
        async with api.LiveKitAPI(livekit.url, livekit.api_key, livekit.api_secret) as lk:
            rooms = (await lk.room.list_rooms(api.ListRoomsRequest(names=["first"]))).rooms
            assert not rooms


@server
async def test_a_bad_agent_fails_at_the_start(livekit: LiveKitServer, tmp_path: Path) -> None:
    file = write(tmp_path, "instructions: x\nllm: nobody")
    with pytest.raises(ConfigError, match=f"{file}:7: agent.llm.0: needs a plugin"):
        async with working(livekit, tmp_path, "talker"):
            pass
    with pytest.raises(ConfigError, match="give a --persona with an agent section"):
        async with working(livekit, tmp_path, "clapper", every_room=True):
            pass
    file.write_text(file.read_text() + "queue: news\n")
    with pytest.raises(ConfigError, match="'talker' holds a conversation .* queue 'news' too"):
        async with working(livekit, tmp_path, "talker"):
            pass


def test_the_example_is_a_persona(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).parent.parent / "examples"
    persona = load_persona(examples / "agent.yaml")
    assert persona.agent is not None and persona.agent.llm is not None
    # Its other variant, which stands there in comments.
    text = (examples / "agent.yaml").read_text("utf-8")
    [line] = [line for line in text.splitlines() if line.strip().startswith("# realtime:")]
    whole = yaml.safe_load(text)
    whole["agent"]["realtime"] = yaml.safe_load(line.strip().lstrip("# "))["realtime"]
    for name in ("llm", "stt"):
        del whole["agent"][name]
    other = Persona.model_validate(whole)
    assert other.agent is not None and other.agent.realtime is not None
    assert other.agent.realtime.options["voice"] == "Puck"


async def test_the_examples_in_python_make_their_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name and argument of theirs is one that the installed livekit-agents has."""
    from livekit.agents import AgentSession, JobContext
    from livekit.plugins import voipavatar

    class Enough(Exception):
        pass

    async def start(self: Any, session: AgentSession[Any], room: Any) -> None:
        assert not session.options.interruption["resume_false_interruption"]
        raise Enough

    async def connect(**more: Any) -> None: ...

    monkeypatch.setenv("GOOGLE_API_KEY", "x")
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    monkeypatch.setattr(voipavatar.AvatarSession, "start", start)
    deepgram = types.ModuleType("livekit.plugins.deepgram")
    deepgram.STT = lambda model: hearing.Ear()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "livekit.plugins.deepgram", deepgram)
    monkeypatch.setattr(livekit.plugins, "deepgram", deepgram, raising=False)
    examples = Path(__file__).parent.parent / "examples"
    for name in ("agent.py", "agent_pipeline.py"):
        entrypoint = runpy.run_path(str(examples / name))["entrypoint"]
        job = cast(JobContext, types.SimpleNamespace(connect=connect, room=None))
        async with utils.http_context.open():
            with pytest.raises(Enough):
                await entrypoint(job)


def test_an_agent_that_asks_for_a_face_gets_only_that() -> None:
    from voipavatar.worker import _talks

    agent = {"instructions": "x", "llm": "openai"}
    talker = Persona.model_validate({"name": "p", "agent": agent})
    assert _talks(talker, Order()) and not _talks(Persona(name="p"), Order())
    assert not _talks(talker, Order(agent="somebody")) and not _talks(talker, Order(follow="x"))
