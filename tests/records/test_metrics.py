"""Metrics: known timetables give known values, and the fast arithmetic agrees with a playback clock stepped by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.drive.readers.live_stats import LiveStats
from harness.records import metrics
from harness.records.schema import Chunks, Outcome, Request, Result
from harness.records.slo import Slo
from harness.records.summary import METRICS

MS = 1_000_000
SECOND = 1_000_000_000
FRAME_NS = SECOND * 2 / 15


def stream(arrivals_ms, *, due_ms=0, sent_ms=1, ended_ms=None, outcome=Outcome.DONE, frames=None, late_ms=2, **fields):
    """A Result whose chunks of one frame came at these milliseconds after 1 s: ``sent_ns`` 0 says never sent."""
    received = np.array([round(each * MS) for each in arrivals_ms], dtype=np.int64) + SECOND
    ended_ms = (arrivals_ms[-1] if len(arrivals_ms) else due_ms) if ended_ms is None else ended_ms
    defaults = dict(request_id="r", traffic_class="short", speakers=1, script_words=9, start_frame=0, chunk_frames=1)
    return Result(
        **{**defaults, "loop": "open", **fields},
        frames=len(received) if frames is None else frames,
        due_ns=due_ms * MS + SECOND,
        sent_ns=sent_ms * MS + SECOND,
        ended_ns=round(ended_ms * MS) + SECOND,
        outcome=outcome,
        chunks=Chunks(received, received - late_ms * MS, np.full(len(received), 3200, dtype=np.int64)),
    )


def never_sent(due_ms):
    result = stream([], due_ms=due_ms, ended_ms=due_ms, outcome=Outcome.UNFINISHED, frames=9)
    return replace(result, sent_ns=0)


def window(start_ms, end_ms):
    return start_ms * MS + SECOND, end_ms * MS + SECOND


def test_one_stream_worked_out_by_hand():
    row = metrics.per_request([stream([300, 400, 700, 800], due_ms=100, sent_ms=110, late_ms=3)]).iloc[0]
    assert (row.chunks, row.samples) == (4, 12_800)
    assert row.audio_s == row.asked_s == pytest.approx(4 / 7.5)
    assert row.ttfa_s == pytest.approx(0.2)
    assert row.schedule_delay_s == pytest.approx(0.01)
    assert row.rtf == pytest.approx(0.5 / 0.4)
    # The third chunk is due at 300 + 266.7 ms and comes at 700; the fourth is in time after that.
    assert (row.stalls, row.audible_stalls, row.stalls_500ms) == (1, 1, 0)
    assert row.stall_longest_s == row.stall_total_s == pytest.approx(0.4 - 4 / 15)
    assert row.stall_total_s_500ms == row.stall_longest_s_2s == 0
    assert row.lateness_p99_s == pytest.approx(0.003)
    assert (row.first_received_ns, row.last_received_ns) == (1_300_000_000, 1_800_000_000)


def test_what_was_not_measured_is_nan_and_never_zero():
    frame = metrics.per_request([stream([], outcome=Outcome.ERROR, frames=5, error="boom"), never_sent(5)])
    unmeasured = frame[["ttfa_s", "rtf", "stall_longest_s", "stalls", "lateness_p99_s", "first_received_ns"]]
    assert unmeasured.isna().all(axis=None)
    assert math.isnan(frame["schedule_delay_s"][1]) and frame["error"][0] == "boom"
    assert math.isnan(metrics.per_request([stream([5])])["rtf"][0])  # one chunk has no rate
    assert len(metrics.per_request([])) == 0


def test_a_stream_exactly_on_time_for_ninety_minutes_never_stalls():
    row = metrics.per_request([stream(np.arange(40_500) * FRAME_NS / MS)]).iloc[0]
    assert row.stall_longest_s < 1e-9 and row.rtf == pytest.approx(1)
    early = metrics.per_request([stream(np.floor(np.arange(40_500) * FRAME_NS) / MS)]).iloc[0]
    assert early.stalls == 0


def test_a_stream_that_ends_early_waits_until_its_end_and_a_whole_one_does_not():
    cut = dict(ended_ms=2000, outcome=Outcome.UNFINISHED)
    silent, whole = metrics.per_request([stream([0, 50], frames=9, **cut), stream([0, 50], frames=2, **cut)]).iloc
    assert silent.stall_longest_s == pytest.approx(2 - 4 / 15)
    assert whole.stall_longest_s == 0


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=40),
    st.lists(st.integers(1, 3), min_size=40, max_size=40),
    st.sampled_from([(0, ""), (500, "_500ms"), (2000, "_2s")]),
)
def test_stalls_agree_with_a_playback_clock_stepped_by_hand(gaps_ms, frames, start_buffer):
    buffer_ms, suffix = start_buffer
    result = stream(np.cumsum(gaps_ms).tolist())
    sizes = np.array(frames[: len(gaps_ms)]) * 3200
    result = replace(result, chunks=replace(result.chunks, samples=sizes))
    clock, waits = result.chunks.received_ns[0] / MS + buffer_ms, []
    for arrival_ms, samples in zip(result.chunks.received_ns / MS, sizes, strict=True):
        if arrival_ms > clock + 1e-6:
            waits.append(arrival_ms - clock)
            clock = arrival_ms
        clock += samples / 24
    row = metrics.per_request([result]).iloc[0]
    assert row[f"stalls{suffix}"] == len(waits)
    assert row[f"stall_total_s{suffix}"] == pytest.approx(sum(waits) / 1e3, abs=1e-9)
    assert row[f"stall_longest_s{suffix}"] == pytest.approx(max(waits, default=0) / 1e3, abs=1e-9)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=40))
def test_stalls_above_50_ms_are_those_that_live_statistics_count(gaps_ms):
    result = stream(np.cumsum([gap + 0.001 for gap in gaps_ms]).tolist())  # no wait of exactly 50 ms
    watch = LiveStats(now_ns=0)
    for received_ns in result.chunks.received_ns.tolist():
        watch.chunk("stream", Request("r", "short", "", (0,), result.frames), received_ns, 3200)
    assert metrics.per_request([result])["audible_stalls"][0] == watch.progress(1, 0, 1).stalls


def test_a_window_keeps_the_clock_of_the_stream_but_counts_only_its_own():
    # Two early chunks build a lead of 267 ms that covers the gap to 350 ms inside the window.
    slow_start = stream([0, 10, 20, 350, 360, 1500], ended_ms=1600)
    start_ns, end_ns = window(100, 1000)
    row = metrics.per_request([slow_start], start_ns, end_ns).iloc[0]
    assert (row.chunks, row.stalls, row.outcome) == (2, 1, "unfinished")
    # Five chunks hold 667 ms of audio, so the cut at 1000 ms finds playback waiting.
    assert row.stall_longest_s == pytest.approx(1.0 - 5 / 7.5)
    assert row.ttfa_s == 0


def frames_in(results, start_ns, end_ns):
    return round(metrics.summarise(results, start_ns, end_ns).frames_per_s * (end_ns - start_ns) / SECOND)


def test_frames_and_sessions_of_a_window():
    results = [stream([0, 100, 200, 300], sent_ms=-100, ended_ms=300), stream([250], sent_ms=200, ended_ms=400)]
    start_ns, end_ns = window(100, 300)
    assert frames_in(results, start_ns, end_ns) == 3  # 300 is the next window's
    assert metrics.sessions_in_window(results, start_ns, end_ns) == pytest.approx(1.5)
    assert frames_in([], start_ns, end_ns) == 0
    assert metrics.sessions_in_window([never_sent(0)], start_ns, end_ns) == 0


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 900)), max_size=12), st.integers(1, 2999))
def test_windows_add_up(spans, cut):
    results = [stream([start + length], sent_ms=start, ended_ms=start + length) for start, length in spans]
    edges = window(0, cut), window(cut, 3000)
    frames = sum(frames_in(results, *edge) for edge in edges)
    assert frames == frames_in(results, *window(0, 3000))
    seconds = sum(metrics.sessions_in_window(results, *edge) * (edge[1] - edge[0]) for edge in edges) / SECOND
    assert seconds == pytest.approx(metrics.sessions_in_window(results, *window(0, 3000)) * 3, abs=1e-6)


def steady_load(count=400, *, gap_ms=50, frames=4, frame_ms=40, drift_ms=0.0, **fields):
    """Requests every 50 ms, each served 4 frames 40 ms apart; each later one first waits ``drift_ms`` longer."""
    for index in range(count):
        due = index * gap_ms
        arrivals = due + 20 + drift_ms * index + frame_ms * np.arange(frames)
        fields["traffic_class"] = "long" if index % 4 == 0 else "short"
        yield stream(arrivals.tolist(), due_ms=due, sent_ms=due + 1, **fields)


def test_a_steady_timetable_comes_out_at_its_known_values():
    summary = metrics.summarise(list(steady_load()), *window(1000, 19_000))
    known = {
        "seconds": 18,
        "requests": 360,
        "unfinished": 2,  # the last 140 ms hold the starts of three, of which one ended
        "offered_rate_per_s": 20,
        "achieved_rate_per_s": 20,
        "offered_audio_s_per_s": 20 * 4 / 7.5,
        "delivered_audio_s_per_s": 20 * 4 / 7.5,
        "frames_per_s": 80,
        "sessions": 20 * 0.139,
        "step_s": 0.139 / 4,
        "residence_s": 0.139,
        "ttfa_p50_s": 0.02,
        "ttfa_p99_s": 0.02,
        "rtf_p95": 0.04 * 7.5,
        "stall_p99_s": 0,
        "c50": 1,
        "schedule_delay_p99_s": 0.001,
        "late_sends_share": 0,
        "lateness_p99_s": 0.002,
        "long.requests": 90,
        "short.requests": 270,
        "long.rtf_p50": 0.3,
    }
    assert {name: summary.figure(name) for name in known} == pytest.approx(known, rel=1e-9, abs=1e-9)
    assert summary.littles_residual < 0.01
    assert summary.done + summary.unfinished == 360


def test_the_metrics_table_is_exactly_what_a_summary_holds():
    summary = metrics.summarise(list(steady_load(20)), *window(0, 1000))
    names = [metric.name for metric in METRICS]
    own = [metric.name for metric in METRICS if metric.per_class]
    expected = {*names, *(f"{name}.{key}" for name in ("short", "long") for key in own)}
    assert set(summary.to_dict()) == expected and len(names) == len(set(names))
    assert all(type(value) is float for value in summary.to_dict().values())
    assert all(metric.formula and metric.unit for metric in METRICS)
    assert set(metrics.summarise([], *window(0, 1000)).to_dict()) == set(names)


def test_requests_without_audio_cannot_improve_a_quantile():
    served = [stream([10], due_ms=0)] * 9
    failed = stream([], outcome=Outcome.ERROR, frames=4, ended_ms=50)
    summary = metrics.summarise([*served, failed], *window(0, 1000))
    assert summary.ttfa_p50_s == pytest.approx(0.01) and math.isnan(summary.ttfa_p95_s)
    assert summary.c200 == pytest.approx(0.9) and summary.errors == 1


def summary_of(results):
    return metrics.summarise(results, *window(1000, 19_000))


def test_a_server_that_falls_behind_is_seen_as_a_rise():
    summary = summary_of(list(steady_load(drift_ms=2.0)))
    assert summary.ttfa_rise_s > 20 * summary.ttfa_rise_error_s and summary.sessions_rise > 10
    steady = summary_of(list(steady_load()))
    assert abs(steady.ttfa_rise_s) < 1e-9 and abs(steady.sessions_rise) < 0.1


def test_mser_cuts_the_warm_up_and_nothing_else():
    rng = np.random.default_rng(4)
    level = rng.normal(10, 1, 300)
    warm_up = np.concatenate([np.linspace(60, 10, 40), level])
    assert 30 <= metrics.warm_up_end(warm_up) <= 60
    assert metrics.warm_up_end(np.ones(100)) == 0
    assert metrics.warm_up_end([1.0, 2.0]) == 0


def sessions_of(length_ms, gap_ms, until_ms):
    """Requests one after another, each under way for the same time, so the number of sessions is constant at last."""
    times = np.arange(0, until_ms, gap_ms)
    return [stream([due + 10, due + length_ms - 1], due_ms=due, sent_ms=due, ended_ms=due + length_ms) for due in times]


def test_the_warm_up_of_a_load_that_began_empty_ends_when_its_sessions_are_in():
    results = sessions_of(length_ms=4000, gap_ms=200, until_ms=60_000)  # 20 at once from 4 s on
    start_ns, end_ns = window(0, 60_000)
    assert 3.5 <= (metrics.settled_ns(results, start_ns, end_ns) - start_ns) / SECOND <= 6
    assert metrics.settled_ns(results, *window(10_000, 60_000)) == window(10_000, 0)[0]
    short = window(0, 20_000)  # 8 times the memory of 4 s would be 32 s
    assert metrics.settled_ns(results, *short) == short[0]


def test_goodput_counts_what_ended_in_the_window_and_kept_its_slos():
    results = [stream([100, 200], ended_ms=300), stream([900, 950], ended_ms=990), stream([2900], ended_ms=2950)]
    slo = Slo("short", "ttfa_s", 0.95, 0.5)
    summary = metrics.summarise(results, *window(-1000, 1000), (slo,))
    assert (summary.goodput_per_s, summary.completed_rate_per_s) == (0.5, 1.0)
    assert metrics.summarise(results, *window(-1000, 1000)).goodput_per_s == 1.0


def test_step_times_in_parts_of_a_window():
    results = [stream([100, 200, 300, 400, 700, 1000], sent_ms=0, ended_ms=1000)]
    parts = metrics.steps_in_parts(results, *window(0, 2000), parts=4)
    assert parts[:2] == pytest.approx([0.5 / 4, 0.5 / 1]) and parts[2] == 0 and math.isnan(parts[3])
