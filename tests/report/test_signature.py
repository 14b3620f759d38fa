"""A forged answer is found by its own records, and one that a key signed is verified by the public key alone."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from harness.cli.main import app
from harness.errors import InputError
from harness.exit_codes import OF_VERDICT
from harness.records.store import Run
from harness.report import recomputed
from harness.report.facts import SEAL_NAME, SIGNATURE_NAME
from harness.report.recomputed import differences
from harness.report.seal import check_seal, sign
from harness.report.signature import NAMESPACE, problem_of_signature, sign_seal

SAMPLE = Path(__file__).resolve().parents[2] / "results" / "sample-quick"
needs_ssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(SAMPLE, folder)
    return folder


def keygen(*arguments, stdin=b""):
    return subprocess.run(["ssh-keygen", *map(str, arguments)], input=stdin, capture_output=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "key"
    assert keygen("-q", "-t", "ed25519", "-N", "", "-f", path).returncode == 0
    return path


def forge(folder, change):
    """Change plan.json and seal it again, as somebody with the harness's own code would."""
    rewrite(folder, change)
    sign(Run.open(folder))
    assert check_seal(folder, None).problems == () or "expired" in check_seal(folder).problems[0]


def rewrite(folder, change):
    path = folder / "plan.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))


def fewer(plan):
    plan["targets"][-1] |= {"devices": 2, "interval": [2, 2]}


def faster(plan):
    plan["rate_per_device"]["value"] *= 2


def another_deployment(plan):
    plan["deployment"] = {**plan["deployment"], "diffusion_decoder.instances": 7}


def test_an_intact_answer_is_what_its_records_give(folder):
    assert differences(Run.open(folder)) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fewer, "devices: the answer says 2, its records give"),
        (faster, "rate of one device"),
        (another_deployment, "deployment"),
    ],
)
def test_forged_numbers_with_new_hashes_are_not_what_the_records_give(folder, monkeypatch, change, says):
    anew = Run.open(folder).plan()  # what the records give, by the test above
    monkeypatch.setattr(recomputed, "fit_of", lambda run: {})
    monkeypatch.setattr(recomputed, "plan_of", lambda *given: anew)
    assert differences(Run.open(folder)) == []
    forge(folder, change)
    assert any(says in each for each in differences(Run.open(folder)))


TASKS = {
    "qps": 0.5, "swing": 0.0, "per_hour": 6.0, "mean_audio_s": 60.0, "segment_s": 9.0, "slos": [], "note": "Too few.",
    "fleets": [{"kind": kind, "devices": 3, "interval": [3, 3], "sessions": 4, "binding": "rtf"}
               for kind in ("streams", "tasks", "both")],
}  # fmt: skip
FLEET = {
    "pools": [], "devices": {"l4": 3}, "cost_per_hour": 3.0, "cost_interval": [3, 3], "cost_per_audio_hour": 1.0,
    "watts": None, "joules_per_audio_s": None, "watts_basis": "",
}  # fmt: skip
MIXED = {
    "schema": 1, "preset": "tiny", "mix": {}, "slos": [], "utilisation_cap": 0.85, "currency": "USD", "spares": 0,
    "power_limit_w": None, "types": [], "targets": [{"qps": 0.5, "best": FLEET, "undivided": {}}],
}  # fmt: skip


def fewer_for_both(plan):
    plan["jobs"]["fleets"][-1]["devices"] = 2


def no_tasks(plan):
    del plan["jobs"]


def fewer_of_a_mixed_fleet(plan):
    plan["mixed_fleets"]["targets"][0]["best"]["devices"] = {"l4": 2}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fewer_for_both, "devices for streams and tasks: the answer says .*'both': 2.* its records give .*'both': 3"),
        (no_tasks, "devices for streams and tasks"),
        (fewer_of_a_mixed_fleet, "devices of the cheapest fleet: the answer says {'l4': 2}, .* {'l4': 3}"),
    ],
)
def test_forged_fleets_for_tasks_and_of_several_types_are_found_too(folder, monkeypatch, change, says):
    rewrite(folder, lambda plan: plan.update(jobs=TASKS, mixed_fleets=MIXED))
    anew = Run.open(folder).plan()
    recompute(monkeypatch, anew, anew.jobs)
    assert differences(Run.open(folder)) == []
    rewrite(folder, change)
    (said,) = differences(Run.open(folder))
    assert re.search(says, said)


def test_a_cheapest_fleet_that_the_program_did_not_prove_is_no_forgery(folder, monkeypatch):
    rewrite(folder, lambda plan: plan.update(mixed_fleets=MIXED))
    recompute(monkeypatch, Run.open(folder).plan(), None)
    unproven = {"qps": 0.5, "best": FLEET | {"proven": False, "devices": {"l4": 4}}, "undivided": {}}
    rewrite(folder, lambda plan: plan.update(mixed_fleets=MIXED | {"targets": [unproven]}))
    assert differences(Run.open(folder)) == []


def test_an_answer_that_ignores_that_no_fleet_serves_its_tasks_is_forged(folder, monkeypatch):
    rewrite(folder, lambda plan: plan.update(jobs=TASKS | {"fleets": []}, verdict="met"))
    anew = Run.open(folder).plan()
    recompute(monkeypatch, anew, anew.jobs)
    assert any(each.startswith("verdict: the answer says met") for each in differences(Run.open(folder)))


def recompute(monkeypatch, anew, jobs):
    """Whatever the stored plan says, its records give ``anew``."""
    monkeypatch.setattr(recomputed, "fit_of", lambda run: {})
    monkeypatch.setattr(recomputed, "plan_of", lambda *given: replace(anew, jobs=None, mixed_fleets=None))
    monkeypatch.setattr(recomputed, "jobs_of", lambda *given: jobs)
    monkeypatch.setattr(recomputed, "mixed_fleets_of", lambda *given: anew.mixed_fleets)


@needs_ssh
def test_a_signature_is_verified_with_the_public_key_alone_and_by_ssh_keygen(folder, key):
    signature = sign_seal(folder, key)
    assert signature == folder / SIGNATURE_NAME and problem_of_signature(folder, Path(f"{key}.pub")) == ""
    message = (folder / SEAL_NAME).read_bytes()
    signers = folder.parent / "signers"
    signers.write_text(f"sre@example.com {Path(f'{key}.pub').read_text()}")
    theirs = keygen("-Y", "verify", "-f", signers, "-I", "sre@example.com", "-n", NAMESPACE.decode(), "-s", signature,
                    stdin=message)  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    assert check_seal(folder).problems == check_seal(SAMPLE).problems  # the signature is no evidence that came later


@needs_ssh
def test_what_ssh_keygen_signed_is_verified_here(folder, key):
    assert keygen("-Y", "sign", "-f", key, "-n", NAMESPACE.decode(), folder / SEAL_NAME).returncode == 0
    assert problem_of_signature(folder, Path(f"{key}.pub")) == ""


@needs_ssh
def test_a_changed_answer_another_key_and_damage_are_each_named(folder, key, tmp_path):
    public, signature = Path(f"{key}.pub"), folder / SIGNATURE_NAME
    assert "not signed with a key" in problem_of_signature(folder, public)
    whole = sign_seal(folder, key).read_text()
    assert keygen("-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other").returncode == 0
    assert "another key" in problem_of_signature(folder, tmp_path / "other.pub")
    for damaged in ("", whole[:80], whole.replace("U1NIU0lH", "U1NIU0lI", 1), whole[:-60] + whole[-40:], "nonsense"):
        signature.write_text(damaged)
        assert "damaged" in problem_of_signature(folder, public), damaged
    signature.write_text(whole)
    forge(folder, fewer)
    assert "is not what was signed" in problem_of_signature(folder, public)


@needs_ssh
def test_a_key_that_cannot_be_used_says_which_can(folder, key, tmp_path):
    assert keygen("-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "locked").returncode == 0
    assert keygen("-q", "-t", "rsa", "-b", "1024", "-N", "", "-f", tmp_path / "rsa").returncode == 0
    locked, rsa, none = tmp_path / "locked", tmp_path / "rsa", tmp_path / "none"
    for path, says in ((locked, "passphrase"), (rsa, "not an Ed25519"), (none, "No such")):
        with pytest.raises(InputError, match=says):
            sign_seal(folder, path)
    for path, says in ((key, "not an OpenSSH public key"), (tmp_path / "rsa.pub", "not an Ed25519"), (none, "No such")):
        with pytest.raises(InputError, match=says):
            problem_of_signature(folder, path)
    assert not (folder / SIGNATURE_NAME).exists()


@needs_ssh
def test_the_command_refuses_a_forged_answer_and_takes_a_signed_one_whatever_is_computed_now(folder, key, monkeypatch):
    run = Run.open(folder)
    run.update_manifest(finished_at=datetime.now(UTC).isoformat(timespec="seconds"))
    sign(run)
    told = lambda *options: CliRunner().invoke(app, ["signoff", "--check", str(folder), *options])  # noqa: E731
    monkeypatch.setattr(recomputed, "differences", lambda run: [])
    sealed = told()
    assert sealed.exit_code == OF_VERDICT[run.plan().verdict] and "sealed, not signed with a key" in sealed.stdout
    assert told("--trust", f"{key}.pub").exit_code == 2  # no signature
    sign_seal(folder, key)
    monkeypatch.setattr(recomputed, "differences", lambda run: ["devices: the answer says 2, its records give 5"])
    forged, signed = told(), told("--trust", f"{key}.pub")
    assert forged.exit_code == 2 and "its records give 5" in forged.stdout and "NOT VALID" in forged.stdout
    assert signed.exit_code == OF_VERDICT[run.plan().verdict] and "warning: devices" in signed.stdout
    assert CliRunner().invoke(app, ["signoff", "quick", "--trust", f"{key}.pub"]).exception is not None
