"""A clip as portrait: followed, driven, brought to rest. Clips are made here; what is in them is
known, so that tracks and mouths can be held against the truth.

The networks that follow a face are not in the repository: without them these tests are skipped (see
tests/test_facemesh.py).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from voipavatar.config import Settings, load_persona
from voipavatar.engines import Avatar, Job
from voipavatar.engines.articulation import PARAMETERS
from voipavatar.engines.film import FilmPuppet
from voipavatar.engines.filming import is_film, quick_i420
from voipavatar.engines.filmlips import brought_back, carried, similarity, steadied, strengths
from voipavatar.engines.puppet import Pose
from voipavatar.engines.rig import HEAD, to_i420
from voipavatar.engines.viseme import VisemeEngine, VisemeSession, bench, region
from voipavatar.errors import AvatarError, ConfigError
from voipavatar.facemesh import FaceMesh
from voipavatar.facemodels import DETECTOR, IRIS, MESH, face_models
from voipavatar.faces import Clip
from voipavatar.media import Float32, UInt8
from voipavatar.newpersona import persona_text, write_persona
from voipavatar.sheet import make_sheet

from . import films, portraits
from .contract import EngineContract, Kit, babble, quiet

SIZE = (640, 360)
OPTIONS = {"width": 640, "height": 360, "fps": 25}


@pytest.fixture(scope="module", autouse=True)
def models() -> None:
    settings = Settings.from_env()
    here = settings.cache_dir / "face"
    wanted = settings.face_models is not None or bool(os.environ.get("CI"))
    if not wanted and not all((here / name).is_file() for name in (DETECTOR, MESH, IRIS)):
        pytest.skip("the face models are not here: `voipavatar personas new` brings them")
    face_models(settings)


@pytest.fixture(scope="module")
def mesh(models: None) -> FaceMesh:
    return FaceMesh(face_models(Settings.from_env()))


@pytest.fixture(scope="module")
def engine(models: None) -> Iterator[VisemeEngine]:
    made = VisemeEngine()
    yield made
    made.close()


class Made:
    """A clip, the avatar of it and what is written down about it."""

    def __init__(self, engine: VisemeEngine, folder: Path, **how: Any) -> None:
        self.film = films.film(folder / "clip.mp4", **how)
        self.engine = engine
        self.avatar = engine.prepare(self.film.path, folder / "a", OPTIONS, quiet)
        self.manifest = json.loads((self.avatar.path / "manifest.json").read_text())
        puppet = engine.open(self.avatar).puppet
        assert isinstance(puppet, FilmPuppet)
        self.puppet = puppet
        self.base: npt.NDArray[np.float64] | None = None

    def advice(self) -> str:
        return " ".join(self.manifest["advice"])


@pytest.fixture(scope="module")
def listening(engine: VisemeEngine, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Two seconds of somebody who listens, head moving, mouth closed."""
    return Made(engine, tmp_path_factory.mktemp("listening"), seconds=2.0)


@pytest.fixture(scope="module")
def speaking(engine: VisemeEngine, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A second of silence and a second of speech, head held askew."""
    folder = tmp_path_factory.mktemp("speaking")
    return Made(engine, folder, seconds=2.0, mouth=films.both, move=films.leaning)


def mouth(**values: float) -> Float32:
    return np.array([values.get(name, 0.0) for name in PARAMETERS], np.float32)


def at(clock: int, **values: float) -> Pose:
    return Pose(mouth(**values), np.zeros(len(HEAD), np.float32), clock=clock)


def bgr(image: UInt8) -> UInt8:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_YUV2BGR_I420), np.uint8)


def opening(mesh: FaceMesh, made: Made, image: UInt8, clock: int) -> float:
    """How far the lips are apart in a picture, as the mesh sees it, in parts of the eyes' width."""
    if made.base is None:
        made.base = mesh.find(bgr(made.puppet.plain(made.puppet.reference))).points
    near = carried(made.puppet.place(clock), made.base[:, :2])
    points = np.hstack([near, made.base[:, 2:]])
    for _ in range(2):
        points, presence = mesh.follow(bgr(image), points)
        assert presence > 0.5
    points = points[:, :2]
    apart = [np.linalg.norm(points[a] - points[b]) for a, b in ((13, 14), (82, 87), (312, 317))]
    return float(np.mean(apart)) / float(np.linalg.norm(points[263] - points[33]))


# --- the contract ---------------------------------------------------------------------------------


class TestFilm(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory, models: None) -> Iterator[Kit]:
        folder = tmp_path_factory.mktemp("film")
        size = (384, 216)
        films.film(folder / "clip.mp4", 0.4, mouth=films.talking, size=size)
        blank = np.full((90, 160, 3), 120, np.uint8)
        films.write(folder / "blank.mp4", [blank] * 4, 25)
        (folder / "text.mp4").write_text("this is no film, whatever it is called")
        whole = (folder / "clip.mp4").read_bytes()
        (folder / "half.mp4").write_bytes(whole[: len(whole) // 3])
        kit = Kit(
            make=VisemeEngine,
            source=folder / "clip.mp4",
            options={"width": size[0], "height": size[1], "fps": 25},
            posed=False,
            folder=folder,
            bad_sources={
                "faceless": (folder / "blank.mp4", {}),
                "no film": (folder / "text.mp4", {}),
                "truncated": (folder / "half.mp4", {}),
                "tiny": (folder / "clip.mp4", {"width": 128, "height": 72}),
            },
            bad_options={
                "face_at": {"face_at": "left"},
                "seconds": {"seconds": 0},
                "landmarks": {"landmarks": portraits.landmarks("clara")},
            },
        )
        yield kit
        kit.engine.close()


# --- following ------------------------------------------------------------------------------------


def test_the_mouth_is_where_it_really_is(listening: Made) -> None:
    """The track against the truth: within half a pixel, and steadier than that."""
    film, puppet = listening.film, listening.puppet
    assert film.marks is not None
    lips = film.marks.inner_lips.mean(0)
    here = film.place(puppet.reference, lips[None])[0]
    told = np.array([carried(pose, here) for pose in puppet.poses])
    truth = np.array([film.place(i, lips[None])[0] for i in range(puppet.frames)])
    off = told - truth
    assert np.linalg.norm(off, axis=1).mean() < 0.5
    assert np.linalg.norm(off, axis=1).max() < 1.2
    # Jitter: what is left after a motion as smooth as the head's.
    assert np.abs(np.diff(off, 2, axis=0)).mean() < 0.10
    turns = np.angle(puppet.poses[:, 0])
    real = np.array([np.arctan2(m[1, 0], m[0, 0]) for m in film.moves])
    assert np.degrees(np.abs(turns - (real - real[puppet.reference]))).max() < 0.5


def test_a_still_clip_is_still(engine: VisemeEngine, tmp_path: Path) -> None:
    made = Made(engine, tmp_path, seconds=0.8, move=films.still, grain=4.0)
    lips = np.asarray(made.puppet.rig.frame[0], np.float64)
    places = np.array([carried(pose, lips) for pose in made.puppet.poses])
    assert np.abs(places - places.mean(0)).max() < 0.15
    assert "1 s long" in made.advice() or "0.8 s long" in made.advice()


def test_similarities_undo_each_other() -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(0, 50, (9, 2))
    angles, sizes = rng.uniform(-0.4, 0.4, 5), rng.uniform(0.7, 1.3, 5)
    truth = np.stack([sizes * np.exp(1j * angles), rng.normal(0, 30, 5) + 4j], -1)
    there = np.stack([carried(one, points) for one in truth])
    found = similarity(points, there, np.ones(9))
    assert np.allclose(found, truth)
    assert np.allclose(brought_back(found, there), points)


def test_steadying_takes_noise_and_leaves_motion() -> None:
    rng = np.random.default_rng(2)
    t = np.arange(150) / 25
    still, nod = np.zeros(150), np.where((t > 3) & (t < 3.5), 12 * np.sin(4 * np.pi * (t - 3)), 0)
    for truth, share in ((still, 0.35), (nod, 0.95)):
        noisy = truth + rng.normal(0, 0.4, 150)
        out = steadied(np.stack([noisy, noisy], -1), 25, [(0, 150)])[:, 0]
        assert np.abs(out - truth).mean() < share * np.abs(noisy - truth).mean()
    assert np.abs(out - truth).max() < 2.5  # the quickest of the nod is not flattened


# --- at rest --------------------------------------------------------------------------------------


def test_a_closed_mouth_is_left_as_it_was_filmed(listening: Made) -> None:
    """Idle shows the clip, to the last bit, forward and back."""
    session = listening.engine.open(listening.avatar)
    jobs = session.idle(2 * listening.puppet.frames)
    for job in jobs[::7]:
        drawn = listening.engine.render([job])[0]
        assert np.array_equal(drawn, listening.puppet.plain(job.clock))
    clip = list(Clip(listening.film.path, SIZE))
    shown = bgr(listening.puppet.plain(2 * (listening.puppet.frames - 1) - 5))
    assert np.abs(shown.astype(int) - clip[5]).mean() < 2.0


def test_a_speaking_clip_is_silent_at_rest(speaking: Made, mesh: FaceMesh) -> None:
    said = [i for i, one in enumerate(speaking.film.mouths) if one.get("jaw", 0.0) > 0.3]
    assert len(said) > 5
    # What the mesh calls an opening where the clip's lips are closed.
    closed = opening(mesh, speaking, speaking.puppet.plain(5), 5)
    for i in said[::3]:
        own = opening(mesh, speaking, speaking.puppet.plain(i), i)
        rest = opening(mesh, speaking, speaking.puppet.draw(at(i)), i)
        assert own > closed + 0.04
        assert rest - closed < 0.35 * (own - closed), (i, own, rest, closed)
    for i in (2, 9, 16, 21):
        assert np.array_equal(speaking.puppet.draw(at(i)), speaking.puppet.plain(i))
    assert "is open in" in speaking.advice()


def test_a_mouth_that_is_always_open_is_the_clips_way_to_rest(
    engine: VisemeEngine, tmp_path: Path
) -> None:
    made = Made(engine, tmp_path, seconds=0.6, mouth=films.gaping)
    assert "open all the time" in made.advice()
    assert np.array_equal(made.puppet.draw(at(3)), made.puppet.plain(3))
    rest, pressed = made.puppet.gap(at(3)), made.puppet.gap(at(3, press=1.0))
    assert rest > 0.05 * 87 and pressed < 0.5
    # From rest into speech there is no step.
    before = made.puppet.plain(3).astype(int)
    steps = [
        np.abs(made.puppet.draw(at(3, jaw=0.3 * k / 8)).astype(int) - before).mean()
        for k in range(9)
    ]
    assert max(np.diff(steps)) < 0.4 * max(steps) + 0.02


# --- speaking -------------------------------------------------------------------------------------


def test_the_lips_speak_on_a_head_that_moves(speaking: Made, mesh: FaceMesh) -> None:
    """The opening that the mesh sees goes with what is asked for, in whatever picture."""
    jaws, seen = [], []
    for clock in (2, 17, 31, 44):
        for jaw in (0.0, 0.35, 0.7, 1.0):
            image = speaking.puppet.draw(at(clock, jaw=jaw))
            jaws.append(jaw)
            seen.append(opening(mesh, speaking, image, clock))
    assert np.corrcoef(jaws, seen)[0, 1] > 0.93
    assert seen[3] > 0.12 and seen[3] > seen[0] + 0.10


def test_pressed_lips_are_shut_in_every_picture(speaking: Made) -> None:
    for clock in range(speaking.puppet.frames):
        assert speaking.puppet.gap(at(clock, press=1.0, jaw=0.6)) < 0.4


def test_speech_changes_only_what_is_around_the_mouth(speaking: Made) -> None:
    x, y, width, height = region(speaking.avatar)
    assert width * height < 0.25 * SIZE[0] * SIZE[1]
    for clock in (0, 20, 40):
        changed = (
            speaking.puppet.draw(at(clock, jaw=1, round=0.5))[: SIZE[1]]
            != (speaking.puppet.plain(clock)[: SIZE[1]])
        )
        assert changed.any()
        changed[y : y + height, x : x + width] = False
        assert not changed.any()


def test_no_step_at_the_edge_of_what_moves(listening: Made) -> None:
    """Along the border of the mouth's box the picture is the clip's."""
    clock = 10
    box = listening.puppet._boxes[clock]
    x, y, width, height = box
    luma = listening.puppet.draw(at(clock, jaw=1, width=0.5))[: SIZE[1]].astype(int)
    plain = listening.puppet.plain(clock)[: SIZE[1]].astype(int)
    change = np.abs(luma - plain)[y : y + height, x : x + width]
    rim = np.concatenate([change[:2].ravel(), change[-2:].ravel(), change[:, :2].ravel()])
    assert rim.max() <= 8 and change.max() > 50


def test_idle_and_speech_meet_without_a_jump(listening: Made) -> None:
    """At both seams, and where speech is cut off, no picture differs from the one before by more
    than speaking itself does."""
    engine = listening.engine
    session = engine.open(listening.avatar)
    jobs: list[Job] = session.idle(6) + session.push(babble(1.2)) + session.flush()
    first, last = 6, len(jobs)
    jobs += session.idle(14)
    spoken = session.push(babble(1.0))
    session.reset(clock=spoken[9].clock + 1)
    cut = len(jobs) + 10
    jobs += spoken[:10] + session.idle(6)
    assert [job.clock for job in jobs] == list(range(len(jobs)))
    x, y, width, height = region(listening.avatar)
    parts = [
        engine.render([job])[0][y : y + height, x : x + width].astype(np.int16)
        - listening.puppet.plain(job.clock)[y : y + height, x : x + width]
        for job in jobs
    ]
    steps = np.array([np.abs(b - a).mean() for a, b in zip(parts[:-1], parts[1:], strict=True)])
    usual = np.percentile(steps[first + 3 : last - 1], 95)
    for seam in (first - 1, first, last - 1, last, cut - 1, cut):
        assert steps[seam] < 1.5 * usual, seam
    assert (steps[-2:] == 0).all()


# --- the clip's own inner mouth -------------------------------------------------------------------


def test_the_clips_own_teeth_are_used(speaking: Made, listening: Made) -> None:
    assert speaking.manifest["inner_mouths"] >= 2
    assert listening.manifest["inner_mouths"] == 0
    assert "never shows the inside" in listening.advice()
    assert "never shows the inside" not in speaking.advice()
    # With them the opening is drawn in the clip's colours: without them it looks otherwise.
    puppet = speaking.puppet
    shown = puppet.draw(at(5, jaw=0.6)).astype(int)
    bank = puppet.bank
    try:
        puppet.bank = type(bank)(bank.layers[:0], bank.facts[:0])
        painted = puppet.draw(at(5, jaw=0.6)).astype(int)
    finally:
        puppet.bank = bank
    assert np.abs(shown - painted).max() > 20


def test_inner_mouths_change_into_each_other_gently(speaking: Made) -> None:
    """As the mouth opens step by step, what is between the lips never jumps."""
    pictures = [
        speaking.puppet.draw(at(5, jaw=float(j)))[: SIZE[1]].astype(int)
        for j in np.linspace(0.15, 1.0, 35)
    ]
    steps = [np.abs(b - a).mean() for a, b in zip(pictures[:-1], pictures[1:], strict=True)]
    assert max(steps) < 3.0 * float(np.median(steps))


# --- clips as people have them --------------------------------------------------------------------


def test_pictures_without_a_face_are_left_alone(engine: VisemeEngine, tmp_path: Path) -> None:
    """Somebody reaches for the camera: those pictures are shown as they are, the mouth eases."""

    def cover(i: int, picture: films.Picture) -> films.Picture:
        if 12 <= i < 18:
            picture = picture.copy()
            picture[:, 120:520] = (60, 50, 40)
        return picture

    made = Made(engine, tmp_path, seconds=1.2, spoil=cover, move=films.still)
    strength = made.puppet.strength
    assert (strength[12:18] == 0).all() and strength[0] == 1 and strength[-1] > 0.9
    assert 0 < strength[10] < 1 and 0 < strength[20] < 1
    for i in range(12, 18):
        assert np.array_equal(made.puppet.draw(at(i, jaw=1)), made.puppet.plain(i))
    assert made.puppet.gap(at(0, jaw=1)) > made.puppet.gap(at(9, jaw=1)) > 0
    assert "no face" in made.advice() and "6 of 30" in made.advice()


def test_a_cut_is_told(engine: VisemeEngine, tmp_path: Path) -> None:
    def other(i: int, picture: films.Picture) -> films.Picture:
        return picture if i < 8 else np.asarray(255 - cv2.flip(picture, 1), np.uint8)

    made = Made(engine, tmp_path, seconds=0.64, spoil=other, move=films.still)
    assert "jumps 1 time" in made.advice()


def test_of_several_faces_the_one_that_is_meant(engine: VisemeEngine, tmp_path: Path) -> None:
    crowd = cv2.resize(portraits.crowd(), (1280, 480), interpolation=cv2.INTER_AREA)
    films.write(tmp_path / "two.mp4", [np.asarray(crowd, np.uint8)] * 5, 25)
    size = {"width": 1280, "height": 480, "fps": 25}
    places = {}
    for name, options in (("largest", {}), ("right", {"face_at": [1060, 300]})):
        avatar = engine.prepare(tmp_path / "two.mp4", tmp_path / name, size | options, quiet)
        puppet = engine.open(avatar).puppet
        places[name] = float(puppet.rig.frame[0][0])
        told = json.loads((avatar.path / "manifest.json").read_text())["advice"]
        assert any("2 faces" in line for line in told)
    assert places["largest"] < 640 < places["right"]


def test_rates_and_sizes_are_made_even(engine: VisemeEngine, tmp_path: Path) -> None:
    """An uneven rate, upright format: every picture in its time, the face kept inside."""
    clip = films.film(tmp_path / "even.mp4", 0.6, fps=25, size=SIZE)
    times = [0.0, 0.05, 0.20, 0.24, 0.36, 0.40]
    films.write(tmp_path / "uneven.mp4", clip.pictures[:6], 25, times=times)
    options = {"width": 360, "height": 640, "fps": 50}
    avatar = engine.prepare(tmp_path / "uneven.mp4", tmp_path / "a", options, quiet)
    puppet = engine.open(avatar).puppet
    assert isinstance(puppet, FilmPuppet)
    assert 20 <= puppet.frames <= 22
    shown = [puppet.plain(i)[:640].astype(int) for i in range(puppet.frames)]
    changes = [i for i in range(1, puppet.frames) if np.abs(shown[i] - shown[i - 1]).mean() > 0.8]
    assert changes == [3, 10, 12, 18, 20]
    x, y = puppet.rig.frame[0]
    assert 100 < x < 260 and 200 < y < 560


def test_what_is_done_is_not_done_again(engine: VisemeEngine, tmp_path: Path) -> None:
    """An interruption costs at most a chunk: the rest of the track is read, not followed anew."""
    source = films.film(tmp_path / "clip.mp4", 2.2, size=(384, 216)).path
    options = {"width": 384, "height": 216}

    class Enough(Exception):
        pass

    followed: list[int] = []

    def stop(what: str, share: float) -> None:
        if what == "following the face":
            followed.append(1)
        if what == "writing the pictures":
            raise Enough

    with pytest.raises(Enough):
        engine.prepare(source, tmp_path / "a", options, stop)
    assert len(followed) == 55 and not (tmp_path / "a" / "manifest.json").exists()
    followed.clear()
    with pytest.raises(Enough):
        engine.prepare(source, tmp_path / "a", options, stop)
    assert not followed
    (tmp_path / "a" / "partial" / "track-00001.npy").unlink()
    (tmp_path / "a" / "partial" / "track-end").unlink()
    with pytest.raises(Enough):
        engine.prepare(source, tmp_path / "a", options, stop)
    assert len(followed) == 5


def test_a_clip_held_upright_is_upright(tmp_path: Path) -> None:
    """As telephones do it: pictures lie on their side, and the file says so."""
    upright = cv2.resize(portraits.persona("clara")[:, 280:1000], (180, 180))[:, 30:150]
    lying = np.asarray(cv2.rotate(upright, cv2.ROTATE_90_COUNTERCLOCKWISE), np.uint8)
    path = tmp_path / "phone.mp4"
    films.write(path, [lying] * 3, 25)
    data = bytearray(path.read_bytes())
    # The matrix in the track's header: a quarter turn with the clock.
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 120 << 16, 0, 1 << 30)
    path.write_bytes(data)
    clip = Clip(path, how="native")
    assert clip.source == (120, 180)
    shown = next(iter(clip)).astype(int)
    assert np.abs(shown - upright).mean() < 4


def test_pictures_stay_on_disk(listening: Made) -> None:
    """A long clip costs no memory: its pictures are neither read at once nor mapped."""
    for clock in range(20):
        listening.puppet.draw(at(clock, jaw=0.5))
    maps = Path("/proc/self/maps").read_text()
    assert str(listening.avatar.path) not in maps
    held = sum(
        value.nbytes for value in vars(listening.puppet).values() if isinstance(value, np.ndarray)
    )
    one = SIZE[0] * SIZE[1] * 3 // 2
    assert held < 30 * one < listening.puppet.frames * one


def test_which_files_are_films(listening: Made, tmp_path: Path) -> None:
    assert is_film(listening.film.path)
    picture = cv2.resize(portraits.cartoon(), (64, 36))
    for ending in (".png", ".jpg", ".webp", ".bmp"):
        path = tmp_path / f"picture{ending}"
        assert cv2.imwrite(str(path), picture)
        assert not is_film(path)
    (tmp_path / "nothing.mp4").write_bytes(b"")
    assert not is_film(tmp_path / "nothing.mp4") and not is_film(tmp_path / "absent.mp4")


def test_colours_are_the_rigs(listening: Made) -> None:
    picture = portraits.persona("clara")
    quick, exact = quick_i420(picture).astype(int), to_i420(picture).astype(int)
    assert np.abs(quick - exact).max() <= 2 and np.abs(quick - exact).mean() < 0.6


def test_strength_eases_on_both_sides() -> None:
    usable: npt.NDArray[np.bool_] = np.ones(60, np.bool_)
    assert (strengths(usable, 25) == 1).all()
    usable[30:33] = False
    found = strengths(usable, 25)
    assert (found[30:33] == 0).all() and found[0] == found[-1] == 1
    assert (np.diff(found[:31]) <= 0).all() and (np.diff(found[32:]) >= 0).all()


# --- around the engine ----------------------------------------------------------------------------


def test_a_persona_from_a_clip(listening: Made, tmp_path: Path) -> None:
    file = listening.film.path.parent / "anna.yaml"
    write_persona(file, persona_text("anna", listening.film.path, size=SIZE))
    who = load_persona(file)
    assert who.portrait is not None
    options = who.engine_settings()
    again = listening.engine.prepare(
        who.beside(who.portrait), listening.avatar.path, options, quiet
    )
    assert again.path == listening.avatar.path
    assert listening.engine.info.can[:2] == ("photo", "video")


def test_the_sheet_shows_a_clips_moments(speaking: Made) -> None:
    sheet = make_sheet(speaking.engine, speaking.avatar, speaking.film.path, (0, 0, 0))
    assert sheet.shape[1] == 1500 and sheet.shape[0] > 1800
    # Five moments more than a photo's four tiles: another row.
    assert sheet[:, :, 0].std() > 30


def test_drawing_is_quick(listening: Made) -> None:
    found = bench(listening.engine, listening.avatar, 0.5)
    # A promise for any machine that runs the tests; `voipavatar bench engine` tells the real one.
    assert found["cpu_ms_median"] < 20 and found["idle_cpu_ms_median"] < 5


def test_every_session_shares_the_clip(listening: Made) -> None:
    one, other = (listening.engine.open(listening.avatar) for _ in range(2))
    assert isinstance(one, VisemeSession) and one.puppet is other.puppet


def test_a_full_disk_is_told(
    engine: VisemeEngine, listening: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(AvatarError, match="make room"):
        engine.prepare(listening.film.path, tmp_path / "a", OPTIONS, quiet)


def test_landmarks_are_for_pictures(engine: VisemeEngine, listening: Made, tmp_path: Path) -> None:
    options = OPTIONS | {"landmarks": portraits.landmarks("clara")}
    with pytest.raises(ConfigError, match="face is followed"):
        engine.prepare(listening.film.path, tmp_path, options, quiet)


def test_a_damaged_avatar_is_not_opened(listening: Made, tmp_path: Path) -> None:
    avatar = Avatar(tmp_path, *SIZE, dict(listening.avatar.options))
    for file in listening.avatar.path.glob("[!.]*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "lips.f16").write_bytes(b"")
    with pytest.raises(AvatarError, match="prepare it again"):
        listening.engine.open(avatar)
