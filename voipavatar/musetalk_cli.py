"""Commands for MuseTalk and for weights: `models ...`, `build`, `bench engine --engine musetalk`.

Click groups and commands to be hung into the main one; each raises the package's own errors. What
is heavy is imported when a command runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from .config import Settings, load_persona
from .errors import ConfigError

if TYPE_CHECKING:
    from .models import State

RUNTIMES = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp32", "fp16", "bf16")


def _settings() -> Settings:
    found = click.get_current_context().find_object(Settings)
    return found if found is not None else Settings.from_env()


def _folder(folder: Path | None) -> Path:
    return (folder or _settings().cache_dir / "models").expanduser()


_at = click.option(
    "--models",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where weights are kept; the cache's models folder unless said.",
)


@click.group()
def models() -> None:
    """Weights: what is needed, under which licence, and whether it is there."""


@models.command("list")
@_at
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def models_list(folder: Path | None, as_json: bool) -> None:
    """Every file of every recipe, with its licence and source."""
    from . import models as weights

    place = _folder(folder)
    rows: list[dict[str, Any]] = []
    for recipe in weights.list_recipes():
        for file in recipe.files:
            rows.append(
                {
                    "recipe": recipe.name,
                    "file": file.path,
                    "there": (place / file.path).is_file(),
                    "bytes": file.bytes,
                    "licence": file.licence,
                    "source": weights.source_url(file),
                    "note": file.note,
                    "optional": file.optional,
                }
            )
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table("recipe", "file", "there", "licence", "note")
    for row in rows:
        table.add_row(
            *(escape(str(row[k])) for k in ("recipe", "file")),
            "yes" if row["there"] else "optional" if row["optional"] else "no",
            escape(row["licence"] or "generated"),
            escape(row["note"]),
        )
    Console().print(table)


def _told(states: list[State]) -> None:
    console = Console(stderr=False, highlight=False)
    for one in states:
        mark = {"good": "ok", "unchecked": "ok"}.get(one.state, one.state)
        console.print(f"{mark:9} {escape(one.message)}", soft_wrap=True)
    if not all(one.usable for one in states):
        sys.exit(1)


@models.command("verify")
@click.argument("recipe")
@_at
@click.option("--load", is_flag=True, help="Also load every network (needs torch, minutes).")
@click.option("--trust", is_flag=True, help="Remember the files as they are now.")
def models_verify(recipe: str, folder: Path | None, load: bool, trust: bool) -> None:
    """Compare a recipe's files with their sizes and hashes. Exits with 1 if one is wrong."""
    from . import models as weights

    found = weights.load_recipe(recipe)
    if trust:
        weights.trust(found, _folder(folder))
    if load:
        from .musetalk_build import check_weights

        check_weights(found, _folder(folder))
    _told(weights.verify(found, _folder(folder)))


@models.command("pull")
@click.argument("recipe")
@_at
@click.option("--mirror", help="Address or folder with the hub's paths, in the hub's place.")
@click.option("--yes", is_flag=True, help="The licences are known and accepted.")
def models_pull(recipe: str, folder: Path | None, mirror: str | None, yes: bool) -> None:
    """Fetch what is missing; goes on where it stopped."""
    from . import models as weights

    found = weights.load_recipe(recipe)
    click.echo("These files have licences of their own:")
    for licence in dict.fromkeys(file.licence for file in found.files if file.licence):
        names = ", ".join(file.path for file in found.files if file.licence == licence)
        click.echo(f"  {licence}: {names}")
    if not yes:
        click.confirm("Fetch them?", abort=True, default=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def report(path: str, there: int, total: int) -> None:
            if path not in tasks:
                tasks[path] = bar.add_task(path, total=total or None)
            bar.update(tasks[path], completed=there, total=total or None)

        states = weights.pull(found, _folder(folder), report, mirror)
    _told(states)


@models.command("import")
@click.argument("recipe")
@click.argument("source", type=click.Path(path_type=Path, file_okay=False, exists=True))
@_at
def models_import(recipe: str, source: Path, folder: Path | None) -> None:
    """Take a recipe's files from a folder: MuseTalk's `models`, a hub cache, or a flat one."""
    from . import models as weights

    _told(weights.import_folder(weights.load_recipe(recipe), source, _folder(folder)))


@models.command("random")
@click.argument("recipe")
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True)
def models_random(recipe: str, target: Path, seed: int) -> None:
    """Write random weights in the real formats: to measure speed before any weights are there."""
    from . import models as weights
    from .musetalk_build import import_torch

    import_torch()
    from .engines.musetalk_nets import generate

    generate(weights.load_recipe(recipe), target, seed)
    click.echo(f"random weights of {recipe} in {target}: what they draw means nothing")


@click.command()
@click.option("--engine", type=click.Choice(["musetalk"]), default="musetalk", show_default=True)
@click.option("--recipe", default="musetalk-v15", show_default=True)
@click.option("--runtime", type=click.Choice(RUNTIMES[1:]), default="tensorrt", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS[:2]), help="fp16 unless said.")
@click.option("--arch", "archs", multiple=True, help="Compute capability, as 8.9; repeatable.")
@_at
def build(
    engine: str,
    recipe: str,
    runtime: str,
    precision: str | None,
    archs: tuple[str, ...],
    folder: Path | None,
) -> None:
    """Export and compile an engine's networks for this machine, proved before installed."""
    from .engines.musetalk import read_options
    from .musetalk_build import build as make

    options: dict[str, Any] = {"recipe": recipe, "runtime": runtime, "precision": precision}
    if folder is not None:
        options["models"] = folder
    chosen, found = read_options(options)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task(engine, total=1.0)
        artefacts = make(
            chosen,
            found,
            _settings(),
            lambda what, share: bar.update(task, description=what, completed=share),
            archs,
        )
    click.echo(f"installed {artefacts.folder}")
    for name, gate in artefacts.data["gates"].items():
        worst = max(one[0] for one in gate.values())
        click.echo(f"  {name}: differs from torch by {worst:.2g} of its range at most")
    if artefacts.data["plans"] and not artefacts.data.get("proofs"):
        click.echo("  no GPU here runs these plans: each is proved when it is first loaded")


@click.command()
@click.option("--recipe", default="musetalk-v15", show_default=True)
@click.option("--persona", help="A persona whose engine is musetalk; a drawn face otherwise.")
@click.option("--runtime", type=click.Choice(RUNTIMES), default="torch", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), help="fp16 on a GPU unless said.")
@click.option("--device", help="cuda:0, cpu; what is there unless said.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.05, 60),
    default=2.0,
    show_default=True,
    help="For each measurement.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_at
def bench_musetalk(
    recipe: str,
    persona: str | None,
    runtime: str,
    precision: str | None,
    device: str | None,
    seconds: float,
    as_json: bool,
    folder: Path | None,
) -> None:
    """Milliseconds by stage, frames a second by batch and by sessions, and how near the device's
    own limit that is. Works with random weights too: speed doesn't depend on them."""
    import tempfile

    import cv2

    from .engines.musetalk import MuseTalk
    from .musetalk_build import bench, table

    settings = _settings()
    engine = MuseTalk(settings, device)
    options: dict[str, Any] = {
        "recipe": recipe,
        "runtime": runtime,
        "precision": precision,
        "device": device,
    }
    if folder is not None:
        options["models"] = folder
    with tempfile.TemporaryDirectory() as scratch:
        if persona is not None:
            who = load_persona(persona, settings)
            if who.engine != "musetalk" or who.portrait is None:
                raise ConfigError(f"{persona} is not a musetalk persona with a portrait")
            source = who.beside(who.portrait)
            options = who.engine_settings() | {k: v for k, v in options.items() if v is not None}
        else:
            source = Path(scratch) / "face.png"
            picture, marks = drawn_face()
            cv2.imwrite(str(source), picture)
            options |= {"landmarks": marks, "parser": "points", "mask": "points"}
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            task = bar.add_task("preparing", total=1.0)

            def told(what: str, share: float) -> None:
                bar.update(task, description=what, completed=share)

            avatar = engine.prepare(source, Path(scratch) / "avatar", options, told)
            command = "voipavatar " + " ".join(sys.argv[1:])
            report = bench(engine, avatar, seconds=seconds, command=command, progress=told)
        engine.close()
    click.echo(json.dumps(report, indent=1) if as_json else table(report))


@click.command()
@click.option("--runs", type=click.IntRange(1, 1000), default=8, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def bench_blend(runs: int, as_json: bool) -> None:
    """Putting a face back into its picture, at five sizes: ours against Pillow's way, and whether
    the pictures are equal bit for bit (exits with 1 if one isn't)."""
    from .blend_bench import blend, table

    rows = blend(runs=runs)
    click.echo(json.dumps(rows, indent=1) if as_json else table(rows))
    if not all(row["equal"] for row in rows):
        sys.exit(1)


def drawn_face(width: int = 1280, height: int = 720) -> tuple[Any, dict[str, Any]]:
    """A plain face and its landmarks: something to measure on when no picture is at hand."""
    import cv2
    import numpy as np

    x, y, r = width / 2, height * 0.48, height * 0.26
    picture = np.full((height, width, 3), (120, 110, 96), np.uint8)
    cv2.ellipse(
        picture, (round(x), round(y)), (round(r * 0.75), round(r)), 0, 0, 360, (150, 178, 222), -1
    )
    t = np.linspace(0, np.pi, 17)
    jaw = np.stack([x - 0.75 * r * np.cos(t), y + r * np.sin(t)], 1)
    ring = np.pi * np.arange(20) / 10

    def lips(a: float, b: float) -> Any:
        return np.stack([x - a * r * np.cos(ring), y + 0.5 * r - b * r * np.sin(ring)], 1)

    cv2.fillPoly(picture, [np.rint(lips(0.28, 0.09)).astype(np.int32)], (96, 96, 178))

    def line(cx: float, cy: float, wide: float) -> Any:
        at = np.linspace(-1, 1, 7)
        return np.stack([x + (cx + wide * at) * r, np.full(7, y + cy * r)], 1)

    def eye(side: float) -> dict[str, Any]:
        return {
            "upper": line(0.3 * side, -0.24, 0.12).tolist(),
            "lower": line(0.3 * side, -0.18, 0.12).tolist(),
            "iris": [x + 0.3 * side * r, y - 0.21 * r, 0.05 * r],
        }

    marks = {
        "outer_lips": lips(0.28, 0.09).tolist(),
        "inner_lips": lips(0.2, 0.01).tolist(),
        "left_eye": eye(-1),
        "right_eye": eye(1),
        "left_brow": line(-0.3, -0.38, 0.16).tolist(),
        "right_brow": line(0.3, -0.38, 0.16).tolist(),
        "nose": {
            "bridge": [x, y - 0.15 * r],
            "tip": [x, y + 0.15 * r],
            "base": [x, y + 0.24 * r],
            "left": [x - 0.14 * r, y + 0.2 * r],
            "right": [x + 0.14 * r, y + 0.2 * r],
        },
        "jaw": jaw.tolist(),
        "forehead": [x, y - 0.9 * r],
    }
    return picture, marks
