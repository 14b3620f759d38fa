"""`harness speak` and `harness doctor` reach servers as their options and the environment say."""

import fake_triton
import pytest
from fake_triton import Timetable, serving
from replicas import Replica
from typer.testing import CliRunner

from harness.cli import app
from harness.errors import InputError
from harness.targets import OPTIONS

WIDE = {"COLUMNS": "300", "TERMINAL_WIDTH": "300"}


def harness(*arguments, **environment):
    return CliRunner().invoke(app, [str(each) for each in arguments], env=WIDE | environment)


@pytest.fixture
def replica(monkeypatch):
    monkeypatch.setattr(fake_triton, "FakeTriton", Replica)
    with serving(Timetable()) as fake:
        yield fake


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "talk.txt"
    path.write_text("Speaker 1: Good morning.")
    return path


@pytest.mark.parametrize("command", ["speak", "doctor"])
def test_help_shows_the_options_of_a_target_beside_those_of_the_command(command):
    shown = harness(command, "--help").output
    assert all(option in shown for option in ("--url", *OPTIONS))
    assert command == "doctor" or "Write the audio to this WAV file." in shown


def test_options_come_before_the_environment(replica, script, tmp_path):
    (tmp_path / "headers").write_text("x-team: speech\n")
    environment = {"LOCUST_HEADER": f"@{tmp_path}/headers", "LOCUST_SILENCE_TIMEOUT": "soon"}
    given = ("speak", script, "--frames", "2", "--url", replica.url)
    said = harness(*given, "--silence-timeout", "5", **environment)
    assert said.exit_code == 0 and "2 of 2 frames" in said.output
    assert [each["x-team"] for each in replica.headers] == ["speech"] * 4
    harness(*given, "--silence-timeout", "5", "--header", "x-team: other", **environment)
    assert [each["x-team"] for each in replica.headers[4:]] == ["other"] * 4
    said = harness(*given, **environment)
    assert isinstance(said.exception, InputError) and "--silence-timeout 'soon'" in str(said.exception)


def test_the_doctor_looks_at_every_server(replica):
    said = harness("doctor", "--url", replica.url)
    assert f"server {replica.url}" in said.output and "ready, reached in plain text" in said.output
    both = harness("doctor", "--url", f"{replica.url},127.0.0.1:9")
    assert both.exit_code == 1 and "no Triton answers at 127.0.0.1:9" in both.output and replica.url in both.output
