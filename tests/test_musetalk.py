"""The MuseTalk engine on its reduced model: the contract, and what published code gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from voipavatar.config import Settings
from voipavatar.engines import EngineSession, Job
from voipavatar.engines.musetalk import Ear, Hearing, MuseTalk, Spans, read_options, self_test
from voipavatar.errors import ConfigError, EngineError
from voipavatar.media import ENGINE_RATE, Float32, UInt8, frames_for

from .contract import EngineContract, Kit, babble, cuts, turn
from .faces import save_face
from .musetalk_parts import needs, small_recipe


def make_kit(folder: Path, **options: Any) -> Kit:
    needs("torch")
    source = folder / "face.png"
    marks = save_face(source, width=480, height=360)
    options = {
        "recipe": "musetalk-tiny",
        "width": 480,
        "height": 360,
        "fps": 25,
        "landmarks": marks,
    } | options
    text = folder / "text.png"
    text.write_text("this is no picture")
    empty = folder / "empty.png"
    empty.write_bytes(b"")
    half = folder / "half.png"
    half.write_bytes(source.read_bytes()[:400])
    small = save_face(folder / "small.png", width=480, height=360, unit=10)
    wide = save_face(folder / "wide.png", width=1280, centre=(1100, 300))
    return Kit(
        make=lambda: MuseTalk(Settings(cache_dir=folder / "cache"), device="cpu"),
        source=source,
        options=options,
        folder=folder,
        bad_sources={
            "missing": (folder / "nowhere.png", options),
            "folder": (folder, options),
            "text": (text, options),
            "empty": (empty, options),
            "half": (half, options),
            "tiny": (folder / "small.png", options | {"landmarks": small}),
            "elsewhere": (source, options | {"landmarks": wide}),
        },
        bad_options={
            "recipe": {"recipe": "musetalk-v99"},
            "runtime": {"runtime": "abacus"},
            "shift": {"shift": 3},
            "landmarks.jaw": {"landmarks": {k: v for k, v in marks.items() if k != "jaw"}},
            "landmarks": {"landmarks": [1, 2, 3]},
            "models": {"recipe": "musetalk-v15"},
        },
        open_seconds=2.0,
    )


class TestStreaming(EngineContract):
    """As it is used: sound comes in pieces, pictures go out with the least delay."""

    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        kit = make_kit(tmp_path_factory.mktemp("musetalk"))
        yield kit
        kit.engine.close()


class TestOffline(EngineContract):
    """As MuseTalk's scripts hear: in stretches that know nothing of each other (here of 1 s)."""

    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        folder = tmp_path_factory.mktemp("offline")
        recipe = small_recipe(folder, max_source_positions=50)
        kit = make_kit(folder, recipe=str(recipe), audio="offline")
        yield kit
        kit.engine.close()


# --- what published code gets wrong, each once ----------------------------------------------------


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    kit = make_kit(tmp_path_factory.mktemp("defects"), width=320, height=240)
    yield kit
    kit.engine.close()


def strengths(jobs: list[Job]) -> list[float]:
    return [job.data.strength for job in jobs]


def test_the_last_frame_and_the_last_part_of_a_batch_are_drawn(kit: Kit) -> None:
    """Upstream never consumes its last frame; 11 is no multiple of any batch."""
    session, idle = kit.open(), kit.open()
    jobs = turn(session, iter([babble(11 / 25)]))
    rest = kit.draw(idle.idle(len(jobs)))
    drawn = kit.draw(jobs)
    assert len(jobs) == 11
    assert all(not np.array_equal(a, b) for a, b in zip(drawn[3:], rest[3:], strict=True))


def test_pictures_without_a_face_are_shown_as_they_are(
    kit: Kit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from .test_faces import moving

    source, marks = moving(tmp_path / "a.mp4", 6, hidden=(2, 3))
    engine = kit.engine
    assert isinstance(engine, MuseTalk)
    options = kit.options | {"landmarks": marks, "fit": "native", "smoothing": 0.0}
    avatar = engine.prepare(source, tmp_path / "t", options, lambda what, share: None)
    session, idle = engine.open(avatar), engine.open(avatar)
    # landmarks that were written down are taken at their word; here some pictures lose them
    index = np.load(tmp_path / "t" / "index.npy")
    index[2:4, 8] = -1
    np.save(tmp_path / "t" / "index.npy", index)
    session, idle = engine.open(avatar), engine.open(avatar)
    jobs = turn(session, iter([babble(0.6)]))
    drawn, rest = kit.draw(jobs), kit.draw(idle.idle(len(jobs)))
    for job, a, b in zip(jobs, drawn, rest, strict=True):
        assert np.array_equal(a, b) == (job.data.picture in (2, 3)), job.clock
    assert "not a number" not in caplog.text  # they are not drawn at all, nor taken for a fault


@pytest.mark.parametrize("centre", [(60, 100), (290, 120), (160, 175)])
def test_a_face_at_the_edge(kit: Kit, tmp_path: Path, centre: tuple[int, int]) -> None:
    """The crop box leaves the picture; plain slicing would squash or crash."""
    marks = save_face(tmp_path / "edge.png", width=320, height=240, centre=centre)
    options = kit.options | {"landmarks": marks}
    avatar = kit.engine.prepare(tmp_path / "edge.png", tmp_path / "t", options, lambda *_: None)
    session, idle = kit.engine.open(avatar), kit.engine.open(avatar)
    jobs = turn(session, iter([babble(0.3)]))
    drawn, rest = kit.draw(jobs)[-1], kit.draw(idle.idle(len(jobs)))[-1]
    changed = np.argwhere(drawn[:240] != rest[:240])
    assert len(changed) > 200
    jaw = np.asarray(marks["jaw"])
    assert changed[:, 1].min() >= jaw[:, 0].min() - 8 and changed[:, 1].max() <= jaw[:, 0].max() + 8
    assert changed[:, 0].max() <= jaw[:, 1].max() + 24


def test_a_pause_closes_the_mouth_and_words_open_it_in_time(kit: Kit) -> None:
    session = kit.open()
    pcm = babble(4.0)
    pcm[ENGINE_RATE : 3 * ENGINE_RATE] = 0
    strong = strengths(turn(session, iter([pcm])))
    assert strong[20] == 1.0
    assert strong[45:70] == [0.0] * 25
    loud = next(i for i in range(75, 100) if np.abs(pcm[640 * i : 640 * (i + 1)]).max() > 0.01)
    assert strong[loud] > 0.2  # it opens before the sound, not after
    steps = np.abs(np.diff([0.0, *strong]))
    assert steps.max() <= 0.25 + 1e-9  # and never jumps


def test_background_noise_is_a_pause(kit: Kit) -> None:
    rng = np.random.default_rng(0)
    noise = (0.0005 * rng.standard_normal(2 * ENGINE_RATE)).astype(np.float32)
    assert max(strengths(turn(kit.open(), iter([noise])))) == 0.0


def listen(hearing: Hearing, pieces: Iterator[Float32]) -> list[Spans]:
    ear = Ear(hearing)
    out = [spans for piece in pieces for spans, _ in ear.push(piece)]
    return out + [spans for spans, _ in ear.flush()]


def same_windows(one: list[Spans], other: list[Spans]) -> bool:
    return len(one) == len(other) and all(
        len(a) == len(b)
        and all(
            x.hop.segment.start == y.hop.segment.start
            and x.hop.end == y.hop.end
            and np.array_equal(x.hop.rows, y.hop.rows)
            and (x.first, x.count, x.place) == (y.first, y.count, y.place)
            for x, y in zip(a, b, strict=True)
        )
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("offline", [False, True])
def test_31_seconds_cross_the_seam(offline: bool) -> None:
    """Every window is whole on both sides of it, the same however the sound was cut."""
    pcm = babble(31.0)
    hearing = Hearing(offline=offline, step=25 if offline else 2)
    found = listen(hearing, iter([pcm]))
    assert len(found) == frames_for(len(pcm), ENGINE_RATE, 25) == 775
    assert same_windows(found, listen(hearing, cuts(pcm, None)))
    for i, spans in enumerate(found[2:-2], 2):
        assert sum(span.count for span in spans) == 10
        rows = [
            int(row) + span.hop.segment.start // 320
            for span in spans
            for row in span.hop.rows[span.first : span.first + span.count]
        ]
        assert rows == list(range(2 * i - 4, 2 * i + 6)), i
        for span in spans:
            segment = span.hop.segment
            assert span.hop.end <= len(segment.pcm) and span.hop.rows.max() < 1500
            at = 640 * i - segment.start
            if not offline and segment.start > 0:
                assert at >= 1.9 * ENGINE_RATE  # real sound to the left of the seam
            if at >= 0 and at + 640 <= segment.length:
                assert np.array_equal(segment.pcm[at : at + 640], pcm[640 * i : 640 * (i + 1)])


def test_the_seam_is_put_into_a_pause() -> None:
    pcm = babble(31.0)
    pcm[int(23.0 * ENGINE_RATE) : int(24.2 * ENGINE_RATE)] = 0
    starts = [spans[0].hop.segment.start for spans in listen(Hearing(), iter([pcm]))]
    seam = next(i for i, start in enumerate(starts) if start > 0)
    assert 23.0 < seam / 25 < 24.3


def test_ten_minutes_are_bounded() -> None:
    """No segment is longer than whisper hears, none is kept that nobody needs."""
    import gc
    import weakref

    ear = Ear(Hearing())
    piece = babble(10.0)
    seen: list[weakref.ref[Any]] = []
    frames = 0
    for _ in range(60):
        out = ear.push(piece)
        frames += len(out)
        for spans, _speaking in out:
            segment = spans[0].hop.segment
            if not seen or seen[-1]() is not segment:
                seen.append(weakref.ref(segment))
        spans[0].hop.mel()  # drawing hears the last; that closes what came before
        del out, spans, segment
    frames += len(ear.flush())
    assert frames == 600 * 25
    gc.collect()
    assert len(seen) > 20 and sum(one() is not None for one in seen) <= 2


def test_quiet_beginnings_are_not_made_loud() -> None:
    """Offline a murmur is its own maximum, and what lies far below it is heard as well."""
    rng = np.random.default_rng(1)
    murmur = (1e-3 * rng.standard_normal(ENGINE_RATE)).astype(np.float32)
    own = listen(Hearing(offline=True, step=25), iter([murmur]))[10][0].hop.mel()
    ours = listen(Hearing(), iter([murmur]))[10][0].hop.mel()
    assert float(ours.max()) == pytest.approx(float(own.max()), abs=0.01)
    assert float(ours.min()) == -1.0 and float(own.min()) < -1.4


def test_log_mel_rises_with_the_turn_only() -> None:
    """The maximum is that of the turn so far: later loudness does not reach back."""
    pcm = np.concatenate([0.02 * babble(2.0), 5 * babble(2.0)]).astype(np.float32)
    early = listen(Hearing(), iter([pcm]))[20][0].hop.mel()
    alone = listen(Hearing(), iter([pcm[: 2 * ENGINE_RATE]]))[20][0].hop.mel()
    assert np.array_equal(early, alone)


def test_a_reset_in_the_middle_of_a_batch(kit: Kit) -> None:
    """Jobs that were made can still be drawn; the next turn hears nothing of the old one."""
    one, two = kit.open(), kit.open()
    jobs = one.push(babble(1.0, 1))[:5] + two.push(babble(1.0, 2))[:5]
    undisturbed = kit.open().push(babble(1.0, 1))[:5]
    one.reset(clock=3)
    after = one.idle(4) + turn(one, iter([babble(0.3, 3)]))
    images = kit.engine.render(jobs + after)
    assert len(images) == len(jobs) + len(after)
    kit.same(images[:5], kit.draw(undisturbed))
    fresh = kit.open()
    assert same_windows(
        [job.data.spans for job in after[4:]],
        [job.data.spans for job in turn(fresh, iter([babble(0.3, 3)]))],
    )


@pytest.mark.parametrize("where", ["imagine", "draw"])
def test_an_answer_that_is_no_number_is_not_shown(kit: Kit, caplog: Any, where: str) -> None:
    """A latent that is none, and a decoder whose sums ran over: black, or patches, otherwise."""
    engine = kit.engine
    assert isinstance(engine, MuseTalk)
    networks = engine.networks(*read_options(kit.options))
    real = getattr(networks, where)

    class Sick:
        def __call__(self, feeds: Any) -> dict[str, Any]:
            good = real(feeds)
            if where == "imagine":
                return {"latent": good["latent"] * np.float32(np.nan)}
            assert good["sound"].tolist() == [1] * len(good["face"])
            return {"face": np.zeros_like(good["face"]), "sound": np.zeros_like(good["sound"])}

        def close(self) -> None:
            return None

    session, idle = kit.open(), kit.open()
    jobs = turn(session, iter([babble(0.4)]))
    setattr(networks, where, Sick())
    try:
        kit.same(kit.draw(jobs), kit.draw(idle.idle(len(jobs))))
    finally:
        setattr(networks, where, real)
        networks.failed = False
    assert "not a number" in caplog.text


def test_a_wrong_vae_is_noticed_before_it_is_seen(kit: Kit) -> None:
    """Random weights don't give a picture back: as the black lower face of a wrong file."""
    engine = kit.engine
    assert isinstance(engine, MuseTalk)
    with pytest.raises(EngineError, match="sd-vae-ft-mse"):
        self_test(engine.networks(*read_options(kit.options)))


def test_a_stream_hears_nearly_what_a_file_does(kit: Kit) -> None:
    """Only the future lacks: a little, and less the further ahead it hears."""
    from voipavatar.musetalk_build import streaming_error

    engine = kit.engine
    assert isinstance(engine, MuseTalk)
    options, recipe = read_options(kit.options)
    networks = engine.networks(options, recipe)
    errors = [
        streaming_error(networks, options.model_copy(update={"right_ms": right}))
        for right in (0, 200, 600)
    ]
    assert errors[0]["mean"] < 0.05 and errors[0]["max"] < 0.5
    means = [one["mean"] for one in errors]
    assert means == sorted(means, reverse=True)


def test_options_are_checked_with_names() -> None:
    for wrong, word in (
        ({"recipe": "musetalk-v15", "shift": 4}, "shift"),
        ({"mask": "beard"}, "mask"),
        ({"moth": 1}, "moth"),
        ({"fps": 29}, "fps"),
        ({"recipe": "nope"}, "musetalk-v15"),
    ):
        with pytest.raises(ConfigError, match=word):
            read_options(wrong)
    v10, _ = read_options({"recipe": "musetalk-v10", "shift": -7})
    v15, _ = read_options({})
    assert (v10.margin, v10.mask, v10.cheeks, v10.shift) == (0, "raw", (80, 80), -7)
    assert (v15.margin, v15.mask, v15.cheeks, v15.shift) == (10, "jaw", (90, 90), 0)
    same, _ = read_options({"parity": True})
    assert same.audio == "offline" and same.smoothing == 0 and not same.gate and same.repeat_ends


def test_parity_shows_the_loop_as_published(kit: Kit, tmp_path: Path) -> None:
    """Forward, then backward with both ends twice; every frame drawn at full strength."""
    from .test_faces import moving

    source, marks = moving(tmp_path / "a.mp4", 3)
    options = kit.options | {"landmarks": marks, "parity": True}
    avatar = kit.engine.prepare(source, tmp_path / "t", options, lambda *_: None)
    session = kit.engine.open(avatar)
    jobs = turn(session, iter([np.zeros(8 * 640, np.float32)]))
    assert [job.data.picture for job in jobs] == [0, 1, 2, 2, 1, 0, 0, 1]
    assert strengths(jobs) == [1.0] * 8


@pytest.mark.parametrize("centre", [None, (290, 120)])
def test_a_whole_frame_is_the_published_steps(
    kit: Kit, tmp_path: Path, centre: tuple[int, int] | None
) -> None:
    """From the prepared folder to pixels, step by step with the networks alone; also for a face
    whose box leaves the picture."""
    from voipavatar.avatar import to_i420
    from voipavatar.blend_bench import pillow_way
    from voipavatar.engines.musetalk import MuseTalkSession
    from voipavatar.faces import Clip

    needs("PIL")
    engine = kit.engine
    assert isinstance(engine, MuseTalk)
    source, options = kit.source, kit.options
    if centre is not None:
        source = tmp_path / "edge.png"
        marks = save_face(source, width=320, height=240, centre=centre)
        options = options | {"landmarks": marks}
    avatar = engine.prepare(source, tmp_path / "t", options, lambda *_: None)
    session: EngineSession = engine.open(avatar)
    assert isinstance(session, MuseTalkSession)
    jobs = turn(session, iter([babble(0.5)]))
    job = jobs[9]
    assert job.data.strength == 1.0
    networks = engine.networks(*read_options(kit.options))
    (span,) = job.data.spans
    mel, rows = span.hop.mel()[None], span.hop.rows[None]
    heard = networks.hear({"mel": mel, "rows": rows})["heard"][0]
    tokens = heard[span.first : span.first + 10].reshape(1, 50, -1)  # time-major, layer-minor
    loop = job.data.loop
    latent = networks.imagine({"latents": loop.latents(0)[None], "heard": tokens})["latent"]
    new = networks.draw({"latent": latent})["face"][0]
    (shown,) = Clip(source, (320, 240))
    patch = loop.patch(0)
    assert patch is not None
    x1, y1, x2, y2 = patch.face
    assert (x2 > 320) == (centre is not None)
    mask = np.zeros((240, 320), np.uint8)
    h, w = patch.mask.shape
    mask[patch.y : patch.y + h, patch.x : patch.x + w] = patch.mask
    want: UInt8 = pillow_way(shown, new, (x1, y1, x2, y2), mask, (0, 0, 320, 240))
    assert np.array_equal(kit.draw([job])[0], to_i420(np.ascontiguousarray(want)))


def test_the_bench_says_what_it_measured(kit: Kit) -> None:
    from voipavatar.musetalk_build import bench, table

    engine = kit.engine
    assert isinstance(engine, MuseTalk)
    report = bench(engine, kit.avatar, sessions=(1, 2), seconds=0.1, command="voipavatar bench x")
    assert report["stage_ms"]["1"].keys() == {"hear", "imagine", "draw"}
    assert report["sessions"].keys() == {"1", "2"}
    for one in report["sessions"].values():
        assert 0 < one["picture_ms_p50"] <= one["picture_ms_p95"] <= one["picture_ms_p99"]
        # what must be heard first (92.5 ms and one more frame of the step) is part of the way
        assert one["sound_to_picture_ms_p95"] > 132
    apart = report["against_fp32"]  # the same precision: only a batch's rounding is left
    assert apart["mean"] < 1e-3 and apart["max"] <= 1 and apart["sound"]
    assert report["memory_mb"] > 50
    in_time = [int(n) for n, one in report["sessions"].items() if one["fps_a_session"] >= 25]
    assert report["keeps_up_with"] == max(in_time, default=0)
    assert 0 < report["share_of_matmul"] < 1 and report["gflop_a_frame"] > 0.1
    assert "does not keep up" in table(report | {"keeps_up_with": 0})
    assert "keeps up with 4 at once" in table(report | {"keeps_up_with": 4})
    text = table(report)
    assert "voipavatar bench x" in text and "torch" in text and "| 1 |" in text
    assert "nan" not in text.lower() and "against fp32 torch" in text


def test_bench_engine_takes_its_own_options_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench engine --engine musetalk --persona X --seconds Y` measures X for Y seconds."""
    import click

    from voipavatar import cli, musetalk_cli

    seen: dict[str, Any] = {}
    real = musetalk_cli.bench_musetalk
    told = click.Command("musetalk", params=real.params, callback=lambda **said: seen.update(said))
    monkeypatch.setattr(musetalk_cli, "bench_musetalk", told)
    words = ["bench", "engine", "--engine", "musetalk", "--persona", "me.yaml", "--seconds", "3"]
    cli.cli.main([*words, "--runtime", "onnxruntime", "--json"], standalone_mode=False)
    wanted = {"persona": "me.yaml", "seconds": 3.0, "runtime": "onnxruntime", "as_json": True}
    assert wanted.items() <= seen.items()
    cli.cli.main(words[:4], standalone_mode=False)
    assert seen["persona"] is None and seen["seconds"] == 2.0


def test_random_weights_measure_and_are_never_taken_for_real(tmp_path: Path) -> None:
    """`models random`: the engine runs on them, `models verify` and `pull` know them."""
    from voipavatar.engines.musetalk_nets import generate
    from voipavatar.models import load_recipe, verify

    text = small_recipe(tmp_path).read_text().replace("generated: 20240414\n", "")
    (tmp_path / "real.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "real.yaml")
    assert recipe.generated is None
    generate(recipe, tmp_path / "m", seed=1)
    told = {one.file.path: one for one in verify(recipe, tmp_path / "m")}
    for name in ("unet", "vae", "whisper"):
        one = told[recipe.networks[name].weights]
        assert one.state == "damaged" and "random weights" in one.message
    engine = MuseTalk(Settings(cache_dir=tmp_path), device="cpu")
    options = {"recipe": str(tmp_path / "real.yaml"), "models": str(tmp_path / "m")}
    assert engine.networks(*read_options(options)).random
    engine.close()
    # the same content without the mark is a VAE that gives no picture back
    (tmp_path / "m/random.json").unlink()
    engine = MuseTalk(Settings(cache_dir=tmp_path), device="cpu")
    with pytest.raises(EngineError, match="sd-vae-ft-mse"):
        engine.networks(*read_options(options))
    engine.close()


def test_a_persona_of_this_engine_is_prepared_rendered_and_on_air(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """YAML to pictures, as `prepare`, `render` and everything that opens a session (`demo`,
    `serve`, `worker`, `stream`) does it; a CPU is enough for the reduced model."""
    import asyncio
    import wave

    import av
    import yaml

    from voipavatar.cli import cli
    from voipavatar.config import load_persona
    from voipavatar.session import Studio
    from voipavatar.sinks import FileSink

    monkeypatch.setenv("VOIPAVATAR_CACHE", str(tmp_path / "cache"))
    persona = {
        "engine": "musetalk",
        "portrait": str(kit.source),
        "landmarks": kit.options["landmarks"],
        "width": 320,
        "height": 240,
        "voice": ["espeak"],
        "engine_options": {"recipe": "musetalk-tiny"},
    }
    (tmp_path / "me.yaml").write_text(yaml.safe_dump(persona))
    speech = (babble(1.0) * 20_000).astype(np.int16)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, ENGINE_RATE, 0, "NONE", ""))
        file.writeframes(speech.tobytes())
    me = ["--persona", str(tmp_path / "me.yaml")]
    render = ["render", *me, "--audio", str(tmp_path / "a.wav"), "--out", str(tmp_path / "a.mp4")]
    for words in (["prepare", *me], render):
        assert not cli.main(words, standalone_mode=False), words

    def moved(path: Path, at: int) -> float:
        """How far picture `at` lies from the first, which is idle."""
        with av.open(str(path)) as clip:
            shown = [frame.to_ndarray(format="gray") for frame in clip.decode(video=0)]
        assert shown[0].shape == (240, 320)
        return float(np.abs(shown[at].astype(int) - shown[0].astype(int)).max())

    assert moved(tmp_path / "a.mp4", 20) > 10 >= moved(tmp_path / "a.mp4", 1)

    async def on_air() -> None:
        settings = Settings(cache_dir=tmp_path / "cache")
        async with Studio(settings) as studio:
            session = await studio.open(
                load_persona(str(tmp_path / "me.yaml"), settings),
                sinks=[
                    lambda spec: FileSink(tmp_path / "b.mp4", spec.width, spec.height, spec.fps)
                ],
            )
            said = session.open_turn()
            said.push(speech, ENGINE_RATE)
            said.end()
            played = await asyncio.wait_for(said.finished, 120)
            assert played.heard == pytest.approx(1.0, abs=0.05) and not played.interrupted

    asyncio.run(on_air())


def test_commands_import_lightly() -> None:
    import subprocess
    import sys

    probe = "import sys, voipavatar.musetalk_cli; print({'torch', 'cv2'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, check=True, timeout=60
    )
    assert done.stdout.strip() == b"set()"


def test_without_landmarks_somebody_must_find_the_face(kit: Kit, tmp_path: Path) -> None:
    bare = {key: value for key, value in kit.options.items() if key != "landmarks"}
    asked: list[tuple[float, float] | None] = []

    def find(picture: UInt8, at: tuple[float, float] | None) -> tuple[dict[str, Any], int]:
        asked.append(at)
        scale = picture.shape[1] / 480
        return scaled(kit.options["landmarks"], scale), 2

    engine = MuseTalk(Settings(cache_dir=kit.folder / "cache"), device="cpu", finder=find)
    avatar = engine.prepare(kit.source, tmp_path / "b", bare | {"face_at": (9, 9)}, lambda *_: None)
    assert asked == [(9.0, 9.0)]
    given = kit.engine.prepare(kit.source, tmp_path / "c", kit.options, lambda *_: None)
    found, told = (np.load(one.path / "index.npy")[0, :4] for one in (avatar, given))
    assert np.abs(found - told).max() <= 1
    assert "several faces" in (avatar.path / "manifest.json").read_text()
    engine.close()


def scaled(value: Any, by: float) -> Any:
    """Every number in a tree of lists and mappings times `by`."""
    if isinstance(value, dict):
        return {key: scaled(one, by) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [scaled(one, by) for one in value]
    return value * by


def dwpose_file(path: Path, points: Float32) -> None:
    """An ONNX file with DWPose's inputs and outputs that sees these points in every picture."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    heat = {
        "simcc_x": np.zeros((1, 133, 576), np.float32),
        "simcc_y": np.zeros((1, 133, 768), np.float32),
    }
    for n, (x, y) in enumerate(points):
        heat["simcc_x"][0, 23 + n, round(float(x) * 2)] = 1
        heat["simcc_y"][0, 23 + n, round(float(y) * 2)] = 1
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "nothing"], ["zero"]),
        *(helper.make_node("Add", [f"{name}_heat", "zero"], [name]) for name in heat),
    ]
    known = [
        numpy_helper.from_array(np.float32(0), "nothing"),
        *(numpy_helper.from_array(one, f"{name}_heat") for name, one in heat.items()),
    ]
    graph = helper.make_graph(
        nodes,
        "dwpose",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 384, 288])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, list(one.shape))
            for name, one in heat.items()
        ],
        known,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))


def test_dwpose_and_bisenet_prepare_an_avatar(kit: Kit, tmp_path: Path) -> None:
    """The whole official way of preparing: ONNX landmarks, parsed mask, through their own files."""
    needs("torch", "onnx", "onnxruntime")
    import yaml

    from voipavatar.engines.musetalk_nets import generate
    from voipavatar.faces import face_box, from_yaml
    from voipavatar.models import load_recipe

    data = yaml.safe_load(small_recipe(tmp_path).read_text())
    data["networks"]["landmarks"] = {"weights": "dwpose/d.onnx"}
    data["networks"]["parser"] = {"weights": "parse/p.pth"}
    data["files"] += [{"path": "dwpose/d.onnx"}, {"path": "parse/p.pth", "optional": True}]
    data["options"] = {"mask": "raw"}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(data | {"name": "whole"}))
    generate(load_recipe(tmp_path / "whole.yaml"), tmp_path / "m", seed=1)
    wanted = from_yaml(scaled(kit.options["landmarks"], 320 / 480))
    # the picture of 320 x 240 within the padded box of 400 x 533 that the network sees
    seen = (wanted - (160, 120) + (200, 400 / 0.75 / 2)) * (288 / 400)
    dwpose_file(tmp_path / "m/dwpose/d.onnx", seen.astype(np.float32))
    bare = {key: value for key, value in kit.options.items() if key != "landmarks"}
    options = bare | {
        "recipe": str(tmp_path / "whole.yaml"),
        "models": str(tmp_path / "m"),
        "smoothing": 0.0,
    }
    engine = MuseTalk(Settings(cache_dir=tmp_path), device="cpu")
    import json as reader

    # the mirrored pass of this file says the same as the straight one: a face in the middle
    avatar = engine.prepare(kit.source, tmp_path / "t", options, lambda *_: None)
    manifest = reader.loads((avatar.path / "manifest.json").read_text())
    assert manifest["landmarks_by"] == "dwpose" and manifest["mask_by"] == "bisenet raw"
    index = np.load(avatar.path / "index.npy")[0]
    box = face_box(wanted, height=240)
    assert box is not None
    if index[8] >= 0:  # random weights may see no skin at all
        assert np.abs(index[:4] - box).max() <= 3
    session = engine.open(avatar)
    assert len(kit.draw(turn(session, iter([babble(0.1)])))) == 3
    engine.close()


@pytest.mark.parametrize("bomb", [False, True])
def test_an_avatar_of_the_published_script_talks(kit: Kit, tmp_path: Path, bomb: bool) -> None:
    import torch

    from voipavatar.errors import AvatarError
    from voipavatar.faces import UPSTREAM

    from .test_faces import Bomb, published

    folder = published(tmp_path / "theirs")
    latents = [torch.randn(1, 8, 32, 32, dtype=torch.float16) for _ in range(6)]
    torch.save([Bomb()] if bomb else latents, folder / "latents.pt")
    if bomb:
        with pytest.raises(AvatarError, match=r"latents\.pt is refused"):
            kit.engine.prepare(folder / UPSTREAM, tmp_path / "t", kit.options, lambda *_: None)
        return
    avatar = kit.engine.prepare(folder / UPSTREAM, tmp_path / "t", kit.options, lambda *_: None)
    assert (avatar.width, avatar.height) == (320, 240)
    again = kit.engine.prepare(folder / UPSTREAM, tmp_path / "t", kit.options, lambda *_: None)
    assert again == avatar
    session, idle = kit.engine.open(avatar), kit.engine.open(avatar)
    jobs = turn(session, iter([babble(0.3)]))
    drawn, rest = kit.draw(jobs), kit.draw(idle.idle(len(jobs)))
    assert not np.array_equal(drawn[-1], rest[-1])
