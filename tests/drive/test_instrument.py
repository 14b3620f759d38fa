"""The instrument against a real Triton whose every figure is known: each metric comes out at its value.

Two things are held apart. What the instrument adds is the difference between a metric of the times received and the
same metric of the server's own stamps: ``OWN_ERROR_S``. What a busy machine does to the server's timetable is in both:
against the timetable itself a metric may be ``BUSY_S`` off.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
from network import Network
from timetable_server import FAILURE, TimetableServer

from harness.drive.readers.pool import ReaderPool
from harness.records.metrics import per_request, summarise
from harness.records.schema import Outcome, Request, Result

pytestmark = [pytest.mark.server, pytest.mark.alone]

OWN_ERROR_S = 0.03
BUSY_S = 0.15
PLAIN = 10  # streams
# Chunks leave every 50 ms and last 133: when chunk k is due, the listener has 83k ms in hand.
TIMETABLES = {
    **{f"plain{number}": "first=0.3 every=0.1" for number in range(PLAIN)},
    "one stall": "first=0.2 every=0.05 stall=6:2.8",  # chunk 6 comes 3.1 s after the first, which had 0.8 s to play
    "two stalls": "first=0.2 every=0.05 stall=6:0.8 stall=20:1.9",  # 0.3 s too late, and 1.033 s
    "wait of 0 ms": "every=0.05",
    "wait of 75 ms": "every=0.05 stall=3:0.325",
    "wait of 150 ms": "every=0.05 stall=3:0.4",
    "wait of 400 ms": "every=0.05 stall=3:0.65",
    "fails": "every=0.05 error=5",
    "ends early": "every=0.05 end=5",
    "hangs": "every=0.05 hang=5",
}
FRAMES = 40
LATE_S = 0.25
# name: (stalls, seconds in all) for start buffers of 0, 0.5 and 2 s
STALLS = {
    "one stall": ((1, 2.3), (1, 1.8), (1, 0.3)),
    "two stalls": ((2, 1.0333), (1, 0.5333), (0, 0)),
    "wait of 400 ms": ((1, 0.4), (0, 0), (0, 0)),
    "plain0": ((0, 0), (0, 0), (0, 0)),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with TimetableServer(root=tmp_path_factory.mktemp("timetable")) as server:
        yield server


@pytest.fixture(scope="module")
def results(server) -> dict[str, Result]:
    """Every timetable once, all at the same time, after a first stream: a fresh server is late with that."""
    spoken(server.url, {"first": "every=0.05"})
    return spoken(server.url, TIMETABLES)


def spoken(url: str, timetables: dict[str, str], due_in_s: float = 0.5) -> dict[str, Result]:
    pool = ReaderPool(url)
    due_ns = time.monotonic_ns() + round(due_in_s * 1e9)
    tickets = {
        name: pool.submit(Request(name, "short", f"Speaker 1: {words}", (0,), FRAMES, due_ns=due_ns), "open")
        for name, words in timetables.items()
    }
    for name, ticket in tickets.items():
        if "hang" not in timetables[name]:
            assert ticket.wait(60), f"{name} never ended"
    pool.close()
    return {name: ticket.result for name, ticket in tickets.items()}


def as_sent(result: Result) -> Result:
    """The same stream as it would be seen at the server."""
    return replace(result, chunks=replace(result.chunks, received_ns=result.chunks.sent_at_ns))


def measures(*results: Result) -> dict:
    """Columns of ``per_request`` as received and, with an s_ before their names, as sent."""
    both = {"": per_request(results), "s_": per_request([as_sent(result) for result in results])}
    return {prefix + name: frame[name].to_numpy() for prefix, frame in both.items() for name in frame}


@pytest.mark.parametrize(
    "column, value", [("ttfa_s", 0.3), ("rtf", 3.9 / (39 / 7.5)), ("audio_s", FRAMES / 7.5), ("schedule_delay_s", 0)]
)
def test_a_plain_stream_measures_as_it_was_spoken(results, column, value):
    seen = measures(*(results[f"plain{number}"] for number in range(PLAIN)))
    assert np.abs(seen[column] - seen[f"s_{column}"]).max() < OWN_ERROR_S
    assert np.median(seen[column]) == pytest.approx(value, abs=BUSY_S / 3)
    assert seen[column].min() >= value - OWN_ERROR_S


@pytest.mark.parametrize("name", STALLS)
def test_stalls_are_counted_and_timed_for_each_start_buffer(results, name):
    seen = measures(results[name])
    for buffer, (count, total_s) in zip(("", "_500ms", "_2s"), STALLS[name], strict=True):
        assert seen[f"stalls{buffer}"][0] == count
        assert seen[f"stall_total_s{buffer}"][0] == pytest.approx(total_s, abs=BUSY_S)
        assert abs(seen[f"stall_total_s{buffer}"][0] - seen[f"s_stall_total_s{buffer}"][0]) < OWN_ERROR_S


@pytest.mark.parametrize("name, late_chunks", [("one stall", [6]), ("two stalls", [6, 20])])
def test_stalls_are_found_where_they_are_and_nowhere_else(results, name, late_chunks):
    result = results[name]
    received = result.chunks.received_ns.tolist()
    windows = zip([result.sent_ns, *received], [*received, result.ended_ns], strict=True)
    where = [int(per_request([result], start + 1, end + 1)["stalls"].iloc[0]) for start, end in windows]
    assert [chunk for chunk, stalls in enumerate(where) if stalls] == late_chunks
    assert sum(where) == len(late_chunks)


def test_continuity_is_the_share_of_streams_below_each_limit(results):
    four = [results[f"wait of {wait_ms} ms"] for wait_ms in (0, 75, 150, 400)]
    start_ns, end_ns = min(each.due_ns for each in four), max(each.ended_ns for each in four) + 1
    seen = summarise(four, start_ns, end_ns)
    assert [seen.c50, seen.c100, seen.c200, seen.c100_500ms] == [0.25, 0.5, 0.75, 1.0]
    assert seen.stall_p99_s == pytest.approx(0.4, abs=0.05)


def test_throughput_and_sessions_are_those_of_the_timetable(results):
    plain = [results[f"plain{number}"] for number in range(PLAIN)]
    start_ns = plain[0].due_ns + 1_000_000_000
    seen = summarise(plain, start_ns, start_ns + 2_400_000_000)
    assert seen.frames_per_s == pytest.approx(PLAIN / 0.1, rel=0.05)
    assert seen.delivered_audio_s_per_s == pytest.approx(PLAIN / 0.1 / 7.5, rel=0.05)
    assert seen.sessions == PLAIN
    assert seen.step_s == pytest.approx(0.1, rel=0.05)
    whole = summarise(plain, start_ns - 1_000_000_000, max(each.ended_ns for each in plain) + 1)
    assert (whole.requests, whole.done) == (PLAIN, PLAIN)
    assert whole.residence_s == pytest.approx(0.3 + FRAMES * 0.1, abs=BUSY_S)


def test_how_a_stream_goes_wrong_is_what_the_record_says(results):
    said = {name: (result.outcome, result.error, len(result.chunks)) for name, result in results.items()}
    assert said["fails"] == (Outcome.ERROR, FAILURE, 5)
    early = f"the stream ended with {5 * 3200} samples of audio where {FRAMES * 3200} were requested"
    assert said["ends early"] == (Outcome.ERROR, early, 5)
    assert said["hangs"] == (Outcome.UNFINISHED, "", 5)
    rest = {name: words for name, words in said.items() if "=5" not in TIMETABLES[name]}
    assert set(rest.values()) == {(Outcome.DONE, "", FRAMES)}


def test_a_request_that_leaves_late_is_late_in_its_delay_and_its_first_audio(server):
    seen = measures(spoken(server.url, {"late": "first=0.2 every=0.01"}, due_in_s=-LATE_S)["late"])
    assert LATE_S <= seen["schedule_delay_s"][0] < LATE_S + BUSY_S
    assert LATE_S + 0.2 <= seen["ttfa_s"][0] < LATE_S + 0.2 + BUSY_S


@pytest.mark.parametrize("delay_s", [0.0, 0.08])
def test_lateness_is_the_time_on_the_way(server, delay_s):
    with Network(server.url, delay_s) as network:
        result = spoken(network.url, {"slow way": "every=0.05"})["slow way"]
    lateness_s = (result.chunks.received_ns - result.chunks.sent_at_ns) / 1e9
    assert lateness_s.min() >= delay_s and np.median(lateness_s) < delay_s + OWN_ERROR_S
    start_ns = int(result.chunks.sent_at_ns[0])
    assert delay_s <= summarise([result], start_ns, result.ended_ns + 1).lateness_p99_s < delay_s + BUSY_S
