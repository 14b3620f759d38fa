"""signoff.json: the answer with the hashes of its evidence, and the check of a signed run against them.

The hashes detect evidence that was changed, lost or added after the answer; they are not a cryptographic signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from harness.content import OtherSchema
from harness.errors import InputError
from harness.records.schema import RunManifest
from harness.records.seal import Evidence, Seal, SealedAnswer, SealedConditions, read_seal
from harness.records.store import Run, replace_text
from harness.report.facts import REPORT_NAME, SEAL_NAME, SIGNATURE_NAME, evidence, expires_at, file_sha256, is_signed
from harness.report.page import write_report

_PENDING = ".signing"
_ANEW = "measure again with `harness signoff PLAN --fresh`"
_LOST = f"the answer was signed, and its {SEAL_NAME} is missing: restore that file, or {_ANEW}"


@dataclass(frozen=True)
class Checked:
    """A signed run as found: its verdict, and the reasons against relying on it (empty = intact)."""

    verdict: str
    expires_at: str
    files: int
    problems: tuple[str, ...]


def sign(run: Run) -> Path:
    """Mark a finished run as sealed, write its ``signoff.html`` and ``signoff.json``; returns the path of the latter.

    The result depends on the stored records only: signing twice gives the same bytes. Only the end of a sign-off signs.
    """
    pending = run.path / _PENDING  # a run marked as sealed has lost its seal, unless a kill came between
    replace_text(pending, "")
    run.update_manifest(sealed=True)  # before the page, which contains the manifest's hash
    write_report(run)
    path = _write(run.path, _seal_for(run, evidence(run.path), file_sha256(run.path / REPORT_NAME)))
    pending.unlink()
    return path


def must_be_signed(run: Run) -> bool:
    """Whether the sign-off of a run has finished except for its seal. Raises InputError where a seal was lost."""
    if not run.manifest.sealed or (run.path / _PENDING).exists():
        return True
    if not is_signed(run):
        raise InputError(f"{run.path}: {_LOST}")
    return False


def seal_of(run: Run) -> bytes:
    """The bytes of the seal, which a key signs; empty where there is none."""
    path = run.path / SEAL_NAME
    return path.read_bytes() if path.exists() else b""


def reopen(run: Run) -> None:
    """Undo a sign-off, if there is one, so that more can be measured. The caller must sign the run again.

    The manifest is changed first: a kill in between leaves a seal on an unfinished run, which the next start removes.
    """
    if run.manifest.sealed or run.manifest.finished_at:
        run.update_manifest(sealed=False, finished_at="")
    for name in (SIGNATURE_NAME, SEAL_NAME):
        (run.path / name).unlink(missing_ok=True)


def must_be_reliable(run: Run) -> None:
    """Raise InputError where signed files were changed, or the answer has expired."""
    if problems := check_seal(run.path).problems:
        raise InputError(f"{run.path} failed verification: {'; '.join(problems)}")


def report_again(run: Run) -> Path:
    """Write ``signoff.html`` of a run again. For a signed run, only the page's hash in the seal is renewed.

    Raises InputError, with nothing written, where signed files were changed.
    """
    if not is_signed(run):
        if run.manifest.sealed:
            raise InputError(f"{run.path}: {_LOST}")
        return write_report(run)
    with _readable(run.path):
        seal, stated = read_seal((run.path / SEAL_NAME).read_text())
        if broken := list(_broken(run.path, seal, stated)):
            words = "; ".join(broken)
            raise InputError(f"{run.path}: {words}: nothing is written; restore it, or {_ANEW}")
    path = write_report(run)
    _write(run.path, replace(seal, report_sha256=file_sha256(path)))
    return path


def _write(folder: Path, seal: Seal) -> Path:
    path = folder / SEAL_NAME
    replace_text(path, seal.text())
    return path


def _seal_for(run: Run, files: Sequence[Evidence], report_sha256: str) -> Seal:
    """The seal of a run, from its manifest and plan. Raises ValueError where it is not finished."""
    manifest, plan = run.manifest, run.plan()
    if plan is None:
        raise ValueError("it holds no plan.json")
    return Seal(
        run_id=manifest.run_id,
        verdict=plan.verdict,
        answer=SealedAnswer.of_plan(plan),
        signed_at=manifest.finished_at,
        expires_at=_expiry(manifest),
        expires_with=SealedConditions(manifest.plan_sha256, manifest.preset, manifest.device, manifest.versions),
        emulated=manifest.emulated,
        evidence=tuple(files),
        report_sha256=report_sha256,
    )


def _expiry(manifest: RunManifest) -> str:
    """When the answer of a finished run expires (ISO 8601)."""
    when = expires_at(manifest)
    if when is None:
        raise ValueError("its manifest has no finished_at")
    return when.isoformat(timespec="seconds")


def check_seal(folder: Path, now: datetime | None = None) -> Checked:
    """Check a signed run against its hashes, its own records and its expiry.

    Raises InputError where nothing is signed, or the seal cannot be read.
    """
    if Run.is_run(folder) and not is_signed(run := Run.open(folder)) and run.manifest.finished_at:
        return Checked("inconclusive", _expiry(run.manifest), 0, (_LOST,))
    with _readable(Path(folder)):
        seal, stated = read_seal((Path(folder) / SEAL_NAME).read_text())
        problems = tuple(_problems(Path(folder), seal, stated, now or datetime.now(UTC)))
        return Checked(seal.verdict, seal.expires_at, len(seal.evidence), problems)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    path = folder / SEAL_NAME
    try:
        yield
    except OSError as error:
        words = f"{folder} holds no signed answer ({SEAL_NAME}: {error.strerror}): give the folder of a finished run"
        raise InputError(words) from None
    except OtherSchema as error:
        raise InputError(f"{path} has {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{path} is damaged: restore it, or delete it and run the sign-off again") from None


def _problems(folder: Path, seal: Seal, stated: str, now: datetime) -> Iterator[str]:
    yield from _broken(folder, seal, stated)
    report = folder / REPORT_NAME
    if not report.is_file():
        yield f"{REPORT_NAME} is missing: write it again with `harness report --run {folder}`"
    elif file_sha256(report) != seal.report_sha256:
        yield f"{REPORT_NAME} was changed after it was signed: write it again with `harness report --run {folder}`"
    if now > datetime.fromisoformat(seal.expires_at):
        yield f"it expired at {seal.expires_at}: {_ANEW}"
    if now < datetime.fromisoformat(seal.signed_at):
        yield f"it was signed at {seal.signed_at}, which is in the future: correct this machine's clock"


def _broken(folder: Path, seal: Seal, stated: str) -> Iterator[str]:
    """What differs from what was signed: in the seal, the run's records and the files of its evidence."""
    changed = list(_changed(folder, seal.evidence))
    if seal.sha256 != stated:
        yield f"{SEAL_NAME} was changed after it was signed"
    elif not changed:
        differences = seal.differences(_seal_for(Run.open(folder), seal.evidence, seal.report_sha256))
        yield from (f"{SEAL_NAME} differs from the run in {name}" for name in differences)
    yield from changed


def _changed(folder: Path, signed: Sequence[Evidence]) -> Iterator[str]:
    now = {file.name: file.sha256 for file in evidence(folder)}
    before = {file.name: file.sha256 for file in signed}
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield f"{name} is missing"
        elif name not in before:
            yield f"{name} was added after the answer was signed"
        elif now[name] != before[name]:
            yield f"{name} was changed after the answer was signed"
