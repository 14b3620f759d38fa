"""A signed answer is held against its evidence: whatever changes after it was signed is named."""

import hashlib
import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli.main import app
from harness.errors import InputError
from harness.exit_codes import OF_VERDICT
from harness.records.seal import read_seal
from harness.records.store import Run
from harness.report import recomputed
from harness.report.facts import REPORT_NAME, SEAL_NAME
from harness.report.seal import check_seal, must_be_signed, sign
from harness.report.sweep_page import describe_best
from harness.runs import analysis

SAMPLE = Path(__file__).resolve().parents[2] / "results" / "sample-quick"


@pytest.fixture(scope="module")
def signed_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed") / "run"
    shutil.copytree(SAMPLE, folder)
    run = Run.open(folder)
    run.update_manifest(finished_at=datetime.now(UTC).isoformat(timespec="seconds"))
    sign(run)
    return shutil.copytree(folder, folder.with_name("as signed"))


@pytest.fixture
def signed(signed_once):
    """The run as it was signed, where it was signed: its page names the folder."""
    folder = signed_once.with_name("run")
    shutil.rmtree(folder)
    return shutil.copytree(signed_once, folder)


def test_a_signed_run_is_intact_and_signing_it_twice_gives_the_same_bytes(signed):
    first = (signed / SEAL_NAME).read_bytes()
    found = check_seal(signed)
    assert found.problems == () and found.files >= 4
    assert found.verdict == Run.open(signed).plan().verdict
    sign(Run.open(signed))
    assert (signed / SEAL_NAME).read_bytes() == first


def test_a_pipeline_reads_the_answer_from_it(signed):
    content, plan = json.loads((signed / SEAL_NAME).read_text()), Run.open(signed).plan()
    answer = content["answer"]
    assert (content["verdict"], answer["unit"], answer["reasons"]) == (plan.verdict, plan.unit, list(plan.reasons))
    assert [(each["qps"], each["devices"]) for each in answer["targets"]] == [
        (each.qps, each.devices) for each in plan.targets
    ]


def test_an_answer_from_a_changed_run_is_given_with_a_warning(signed, monkeypatch):
    monkeypatch.setattr(analysis, "plan_of", lambda run, *_: run.plan())  # what they compute is for other tests
    monkeypatch.setattr(analysis, "fit_of", lambda run: run.fit())
    intact = CliRunner().invoke(app, ["plan", "--run", str(signed), "--qps", "1"])
    assert intact.exit_code == 0 and "failed verification" not in intact.stderr
    (signed / "plan.json").write_text((signed / "plan.json").read_text() + " ")
    for command in (["plan", "--qps", "1"], ["simulate", "--qps", "1"], ["fit"]):
        changed = CliRunner().invoke(app, [*command, "--run", str(signed)])
        assert changed.exit_code == 0 and "plan.json was changed after" in changed.stderr


EVIDENCE = ["trials.jsonl", "plan.json", "fit.json", "manifest.json", "requests.parquet/*", REPORT_NAME]


@pytest.mark.parametrize("name", EVIDENCE)
def test_a_changed_byte_is_found_in_whatever_file(signed, name):
    path = next(signed.glob(name))
    name = path.relative_to(signed).as_posix()
    path.write_bytes(path.read_bytes() + b" ")
    (problem,) = check_seal(signed).problems
    assert problem.startswith(f"{name} was changed after")
    path.unlink()
    (problem,) = check_seal(signed).problems
    assert problem.startswith(f"{name} is missing")


def test_a_file_that_came_later_is_named(signed):
    (signed / "more.jsonl").write_text("{}")
    assert check_seal(signed).problems == ("more.jsonl was added after the answer was signed",)


def test_a_verdict_turned_by_hand_is_found(signed):
    content = json.loads((signed / SEAL_NAME).read_text())
    content["verdict"] = "met" if content["verdict"] != "met" else "missed"
    (signed / SEAL_NAME).write_text(json.dumps(content))
    assert check_seal(signed).problems == (f"{SEAL_NAME} was changed after it was signed",)


def test_an_answer_expires(signed):
    days = timedelta(days=Run.open(signed).manifest.plan.get("valid_days", 90))
    signed_at = datetime.fromisoformat(Run.open(signed).manifest.finished_at)
    assert check_seal(signed, signed_at + days - timedelta(seconds=1)).problems == ()
    assert "it expired at" in check_seal(signed, signed_at + days + timedelta(seconds=1)).problems[0]


def forge(signed, **changes):
    """The seal with other words and a hash of its own that fits them."""
    seal, _ = read_seal((signed / SEAL_NAME).read_text())
    (signed / SEAL_NAME).write_text(replace(seal, **changes).text())


def test_a_seal_forged_with_its_hash_says_another_thing_than_the_run(signed):
    forge(signed, verdict="missed", expires_at="2999-01-01T00:00:00+00:00")
    said = check_seal(signed).problems
    assert said == tuple(f"{SEAL_NAME} differs from the run in {name}" for name in ("verdict", "expires_at"))


def test_an_answer_of_the_future_is_not_relied_on(signed):
    signed_at = datetime.fromisoformat(Run.open(signed).manifest.finished_at)
    assert "in the future" in check_seal(signed, signed_at - timedelta(seconds=1)).problems[0]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": "x", "verdict": 1}'])
def test_a_damaged_seal_is_said_to_be(signed, content):
    (signed / SEAL_NAME).write_text(content)
    with pytest.raises(InputError, match="is damaged: restore it"):
        check_seal(signed)
    answer = CliRunner().invoke(app, ["report", "--run", str(signed)])
    assert isinstance(answer.exception, InputError) or "not signed again" in answer.output


@pytest.mark.parametrize("changes", [{"verdict": "splendid"}, {"expires_at": "2999-01-01T00:00:00"}])
def test_an_unknown_verdict_or_a_time_without_a_zone_is_damage(signed, changes):
    forge(signed, **changes)
    with pytest.raises(InputError, match="is damaged"):
        check_seal(signed)


@pytest.mark.parametrize(
    "changes", [{"more": 1}, {"answer": {"unit": "one GPU"}}, {"evidence": [{"name": "fit.json"}]}, {"emulated": "so"}]
)
def test_fields_that_a_seal_does_not_have_or_lacks_are_damage_whatever_its_hash(signed, changes):
    content = json.loads((signed / SEAL_NAME).read_text()) | changes
    del content["sha256"]
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (signed / SEAL_NAME).write_text(json.dumps({**content, "sha256": own}))
    with pytest.raises(InputError, match="is damaged"):
        check_seal(signed)


def test_a_seal_of_another_schema_is_said_to_be_of_another_harness(signed):
    seal, _ = read_seal((signed / SEAL_NAME).read_text())
    (signed / SEAL_NAME).write_text(replace(seal, schema=2).text())
    with pytest.raises(InputError, match="signoff.json has schema 2.*use the harness that wrote it"):
        check_seal(signed)


def test_a_run_that_is_not_signed_has_nothing_to_check(tmp_path):
    with pytest.raises(InputError, match="holds no signed answer"):
        check_seal(tmp_path)


def test_the_command_exits_with_the_verdict_or_as_inconclusive(signed, monkeypatch):
    monkeypatch.setattr(recomputed, "differences", lambda run: [])  # see test_signature
    check = ["signoff", "--check", str(signed)]
    assert CliRunner().invoke(app, check).exit_code == OF_VERDICT[check_seal(signed).verdict]
    (signed / "plan.json").write_text("{}")
    answer = CliRunner().invoke(app, check)
    assert answer.exit_code == OF_VERDICT["inconclusive"]
    assert "plan.json was changed after the answer was signed" in answer.output


def files_of(folder):
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != ".lock"}


def report(folder):
    return CliRunner().invoke(app, ["report", "--run", str(folder)])


def test_a_report_of_changed_evidence_is_refused_before_anything_is_written(signed):
    (signed / "more.jsonl").write_text("{}")
    before = files_of(signed)
    answer = report(signed)
    assert isinstance(answer.exception, InputError) and "more.jsonl was added" in str(answer.exception)
    assert files_of(signed) == before


def test_a_run_that_lost_its_seal_is_neither_signed_again_nor_taken_for_unsigned(signed):
    (signed / SEAL_NAME).unlink()
    (signed / "plan.json").write_text((signed / "plan.json").read_text().replace('"devices": 1', '"devices": 9'))
    before = files_of(signed)
    answer = report(signed)
    assert isinstance(answer.exception, InputError) and f"its {SEAL_NAME} is missing" in str(answer.exception)
    with pytest.raises(InputError, match="restore that file"):
        must_be_signed(Run.open(signed))
    assert files_of(signed) == before
    found = check_seal(signed)
    assert f"its {SEAL_NAME} is missing" in found.problems[0]
    check = CliRunner().invoke(app, ["signoff", "--check", str(signed)])
    assert check.exit_code == OF_VERDICT["inconclusive"] and f"{SEAL_NAME} is missing" in check.output


def test_a_kill_between_the_mark_and_the_seal_is_signed_at_the_next_start(signed):
    assert not must_be_signed(Run.open(signed))
    (signed / SEAL_NAME).unlink()
    (signed / ".signing").touch()
    assert must_be_signed(Run.open(signed))
    sign(Run.open(signed))
    assert check_seal(signed).problems == () and not must_be_signed(Run.open(signed))


@pytest.mark.parametrize("page", ["as signed", "of another harness", "lost"])
def test_the_page_of_an_intact_run_is_written_again_and_nothing_else_that_was_signed(signed, page):
    path, before = signed / REPORT_NAME, files_of(signed)
    if page == "lost":
        path.unlink()
    elif page == "of another harness":
        path.write_text(path.read_text() + " ")
    assert report(signed).exit_code == 0
    after = files_of(signed)
    assert after.pop("sweep.html") and after == before
    assert check_seal(signed).problems == ()


def test_a_fit_of_a_signed_run_is_printed_and_not_stored(signed):
    before = files_of(signed)
    answer = CliRunner().invoke(app, ["fit", "--run", str(signed)])
    assert answer.exit_code == 0 and "is unchanged" in answer.output and "bound by" in answer.output
    assert files_of(signed) == before and check_seal(signed).problems == ()


def test_intervals_of_rates_are_of_the_plans_confidence_and_say_so(signed):
    run = Run.open(signed)
    wide = run.fit().best_deployment.max_rate_interval
    run.update_manifest(plan=run.manifest.plan | {"confidence": 0.5})
    fit = analysis.fit_of(run)
    narrow = fit.best_deployment.max_rate_interval
    assert fit.confidence == 0.5 and narrow[1] - narrow[0] < 0.7 * (wide[1] - wide[0])
    run.write_fit(fit)
    assert "50% interval" in describe_best(run)
    assert "95% interval" in describe_best(Run.open(SAMPLE))  # an older fit does not say its level
