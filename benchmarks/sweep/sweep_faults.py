"""Faults injected into a sweep: what each cost in trials, and whether the answer is the undisturbed one's.

The synthetic faults hit the whole job as a process, on trials of a device with known physics (no server): killed in a
trial, an incomplete last line and an orphaned last part as after a power loss, a server that crashed once, a point
that always fails, a disk that fills up in the middle of a write. The real ones hit a real Triton during a ladder:
killed, and stopped so that it hangs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import psutil
from fault_seam import ALWAYS, CRASH, TRIAL_S, answer_of

from harness import signoff
from harness.errors import ServerError
from harness.records.store import Run

SEAM = "import sys, fault_seam; sys.exit(fault_seam.main(*sys.argv[1:]))"
PLAN = """
name: faults
preset: tiny
mix: quick
slos: {short: {rtf_p95: 0.9}, long: {rtf_p95: 0.9}}
targets_qps: [1]
space: {delay_us: [0, 5000, 20000], diffusion_decoder.instances: [1, 2]}
ladder: {sessions: [1, 2, 4, 8], seconds: 6}
budget_minutes: 60
"""
REAL_PLAN = """
name: real-faults
preset: tiny
mix: quick
slos: {short: {rtf_p95: 0.9}, long: {rtf_p95: 0.9}}
targets_qps: [1]
space: {diffusion_decoder.delay_us: [0, 2000]}
ladder: {sessions: [1, 2, 4], seconds: 4}
budget_minutes: 30
"""
POINTS = 6
STRIKE_S = 5.0  # seconds into a real trial


@dataclass(frozen=True)
class Row:
    """One fault: trials started, lost and marked, and whether the answer is unchanged (None = not compared)."""

    fault: str
    lost: int
    marked: int
    same_answer: bool | None
    said: str

    @property
    def fine(self) -> bool:
        return self.lost <= 1 and self.same_answer is not False


class Job:
    """A run of the synthetic job in its own folder."""

    def __init__(self, folder: Path):
        self.folder, self.plan, self.journal = folder, folder / "plan.yaml", folder / "journal"
        folder.mkdir(parents=True, exist_ok=True)
        self.plan.write_text(PLAN)
        self.results = folder / "results"

    def start(self, fault: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", SEAM, str(self.plan), str(self.results), str(self.journal)]
        here = Path(__file__).parent
        return subprocess.Popen([*command, *filter(None, [fault])], cwd=here, stderr=subprocess.PIPE, text=True)

    def finish(self, fault: str = "") -> tuple[int, str]:
        process = self.start(fault)
        _, said = process.communicate(timeout=300)
        return process.returncode, said

    def run(self) -> Run:
        return Run.open(next(self.results.glob("faults-*")))

    def begun(self) -> list[str]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [line.split()[1] for line in lines if line.startswith("begun")]

    def lost(self) -> int:
        """Trials that were started but are not stored."""
        return len(set(self.begun()) - {trial.trial_id for trial in self.run().trials()})


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="harness-faults-") as scratch:
        folder = Path(scratch)
        whole = Job(folder / "whole")
        whole.finish()
        truth = answer_of(whole.run())
        rows = list(made_rows(folder, truth, (2,) if options.quick else (1, 2, 3, 4, 5, 6)))
        rows += [] if options.quick else list(real_rows(folder))
    shown = common.table("Faults in a sweep", "fault", "trials lost", "marked", "answer", "said")
    for row in rows:
        answer = {True: "unchanged", False: "CHANGED", None: "-"}[row.same_answer]
        shown.add_row(row.fault, str(row.lost), str(row.marked), answer, row.said)
    figures = {"faults": len(rows), "trials_lost_max": max(row.lost for row in rows)}
    figures["answers_changed"] = sum(row.same_answer is False for row in rows)
    common.finish([shown], figures)
    return 0 if all(row.fine for row in rows) else common.EXIT_FAILED


def parser() -> common.Parser:
    return common.Parser(__doc__, "python benchmarks/sweep/sweep_faults.py --quick")


def made_rows(folder: Path, truth: tuple, kills: Sequence[int]) -> Iterator[Row]:
    for number in kills:
        yield killed(Job(folder / f"kill-{number}"), number, truth)
    yield torn(Job(folder / "torn"), truth)
    yield orphaned(Job(folder / "orphan"), truth)
    for name, fault in (("the server crashed once", CRASH), ("a point always breaks", ALWAYS)):
        yield broken(Job(folder / fault), name, fault, truth)
    with contextlib.suppress(PermissionError):
        yield disk_full(folder / "disk", truth)


def killed(job: Job, number: int, truth: tuple) -> Row:
    """SIGKILL in the middle of a trial, then the same command again."""
    common.say(f"SIGKILL in trial {number} …")
    process = job.start()
    until(lambda: len(job.begun()) >= number)
    time.sleep(TRIAL_S / 2)
    process.kill()
    process.communicate()
    lost = job.lost()
    return again(job, f"SIGKILL in trial {number} of {POINTS}", lost, truth)


def torn(job: Job, truth: tuple) -> Row:
    """A power loss that left an incomplete last line."""
    common.say("a torn last line …")
    job.finish()
    path = job.run().path / "trials.jsonl"
    path.write_bytes(path.read_bytes()[:-200])
    return again(job, "power loss: the last line torn", job.lost(), truth)


def orphaned(job: Job, truth: tuple) -> Row:
    """A power loss between a trial's parts and its line; the part is incomplete too."""
    common.say("a part without its line …")
    job.finish()
    run = job.run()
    path, last = run.path / "trials.jsonl", run.trials()[-1].trial_id
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    part = run.path / "requests.parquet" / f"{last}.parquet"
    part.write_bytes(part.read_bytes()[:100])
    return again(job, "power loss: a part without its line", job.lost(), truth)


def broken(job: Job, name: str, fault: str, truth: tuple) -> Row:
    common.say(f"{name} …")
    code, said = job.finish(fault)
    return row(job, name, job.lost(), truth, said if code else "")


def disk_full(folder: Path, truth: tuple) -> Row:
    """A disk of one megabyte, which is then enlarged. Raises PermissionError where no disk may be mounted."""
    common.say("a full disk …")
    with small_disk(folder, kilobytes=400):
        job = Job(folder)
        code, said = job.finish()
        if code == 0:
            raise ServerError("the disk was not full: the fault was not injected")
        lost, clear = job.lost(), "cannot be written" in said
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        found = again(job, "the disk full in the middle of a write", lost, truth)
        return Row(found.fault, lost if clear else 99, found.marked, found.same_answer, said.strip().split(": ", 1)[-1])


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        raise PermissionError("no disk may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def again(job: Job, fault: str, lost: int, truth: tuple) -> Row:
    """The same command again, which must resume and finish."""
    code, said = job.finish()
    return row(job, fault, lost, truth, said if code else "")


def row(job: Job, fault: str, lost: int, truth: tuple, said: str) -> Row:
    run = job.run()
    marked = [trial for trial in run.trials() if not trial.valid]
    names = [trial.trial_id for trial in run.trials()]
    same = not said and len(names) == len(set(names)) and answer_of(run) == truth
    return Row(fault, lost, len(marked), same, said.strip() or "; ".join({*(m.reasons[0] for m in marked)}))


def real_rows(folder: Path) -> Iterator[Row]:
    for name, signum in (("real Triton killed in a trial", signal.SIGKILL), ("real Triton hung", signal.SIGSTOP)):
        common.say(f"{name} …")
        yield real(folder / signum.name, name, signum)


def real(folder: Path, name: str, signum: signal.Signals) -> Row:
    """A real server fails in the first trial of the first point; every point must still be measured."""
    folder.mkdir()
    plan = folder / "plan.yaml"
    plan.write_text(REAL_PLAN)
    work = signoff.SignOff(plan, folder / "results")
    watcher = Striker(signum)
    work.execute(watcher, ladders_only=True)
    trials = work.run.trials()
    marked = [trial for trial in trials if not trial.valid]
    measured = [trial.deployment for trial in trials if trial.valid]
    if not watcher.struck or not marked:
        raise ServerError(f"{name}: the fault was not injected")
    lost = sum(point not in measured for point in work.spec.points())
    return Row(name, lost, len(marked), None, marked[0].reasons[0].splitlines()[0])


class Striker(signoff.Watcher):
    """Sends a signal to the server some seconds into the first trial."""

    def __init__(self, signum: signal.Signals):
        self.signum, self.struck = signum, False
        self._timer: threading.Timer | None = None

    def step(self, what: str, estimated_s: float) -> None:
        if what.startswith("ladder") and self._timer is None:
            self._timer = threading.Timer(STRIKE_S, self._strike)
            self._timer.start()

    def _strike(self) -> None:
        for one in psutil.Process().children(recursive=True):
            if one.name() == common.SERVER:
                one.send_signal(self.signum)
                self.struck = True


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise ServerError("the job never came so far")
        time.sleep(0.02)


if __name__ == "__main__":
    common.run(main)
