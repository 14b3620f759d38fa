"""The scenarios run as they stand, and so do Locust's own ways of running them."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import locusts
import numpy as np
import pytest
from fake_triton import Timetable, serving
from test_user import EXIT_UNUSABLE, ROOT, code_of

from harness.deploy.ports import free_ports
from harness.drive.generator import LoadSettings, arrival_times
from harness.drive.load import Load
from harness.records.load_log import read_records
from harness.traffic.arrivals import Arrivals, Trace
from harness.traffic.mix import MIXES

OF_THE_STUDIO = {ROOT / "scenarios" / name for name in ("jobs.py", "day.py")}  # that drive HTTP
SCENARIOS = sorted(set((ROOT / "scenarios").glob("*.py")) - OF_THE_STUDIO)
QUICK = Timetable(interval_s=0.001)


def asked(scenario: str, url: str, *options: str) -> list[str]:
    file = str(ROOT / "scenarios" / f"{scenario}.py")
    return ["-f", file, "--headless", "--only-summary", "--host", url, "--stop-timeout", "1", *options]


def command(scenario: str, url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "locust", *asked(scenario, url, *options)]


def run(scenario: str, *options: str, timetable: Timetable = QUICK, **more) -> subprocess.CompletedProcess:
    with serving(timetable) as fake:
        return locusts.run(*asked(scenario, fake.url, *options), **more)


def processes(count: int) -> tuple[str, ...]:
    port = str(free_ports(1)[0])
    return ("--processes", str(count), "--master-bind-port", port, "--master-port", port)


def due_s(records) -> np.ndarray:
    """When requests of the window were due, in seconds from the start of the arrivals."""
    inside = (each.due_ns for each in records.results if each.due_ns < records.end.end_ns)
    return np.sort([(due_ns - records.end.origin_ns) / 1e9 for due_ns in inside])


@pytest.mark.parametrize("scenario", [path.stem for path in SCENARIOS])
def test_a_scenario_runs_as_it_stands(scenario):
    done = run(scenario, "--rate", "5", "--steady", "2", "-t", "3s")
    said = done.stdout + done.stderr
    assert done.returncode == code_of(done), said
    assert "open loop, mix" in done.stderr and "audio s per second, 2 sessions in progress at the start" in done.stderr
    assert "Traceback" not in said and "0 error" in done.stdout
    assert ("goodput" in done.stdout) == (scenario != "soak")


@pytest.fixture(scope="module")
def speech_help():
    return locusts.run("-f", str(SCENARIOS[0]), "--help-speech").stdout


def test_a_scenarios_file_names_every_command_with_known_options(speech_help):
    for path in SCENARIOS:
        text = path.read_text()
        assert f"locust -f scenarios/{path.name}" in text and len(text.splitlines()) < 40
        for option in re.findall(r" (--[a-z][a-z-]+)", text):
            assert option in speech_help, f"{path.name}: {option}"


def test_a_locustfile_needs_one_import_of_the_harness():
    for path in SCENARIOS:
        assert set(re.findall(r"^(?:from|import) (\S+)", path.read_text(), re.MULTILINE)) == {"harness.scenario"}


def test_help_says_what_every_exit_code_means(speech_help):
    words = " ".join(speech_help.split())
    for code, meaning in enumerate(("all is well", "requests failed", "cannot be used", "the measurement is INVALID")):
        assert re.search(rf"\b{code} [^,]*{meaning}", words), code


def test_a_trace_over_workers_is_one_replay_and_the_record_says_which(tmp_path):
    times = np.cumsum(np.random.default_rng(1).gamma(0.5, 0.4, 200))
    (tmp_path / "day.csv").write_text("TIMESTAMP\n" + "\n".join(f"{time:.4f}" for time in times))
    options = ("--trace", str(tmp_path / "day.csv"), "--rate", "12", *processes(2), "-t", "6s")
    done = run("shorts", *options, "--records", str(tmp_path / "records"))
    records, trace = read_records(tmp_path / "records"), Trace.read(tmp_path / "day.csv")
    assert (records.run.asked.arrivals, records.run.asked.trace.sha256) == ("trace", trace.sha256)
    load = LoadSettings(MIXES["shorts"], Load(arrivals=Arrivals("trace", 12.0, trace=trace)))
    came = due_s(records)
    assert len(came) > 10 and len({each.request_id.split("-")[0] for each in records.results}) == 2
    expected = [time for time, _ in zip(arrival_times(load), came, strict=False)]
    assert came == pytest.approx(expected, abs=1e-6), done.stdout


def test_iterations_end_the_test_and_count_over_workers(tmp_path):
    done = run("podcast", "-i", "7", "-u", "3", "-r", "3", *processes(2), "--records", str(tmp_path / "records"))
    records = read_records(tmp_path / "records")
    assert len(records.results) == 7 and done.returncode == code_of(done), done.stdout + done.stderr


def test_iterations_of_an_open_loop_are_its_first_arrivals_in_one_class(tmp_path):
    files = ("--html", str(tmp_path / "report.html"), "--csv", str(tmp_path / "table"))
    done = run("podcast", "-i", "6", "--rate", "20", "--tags", "short", *files, "--every", "1")
    assert (
        "short" in (tmp_path / "report.html").read_text() and "short,6,0" in (tmp_path / "table_stats.csv").read_text()
    )
    assert "6 done, 0 error" in done.stdout and "  podcast  " not in done.stdout
    assert "6 requests were due, and the process has 6 in the window" in done.stdout


def test_options_come_from_the_environment_and_a_configuration_file(tmp_path):
    (tmp_path / "locust.conf").write_text("arrivals = constant\nrate = 4\nrun-time = 3s\nmix = shorts\n")
    done = run("podcast", "--config", str(tmp_path / "locust.conf"), env={**os.environ, "LOCUST_CHUNK_FRAMES": "5"})
    assert "mix shorts" in done.stderr and "constant at 4 requests/s" in done.stderr
    done = run("podcast", env={**os.environ, "LOCUST_STAGES": "9s@x"})
    assert done.returncode == EXIT_UNUSABLE and "--stages '9s@x' is not DURATION@RATE" in done.stderr


def in_another_time(offset_s: int) -> list[str]:
    """A command in front that gives a process another monotonic clock, as another host has it."""
    return ["unshare", "--time", "--monotonic", str(offset_s), "--fork", "--kill-child"]


def test_workers_with_clocks_of_their_own_send_one_process(tmp_path):
    if subprocess.run([*in_another_time(5), "true"], capture_output=True).returncode:
        pytest.skip("this user may not give a process a clock of its own")
    port = str(free_ports(1)[0])
    with serving(QUICK) as fake:
        ways = (["--worker", "--master-port", port], ["--master", "--expect-workers", "2", "--master-bind-port", port])
        worker = [part for part in command("shorts", fake.url, *ways[0]) if part != "--headless"]
        options = ("--rate", "10", "--arrivals", "constant", "-t", "6s", "--records", str(tmp_path / "records"))
        workers = [subprocess.Popen([*in_another_time(10**5 * (1 + n)), *worker], cwd=ROOT) for n in range(2)]
        told = [*command("shorts", fake.url, *ways[1]), *options]
        done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, timeout=200)
        for one in workers:
            one.wait(120)
    records = read_records(tmp_path / "records")
    assert "2 of 2 workers ran on other hosts" in done.stdout
    came = due_s(records)
    assert len(came) > 5 and came == pytest.approx(np.arange(1, 1 + len(came)) / 10, abs=1e-6)


def test_a_server_that_dies_in_mid_test_is_counted_and_the_test_ends(tmp_path):
    with serving(Timetable(interval_s=0.02)) as fake:
        told = command("shorts", fake.url, "-u", "4", "-r", "4", "-t", "6s", "--records", str(tmp_path / "records"))
        process = subprocess.Popen(told, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(fake.requests) < 8:
            time.sleep(0.05)
        fake.kill()
        output, _ = process.communicate(timeout=200)
    records = read_records(tmp_path / "records")
    outcomes = [str(each.outcome) for each in records.results]
    assert records.end.submitted == len(outcomes) + records.end.never_sent and outcomes.count("error") >= 4
    assert f"{outcomes.count('done')} done, {outcomes.count('error')} error" in output and process.returncode == 1
    assert not Path("/proc", str(process.pid)).exists()
