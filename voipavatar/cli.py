"""The command line. Each command is thin: it reads its options and calls what does the work."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .config import Persona, Settings, VoiceChoice, list_personas, load_persona, persona_schema
from .errors import ConfigError, VoipAvatarError
from .media import Mode
from .version import __version__

if TYPE_CHECKING:
    from .livekit_server import LiveKitServer
    from .session import Studio

T = TypeVar("T")

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C kept from its end: 128 + SIGINT, as shells have it."""

# Results go to stdout, so that they can be piped; everything said along the way to stderr.
# A pipe has no width: nothing is folded there that a line can hold.
_out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0, 1 after an error, 2 after wrong usage, 130 after Ctrl-C."""
    try:
        code = cli.main(args=argv, prog_name="voipavatar", standalone_mode=False)
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "voipavatar"
        _fail(f"{error.format_message()} Try '{path} --help'.", error.exit_code)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except VoipAvatarError as error:
        _fail(str(error), 1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        # `voipavatar personas | head`: the reader has had enough. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    # A persona may have several mistakes, each on its own line.
    print("error: " + message.replace("\n", "\n       "), file=sys.stderr)
    sys.exit(code)


class _Group(click.Group):
    """A group some of whose commands live beside their engine, imported when asked for."""

    LATER = {
        ("voipavatar", "models"): "models",
        ("voipavatar", "build"): "build",
        ("bench", "musetalk"): "bench_musetalk",
        ("bench", "blend"): "bench_blend",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        later = [name for group, name in self.LATER if group == self.name]
        return sorted([*super().list_commands(ctx), *later])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = self.LATER.get((self.name or "", cmd_name))
        if found is None:
            return super().get_command(ctx, cmd_name)
        from . import musetalk_cli

        command: click.Command = getattr(musetalk_cli, found)
        return command


@click.group(
    cls=_Group,
    name="voipavatar",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="voipavatar", message="%(prog)s %(version)s")
@click.option("-v", "--verbose", count=True, help="Log more: -v what happens, -vv everything.")
@click.pass_context
def cli(context: click.Context, verbose: int) -> None:
    """Give a voice agent a face: real-time talking avatars."""
    context.obj = Settings.from_env()
    _log_to_stderr({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))


# --- demo and serve -------------------------------------------------------------------------------


@cli.command()
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the page; 0 is a free one.")
@click.option("--no-browser", is_flag=True, help="Only print the address.")
@click.option(
    "--persona", default="default", show_default=True, help="Who comes first: name, or a YAML file."
)
@click.pass_obj
def demo(settings: Settings, port: int | None, no_browser: bool, persona: str) -> int:
    """Talk to the avatar in your browser; everything runs on this machine.

    Starts a LiveKit server (unless LIVEKIT_URL names one) and the page. Ctrl-C ends both.
    """
    from urllib.parse import quote

    from .livekit_server import free_port

    who = load_persona(persona, settings)
    if who.path is not None and persona != who.path.stem:
        # the page finds it by name, as it finds the others of its folder
        folders = (who.path.parent, *settings.persona_dirs)
        settings = dataclasses.replace(settings, persona_dirs=folders)

    chosen = port
    if chosen is None:
        chosen = free_port(settings.port)
        if chosen != settings.port:
            _err.print(f"port {settings.port} is taken: using {chosen}")
    # What listens beyond loopback is `serve`'s business.
    settings = dataclasses.replace(settings, host="127.0.0.1", port=chosen)

    page = "" if who.name == "default" else f"?persona={quote(who.name)}"

    def ready(url: str) -> None:
        if not no_browser:
            _open_browser(url + page)

    return _serve(settings, ready, first=who.name, page=page)


@cli.command()
@click.option("--host", help="Address to listen on (VOIPAVATAR_HOST; loopback by default).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port (VOIPAVATAR_PORT; 8080).")
@click.option("--public-url", default="", help="LiveKit's address as browsers see it.")
@click.option("--amqp", metavar="URL", help="RabbitMQ's address (VOIPAVATAR_AMQP_URL).")
@click.option("--queue", help="The queue the default persona speaks from (RABBITMQ_QUEUE).")
@click.pass_obj
def serve(
    settings: Settings,
    host: str | None,
    port: int | None,
    public_url: str,
    amqp: str | None,
    queue: str | None,
) -> int:
    """Serve the page and the HTTP interface (described at /docs).

    Uses the LiveKit server of LIVEKIT_URL, or starts one. Listening anywhere but on loopback
    wants VOIPAVATAR_TOKEN. With a broker, the default persona and each that names a queue are on
    air from the start and speak from it.
    """
    settings = dataclasses.replace(
        settings,
        amqp_url=amqp or settings.amqp_url,
        queue=queue or settings.queue,
        host=settings.host if host is None else host,
        port=settings.port if port is None else port,
    )
    logging.getLogger("voipavatar").setLevel(
        min(_level(settings.log_level), logging.getLogger("voipavatar").level)
    )
    return _serve(settings, lambda url: None, public_url, fed=True)


@cli.command()
@click.option("--name", help="What agents ask for (VOIPAVATAR_AGENT_NAME; voipavatar).")
@click.option("--sessions", type=click.IntRange(1, 1000), help="Rooms at once; else measured.")
@click.option(
    "--persona",
    "personas",
    multiple=True,
    help="Name or YAML file; prepared at the start. The first is who comes unless a room asks for "
    "another one (default).",
)
@click.option(
    "--every-room",
    is_flag=True,
    help="Come to every room that is made, unasked: for a persona with an agent section.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Of /health and /metrics.")
@click.option("--port", type=click.IntRange(0, 65535), default=8081, show_default=True)
@click.option("--drain", type=click.FloatRange(0, 86400), default=3600.0, show_default=True)
@click.option("--amqp", metavar="URL", help="RabbitMQ, for queues (VOIPAVATAR_AMQP_URL).")
@click.pass_obj
def worker(
    settings: Settings,
    amqp: str | None,
    name: str | None,
    sessions: int | None,
    personas: tuple[str, ...],
    every_room: bool,
    host: str,
    port: int,
    drain: float,
) -> int:
    """Take rooms as LiveKit dispatches them: the face of an agent that asks for one, or, with a
    persona that has an agent section, the whole conversation.

    With a broker, an avatar also speaks from the queue that its persona or its dispatch names.

    Needs LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET. Several workers under one name share
    the load. SIGTERM or Ctrl-C: no new rooms, the open ones end by themselves within --drain
    seconds; a second time: at once.
    """
    from .worker import Worker

    settings = dataclasses.replace(settings, amqp_url=amqp or settings.amqp_url)
    logging.getLogger("voipavatar").setLevel(
        min(_level(settings.log_level), logging.getLogger("voipavatar").level)
    )
    one = Worker(
        settings,
        agent_name=name or os.environ.get("VOIPAVATAR_AGENT_NAME") or "voipavatar",
        capacity=sessions,
        personas=personas or ("default",),
        every_room=every_room,
        host=host,
        port=port,
        drain=drain,
        ready=lambda url: _err.print(
            f"worker is ready: {one.capacity} rooms at once; {url}/health"
        ),
    )
    _run(one.run())
    return 0  # a signal is how it ends


def _serve(
    settings: Settings,
    ready: Callable[[str], None],
    public_url: str = "",
    *,
    fed: bool = False,
    first: str = "default",
    page: str = "",
) -> int:
    """`first` is prepared before the page opens; `page` is what its address ends with."""
    from .livekit_server import LiveKitServer
    from .server.guard import is_loopback

    livekit = LiveKitServer.from_settings(
        settings, host="127.0.0.1" if is_loopback(settings.host) else _ipv4(settings.host)
    )
    serving = _serving(settings, livekit, ready, public_url, fed, first, page)
    _run(serving, livekit.end_now)
    return 0  # Ctrl-C is how it ends


async def _serving(
    settings: Settings,
    livekit: LiveKitServer,
    ready: Callable[[str], None],
    public_url: str,
    fed: bool,
    first: str,
    page: str,
) -> None:
    from .server import serve as serve_http
    from .server.run import check_exposure
    from .session import Studio

    check_exposure(settings)
    async with contextlib.AsyncExitStack() as stack:
        with _steps() as tell:
            tell("starting LiveKit")
            livekit.progress = lambda message, elapsed: tell(f"{message} ({elapsed:.0f} s)")
            await stack.enter_async_context(livekit)
            await _page_files(settings, tell)
            tell("preparing the avatar")
            studio = await stack.enter_async_context(Studio(settings))
            await _prepare(studio, settings, first, tell)
            queues = await _queues(stack, studio, settings, livekit) if fed else []

        def on_ready(url: str) -> None:
            _out.print(f"page:    {url}{page}", soft_wrap=True)
            _out.print(f"LiveKit: {livekit.url} ({livekit.origin})")
            for queue in queues:
                _out.print(f"queue:   {queue}")
            _out.print("Ctrl-C ends it.")
            ready(url)

        await serve_http(
            settings,
            livekit_url=livekit.url,
            api_key=livekit.api_key,
            api_secret=livekit.api_secret,
            on_ready=on_ready,
            public_url=public_url,
            studio=studio,
            signals=False,
        )


async def _queues(
    stack: contextlib.AsyncExitStack, studio: Studio, settings: Settings, livekit: LiveKitServer
) -> list[str]:
    """Put on air who speaks from RabbitMQ; where no broker is named, nobody does."""
    if not settings.amqp_url:
        return []
    from .feed import Feeds
    from .room import RoomOptions

    def room(name: str) -> RoomOptions:
        return RoomOptions(livekit.url, name, livekit.api_key, livekit.api_secret)

    feeds = (await stack.enter_async_context(Feeds(studio, settings, room=room))).feeds
    there = await asyncio.gather(*(feed.connected(3.0) for feed in feeds))
    away = " (the broker is not there yet: it is tried again and again)"
    return [
        feed.options.queue + ("" if up else away) for feed, up in zip(feeds, there, strict=True)
    ]


async def _page_files(settings: Settings, tell: Callable[[str], None]) -> None:
    """What the page needs and isn't shipped; without it the rest still works."""
    from .server.vendor import ASSETS, ensure

    tell("looking for the page's files")
    for name in ASSETS:
        try:
            await asyncio.to_thread(ensure, name, settings.cache_dir)
        except VoipAvatarError as error:
            _err.print(f"[yellow]the page won't work:[/] {escape(str(error))}")


async def _prepare(
    studio: Studio, settings: Settings, first: str, tell: Callable[[str], None]
) -> None:
    """The first persona, so that the first visitor doesn't wait for it."""

    def progress(what: str, done: float) -> None:
        tell(f"preparing the avatar: {what} {done:.0%}")

    await studio.prepare(load_persona(first, settings), progress)


def _ipv4(host: str) -> str:
    """Where our LiveKit server listens when the page is at `host`."""
    return "0.0.0.0" if host in ("::", "") else host


def _open_browser(url: str) -> None:
    """Show the page if there is a screen. A text browser would take over this terminal."""
    screen = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not screen:
        return
    import webbrowser

    # Starting one can take seconds, and may hang: the loop and our end don't wait for it.
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


# --- say and messages -----------------------------------------------------------------------------


@cli.command()
@click.argument("text")
@click.option("--amqp", metavar="URL", help="By queue, at this broker (VOIPAVATAR_AMQP_URL).")
@click.option("--http", metavar="URL", help="By HTTP, at this server.")
@click.option("--queue", help="The queue (VOIPAVATAR_QUEUE, RABBITMQ_QUEUE).")
@click.option("--session", help="Who speaks; else the queue's own, or the only one there is.")
@click.option("--persona", help="A session of this persona speaks (by queue).")
@click.option(
    "--mode",
    type=click.Choice(["append", "interrupt", "replace"]),
    default="append",
    show_default=True,
)
@click.option("--id", "message_id", help="The message's id: sent twice, it is spoken once.")
@click.option("--timeout", type=click.FloatRange(1, 86_400), default=300.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Every event as a line of JSON.")
@click.pass_obj
def say(
    settings: Settings,
    text: str,
    amqp: str | None,
    http: str | None,
    queue: str | None,
    session: str | None,
    persona: str | None,
    mode: Mode,
    message_id: str | None,
    timeout: float,
    as_json: bool,
) -> int:
    """Let an avatar that is on air say TEXT (- reads it), and follow it to its end.

    Exits with 0 when it was spoken, 1 failed, 3 interrupted, 4 expired, 5 duplicate, 6 no answer.
    """
    from .say import EXIT, NO_ANSWER, by_http, by_queue, line

    if amqp is not None and http is not None:
        raise click.UsageError("Give one of --amqp and --http.")
    if text == "-":
        text = sys.stdin.read(settings.max_text + 1)

    async def saying() -> str:
        with _steps() as show:

            def tell(event: dict[str, Any]) -> None:
                if as_json:
                    print(json.dumps(event, ensure_ascii=False), flush=True)
                elif event["type"] != "caption":
                    show(line(event))

            url = amqp or (settings.amqp_url if http is None else "")
            if url:
                outcome = await by_queue(
                    settings, url, text, queue=queue or settings.queue, mode=mode,
                    session=session, persona=persona, id=message_id, timeout=timeout, tell=tell,
                )  # fmt: skip
            else:
                where = http or f"http://{settings.host}:{settings.port}"
                outcome = await by_http(
                    settings, where, text, mode=mode, session=session, timeout=timeout, tell=tell
                )
        return outcome or ""

    outcome = _run(saying())
    if outcome is None:
        return INTERRUPTED
    if not as_json:
        _out.print(outcome or "no answer in time: it may still be spoken")
    return EXIT.get(outcome, NO_ANSWER)


@cli.group()
def messages() -> None:
    """What crosses the queue."""


@messages.command("schema")
def messages_schema() -> None:
    """Print the JSON schema of every message and event."""
    from .messages import schema as messages_schema

    _print_json(messages_schema())


# --- render ---------------------------------------------------------------------------------------


@cli.command()
@click.option("--persona", default="default", show_default=True, help="Name, or a YAML file.")
@click.option("--text", help="What to say; - reads it from standard input.")
@click.option(
    "--audio",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Speech in any format.",
)
@click.option("--voice", help="Another voice than the persona's: piper, espeak, edge, ...")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    required=True,
    help="The MP4 to write; one that is there is replaced.",
)
@click.pass_obj
def render(
    settings: Settings,
    persona: str,
    text: str | None,
    audio: Path | None,
    voice: str | None,
    out: Path,
) -> int:
    """Make a clip (MP4, H.264 and AAC) of an avatar that says a text or a recording."""
    if (text is None) == (audio is None):
        raise click.UsageError("Give one of --text and --audio.")
    if voice is not None and text is None:
        raise click.UsageError("--voice goes with --text.")
    if text == "-":
        text = sys.stdin.read(settings.max_text + 1)
    who = load_persona(persona, settings)
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"the folder {out.absolute().parent} is not there: make it first")
    voices = [VoiceChoice(use=voice)] if voice else None
    length = _run(_render(who, out, text, audio, voices, settings))
    if length is None:
        return INTERRUPTED
    _out.print(f"{out} ({length:.1f} s)", soft_wrap=True)
    return 0


async def _render(
    persona: Persona,
    out: Path,
    text: str | None,
    audio: Path | None,
    voices: Sequence[VoiceChoice] | None,
    settings: Settings,
) -> float:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from .session import render as render_clip

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.1f} s"),
        TimeElapsedColumn(),
    )
    off = not _err.is_terminal  # it would leave an empty line in a log
    with Progress(*columns, console=_err, transient=True, disable=off) as bar:
        task = bar.add_task("rendering", total=1.0)

        def progress(made: float, known: float) -> None:
            bar.update(task, completed=made, total=max(known, made))

        # Beside the target until it's whole: a failure leaves what was there before.
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".rendering-") as folder:
            made_here = Path(folder) / out.name
            length = await render_clip(
                persona,
                made_here,
                text=text,
                audio=audio,
                voice=voices,
                settings=settings,
                progress=progress,
            )
            os.replace(made_here, out)
            return length


# --- prepare and personas -------------------------------------------------------------------------


@cli.command()
@click.option("--persona", default="default", show_default=True, help="Name, or a YAML file.")
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a picture of what was found, the mouth's shapes and a blink (viseme).",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def prepare(settings: Settings, persona: str, sheet: Path | None, as_json: bool) -> int:
    """Find the face in a persona's portrait and make ready what drawing needs.

    It would happen by itself at first use; here one sees what comes of it.
    """
    who = load_persona(persona, settings)
    return _prepared(settings, who, sheet, as_json)


def _prepared(settings: Settings, who: Persona, sheet: Path | None, as_json: bool) -> int:
    if sheet is not None and who.engine != "viseme":
        raise ConfigError(f"--sheet is for the viseme engine; {who.name} uses {who.engine}")
    done = _run(_preparing(settings, who, sheet))
    if done is None:
        return INTERRUPTED
    if as_json:
        _print_json(done)
        return 0
    for line in done["advice"]:
        _err.print(f"[yellow]note:[/] {escape(line)}", soft_wrap=True)
    _out.print(f"{who.name} is ready: {escape(done['path'])}", soft_wrap=True)
    if sheet is not None:
        _out.print(f"sheet: {escape(str(sheet))}", soft_wrap=True)
    return 0


async def _preparing(settings: Settings, who: Persona, sheet: Path | None) -> dict[str, Any]:
    from .session import Studio

    with _steps() as tell:

        def progress(what: str, done: float) -> None:
            tell(f"preparing {who.name}: {what} ({done:.0%})")

        async with Studio(settings) as studio:
            avatar = await studio.prepare(who, progress)
            for name in who.idles:
                tell(f"preparing {who.name}: {name}")
                await studio.prepare(who.look(name))
        advice: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            manifest = json.loads((avatar.path / "manifest.json").read_text("utf-8"))
            advice = list(manifest.get("advice", []))
        if sheet is not None and who.portrait is not None:
            tell("drawing the sheet")
            from .engines.viseme import VisemeEngine
            from .sheet import write_sheet

            portrait = who.beside(who.portrait)
            options = who.engine_settings()
            await asyncio.to_thread(write_sheet, VisemeEngine(), avatar, portrait, options, sheet)
    return {"persona": who.name, "path": str(avatar.path), "advice": advice}


# --- personas, doctor, bench ----------------------------------------------------------------------


@cli.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def personas(context: click.Context, as_json: bool) -> None:
    """List the personas. `personas new` makes one from a picture or a clip."""
    if context.invoked_subcommand is not None:
        return
    found = list_personas(context.obj)
    if as_json:
        # Without the options: they may hold keys.
        _print_json(
            [
                {
                    "name": one.name,
                    "title": one.title,
                    "description": one.description,
                    "engine": one.engine,
                    "voices": [voice.use for voice in one.voice],
                    "width": one.width,
                    "height": one.height,
                    "fps": one.fps,
                    "path": str(one.path) if one.path else None,
                }
                for one in found
            ]
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "engine", "voices", "picture", "description"):
        table.add_column(column)
    for one in found:
        size = f"{one.width}x{one.height}, {one.fps} fps"
        about = ": ".join(filter(None, (one.title, one.description)))
        table.add_row(
            *map(escape, (one.name, one.engine, ", ".join(v.use for v in one.voice), size, about))
        )
    _out.print(table)


@personas.command()
def schema() -> None:
    """Print the JSON schema of a persona's YAML, for editors."""
    _print_json(persona_schema())


@personas.command("new")
@click.option(
    "--from",
    "picture",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The portrait, a picture or a clip; it stays where it is.",
)
@click.option("--name", help="How it is asked for; the picture's name otherwise.")
@click.option("--title", default="", help="How people call it.")
@click.option("--voice", multiple=True, help="Once or more: piper, espeak, edge, ...")
@click.option("--size", default="1280x720", show_default=True, help="WIDTHxHEIGHT, even.")
@click.option("--face-at", help="X,Y in the picture: which of several faces.")
@click.option("--force", is_flag=True, help="Replace a YAML that is there.")
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a picture of what was found.",
)
@click.pass_obj
def personas_new(
    settings: Settings,
    picture: Path,
    name: str | None,
    title: str,
    voice: tuple[str, ...],
    size: str,
    face_at: str | None,
    force: bool,
    sheet: Path | None,
) -> int:
    """Make a persona from a picture or a clip: writes its YAML beside it, and prepares it."""
    from .newpersona import persona_name, persona_text, write_persona

    called = name or persona_name(picture)
    file = picture.parent / f"{called}.yaml"
    width, height = _pair(size, "x", "--size 1280x720")
    point = _pair(face_at, ",", "--face-at 640,300") if face_at else None
    text = persona_text(
        called,
        picture,
        title=title,
        voice=voice or ("piper", "espeak"),
        size=(width, height),
        face_at=point,
    )
    write_persona(file, text, force=force)
    try:
        code = _prepared(settings, load_persona(file, settings), sheet, False)
    finally:
        _out.print(f"persona: {escape(str(file))}", soft_wrap=True)
    return code


def _pair(text: str, mark: str, example: str) -> tuple[int, int]:
    first, _, second = text.lower().partition(mark)
    if not (first.strip().isdigit() and second.strip().isdigit()):
        raise click.UsageError(f"Give two whole numbers, as in {example}.")
    return int(first), int(second)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--rtmp", metavar="URL", help="Push to this address for five seconds instead.")
@click.pass_obj
def doctor(settings: Settings, as_json: bool, rtmp: str | None) -> int:
    """Look at everything that an avatar needs here, and name the mends. Fails if one is needed.

    With --rtmp, try a broadcast's address and say what is wrong with it: `@FILE` or `${NAME}`
    keep its key out of the shell's history.
    """
    if rtmp is not None:
        return _probe(rtmp, as_json)
    from .doctor import examine, report

    with _steps() as tell:
        tell("looking")
        checks = examine(settings)
    told = report(checks)
    if as_json:
        _print_json(told)
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column()
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]FAIL[/]"}
        for check in checks:
            mend = f"\n→ {escape(check.mend)}" if check.mend else ""
            table.add_row(marks[check.state], escape(check.name), f"{escape(check.detail)}{mend}")
        _out.print(table)
    return 0 if told["ok"] else 1


def _probe(rtmp: str, as_json: bool) -> int:
    from .outputs import read_urls
    from .probe import probe
    from .rtmp import StreamUrl

    url = StreamUrl.parse(read_urls([rtmp])[0])
    found = _run(probe(url))
    if found is None:
        return INTERRUPTED
    if as_json:
        _print_json([dataclasses.asdict(one) for one in found])
    else:
        for one in found:
            mark = "[green]ok[/]" if one.ok else "[red]FAIL[/]"
            _out.print(f"{mark} {escape(one.step)}: {escape(one.text)}")
    return 0 if all(one.ok for one in found) else 1


@cli.command()
@click.option("--persona", default="default", show_default=True)
@click.option(
    "--to", "targets", multiple=True, metavar="URL",
    help="rtmp(s)://HOST/APP/KEY, srt://..., youtube://KEY, twitch://KEY; @FILE, - or ${NAME} "
    "keep keys out of sight. Repeatable: one encode feeds all.",
)  # fmt: skip
@click.option("--queue", metavar="URL", help="Speak from a RabbitMQ queue: amqp://HOST/VHOST.")
@click.option("--preset", default="youtube", show_default=True, help="youtube, twitch, low-latency")
@click.option("--shape", type=click.Choice(["16:9", "9:16", "1:1"]), help="Canvas; as the avatar's")
@click.option("--height", default=720, show_default=True, help="Short side of the canvas.")
@click.option("--fps", type=click.Choice(["25", "30", "50", "60"]), help="As the avatar's.")
@click.option("--background", default="", help="#rrggbb, a picture or a video.")
@click.option("--captions", is_flag=True, help="Burn the words into the picture.")
@click.option("--codec", type=click.Choice(["x264", "nvenc"]), default="x264", show_default=True)
@click.option("--persist", is_flag=True, help="Go on even when the very first attempt fails.")
@click.option("--rotate-hours", type=float, help="Begin a new broadcast after so many hours.")
@click.pass_obj
def stream(
    settings: Settings, /, persona: str, targets: tuple[str, ...], queue: str | None, **look: Any
) -> int:
    """Put an avatar on air, directly, until Ctrl-C; it idles until something speaks.

    Without --to, to the persona's own `outputs:` (the first entry's addresses and look). With
    --queue, it speaks what comes to the queue (VOIPAVATAR_QUEUE, or the persona's `queue:`).
    """
    from .feed import feeding
    from .outputs import OutputWish, persona_wishes, read_urls, stream
    from .session import Session, Studio

    who = load_persona(persona, settings)
    if targets:
        fps = look.pop("fps")
        wish = OutputWish.model_validate(
            {"urls": read_urls(targets), "fps": int(fps) if fps else None, **look}
        )
    elif wishes := persona_wishes(who):
        wish = wishes[0]
    else:
        raise click.UsageError(
            "Say where to: --to rtmp://HOST/APP/KEY, or `outputs:` in the persona."
        )
    if queue is not None:
        settings = dataclasses.replace(settings, amqp_url=queue)

    async def streaming() -> None:
        async with contextlib.AsyncExitStack() as stack:
            studio = await stack.enter_async_context(Studio(settings))
            on_session: Callable[[Session], None] = lambda session: None  # noqa: E731
            if queue is not None:
                place = await stack.enter_async_context(
                    feeding(studio, who, settings, who.queue or settings.queue)
                )
                on_session = place.adopt
            await stream(
                studio, who, wish, stop=asyncio.Event(), on_session=on_session,
                on_event=lambda event: _out.print(
                    escape(" ".join(f"{key}={value}" for key, value in event.items()))
                ),
            )  # fmt: skip

    _run(streaming())
    return 0  # Ctrl-C is how it ends


@cli.command()
@click.pass_obj
def fetch(settings: Settings) -> int:
    """Get now what demo and tests would get at first use.

    A livekit-server, unless LIVEKIT_URL names one, the page's files, and the small networks that
    find a face in a picture. The first time it may take minutes (a build); then everything works
    without a network.
    """
    from .facemodels import face_models

    async def fetching() -> None:
        from .livekit_server import obtain

        with _steps() as tell:
            if not settings.livekit_url:
                await obtain(
                    settings.cache_dir,
                    lambda message, elapsed: tell(f"{message} ({elapsed:.0f} s)"),
                )
            await _page_files(settings, tell)
            tell("looking for the face models")
            await asyncio.to_thread(face_models, settings, tell)

    _run(fetching())
    return 0


@cli.group(cls=_Group)
def bench() -> None:
    """Measure this machine."""


@bench.command("stage")
@click.option("--persona", default="default", show_default=True)
@click.option("--seconds", type=click.FloatRange(1, 3600), default=30.0, show_default=True)
@click.option("--room", is_flag=True, help="Publish into a room, and count what that costs.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def bench_stage(settings: Settings, persona: str, seconds: float, room: bool, as_json: bool) -> int:
    """Stage times a frame, CPU a session, frames late."""
    return _bench("stage", settings, as_json, persona=persona, seconds=seconds, room=room)


@bench.command("sync")
@click.option("--minutes", type=click.FloatRange(0.1, 600), default=2.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def bench_sync(settings: Settings, minutes: float, as_json: bool) -> int:
    """Offset of sound and picture at a viewer in a real room, by flash and beep."""
    return _bench("sync", settings, as_json, minutes=minutes)


@bench.command(
    "engine", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@click.option("--engine", "name", help="musetalk: its own measurement, with options of its own.")
@click.option("--persona", default="default", show_default=True)
@click.option(
    "--portrait",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A picture or a clip, in place of a persona.",
)
@click.option("--size", help="WIDTHxHEIGHT of the picture, as 1920x1080; the persona's own.")
@click.option("--seconds", type=click.FloatRange(0.05, 3600), default=10.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def bench_engine(
    context: click.Context,
    name: str | None,
    persona: str,
    portrait: Path | None,
    size: str | None,
    seconds: float,
    as_json: bool,
) -> int:
    """Milliseconds a picture of a persona's engine takes here, and sessions a core.

    With `--engine musetalk` it is `bench musetalk`, which has more options (--runtime, --recipe).
    """
    if name == "musetalk":
        from .musetalk_cli import bench_musetalk

        # those that it doesn't have are refused there, not forgotten here
        said = {
            key: ["--" + key, str(context.params[key])]
            for key in ("persona", "portrait", "size", "seconds")
            if context.get_parameter_source(key) is not ParameterSource.DEFAULT
        }
        args = [*context.args, *itertools.chain(*said.values()), *["--json"] * as_json]
        code = bench_musetalk.main(
            args, prog_name="voipavatar bench musetalk", standalone_mode=False, obj=context.obj
        )
        return int(code or 0)
    if context.args:
        raise click.UsageError(f"No such option: {context.args[0]}")
    chosen = name if name not in (None, "viseme") else persona
    return _bench(
        "engine", context.obj, as_json, persona=chosen, portrait=portrait, size=_size(size),
        seconds=seconds,
    )  # fmt: skip


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, by, height = text.lower().partition("x")
    if not (by and width.isdecimal() and height.isdecimal()):
        raise click.BadParameter("give WIDTHxHEIGHT, as 1920x1080", param_hint="--size")
    return int(width), int(height)


@bench.command("broadcast")
@click.option("--minutes", type=click.FloatRange(0.5, 3000), default=6.0, show_default=True)
@click.pass_obj
def bench_broadcast(settings: Settings, minutes: float) -> int:
    """Broadcasts through cuts, stalls and restarts, to a real RTMP server (nginx) on loopback."""
    from . import broadcast_bench

    async def measuring() -> Mapping[str, Any]:
        with _steps() as tell:
            return await broadcast_bench.bench(minutes, tell)

    found = _run(measuring())
    if found is None:
        return INTERRUPTED
    _print_json(found)
    return 0


@bench.command("face")
@click.option(
    "--portrait",
    "portraits",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A further picture or clip; once or more.",
)
@click.option("--persona", "names", multiple=True, help="Only these of the personas.")
@click.option(
    "--voice",
    "voices",
    multiple=True,
    help="piper, espeak, flite or flite:slt; once or more (all three).",
)
@click.option("--short", is_flag=True, help="Two sentences: a quick look, with few closures.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def bench_face(
    settings: Settings,
    portraits: tuple[Path, ...],
    names: tuple[str, ...],
    voices: tuple[str, ...],
    short: bool,
    as_json: bool,
) -> int:
    """How well faces speak, measured on the pictures: lips at p, b and m, timing, stillness.

    Ends with status 1 if a row is not within the limits that are printed under the table.
    """
    from .facebench import SHORT, TEXT, VOICES, face, passed, report, table

    async def measuring() -> list[dict[str, Any]]:
        with _steps() as tell:
            return await face(
                settings,
                portraits=portraits,
                personas=names,
                voices=voices or VOICES,
                text=SHORT if short else TEXT,
                tell=tell,
            )

    rows = _run(measuring())
    if rows is None:
        return INTERRUPTED
    if as_json:
        _print_json(report(rows))
    else:
        print(table(rows))
    return 0 if passed(rows) else 1


@bench.command("queue")
@click.option("--amqp", metavar="URL", help="The broker (VOIPAVATAR_AMQP_URL; this machine's).")
@click.option("--persona", default="default", show_default=True)
@click.option("--messages", type=click.IntRange(3, 10_000), default=20, show_default=True)
@click.option("--soak", type=click.FloatRange(0, 1_440), default=0.0, help="Minutes, two a second.")
@click.option("--hours", type=click.FloatRange(0, 48), default=0.0, help="Of speech, faked time.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_obj
def bench_queue(
    settings: Settings,
    amqp: str | None,
    persona: str,
    messages: int,
    soak: float,
    hours: float,
    as_json: bool,
) -> int:
    """From a message at the broker to its first talking frame."""
    url = amqp or settings.amqp_url or "amqp://guest:guest@127.0.0.1:5672/"
    return _bench(
        "queue", settings, as_json, url=url, persona=persona, messages=messages, soak=soak,
        hours=hours,
    )  # fmt: skip


def _bench(name: str, settings: Settings, as_json: bool, **options: Any) -> int:
    from . import bench as measures
    from . import bench_queue

    where = bench_queue if name == "queue" else measures
    measure: Callable[..., Coroutine[Any, Any, Mapping[str, Any]]] = getattr(where, name)

    async def measuring() -> Mapping[str, Any]:
        with _steps() as tell:
            return await measure(settings, tell=tell, **options)

    found = _run(measuring())
    if found is None:
        return INTERRUPTED
    if as_json:
        _print_json(found)
        return 0
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in found.items():
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        table.add_row(escape(key.replace("_", " ")), escape(shown))
    _out.print(table)
    return 0


@cli.command()
@click.option(
    "--avatar",
    "avatars",
    multiple=True,
    help="voipavatar, livekit (its AvatarRunner), or an identity in --room. Both by default.",
)
@click.option("--room", default="", help="Where that identity is; at LIVEKIT_URL.")
@click.option("--interruptions", type=click.IntRange(1, 1000), default=30, show_default=True)
@click.option("--seconds", type=click.FloatRange(2, 600), default=20.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--markdown", "as_markdown", is_flag=True, help="For a page.")
@click.pass_obj
def conformance(
    settings: Settings,
    avatars: tuple[str, ...],
    room: str,
    interruptions: int,
    seconds: float,
    as_json: bool,
    as_markdown: bool,
) -> int:
    """Try the playback contract on LiveKit avatars, side by side, in one run."""
    from .conformance import HOSTED, ROWS, compare, markdown

    async def trying() -> list[dict[str, Any]]:
        with _steps() as tell:
            return await compare(
                settings,
                avatars or HOSTED,
                room=room,
                interruptions=interruptions,
                seconds=seconds,
                tell=tell,
            )

    found = _run(trying())
    if found is None:
        return INTERRUPTED
    if as_json:
        _print_json(found)
        return 0
    if as_markdown:
        click.echo(markdown(found))
        return 0
    table = Table(box=None, pad_edge=False)
    table.add_column("milliseconds, where nothing else is said")
    for one in found:
        table.add_column(escape(str(one["avatar"])))
    for key, label in ROWS.items():
        if any(key in one for one in found):
            cells = ("" if one.get(key) is None else str(one[key]) for one in found)
            table.add_row(escape(label), *map(escape, cells))
    _out.print(table)
    return 0


@cli.command()
def version() -> None:
    """Print the version."""
    _out.print(f"voipavatar {__version__}")


# --- what the commands share ----------------------------------------------------------------------


def _run(work: Coroutine[Any, Any, T], end_now: Callable[[], None] | None = None) -> T | None:
    """Run to the end, or to the first signal: None then, and everything has been closed.

    A second signal ends the process where it stands, after `end_now`.
    """
    return asyncio.run(_with_signals(work, end_now))


async def _with_signals(
    work: Coroutine[Any, Any, T], end_now: Callable[[], None] | None
) -> T | None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    asked = False

    def stop(number: signal.Signals) -> None:
        nonlocal asked
        if asked:
            if end_now is not None:
                end_now()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        _err.print("stopping; once more stops at once")
        asked = True
        task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not asked:
            raise
        return None
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Says what is being done: one line that changes on a terminal, new lines elsewhere."""
    if _err.is_terminal:
        with _err.status("") as status:
            yield lambda message: status.update(escape(message))
        return
    said = ""

    def tell(message: str) -> None:
        # In a log a line a second helps nobody: only what is new up to its first detail.
        nonlocal said
        head = message.partition(" (")[0].partition(":")[0]
        if head != said:
            said = head
            print(message, file=sys.stderr, flush=True)

    yield tell


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _level(name: str) -> int:
    level = logging.getLevelName(name.upper())
    if not isinstance(level, int):
        raise ConfigError(f"VOIPAVATAR_LOG_LEVEL={name!r}: debug, info, warning or error")
    return level


_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    """Static message first, then what came as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        extra = [f"{key}={value}" for key, value in vars(record).items() if key not in _STANDARD]
        line, newline, traceback = super().format(record).partition("\n")
        return " ".join([line, *extra]) + newline + traceback


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("voipavatar").setLevel(level)
