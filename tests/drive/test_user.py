"""Locust with the harness's user: what is asked for is what happens, and mistakes are one line."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import locusts
import numpy as np
import pytest
from fake_triton import Timetable, serving
from test_readers import readers_left

from harness import wire
from harness.deploy.ports import free_ports
from harness.drive.generator import UserClass
from harness.drive.readers.live_stats import Progress, Running
from harness.drive.runners import SpeechTest
from harness.drive.web_ui import LiveTable, records_csv
from harness.errors import StoreError
from harness.records.load_log import read_records
from harness.records.load_test import HeldRung, ServerRequests
from harness.records.schema import Chunks, Outcome, Result
from harness.traffic.mix import MIXES

ROOT = Path(__file__).resolve().parents[2]
QUICK = MIXES["quick"]
EXIT_FAILURES, EXIT_UNUSABLE, EXIT_INVALID = 1, 2, 3


FILE = "-f", str(ROOT / "scenarios" / "podcast.py"), "--only-summary"


def locust(*options: str) -> list[str]:
    return [sys.executable, "-m", "locust", *FILE, *options]


def run(url: str, *options: str) -> subprocess.CompletedProcess:
    return locusts.run(*FILE, "--headless", *(("--host", url) if url else ()), "--stop-timeout", "1", *options)


def code_of(done: subprocess.CompletedProcess) -> int:
    """The exit code that a test without failures should have; a very busy host may make it INVALID."""
    return 0 if re.search("^  VALID", done.stdout, re.MULTILINE) else EXIT_INVALID


def result(outcome=Outcome.DONE, frames=2, received=(20, 30), **changes) -> Result:
    fields = dict(
        request_id="r", traffic_class="short", speakers=1, script_words=3, frames=frames, start_frame=0,
        chunk_frames=1, loop="closed", due_ns=10, sent_ns=11, ended_ns=40, outcome=outcome,
    )  # fmt: skip
    times = np.array(received, dtype=np.int64)
    return Result(**{**fields, **changes}, chunks=Chunks(times, times, np.full(len(times), 3200)))


def test_the_live_table_adds_what_runs_to_what_has_ended():
    results, table = [result()], LiveTable()
    table.rows(results, Progress())
    results.append(result(Outcome.ERROR, received=()))
    progress = Progress(active=2, audio_s_per_s=3.25, running=(Running("long", 0.5, float("nan"), 2, 4.0, "r9"),))
    long, short, total = table.rows(results, progress)
    assert (short["name"], short["done"], short["errors"], short["ttfa_p50"]) == ("short", "1", "1", "0.000")
    assert (long["active"], long["ttfa_p50"], long["rtf_p50"], long["stalls"]) == ("1", "0.500", "", "2")
    assert (total["active"], total["audio_rate"], total["audio_s"]) == ("2", "3.2", "4.3")
    assert records_csv(results).count("\n") == 3
    assert LiveTable().rows([], Progress())[0]["done"] == "0"


def test_the_live_table_counts_every_stall_of_a_stream_once_before_and_after_its_end():
    times = tuple(second * 10**9 for second in (1, 2, 3))  # two stalls of 867 ms
    look = Progress(active=1, running=(Running("short", 0.5, 7.5, 2, 0.4, "r"),))
    results, table = [], LiveTable()
    seen = [table.rows(results, look)[-1]]
    results.append(result(frames=3, received=times, ended_ns=times[-1]))
    seen += [table.rows(results, stale)[-1] for stale in (look, Progress())]
    assert [(each["stalls"], each["audio_s"]) for each in seen] == [("2", "0.4")] * 3


@pytest.mark.parametrize("folder, words", [("", "new folder"), ("/proc/records", "cannot write records")])
def test_no_load_begins_where_its_records_cannot_be_kept(tmp_path, folder, words):
    (tmp_path / "records.msgpack").touch()
    options = SimpleNamespace(rate_per_s="100", records=folder or str(tmp_path))
    with serving(Timetable()) as fake:
        users = lambda names: [UserClass("Caller", QUICK)]  # noqa: E731
        test = SpeechTest(SimpleNamespace(runner=None, host=fake.url, parsed_options=options), users)
        with pytest.raises(StoreError, match=words):
            test.start()
    assert (test.share is None or test.share.stopping) and test.progress() == Progress() and not fake.requests
    assert readers_left() == []


def test_a_closed_loop_ends_well(tmp_path):
    with serving(Timetable(interval_s=0.001)) as fake:
        done = run(fake.url, "-u", "2", "-r", "2", "-t", "2s", "--records", str(tmp_path / "records"))
    assert done.returncode == code_of(done), done.stdout + done.stderr
    records = read_records(tmp_path / "records")
    counts = [sum(each.outcome is outcome for each in records.results) for outcome in Outcome]
    assert counts[0] > 0 and counts[1:3] == [0, 0] and sum(counts) == records.end.submitted
    assert f"{counts[0]} done, 0 error, 0 cancelled, {counts[3]} unfinished" in done.stdout
    assert re.search(r"s delivered: equal\n", done.stdout)
    assert {each.loop for each in records.results} == {"closed"}


def test_an_open_loop_sends_by_its_schedule_whatever_the_answers(tmp_path):
    with serving(Timetable(hang_after=1)) as fake:
        options = ("--rate", "10", "--arrivals", "constant", "--steady", "2", "-t", "3s")
        done = run(fake.url, *options, "--records", str(tmp_path / "records"))
    records = read_records(tmp_path / "records")
    due_ns = np.array(sorted(each.due_ns for each in records.results)) - records.end.start_ns
    assert due_ns[:2].tolist() == [-1_000_000_000, -500_000_000]
    assert np.diff(due_ns[2:]).tolist() == [100_000_000] * (len(due_ns) - 3) and len(due_ns) > 8
    assert all(each.outcome is Outcome.UNFINISHED and len(each.chunks) == 1 for each in records.results)
    assert "0 done, 0 error" in done.stdout and records.run.asked.rate_per_s == 10


def test_failures_are_locusts_own_and_counted_exactly(tmp_path):
    with serving(Timetable(fail_after=0, error="slot 7 is gone")) as fake:
        done = run(fake.url, "-u", "3", "-r", "3", "-t", "2s", "--records", str(tmp_path / "records"))
    records = read_records(tmp_path / "records")
    assert done.returncode == EXIT_FAILURES
    assert {(each.outcome, each.error) for each in records.results} == {(Outcome.ERROR, "slot 7 is gone")}
    assert f"0 done, {len(records.results)} error" in done.stdout and "slot 7 is gone" in done.stdout + done.stderr


def test_a_test_ends_at_the_first_request_that_is_refused_for_good(tmp_path):
    """A retry cannot help: an hour of such answers would say no more."""
    with serving(Timetable(fail_after=0, error=f"{wire.REFUSED}unknown voice id 99")) as fake:
        done = run(fake.url, "-u", "2", "-r", "2", "-t", "60s", "--records", str(tmp_path / "records"))
        assert len(fake.requests) < 20
    assert done.returncode == EXIT_UNUSABLE
    assert "ended at the first request that the server rejects permanently: unknown voice id 99" in done.stdout


def test_a_measurement_of_nothing_is_invalid():
    with serving(Timetable(hang_after=0)) as fake:
        done = run(fake.url, "-u", "1", "-t", "1s", "--stop-timeout", "0")
    assert done.returncode == EXIT_INVALID
    assert "INVALID" in done.stdout and "0 frames were received" in done.stdout


def test_a_closed_loop_that_never_had_all_its_users_is_invalid_whatever_locust_makes_of_failures():
    with serving(Timetable(fail_after=2)) as fake:
        done = run(fake.url, "-u", "9", "-r", "1", "-t", "3s", "--exit-code-on-error", "0")
    assert done.returncode == EXIT_INVALID and "requests failed (100%)" in done.stdout
    assert "INVALID: the test ended before all its users had started" in done.stdout


def test_a_ladder_says_when_each_rung_began(tmp_path):
    with serving(Timetable(interval_s=0.01)) as fake:
        done = run(fake.url, "--ladder", "1,3", "--rung-seconds", "1", "--records", str(tmp_path / "records"))
    assert done.returncode == code_of(done), done.stdout + done.stderr
    records = read_records(tmp_path / "records")
    first, second = records.rungs
    assert (first.users, second.users) == (1, 3)
    assert first.end_ns - first.start_ns >= 10**9 and second.start_ns >= first.end_ns
    assert [most_at_once(records.results, rung) for rung in records.rungs] == [1, 3]
    assert records.end.start_ns <= first.start_ns


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_ladder_that_is_interrupted_ends_at_once_and_whole(tmp_path, signum):
    with serving(Timetable(hang_after=2)) as fake:
        options = (
            "--ladder",
            "2,3",
            "--rung-seconds",
            "300",
            "--stop-timeout",
            "300",
            "--records",
            str(tmp_path / "r"),
        )
        process = subprocess.Popen(locust("--headless", "--host", fake.url, *options), stdout=subprocess.PIPE, cwd=ROOT)
        while len(fake.requests) < 2:
            time.sleep(0.02)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=200)
    records = read_records(tmp_path / "r")
    assert (
        [str(each.outcome) for each in records.results] == ["unfinished"] * 2 == ["unfinished"] * records.end.submitted
    )
    assert b"0 done, 0 error, 0 cancelled, 2 unfinished" in output


def ladder_records(folder, timetable: Timetable, *options: str):
    with serving(timetable) as fake:
        run(fake.url, "--ladder", "1,2,3,4,5", "--until-saturated", "--records", str(folder), *options)
    return read_records(folder)


def test_a_ladder_goes_on_while_more_sessions_make_more_audio_however_slow(tmp_path):
    records = ladder_records(tmp_path / "records", Timetable(interval_s=0.27), "--rung-seconds", "3")
    assert [rung.users for rung in records.rungs] == [1, 2, 3, 4, 5]
    assert records.end.ladder_ended == ""


def test_a_ladder_ends_where_a_request_fails(tmp_path):
    records = ladder_records(tmp_path / "records", Timetable(fail_after=2, interval_s=0.01, error="slot 7 is gone"))
    assert [rung.users for rung in records.rungs] == [1]
    assert records.end.ladder_ended == "a request failed: slot 7 is gone"


def most_at_once(results, rung: HeldRung) -> int:
    """The most requests in progress at any time of a rung; between two requests of a user there are fewer."""
    inside = [each for each in results if each.sent_ns < rung.end_ns and each.ended_ns > rung.start_ns]
    times = [max(each.sent_ns, rung.start_ns) for each in inside]
    return max(sum(each.sent_ns <= now < each.ended_ns for each in inside) for now in times)


def two_workers() -> tuple[str, ...]:
    port = str(free_ports(1)[0])
    return ("--processes", "2", "--master-bind-port", port, "--master-port", port, "-u", "2")


def test_workers_share_the_load_and_the_master_has_every_result(tmp_path):
    with serving(Timetable(interval_s=0.001)) as fake:
        rate = ("--rate", "20", "--arrivals", "constant", "-t", "2s")
        done = run(fake.url, *two_workers(), *rate, "--records", str(tmp_path / "records"))
    records = read_records(tmp_path / "records")
    assert len(records.results) + records.end.never_sent == records.end.submitted > 1
    assert len({each.request_id.split("-")[0] for each in records.results}) == 2, done.stdout
    assert "never reported" not in done.stdout
    # The time runs from when all can send: a busy host's workers need seconds until they do.
    assert records.end.end_ns - records.end.start_ns >= 2e9
    assert len(records.results) >= 39 and records.run.run_s == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_in_which_nothing_was_due_is_an_error_that_names_the_fix(tmp_path, workers):
    options = two_workers() if workers else ("-u", "1")
    with serving(Timetable()) as fake:
        rate = ("--rate", "0.1", "--arrivals", "constant", "-t", "1s")
        done = run(fake.url, *options, *rate, "--records", str(tmp_path / "records"))
        assert not fake.requests
    assert done.returncode == EXIT_INVALID and "TTFA" not in done.stdout
    assert "no request was sent" in done.stderr
    assert "the first is due 10.0 s after the start; give at least -t 11s, or a higher --rate" in done.stderr
    assert not read_records(tmp_path / "records").end.valid


def test_the_time_limit_of_a_closed_loop_counts_from_when_it_can_send_too(tmp_path):
    with serving(Timetable(interval_s=0.001)) as fake:
        done = run(fake.url, *two_workers(), "-r", "2", "-t", "2s", "--records", str(tmp_path / "records"))
    assert done.returncode == code_of(done), done.stdout + done.stderr
    assert "No run time limit" not in done.stderr and "The test ends 2 s after all can send" in done.stderr


def test_several_servers_share_the_load_and_nobody_is_told_the_secret(tmp_path):
    secret = tmp_path / "headers"
    secret.write_text("authorization: Bearer s3cret\n")
    with serving(Timetable(interval_s=0.001)) as one, serving(Timetable()) as other:
        servers = ("--url", one.url, "--url", other.url, "--header", f"@{secret}", "--header", "x-key: s3cret")
        files = ("--records", str(tmp_path / "records"), "--html", str(tmp_path / "page.html"))
        done = run("", "--readers", "2", "-i", "12", "-u", "1", *servers, *files)
    records = read_records(tmp_path / "records")
    assert records.end.replicas == tuple(
        ServerRequests(address=each.url, requests=6, reconnects=0, passed_over=0, forgotten=0) for each in (one, other)
    )
    assert f"requests to each of 2 servers, round-robin: {one.url} 6, {other.url} 6" in done.stdout
    assert records.run.url == f"{one.url},{other.url}" and records.run.target.headers == ("authorization", "x-key")
    written = b"".join(path.read_bytes() for path in (*(tmp_path / "records").iterdir(), tmp_path / "page.html"))
    assert b"s3cret" not in written and "s3cret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (["--host", "127.0.0.1:9", "--url", "127.0.0.1:9"], "--url and --host mean the same"),
        (["--host", "127.0.0.1:9", "--header", "s3cret"], "--header number 1 has no colon"),
        (["--host", "127.0.0.1:9", "--tls-client-key", "k.pem"], "needs --tls-client-cert"),
        (["--host", "127.0.0.1:9"], "no Triton answers at 127.0.0.1:9"),
        (["--host", "http://127.0.0.1:8000"], "gRPC"),
        (["--host", "127.0.0.1:9", "--mix", "podcasts"], "did you mean 'podcast'"),
        (["--host", "127.0.0.1:9", "--scripts", "{}/empty"], "no .txt file"),
        (["--host", "127.0.0.1:9", "--scripts", "{}/five"], "speaker 5"),
        (["--host", "127.0.0.1:9", "--scripts", "{}/latin"], "not UTF-8"),
        (["--host", "127.0.0.1:9", "--records", "{}/used"], "new folder"),
        (["--host", "127.0.0.1:9", "--records", "{}/used/records.msgpack/r"], "is not a writable folder"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, options, words):
    for name, script in (("five", b"Speaker 5: Hi."), ("latin", b"Speaker 1: caf\xe9")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(script)
    for name in ("empty", "used"):
        (tmp_path / name).mkdir()
    (tmp_path / "used" / "records.msgpack").touch()
    done = locusts.run(*FILE, "--headless", *(option.format(tmp_path) for option in options))
    errors = [line for line in done.stderr.splitlines() if "INFO" not in line]
    assert done.returncode == EXIT_UNUSABLE and len(errors) == 1
    assert errors[0].startswith("locust: error: ") and words in errors[0]


@contextmanager
def page(url: str):
    """Locust with its web page, started by itself; yields the page's address."""
    port = free_ports(1)[0]
    options = ("--host", url, "--web-host", "127.0.0.1", "--web-port", str(port), "--autostart", "-u", "2", "-r", "2")
    process = subprocess.Popen(locust(*options), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(120)


def fetch(url: str, until) -> str:
    """The page as soon as ``until(text)`` holds."""
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                text = answer.read().decode()
            if until(text):
                return text
        except OSError:
            pass
        threading.Event().wait(0.2)
    raise AssertionError(f"{url} never showed it")


def ask(address: str, **form: str) -> str:
    """What the page says to a form that is sent."""
    data = urllib.parse.urlencode({"user_count": 2, "spawn_rate": 2, **form}).encode()
    with urllib.request.urlopen(f"{address}/swarm", data, timeout=120) as answer:
        return json.load(answer)["message"]


def test_the_page_shows_speech_live_and_hands_out_the_records():
    def shows_done(text):
        stats = json.loads(text).get("extended_stats")
        return stats and int(stats[0]["data"][-1]["done"]) > 0

    with serving(Timetable(interval_s=0.0005)) as fake, page(fake.url) as address:
        stats = json.loads(fetch(f"{address}/stats/requests", shows_done))
        total = stats["extended_stats"][0]["data"][-1]
        assert total["name"] == "Aggregated" and float(total["ttfa_p50"]) >= 0 and float(total["audio_s"]) > 0
        csv = fetch(f"{address}/speech/records.csv", lambda text: text.count("\n") > 1)
        assert csv.startswith("request_id,traffic_class,")
        assert ask(address, mix="podcasts").startswith("no mix is named 'podcasts'; did you mean 'podcast'?")
        assert ask(address, host="http://x").startswith("cannot stream from 'http://x'")
        assert ask(address, mix="quick", rate_per_s="") == "Swarming started"
        front = fetch(f"{address}/", lambda text: "extended_tabs" in text)
        assert '"title": "Speech"' in front and "speech/records.csv" in front
        assert "all columns in ms on this page are times to first audio" in front and 'href="./speech"' in front


def test_the_page_shows_charts_verdict_gates_and_slos_and_its_time_limit_counts_from_the_first_that_can_send():
    def state(word):
        return lambda text: json.loads(text)["state"] == word

    def has_charts(text):
        points = json.loads(text)["points"]
        return len(points.get("at_s", ())) > 2 and any(points["active"]) and any(points["ttfa_p95_s"])

    with serving(Timetable(interval_s=0.002)) as fake, page(fake.url) as address:
        live = f"{address}/speech/live.json"
        running = json.loads(fetch(live, has_charts))
        assert running["state"] == "running" and running["valid"] is None and running["gates"] == []
        assert {each["says"] for each in running["slos"]} == {"judged at the end"} and len(running["slos"]) == 4
        urllib.request.urlopen(urllib.request.Request(f"{address}/stop", method="POST"), timeout=120).close()
        ended = json.loads(fetch(live, state("ended")))
        assert ended["says"].startswith(("VALID", "INVALID")) and ended["valid"] is ended["says"].startswith("VALID")
        assert {each["mark"] for each in ended["gates"]} <= {"ok", "failed", "not tested"} and len(ended["gates"]) > 4
        assert {each["mark"] for each in ended["slos"]} <= {"met", "violated", "inconclusive"}
        assert ended["slos_say"].startswith("SLOs: ") and ended["points"]["at_s"]
        assert ask(address, run_time="5s") == "Swarming started"  # it is seen while it runs
        fetch(f"{live}?brief", state("running"))
        again = json.loads(fetch(live, state("ended")))
        old = ended["points"]
        kept = {name: values[: len(old["at_s"])] for name, values in again["points"].items()}
        assert kept != old, "the charts of a new test begin anew"
        assert "'soon' is not a time" in ask(address, run_time="soon")
