"""The command line, as a person runs it: real processes, their output and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from voipavatar.config import Settings
from voipavatar.livekit_server import LiveKitServer
from voipavatar.stage import LATE
from voipavatar.version import __version__

from . import servers
from .faces import save_face
from .musetalk_parts import needs

ROOT = Path(__file__).parent.parent


def environment(**more: str) -> dict[str, str]:
    """The environment of a user who has set nothing."""
    mine = ("LIVEKIT_", "VOIPAVATAR_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(mine)}
    env["VOIPAVATAR_CACHE"] = str(Settings.from_env().cache_dir)
    return env | {"PYTHONPATH": str(ROOT)} | more


def run(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run `voipavatar ARGS` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "voipavatar", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(**env),
        cwd=ROOT,
    )


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["bogus"], ["No such command 'bogus'", "voipavatar --help"]),
        (["render"], ["--out"]),
        (["render", "--out", "x.mp4"], ["Give one of --text and --audio"]),
        (["render", "--out", "x.mp4", "--text", "a", "--audio", "README.md"], ["one of"]),
        (["render", "--out", "x.mp4", "--audio", "nowhere.wav"], ["nowhere.wav", "not exist"]),
        (["render", "--out", "x.mp4", "--audio", "README.md", "--voice", "edge"], ["--text"]),
        (["demo", "--port", "65536"], ["65536"]),
        (["bench", "nothing"], ["No such command 'nothing'", "voipavatar bench --help"]),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(args: list[str], words: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    for word in words:
        assert word in done.stderr


def test_unknown_persona_is_one_line_with_the_names_and_code_1(tmp_path: Path) -> None:
    done = run("render", "--persona", "nobody", "--text", "Hi.", "--out", str(tmp_path / "x.mp4"))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "nobody" in line and "default" in line and "voipavatar personas" in line


def test_folder_that_is_not_there_is_told_before_the_work(tmp_path: Path) -> None:
    out = tmp_path / "no" / "x.mp4"
    done = run("render", "--persona", "clapper", "--text", "Hi.", "--out", str(out))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: the folder {tmp_path / 'no'} is not there: make it first"
    ]


def test_mistake_in_a_persona_names_file_line_and_key(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("title: Mine\nengin: clapper\nwidth: wide\n")
    done = run("personas", VOIPAVATAR_PERSONAS=str(tmp_path))
    assert done.returncode == 1
    assert f"error: {tmp_path / 'mine.yaml'}:3: width:" in done.stderr
    assert f"       {tmp_path / 'mine.yaml'}:2: engin: unknown key" in done.stderr
    assert "Traceback" not in done.stderr


def test_setting_that_cannot_be_read_names_the_variable() -> None:
    done = run("personas", VOIPAVATAR_PORT="eighty")
    assert done.returncode == 1
    assert done.stderr.startswith("error: VOIPAVATAR_PORT='eighty' can't be used")


def test_listening_to_the_world_without_a_token_is_refused() -> None:
    done = run("serve", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert "VOIPAVATAR_TOKEN" in done.stderr.splitlines()[-1]


# --- what only tells ------------------------------------------------------------------------------


def test_version_in_all_spellings() -> None:
    for args in (["version"], ["--version"]):
        done = run(*args)
        assert (done.returncode, done.stdout.strip()) == (0, f"voipavatar {__version__}")


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("demo", "serve", "render", "personas", "doctor", "bench", "version"):
        assert f"\n  {command} " in done.stdout


def test_personas_as_a_table_and_as_json(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "title: Mine\nengine: clapper\nvoice: {use: x.Y, options: {api_key: hunter2}}\n"
    )
    table = run("personas", VOIPAVATAR_PERSONAS=str(tmp_path))
    assert table.returncode == 0, table.stderr
    names = [line.split()[0] for line in table.stdout.splitlines()]
    assert names[:2] == ["name", "default"] and {"clapper", "mine"} <= set(names)
    listed = run("personas", "--json", VOIPAVATAR_PERSONAS=str(tmp_path))
    found = {one["name"]: one for one in json.loads(listed.stdout)}
    assert found["default"]["engine"] == "viseme"
    assert found["mine"]["voices"] == ["x.Y"]
    assert found["mine"]["path"] == str(tmp_path / "mine.yaml")
    assert "hunter2" not in table.stdout + listed.stdout


def test_schema_knows_the_keys() -> None:
    schema = json.loads(run("personas", "schema").stdout)
    assert {"engine", "portrait", "voice"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False


def test_reader_that_has_had_enough_is_no_error() -> None:
    command = f"{sys.executable} -m voipavatar personas schema | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.stdout == "{\n" and done.stderr == ""


def checks(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    told = json.loads(done.stdout)
    assert told["ok"] == (done.returncode == 0)
    return {check["name"]: check for check in told["checks"]}


def test_doctor_finds_this_machine_in_order(livekit: LiveKitServer) -> None:
    done = run("doctor", "--json")
    found = checks(done)
    assert done.returncode == 0, done.stdout
    for name in ("python", "packages", "livekit", "personas", "disk", "gpu", "voice espeak"):
        assert found[name]["state"] == "ok", found[name]
    assert all(check["mend"] for check in found.values() if check["state"] != "ok")
    # `livekit` holds its ports, whichever they are; the doctor doesn't disturb it.
    assert livekit.running
    plain = run("doctor")
    assert plain.returncode == 0
    assert "ok" in plain.stdout and "python" in plain.stdout


def test_doctor_names_the_mend_of_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("engin: x\n")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "livekit-server").write_text("#!/bin/sh\necho 'wrong architecture'\nexit 126\n")
    (tools / "livekit-server").chmod(0o755)
    done = run(
        "doctor",
        "--json",
        PATH=str(tools),
        VOIPAVATAR_PERSONAS=str(tmp_path),
        VOIPAVATAR_CACHE="/proc/nothing",
    )
    found = checks(done)
    assert done.returncode == 1
    assert found["personas"]["state"] == "fail" and "bad.yaml:1" in found["personas"]["detail"]
    assert found["livekit"]["state"] == "fail"
    assert "wrong architecture" in found["livekit"]["detail"] and found["livekit"]["mend"]
    assert found["disk"]["state"] == "fail" and "VOIPAVATAR_CACHE" in found["disk"]["mend"]


@pytest.mark.server
def test_doctor_asks_the_server_that_is_named(livekit: LiveKitServer, ports: servers.Ports) -> None:
    good = {
        "LIVEKIT_URL": livekit.url,
        "LIVEKIT_API_KEY": livekit.api_key,
        "LIVEKIT_API_SECRET": livekit.api_secret,
    }
    for change, state, words in (
        ({}, "ok", "takes the key"),
        ({"LIVEKIT_API_SECRET": "x" * 40}, "fail", "answers 401"),
        ({"LIVEKIT_URL": f"ws://127.0.0.1:{ports()}"}, "fail", "out of reach"),
        ({"LIVEKIT_API_KEY": ""}, "fail", "set LIVEKIT_API_KEY"),
    ):
        found = checks(run("doctor", "--json", **good | change))["livekit"]
        assert found["state"] == state and words in found["detail"], found
        assert livekit.api_secret not in json.dumps(found)


# --- render and bench -----------------------------------------------------------------------------


def test_render_writes_a_clip_that_plays(tmp_path: Path) -> None:
    import av

    out = tmp_path / "clip.mp4"
    args = ("--persona", "clapper", "--voice", "espeak", "--text", "-", "--out", str(out))
    done = run("render", *args, stdin="One, two, three.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out} (")
    with av.open(str(out)) as clip:
        assert clip.streams.video[0].codec_context.name == "h264"
        assert clip.streams.audio[0].codec_context.name == "aac"
        pictures = sum(1 for _ in clip.decode(video=0))
    seconds = float(done.stdout.rsplit("(", 1)[1].split()[0])
    assert pictures == pytest.approx(seconds * 25, abs=2) and seconds > 1
    again = run("render", "--persona", "clapper", "--audio", str(out), "--out", str(out) + ".mp4")
    assert again.returncode == 0, again.stderr  # any sound that can be read, a clip's too


def test_render_of_what_is_no_sound_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    done = run("render", "--persona", "clapper", "--audio", "README.md", "--out", str(out))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_bench_tells_numbers_as_json() -> None:
    bench = ("bench", "engine", "--persona", "clapper", "--size")
    done = run(*bench, "320x180", "--seconds", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["size"] == "320x180"
    assert "WIDTHxHEIGHT" in run(*bench, "large").stderr
    assert any(isinstance(value, float) and value > 0 for value in found.values()), found
    # One whose portrait and landmarks lie beside its YAML.
    done = run("bench", "engine", "--persona", "clara", *bench[4:], "320x180", "--seconds", "1")
    assert done.returncode == 0, done.stderr


STUBBORN = """
import asyncio
from voipavatar import cli

async def work():
    print("begun", flush=True)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("asked", flush=True)

cli._run(work(), lambda: print("ended", flush=True))
"""


def test_second_signal_ends_what_does_not_want_to() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        for line in ("begun", "asked"):
            assert process.stdout.readline().strip() == line
            process.send_signal(signal.SIGINT)
        assert process.stdout.readline().strip() == "ended"
        assert process.wait(10) == -signal.SIGINT


# --- demo -----------------------------------------------------------------------------------------


class Demo:
    """A running `voipavatar demo`, and the LiveKit server that it started."""

    def __init__(self, *args: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "voipavatar", "demo", "--no-browser", *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        self.page = self.livekit = ""

    def __enter__(self) -> Demo:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("page:"):
                self.page = line.split()[1]
            if line.startswith("LiveKit:"):
                self.livekit = line.split()[1]
            if line.startswith("Ctrl-C"):
                break
        else:
            self.__exit__()
            pytest.fail(f"the demo didn't start: {self.stderr}")
        self.children = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.stdout, self.stderr = self.process.communicate(timeout=30)

    def gone(self) -> bool:
        """Whether every process of the demo has ended."""
        _, alive = psutil.wait_procs(self.children, timeout=10)
        return not alive


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_answers_and_ends_with_one_signal(
    livekit: LiveKitServer, number: signal.Signals
) -> None:
    with Demo("--port", "0") as demo:
        with urllib.request.urlopen(f"{demo.page}health", timeout=10) as reply:
            assert reply.status == 200
        assert demo.livekit != livekit.url  # it has its own
        assert any("livekit-server" in child.name() for child in demo.children)
        demo.process.send_signal(number)
        assert demo.process.wait(30) == 0
        assert demo.gone()
    assert "Traceback" not in demo.stderr, demo.stderr
    assert livekit.running  # and ends only its own


@pytest.mark.server
def test_demo_with_a_persona_of_ones_own_and_the_musetalk_engine(tmp_path: Path) -> None:
    """A YAML file from anywhere; random weights are enough for everything but beauty."""
    needs("torch")
    marks = save_face(tmp_path / "face.png", width=320, height=240)
    persona = {
        "engine": "musetalk",
        "portrait": "face.png",
        "landmarks": marks,
        "width": 320,
        "height": 240,
        "voice": ["espeak"],
        "engine_options": {"recipe": "musetalk-tiny", "models": str(tmp_path / "models")},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(persona))

    def ask(path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(base + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    with Demo("--port", "0", "--persona", str(tmp_path / "mine.yaml")) as demo:
        base, _, wish = demo.page.partition("?")
        assert wish == "persona=mine"
        opened = ask("sessions", {"persona": "mine"})
        assert opened["persona"]["engine"] == "musetalk"
        ask(f"sessions/{opened['id']}/say", {"text": "Hello there."})
        seen: set[str] = set()
        status = opened
        end = time.monotonic() + 60
        while "talking" not in seen or status["state"] != "idle":
            assert time.monotonic() < end, status
            status = ask(f"sessions/{opened['id']}")
            seen.add(status["state"])
            time.sleep(0.05)
        counters = status["stage"]["counters"]
        print(counters)
        assert counters["talking"] > 10 and counters["failed"] == 0
        # in time, or the log says that it is not
        demo.process.send_signal(signal.SIGINT)
        assert demo.process.wait(30) == 0
    late = counters["late"] >= max(LATE * counters["talking"], 12.5)
    assert ("does not keep up" in demo.stderr) == late, demo.stderr
    assert "Traceback" not in demo.stderr, demo.stderr


@pytest.mark.server
def test_demo_that_is_killed_takes_its_server_along(livekit: LiveKitServer) -> None:
    with Demo("--port", "0") as demo:
        demo.process.kill()
        demo.process.wait(30)
        assert demo.gone()
    assert livekit.running


@pytest.mark.server
def test_demo_moves_aside_when_its_port_is_taken(livekit: LiveKitServer) -> None:
    with Demo("--port", "0") as first:
        taken = first.page.rsplit(":", 1)[1].strip("/")
        second = subprocess.Popen(
            [sys.executable, "-m", "voipavatar", "demo", "--no-browser"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(VOIPAVATAR_PORT=taken),
            cwd=ROOT,
        )
        try:
            assert second.stderr is not None
            assert second.stderr.readline().startswith(f"port {taken} is taken: using ")
        finally:
            second.send_signal(signal.SIGINT)
            second.communicate(timeout=30)
        explicit = run("demo", "--no-browser", "--port", taken)
        assert explicit.returncode == 1
        assert f"port {taken} is taken" in explicit.stderr
