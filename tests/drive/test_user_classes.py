"""Several user classes in one locustfile, by Locust's own conventions: weights, fixed counts, names, tags, the page."""

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import locusts
import numpy as np
import pytest
from fake_triton import Timetable, serving
from test_user import EXIT_UNUSABLE, ROOT, code_of, fetch

from harness.client.stream import failed_result
from harness.clock import HOST
from harness.deploy.server import free_ports
from harness.drive import generator
from harness.drive.console import start_line
from harness.drive.generator import Share, UserClass
from harness.drive.options import merged, settings_for
from harness.errors import InputError
from harness.records.load_log import read_records
from harness.records.load_test import UserRecord
from harness.traffic.mix import MIXES, Lengths, Mix, TrafficClass

QUICK = Timetable(interval_s=0.0005)
LOCUSTFILE = """
from locust import tag
from harness.scenario import Lengths, Mix, SpeechUser, TrafficClass

def mix(name, low, **more):
    short = TrafficClass("short", 1.0, Lengths.parse({"uniform": [low, low + 1]}), slos={"ttfa_p95_s": 5})
    return Mix(name, (short, TrafficClass("rare", 0.1, Lengths.parse({"fixed": low}))), **more)

class Reader(SpeechUser):
    weight = 3
    mix = mix("reading", 1)

@tag("batch")
class Batch(SpeechUser):
    mix = mix("batches", 3, chunk_frames=2)

class Prober(SpeechUser):
    fixed_count = 1
    mix = mix("probe", 1)
"""


@pytest.fixture
def locustfile(tmp_path):
    (tmp_path / "several.py").write_text(LOCUSTFILE)
    return tmp_path / "several.py"


def asked(locustfile, url: str, *options: str) -> list[str]:
    return ["-f", str(locustfile), "--host", url, "--stop-timeout", "1", *options]


def run(locustfile, *options: str) -> subprocess.CompletedProcess:
    with serving(QUICK) as fake:
        return locusts.run(*asked(locustfile, fake.url, "--headless", "--only-summary", *options))


def sent(folder) -> Counter:
    """Requests by user class."""
    return Counter(each.traffic_class.split("/")[0] for each in read_records(folder).results)


def users(*names: str, **changes) -> list[UserClass]:
    return [replace(UserClass(name, MIXES["quick"]), **changes) for name in names]


def test_a_closed_loop_has_locusts_own_distribution_and_records_name_the_class(locustfile, tmp_path):
    done = run(locustfile, "-u", "5", "-r", "5", "-t", "3s", "--records", str(tmp_path / "r"))
    assert done.returncode == code_of(done), done.stdout + done.stderr
    assert '{"Batch": 1, "Prober": 1, "Reader": 3} (5 total users)' in done.stderr
    records = read_records(tmp_path / "r")
    assert set(sent(tmp_path / "r")) == {"Batch", "Prober", "Reader"}
    assert records.run.asked.users == {
        "Batch": UserRecord(mix="batches", weight=1, fixed_count=0),
        "Prober": UserRecord(mix="probe", weight=1, fixed_count=1),
        "Reader": UserRecord(mix="reading", weight=3, fixed_count=0),
    }
    assert {each.chunk_frames for each in records.results if each.traffic_class.startswith("Batch/")} == {2}
    assert {each.chunk_frames for each in records.results if each.traffic_class.startswith("Reader/")} == {1}
    assert "ttfa_s p95 of class Reader/short <= 5" in done.stdout
    assert "Reader (weight 3, mix reading, " in done.stderr


def test_the_arrivals_of_an_open_loop_are_split_by_weight(locustfile, tmp_path):
    options = ("Reader", "Batch", "--rate", "60", "--arrivals", "constant", "-t", "4s")
    done = run(locustfile, *options, "--records", str(tmp_path / "r"))
    assert done.returncode == code_of(done), done.stdout + done.stderr
    counts, records = sent(tmp_path / "r"), read_records(tmp_path / "r")
    share = counts["Reader"] / counts.total()
    assert counts.total() > 200 and abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / counts.total())
    due_ns = sorted(each.due_ns for each in records.results)
    assert np.ptp(np.diff(due_ns)) < 100, "the classes are together one process"


def test_an_open_loop_refuses_a_class_of_fixed_count_beside_others(locustfile):
    done = run(locustfile, "--rate", "5", "-t", "1s")
    assert done.returncode == EXIT_UNUSABLE and "Traceback" not in done.stderr
    assert "Prober has fixed_count 1: an open loop splits its arrivals between user classes by weight" in done.stderr
    assert settings_for({"rate_per_s": "1"}, users("Prober", fixed_count=1)).load.loop == "open"  # alone it has all


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("Reader",), {"short", "rare"}),  # one class alone keeps the names of its mix
        (("-T", "batch"), {"short", "rare"}),
        (("-T", "batch", "rare", "-E", "short"), {"Batch/rare", "Prober/rare", "Reader/rare"}),
        (("-E", "batch", "rare"), {"Prober/short", "Reader/short"}),
    ],
)
def test_names_and_tags_choose_classes(locustfile, tmp_path, options, names):
    done = run(locustfile, *options, "-u", "4", "-r", "4", "-i", "24", "--records", str(tmp_path / "r"))
    assert "Traceback" not in done.stderr
    assert set(read_records(tmp_path / "r").run.asked.classes) == names
    seen = {each.traffic_class for each in read_records(tmp_path / "r").results}
    assert seen <= names and {name.split("/")[0] for name in seen if "/" in name} == {
        name.split("/")[0] for name in names if "/" in name
    }


@pytest.mark.parametrize(
    ("values", "of", "words"),
    [
        (
            {"mix": "shorts"},
            users("A", "B"),
            "--mix shorts would replace the traffic of each of A, B: name one",
        ),
        ({"plan": "plan.yaml"}, users("A", "B"), "--plan plan.yaml would replace"),
        ({"speech_tags": ["shor"]}, users("A", "B"), "did you mean 'short'"),
        ({"speech_exclude_tags": ["vip"]}, users("A", "B", tags=frozenset({"vip"})), "leave no class"),
        ({"rate_per_s": "1"}, users("A", "B", fixed_count=2), "A has fixed_count 2"),
    ],
)
def test_what_several_classes_cannot_share_is_refused(values, of, words):
    with pytest.raises(InputError, match=re.escape(words)):
        settings_for(values, of)


def test_classes_may_differ_in_no_option():
    assert merged({"A": {"rate": 1}, "B": {"rate": 1, "every": 5}}) == {"rate": 1, "every": 5}
    with pytest.raises(InputError, match="option 'rate' is 1 in A and 2 in B, and a test has one: give --rate"):
        merged({"A": {"rate": 1}, "B": {"rate": 2}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "option 'rate' is 4 in A and 5 in B"),
        (("A",), "poisson at 4 requests/s"),
        (("B",), "poisson at 5 requests/s"),
        (("C",), "closed loop"),
        (("--rate", "6"), "poisson at 6 requests/s"),
        (("--stages", "9s@7"), "1 stages of 7 to 7 requests/s"),
    ],
)
def test_options_are_those_of_the_classes_that_run(tmp_path, options, said):
    (tmp_path / "own.py").write_text(
        "from harness.scenario import SpeechUser\n"
        "class A(SpeechUser):\n    options = {'rate': 4}\n"
        "class B(SpeechUser):\n    options = {'rate': 5}\n"
        "class C(SpeechUser):\n    pass\n"
    )
    done = run(tmp_path / "own.py", *options, "-t", "1s")
    assert said in done.stderr and "Traceback" not in done.stderr


def test_the_mix_of_several_classes_is_that_of_their_parts():
    one = Mix("one", (TrafficClass("short", 1.0, Lengths.parse({"fixed": 4})),), chunk_frames=3, voices=(1, 2))
    two = Mix("two", (TrafficClass("short", 5.0, Lengths.parse({"fixed": 8})),), voices=(3,))
    both = Mix.combined({"A": (3, one), "B": (1, two)})
    assert both.shares() == {"A/short": 0.75, "B/short": 0.25} and both.mean_audio_s() == pytest.approx(5)
    source = generator.requests(both, np.random.default_rng(1), generator.ScriptSource())
    for request in (next(source) for _ in range(50)):
        is_one = request.traffic_class == "A/short"
        assert request.chunk_frames == (3 if is_one else 1)
        assert set(request.speaker_ids) <= ({1, 2} if is_one else {3})
    settings = settings_for({"chunk_frames": "7"}, [UserClass("A", one, 3), UserClass("B", two)])
    assert {each.chunk_frames for each in settings.mix.classes} == {7}
    assert "B (weight 1, mix two, 8 audio s per request)" in start_line(settings)


class NoPool:
    """Takes requests and sends none."""

    clock = HOST

    def __init__(self, *_):
        pass

    def submit(self, request, loop, then):
        return SimpleNamespace(wait=lambda: failed_result(request, loop, RuntimeError("not sent")))


def test_each_class_draws_requests_of_its_own_whatever_the_others_do(monkeypatch):
    monkeypatch.setattr(generator, "ReaderPool", NoPool)
    settings = settings_for({}, users("A", "B"))

    def sizes(share, user, count):
        return [share.speak(user=user).frames for _ in range(count)]

    one, other = (Share(settings, "127.0.0.1:1", print) for _ in range(2))
    alone, mixed = sizes(one, "A", 6), []
    for _ in range(6):
        mixed += sizes(other, "A", 1)
        sizes(other, "B", 2)
    assert alone == mixed and sizes(one, "B", 6) == sizes(Share(settings, "127.0.0.1:1", print), "B", 6)
    assert one.speak(user="C") is None  # not part of the test
    alone = settings_for({}, users("A"))
    share = Share(alone, "127.0.0.1:1", print)
    assert sizes(share, "A", 6) == sizes(Share(alone, "127.0.0.1:1", print), "", 6)


def test_workers_share_several_classes(locustfile, tmp_path):
    port = str(free_ports(1)[0])
    workers = ("--processes", "2", "--master-bind-port", port, "--master-port", port)
    options = ("Reader", "Batch", "-u", "4", "-r", "4", *workers)
    done = run(locustfile, *options, "-t", "2s", "--records", str(tmp_path / "r"))
    assert "has a different" not in done.stdout and set(sent(tmp_path / "r")) == {"Reader", "Batch"}, done.stdout
    assert len({each.request_id.split("-")[0] for each in read_records(tmp_path / "r").results}) >= 3


def test_the_page_runs_the_classes_that_are_picked(locustfile):
    def swarm(address, *pairs):
        form = urllib.parse.urlencode([("user_count", 2), ("spawn_rate", 2), *pairs]).encode()
        with urllib.request.urlopen(f"{address}/swarm", form, timeout=120) as answer:
            return json.load(answer)["message"]

    def names(address):
        text = fetch(f"{address}/speech/live.json", lambda text: len(json.loads(text)["rows"]) > 1)
        return {row["name"] for row in json.loads(text)["rows"]} - {"Aggregated"}

    with serving(QUICK) as fake:
        port = free_ports(1)[0]
        options = ("--class-picker", "--web-host", "127.0.0.1", "--web-port", str(port))
        command = [sys.executable, "-m", "locust", *asked(locustfile, fake.url, *options)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            address = f"http://127.0.0.1:{port}"
            fetch(f"{address}/speech/live.json", lambda text: json.loads(text)["state"] == "ready")
            refusal = swarm(address, ("rate_per_s", "1"))
            picked = [("user_classes", "Reader"), ("user_classes", "Batch")]
            assert refusal.startswith("Prober has fixed_count")
            assert swarm(address, *picked, ("run_time", "3s"), ("rate_per_s", "30")) == "Swarming started"
            fetch(f"{address}/speech/live.json", lambda text: json.loads(text)["state"] == "ended")
            assert {each.split("/")[0] for each in names(address)} == {"Reader", "Batch"}
        finally:
            process.terminate()
            process.wait(120)


def test_a_ladder_does_not_go_with_the_class_picker(locustfile):
    done = run(locustfile, "--ladder", "1,2", "--class-picker")
    assert done.returncode == EXIT_UNUSABLE and "--ladder does not go with --class-picker" in done.stderr
