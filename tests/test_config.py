"""Personas and settings, and what people do wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from voipavatar.config import (
    Persona,
    Settings,
    list_personas,
    load_persona,
    persona_schema,
    resolve,
)
from voipavatar.errors import ConfigError, InputError


def write(folder: Path, text: str, name: str = "nora.yaml") -> Path:
    file = folder / name
    file.write_text(text, "utf-8")
    return file


def test_the_built_in_personas_are_whole() -> None:
    personas = list_personas()
    assert personas[0].name == "default"
    for persona in personas:
        if persona.engine == "viseme":
            assert persona.portrait is not None and persona.beside(persona.portrait).is_file()
            assert persona.engine_settings()["landmarks"]["outer_lips"]


def test_short_and_long_forms_of_a_voice(tmp_path: Path) -> None:
    one = load_persona(write(tmp_path, "voice: espeak\n"))
    two = load_persona(write(tmp_path, "voice: [piper, {use: edge, options: {voice: x}}]\n"))
    assert [choice.use for choice in one.voice] == ["espeak"]
    assert [choice.use for choice in two.voice] == ["piper", "edge"]
    assert two.voice[1].options == {"voice": "x"} and one.name == "nora"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("title: x\nnam: y\n", r":2: nam: unknown key; known are name, title"),
        ("voice:\n  - use: piper\n    optons: {}\n", r":3: voice.0.optons: unknown key"),
        ("fps: 23\n", r":1: fps: fps 23 can't be used: take one of 20, 24, 25"),
        ("title: a\n\nwidth: wide\n", r":3: width: Input should be a valid integer"),
        ("width: 641\n", r":1: width: "),
        ("title: a\ntitle: b\n", r":2: title: the key is there twice"),
        ("portrait: gone.png\n", r":1: portrait: gone.png is not there"),
        ("title: [\n", r":2: not YAML"),
        ("- a\n", r":1: a mapping of keys"),
        ("voice: []\n", r":1: voice: "),
        ("name: Not a name\n", r":1: name: "),
        ("title: a\nidles:\n  calm: gone.mp4\n", r":3: idles.calm.portrait: gone.mp4 is not there"),
        ("idles:\n  calm:\n    motion: 1\n", r":3: idles.calm.motion: unknown key"),
        ("idles:\n  default: {}\n", r":1: idles: default is the name of the persona's own look"),
        ("idles:\n  ../x: {}\n", r"idles"),
    ],
)
def test_mistakes_name_file_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_persona(file)
    assert str(file) in str(caught.value)


def test_looks_differ_from_the_persona_in_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "b.mp4").touch()
    persona = load_persona(
        write(
            tmp_path,
            "portrait: a.png\nlandmarks: {jaw: []}\nengine_options: {seed: 3, motion: 1}\n"
            "idles:\n  reading: b.mp4\n  calm: {engine_options: {motion: 0.2}}\n",
        )
    )
    assert persona.look("default") is persona
    reading, calm = persona.look("reading"), persona.look("calm")
    assert reading.portrait == Path("b.mp4") and reading.landmarks is None
    assert reading.engine_options == persona.engine_options
    assert calm.portrait == Path("a.png") and calm.landmarks == {"jaw": []}
    assert calm.engine_options == {"seed": 3, "motion": 0.2}
    with pytest.raises(InputError, match="no idle 'dancing'; it has: default, reading, calm"):
        persona.look("dancing")


def test_unknown_names_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no persona 'nobody'; there are: .*default"):
        load_persona("nobody")
    with pytest.raises(ConfigError, match="can't be read"):
        load_persona(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="can't be read"):
        load_persona(tmp_path / "bytes.yaml")


def test_own_personas_come_before_built_in_ones(tmp_path: Path) -> None:
    write(tmp_path, "title: Mine\nengine: clapper\n", "default.yaml")
    settings = Settings(persona_dirs=(tmp_path,))
    assert load_persona("default", settings).title == "Mine"
    assert next(one for one in list_personas(settings) if one.name == "default").title == "Mine"


def test_settings_come_from_the_environment_once_and_hide_secrets() -> None:
    settings = Settings.from_env(
        {
            "LIVEKIT_URL": "ws://127.0.0.1:1",
            "LIVEKIT_API_SECRET": "hush",
            "VOIPAVATAR_TOKEN": "quiet",
            "VOIPAVATAR_PORT": "9000",
            "VOIPAVATAR_CACHE": "/tmp/some",
        }
    )
    assert settings.port == 9000 and settings.cache_dir == Path("/tmp/some")
    assert "hush" not in repr(settings) and "quiet" not in repr(settings)
    for value in ("nine", "-1", "70000"):
        with pytest.raises(ConfigError, match="VOIPAVATAR_PORT"):
            Settings.from_env({"VOIPAVATAR_PORT": value})


def test_the_broker_is_named_by_one_address_or_by_the_common_variables() -> None:
    parts = {
        "RABBITMQ_HOST": "broker.example", "RABBITMQ_PORT": "5673", "RABBITMQ_USER": "avatar",
        "RABBITMQ_PASSWORD": "p@ss/word", "RABBITMQ_QUEUE": "talking_face_input",
        "RABBITMQ_VHOST": "tenant/1",
    }  # fmt: skip
    settings = Settings.from_env(parts)
    assert settings.amqp_url == "amqp://avatar:p%40ss%2Fword@broker.example:5673/tenant%2F1"
    assert settings.queue == "talking_face_input" and "p%40ss" not in repr(settings)
    plain = Settings.from_env({"RABBITMQ_HOST": "localhost", "RABBITMQ_VHOST": "/"})
    assert plain.amqp_url == "amqp://guest:guest@localhost:5672/"
    linked = Settings.from_env({"RABBITMQ_HOST": "::1", "RABBITMQ_PORT": "tcp://10.0.0.1:99"})
    assert linked.amqp_url == "amqp://guest:guest@[::1]:99/"
    whole = {"VOIPAVATAR_AMQP_URL": "amqps://u:p@h/v", "VOIPAVATAR_QUEUE": "mine"}
    assert Settings.from_env(parts | whole).amqp_url == "amqps://u:p@h/v"
    assert Settings.from_env(parts | whole).queue == "mine"
    assert Settings.from_env({}).amqp_url == ""
    with pytest.raises(ConfigError, match="RABBITMQ_PORT"):
        Settings.from_env({"RABBITMQ_HOST": "h", "RABBITMQ_PORT": "many"})
    with pytest.raises(ConfigError, match="begins with amqp") as caught:
        Settings.from_env({"VOIPAVATAR_AMQP_URL": "http://u:hush@h"})
    assert "hush" not in str(caught.value)


def test_a_voice_is_chosen_among_the_personas_own() -> None:
    persona = Persona.model_validate({"name": "p", "voice": ["piper", {"use": "edge"}, "edge"]})
    assert [one.use for one in persona.voices("edge#2")] == ["edge", "piper", "edge"]
    assert persona.voices(None) == persona.voice
    with pytest.raises(InputError, match="it has: piper, edge, edge#2"):
        persona.voices("os.system")


def test_secrets_are_taken_when_they_are_needed() -> None:
    assert resolve({"key": "a ${K} b", "n": [1, "${K}"]}, {"K": "v"}) == {
        "key": "a v b",
        "n": [1, "v"],
    }
    with pytest.raises(ConfigError, match="NOT_THERE is not set"):
        resolve("${NOT_THERE}", {})


def test_the_schema_accepts_what_the_loader_does() -> None:
    schema = persona_schema()
    assert set(schema["properties"]) == set(Persona.model_fields) - {"path"}
    assert schema["additionalProperties"] is False
