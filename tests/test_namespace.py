"""`from livekit.plugins import voipavatar`: light, registered, and hiding nobody else's plugin."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from livekit.plugins import voipavatar as plugin
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import voipavatar

ROOT = Path(__file__).parent.parent

PROBE = """
import json, socket, sys
import livekit.agents
def refuse(*args): raise AssertionError("the network was used")
socket.socket.connect = refuse
before = set(sys.modules)
from livekit.plugins import voipavatar
from livekit.agents import Plugin
[plugin] = [one for one in Plugin.registered_plugins if "voipavatar" in one.title]
import voipavatar as package
print(json.dumps({
    "loaded": sorted(set(sys.modules) - before),
    "plugin": [plugin.title, plugin.version, plugin.package, plugin.logger.name],
    "same": package.AvatarSession is voipavatar.AvatarSession,
}))
"""

COLD = """
import time
since = time.perf_counter()
{}
print(time.perf_counter() - since)
"""


def fresh(program: str) -> str:
    """What a program prints in an interpreter that has imported nothing yet."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plugin_is_light_and_registered() -> None:
    found = json.loads(fresh(PROBE))
    assert not {"torch", "onnxruntime", "tensorrt"} & set(found["loaded"])
    title, version, package, logger = found["plugin"]
    assert title == package == logger == "livekit.plugins.voipavatar" and version
    assert found["same"]


def test_it_adds_less_than_a_second_to_livekit_agents() -> None:
    """On the wall clock, the best of three each, since others use this machine too."""
    alone, with_it = [], []
    for _ in range(3):
        alone.append(float(fresh(COLD.format("import livekit.agents"))))
        with_it.append(float(fresh(COLD.format("from livekit.plugins import voipavatar"))))
    print(f"livekit.agents {min(alone):.2f} s, with the plugin {min(with_it):.2f} s")
    assert min(with_it) - min(alone) < 1.0


def documentation(module: ModuleType) -> Iterator[tuple[str, str]]:
    """What each public name says of itself, and what a class of ours is used by.

    A method may leave that to the class of LiveKit's that says what it has to do.
    """
    for name in module.__all__:
        one = getattr(module, name)
        if not inspect.isclass(one):
            if callable(one):
                yield name, inspect.getdoc(one) or ""
            continue
        yield name, vars(one).get("__doc__") or ""
        for base in one.__mro__:
            if "voipavatar" not in base.__module__:
                continue
            for member, value in vars(base).items():
                if not member.startswith("_") and (callable(value) or isinstance(value, property)):
                    yield f"{name}.{member}", inspect.getdoc(getattr(one, member)) or ""


@pytest.mark.parametrize("module", [voipavatar, plugin], ids=["package", "plugin"])
def test_every_public_name_is_documented(module: ModuleType) -> None:
    found = dict(documentation(module))
    assert {"AvatarSession", "AvatarSession.start", "AvatarSession.provider"} <= set(found)
    mute = [name for name, said in found.items() if not said.strip()]
    assert not mute, "these say nothing of themselves"


BESIDE = """
import json, socket, sys, time
def refuse(*args): raise AssertionError("the network was used")
socket.socket.connect = refuse
import livekit.agents
since = time.process_time()
from livekit.plugins import voipavatar
took = time.process_time() - since
heavy = {"torch", "onnxruntime", "tensorrt"} & set(sys.modules)
from livekit.plugins import openai
import livekit
print(json.dumps({
    "took": took,
    "heavy": sorted(heavy),
    "files": [voipavatar.__file__, openai.__file__],
    "namespaces": [livekit.__file__, livekit.plugins.__file__],
    "plugins": [one.title for one in livekit.agents.Plugin.registered_plugins],
}))
"""


@pytest.mark.slow
def test_the_wheel_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """With another plugin of LiveKit's and nothing but what the two declare to need."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "livekit/plugins/voipavatar/__init__.py" in names
    assert {"livekit/plugins/voipavatar/py.typed", "voipavatar/py.typed"} <= names
    assert not {"livekit/__init__.py", "livekit/plugins/__init__.py"} & names

    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run(
        [*pip, "--no-deps", "--no-compile", "--quiet", str(wheel)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    [site] = home.glob("lib/python*/site-packages")
    needed = closure(["livekit-plugins-openai", *declared(site)])
    assert "livekit-agents" in needed and not {"torch", "onnx", "piper-tts"} & set(needed)
    for name in needed:
        link(metadata.distribution(name), site)
    assert not (site / "livekit" / "__init__.py").exists()

    def inside(*command: str) -> str:
        done = subprocess.run(
            [str(python), *command],
            cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = json.loads(inside("-c", BESIDE))
    assert found["took"] < 1.0 and not found["heavy"]
    assert all(file.startswith(str(site)) for file in found["files"])
    assert found["namespaces"] == [None, None]
    assert {"livekit.plugins.voipavatar", "livekit.plugins.openai"} <= set(found["plugins"])
    # And the command works there: nothing is needed that isn't declared.
    listed = json.loads(inside("-m", "voipavatar", "personas", "--json"))
    assert "default" in {one["name"] for one in listed}


def declared(site: Path) -> list[str]:
    """What the wheel that was installed into `site` says it needs, without extras."""
    [ours] = [one for one in metadata.distributions(path=[str(site)]) if one.name == "voipavatar"]
    return [one.name for one in map(Requirement, ours.requires or []) if one.marker is None]


def closure(names: Sequence[str]) -> list[str]:
    """These distributions and all that they need here, by their own metadata."""
    found: dict[str, None] = {}
    waiting = [(name, "") for name in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        key = canonicalize_name(name)
        if (key, extra) in seen:
            continue
        seen.add((key, extra))
        found[key] = None
        for text in metadata.distribution(key).requires or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting.extend((need.name, one) for one in {"", *need.extras})
    return list(found)


def link(distribution: metadata.Distribution, site: Path) -> None:
    """The distribution's files, once more: they are the same as freshly installed ones."""
    for file in distribution.files or []:
        source = Path(str(distribution.locate_file(file)))
        if ".." in file.parts or not source.is_file():
            continue
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(source)
