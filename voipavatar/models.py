"""Weights: what an engine needs, where it comes from, under which licence, and whether it is whole.

A recipe (`engines/*.yaml`) names every file. Files are pulled from the hub or a mirror of it,
resumed where a transfer broke, or imported from a folder for machines without a network; they are
checked by size and hash where those are known, and otherwise remembered as first seen, so that a
file that changes later is noticed. Checkpoints are read without running anything that is in them.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import struct
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .avatar import digest, file_digest, read_json, write_json
from .config import PACKAGE
from .errors import ConfigError, TransportError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

HUB = "https://huggingface.co"
"""Where `hub:` files are taken from, unless a mirror is named."""

SEEN = "seen.json"
"""Hashes of files whose hash nobody has published, as they were first seen here."""

RANDOM = "random.json"
"""Which files hold random weights (`voipavatar models random`), and their keys."""

Report = Callable[[str, int, int], None]
"""Called with a file's path, the bytes there are, and the bytes there will be (0: unknown)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Hub(_Strict):
    """A file of a repository on the hub."""

    repo: str
    file: str
    revision: str = "main"


class File(_Strict):
    """One file of a recipe."""

    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """Below the models folder, in the layout MuseTalk's own scripts use."""
    hub: Hub | None = None
    url: str | None = None
    bytes: int | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    licence: str = ""
    note: str = ""
    symptom: str = ""
    """What one would see if this file were another one."""
    optional: bool = False
    """Only preparation needs it, and there is another way."""


class Net(_Strict):
    """A network: its configuration and its weights, by path."""

    config: str | None = None
    weights: str


class Recipe(_Strict):
    """What an engine is made of."""

    name: str
    engine: str
    title: str = ""
    version: Literal["v10", "v15"] = "v15"
    networks: dict[str, Net]
    files: tuple[File, ...]
    configs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Contents of configuration files, for generated weights."""
    generated: int | None = None
    """A seed: the weights are random and made on first use. For tests."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What an avatar of this recipe is prepared with unless its persona says otherwise."""

    def file(self, path: str) -> File:
        return next(one for one in self.files if one.path == path)


def recipe_folders() -> tuple[Path, ...]:
    """Where recipes are looked for: beside the package's sources, and inside the wheel."""
    return PACKAGE.parent / "engines", PACKAGE / "recipes"


def load_recipe(which: str | Path) -> Recipe:
    """By name, or from a YAML file. ConfigError lists the names there are."""
    path = Path(which)
    if path.suffix not in (".yaml", ".yml"):
        known = {one.stem: one for folder in recipe_folders() for one in folder.glob("*.yaml")}
        if str(which) not in known:
            raise ConfigError(
                f"there is no recipe {str(which)!r}; "
                f"there are: {', '.join(sorted(known)) or 'none'}"
            )
        path = known[str(which)]
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        recipe = Recipe.model_validate({"name": path.stem, **data})
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {where}: {first['msg']}") from None
    for one in recipe.files:
        if ".." in Path(one.path).parts:
            raise ConfigError(f"{path}: files: {one.path} leaves the models folder")
    return recipe


def list_recipes() -> list[Recipe]:
    """Every recipe there is."""
    found = {one.stem: one for folder in recipe_folders() for one in sorted(folder.glob("*.yaml"))}
    return [load_recipe(path) for path in found.values()]


# --- is it there, and is it right -----------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is known of one file."""

    file: File
    state: Literal["good", "unchecked", "missing", "damaged", "changed"]
    message: str

    @property
    def usable(self) -> bool:
        return self.state in ("good", "unchecked") or (
            self.file.optional and self.state == "missing"
        )


def verify(recipe: Recipe, folder: Path) -> list[State]:
    """Every file of a recipe against its size and hash. `good` files were compared with a hash
    that is published, or that was remembered when the file was first seen here."""
    states = [_verify(one, folder, recipe.generated is not None) for one in recipe.files]
    return [_not_another(recipe, one, folder) for one in states]


def _not_another(recipe: Recipe, state: State, folder: Path) -> State:
    """Weights that are byte for byte those of another name: both versions of MuseTalk's UNet have
    the same layout, so nothing else tells one from the other."""
    path = state.file.path
    weights = {net.weights for one in list_recipes() for net in one.networks.values()}
    if not state.usable or path not in {net.weights for net in recipe.networks.values()}:
        return state
    for other in sorted(weights - {path}):
        there, here = folder / other, folder / path
        if not (there.is_file() and here.is_file()) or (
            there.stat().st_size != here.stat().st_size
            or checkpoint_key(there) != checkpoint_key(here)
        ):
            continue
        symptom = f" You would see: {state.file.symptom}." if state.file.symptom else ""
        text = f"{path} is the same file as {other}: one of them is wrong.{symptom}"
        return State(state.file, "damaged", text)
    return state


def mark_random(folder: Path, *paths: str) -> None:
    """Remember that these files hold random weights."""
    keys = {path: checkpoint_key(folder / path) for path in paths}
    write_json(folder / RANDOM, {**read_json(folder / RANDOM), **keys})


def is_random(file: str, folder: Path) -> bool:
    """The file is one that `voipavatar models random` made."""
    key = read_json(folder / RANDOM).get(file)
    return key is not None and (folder / file).is_file() and key == checkpoint_key(folder / file)


def _verify(file: File, folder: Path, generated: bool = False) -> State:
    path = folder / file.path
    symptom = f" With it you would see: {file.symptom}." if file.symptom else ""
    if not path.is_file():
        text = f"{file.path} is missing"
        text += ": an avatar can be prepared another way" if file.optional else ""
        return State(file, "missing", text)
    if not generated and is_random(file.path, folder):
        return State(
            file,
            "damaged",
            f"{file.path} holds random weights (`voipavatar models random`): pull it.{symptom}",
        )
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        return State(
            file,
            "damaged",
            f"{file.path} has {size:,} bytes instead of {file.bytes:,}: pull it again.{symptom}",
        )
    found = file_digest(path)
    if file.sha256 is not None:
        if found == file.sha256:
            return State(file, "good", f"{file.path} is as published")
        return State(
            file, "damaged", f"{file.path} is not the published file: pull it again.{symptom}"
        )
    seen = read_json(folder / SEEN)
    known = seen.get(file.path)
    if known is None:
        write_json(folder / SEEN, {**seen, file.path: found})
        return State(file, "unchecked", f"{file.path}: no hash is published; remembered as it is")
    if known != found:
        return State(
            file,
            "changed",
            f"{file.path} is no longer what it was when it was first seen: if you replaced it on "
            f"purpose, run `voipavatar models verify --trust`; otherwise pull it again.{symptom}",
        )
    return State(file, "good", f"{file.path} is as first seen")


def trust(recipe: Recipe, folder: Path) -> None:
    """Remember the files as they are now."""
    seen = read_json(folder / SEEN)
    for one in recipe.files:
        if (folder / one.path).is_file():
            seen[one.path] = file_digest(folder / one.path)
    write_json(folder / SEEN, seen)


def require(recipe: Recipe, folder: Path, *paths: str) -> None:
    """ConfigError that names what is missing and the command that brings it."""
    missing = [one for one in paths if not (folder / one).is_file()]
    if missing:
        raise ConfigError(
            f"{recipe.name} needs {', '.join(missing)}, not found in the models folder: run "
            f"`voipavatar models pull {recipe.name}`, or `voipavatar models import {recipe.name} "
            "FOLDER` on a machine without a network"
        )


# --- bringing it ----------------------------------------------------------------------------------


def source_url(file: File, mirror: str | None = None) -> str | None:
    """Where a file is pulled from. A mirror has the hub's paths."""
    if file.hub is not None:
        base = (mirror or HUB).rstrip("/")
        return f"{base}/{file.hub.repo}/resolve/{file.hub.revision}/{file.hub.file}"
    return file.url


def pull(
    recipe: Recipe, folder: Path, report: Report, mirror: str | None = None, timeout: float = 30.0
) -> list[State]:
    """Bring what is missing or damaged. A broken transfer goes on where it stopped.

    `mirror` replaces the hub; it may be an http(s) address or a local folder. TransportError when
    the other end can't be reached, ConfigError when a file arrives that is not what it should be.
    """
    for file in recipe.files:
        state = _verify(file, folder)
        if state.state in ("good", "unchecked"):
            report(file.path, 1, 1)
            continue
        url = source_url(file, mirror)
        if url is None:
            raise ConfigError(f"{file.path} has no known source: {file.note or 'import it'}")
        if file.sha256 is None:
            seen = read_json(folder / SEEN)
            seen.pop(file.path, None)
            write_json(folder / SEEN, seen)
        _fetch(file, url, folder / file.path, report, timeout)
    return verify(recipe, folder)


def _fetch(file: File, url: str, target: Path, report: Report, timeout: float) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme not in ("http", "https"):
        local = Path(url)
        if not local.is_file():
            raise TransportError(f"{local} is not there", retryable=False)
        shutil.copyfile(local, part)
    else:
        _download(url, part, lambda there, all_: report(file.path, there, all_), timeout)
    size = part.stat().st_size
    if file.bytes is not None and size != file.bytes:
        part.unlink()
        raise ConfigError(
            f"{file.path}: {size:,} bytes came instead of {file.bytes:,}: the source has another "
            "file under this name; try the hub itself or another mirror"
        )
    if file.sha256 is not None and file_digest(part) != file.sha256:
        part.unlink()
        raise ConfigError(
            f"{file.path}: what came is not the published file (its sha256 differs): try again, "
            "or another mirror"
        )
    if size < 512 and part.read_bytes().startswith(b"version https://git-lfs"):
        part.unlink()
        raise ConfigError(f"{file.path}: the source has only a pointer (Git LFS), not the file")
    os.replace(part, target)


def _download(
    url: str, part: Path, report: Callable[[int, int], None], timeout: float, tries: int = 5
) -> None:
    """Into `part`, going on from what is there. Five breaks without progress are given up."""
    left = tries
    while True:
        have = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"User-Agent": "voipavatar"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                resumed = answer.status == 206
                if have and not resumed:
                    have = 0  # a source that can't go on sends all of it again
                said = answer.headers.get("Content-Length")
                total = have + int(said) if said else 0
                with part.open("ab" if resumed else "wb") as file:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        have += len(block)
                        left = tries
                        report(have, total)
            if total and have < total:
                raise TimeoutError("the connection ended early")
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and have:
                return  # nothing is left to send
            if error.code in (401, 403, 404, 410):
                raise TransportError(
                    f"{url} answers {error.code}: the file was moved or needs a login; a mirror "
                    "or `voipavatar models import` may help",
                    retryable=False,
                ) from None
            left -= 1
            reason: object = error.code
        except (OSError, ValueError) as error:
            left -= 1
            reason = error
        if left <= 0:
            raise TransportError(
                f"{url} can't be fetched ({reason}): what came so far is kept, run it again"
            )


def import_folder(recipe: Recipe, source: Path, folder: Path) -> list[State]:
    """Take a recipe's files out of any folder: MuseTalk's `models`, a hub cache, or flat.

    Wrong ones are refused by hash where one is known. ConfigError lists what was not found.
    """
    if not source.is_dir():
        raise ConfigError(f"{source} is not a folder")
    root = source.resolve()
    missing = []
    for file in recipe.files:
        if _verify(file, folder).state in ("good", "unchecked"):
            continue
        found = next((one for one in _places(file, root) if one.is_file()), None)
        if found is None:
            if not file.optional:
                missing.append(file.path)
            continue
        _fetch(file, str(found), folder / file.path, lambda *_: None, 0)
    if missing:
        raise ConfigError(
            f"not in {source}: {', '.join(missing)}. Files are looked for by these paths, by the "
            "hub's, and by name"
        )
    return verify(recipe, folder)


def _places(file: File, root: Path) -> Iterator[Path]:
    yield root / file.path
    # older guides call the folder of the VAE by its whole name
    yield root / file.path.replace("sd-vae/", "sd-vae-ft-mse/")
    if file.hub is not None:
        yield root / file.hub.file
        yield root / file.hub.repo / file.hub.file
        cache = root / ("models--" + file.hub.repo.replace("/", "--")) / "snapshots"
        yield from sorted(cache.glob(f"*/{file.hub.file}"))
    name = Path(file.path).name
    if name not in ("config.json", "pytorch_model.bin"):  # these names say nothing
        yield root / name


# --- reading checkpoints --------------------------------------------------------------------------


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: safetensors, torch's zip, its older pickle, or its
    oldest tar. Nothing in the file is run. ConfigError for a file that is none of them."""
    import torch

    with path.open("rb") as file:
        head = file.read(512)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        if zipfile.is_zipfile(path):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        elif len(head) == 512 and head[257:262] == b"ustar" or tarfile.is_tarfile(path):
            data = _load_tar(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        text = str(error).split("\n")[0]
        raise ConfigError(
            f"{path.name} can't be read as a checkpoint ({text}): pull or import it again"
        ) from None
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(wrapper), Mapping):
            data = data[wrapper]
    if not isinstance(data, Mapping) or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise ConfigError(f"{path.name} holds something else than weights: pull or import it again")
    return dict(data)


class _Names(pickle.Unpickler):
    """Knows an ordered dictionary and the names of storages, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.cuda") and name.endswith(("Storage", "Tensor")):
            return f"{name}"
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


_STORED = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
}


def _load_tar(path: Path) -> Any:
    """torch 0.1's format: a tar of `storages`, `tensors` and `pickle`."""
    import torch

    storages: dict[Any, Tensor] = {}
    tensors: dict[int, Tensor] = {}

    class Persistent(_Names):
        def persistent_load(self, saved: Any) -> Any:
            return saved[0] if isinstance(saved, tuple) else tensors[int(saved)]

    with tarfile.open(path, "r:") as tar:

        def member(name: str) -> io.BytesIO:
            file = tar.extractfile(name)
            if file is None:
                raise ValueError(f"{name} is missing")
            return io.BytesIO(file.read())

        file = member("storages")
        for _ in range(_Names(file).load()):
            key, _place, kind = _Names(file).load()
            dtype = getattr(torch, _STORED[kind.removesuffix("Storage")])
            (n,) = struct.unpack("<q", file.read(8))
            data = bytearray(file.read(n * dtype.itemsize))
            storages[key] = torch.frombuffer(data, dtype=dtype, count=n)
        for target, root, offset, n in _Names(file).load():
            storages[target] = storages[root][offset : offset + n]
        file = member("tensors")
        for _ in range(_Names(file).load()):
            key, storage, _kind = _Names(file).load()
            (ndim,) = struct.unpack("<i", file.read(4))
            file.read(4)
            size = struct.unpack(f"<{ndim}q", file.read(8 * ndim))
            stride = struct.unpack(f"<{ndim}q", file.read(8 * ndim))
            (offset,) = struct.unpack("<q", file.read(8))
            tensors[key] = storages[storage].as_strided(size, stride, offset)
        return Persistent(member("pickle")).load()


def checkpoint_key(path: Path) -> str:
    """A name for a file's content that is quick to take: size, and a hash of its ends."""
    size = path.stat().st_size
    done = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        done.update(file.read(1 << 20))
        if size > 1 << 20:
            file.seek(-min(1 << 20, size), os.SEEK_END)
            done.update(file.read())
    return done.hexdigest()[:16]


def weights_key(recipe: Recipe, folder: Path, *names: str) -> str | None:
    """A name for the content of these networks' weights; None if one of them isn't there."""
    paths = [folder / recipe.networks[name].weights for name in names]
    if not all(path.is_file() for path in paths):
        return None
    return digest([(name, checkpoint_key(path)) for name, path in zip(names, paths, strict=True)])


def read_config(path: Path) -> dict[str, Any]:
    """A network's JSON; ConfigError if it can't be read."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.name} can't be read ({error}): pull it again") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path.name} is not a network's configuration: pull it again")
    return data
