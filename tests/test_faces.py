"""Preparation: what is read, where the face is, its mask, and that nothing is lost or run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
import pytest

from voipavatar import faces
from voipavatar.avatar import Box, Loop, crop_box
from voipavatar.errors import AvatarError, ConfigError
from voipavatar.media import Float32, UInt8

from .faces import face, save_face
from .musetalk_parts import needs

Decode = Callable[[Path], list[UInt8]]


def film(
    path: Path,
    times: list[float],
    size: tuple[int, int] = (64, 48),
    picture: Callable[[int], UInt8] | None = None,
    rate: int = 90_000,
) -> Path:
    """A film with pictures at these times; by default the n-th is grey of level 10 n."""
    w, h = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = w, h, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        stream.options = {"crf": "8", "preset": "ultrafast"}
        for n, time in enumerate(times):
            image = picture(n) if picture else np.full((h, w, 3), 10 * n % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            frame.pts, frame.time_base = round(time * rate), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# --- reading --------------------------------------------------------------------------------------


def test_an_uneven_rate_becomes_25(tmp_path: Path) -> None:
    """Each 25th of a second shows the picture that was on at that time."""
    times = [0.0, 0.04, 0.1, 0.25, 0.26, 0.4]
    shown = list(faces.Clip(film(tmp_path / "a.mp4", times), how="native"))
    want = [max(n for n, t in enumerate(times) if t <= k / 25 + 1e-6) for k in range(len(shown))]
    assert len(shown) == 11
    assert [round(float(one.mean()) / 10) for one in shown] == want


@pytest.mark.parametrize("rate", [Fraction(30_000, 1001), Fraction(25), Fraction(60), Fraction(12)])
def test_no_rate_drifts(tmp_path: Path, rate: Fraction) -> None:
    """29.97 is not 29: after 4 s there are 100 pictures, within one."""
    times = [float(n / rate) for n in range(int(4 * rate))]
    shown = list(faces.Clip(film(tmp_path / "a.mp4", times), how="native"))
    assert abs(len(shown) - 100) <= 1 + 25 / float(rate)


def test_odd_sizes_are_made_even(tmp_path: Path) -> None:
    picture = np.arange(101 * 77 * 3, dtype=np.uint32).reshape(77, 101, 3).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "odd.png"), picture)
    (shown,) = faces.Clip(tmp_path / "odd.png", how="native")
    assert np.array_equal(shown, picture[:76, :100])
    (cover,) = faces.Clip(tmp_path / "odd.png", (64, 64), "cover")
    assert cover.shape == (64, 64, 3) and cover[:, 0].any() and cover[0].any()
    (contained,) = faces.Clip(tmp_path / "odd.png", (64, 64), "contain", (255, 0, 0))
    assert contained[0, 0].tolist() == [0, 0, 255]  # red, as BGR


def test_transparency_is_laid_over_a_colour(tmp_path: Path) -> None:
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[:, :4] = (10, 20, 30, 255)
    picture[:, 4:6] = (200, 100, 50, 128)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    (shown,) = faces.Clip(tmp_path / "a.png", how="native", background=(0, 255, 0))
    assert shown[0, 0].tolist() == [10, 20, 30]
    assert shown[0, 7].tolist() == [0, 255, 0]
    assert np.abs(shown[0, 4].astype(int) - [100, 177, 25]).max() <= 1


def test_a_turned_film_is_upright(tmp_path: Path) -> None:
    """A telephone's film: pixels on their side, and a matrix that says so."""

    def half(n: int) -> UInt8:
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, :32] = 230
        return image

    upright = film(tmp_path / "a.mp4", [0.0, 0.04], picture=half)
    with av.open(str(upright)) as source, av.open(str(tmp_path / "b.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = bytearray((tmp_path / "b.mp4").read_bytes())
    # the track header's matrix: 90 degrees clockwise
    at = data.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8
    matrix = [0, 0x10000, 0, -0x10000 & 0xFFFFFFFF, 0, 0, 48 << 16, 0, 0x40000000]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in matrix)
    (tmp_path / "c.mp4").write_bytes(bytes(data))
    shown = next(iter(faces.Clip(tmp_path / "c.mp4", how="native")))
    assert shown.shape == (64, 48, 3)
    assert shown[:28].mean() > 200 > 40 > shown[36:].mean()  # left has become top


def test_hdr_is_brought_down() -> None:
    """PQ: 203 nits are near white, 10,000 are white, black is black; greys stay grey, in order."""
    levels = np.array([0.0, 0.2, 0.4, 0.5807, 0.75, 1.0], np.float32)  # 0.5807: 203 nits
    out = faces.tone(np.repeat(levels[:, None, None], 3, 2), 16)[:, 0]
    assert out[0].tolist() == [0, 0, 0]
    assert all(int(row.max()) - int(row.min()) <= 1 for row in out)
    assert np.all(np.diff(out[:, 0].astype(int)) >= 0) and 225 < out[3, 0] < 253 <= out[5, 0]
    hlg = faces.tone(np.full((1, 1, 3), 0.75, np.float32), 18)
    assert 200 < int(hlg[0, 0, 0]) < 253


def test_what_is_no_picture_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0" * 4000)
    (tmp_path / "b.png").write_text("hello")
    for name in ("a.mp4", "b.png", "nowhere.png"):
        with pytest.raises(AvatarError, match=name.replace(".", r"\.")):
            faces.Clip(tmp_path / name)


def test_a_film_that_breaks_off_is_taken_as_far_as_it_goes(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.mkv", [n / 25 for n in range(50)])
    data = whole.read_bytes()
    (tmp_path / "b.mkv").write_bytes(data[: len(data) * 3 // 4])
    assert 10 < len(list(faces.Clip(tmp_path / "b.mkv", how="native"))) < 50


# --- landmarks ------------------------------------------------------------------------------------


def test_yaml_landmarks_become_the_68() -> None:
    _, marks = face(640, 480)
    points = faces.from_yaml(marks)
    assert points.shape == (68, 2)
    outer, inner = np.array(marks["outer_lips"]), np.array(marks["inner_lips"])
    assert np.allclose(points[48], outer[0]) and np.allclose(points[54], outer[10])
    assert np.allclose(points[51], outer[5]) and np.allclose(points[57], outer[15])
    assert np.allclose(points[60], inner[0]) and np.allclose(points[66], inner[15])
    assert np.allclose(points[27], marks["nose"]["bridge"])
    assert np.allclose(points[30], marks["nose"]["tip"])
    assert np.allclose(points[0], marks["jaw"][0]) and np.allclose(points[16], marks["jaw"][-1])
    assert points[8, 1] == pytest.approx(max(y for _, y in marks["jaw"]), abs=2)
    mirrored = points.copy()
    mirrored[:, 0] = 640 - mirrored[:, 0]
    assert np.abs(mirrored[faces.MIRROR] - points).max() < 8  # a face is nearly its mirror image
    assert faces.side(points) < 0.1 and faces.opening(points) < 0.05
    assert faces.opening(faces.from_yaml(face(640, 480, gap=0.25)[1])) > 0.2


@pytest.mark.parametrize("key", ["jaw", "nose.tip", "left_eye.upper", "outer_lips"])
def test_missing_landmarks_are_named(key: str) -> None:
    _, marks = face(320, 240)
    head, _, tail = key.partition(".")
    if tail:
        marks[head] = {k: v for k, v in marks[head].items() if k != tail}
    else:
        del marks[head]
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        faces.from_yaml(marks)


class Heat:
    """DWPose's network as a set of places: two bins a pixel, 133 points."""

    def __init__(self, points: Float32, sure: float = 0.9) -> None:
        self.points, self.sure = points, sure
        self.seen: list[npt.NDArray[Any]] = []

    def __call__(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        self.seen.append(feeds["input"])
        x = np.zeros((1, 133, 576), np.float32)
        y = np.zeros((1, 133, 768), np.float32)
        points = self.points if len(self.seen) % 2 else self.flipped()
        for n, (px, py) in enumerate(points):
            x[0, 23 + n, round(px * 2)] = self.sure
            y[0, 23 + n, round(py * 2)] = self.sure
        return {"simcc_x": x, "simcc_y": y}

    def flipped(self) -> Float32:
        """What the network would say of the mirror image: bins counted from the other side."""
        out = self.points.copy()
        out[:, 0] = 287.5 - out[:, 0]
        return np.asarray(out[faces.MIRROR], np.float32)


def test_dwpose_finds_points_where_they_are() -> None:
    """The way into 288 x 384 and back again, for wide and tall pictures."""
    rng = np.random.default_rng(1)
    for width, height in ((1280, 720), (704, 1216), (300, 300)):
        inside = np.stack([rng.uniform(90, 200, 68), rng.uniform(120, 260, 68)], 1)
        net = Heat(inside.astype(np.float32))
        found = faces.DwPose(net)(np.zeros((height, width, 3), np.uint8))
        assert found is not None and found.score == pytest.approx(0.9)
        w, h = width * 1.25, height * 1.25
        w, h = (w, w / 0.75) if w > h * 0.75 else (h * 0.75, h)
        want = np.round(inside * 2) / 2 / (288, 384) * (w, h) + (
            width / 2 - w / 2,
            height / 2 - h / 2,
        )
        assert np.abs(found.points - want).max() < 1e-2
        assert len(net.seen) == 2 and net.seen[0].shape == (1, 3, 384, 288)


def test_dwpose_sees_rgb_as_it_was_trained() -> None:
    net = Heat(np.full((68, 2), 100, np.float32))
    picture = np.zeros((384, 288, 3), np.uint8)
    picture[:] = (0, 0, 255)  # red
    faces.DwPose(net, flip=False)(picture)
    centre = net.seen[0][0, :, 192, 144]
    assert centre[0] == pytest.approx((255 - 123.675) / 58.395, abs=1e-3)
    assert centre[2] == pytest.approx(-103.53 / 57.375, abs=1e-3)


def test_dwpose_says_when_there_is_nobody() -> None:
    net = Heat(np.full((68, 2), 100, np.float32), sure=0.1)
    assert faces.DwPose(net)(np.zeros((100, 100, 3), np.uint8)) is None


def test_the_mesh_is_taken_by_its_landmarks() -> None:
    picture, marks = face(320, 240)
    found = faces.Mesh(lambda _: (marks, 1))(picture)
    assert found is not None and np.array_equal(found.points, faces.from_yaml(marks))
    box = faces.face_box(found.points)
    assert any("several faces" in one for one in faces.advice([found], [box]))
    assert faces.Mesh(lambda _: None)(picture) is None


# --- boxes and masks ------------------------------------------------------------------------------


def points(seed: int = 0) -> Float32:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((68, 2)) * 60 + (200, 150)).astype(np.float32)


def test_boxes_follow_the_published_rule() -> None:
    """Recomputed from its description: mirrored about point 29, cut to whole pixels first."""
    for seed in range(200):
        at, shift = points(seed), seed % 19 - 9
        whole = np.trunc(at).astype(int)
        whole[29, 1] += shift
        middle, bottom = whole[29, 1], whole[:, 1].max()
        want = (whole[:, 0].min(), max(0, 2 * middle - bottom), whole[:, 0].max(), bottom)
        good = want[3] > want[1] and want[2] > want[0] and want[0] >= 0
        assert faces.face_box(at, shift, 0) == (want if good else None)
        if good:
            low = faces.face_box(at, shift, 10, height=260)
            assert low is not None and low[3] == min(bottom + 10, 260)


def test_smoothing_takes_the_tremble_and_leaves_the_way() -> None:
    rng = np.random.default_rng(2)
    way = [(100 + 2 * i, 80 + i, 300 + 2 * i, 310 + i) for i in range(60)]
    shaken = [tuple(int(v + rng.integers(-3, 4)) for v in box) for box in way]
    boxes: list[Box | None] = [(a, b, c, d) for a, b, c, d in shaken]
    boxes[30] = None
    calm = faces.smooth(boxes, 2.0)
    assert calm[30] is None

    def tremble(all_: list[Box | None]) -> float:
        rows = np.array([box for box in all_[:30] if box is not None], float)
        return float(np.abs(np.diff(rows, 2, axis=0)).mean())

    assert tremble(calm) < tremble(boxes) / 3
    far = np.array([c for c in calm if c]) - np.array([w for i, w in enumerate(way) if i != 30])
    assert np.abs(far).mean() < 2


def test_resampling_is_pillows() -> None:
    needs("PIL")
    from PIL import Image

    rng = np.random.default_rng(3)
    for old, new in (((510, 510), (512, 512)), ((731, 731), (512, 512)), ((512, 512), (333, 333))):
        colour = rng.integers(0, 256, (*old, 3), np.uint8)
        want = np.asarray(Image.fromarray(colour).resize(new, Image.Resampling.BILINEAR))
        assert np.array_equal(faces.resample(colour, new, "bilinear"), want)
        grey = rng.integers(0, 2, old, np.uint8) * 255
        want = np.asarray(Image.fromarray(grey).resize(new))
        assert np.array_equal(faces.resample(grey, new, "bicubic"), want)


def test_jaw_mask_grows_where_a_jaw_drops() -> None:
    """A single pixel of skin shows the kernel: 16 up, 6 down, 10 to the sides, 373 in all."""
    classes = np.zeros((512, 512), np.int64)
    classes[250, 256] = faces.SKIN
    mask = faces.parse_mask(classes, "jaw")
    rows, columns = np.nonzero(mask)
    assert (mask > 0).sum() == 373
    assert (250 - rows.min(), rows.max() - 250) == (16, 6)
    assert (256 - columns.min(), columns.max() - 256) == (10, 10)
    face_ = np.full((512, 512), faces.SKIN)
    face_[200:260, 230:280] = faces.NOSE
    face_[300:330, 200:310] = faces.LIPS[0]
    jaw = faces.parse_mask(face_, "jaw")
    assert not jaw[200:260, 230:280].any() and jaw[300:330, 200:310].all()


def test_masks_by_mode() -> None:
    classes = np.repeat(np.arange(19), 27)[None, :512].repeat(512, 0)
    for mode, want in (("raw", {1, 11, 12, 13}), ("neck", {1, 11, 12, 13, 14})):
        mask = faces.parse_mask(classes, mode)  # type: ignore[arg-type]
        assert set(np.unique(classes[mask == 255]).tolist()) == want
        assert set(np.unique(mask)) == {0, 255}


def test_a_finished_mask_is_below_the_middle_and_within_the_face() -> None:
    box = (100, 80, 300, 300)
    crop = crop_box(box)
    side = crop[2] - crop[0]
    done = faces.finish_mask(np.full((side, side), 255, np.uint8), box, crop)
    kernel = int(0.1 * side // 2 * 2) + 1
    assert not done[: side // 2 - kernel // 2 - 1].any()
    assert done[side * 3 // 5, side // 2] == 255
    sharp = faces.finish_mask(np.full((side, side), 255, np.uint8), box, crop, softness=0.05)
    assert ((0 < sharp) & (sharp < 255)).sum() < ((0 < done) & (done < 255)).sum()


def pillow_mask(
    picture: UInt8, box: Box, logits: Float32, mode: str, cheeks: tuple[int, int], blur: float
) -> UInt8:
    """The published mask, by the description of its steps and with Pillow, which is what it is
    published with: crop (black outside), 512 pixels, classes, crop's size again, cut to the face
    box, upper half away, blurred."""
    from PIL import Image

    x1, y1, x2, y2 = box
    xc, yc = (x1 + x2) // 2, (y1 + y2) // 2
    s = int(max(x2 - x1, y2 - y1) // 2 * 1.5)
    large = Image.fromarray(picture[:, :, ::-1]).crop((xc - s, yc - s, xc + s, yc + s))
    classes = logits.argmax(0)
    wanted = np.isin(classes, {"raw": (1, 11, 12, 13), "neck": (1, 11, 12, 13, 14)}.get(mode, ()))
    if mode == "jaw":
        skin = (classes == 1).astype(np.uint8)
        grown = np.zeros_like(skin)  # a dilation written out: from 16 up to 6 down
        for y, x in np.argwhere(faces._jaw_kernel() > 0) - 16:
            moved = np.roll(skin, (-y, -x), (0, 1))
            moved[: max(0, -y)], moved[512 - max(0, y) :] = 0, 0
            moved[:, : max(0, -x)], moved[:, 512 - max(0, x) :] = 0, 0
            grown |= moved
        worn = cv2.erode(grown, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (35, 3)), iterations=2)
        columns = np.arange(512)
        side_ = (columns <= 256 - cheeks[0]) | (columns >= 256 + cheeks[1])
        region = np.where(side_, worn, grown) > 0
        wanted = (region & (classes != 10)) | np.isin(classes, (11, 12, 13))
    mask = Image.fromarray(np.where(wanted, 255, 0).astype(np.uint8)).resize(large.size)
    at = (x1 - xc + s, y1 - yc + s, x2 - xc + s, y2 - yc + s)
    only = Image.new("L", large.size, 0)
    only.paste(mask.crop(at), at)
    top = int(large.size[1] * 0.5)
    lower = Image.new("L", large.size, 0)
    lower.paste(only.crop((0, top, *large.size)), (0, top))
    width = int(blur * large.size[0] // 2 * 2) + 1
    return np.asarray(cv2.GaussianBlur(np.array(lower), (width, width), 0), np.uint8)


@pytest.mark.parametrize(
    ("mode", "cheeks", "box"),
    [
        ("raw", (80, 80), (200, 90, 420, 330)),
        ("neck", (80, 80), (30, 5, 190, 180)),  # the crop leaves the picture
        ("jaw", (90, 90), (180, 120, 401, 353)),
        ("jaw", (70, 110), (470, 260, 640, 480)),
    ],
)
def test_masks_are_the_published_ones(mode: Any, cheeks: tuple[int, int], box: Box) -> None:
    """From given logits to the last pixel, for both versions and both of the published blurs."""
    needs("PIL")
    rng = np.random.default_rng(box[0])
    picture, _ = face(640, 480)
    rough = rng.standard_normal((24, 24, 19)).astype(np.float32)
    logits = cv2.resize(rough, (512, 512), interpolation=cv2.INTER_CUBIC).transpose(2, 0, 1)
    logits[1] += 1.0  # much skin
    seen: list[Float32] = []

    def run(feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        seen.append(feeds["picture"])
        return {"classes": logits[None]}

    crop = crop_box(box)
    raw = faces.Parser(run, mode, cheeks)(faces.cut(picture, crop, "black"))
    for blur in (0.1, 0.05):
        want = pillow_mask(picture, box, np.asarray(logits), mode, cheeks, blur)
        got = faces.finish_mask(raw, box, crop, 0.5, blur)
        assert np.array_equal(got, want) and len(np.unique(want)) > 50
    from PIL import Image

    x1, y1, x2, y2 = crop
    large = Image.fromarray(picture[:, :, ::-1]).crop((x1, y1, x2, y2))
    small = np.asarray(large.resize((512, 512), Image.Resampling.BILINEAR), np.float32) / 255
    normal = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(seen[0][0].transpose(1, 2, 0) - normal).max() < 1e-6


def test_crops_are_what_the_encoder_was_trained_on() -> None:
    picture, marks = face(640, 480)
    box = faces.face_box(faces.from_yaml(marks))
    assert box is not None
    masked, whole = faces.crops(picture, box)
    assert np.all(masked[:, 128:] == -1) and np.array_equal(masked[:, :128], whole[:, :128])
    x1, y1, x2, y2 = box
    want = cv2.resize(picture[y1:y2, x1:x2], (256, 256), interpolation=cv2.INTER_LANCZOS4)
    assert np.abs(whole - ((want[..., ::-1] / 255.0 - 0.5) / 0.5).transpose(2, 0, 1)).max() < 1e-6


def test_a_box_beyond_the_picture_is_not_squashed() -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, 50:] = 255
    out = faces.cut(picture, (60, 20, 140, 100))
    assert out.shape == (80, 80, 3) and out.all()  # the edge goes on
    assert not faces.cut(picture, (-20, -20, 40, 40), "black")[:20].any()


def test_advice_names_what_will_show() -> None:
    def one(scale: float, gap: float = 0.0, turn: float = 0.0) -> faces.Face:
        at = faces.from_yaml(face(640, 480, gap=gap)[1]) * scale
        at[30, 0] += turn * (at[16, 0] - at[0, 0])
        return faces.Face(at.astype(np.float32))

    def told(*found: faces.Face | None) -> str:
        boxes = [None if f is None else faces.face_box(f.points) for f in found]
        return " ".join(faces.advice(found, boxes))

    assert "too small" in told(one(0.3))
    assert "soft" in told(one(4.0))
    assert "side" in told(one(1.0, turn=0.4))
    assert "open" in told(one(1.0, gap=0.3))
    assert "teeth" in told(one(1.0))
    assert "1 of 2" in told(one(1.0), None)
    assert told(None) == ""


# --- preparing ------------------------------------------------------------------------------------


class Encoder:
    """Latents that say which picture they were made of, and a count of the calls."""

    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.calls = 0
        self.stop_after = stop_after

    def __call__(self, pictures: Float32) -> Float32:
        self.calls += 1
        if self.calls > self.stop_after:
            raise KeyboardInterrupt
        level = pictures.mean((1, 2, 3), keepdims=True)
        return np.broadcast_to(level, (len(pictures), 4, 32, 32)).astype(np.float32)


def moving(path: Path, count: int, hidden: tuple[int, ...] = ()) -> tuple[Path, dict[str, Any]]:
    picture, marks = face(320, 240)

    def one(n: int) -> UInt8:
        if n in hidden:
            return np.zeros((240, 320, 3), np.uint8)
        return np.roll(picture, n % 5, 1)

    return film(path, [n / 25 for n in range(count)], (320, 240), one), marks


class Found:
    """A landmarker that sees a face wherever the picture isn't black."""

    def __init__(self, marks: dict[str, Any]) -> None:
        self.points = faces.from_yaml(marks)
        self.calls = 0

    def __call__(self, picture: UInt8) -> faces.Face | None:
        self.calls += 1
        return faces.Face(self.points) if picture.mean() > 30 else None


def quiet(what: str, share: float) -> None:
    """No progress to be seen."""


def test_pictures_without_a_face_keep_their_place(tmp_path: Path) -> None:
    """Pictures, patches and latents stay in step; the published script loses it at the first."""
    source, marks = moving(tmp_path / "a.mp4", 12, hidden=(0, 5, 11))
    plan = faces.Plan("k")
    clip = faces.Clip(source, how="native")
    faces.prepare_loop(clip, tmp_path / "t", plan, Found(marks), Encoder(), None, quiet)
    loop = Loop(tmp_path / "t")
    assert loop.frames == 12
    for i in range(12):
        assert loop.has_face(i) == (i not in (0, 5, 11)) == (loop.patch(i) is not None)
        assert bool(loop.latents(i).any()) == loop.has_face(i)
    assert "3 of 12" in " ".join(loop.manifest["advice"])


def test_no_face_at_all_is_an_error_that_helps(tmp_path: Path) -> None:
    source, marks = moving(tmp_path / "a.mp4", 3, hidden=(0, 1, 2))
    with pytest.raises(AvatarError, match="write landmarks"):
        faces.prepare_loop(
            faces.Clip(source),
            tmp_path / "t",
            faces.Plan("k"),
            Found(marks),
            Encoder(),
            None,
            quiet,
        )
    assert not (tmp_path / "t" / "manifest.json").exists()


def test_an_interrupted_preparation_goes_on(tmp_path: Path) -> None:
    source, marks = moving(tmp_path / "a.mp4", 60)
    plan, target = faces.Plan("k"), tmp_path / "t"

    def go(encoder: Encoder, finder: Found) -> None:
        clip = faces.Clip(source, how="native")
        faces.prepare_loop(clip, target, plan, finder, encoder, None, quiet)

    finder, broken = Found(marks), Encoder(stop_after=40)
    with pytest.raises(KeyboardInterrupt):
        go(broken, finder)
    assert finder.calls == 60 and not (target / "manifest.json").exists()
    finder, second = Found(marks), Encoder()
    go(second, finder)
    assert finder.calls == 0  # the search was complete
    assert second.calls == 60 - 25  # and the first chunk encoded
    straight = tmp_path / "s"
    faces.prepare_loop(
        faces.Clip(source, how="native"), straight, plan, Found(marks), Encoder(), None, quiet
    )
    for name in ("frames.i420", "patches.bin", "index.npy", "latents.npy"):
        assert (target / name).read_bytes() == (straight / name).read_bytes(), name
    # another plan is another preparation
    third = Encoder()
    faces.prepare_loop(
        faces.Clip(source), target, faces.Plan("other"), Found(marks), third, None, quiet
    )
    assert third.calls == 60


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """Four seconds hold no more at once than one: one picture and a chunk of latents."""
    import tracemalloc

    peaks = []
    for seconds in (1, 4):
        source, marks = moving(tmp_path / f"{seconds}.mp4", 25 * seconds)
        tracemalloc.start()
        faces.prepare_loop(
            faces.Clip(source, (640, 480)),
            tmp_path / str(seconds),
            faces.Plan("k"),
            faces.Given(faces.from_yaml(marks) * 2),
            Encoder(),
            None,
            quiet,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pictures = 25 * 3 * 640 * 480 * 3 / 2
    assert peaks[1] - peaks[0] < 0.15 * pictures, peaks


# --- folders of others ----------------------------------------------------------------------------


def published(folder: Path, count: int = 3, missing: tuple[int, ...] = ()) -> Path:
    """A folder as MuseTalk's real-time script leaves it: forward, then backward."""
    picture, marks = face(321, 240)
    box = faces.face_box(faces.from_yaml(marks), height=240)
    assert box is not None
    crop = crop_box(box)
    (folder / "full_imgs").mkdir(parents=True)
    (folder / "mask").mkdir()
    order = [*range(count), *reversed(range(count))]
    side = crop[2] - crop[0]
    mask = faces.finish_mask(np.full((side, side), 255, np.uint8), box, crop)
    for i, n in enumerate(order):
        cv2.imwrite(str(folder / f"full_imgs/{i:08d}.png"), np.roll(picture, n, 1))
        cv2.imwrite(str(folder / f"mask/{i:08d}.png"), mask)
    whole = [np.int32(v) for v in box]
    coords = [(0.0, 0.0, 0.0, 0.0) if n in missing else list(whole) for n in order]
    (folder / "coords.pkl").write_bytes(pickle.dumps(coords))
    (folder / "mask_coords.pkl").write_bytes(pickle.dumps([list(crop) for _ in order]))
    (folder / "latents.pt").write_bytes(b"latents")
    (folder / faces.UPSTREAM).write_text(json.dumps({"avatar_id": "../../x", "version": "v15"}))
    return folder


def taken(folder: Path, target: Path, count: int, side: int = 32) -> Loop:
    def latents(_: Path) -> list[Float32]:
        sides = [*[32] * (count - 1), side]
        return [np.full((8, n, n), i, np.float32) for i, n in enumerate(sides)]

    faces.import_loop(folder, target, "k", {}, latents, quiet)
    return Loop(target)


def test_a_published_avatar_is_taken_over(tmp_path: Path) -> None:
    loop = taken(published(tmp_path / "a"), tmp_path / "t", 6)
    assert loop.frames == 3 and (loop.width, loop.height) == (320, 240)
    assert all(loop.patch(i) is not None for i in range(3))
    assert [float(loop.latents(i)[0, 0, 0]) for i in range(3)] == [0, 1, 2]


def test_a_published_avatar_that_lost_step_is_brought_back(tmp_path: Path) -> None:
    loop = taken(published(tmp_path / "a", missing=(1,)), tmp_path / "t", 4)
    assert [loop.has_face(i) for i in range(3)] == [True, False, True]
    assert [float(loop.latents(i)[0, 0, 0]) for i in (0, 2)] == [0, 1]


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('it ran')",))


@pytest.mark.parametrize("name", ["coords.pkl", "mask_coords.pkl"])
def test_pickle_bombs_are_refused(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path / "a")
    for bomb in (
        pickle.dumps([Bomb()]),
        pickle.dumps(np.array([Bomb()], object)),
        b"\x80\x04",
        b"",
        b"\x80\x04]r\xff\xff\xff\xff.",  # a list, remembered under number 4,294,967,295
    ):
        (folder / name).write_bytes(bomb)
        with pytest.raises(AvatarError, match=name.replace(".", r"\.")):
            taken(folder, tmp_path / "t", 6)
    assert not (tmp_path / "t" / "manifest.json").exists()


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path / "a")
    secret = tmp_path / "secret.png"
    save_face(secret, width=320, height=240)
    (folder / "full_imgs/00000001.png").unlink()
    (folder / "full_imgs/00000001.png").symlink_to(secret)
    with pytest.raises(AvatarError, match="leads out"):
        taken(folder, tmp_path / "t", 6)
    (folder / "full_imgs/00000001.png").unlink()
    with pytest.raises(AvatarError, match="has no full_imgs/00000001"):
        taken(folder, tmp_path / "t", 6)


def test_lists_that_dont_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AvatarError, match="5 latents for 6"):
        taken(published(tmp_path / "a"), tmp_path / "t", 5)
    folder = published(tmp_path / "b")
    with pytest.raises(AvatarError, match="256 pixels"):
        taken(folder, tmp_path / "v", 6, side=16)
    (folder / "coords.pkl").write_bytes(pickle.dumps([[0, 0, 1e12, 5]] * 6))
    with pytest.raises(AvatarError, match="box"):
        taken(folder, tmp_path / "u", 6)
