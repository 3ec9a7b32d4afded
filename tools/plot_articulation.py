"""Draw and measure what `voipavatar.engines.articulation` makes of speech whose phonemes are known.

    python tools/plot_articulation.py --cache DIR --out DIR

Prints, for each voice, with the network alone and with the voice's cues: the correlation of the jaw
with the phoneme's jaw value and the lag at which it is best, how many bilabials close, how strongly
the mouth moves. Draws one picture a sentence. Needs what `train_articulation.py` needs, and
matplotlib for the pictures.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))

import train_articulation as voices  # noqa: E402

from voipavatar.engines import articulation as art  # noqa: E402
from voipavatar.media import ENGINE_RATE, Cue, frames_for  # noqa: E402

Float32 = npt.NDArray[np.float32]


def rows_of(spoken: voices.Spoken, cued: bool, fps: int, weights: Path | None) -> Float32:
    articulator = art.Articulator(fps, weights)
    if cued:
        articulator.cue([Cue("phoneme", p, s, e) for p, s, e in spoken.marks])
    return np.concatenate((articulator.push(spoken.pcm), articulator.flush()))


def truth_of(spoken: voices.Spoken, fps: int) -> tuple[Float32, Float32]:
    """Jaw value of the phonemes and largest share of bilabial, by frame."""
    steps = -(-len(spoken.pcm) // art.HOP)
    labels = voices.label(spoken, steps)
    jaw = labels @ np.array([art.JAW[name] for name in art.CLASSES], np.float32)
    frame = np.arange(steps) * art.HOP * fps // ENGINE_RATE
    count = frames_for(len(spoken.pcm), ENGINE_RATE, fps)
    mean = np.array([jaw[frame == k].mean() for k in range(count)], np.float32)
    closed = np.array([labels[frame == k, 1].max() for k in range(count)], np.float32)
    return mean, closed


def lagged(a: Float32, b: Float32, lag: int) -> tuple[Float32, Float32]:
    if lag > 0:
        return a[lag:], b[:-lag]
    return (a[:lag], b[-lag:]) if lag < 0 else (a, b)


def measure(spoken: Sequence[voices.Spoken], cued: bool, fps: int, weights: Path | None) -> str:
    rows = [rows_of(item, cued, fps, weights) for item in spoken]
    truths = [truth_of(item, fps) for item in spoken]
    by_lag = {}
    for lag in range(-4, 5):
        parts = [lagged(r[:, 0], t[0], lag) for r, t in zip(rows, truths, strict=True)]
        a, b = (np.concatenate(side) for side in zip(*parts, strict=True))
        by_lag[lag] = float(np.corrcoef(a, b)[0, 1])
    best = max(by_lag, key=lambda lag: by_lag[lag])
    met = total = false = pressed = 0
    for r, (_, closed) in zip(rows, truths, strict=True):
        k = 0
        while k < len(closed):
            if closed[k] < 0.5:
                k += 1
                continue
            end = k
            while end < len(closed) and closed[end] >= 0.5:
                end += 1
            near = slice(max(0, k - 1), end + 1)
            total += 1
            met += bool(((r[near, 3] > 0.7) & (r[near, 0] < 0.05)).any())
            k = end
        high = np.flatnonzero(r[:, 3] > 0.7)
        pressed += len(high)
        false += sum(closed[max(0, k - 1) : k + 2].max() < 0.1 for k in high)
    jaw = np.concatenate([r[:, 0] for r in rows])
    turns = np.mean([np.sum(np.diff(np.sign(np.diff(r[:, 0]))) != 0) / len(r) * fps for r in rows])
    lags = " ".join(f"{lag * 1000 // fps:+d}:{value:.2f}" for lag, value in by_lag.items())
    return (
        f"jaw r {by_lag[best]:.2f} at {best * 1000 // fps:+d} ms ({lags}); "
        f"bilabials shut {met}/{total}, pressed where there is none {false}/{pressed}; "
        f"jaw mean {jaw.mean():.2f}, 90 % {np.quantile(jaw, 0.9):.2f}, most {jaw.max():.2f}; "
        f"{turns:.1f} turns a second"
    )


def draw(spoken: voices.Spoken, path: Path, fps: int, weights: Path | None) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(5, 1, figsize=(20, 13), sharex=True)
    time = np.arange(len(spoken.pcm)) / ENGINE_RATE
    axes[0].plot(time, spoken.pcm, lw=0.3, color="grey")
    found = art.posteriors(spoken.pcm, weights)
    axes[1].imshow(
        found.T,
        aspect="auto",
        origin="lower",
        extent=(0, len(found) / 100, -0.5, len(art.CLASSES) - 0.5),
        cmap="magma",
    )
    axes[1].set_yticks(range(len(art.CLASSES)), art.CLASSES)
    for index, start, end in voices.spans(spoken.marks):
        axes[1].plot((start, end), (index, index), color="cyan", lw=1)
    jaw, _ = truth_of(spoken, fps)
    for axis, cued in ((axes[2], False), (axes[3], True)):
        rows = rows_of(spoken, cued, fps, weights)
        at = np.arange(len(rows)) / fps
        axis.step(at, jaw, where="post", color="lightgrey", label="jaw of the phoneme")
        for i, colour in ((0, "black"), (3, "red"), (4, "orange")):
            axis.step(at, rows[:, i], where="post", color=colour, label=art.PARAMETERS[i])
        axis.set_ylabel("with cues" if cued else "sound alone")
        axis.set_ylim(-0.05, 1.05)
    axes[2].legend(loc="upper right")
    rows = rows_of(spoken, False, fps, weights)
    for i in (1, 2, 5, 6, 7):
        axes[4].step(np.arange(len(rows)) / fps, rows[:, i], where="post", label=art.PARAMETERS[i])
    axes[4].legend(loc="upper right")
    for axis in axes:
        for phoneme, start, _ in spoken.marks:
            axis.axvline(start, color="lightblue", lw=0.4)
            if axis is not axes[1]:
                axis.text(start, axis.get_ylim()[1], phoneme, fontsize=9, va="top")
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path("articulation-cache"))
    parser.add_argument("--out", type=Path, default=None, help="folder for pictures")
    parser.add_argument("--fps", type=int, default=25)
    parser.add_argument("--weights", type=Path, default=None)
    options = parser.parse_args()
    for name, spoken in voices.gather(options.cache).items():
        if name.startswith("train"):
            continue
        for cued in (False, True):
            print(f"{name}, {'with cues' if cued else 'sound alone'}: ", end="")
            print(measure(spoken, cued, options.fps, options.weights))
        if options.out is not None and importlib.util.find_spec("matplotlib") is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            for i in (0, 8):
                path = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{i}.png"
                draw(spoken[i], path, options.fps, options.weights)


if __name__ == "__main__":
    main()
