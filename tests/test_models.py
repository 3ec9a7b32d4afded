"""Weights: pulled over lines that break, checked, imported, and refused when they are wrong."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from voipavatar import models
from voipavatar.errors import ConfigError, TransportError

BIG = bytes(range(256)) * 4096  # 1 MiB
SMALL = b'{"a": 1}'


class Hub(http.server.ThreadingHTTPServer):
    """A hub on loopback that can break off, forget how to go on, or send something else."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: list[int] = []
        self.ranges = True
        self.asked: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.asked.append((self.path, wanted))
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        start = start if self.server.ranges else 0
        part = data[start:]
        self.send_response(206 if wanted and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.server.break_after:
            part = part[: self.server.break_after.pop(0)]
        self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def recipe(tmp_path: Path, **changes: Any) -> models.Recipe:
    data: dict[str, Any] = {
        "engine": "musetalk",
        "networks": {"vae": {"weights": "sd-vae/big.bin", "config": "sd-vae/config.json"}},
        "files": [
            {
                "path": "sd-vae/big.bin",
                "hub": {"repo": "who/what", "file": "big.bin"},
                "bytes": len(BIG),
                "sha256": hashlib.sha256(BIG).hexdigest(),
                "symptom": "a black lower face",
                "licence": "MIT",
            },
            {"path": "sd-vae/config.json", "hub": {"repo": "who/what", "file": "config.json"}},
        ],
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return models.load_recipe(path)


def silent(path: str, there: int, total: int) -> None:
    """No progress to be seen."""


def serve(hub: Hub) -> None:
    hub.files = {
        "/who/what/resolve/main/big.bin": BIG,
        "/who/what/resolve/main/config.json": SMALL,
    }


def test_a_broken_transfer_goes_on_where_it_stopped(tmp_path: Path, hub: Hub) -> None:
    serve(hub)
    hub.break_after = [300_000, 200_000]
    seen: list[tuple[int, int]] = []
    states = models.pull(
        recipe(tmp_path), tmp_path / "m", lambda _p, a, b: seen.append((a, b)), hub.url
    )
    assert (tmp_path / "m/sd-vae/big.bin").read_bytes() == BIG
    assert [one.state for one in states] == ["good", "unchecked"]
    ranges = [wanted for path, wanted in hub.asked if path.endswith("big.bin")]
    assert ranges[0] == "" and len(ranges) == 3
    starts = [int(one.removeprefix("bytes=")[:-1]) for one in ranges[1:]]
    assert 0 < starts[0] < starts[1]
    assert (len(BIG), len(BIG)) in seen
    hub.asked.clear()
    models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    assert hub.asked == []  # what is there is not fetched again


def test_a_source_that_cant_go_on_starts_again(tmp_path: Path, hub: Hub) -> None:
    serve(hub)
    hub.ranges = False
    hub.break_after = [300_000]
    models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    assert (tmp_path / "m/sd-vae/big.bin").read_bytes() == BIG


def test_a_line_that_stays_dead_keeps_what_came(tmp_path: Path, hub: Hub) -> None:
    serve(hub)
    hub.break_after = [100_000, *[0] * 30]
    with pytest.raises(TransportError, match="run it again"):
        models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    assert not (tmp_path / "m/sd-vae/big.bin").exists()
    assert (tmp_path / "m/sd-vae/big.bin.part").stat().st_size == 100_000
    hub.break_after = []
    models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    assert ("/who/what/resolve/main/big.bin", "bytes=100000-") in hub.asked


def test_another_file_under_the_name_is_refused(tmp_path: Path, hub: Hub) -> None:
    serve(hub)
    hub.files["/who/what/resolve/main/big.bin"] = BIG[:-1] + b"x"
    with pytest.raises(ConfigError, match="not the published file"):
        models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    hub.files["/who/what/resolve/main/big.bin"] = BIG + b"x"
    with pytest.raises(ConfigError, match="bytes came instead of"):
        models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    hub.files.clear()
    with pytest.raises(TransportError, match="404") as caught:
        models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)
    assert not caught.value.retryable


def test_pointers_are_not_weights(tmp_path: Path, hub: Hub) -> None:
    serve(hub)
    hub.files["/who/what/resolve/main/config.json"] = b"version https://git-lfs.github.com/spec/v1"
    with pytest.raises(ConfigError, match="pointer"):
        models.pull(recipe(tmp_path), tmp_path / "m", silent, hub.url)


def test_damage_is_named_with_its_symptom(tmp_path: Path, hub: Hub) -> None:
    serve(hub)
    one = recipe(tmp_path)
    models.pull(one, tmp_path / "m", silent, hub.url)
    (tmp_path / "m/sd-vae/big.bin").write_bytes(BIG[::-1])
    (tmp_path / "m/sd-vae/config.json").write_bytes(b"{}")
    damaged, changed = models.verify(one, tmp_path / "m")
    assert damaged.state == "damaged" and "black lower face" in damaged.message
    assert changed.state == "changed" and "--trust" in changed.message
    assert not damaged.usable and not changed.usable
    models.trust(one, tmp_path / "m")
    assert models.verify(one, tmp_path / "m")[1].state == "good"
    (tmp_path / "m/sd-vae/big.bin").unlink()
    assert models.verify(one, tmp_path / "m")[0].state == "missing"


def test_one_version_under_the_others_name_is_named(tmp_path: Path) -> None:
    """v1.0's and v1.5's UNet have the same keys and shapes: only their content tells."""
    for path in ("musetalk/pytorch_model.bin", "musetalkV15/unet.pth"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(BIG)
    for name, own in (("musetalk-v15", "unet.pth"), ("musetalk-v10", "pytorch_model.bin")):
        told = models.verify(models.load_recipe(name), tmp_path)
        (wrong,) = (one for one in told if one.state == "damaged")
        assert wrong.file.path.endswith(own) and "is the same file as musetalk" in wrong.message
        assert "matching the sound" in wrong.message
    (tmp_path / "musetalk/pytorch_model.bin").write_bytes(BIG[::-1])
    models.trust(models.load_recipe("musetalk-v10"), tmp_path)
    told = models.verify(models.load_recipe("musetalk-v15"), tmp_path)
    assert not [one for one in told if one.state == "damaged"]


@pytest.mark.parametrize("layout", ["own", "old name", "hub cache", "repository", "flat"])
def test_files_are_found_in_folders_of_all_kinds(tmp_path: Path, layout: str) -> None:
    """The air-gapped way: a folder from elsewhere."""
    place = {
        "own": "sd-vae",
        "old name": "sd-vae-ft-mse",
        "hub cache": "models--who--what/snapshots/abc123",
        "repository": "who/what",
        "flat": ".",
    }[layout]
    (tmp_path / "from" / place).mkdir(parents=True)
    (tmp_path / "from" / place / "big.bin").write_bytes(BIG)
    if layout == "flat":  # this name alone says nothing
        with pytest.raises(ConfigError, match="config.json"):
            other = [{"path": "x/config.json"}]
            models.import_folder(recipe(tmp_path, files=other), tmp_path / "from", tmp_path / "m")
        (tmp_path / "from/sd-vae").mkdir()
        place = "sd-vae"
    (tmp_path / "from" / place / "config.json").write_bytes(SMALL)
    states = models.import_folder(recipe(tmp_path), tmp_path / "from", tmp_path / "m")
    assert [one.state for one in states] == ["good", "unchecked"]
    assert (tmp_path / "m/sd-vae/big.bin").read_bytes() == BIG


def test_a_folder_with_the_wrong_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from/big.bin").write_bytes(BIG[::-1])
    with pytest.raises(ConfigError, match="not the published file"):
        models.import_folder(recipe(tmp_path), tmp_path / "from", tmp_path / "m")


def test_recipes_stay_in_the_folder(tmp_path: Path) -> None:
    for path in ("../evil.bin", "/etc/passwd", "a/../../b"):
        with pytest.raises(ConfigError):
            recipe(tmp_path, files=[{"path": path}])
    with pytest.raises(ConfigError, match="surprise"):
        recipe(tmp_path, surprise=1)


def test_the_recipes_there_are() -> None:
    """Every file of a real recipe has a licence and a way to get it; networks name known files."""
    found = {one.name: one for one in models.list_recipes()}
    assert {"musetalk-v15", "musetalk-v10", "musetalk-tiny"} <= found.keys()
    for one in found.values():
        paths = {file.path for file in one.files}
        for net in one.networks.values():
            assert net.weights in paths and (net.config is None or net.config in paths)
        if one.generated is None:
            assert all(file.licence and models.source_url(file) for file in one.files)
            assert {"unet", "vae", "whisper", "landmarks", "parser"} <= one.networks.keys()


def test_commands(tmp_path: Path, hub: Hub) -> None:
    from click.testing import CliRunner

    from voipavatar.musetalk_cli import models as group

    serve(hub)
    recipe(tmp_path)
    run = CliRunner()
    at = ["--models", str(tmp_path / "m")]
    file = str(tmp_path / "r.yaml")
    done = run.invoke(group, ["pull", file, *at, "--mirror", hub.url, "--yes"])
    assert done.exit_code == 0, done.output
    assert "MIT: sd-vae/big.bin" in done.output
    assert run.invoke(group, ["verify", file, *at]).exit_code == 0
    (tmp_path / "m/sd-vae/big.bin").write_bytes(b"")
    done = run.invoke(group, ["verify", file, *at])
    assert done.exit_code == 1 and "black lower face" in done.output
    rows = json.loads(run.invoke(group, ["list", "--json", *at]).output)
    assert any(row["file"] == "musetalkV15/unet.pth" and not row["there"] for row in rows)
