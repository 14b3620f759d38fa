"""A load test without Locust: options become settings, Results become a report."""

import json
import re
import resource
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_shares import POISSON, PROCESSES, shares, traced
from test_user import result

from harness.client.replicas import ConnectionStatistics
from harness.client.target import is_this_host
from harness.drive.console import end_lines, progress_line, start_line
from harness.drive.distributed import SAME_CLOCK_NS, _shift_ns, _shifted
from harness.drive.generator import LoadSettings, UserClass
from harness.drive.load import Load
from harness.drive.load_report import report_of
from harness.drive.observed import ReaderTotals
from harness.drive.options import EVERY_USER, defaults_of, give_way, load_of, settings_for
from harness.drive.readers.live_stats import Progress
from harness.drive.recorder import Recorder
from harness.errors import HarnessError, InputError, StoreError
from harness.host.places import SCENARIOS
from harness.planfile.sections import MAX_OTHERS
from harness.records.load import TraceRecord
from harness.records.load_log import read_records
from harness.records.load_test import HeldRung
from harness.records.schema import Chunks, Outcome
from harness.records.store import Run
from harness.traffic.arrivals import Arrivals, RateStage
from harness.traffic.mix import MIXES, Lengths, Mix, TrafficClass

QUICK = MIXES["quick"]
URL = "127.0.0.1:8001"
SECOND = 10**9


def folded(results=(), end_ns=SECOND, submitted=None, **changes):
    """The report of a test with these Results that ended at ``end_ns``, and its lines."""
    recorder = recorded(results, **changes)
    _, report, text = closed(recorder, end_ns, len(results) if submitted is None else submitted)
    return report, text


def recorded(results=(), folder=None, start_ns=0, mix=QUICK, every_s=None, **load) -> Recorder:
    """A recorder that took these Results."""
    recorder = Recorder(LoadSettings(mix, Load(**load), every_s=every_s), URL, folder)
    recorder.begin(start_ns)
    for each in results:
        recorder.take(each)
    return recorder


def closed(recorder: Recorder, end_ns: int, submitted: int, **readers):
    """What the test observed, its report as stored, and the lines that it prints."""
    observed = recorder.observed(end_ns, ReaderTotals(submitted, **{"lag_p99_s": 0.001, **readers}))
    report = recorder.store(observed, report_of(observed))
    return observed, report, "\n".join(end_lines(observed, report))


def settings_of(values, mix):
    return settings_for(values, [UserClass("user", mix)])


def test_settings_come_from_options_as_text():
    values = {"rate_per_s": "0.5", "steady": "6", "seed": "7", "chunk_frames": "3", "mix": "shorts", "readers": ""}
    settings = settings_of(values, QUICK)
    assert (settings.load.arrivals, settings.load.steady, settings.load.seed) == (Arrivals("poisson", 0.5), 6, 7)
    assert (settings.load.loop, settings.mix) == ("open", replace(MIXES["shorts"], chunk_frames=3))
    assert settings.readers == 1 and settings_of({"iterations": "5", "every_s": "2"}, QUICK).load.iterations == 5
    assert settings_of({"ladder": "1,2,8"}, "quick").load.sessions == (1, 2, 8)
    assert settings_of({}, QUICK).load.loop == "closed" and settings_of({}, QUICK).load.steady is None
    assert settings_of({"steady": EVERY_USER}, QUICK).load.steady == 0


def test_what_others_may_take_comes_from_the_option_or_the_plan(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text((SCENARIOS / "quick.yaml").read_text() + "max_others: 0.2\n")
    assert settings_of({}, QUICK).max_others == MAX_OTHERS == 0.05
    assert settings_of({"plan": str(plan)}, QUICK).max_others == 0.2
    assert settings_of({"plan": str(plan), "max_others": "0.5"}, QUICK).max_others == 0.5


@pytest.mark.parametrize(
    "values, words",
    [
        ({"rate_per_s": "0"}, "rate 0"),
        ({"rate_per_s": "-1"}, "rate -1"),
        ({"rate_per_s": "nan"}, "rate nan"),
        ({"rate_per_s": "two"}, "--rate 'two'"),
        ({"rate_per_s": "1", "steady": EVERY_USER}, "needs the number of sessions"),
        ({"rate_per_s": "1", "ladder": "1,2"}, "leave out --rate"),
        ({"iterations": "9", "ladder": "1,2"}, "and -i"),
        ({"iterations": "0"}, "--iterations 0"),
        ({"steady": "-3", "rate_per_s": "1"}, "--steady must be 0 or more"),
        ({"every_s": "0"}, "--every 0"),
        ({"max_others": "0"}, "--max-others 0 must be above 0"),
        ({"arrivals": "constant"}, "--arrivals constant needs --rate"),
        ({"arrivals": "gamma", "rate_per_s": "1"}, "--arrivals gamma needs --burstiness"),
        ({"burstiness": "4"}, "--arrivals gamma needs --rate"),
        ({"burstiness": "0", "rate_per_s": "1"}, "burstiness 0.0 must lie"),
        ({"burstiness": "4", "rate_per_s": "1", "arrivals": "poisson"}, "--burstiness does not work with"),
        ({"arrivals": "trace"}, "--arrivals trace needs --trace"),
        ({"trace": "nowhere.csv"}, "nowhere.csv: cannot be read"),
        ({"trace": "a.csv", "stages": "9s@1"}, "--stages does not work with --arrivals trace"),
        ({"trace_repeat": True, "rate_per_s": "1"}, "--arrivals trace needs --trace"),
        ({"stages": "9s@1", "rate_per_s": "1"}, "--rate does not work with --arrivals stages"),
        ({"stages": "9s"}, "--stages '9s' is not DURATION@RATE"),
        ({"stages": "1m@1..2..3"}, "is not DURATION@RATE"),
        ({"stages": "0s@1"}, "seconds above 0"),
        ({"stages": "9s@0"}, "above 0 in at least one"),
        ({"stages": "9s@-1"}, "rate -1.0 must be above 0"),
        ({"plan": "x.yaml", "mix": "quick"}, "leave out --mix"),
        ({"mix": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
        ({"speech_tags": ["longs"]}, "did you mean 'long'"),
        ({"speech_tags": ["long"], "speech_exclude_tags": ["long"]}, "leave no class"),
        ({"ladder": "4,2"}, "must rise"),
        ({"ladder": "0,2"}, "must rise"),
        ({"ladder": "one"}, "--ladder 'one'"),
        ({"rung_s": "0"}, "--rung-seconds"),
        ({"readers": "0"}, "--readers"),
        ({"seed": "1.5"}, "--seed"),
        ({"chunk_frames": "0"}, "--chunk-frames"),
        ({"arrivals": "poison", "rate_per_s": "1"}, "known: constant, poisson"),
        ({"mix": "podcasts"}, "did you mean 'podcast'"),
        ({"plan": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_mistake_names_its_option(values, words):
    with pytest.raises(HarnessError, match=re.escape(words)):
        settings_of(values, QUICK)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"stages": "9s@1"}, None),
        ({"trace": "day.csv"}, None),  # at its own times, not stretched to a rate that nobody gave
        ({"ladder": "1,2"}, None),
        ({"mix": "shorts", "stages": ""}, "0.1"),
        ({"rate_per_s": "0.1", "trace": "day.csv"}, "0.1"),  # the same, but given
    ],
)
def test_a_scenarios_own_rate_gives_way_to_another_kind_of_load(given, left):
    values = {**defaults_of({"rate": 0.1, "every": 60}), **given}
    give_way(values)
    assert (values["rate_per_s"], values["every_s"]) == (left, "60")


def test_options_say_which_arrivals_even_where_none_are_named():
    kinds = {
        "poisson": {"rate_per_s": "2"},
        "gamma": {"rate_per_s": "2", "burstiness": "4"},
        "stages": {"stages": "1m@0.5, 1m30s@0.5..3 ,30@0,0.5h@1"},
    }
    for kind, values in kinds.items():
        assert load_of(values).arrivals == load_of({**values, "arrivals": kind}).arrivals
        assert load_of(values).arrivals.kind == kind
    plan = load_of(kinds["stages"]).arrivals.stages
    assert plan == (RateStage(60, 0.5, 0.5), RateStage(90, 0.5, 3), RateStage(30, 0, 0), RateStage(1800, 1, 1))


def test_a_trace_comes_with_its_name_and_digest_into_the_record(tmp_path):
    (tmp_path / "day.csv").write_text("TIMESTAMP\n1\n3\n")
    values = {"trace": str(tmp_path / "day.csv"), "rate_per_s": "0.25", "trace_repeat": "true"}
    record = settings_of(values, QUICK).record()
    sha256 = "05b84ee88ee03ab0be5b59bdf26573de5d37d4f8dca44e3d1b6ba1e9a1a8d6f6"
    assert (record.loop, record.arrivals, record.rate_per_s) == ("open", "trace", 0.25)
    assert replace(record.trace, sha256=sha256) == TraceRecord(
        file="day.csv", sha256=sha256, arrivals=2, seconds=2.0, repeat=True
    )
    assert len(record.trace.sha256) == 64


def test_tags_leave_classes_of_the_mix():
    only = settings_of({"speech_tags": ["long"]}, QUICK).mix
    assert [each.name for each in only.classes] == ["long"] and list(only.record()) == ["long"]
    assert [each.name for each in settings_of({"speech_exclude_tags": ["long"]}, QUICK).mix.classes] == ["short"]


MIX_FILE = """
classes:
  short:
    weight: 9
    length: {uniform: [2, 4]}
    slos: {ttfa_p95_s: 1.0, rtf_p95: 0.9}
  measured:
    weight: 1
    length: {empirical: lengths.csv}
    speakers: [2, 4]
"""


def test_a_mix_of_ones_own_comes_from_a_file_with_its_slos(tmp_path):
    (tmp_path / "mine.yaml").write_text(MIX_FILE)
    (tmp_path / "lengths.csv").write_text("seconds\n20\n40\n")
    mix = settings_of({"mix": str(tmp_path / "mine.yaml")}, QUICK).mix
    assert mix.name == "mine" and mix.mean_audio_s() == pytest.approx(0.9 * 3 + 0.1 * 30, rel=0.01)
    assert [str(each) for each in mix.slos] == ["ttfa_s p95 of class short <= 1", "rtf p95 of class short <= 0.9"]
    for line, words in (("wieght: 1", "did you mean 'weight'"), ("slos: {ttfa: 1}", "'ttfa' is not an SLO")):
        (tmp_path / "bad.yaml").write_text(MIX_FILE + f"    {line}\n")
        with pytest.raises(InputError, match=f"bad.yaml: .*measured.*{words}"):
            settings_of({"mix": str(tmp_path / "bad.yaml")}, QUICK)


def test_the_recorder_keeps_apart_what_was_never_sent(tmp_path):
    results = (
        result(),
        result(Outcome.UNFINISHED, frames=9, request_id="cut"),
        result(Outcome.UNFINISHED, received=(), sent_ns=0, request_id="ahead"),
    )
    _, report, text = closed(recorded(results, tmp_path / "records"), 100, submitted=3)
    records = read_records(tmp_path / "records")
    assert report.valid and records.end.valid and records.end.never_sent == 1
    assert ("records", True, "3 requests were recorded of 3 submitted") in records.end.gates
    assert [each.request_id for each in records.results] == ["r", "cut"]
    assert "1 done, 0 error, 0 cancelled, 1 unfinished" in text
    assert "0.3 s requested by completed requests, 0.3 s delivered: equal" in text
    assert "0.3 s delivered to unfinished requests" in text


def test_the_manifest_says_what_was_asked_and_how_it_went(tmp_path):
    recorder = recorded((), tmp_path / "records", seconds=60, arrivals=POISSON)
    manifest = json.loads((tmp_path / "records" / "manifest.json").read_text())
    assert manifest["finished_at"] is None and "certificate" not in manifest  # as a kill would leave it
    assert (manifest["load"]["loop"], manifest["load"]["rate_per_s"], manifest["load"]["run_s"]) == ("open", 8.0, 60)
    for each in (result(), result(Outcome.ERROR, request_id="e", error="x")):
        recorder.take(each)
    _, report, _ = closed(recorder, 100, submitted=2)
    manifest = json.loads((tmp_path / "records" / "manifest.json").read_text())
    assert manifest["finished_at"] >= manifest["created_at"] and manifest["host"]["cores"] and manifest["versions"]
    assert manifest["requests"] == {"done": 1, "error": 1, "cancelled": 0, "unfinished": 0}
    certificate = manifest["certificate"]
    assert (certificate["valid"], certificate["reasons"]) == (report.valid, list(report.reasons))
    assert certificate["gates"] == [[gate.name, gate.passed, gate.says] for gate in report.certificate.gates]
    assert (tmp_path / "records" / "requests.csv").read_text().count("\n") == 3
    with pytest.raises(StoreError, match="the records of a load test"):
        Run.open(tmp_path / "records")


def test_a_lost_result_makes_the_test_invalid():
    recorder = recorded((result(), result(Outcome.ERROR, error="stream-reader process 1 died")))
    _, report, _ = closed(recorder, 100, submitted=2, lost=1)
    assert not report.valid and "1 requests were recorded of 2 submitted" in report.reasons[0]


@pytest.fixture
def small_disk():
    """No file may grow beyond 4 KiB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_records_that_the_disk_does_not_take_make_the_test_invalid(tmp_path, small_disk):
    recorder = recorded([result(request_id=f"r{number}") for number in range(40)], tmp_path)
    observed, report, _ = closed(recorder, 100, submitted=40)
    kept = [each.request_id for each in read_records(tmp_path).results]
    assert kept == [f"r{number}" for number in range(len(kept))] and 0 < len(kept) < 40  # whole, without a torn one
    assert not report.valid and f"cannot write to {tmp_path / 'records.msgpack'}: File too large" in report.reasons
    assert f"{len(kept)} requests were recorded of 40 submitted" in "\n".join(report.reasons)
    assert observed.unwritten == 40 - len(kept)


@pytest.mark.parametrize("rungs", [600, 3000])  # too many for the manifest, and for the records
def test_where_records_cannot_be_begun_nothing_is_left_of_them(tmp_path, small_disk, rungs):
    with pytest.raises(StoreError, match="File too large"):
        recorded((), tmp_path / "records", sessions=tuple(range(1, rungs)))
    assert not any(tmp_path.iterdir())


def test_a_valid_test_in_which_requests_failed_says_so_in_its_verdict_and_its_manifest(tmp_path):
    recorder = recorded((), tmp_path, start_ns=5)
    for number, outcome in enumerate((Outcome.DONE, Outcome.ERROR, Outcome.ERROR, Outcome.DONE)):
        error = f"slot {number} is gone" * (outcome is Outcome.ERROR)
        recorder.take(result(outcome, due_ns=4 * number, sent_ns=4 * number + 1, error=error))  # two before the window
    _, report, text = closed(recorder, 100, submitted=4)
    said = "VALID, but 2 of 4 requests failed (50%)"
    assert report.valid and said in map(str.strip, text.splitlines())
    certificate = json.loads((tmp_path / "manifest.json").read_text())["certificate"]
    assert certificate["verdict"] == said and "2 failed with: slot 1 is gone" in certificate["reasons"]


def test_a_slo_of_the_real_time_factor_is_not_met_by_requests_that_failed_without_audio():
    lengths = Lengths.parse({"fixed": 1})
    mix = Mix("one", (TrafficClass("short", 1.0, lengths, slos={"rtf_p95": 0.9}),))
    good = list(open_results(np.linspace(0.1, 50, 200)))
    silence = Chunks(*(np.empty(0, np.int64),) * 3)
    bad = [replace(each, outcome=Outcome.ERROR, error="x", chunks=silence) for each in good]
    assert folded(good, 60 * SECOND, mix=mix)[0].slos[0].verdict.met is True
    verdict = folded(good + bad, 60 * SECOND, mix=mix)[0].slos[0].verdict
    assert verdict.met is None and "200 not measured" in verdict.reason


def open_results(times_s, **changes):
    """A Result for each arrival, heard 0.2 to 0.3 s later."""
    for time_s in times_s:
        due_ns = round(time_s * SECOND)
        heard = (due_ns + SECOND // 5, due_ns + SECOND * 3 // 10)
        yield result(due_ns=due_ns, sent_ns=due_ns + 1000, received=heard, ended_ns=heard[-1], loop="open", **changes)


@pytest.mark.parametrize("process", PROCESSES[:6], ids=str)
def test_what_the_process_had_due_is_held_against_what_came(process):
    due = [time_s for time_s in shares(process, 1, 2000)[0] if time_s < 60]
    report, _ = folded(open_results(due), 60 * SECOND, len(due), arrivals=process)
    assert report.valid, report.reasons
    report, _ = folded(open_results(due[:-1]), 60 * SECOND, len(due) - 1, arrivals=process)
    assert not report.valid and "they must be equal" in report.reasons[0]
    window = [each for each in due if each >= report.warm_up_s]
    assert f"{len(window) - 1} requests were due, and the process has {len(window)} in" in report.reasons[0]


def test_an_open_loop_that_began_empty_is_judged_after_its_warm_up():
    process = Arrivals("constant", 5.0)
    due = shares(process, 1, 300)[0]
    late = [replace(each, ended_ns=each.due_ns + 4 * SECOND) for each in open_results(due)]
    report, text = folded(late, 60 * SECOND, arrivals=process)
    assert 3 < report.warm_up_s < 6 and report.start_ns == round(report.warm_up_s * SECOND)
    assert "of warm-up that MSER-5 derives" in text and report.summary.seconds < 57
    assert report.summary.sessions == pytest.approx(20, rel=0.02)
    assert folded(late, 60 * SECOND, arrivals=process, steady=20)[0].warm_up_s == 0
    assert folded(late, 60 * SECOND)[0].warm_up_s == 0  # a closed loop


def test_slos_lead_to_goodput_and_a_verdict_each():
    lengths = Lengths.parse({"fixed": 1})
    mix = Mix("one", (TrafficClass("short", 1.0, lengths, slos={"ttfa_p95_s": 0.25, "rtf_p95": 0.1}),))
    due = shares(POISSON, 1, 400)[0]
    results = list(open_results(due))
    results[0] = replace(results[0], due_ns=results[0].due_ns - SECOND)  # its first audio comes a second later
    report, text = folded(results, 60 * SECOND, mix=mix)
    met, missed = report.slos
    assert (met.verdict.met, missed.verdict.met) == (True, False)
    assert " 0.200  ttfa_s p95 of class short <= 0.25: met at 95% confidence" in text
    assert report.summary.goodput_per_s == 0 < report.summary.completed_rate_per_s
    assert "goodput      0 requests/s met every SLO of their class" in text


def test_the_start_line_says_what_is_about_to_be_sent():
    load = LoadSettings(QUICK, Load(arrivals=Arrivals("constant", 2.0), steady=12))
    line = start_line(load)
    audio = 2.0 * QUICK.mean_audio_s()
    assert f"constant at 2 requests/s, that is, {audio:.4g} audio s per second" in line
    assert "12 sessions in progress" in line
    assert start_line(LoadSettings(QUICK, Load(60))).startswith("closed loop, mix quick")
    trace = Arrivals("trace", 2.0, trace=traced(101))
    line = start_line(LoadSettings(QUICK, Load(80.0, arrivals=trace)))
    assert "they end 30 s before the test does; --trace-repeat repeats the trace" in line
    assert f"{101 / 80:.4g} requests/s for 80 s" in line
    assert "again and again" in start_line(LoadSettings(QUICK, Load(80.0, arrivals=replace(trace, repeat=True))))


def test_a_line_now_and_then_says_how_it_goes():
    before, now = Progress(active=3, samples=0), Progress(active=5, samples=150 * 3200, stalls=2)
    line = progress_line(125, 10, before, now, 3 * 2**20)
    assert line == "   2:05  5 streams, 2.0 audio s/s, about 267 ms per frame and stream, 2 stalls, server 3 MiB"


def test_drift_is_the_median_slope_of_step_time_over_the_parts():
    results = []
    for part in range(10):  # steps of 100, 110, … ms
        times = part * 60 + (1 + 0.1 * part) * 0.1 * np.arange(1, 31)
        received = tuple((times * SECOND).astype(int).tolist())
        results.append(result(received=received, sent_ns=part * 60 * SECOND + 1, ended_ns=received[-1], frames=30))
    report, text = folded(results, 600 * SECOND, every_s=60.0)
    assert report.drift.step_s == pytest.approx(0.1 + 0.01 * np.arange(10), rel=0.01)
    assert report.drift.slope_per_hour(report.drift.step_s) == pytest.approx(0.6, rel=0.02)
    assert "drift        step time 100.0 to 190.0 ms, +600 ms an hour in 10 parts of 60 s" in text


@given(st.integers(-10, 10), st.booleans())
def test_times_of_a_worker_on_another_host_come_to_our_clock(seconds, sent):
    theirs = result(due_ns=50, sent_ns=60 if sent else 0, received=(70, 80), ended_ns=90)
    by_ns = seconds * SECOND
    ours = _shifted(theirs, by_ns)
    assert (ours.due_ns, ours.ended_ns) == (50 + by_ns, 90 + by_ns) and ours.sent_ns == (60 + by_ns if sent else 0)
    assert (ours.chunks.received_ns - ours.due_ns).tolist() == [20, 30]
    assert _shift_ns(by_ns + SAME_CLOCK_NS // 2, 0) == (by_ns and by_ns + SAME_CLOCK_NS // 2)


@pytest.mark.parametrize("lag_p99_s, valid, words", [(0.002, True, "delivered them late"), (0.02, False, "ms late")])
def test_late_chunks_are_the_servers_fault_only_while_the_readers_are_on_time(lag_p99_s, valid, words):
    late = result(received=(10**8, 10**8 + 1), ended_ns=10**8 + 2)
    late = replace(late, chunks=replace(late.chunks, sent_at_ns=np.array([20, 30])))
    _, report, _ = closed(recorded([late]), 10**9, submitted=1, lag_p99_s=lag_p99_s)
    assert report.valid is valid and any(words in reason for reason in report.reasons)


def test_connection_statistics_are_reported_by_server():
    here, there = "127.0.0.1:8001", "127.0.0.1:8002"
    recorder = Recorder(LoadSettings(QUICK), f"{here},{there}", None)
    for target in (here, here, there):
        recorder.take(result(target=target))
    counts = {here: 5, there: 5}, Counter({here: 2, there: 9}), {here: 7, there: 7}
    connections = ConnectionStatistics(Counter({there: 2}), Counter({there: 1}), *counts)
    notes = closed(recorder, SECOND, 3, connections=connections)[1].certificate.notes
    assert f"requests to each of 2 servers, round-robin: {here} 2, {there} 1" in notes
    assert f"connections to {there} that were lost and re-established: 2" in notes
    assert f"requests that skipped {there} because it was down: 1" in notes
    assert any(f"{there} reports at least 7 fewer requests than were sent" in note for note in notes)
    assert not any(here in note for note in notes[1:])


def test_only_this_host_shares_our_clock():
    assert is_this_host("127.0.0.1:8001") and is_this_host("grpc://localhost")
    assert not is_this_host("192.0.2.1:8001")  # of the block for documentation: nobody's
    assert not is_this_host("127.0.0.1:8001,192.0.2.1:8001")


def test_a_ladder_is_judged_from_its_first_rung():
    recorder = recorded((), sessions=(1, 2))
    recorder.all_users_run(10**9)
    late = result(due_ns=10**9, sent_ns=10**9, received=(10**9 + 1, 10**9 + 2), ended_ns=10**9 + 3)
    recorder.take(replace(late, chunks=replace(late.chunks, sent_at_ns=late.chunks.received_ns - 10**8)))
    recorder.add_rung(HeldRung(users=1, start_ns=10**9, end_ns=2 * 10**9))
    recorder.all_users_run(3 * 10**9)
    _, report, _ = closed(recorder, 4 * 10**9, submitted=1, lag_p99_s=0.02)
    assert report.summary.requests == 1 and report.reasons[0].startswith("chunks were stamped up to 100.0 ms late")
    assert report.certificate.gates[-1].says == "not required: the load of a ladder rises by design"
    recorder = recorded()
    for now_ns in (1, 2):  # no ladder: the number of users was changed on the page
        recorder.all_users_run(now_ns)
    assert recorder.start_ns == 2
