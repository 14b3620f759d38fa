"""The engine's loop over a step that computes nothing: who is stepped, what is sent, and what an error takes along."""

import threading
import time
from collections import deque

import numpy as np
import pytest

from harness import wire
from harness.errors import RequestError
from harness.vibevoice.engine.loop import (
    FEWEST_TOKENS,
    MOST_FRAMES,
    MOST_WAITING,
    Engine,
    PromptToRead,
    Speech,
    noise_rows,
)
from harness.vibevoice.sessions.failures import StageEnded

F, B, X = wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN, wire.TOKEN_END_OF_TEXT
PATIENCE_S = 120


class Frames:
    took_ns = 0

    def __init__(self, tokens, sessions, noise, ready):
        self.tokens, self.sessions, self.noise, self.ready = tokens, sessions, noise, ready

    def values(self):
        audio = np.zeros((len(self.tokens), wire.SAMPLES_PER_FRAME), np.float32)
        audio[:, 0], audio[:, 1] = self.sessions, self.noise
        return audio, np.zeros((len(self.tokens), 64)), np.zeros((len(self.tokens), 128))


class Step:
    """Says what it is told to; remembers its batches. ``gate``: a step waits for it."""

    prompt_tokens, prompt_ns, token_ns, odd_groups = 8, 7, 0.0, 1

    def __init__(self, ready=True, says=None, broken=()):
        self.ready, self.says, self.broken = ready, says or {}, broken
        self.batches, self.read_parts, self.closed = [], [], []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, parts):
        self.read_parts.append([(part.session, len(part.token_ids)) for part in parts])

    def replay(self, session, *past):
        self.read_parts.append([(session, "past")])

    def check(self, session):
        if session in self.broken:
            raise RequestError("no room left")

    def launch(self, rows):
        assert self.gate.wait(PATIENCE_S)
        self.batches.append([row.session for row in rows])
        if "launch" in self.broken:
            raise RuntimeError("a fault of the device")
        tokens = [self.says[row.session].pop(0) if self.says.get(row.session) else F for row in rows]
        return Frames(tokens, [row.session for row in rows], [row.noise[0] for row in rows], self.ready)

    def is_broken_by(self, error):
        return isinstance(error, MemoryError)

    def close(self, session, keep=False):
        self.closed.append(session)
        return np.array([session])


@pytest.fixture
def running():
    """``running(step, max_batch=64)``: an engine over this step, closed after the test."""
    engines = []

    def run(step, max_batch=64, **more):
        engines.append(Engine(step, max_batch, **more))
        return engines[-1]

    yield run
    for engine in engines:
        engine.step.gate.set()
        engine.close()


def speech(number, frames=5, prompt=3, deliver=None, **more):
    heard = []
    made = Speech(
        number,
        PromptToRead(number, [0] * prompt, np.empty((0, 64)), 1),
        frames,
        noise_rows(number),
        deliver or heard.append,
        **more,
    )
    made.heard = heard
    return made


def sent(one):
    """Frames of each chunk, and the first sample of every frame."""
    chunks = [chunk.reshape(-1, wire.SAMPLES_PER_FRAME) for chunk in one.heard]
    return [len(chunk) for chunk in chunks], np.concatenate(chunks)


@pytest.mark.parametrize("ready", [True, False])
def test_every_session_gets_its_own_frames_in_order(running, ready):
    engine = running(Step(ready))
    sessions = [speech(number, frames=number + 2) for number in range(1, 8)]
    for one in sessions:
        engine.submit(one)
    for one in sessions:
        one.done.result(PATIENCE_S)
        _, frames = sent(one)
        rows = noise_rows(one.session)
        assert (frames[:, 0] == one.session).all()
        assert frames[:, 1].tolist() == [next(rows)[0] for _ in range(one.frames)]


def test_frames_that_had_to_wait_are_sent_together_and_in_whole_chunks(running):
    free = threading.Event()
    held = speech(1, frames=2 * MOST_WAITING, chunk_frames=3)

    def deliver(chunk):
        held.heard.append(chunk)
        assert free.wait(PATIENCE_S)

    held.deliver = deliver
    step = Step()
    engine = running(step)
    engine.submit(held)
    until(lambda: len(step.batches) >= MOST_WAITING)
    time.sleep(0.05)
    spoken = len(step.batches)  # a chunk is on its way; what waits behind it is enough, and no more is spoken meanwhile
    assert MOST_WAITING <= spoken <= MOST_WAITING + MOST_FRAMES < held.frames
    free.set()
    held.done.result(PATIENCE_S)
    sizes, frames = sent(held)
    assert set(sizes[:-1]) <= {3 * n for n in range(1, MOST_FRAMES // 3 + 1)} and max(sizes) > 3
    assert len(frames) == sum(sizes) == held.frames


def until(true):
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_where_more_speak_than_a_step_takes_those_go_first_whose_listeners_run_out(running):
    now = [0.0]
    step = Step()
    step.gate.clear()
    engine = running(step, max_batch=2, clock=lambda: now[0])
    first = [speech(1, frames=20), speech(2, frames=20)]
    for one in first:
        engine.submit(one)
    step.gate.set()
    until(lambda: len(step.batches) >= 20)
    for one in first:
        one.done.result(PATIENCE_S)
    step.gate.clear()
    later = [speech(number, frames=3) for number in (3, 4, 5)]
    for one in later:
        engine.submit(one)
    time.sleep(0.05)
    step.batches.clear()
    step.gate.set()
    for one in later:
        one.done.result(PATIENCE_S)
    steps = [sorted(batch) for batch in step.batches]
    by_session = {number: sum(number in batch for batch in steps) for number in (3, 4, 5)}
    assert by_session == {3: 3, 4: 3, 5: 3}
    spoken = dict.fromkeys(by_session, 0)
    for batch in steps:  # none is ever two frames ahead of another that could have been stepped
        for number in batch:
            spoken[number] += 1
        waiting = [count for count in spoken.values() if count < 3]
        assert not waiting or max(spoken.values()) - min(waiting) <= 1 or len(waiting) < 2


def test_prompts_are_read_by_turns_as_many_tokens_as_a_step_takes(running):
    step = Step()
    step.gate.clear()
    engine = running(step)
    speaking = speech(9, frames=400)
    engine.submit(speaking)
    until(lambda: step.read_parts)
    engine.submit(speech(1, prompt=24))
    engine.submit(speech(2, prompt=4))
    engine.submit(speech(3, prompt=8))
    step.gate.set()
    speaking.done.result(PATIENCE_S)
    order = [part for parts in step.read_parts[1:] for part in parts]
    read = {number: sum(count for of, count in order if of == number) for number in (1, 2, 3)}
    assert read == {1: 24, 2: 4, 3: 8}
    assert all(sum(count for _, count in parts) <= 8 for parts in step.read_parts)
    assert [number for number, _ in order[:3]] in ([1, 2, 3], [2, 3, 1])  # nobody waits for a long one's end


def test_a_resumed_session_reads_its_prompt_then_its_past_then_speaks(running):
    step = Step()
    engine = running(step)
    resumed = speech(1, prompt=11, past=deque([(1, 2, 3), (4, 5, 6)]))
    engine.submit(resumed)
    resumed.done.result(PATIENCE_S)
    assert step.read_parts == [[(1, 8)], [(1, 3)], [(1, "past")], [(1, "past")]]


def test_what_is_no_frame_is_not_sent_and_end_of_text_ends(running):
    step = Step(says={1: [F, B, F, X]})
    engine = running(step)
    one = speech(1, frames=9, keep=True)
    engine.submit(one)
    one.done.result(PATIENCE_S)
    _, frames = sent(one)
    rows = noise_rows(1)
    assert one.tokens == [F, B, F, X] and len(one.fed) == one.spoken == 2
    assert frames[:, 1].tolist() == [next(rows)[0] for _ in range(2)]  # a step without a frame uses up no noise


def test_a_session_without_room_fails_alone(running):
    step = Step(broken=(2,))
    engine = running(step)
    sessions = [speech(number) for number in (1, 2, 3)]
    for one in sessions:
        engine.submit(one)
    assert sessions[0].done.result(PATIENCE_S) is sessions[2].done.result(PATIENCE_S) is None
    with pytest.raises(RequestError, match="no room left"):
        sessions[1].done.result(PATIENCE_S)


def test_a_fault_of_a_step_is_told_to_all_of_its_batch_and_the_engine_goes_on(running):
    step = Step(broken=("launch",))
    engine = running(step)
    one = speech(1)
    engine.submit(one)
    with pytest.raises(RuntimeError, match="a fault of the device"):
        one.done.result(PATIENCE_S)
    step.broken = ()
    other = speech(2)
    engine.submit(other)
    assert other.done.result(PATIENCE_S) is None


def test_an_ended_session_is_sent_nothing_more_and_gives_its_state(running):
    step = Step()
    engine = running(step)
    one = speech(7, frames=10_000)
    engine.submit(one)
    until(lambda: one.heard)
    assert engine.sessions == 1
    state = engine.end(one, keep=True).result(PATIENCE_S)
    one.wait_sent()
    count = len(one.heard)
    assert state.tolist() == [7] and step.closed == [7] and not engine.sessions
    time.sleep(0.05)
    assert len(one.heard) == count and one.over


def test_a_client_that_cannot_be_sent_to_ends_its_session_only(running):
    engine = running(Step())

    def deliver(chunk):
        raise ConnectionError("gone")

    gone, there = speech(1, deliver=deliver), speech(2)
    for one in (gone, there):
        engine.submit(one)
    with pytest.raises(ConnectionError, match="gone"):
        gone.done.result(PATIENCE_S)
    assert there.done.result(PATIENCE_S) is None


def test_calls_run_between_steps_and_their_errors_come_back(running):
    engine = running(Step())
    assert engine.call(lambda a: a + 1, 2).result(PATIENCE_S) == 3
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(PATIENCE_S)


@pytest.mark.parametrize("where", ["loop", "device"])
def test_a_loop_that_breaks_tells_everybody_and_takes_no_more_calls(running, where):
    told = []
    step = Step(ready=False)
    step.gate.clear()
    engine = running(step, broken=told.append)
    sessions = [speech(1), speech(2, frames=1)]
    for one in sessions:
        engine.submit(one)
    if where == "loop":
        engine._next = lambda: 1 / 0
    else:
        step.check = fail
    step.gate.set()
    for one in sessions:
        with pytest.raises((StageEnded, MemoryError)):
            one.done.result(PATIENCE_S)
    until(lambda: told)
    assert isinstance(told[0], ZeroDivisionError if where == "loop" else MemoryError)
    with pytest.raises(StageEnded, match="is restarting; retry"):
        engine.end(sessions[0]).result(PATIENCE_S)
    late = speech(3)
    engine.submit(late)
    with pytest.raises(StageEnded):
        late.done.result(PATIENCE_S)


def fail(*_):
    raise MemoryError("the device is gone")


def test_sessions_whose_last_step_is_under_way_are_told_when_the_engine_closes(running):
    step = Step(ready=False)
    engine = running(step)
    launched = threading.Event()
    launch = step.launch

    def slow(rows):
        launched.set()
        frames = launch(rows)
        frames.values = lambda: 1 / 0  # never seen: the loop ends before
        engine._over = True
        return frames

    step.launch = slow
    one = speech(1, frames=1)
    engine.submit(one)
    assert launched.wait(PATIENCE_S)
    with pytest.raises(StageEnded):
        one.done.result(PATIENCE_S)


def test_a_call_that_was_given_up_does_not_stop_the_engine(running):
    step = Step()
    step.gate.clear()
    engine = running(step)
    engine.submit(speech(1))
    until(lambda: step.read_parts)
    given_up = engine.call(lambda: 1)
    assert given_up.cancel()
    step.gate.set()
    assert engine.call(lambda: 2).result(PATIENCE_S) == 2


def test_odd_numbers_of_denoising_steps_take_turns(running):
    step = Step()
    step.gate.clear()
    engine = running(step)
    sessions = [speech(number, frames=6, steps=steps) for number, steps in ((1, 10), (2, 4), (3, 7), (4, 20))]
    for one in sessions:
        engine.submit(one)
    until(lambda: step.read_parts)
    time.sleep(0.05)
    step.batches.clear()
    step.gate.set()
    for one in sessions:
        one.done.result(PATIENCE_S)
    assert all(len(set(batch) - {1}) <= 1 for batch in step.batches[1:])
    assert [sum(number in batch for batch in step.batches) for number in (2, 3, 4)] == [6, 6, 6]


def test_resumed_sessions_read_their_pasts_by_turns(running):
    step = Step()
    step.gate.clear()
    engine = running(step)
    engine.submit(speech(9, frames=50))
    until(lambda: step.read_parts)
    long, short = (speech(n, past=deque([(0, 0, 0)] * count)) for n, count in ((1, 5), (2, 1)))
    for one in (long, short):
        engine.submit(one)
    step.gate.set()
    for one in (long, short):
        one.done.result(PATIENCE_S)
    pasts = [part[0] for parts in step.read_parts for part in parts if part[1] == "past"]
    assert pasts[:2] == [1, 2] and pasts.count(1) == 5


def test_steps_and_prompts_are_counted(running):
    engine = running(Step())
    sessions = [speech(number, frames=4, prompt=5) for number in (1, 2)]
    for one in sessions:
        engine.submit(one)
    for one in sessions:
        one.done.result(PATIENCE_S)
    counts = engine.counts
    assert sum(batch * count for batch, (count, _) in counts.steps.items()) == 8
    assert (counts.prompt_tokens, counts.prompt_ns) == (10, 7) and all(ns > 0 for _, ns in counts.steps.values())


def test_noise_is_the_same_however_it_is_drawn():
    rows, whole = noise_rows(5), np.random.default_rng(5).standard_normal((40, 64), np.float32)
    assert np.array_equal([next(rows) for _ in range(40)], whole)
    assert np.array_equal(next(noise_rows(5, skipped=17)), whole[17])


def test_a_prompt_is_cut_with_the_voice_frames_of_its_audio_tokens():
    prompt = PromptToRead(3, [5, 9, 9, 6, 9], np.arange(3)[:, None], audio_token_id=9)
    parts = [prompt.take(count) for count in (2, 2, 10)]
    assert [part.token_ids.tolist() for part in parts] == [[5, 9], [9, 6], [9]] and not prompt
    assert [part.voice_frames[:, 0].tolist() for part in parts] == [[0], [1], [2]]


@pytest.mark.parametrize(("in_hand_s", "tokens"), [(-3.0, 50), (0.9, 50), (1.5, 250), (30.0, 250)])
def test_reading_takes_half_of_what_listeners_have_in_hand_or_half_a_step(running, in_hand_s, tokens):
    step = Step()
    step.prompt_tokens, step.token_ns = 800, 1e6
    engine = running(step, clock=lambda: 100.0)
    engine._step_ns = 100_000_000
    assert engine._tokens_to_read() == 250  # nobody listens
    one = speech(1, frames=90)
    one.began_s, one.spoken = 100.0 + in_hand_s - 10 * wire.SECONDS_PER_FRAME, 10
    engine._speaking = {1: one}
    try:
        assert engine._tokens_to_read() == tokens
        step.token_ns = 1e9  # however long a token takes, some are read
        assert engine._tokens_to_read() == FEWEST_TOKENS
        step.token_ns = 0.0
        assert engine._tokens_to_read() == 256
    finally:
        engine._speaking = {}
