"""The command line: every command helps, and every mistake is one message without a stack trace."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli import main
from harness.cli.main import app
from harness.exit_codes import INTERNAL, OF_VERDICT

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "init",
    "signoff",
    "sweep",
    "fit",
    "plan",
    "day",
    "fleet",
    "simulate",
    "report",
    "compare",
    "serve",
    "speak",
    "profile",
    "doctor",
    "scenarios",
    "cards",
    "studio",
    "export",
)


def harness(*arguments):
    command = [sys.executable, "-m", "harness", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_help_lists_every_command_and_each_has_help_of_its_own():
    runner = CliRunner()
    overview = runner.invoke(app, ["--help"])
    assert {command.name or command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)
    for name in COMMANDS:
        assert name in overview.output
        assert runner.invoke(app, [name, "--help"]).exit_code == 0


def words_of(help_text: str) -> str:
    """Without the frames that the terminal draws, and on one line."""
    return " ".join(re.sub(r"[\u2500-\u257f]", " ", help_text).split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_word_of_its_source(name):
    """`<stage>.<knob>=<value>` in a help text once read as an HTML tag, and was gone."""
    command = next(each for each in app.registered_commands if each.callback.__name__ == name)
    shown = words_of(
        CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "4000", "TERMINAL_WIDTH": "4000"}).output
    )
    parameters = inspect.signature(command.callback, eval_str=True).parameters.values()
    texts = [about.help for each in parameters for about in getattr(each.annotation, "__metadata__", ())]
    assert all(texts), f"a parameter of {name} has no help"
    for text in (command.callback.__doc__, command.epilog, *texts):
        assert " ".join(text.split()) in shown


def test_the_command_line_itself_is_light():
    """`harness --help` once took 3 to 6 s, of imports that no help needs."""
    heavy = ("torch", "pandas", "plotly", "numba", "scipy", "locust", "ray", "pyarrow", "optuna", "numpy", "grpc")
    code = f"import sys, harness.cli.main; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_doctor_finds_this_machine_fit():
    result = harness("doctor")
    assert result.returncode == 0, result.stdout
    assert "Triton" in result.stdout and "Traceback" not in result.stderr


@pytest.fixture
def files(tmp_path):
    (tmp_path / "misspelt.yaml").write_text((ROOT / "scenarios" / "quick.yaml").read_text() + "\ntargts_qps: [1]\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "five.txt").write_text("Speaker 5: Hi")
    (tmp_path / "fine.txt").write_text("Speaker 1: Hi")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("signof",), "signoff"),
        (("signoff", "{}/none.yaml"), "none.yaml"),
        (("signoff", "{}/misspelt.yaml"), "targets_qps"),
        (("plan", "--run", "{}/foreign"), "not a run of this harness"),
        (("report", "--run", "{}/foreign"), "not a run of this harness"),
        (("fit", "--run", "{}/none"), "none"),
        (("simulate", "--run", "{}/none", "--qps", "0"), "none"),
        (("plan", "--run", str(ROOT / "results" / "sample-quick"), "--qps", ","), "such as 0.5,1,5"),
        (("serve", "--preset", "2b"), "tiny, 1.5b or 7b"),
        (("serve", "--parameter", "entry.waiting_limit=3"), "vibevoice_full_pipeline.waiting_limit"),
        (("serve", "--parameter", "waiting_limit"), "<model>.<parameter>=<value>"),
        (("serve", "--emulate", "{}/misspelt.yaml"), "harness profile"),
        (("serve", "--gpus", "4"), "this host has no GPU: leave gpus out"),
        (("profile", "--preset", "2b"), "tiny, 1.5b or 7b"),
        (("profile", "--device", "tpu"), "auto, cpu, cuda"),
        (("profile", "--budget-seconds", "nan"), "5 to 86400"),
        (("serve", "--knob", "diffusion.delay_us=1"), "diffusion_decoder"),
        (("serve", "--knob", "diffusion_decoder.delay_us=soon"), "whole number"),
        (("serve", "--port", "70000"), "65535"),
        (("speak", "{}/bytes.txt", "--url", "127.0.0.1:1"), "UTF-8"),
        (("speak", "{}/five.txt", "--url", "127.0.0.1:1"), "peaker"),
        (("speak", "{}/none.txt", "--url", "127.0.0.1:1"), "cannot read"),
    ],
)
def test_a_mistake_is_one_message_that_says_what_to_do(files, here, arguments, message):
    code, said = here(*(argument.format(files) for argument in arguments))
    assert code == 64
    assert message in said
    assert "Traceback" not in said
    assert (files / "foreign" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speak", "{}/fine.txt", "--url", "127.0.0.1:1"), "no Triton answers"),
        (("signoff", "scenarios/quick.yaml", "--results", "{}", "--url", "127.0.0.1:1"), "no Triton"),
    ],
)
def test_a_server_that_is_not_there_has_an_exit_code_of_its_own(files, arguments, message):
    result = harness(*(argument.format(files) for argument in arguments))
    said = result.stdout + result.stderr
    assert result.returncode == 69 and message in said and "Traceback" not in said


def test_a_mistake_ends_the_process_with_its_code():
    result = harness("signof")
    assert result.returncode == 64 and "signoff" in result.stderr and "Traceback" not in result.stderr


def test_a_fault_of_the_harness_is_no_verdict(monkeypatch, capsys):
    """Python's own exit code of an exception is 1, which would read as "missed"."""
    monkeypatch.setattr(main, "app", lambda **_: 1 / 0)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == INTERNAL and ended.value.code not in OF_VERDICT.values()
    assert "ZeroDivisionError" in capsys.readouterr().err
