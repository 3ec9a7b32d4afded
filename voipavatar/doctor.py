"""`voipavatar doctor`: looks at everything that a talking avatar needs, and names the mends.

Only looks: nothing is fetched, built, started or changed. A check that itself breaks is a failed
check, so the others are still told.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from . import livekit_server
from .config import Settings, list_personas
from .errors import VoipAvatarError
from .version import __version__

State: TypeAlias = Literal["ok", "warn", "fail"]

PYTHON = ((3, 10), (3, 14))
"""From the first, below the second."""

# import name, distribution, the extra it belongs to ("" for what everything needs), what it's for
PACKAGES: Sequence[tuple[str, str, str, str]] = (
    ("livekit.rtc", "livekit", "", "LiveKit rooms"),
    ("livekit.agents", "livekit-agents", "", "LiveKit agents"),
    ("livekit.api", "livekit-api", "", "LiveKit's server API"),
    ("av", "av", "", "encoding and decoding"),
    ("numpy", "numpy", "", "pictures and sound"),
    ("cv2", "opencv-python-headless", "", "pictures"),
    ("pydantic", "pydantic", "", "personas"),
    ("yaml", "PyYAML", "", "personas"),
    ("fastapi", "fastapi", "", "the HTTP interface"),
    ("uvicorn", "uvicorn", "", "the HTTP interface"),
    ("aiohttp", "aiohttp", "", "downloads"),
    ("aio_pika", "aio-pika", "", "RabbitMQ"),
    ("piper", "piper-tts", "demo", "the voice piper"),
    ("espeakng_loader", "espeakng-loader", "demo", "the voice espeak"),
    ("edge_tts", "edge-tts", "demo", "the voice edge"),
    ("torch", "torch", "musetalk", "the engine musetalk"),
)

ROOM_WANTED, ROOM_NEEDED = 2_000_000_000, 200_000_000
"""Bytes free in the cache folder: what a build and a prepared avatar take, and the least."""


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: State
    detail: str
    mend: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which they are worth reading. Takes a few seconds."""
    found: list[Check] = []
    for name, look in (
        ("python", _python),
        ("packages", _packages),
        ("livekit", _livekit),
        ("voices", _voices),
        ("personas", _personas),
        ("agents", _agents),
        ("page", _page),
        ("ports", _ports),
        ("disk", _disk),
        ("gpu", _gpu),
    ):
        found += _guarded(name, look, settings)
    return found


def report(checks: Sequence[Check]) -> dict[str, Any]:
    """The checks as JSON has them; `ok` is False when one failed."""
    return {
        "ok": all(check.state != "fail" for check in checks),
        "version": __version__,
        "checks": [asdict(check) for check in checks],
    }


def _guarded(
    name: str, look: Callable[[Settings], Iterator[Check]], settings: Settings
) -> list[Check]:
    try:
        return list(look(settings))
    except VoipAvatarError as error:
        return [Check(name, "fail", str(error))]
    except Exception as error:  # a bug or a machine we don't know: tell it, go on
        detail = f"the check broke: {type(error).__name__}: {error}"
        return [Check(name, "fail", detail, "report this, please")]


def _python(settings: Settings) -> Iterator[Check]:
    least, below = PYTHON
    version = sys.version_info[:2]
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if least <= version < below:
        yield Check("python", "ok", f"{detail}, {os.cpu_count()} cores")
    else:
        wanted = f"{least[0]}.{least[1]} to {below[0]}.{below[1] - 1}"
        yield Check("python", "fail", detail, f"install Python {wanted}")


def _packages(settings: Settings) -> Iterator[Check]:
    missing: dict[str, list[str]] = {}
    there = []
    for module, distribution, extra, use in PACKAGES:
        if _importable(module):
            there.append(f"{distribution} {_version(distribution)}")
        else:
            missing.setdefault(extra, []).append(f"{distribution} ({use})")
    yield Check("packages", "ok", ", ".join(there))
    for extra, names in missing.items():
        if extra:
            mend = f"pip install 'voipavatar[{extra}]', if you want it"
            yield Check(f"packages {extra}", "warn", f"not installed: {', '.join(names)}", mend)
        else:
            detail = f"missing: {', '.join(names)}"
            yield Check("packages", "fail", detail, "pip install voipavatar")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent is missing
        return False


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"


def _livekit(settings: Settings) -> Iterator[Check]:
    if settings.livekit_url:
        yield _livekit_named(settings)
        return
    found = livekit_server.locate(settings.cache_dir)
    if found is None:
        yield Check(
            "livekit",
            "warn",
            "no livekit-server on PATH or in the cache yet",
            f"`voipavatar demo` gets livekit-server {livekit_server.VERSION} by itself; or put "
            "one on PATH, or set LIVEKIT_URL",
        )
        return
    code, output = _call([*found.argv, "--version"], limit=20)
    if code == 0:
        yield Check("livekit", "ok", f"{output} ({found.origin}: {found.argv[0]})")
    else:
        mend = f"remove {found.argv[0]}: a new one is then fetched or built"
        yield Check("livekit", "fail", f"{found.argv[0]} doesn't run: {output}", mend)


def _livekit_named(settings: Settings) -> Check:
    """The server of LIVEKIT_URL: does it answer, and does it take the key?"""
    livekit_server.LiveKitServer.from_settings(settings)  # says what is not set
    from livekit import api

    grants = api.VideoGrants(room_list=True)
    made = api.AccessToken(settings.livekit_api_key, settings.livekit_api_secret)
    url = re.sub(r"^ws", "http", settings.livekit_url.rstrip("/"))
    request = urllib.request.Request(
        f"{url}/twirp/livekit.RoomService/ListRooms",
        data=b"{}",
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {made.with_grants(grants).to_jwt()}",
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            reply.read()
    except urllib.error.HTTPError as error:
        error.close()
        detail = f"{settings.livekit_url} answers {error.code}"
        mend = "check LIVEKIT_API_KEY and LIVEKIT_API_SECRET against that server's"
        return Check("livekit", "fail", detail, mend)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        detail = f"{settings.livekit_url} is out of reach: {reason}"
        mend = "start that server, or unset LIVEKIT_URL to have one started"
        return Check("livekit", "fail", detail, mend)
    return Check("livekit", "ok", f"{settings.livekit_url} answers and takes the key")


def _voices(settings: Settings) -> Iterator[Check]:
    from .speech import voices

    found = voices(settings)
    offline = any(voice.ready and not voice.online for voice in found)
    for voice in found:
        name = f"voice {voice.name}"
        if voice.ready:
            yield Check(name, "ok", voice.title + (" (not tried)" if voice.online else ""))
        else:
            yield Check(name, "warn", voice.title, voice.why)
    if not offline:
        mend = "pip install 'voipavatar[demo]'"
        yield Check("voices", "fail", "no voice works without the internet", mend)


def _personas(settings: Settings) -> Iterator[Check]:
    names = [persona.name for persona in list_personas(settings)]
    if "default" in names:
        yield Check("personas", "ok", ", ".join(names))
    else:
        mend = "install voipavatar again: its own personas are missing"
        yield Check("personas", "fail", f"there is no persona 'default' among {names}", mend)


def _agents(settings: Settings) -> Iterator[Check]:
    """Everything that a persona's agent consists of is made once, without asking anybody."""
    import asyncio

    for persona in list_personas(settings):
        if persona.agent is None:
            continue
        from .parts import rehearse

        name = f"agent {persona.name}"
        try:
            asyncio.run(rehearse(persona, settings))
        except VoipAvatarError as error:
            mend = "mend it there; `voipavatar worker` takes no room as this persona until then"
            yield Check(name, "fail", str(error), mend)
        else:
            models = persona.agent.llm or (persona.agent.realtime,)
            uses = ", ".join(one.use for one in models if one is not None)
            yield Check(name, "ok", f"{uses} (not asked)")


def _page(settings: Settings) -> Iterator[Check]:
    from .server.vendor import ASSETS

    waiting = [
        asset.package for asset in ASSETS.values() if not asset.place(settings.cache_dir).is_file()
    ]
    if waiting:
        detail = f"not fetched yet: {', '.join(sorted(set(waiting)))}"
        yield Check("page", "warn", detail, "the first `voipavatar demo` fetches them")
    else:
        yield Check("page", "ok", f"{len(ASSETS)} files in {settings.cache_dir / 'web'}")


def _ports(settings: Settings) -> Iterator[Check]:
    for port, use, udp in (
        (settings.port, "the page", False),
        (livekit_server.HTTP_PORT, "LiveKit", False),
        (livekit_server.UDP_PORT, "LiveKit's media", True),
    ):
        name = f"port {port}"
        if _bindable(port, udp):
            yield Check(name, "ok", f"free for {use}")
        else:
            mend = "`voipavatar demo` takes a free one; `voipavatar serve` takes --port"
            yield Check(name, "warn", f"taken; wanted for {use}", mend)


def _bindable(port: int, udp: bool) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as probe:
        if not udp:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _disk(settings: Settings) -> Iterator[Check]:
    folder = settings.cache_dir
    # It's made at first use: until then its nearest ancestor decides.
    standing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(standing).free
    detail = f"{free / 1e9:.1f} GB free for {folder}"
    elsewhere = "set VOIPAVATAR_CACHE to a folder"
    if not (standing.is_dir() and os.access(standing, os.W_OK | os.X_OK)):
        yield Check("disk", "fail", f"{folder} can't be written", f"{elsewhere} of your own")
    elif free < ROOM_NEEDED:
        yield Check("disk", "fail", detail, f"free some, or {elsewhere} with room")
    elif free < ROOM_WANTED:
        yield Check("disk", "warn", detail, f"free some, or {elsewhere} with room")
    else:
        yield Check("disk", "ok", detail)


def _gpu(settings: Settings) -> Iterator[Check]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Check("gpu", "ok", "none found: the engines viseme and clapper run on the CPU")
        return
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    code, output = _call([tool, *query], limit=20)
    if code != 0:
        mend = "check the NVIDIA driver; the CPU engines work without it"
        yield Check("gpu", "warn", f"nvidia-smi fails: {output}", mend)
        return
    yield Check("gpu", "ok", output)
    if not _importable("torch"):
        return  # told among the packages
    # In a process of its own: torch takes seconds to load, and CUDA stays for a process's life.
    probe = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    code, output = _call([sys.executable, "-c", probe], limit=120)
    if code == 0 and output.endswith("True"):
        yield Check("cuda", "ok", f"torch sees it, CUDA {output.split()[0]}")
    else:
        mend = "install a torch built for CUDA; see the engine's page in docs/"
        yield Check("cuda", "warn", f"torch doesn't see the GPU ({output})", mend)


def _call(argv: Sequence[str], *, limit: float) -> tuple[int, str]:
    """Exit code and one line of output of a program that only tells something."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer in {limit:.0f} s"
    except OSError as error:
        return 127, f"{Path(argv[0]).name}: {error.strerror}"
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, "; ".join(lines[:8]) if done.returncode == 0 else " ".join(lines[-1:])
