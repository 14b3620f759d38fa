"""`harness speak` and `harness doctor` reach servers as their options and the environment say."""

import os

import fake_triton
import pytest
from fake_triton import Timetable, serving
from replicas import Replica
from typer.testing import CliRunner

from harness import signoff
from harness.cli.main import app
from harness.cli.server_options import ONE_AT_A_TIME, Servers
from harness.client.target import OPTIONS, Target, as_environment, options_in_environment
from harness.deploy import running as on_this_host
from harness.errors import InputError

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


@pytest.mark.parametrize("command", ["speak", "doctor", "signoff", "sweep"])
def test_help_shows_the_options_of_a_target_beside_those_of_the_command(command):
    shown = harness(command, "--help").output
    without = () if command == "speak" else ONE_AT_A_TIME
    assert all((option in shown) == (option not in without) for option in ("--url", *OPTIONS))
    assert command != "speak" or "Write the audio to this WAV file." in shown


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


def test_the_environment_names_a_server_as_an_option_does_and_the_option_comes_first(replica, script):
    given = ("speak", script, "--frames", "2")
    said = harness(*given, LOCUST_URL=replica.url)
    assert said.exit_code == 0 and f"asking {replica.url}, as LOCUST_URL says" in said.output
    said = harness(*given, "--url", replica.url, LOCUST_URL="127.0.0.1:9")
    assert said.exit_code == 0 and f"asking {replica.url}\n" in said.output
    assert f"server {replica.url}" in harness("doctor", LOCUST_URL=f'["{replica.url}"]').output


def test_the_address_asked_is_printed_and_several_local_servers_are_an_error_that_lists_them(
    replica, script, monkeypatch
):
    running = [replica.url]
    monkeypatch.setattr(on_this_host, "local_urls", lambda root: running)
    monkeypatch.delenv("LOCUST_URL", raising=False)
    said = harness("speak", script, "--frames", "2")
    assert said.exit_code == 0 and f"asking {replica.url}, the `harness serve` of this host" in said.output
    running.append("127.0.0.1:9")
    said = harness("speak", script, "--frames", "2")
    assert isinstance(said.exception, InputError)
    assert all(words in str(said.exception) for words in (*running, "2 servers", "--url"))


def test_options_without_a_url_are_of_the_server_found(replica, script, monkeypatch):
    monkeypatch.setattr(on_this_host, "local_urls", lambda root: [replica.url])
    harness("speak", script, "--frames", "2", "--header", "x-team: speech")
    assert [each["x-team"] for each in replica.headers] == ["speech"] * 4


@pytest.fixture
def environment():
    """Commands may write into it: afterwards it is as it was."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("command", ["signoff", "sweep"])
def test_servers_that_are_measured_are_reached_as_the_options_say(command, monkeypatch, environment):
    """RemoteTriton and the Locust of every trial read the environment: what the options say must stand there."""
    seen = {}

    class Stop(Exception):
        pass

    def sign_off(plan, results, *, url, ray, topology, dilate, measured):
        seen.update(url=url, target=Target.from_environment(url.split(",")[0]), environment=dict(os.environ))
        raise Stop

    monkeypatch.setattr(signoff, "SignOff", sign_off)
    options = ("--header", "a: 1, 2", "--header", "b: 3", "--ready-timeout", "5", "--request-timeout", "7")
    for where in (("--url", "gpu7,gpu8:9"), ("--url", "gpu7", "--url", "gpu8:9")):
        said = harness(command, "quick", *where, *options)
        assert isinstance(said.exception, Stop), said.output
        assert seen["url"] == "gpu7,gpu8:9" and "LOCUST_URL" not in seen["environment"]
        target = seen["target"]
        assert (target.headers, target.ready_s, target.request_s) == ((("a", "1, 2"), ("b", "3")), 5.0, 7.0)
    said = harness(command, "quick", LOCUST_URL="gpu9")
    assert isinstance(said.exception, Stop) and seen["url"] == "gpu9" and "LOCUST_URL" not in seen["environment"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tls-ca", "none.pem", "--url", "gpu7"), "none.pem cannot be read"),
        (("--tls-ca", "none.pem"), "--tls-ca: these options need --url"),
        (("--silence-timeout", "-1", "--url", "gpu7"), "--silence-timeout -1 must be above 0"),
    ],
)
def test_a_mistake_in_an_option_of_a_sign_off_is_one_message(options, words):
    said = harness("signoff", "quick", *options)
    assert isinstance(said.exception, InputError) and words in str(said.exception)


def test_options_travel_through_the_environment():
    options = {"header": ["a: 1, 2", "b: 3"], "tls_ca": "ca.pem", "ready_timeout": "5"}
    assert options_in_environment(as_environment(options)) == options


def test_servers_named_nowhere_are_no_target_and_another_may_be_found():
    assert Servers((), {}, {}).target() is None
    assert Servers((), {}, {}).target("gpu7").addresses == ("gpu7:8001",)
