"""The stage, tick by tick on a clock turned by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from voipavatar.engines import Job
from voipavatar.errors import EngineError, InputError, StageError
from voipavatar.media import Audio, Begin, Cancel, Cue, End, Frame, Mode, Speech, slice_start
from voipavatar.stage import MOVES, Options, State, Turn, move

from .players import FakeSession, Owner, Player, tone


def test_every_legal_move_and_no_other() -> None:
    for one, other in itertools.product(State, State):
        if other in MOVES[one]:
            assert move(one, other) is other
        else:
            with pytest.raises(StageError, match=f"{one.name} can't become {other.name}"):
                move(one, other)


async def test_idle_frames_carry_silence_and_one_picture_clock() -> None:
    player = Player()
    frames = await player.tick(50)
    assert [frame.index for frame in frames] == list(range(50))
    assert all(frame.turn is None and not frame.audio.any() for frame in frames)
    assert {len(frame.audio) for frame in frames} == {1920}
    assert player.clocks() == list(range(50))


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 44_100, 48_000])
@pytest.mark.parametrize("fps", [20, 25, 30, 50])
async def test_a_turn_is_played_whole_and_in_order(rate: int, fps: int) -> None:
    player = Player(fps=fps)
    number = player.say(1.03, rate)
    frames = await player.tick(2 * fps)
    spoken = [frame for frame in frames if frame.turn == number]
    assert len(spoken) == -(-round(1.03 * 48_000) * fps // 48_000)
    assert [int(frame.image[0, 2]) for frame in spoken] == list(range(len(spoken)))
    sound = np.concatenate([frame.audio for frame in spoken]).astype(float)
    wanted = tone(1.03, 48_000).astype(float)
    error = sound[500 : len(wanted) - 500] - wanted[500:-500]
    assert np.sqrt(np.mean(error**2)) < 0.02 * 32767
    [(_, _, heard, interrupted)] = player.owner.ends()
    assert heard == pytest.approx(1.03, abs=0.001) and interrupted is False
    assert player.owner.log[0] == ("started", number)
    assert player.states == [State.PROCESSING, State.TALKING, State.TRANSITIONING, State.IDLE]
    assert player.clocks() == [i % 256 for i in range(2 * fps)]


async def test_pictures_go_with_their_own_samples() -> None:
    """A click in frame 7 of the sound is in the frame that shows picture 7."""
    player = Player(lookahead=1280)
    pcm = np.zeros(16_000, np.int16)
    pcm[640 * 7 + 100 : 640 * 7 + 300] = 20_000
    number = player.stage.begin(player.owner)
    player.stage.push(number, pcm, 16_000)
    player.stage.end(number)
    for frame in await player.tick(40):
        loud = int(np.abs(frame.audio).max()) > 5_000
        assert loud == (frame.turn is not None and frame.image[0, 2] == 7)
        assert loud == bool(frame.image[0, 3] > 100)


async def test_the_same_frames_however_the_sound_is_cut() -> None:
    wanted = None
    for size in (160, 333, 2_000, 22_050):
        player = Player()
        number = player.stage.begin(player.owner)
        pcm = tone(1.0, 22_050)
        for begin in range(0, len(pcm), size):
            player.stage.push(number, pcm[begin : begin + size], 22_050)
        player.stage.end(number)
        frames = [frame for frame in await player.tick(40) if frame.turn]
        got = [(frame.image.tobytes(), frame.audio.tobytes()) for frame in frames]
        wanted = wanted or got
        assert [a for _, a in got] == [a for _, a in wanted]
        assert [i[2:4] for i, _ in got] == [i[2:4] for i, _ in wanted]


async def test_two_turns_follow_without_a_gap() -> None:
    player = Player()
    first, second = player.say(0.4), player.say(0.4)
    turns = [frame.turn for frame in await player.tick(30)]
    spoken = turns[turns.index(first) : turns.index(first) + 20]
    assert spoken == [first] * 10 + [second] * 10
    assert [entry[:2] for entry in player.owner.log] == [
        ("started", first),
        ("finished", first),
        ("started", second),
        ("finished", second),
    ]
    assert player.states.count(State.TALKING) == 1


async def test_a_live_voice_starts_after_lookahead_and_margin_only() -> None:
    player = Player(lookahead=1280)
    await player.tick(5)
    number = player.stage.begin(player.owner)
    begun = None
    for i in range(40):
        player.stage.push(number, tone(0.04), 16_000)
        [frame] = await player.tick()
        if begun is None and frame.turn is not None:
            begun = i
    assert begun is not None and begun * 0.04 <= 0.30
    assert player.stage.counters.paused == 0


async def test_a_stalled_voice_pauses_the_turn_and_loses_nothing() -> None:
    player = Player()
    pcm = tone(1.0)
    number = player.stage.begin(player.owner)
    player.stage.push(number, pcm[:8000], 16_000)
    frames = await player.tick(40)
    assert player.stage.state is State.TALKING
    player.stage.push(number, pcm[8000:], 16_000)
    player.stage.end(number)
    frames += await player.tick(40)
    spoken = [frame for frame in frames if frame.turn == number]
    assert [int(frame.image[0, 2]) for frame in spoken] == list(range(25))
    assert player.stage.counters.paused > 10
    assert player.owner.ends() == [("finished", number, 1.0, False)]
    assert player.clocks() == list(range(80))


async def test_pausing_holds_the_sound_and_loses_nothing() -> None:
    player = Player()
    whole = [frame.audio for frame in await _said(Player()) if frame.turn]
    number = player.say(0.8)
    before = await player.tick(8)
    player.stage.pause()
    player.stage.pause()
    held = await player.tick(25)
    assert player.stage.paused and player.stage.waiting() == [number]
    assert sum(frame.turn is not None for frame in held) <= player.stage.options.ahead
    assert not any(frame.turn for frame in held[5:])
    assert 0 < player.stage.played_of(number) < 0.8
    player.stage.resume()
    after = await player.tick(30)
    spoken = [frame.audio for frame in (*before, *held, *after) if frame.turn]
    assert len(spoken) == len(whole)
    assert all((one == other).all() for one, other in zip(spoken, whole, strict=True))
    [(_, _, heard, interrupted)] = player.owner.ends()
    assert heard == pytest.approx(0.8, abs=0.001) and not interrupted
    assert player.clocks() == list(range(63))


async def _said(player: Player) -> list[Frame]:
    player.say(0.8)
    return await player.tick(60)


async def test_what_is_cancelled_while_paused_is_over_and_the_next_waits() -> None:
    player = Player()
    player.stage.pause()
    first, second = player.say(0.4), player.say(0.4)
    assert not any(frame.turn for frame in await player.tick(10))
    player.stage.cancel(first)
    player.stage.resume()
    frames = await player.tick(25)
    assert {frame.turn for frame in frames} == {None, second}
    assert [end[1:] for end in player.owner.ends()] == [
        (first, 0.0, True),
        (second, pytest.approx(0.4, abs=0.001), False),
    ]


async def test_a_late_picture_never_holds_the_sound() -> None:
    player = Player(slow=lambda job: job.speech and job.data[0] % 3 == 2)
    number = player.say(1.0)
    frames = [frame for frame in await player.tick(40) if frame.turn == number]
    assert len(frames) == 25
    assert player.stage.counters.late == 8
    shown = [int(frame.image[0, 2]) for frame in frames]
    assert shown == [i - (i % 3 == 2) for i in range(25)]
    late = [one for one in player.pictures if not one.done]
    assert late and all(one.dropped for one in late)


@pytest.mark.parametrize(("every", "told"), [(2, True), (6, False)])
async def test_a_turn_that_came_too_late_is_told(
    every: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Sound goes on whatever happens; who runs the machine must learn of it from the log."""
    player = Player(slow=lambda job: job.speech and job.data[0] % every == 1)
    player.say(2.0)
    await player.tick(70)
    lines = [one for one in caplog.records if "does not keep up" in one.message]
    assert len(lines) == told
    if told:
        told_of = vars(lines[0])
        assert (told_of["late"], told_of["pictures"]) == (25, 50)


async def test_the_first_picture_is_waited_for_but_not_for_ever() -> None:
    player = Player(slow=lambda job: job.speech)
    number = player.say(0.2)
    frames = await player.tick(40)
    first = next(i for i, frame in enumerate(frames) if frame.turn == number)
    assert 12 <= first <= 16
    assert player.owner.ends() == [("finished", number, 0.2, False)]


async def test_interruption_drops_what_was_drawn_and_closes_the_mouth() -> None:
    player = Player(delay=0.06)
    number = player.say(2.0)
    await player.tick(20)
    emitted = sum(frame.turn == number for frame in player.sink.frames)
    shown = player.clocks()[-1]
    player.stage.cancel(number)
    assert player.owner.ends()[-1][2:] == (
        pytest.approx(emitted * 0.04 - player.sink.cleared[-1], abs=1e-4),
        True,
    )
    frames = await player.tick(10)
    assert all(frame.turn is None and not frame.audio.any() for frame in frames)
    assert not any(frame.image[0, 1] for frame in frames)
    assert int(frames[0].image[0, 0]) == shown + 1  # the picture clock goes on from what was shown
    assert player.engine.resets == [shown + 1]
    assert player.states[-2:] == [State.TRANSITIONING, State.IDLE]


async def test_cancel_at_every_tick_gives_exactly_one_finished() -> None:
    for moment in range(45):
        player = Player(delay=0.05)
        number = player.stage.begin(player.owner)
        for i in range(moment):
            if i == 2:
                player.stage.push(number, tone(1.0), 16_000)
            if i == 4:
                player.stage.end(number)
            await player.tick()
        player.stage.cancel(number)
        player.stage.cancel(number)
        await player.tick(50)
        [(_, turn, heard, interrupted)] = player.owner.ends()
        emitted = sum(frame.turn == number for frame in player.sink.frames) * 0.04
        assert turn == number and 0 <= float(str(heard)) <= emitted + 1e-9
        assert interrupted is (emitted < 1.0 or float(str(heard)) < 1.0)
        assert (("started", number) in player.owner.log) == (float(str(heard)) > 0)
        assert player.stage.state is State.IDLE


async def test_the_next_turn_survives_the_cut_of_the_one_before() -> None:
    """Its pictures were drawn already, after those that are cut: they are made again, all."""
    player = Player()
    first, second = player.say(0.4), player.say(0.4)
    await player.tick(10)
    assert player.sink.frames[-1].turn == first
    player.stage.cancel(first)
    frames = [frame for frame in await player.tick(40) if frame.turn == second]
    assert [int(frame.image[0, 2]) for frame in frames] == list(range(10))
    assert [entry[1:] for entry in player.owner.ends()][1] == (second, 0.4, False)
    assert np.concatenate([frame.audio for frame in frames]).any()


async def test_the_cut_of_a_waiting_turn_leaves_the_present_one_alone() -> None:
    for moment in range(3, 14):
        player = Player()
        first, second, third = player.say(0.4), player.say(0.4), player.say(0.4)
        await player.tick(moment)
        player.stage.cancel(second)
        await player.tick(50)
        turns = [frame.turn for frame in player.sink.frames]
        assert turns.count(first) == 10 and turns.count(third) == 10
        if moment <= 10:  # it was not on air yet
            assert turns.count(second) == 0
        numbers = [int(frame.image[0, 2]) for frame in player.sink.frames if frame.turn == third]
        assert numbers == list(range(10))
        assert len(player.owner.ends()) == 3


@pytest.mark.parametrize(
    ("mode", "order"),
    [("append", [1, 2, 3]), ("interrupt", [1, 3, 2]), ("replace", [1, 3])],
)
async def test_modes(mode: Mode, order: list[int]) -> None:
    player = Player()
    player.say(1.0)
    player.say(0.4)
    await player.tick(10)
    third = player.say(0.4, mode=mode)
    assert third == 3
    await player.tick(80)
    turns = [frame.turn for frame in player.sink.frames if frame.turn]
    assert list(dict.fromkeys(turns)) == order
    assert turns.count(1) == (25 if mode == "append" else turns.count(1))
    assert turns.count(3) == 10
    assert sorted(entry[1] for entry in player.owner.ends()) == [1, 2, 3]  # type: ignore[type-var]


async def test_turns_without_sound_end_in_their_place() -> None:
    player = Player()
    empty = player.stage.begin(player.owner)
    spoken = player.say(0.4)
    last = player.stage.begin(player.owner)
    player.stage.end(last)
    await player.tick(20)
    assert player.owner.ends() == []
    player.stage.end(empty)
    await player.tick(30)
    assert [entry[1:] for entry in player.owner.ends()] == [
        (empty, 0.0, False),
        (spoken, 0.4, False),
        (last, 0.0, False),
    ]
    assert player.stage.state is State.IDLE


async def test_processing_without_speech_goes_back_to_idle() -> None:
    player = Player()
    number = player.stage.begin(player.owner)
    await player.tick(3)
    player.stage.cancel(number)
    assert player.states == [State.PROCESSING, State.IDLE]


async def test_cues_reach_the_engine_before_their_sound_and_owners_as_heard() -> None:
    player = Player()
    number = player.stage.begin(player.owner)
    cues = [Cue("word", "one", 0.0, 0.2), Cue("phoneme", "w", 0.0, 0.1), Cue("word", "two", 0.3, 1)]
    player.stage.push(number, tone(0.5), 16_000, cues)
    player.stage.end(number)
    heard: list[tuple[str, int]] = []
    for _ in range(30):
        frames = await player.tick()
        spoken = sum(frame.turn == number for frame in player.sink.frames)
        for entry in player.owner.log:
            if entry[0] == "cue" and (str(entry[2]), 0) not in [(t, 0) for t, _ in heard]:
                heard.append((str(entry[2]), spoken))
        assert frames
    assert player.engine.cues == cues
    assert [text for text, _ in heard] == ["one", "two"]
    assert heard[0][1] <= 2 and 7 <= heard[1][1] <= 9


async def test_started_and_finished_wait_for_the_sink_to_play() -> None:
    player = Player(delay=0.2)
    number = player.say(0.4)
    told: dict[str, float] = {}
    put: dict[str, float] = {}
    for _ in range(40):
        now = player.clock.now()
        frames = await player.tick()
        if frames[0].turn == number:
            put.setdefault("first", now)
            put["last"] = now
        for entry in player.owner.log:
            told.setdefault(str(entry[0]), player.clock.now())
    assert told["started"] - put["first"] == pytest.approx(0.2, abs=0.081)
    assert told["started"] - put["first"] >= 0.2
    assert told["finished"] - put["last"] >= 0.24


async def test_too_much_speech_is_refused_and_the_rest_goes_on() -> None:
    player = Player(options=Options(backlog=2.0))
    number = player.stage.begin(player.owner)
    player.stage.push(number, tone(2.5), 16_000)
    with pytest.raises(InputError, match="are waiting already"):
        player.stage.push(number, tone(1.0), 16_000)
    player.stage.end(number)
    await player.tick(100)
    assert player.owner.ends() == [("finished", number, 2.5, False)]


async def test_impossible_sound_is_refused_at_once() -> None:
    player = Player()
    number = player.stage.begin(player.owner)
    with pytest.raises(InputError, match="sample rate of 1 Hz"):
        player.stage.push(number, tone(0.1), 1)
    player.stage.end(number)
    with pytest.raises(InputError, match="after the turn's end"):
        player.stage.push(number, tone(0.1), 16_000)


async def test_a_failing_sink_ends_nothing() -> None:
    player = Player()

    class Broken:
        latency = 0.0

        def put(self, frame: object) -> None:
            raise RuntimeError("full")

        def clear(self) -> float:
            return 0.0

        async def aclose(self) -> None: ...

    player.stage.sinks.append(Broken())
    player.say(0.4)
    await player.tick(20)
    assert player.stage.counters.sink_errors == 20
    assert len(player.sink.frames) == 20 and player.owner.ends()


async def test_an_engine_that_breaks_the_frame_count_wedges_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for change in (-1, +1):
        player = Player()
        whole = player.engine.flush

        def flush(
            change: int = change,
            whole: Callable[[], list[Job]] = whole,
            engine: FakeSession = player.engine,
        ) -> list[Job]:
            jobs = whole()
            return jobs[:-1] if change < 0 else [*jobs, engine._speech()]

        player.engine.flush = flush  # type: ignore[method-assign]
        player.say(0.4)
        player.say(0.4)
        await player.tick(50)
        assert [entry[2] for entry in player.owner.ends()] == [0.4, 0.4]
        assert "broke the frame count" in caplog.text


async def test_steps_of_several_frames() -> None:
    player = Player(step=4, lookahead=3400, options=Options(ahead=8))
    number = player.say(1.0)
    frames = [frame for frame in await player.tick(60) if frame.turn == number]
    assert [int(frame.image[0, 2]) for frame in frames] == list(range(25))


async def test_run_keeps_time_and_starts_anew_after_a_stall() -> None:
    player = Player()
    await player.stage.prime()

    class Stop(Exception): ...

    times: list[float] = []
    tick = player.stage.tick

    def counted() -> object:
        times.append(player.clock.now())
        if len(times) == 10:
            player.clock._now += 1.0  # the loop was held
        if len(times) == 20:
            raise Stop
        return tick()

    player.stage.tick = counted  # type: ignore[assignment, method-assign]
    with pytest.raises(Stop):
        await player.stage.run()
    gaps = np.diff(times)
    assert gaps[:9] == pytest.approx([0.04] * 9)
    assert gaps[9] == pytest.approx(1.0)
    assert gaps[10:] == pytest.approx([0.04] * 9)
    assert player.stage.counters.stalls == 1
    assert player.stage.counters.stalled == pytest.approx(0.96)


class Script:
    """A source that says what it is told."""

    def __init__(self, items: list[Speech]) -> None:
        self.items = items
        self.log: list[tuple[object, ...]] = []

    async def __aiter__(self):  # type: ignore[no-untyped-def]
        for item in self.items:
            yield item

    def started(self, turn: int) -> None:
        self.log.append(("started", turn))

    def finished(self, turn: int, heard: float, interrupted: bool) -> None:
        self.log.append(("finished", turn, round(heard, 3), interrupted))


async def test_a_source_hears_back_by_its_own_numbers() -> None:
    player = Player()
    await player.stage.attach(Script([]))
    source = Script(
        [
            Begin(7),
            Audio(tone(0.4), 16_000, 7),
            End(7),
            Audio(tone(0.4), 16_000, 8),  # its End is lost
            End(9),
            Audio(tone(0.4), 16_000, 10),
            Cancel(10),
            Cancel(99),
        ]
    )
    await player.stage.attach(source)
    await player.tick(60)
    assert source.log == [
        ("finished", 10, 0.0, True),
        ("started", 7),
        ("finished", 7, 0.4, False),
        ("started", 8),
        ("finished", 8, 0.4, False),
        ("finished", 9, 0.0, False),
    ]


async def test_close_finishes_every_turn_and_refuses_more() -> None:
    player = Player()
    player.stage.close()
    player = Player()
    player.say(1.0)
    player.say(1.0)
    await player.tick(10)
    player.stage.close()
    player.stage.close()
    assert len(player.owner.ends()) == 2
    with pytest.raises(StageError, match="closed"):
        player.stage.begin(Owner())


def test_a_turn_agrees_with_itself_on_its_length() -> None:
    """48 kHz frames and 16 kHz engine samples fill the same number of frames, for any length."""
    rng = np.random.default_rng(1)
    for rate in (8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000):
        for fps in (20, 24, 25, 30, 50, 60):
            turn = Turn(1, Owner(), fps)
            for _ in range(3):
                turn.push(tone(float(rng.uniform(0.001, 0.2)), rate), rate)
            turn.ended = True
            fed = 0
            while (piece := turn.feed()) is not None:
                fed += len(piece)
            assert turn.total is not None
            assert slice_start(turn.total, 16_000, fps) >= fed
            assert slice_start(turn.total - 1, 16_000, fps) < fed


# --- another engine session -----------------------------------------------------------------------


@pytest.mark.parametrize(("fps", "before", "after"), [(25, 1280, 0), (25, 0, 3200), (30, 640, 640)])
@pytest.mark.parametrize("at", [0, 3, 12, 24, 40])
async def test_a_swap_loses_and_doubles_nothing(fps: int, before: int, after: int, at: int) -> None:
    wanted = Player(fps=fps, lookahead=before)
    wanted.say(1.0)
    sound = np.concatenate([frame.audio for frame in await wanted.tick(70) if frame.turn])
    player = Player(fps=fps, lookahead=before)
    number = player.say(1.0)
    await player.tick(at)
    shown = sum(frame.turn == number for frame in player.sink.frames)
    other = FakeSession(fps, after)
    player.stage.swap(other, player.submit)
    await player.tick(90 - at)
    frames = [frame for frame in player.sink.frames if frame.turn == number]
    assert np.array_equal(np.concatenate([frame.audio for frame in frames]), sound)
    # The new session sees the turn from the first frame on that the old one didn't show.
    own = [int(frame.image[0, 2]) for frame in frames[shown:]]
    assert own == list(range(len(own)))
    clocks = player.clocks()
    assert clocks == [i % 256 for i in range(len(clocks))], "the picture clock jumped"
    assert player.owner.ends() == [("finished", number, 1.0, False)]
    assert player.stage.state is State.IDLE


async def test_a_swap_keeps_what_waits_and_tells_cues_in_the_new_sessions_time() -> None:
    player = Player(lookahead=0)
    number = player.stage.begin(player.owner)
    cues = [Cue("phoneme", "a", 0.1, 0.2), Cue("phoneme", "b", 1.0, 1.1)]
    player.stage.push(number, tone(1.2), 16_000, cues)
    player.stage.end(number)
    second = player.say(0.2)
    await player.tick(16)
    shown = sum(frame.turn == number for frame in player.sink.frames)
    other = FakeSession(25, 0)
    player.stage.swap(other, player.submit)
    [cue] = other.cues
    assert cue.text == "b" and cue.start == pytest.approx(1.0 - shown / 25)
    await player.tick(40)
    assert player.owner.ends() == [
        ("finished", number, 1.2, False),
        ("finished", second, 0.2, False),
    ]


async def test_a_swap_wants_the_same_size_and_rate() -> None:
    player = Player(fps=25)
    with pytest.raises(StageError, match="prepare the persona at its size"):
        player.stage.swap(FakeSession(30), player.submit)
    await player.tick(3)
    player.stage.close()
    with pytest.raises(StageError, match="closed"):
        player.stage.swap(FakeSession(25), player.submit)


# --- how the face is held -------------------------------------------------------------------------


class Posing(FakeSession):
    """An engine that remembers what it was asked for, by its clock."""

    def __init__(self, fps: int = 25) -> None:
        super().__init__(fps)
        self.posed: list[str] = []

    def pose(self, name: str) -> None:
        self.posed.append(name)

    def gesture(self, name: str) -> None:
        if name != "nod":
            raise EngineError(f"there is no gesture {name!r}")
        self.posed.append(name)


async def test_the_state_poses_the_face() -> None:
    """Thinking while a turn is on its way; what was asked for as soon as it was said."""
    player = Player()
    engine = player.stage.engine = Posing()
    await player.tick(3)
    player.stage.pose("listening")
    player.stage.pose("listening")
    await player.tick(3)
    assert engine.posed == ["listening"]
    number = player.stage.begin(player.owner)
    await player.tick(3)
    assert engine.posed == ["listening", "thinking"]
    player.stage.push(number, tone(0.4, 16_000), 16_000)
    player.stage.end(number)
    await player.tick(40)
    assert engine.posed == ["listening", "thinking", "listening"]
    player.stage.pose("thinking")
    player.say(0.4)
    await player.tick(40)
    assert engine.posed == ["listening", "thinking", "listening", "thinking", ""]
    player.stage.gesture("nod")
    assert engine.posed[-1] == "nod"
    other = Posing()
    player.stage.pose("attentive")
    player.stage.swap(other, player.submit)
    assert other.posed == ["attentive"]


async def test_poses_and_gestures_that_are_not_there() -> None:
    player = Player()
    with pytest.raises(InputError, match="'asleep'.*'listening'"):
        player.stage.pose("asleep")
    player.stage.pose("listening")  # an engine without poses goes on as it is
    await player.tick(3)
    with pytest.raises(InputError, match="no gestures"):
        player.stage.gesture("nod")
    player.stage.engine = Posing()
    with pytest.raises(InputError, match="somersault"):
        player.stage.gesture("somersault")
