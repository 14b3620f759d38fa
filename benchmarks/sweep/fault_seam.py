"""A sweep without a server: trials of a device with known physics, which fail, hang or run out of disk on demand.

``main`` runs the job on such trials in a process that can be killed; its journal has a line for the start and the end
of each trial.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import capacity_truth  # noqa: E402

from harness import signoff
from harness.drive.load import Load  # noqa: E402
from harness.errors import HarnessError  # noqa: E402
from harness.records import store  # noqa: E402
from harness.records.store import Run  # noqa: E402
from harness.runs.analysis import fit_of  # noqa: E402
from harness.sweep.trial import Measured, TrialFailed, TrialRequest  # noqa: E402

TRIAL_S = 0.4  # duration of a synthetic trial
CRASH, ALWAYS = "crash", "always"  # the third trial fails once; one point always fails


class MadeServer:
    url, pid, metrics_url = "127.0.0.1:1", None, None

    def alive(self) -> bool:
        return True

    def stop(self) -> None: ...


class MadeDriver:
    """Replaces Triton and Locust; the same point and load always give the same result."""

    journal: Path
    fault = ""

    def __init__(self, server, plan_path, plan, scratch, base):
        self.server, self.scratch, self.begun = server, scratch, 0

    def run(self, request: TrialRequest) -> Measured:
        point, name, self.begun = request.point, request.trial_id, self.begun + 1
        self._note("begun", name)
        time.sleep(TRIAL_S)
        if (self.fault == CRASH and self.begun == 3) or (self.fault == ALWAYS and point == _worst()):
            raise TrialFailed("the server ended")
        measured = made_trial(point, request.load, name)
        self._note("ended", name)
        return measured

    def _note(self, what: str, name: str) -> None:
        with self.journal.open("a") as journal:
            journal.write(f"{what} {name}\n")


def made_trial(point: dict, load: Load, name: str) -> Measured:
    """A ladder on a device whose step time rises with its delay and falls with its instances, and its results."""
    slope_s = 0.004 + 0.002 / point.get("diffusion_decoder.instances", 1)
    truth = capacity_truth.Truth(intercept_s=0.012 + 3e-6 * point["neural_vocoder.delay_us"], slope_s=slope_s)
    seed = hashlib.sha256(json.dumps([point, load.seed], sort_keys=True).encode()).digest()[:4]
    rng, results = np.random.default_rng(int.from_bytes(seed, "big")), []
    trial, _ = capacity_truth.ladder(truth, rng, load.sessions, load.seconds, name, deployment=point, results=results)
    return Measured(replace(trial, load=load.record()), results, ())


def _worst() -> dict:
    return {f"{stage}.delay_us": 20000 for stage in capacity_truth.wire.STAGES} | {"diffusion_decoder.instances": 1}


def answer_of(run: Run) -> tuple:
    """The answer of the stored trials: the best deployment and its rate, to six digits."""
    fit = fit_of(run)
    best = fit.best_deployment
    return tuple(sorted(best.deployment.items())), f"{best.max_rate_per_s:.6g}"


def main(plan: str, results: str, journal: str, fault: str = "") -> int:
    """Run the ladders of a plan; the exit code."""
    store.ROOM_FOR_A_TRIAL = 0  # so that the disk fills up in the middle
    MadeDriver.journal, MadeDriver.fault = Path(journal), fault
    signoff.Driver, signoff.TritonServer = MadeDriver, lambda base: nullcontext(MadeServer())
    signoff.measuring_lock = nullcontext
    try:
        signoff.SignOff(Path(plan), Path(results)).execute(ladders_only=True)
    except HarnessError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
