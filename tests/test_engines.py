"""Every engine that needs no special hardware, against the engine contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from voipavatar.engines.clapper import ClapperEngine, read_clapper
from voipavatar.engines.viseme import VisemeEngine

from .contract import EngineContract, Kit, babble, turn
from .faces import save_face


class TestClapper(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        folder = tmp_path_factory.mktemp("clapper")
        kit = Kit(
            make=ClapperEngine,
            source=Path(),
            options={"width": 640, "height": 360, "fps": 25},
            folder=folder,
            bad_options={"width": {"width": "wide"}, "fps": {"fps": 12.5}},
            mouth=False,
        )
        yield kit
        kit.engine.close()

    def test_flashes_with_its_own_sound_and_counts(self, kit: Kit) -> None:
        session = kit.open()
        pcm = np.zeros(640 * 8, np.float32)
        pcm[640 * 3 : 640 * 5] = 0.3
        images = kit.draw(session.idle(300) + turn(session, iter([pcm])) + session.idle(2))
        seen = [read_clapper(image[:360]) for image in images]
        assert [clock for _, clock in seen] == list(range(310))
        assert [i - 300 for i, (flash, _) in enumerate(seen) if flash] == [3, 4]

    def test_survives_coding(self, kit: Kit) -> None:
        """A picture that was coded badly can still be read."""
        session = kit.open()
        session.reset(clock=0xA5C3)
        for job, loud in zip(
            session.push(np.concatenate([np.zeros(640), np.full(640, 0.2)]).astype(np.float32)),
            (False, True),
            strict=True,
        ):
            image = kit.draw([job])[0]
            done, data = cv2.imencode(".jpg", image[:360], [cv2.IMWRITE_JPEG_QUALITY, 12])
            assert done
            worse = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
            assert worse is not None
            assert read_clapper(np.asarray(worse, np.uint8)) == (loud, job.clock)


class TestViseme(EngineContract):
    @pytest.fixture(scope="class")
    @classmethod
    def kit(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
        folder = tmp_path_factory.mktemp("viseme")
        source = folder / "face.png"
        marks = save_face(source, width=640, height=360)
        options: dict[str, Any] = {"width": 640, "height": 360, "fps": 25, "landmarks": marks}
        text = folder / "text.png"
        text.write_text("this is no picture")
        empty = folder / "empty.png"
        empty.write_bytes(b"")
        half = folder / "half.png"
        half.write_bytes(source.read_bytes()[:400])
        blank = folder / "blank.png"
        cv2.imwrite(str(blank), np.full((360, 640, 3), 128, np.uint8))
        small = folder / "small.png"
        tiny = save_face(small, width=640, height=360, unit=25)
        shifted = {key: value for key, value in save_face(folder / "wide.png", width=1280).items()}
        kit = Kit(
            make=VisemeEngine,
            source=source,
            options=options,
            folder=folder,
            still={"motion": 0},
            settle=70,
            bad_sources={
                "missing": (folder / "nowhere.png", options),
                "folder": (folder, options),
                "text": (text, options),
                "empty": (empty, options),
                "half": (half, options),
                "faceless": (blank, {"width": 640, "height": 360}),
                "tiny": (small, options | {"landmarks": tiny}),
                "elsewhere": (source, options | {"landmarks": shifted}),
            },
            bad_options={
                "seed": {"seed": 1.5},
                "motion": {"motion": 9},
                "blink": {"blink": "often"},
                "background": {"background": [1, 2]},
                "landmarks.outer_lips": {
                    "landmarks": marks | {"outer_lips": marks["outer_lips"][:5]}
                },
                "landmarks.left_eye": {"landmarks": marks | {"left_eye": 7}},
                "landmarks.third_eye": {"landmarks": marks | {"third_eye": marks["left_eye"]}},
                "landmarks.jaw": {"landmarks": {k: v for k, v in marks.items() if k != "jaw"}},
                "landmarks.inner_lips": {
                    "landmarks": marks | {"inner_lips": [[float("nan"), 1.0]] * 20}
                },
                "landmarks": {"landmarks": [1, 2, 3]},
            },
        )
        yield kit
        kit.engine.close()

    def test_any_level_can_be_drawn(self, kit: Kit) -> None:
        """Sound that clips, hums, or is a single click."""
        session = kit.open()
        loud = np.clip(babble(0.4) * 50, -1, 1)
        hum = np.full(6400, 0.5, np.float32)
        click = np.zeros(6400, np.float32)
        click[3000] = 1
        for sound in (loud, hum, click):
            for job, image in zip(
                jobs := turn(session, iter([sound])), kit.draw(jobs), strict=True
            ):
                assert np.isfinite(job.data.mouth).all()
                assert image[:360].min() >= 0
