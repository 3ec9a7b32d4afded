"""Arrows go one way: a file imports only from lower layers, and importing stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "voipavatar"

LAYERS = {
    "version": 0,
    "errors": 0,
    "metrics": 0,
    "waiting": 0,
    "media": 1,
    "config": 2,
    "avatar": 2,
    "sources": 2,
    "sinks": 2,
    "room": 2,
    "agentstream": 2,
    "follow": 3,
    "rtmp": 2,
    "speech": 2,
    "rabbitmq": 2,
    "facemodels": 3,
    "models": 3,
    "messages": 2,
    "ledger": 2,
    "faces": 3,
    "matte": 2,
    "sets": 2,
    "engines": 3,
    "engines.runtimes": 3,
    "engines.articulation": 3,
    "engines.rig": 2,
    "facemesh": 3,
    "engines.puppet": 3,
    "engines.life": 3,
    "meshpoints": 1,
    "engines.filmlips": 3,
    "engines.film": 3,
    "engines.filming": 4,
    "engines.musetalk_nets": 3,
    "engines.clapper": 4,
    "engines.viseme": 4,
    "engines.musetalk": 4,
    "engines.synctalk": 4,
    "engines.child": 4,
    "engines.remote": 4,
    "encoder": 3,
    "targets": 3,
    "broadcast": 4,
    "broadcast_bench": 5,
    "blend_bench": 3,
    "egress": 4,
    "probe": 4,
    "stage": 4,
    "session": 5,
    "musetalk_build": 5,
    "viewer": 5,
    "outputs": 6,
    "sheet": 5,
    "newpersona": 3,
    "mouthpiece": 3,
    "captions": 4,
    "parts": 3,
    "plugin": 6,
    "bridge": 6,
    "conversation": 6,
    "server": 6,
    "feed": 6,
    "pipecat_processor": 6,
    "worker": 7,
    "conformance": 7,
    "livekit_server": 7,
    "doctor": 7,
    "say": 7,
    "bench_queue": 7,
    "bench": 7,
    "facebench": 7,
    "musetalk_cli": 7,
    "cli": 8,
    "__main__": 9,
    "": 9,  # the package itself: its public names, which it takes from anywhere
}

SIDEWAYS = {
    ("avatar", "config"),
    ("room", "config"),
    ("speech", "config"),
    ("facemesh", "facemodels"),
    ("rabbitmq", "config"),
    ("rabbitmq", "messages"),
    ("rabbitmq", "ledger"),
    ("rabbitmq", "sources"),
    ("faces", "engines.runtimes"),
    ("engines.film", "engines.filmlips"),
    ("engines.film", "engines.puppet"),
    ("engines.viseme", "engines.filming"),
    ("engines.musetalk_nets", "models"),
    ("doctor", "livekit_server"),
    ("server", "outputs"),
    ("conversation", "bridge"),
    ("conversation", "plugin"),
    ("bench", "livekit_server"),
    ("conformance", "livekit_server"),
}
"""The edges inside a layer that are meant; all of them together have no cycle."""

WHOLE = {"speech", "server"}
"""Packages that are one thing in several files, which share a layer and import each other."""


def modules() -> dict[str, Path]:
    """Every Python file of the package, by its name below `voipavatar`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def unit(name: str) -> str:
    """What has the layer: the file, or the package that is one thing."""
    head = name.partition(".")[0]
    return head if head in WHOLE else name


def imported(name: str, path: Path) -> Iterator[str]:
    """Names below `voipavatar` that the file imports, also inside functions and for types only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["voipavatar", *filter(None, package.split("."))]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            # `from .engines import viseme` names a module, `from .media import Frame` doesn't
            absolute = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in absolute:
            if full == "voipavatar" or full.startswith("voipavatar."):
                yield _module(full.removeprefix("voipavatar").removeprefix("."))


def _module(name: str) -> str:
    """The longest beginning of `name` that is a file of the package."""
    known = modules()
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def edges() -> set[tuple[str, str]]:
    """Who imports whom, less what a unit imports of itself."""
    return {
        (unit(name), unit(other))
        for name, path in modules().items()
        for other in imported(name, path)
        if unit(other) != unit(name)
    }


def test_every_file_has_a_layer() -> None:
    unknown = {unit(name) for name in modules()} - LAYERS.keys()
    assert not unknown, f"give these a layer in tests/test_layers.py: {sorted(unknown)}"


def test_imports_go_down() -> None:
    wrong = [
        f"{name or 'voipavatar'} (layer {LAYERS[name]}) imports {other} (layer {LAYERS[other]})"
        for name, other in sorted(edges())
        if LAYERS[other] >= LAYERS[name] and (name, other) not in SIDEWAYS
    ]
    assert not wrong, wrong


def test_sideways_edges_stay_in_their_layer_and_make_no_cycle() -> None:
    for one, other in SIDEWAYS:
        assert LAYERS[one] == LAYERS[other]
    heads, tails = {one for one, _ in SIDEWAYS}, {other for _, other in SIDEWAYS}
    assert not heads & tails  # no path of two edges, so no cycle


def test_nobody_imports_the_package_for_its_names() -> None:
    """`from voipavatar import X` inside the package would run its lazy names in a circle."""
    assert not {(name, other) for name, other in edges() if other == "" and name != "__main__"}


def test_the_edges_are_seen() -> None:
    """The parser finds relative, absolute, nested and late imports; else nothing is proved."""
    assert ("config", "errors") in edges()
    assert ("livekit_server", "config") in edges()
    assert ("cli", "livekit_server") in edges()  # inside a function
    assert ("engines", "media") in edges()  # from ..media


def test_livekit_stays_a_namespace() -> None:
    """One stray `__init__.py` there would hide every other LiveKit plugin."""
    assert not (ROOT / "livekit" / "__init__.py").exists()
    assert not (ROOT / "livekit" / "plugins" / "__init__.py").exists()


HEAVY = {"torch", "cv2", "livekit", "livekit.rtc", "livekit.agents", "onnxruntime", "tensorrt"}

PROBE = """
import json, sys, time
since = time.process_time()  # what others use of this machine is not ours
__import__(sys.argv[1])
print(json.dumps([time.process_time() - since, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    "module", ["voipavatar", "voipavatar.errors", "voipavatar.config", "voipavatar.cli"]
)
def test_import_is_light(module: str) -> None:
    times = []
    for _ in range(3):  # the fastest of three: the first reads the disk
        done = subprocess.run(
            [sys.executable, "-c", PROBE, module],
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=60,
        )
        took, loaded = json.loads(done.stdout)
        times.append(took)
        assert not HEAVY & set(loaded), sorted(HEAVY & set(loaded))
    assert min(times) < 1.0, times
