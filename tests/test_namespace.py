"""`from livekit.plugins import voipavatar`: light, registered, and hiding nobody else's plugin."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROBE = """
import json, socket, sys, time
import livekit.agents
def refuse(*args): raise AssertionError("the network was used")
socket.socket.connect = refuse
before = set(sys.modules)
since = time.process_time()
from livekit.plugins import voipavatar
took = time.process_time() - since
from livekit.agents import Plugin
[plugin] = [one for one in Plugin.registered_plugins if "voipavatar" in one.title]
import voipavatar as package
print(json.dumps({
    "took": took,
    "loaded": sorted(set(sys.modules) - before),
    "plugin": [plugin.title, plugin.version, plugin.package, plugin.logger.name],
    "all": list(voipavatar.__all__),
    "same": package.AvatarSession is voipavatar.AvatarSession,
    "documented": all(getattr(voipavatar, name).__doc__ for name in voipavatar.__all__),
}))
"""


def test_the_plugin_is_light_and_registered() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["took"] < 1.0
    assert not {"torch", "onnxruntime", "tensorrt"} & set(found["loaded"])
    title, version, package, logger = found["plugin"]
    assert title == package == logger == "livekit.plugins.voipavatar" and version
    assert found["same"] and found["documented"]


@pytest.mark.slow
def test_the_wheel_leaves_the_namespace_open(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path)]
    subprocess.run(
        [*command, str(ROOT)],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert "livekit/plugins/voipavatar/__init__.py" in names
    assert "livekit/plugins/voipavatar/py.typed" in names
    assert not {"livekit/__init__.py", "livekit/plugins/__init__.py"} & names
    # Installed beside another plugin of the same namespace, both are found.
    other = tmp_path / "other" / "livekit" / "plugins" / "another"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("here = True\n")
    code = "from livekit.plugins import another, voipavatar; print(voipavatar.__file__)"
    paths = f"{tmp_path / 'site'}:{tmp_path / 'other'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
