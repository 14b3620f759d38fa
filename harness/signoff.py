"""The whole main job: deploy, sweep, fit, confirm, plan, report; it goes on by itself where an earlier run stopped."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from harness import wire
from harness.capacity.planning.prediction import predict_open_run, sealed
from harness.capacity.ready import compiled_beside
from harness.deploy.server import RemoteTriton, TritonServer
from harness.errors import InputError, ServerError, StoreError
from harness.host.places import ROOT
from harness.identity import Requested
from harness.planfile import deployed_as, load_plan
from harness.records.fit import Fit, FittedDeployment
from harness.records.plan import LeftOut, Plan
from harness.records.schema import Rung, Trial
from harness.report.facts import REPORT_NAME
from harness.report.page import write_report
from harness.report.seal import must_be_reliable, must_be_signed, reopen, report_again, sign
from harness.report.sweep_page import write_sweep_report
from harness.runs.analysis import behaviour_of, fit_of, plan_of
from harness.runs.opening import open_run
from harness.runs.points import deployment_of, describe_point
from harness.runs.stages import record_stages, stages_by_server
from harness.sweep.budget import Budget, decidable_s, estimated_s, minutes_needed
from harness.sweep.ray_workers import ray_hosts
from harness.sweep.search import Step, Walk
from harness.sweep.trial import SECOND_SAMPLE_SEED, Driver, Load, TrialBroken, asked, broken_trial, deployed, trial_id
from harness.sweep.workers import Fleet, Host, HostGone, on

LOCK_FOLDER = ROOT / ".harness"
EXIT_CODES = {"met": 0, "missed": 1, "inconclusive": 2}
TRIES = 2  # a trial that broke or came out INVALID is measured once more
BROKEN_IN_A_ROW = 2 * TRIES  # two points: then it is not the point
_FIT_S, _START_S = 20.0, 25.0


class Watcher:
    """What the job tells whoever watches: override what you show."""

    def begin(self, total_s: float) -> None: ...

    def step(self, what: str, estimated_s: float) -> None: ...

    def done(self, note: str = "") -> None: ...

    def finish(self, what: str, estimated_s: float, took_s: float, note: str) -> None:
        """A step that others went beside: it was begun by ``say``."""

    def say(self, note: str) -> None: ...


class Lane(Watcher):
    """What one of several hosts tells: whole lines, so that those of others can stand between them."""

    def __init__(self, watcher: Watcher, host: str, lock: threading.RLock):
        self._watcher, self._host, self._lock = watcher, host, lock

    def step(self, what: str, estimated_s: float) -> None:
        self._what, self._estimated_s, self._began_s = f"{what} on {self._host}", estimated_s, time.monotonic()
        self.say(f"{self._what} …")

    def done(self, note: str = "") -> None:
        with self._lock:
            self._watcher.finish(self._what, self._estimated_s, time.monotonic() - self._began_s, note)

    def say(self, note: str) -> None:
        with self._lock:
            self._watcher.say(note)


class SignOff:
    """One run of a plan. ``execute`` does what is still missing and returns plan.json's content."""

    def __init__(
        self,
        plan_path: Path,
        results: Path,
        *,
        url: str | None = None,
        ray: str | None = None,
        topology: str = "",
        deployment: dict | None = None,
    ):
        """``topology`` takes the place of the plan's own. Raises InputError for what cannot be signed off."""
        if url and ray:
            raise InputError("give one of the two: --url for servers that run, --ray for the hosts of a cluster")
        self.plan_path = Path(plan_path)
        self.spec = deployed_as(load_plan(self.plan_path), topology)
        self.url, self.ray = url, ray
        self.base = deployment_of(self.spec, url, **(deployment or {}))
        self.walk = Walk(self.spec, self.base)
        if not url:
            self._check_servers_of_ours()
        self.run = open_run(self.plan_path, self.spec, results, url, ray)
        self.mix = self.spec.traffic_mix()
        self.budget = Budget(self.spec.budget_minutes)
        self.left_out: list[LeftOut] = []  # what the budget had no time for
        self.out_of_time = False  # for a ladder, once it was too late for one
        self.in_doubt: list[Trial] = []  # broke, and nothing has been measured since
        self.in_flight: list[dict] = []  # points under way, one on each host
        self._turn = threading.RLock()  # held by the host that reads or writes any of these

    def _check_servers_of_ours(self) -> None:
        """Raises InputError for what no server that is started here can do, before one is."""
        for point in self.walk.every_value():
            deployed(self.base, point).check()
        count = self.base.voice_count()
        if unknown := [voice for voice in self.spec.mix.voices if voice > count]:
            raise InputError(
                f"{self.plan_path}: mix.voices: {', '.join(map(str, unknown))}: the server has voices 1 to {count}; "
                "use these, or deploy a folder with more"
            )

    def execute(
        self, watcher: Watcher | None = None, *, ladders_only: bool = False, go_on: bool = False
    ) -> Plan | None:
        """Measure what is missing, then fit, confirm and plan.

        A finished run answers from its store; with ``go_on`` what its budget left out is measured first.
        """
        watcher = watcher or Watcher()
        with self.run.lock():
            if self.run.manifest.finished_at and not ladders_only:
                stored = self._stored(watcher)
                if not (go_on and stored.left_out):
                    return stored
            self.budget = Budget(self.spec.budget_minutes)
            watcher.begin(self._whole_s())
            for remark in self.spec.script_source().remarks:
                watcher.say(f"warning: {remark}")
            sealed_ladders = ladders_only and bool(self.run.manifest.finished_at)
            if not sealed_ladders and (not ladders_only or self._next_ladder().point is not None):
                with measuring_lock():
                    self._measure(watcher, self.budget, ladders_only)
            return self._report_sweep(watcher) if ladders_only else self._conclude(watcher)

    def _stored(self, watcher: Watcher) -> Plan:
        """The answer of a finished run; what a kill in its last moment kept from being written is written now.

        Raises InputError where what was signed is no longer as it was, or has expired.
        """
        if must_be_signed(self.run):
            self.left_out = list(self._stored_plan().left_out)
            return self._conclude(watcher)
        if not (self.run.path / REPORT_NAME).exists():
            report_again(self.run)
        must_be_reliable(self.run)
        return self._stored_plan()

    def _stored_plan(self) -> Plan:
        plan = self.run.plan()
        if plan is None:
            raise StoreError(f"{self.run.path}: its plan.json is missing: restore it, or measure anew with --fresh")
        return plan

    def _measure(self, watcher: Watcher, budget: Budget, ladders_only: bool) -> None:
        watcher.step(f"reaching {self.url or self.ray}" if self.url or self.ray else "starting Triton", _START_S)
        try:
            with compiled_beside() as compiling, Fleet(self._hosts()) as fleet:
                stages = {host.url: host.stages for host in fleet.hosts}
                record_stages(self.run, stages)
                reopen(self.run)  # not before there is a server, and a right one, that can measure more
                record_stages(self.run, stages)
                compiling.wait()
                watcher.done(", ".join(host.url for host in fleet.hosts))
                self._ladders(fleet, watcher, budget)
                if not ladders_only:
                    self._confirm(fleet.hosts[0], watcher, budget)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _scratch(self) -> Path:
        return self.run.path / ".work"

    def _hosts(self) -> list[Host]:
        """Where trials run: a Triton that is started here, those of somebody else, or the hosts of a cluster."""
        if self.ray:
            return ray_hosts(self.ray, self.plan_path, self.base)
        if not self.url:
            return [Host("", lambda: TritonServer(self.base), partial(self._driver, 0), ours=True)]
        urls = dict.fromkeys(filter(None, (url.strip() for url in self.url.split(","))))
        return [self._remote_host(number, url) for number, url in enumerate(urls)]

    def _remote_host(self, number: int, url: str) -> Host:
        keep = self.run.path / f".{number}.found"
        requested = Requested(self.base.preset, self.base.device, self.base.dtype)
        server = partial(RemoteTriton, url, requested, keep=keep, topologies=self.spec.topologies)
        return Host(url, server, partial(self._driver, number), ours=False)

    def _driver(self, number: int, server) -> Driver:
        return Driver(server, self.plan_path, self.spec, self._scratch / str(number), self.base)

    def _ladders(self, fleet: Fleet, watcher: Watcher, budget: Budget) -> None:
        """The points of the walk, shared out among the hosts, until there is none or no time for one."""
        lanes = {host.name: Lane(watcher, host.name, self._turn) for host in fleet.hosts if len(fleet.hosts) > 1}
        while (step := self._next_ladder()).point is not None and not self.out_of_time:
            fleet.each(lambda host: self._ladder(host, lanes.get(host.name, watcher), budget))
            for gone in fleet.take_lost():
                watcher.say(f"{gone}; its points go to the others")
        if step.point is None:
            watcher.say(step.says)
        else:
            self._leave_out_points(step, watcher, budget)

    def _ladder(self, host: Host, watcher: Watcher, budget: Budget) -> bool:
        """The next point's ladder on a host; False where there is none for it, or no time."""
        later_s = self._second_sample_s() + self._confirm_s() + 2 * _FIT_S
        with self._turn:
            step = self._next_ladder()
            if step.point is None:
                return False
            self.in_flight.append(step.point)
        try:
            load = self._ladder_load(step.point, self.spec.seed)
            measured = self._measure_until_settled(host, watcher, budget, step.says, later_s, step.point, load, None)
        finally:
            with self._turn:
                self.in_flight.remove(step.point)
        if said := self._best_so_far() if self.walk.search.kind == "grid" else self.walk.said:
            watcher.say(said)
        return measured and not self.out_of_time

    def _in_time(self) -> list[Rung]:
        """The rungs of VALID trials that kept pace with speech."""
        rungs = [rung for trial in self.run.trials() if trial.valid for rung in trial.rungs]
        return [rung for rung in rungs if rung.sessions <= rung.frames_per_s * wire.SECONDS_PER_FRAME]

    def _leave_out_points(self, step: Step, watcher: Watcher, budget: Budget) -> None:
        count = self.walk.left(len(self._ended()))
        left_out = LeftOut(
            f"{count} of {self.walk.most_points()} points, from {step.says}",
            count * self._estimated_s(self._ladder_load(step.point, self.spec.seed)),
            decisive=not self._ended(),
        )
        self._leave_out(left_out, watcher, budget)

    def _leave_out(self, left_out: LeftOut, watcher: Watcher, budget: Budget) -> None:
        self.left_out.append(left_out)
        watcher.say(f"the budget of {budget.minutes:g} min leaves no time for {left_out.what}")

    def _best_so_far(self) -> str:
        """The deployment that delivered the most audio in windows that kept pace with speech."""
        rungs = [(rung, trial) for trial in self.run.trials() if trial.valid for rung in trial.rungs]
        kept = [pair for pair in rungs if pair[0].sessions <= pair[0].frames_per_s * wire.SECONDS_PER_FRAME]
        rung, trial = max(kept, key=lambda pair: pair[0].frames_per_s, default=(None, None))
        if rung is None:
            return ""
        most = rung.frames_per_s * wire.SECONDS_PER_FRAME
        return f"best so far: {most:.1f} audio s/s in time with {describe_point(trial.deployment)}"

    def _next_ladder(self) -> Step:
        return self.walk.next(self.run, self._ended(), self.in_flight)

    def _ended(self) -> list[dict]:
        """Points whose ladders need no more trials, in the order of their first."""
        trials = {each.trial_id: each for each in self._trials()}
        points = {json.dumps(each.deployment, sort_keys=True): each.deployment for each in trials.values()}
        return [each for each in points.values() if _is_settled(each, self._ladder_load(each, self.spec.seed), trials)]

    def _confirm(self, host: Host, watcher: Watcher, budget: Budget) -> None:
        """Open-loop runs that the fit has not seen; each prediction is made before its run starts."""
        fit = self._fit(watcher)
        if fit.best_deployment is None:
            watcher.say("no deployment keeps the promises at any rate: nothing to confirm")
            return
        best = self._best_again(host, watcher, budget, fit.best_deployment)
        shares = sorted(enumerate(self.spec.confirm.load_share), key=lambda each: each[1], reverse=True)
        for index, share in shares:  # the highest first: an answer needs that one
            load, prediction = self._open_load(best, share, index)
            what = f"open loop at {load.rate_per_s:.2f} requests/s ({share:.0%} of the highest)"
            decisive = share == shares[0][1]
            self._measure_in_time(host, watcher, budget, what, _FIT_S, best.deployment, load, prediction, decisive)

    def _best_again(self, host: Host, watcher: Watcher, budget: Budget, best: FittedDeployment) -> FittedDeployment:
        """A second ladder of the best point, with other requests: the first may have met a host at its best.

        Then it stays the best (``fit.best_of``), unless the second one shows that it keeps no promise at any rate.
        """
        later_s = self._confirm_s() + _FIT_S
        while True:
            load = self._ladder_load(best.deployment, self.spec.seed + SECOND_SAMPLE_SEED)
            what = f"second ladder of the best point: {describe_point(best.deployment)}"
            if self._settled(best.deployment, load):
                return best
            if not self._measure_in_time(host, watcher, budget, what, later_s, best.deployment, load, None):
                return best
            anew = self._fit(watcher).best_deployment
            if anew is None:
                return best
            best = anew

    def _measure_in_time(
        self, host: Host, watcher: Watcher, budget: Budget, what: str, later_s: float,
        point: dict, load: Load, prediction: dict | None, decisive: bool = True,
    ) -> bool:  # fmt: skip
        """Measure a trial, and an INVALID one once more; False, and noted, where the budget had no time for it."""
        self._measure_until_settled(host, watcher, budget, what, later_s, point, load, prediction)
        settled = self._settled(point, load)
        if not settled:
            self._leave_out(LeftOut(what, self._estimated_s(load), decisive), watcher, budget)
        return settled

    def _measure_until_settled(
        self, host: Host, watcher: Watcher, budget: Budget, what: str, later_s: float,
        point: dict, load: Load, prediction: dict | None,
    ) -> bool:  # fmt: skip
        """Measure a trial, and an INVALID one once more; False where the budget left no time to measure it at all."""
        while not self._settled(point, load):
            tried = self._known(trial_id(point, load)) is not None
            if budget.left_s() < self._estimated_s(load) + later_s:
                self.out_of_time = True
                return tried
            watcher.step(what + (", once more" if tried else ""), self._estimated_s(load))
            watcher.done(_note(self._trial(host, point, load, prediction)))
        return True

    def _trial(self, host: Host, point: dict, load: Load, prediction: dict | None = None) -> Trial:
        """Measure a point; the trial of a server or a Locust that broke says why, and has no rungs."""
        with self._turn:
            repeat = sum(self._known(trial_id(point, load, number)) is not None for number in range(TRIES))
            self.run.must_have_room()
            if prediction:
                self.run.append_prediction(trial_id(point, load, repeat), prediction)
        try:
            measured = on(host, host.run(point, load, prediction, repeat))
        except TrialBroken as error:
            return self._broken(host, point, load, repeat, error)
        with self._turn:
            if not self.run.manifest.emulated and any(result.emulated for result in measured.results):
                self.run.update_manifest(emulated=True)  # a server that was not started here may emulate
            self._record_topology(host, measured.trial.topology)
            self._keep_broken()
            self.run.append_trial(measured.trial, measured.results, measured.samples)
        return measured.trial

    def _record_topology(self, host: Host, topology: str) -> None:
        """Keep what the stages run on of a topology that is deployed for the first time."""
        if len(self.spec.topologies) > 1 and not stages_by_server(self.run.manifest, topology):
            record_stages(self.run, {host.url: host.stages})

    def _broken(self, host: Host, point: dict, load: Load, repeat: int, error: TrialBroken) -> Trial:
        """Note a trial that broke, and start our server anew. Raises ServerError if it looks like more than the point.

        What broke is stored when a later trial shows that others can be measured: then it was the point's own doing.
        """
        try:
            host.mend()
        except HostGone as gone:
            raise HostGone(f"{gone}: {error}") from error
        with self._turn:
            trial = broken_trial(point, load, repeat, str(error))
            self.in_doubt.append(trial)
            if len(self.in_doubt) >= BROKEN_IN_A_ROW:
                count = len(self.in_doubt)
                raise ServerError(f"{count} trials broke one after another; none of them is kept. The last: {error}")
        return trial

    def _keep_broken(self) -> None:
        while self.in_doubt:
            self.run.append_trial(self.in_doubt[0], (), ())
            self.in_doubt.pop(0)

    def _fit(self, watcher: Watcher) -> Fit:
        watcher.step("fitting", _FIT_S / 2)
        fit = fit_of(self.run)
        self.run.write_fit(fit)
        watcher.done()
        return fit

    def _report_sweep(self, watcher: Watcher) -> None:
        self._keep_broken()
        if not self.run.manifest.finished_at:  # what was signed stays as it is
            self._fit(watcher)
        write_sweep_report(self.run)

    def _conclude(self, watcher: Watcher) -> Plan:
        self._keep_broken()
        fit = self._fit(watcher)
        watcher.step("planning", _FIT_S / 2)
        plan = plan_of(self.run, self.spec, fit, self.spec.targets_qps)
        plan = self._with_what_was_left_out(replace(plan, behaviour=behaviour_of(self.spec, fit, plan)))
        self.run.write_plan(plan)
        if not self.left_out or plan.verdict == "met":
            self.run.update_manifest(finished_at=datetime.now(UTC).isoformat(timespec="seconds"))
        write_sweep_report(self.run)
        if self.run.manifest.finished_at:
            sign(self.run)
        else:
            write_report(self.run)
        watcher.done()
        return plan

    def _with_what_was_left_out(self, plan: Plan) -> Plan:
        """The plan, which is inconclusive where something that was not measured may turn its verdict.

        "met" stands on the deployment that was confirmed, whatever others would show; "missed" needs every point.
        """
        doubts, remarks = self._untried(plan), []
        for each in self.left_out:
            if each.decisive or plan.verdict != "met":
                doubts.append(f"The budget left no time for {each.what}: run it again to go on.")
            else:
                minutes = f"{max(1, round(each.seconds / 60))} min"
                remarks.append(
                    f"Not measured for want of time: {each.what}. It may show a better deployment or narrow the "
                    f"interval: `harness signoff PLAN --go-on` measures it, in about {minutes}; a budget_minutes of "
                    f"{minutes_needed(self.budget, self.left_out)} has the time for all."
                )
        return replace(
            plan,
            verdict="inconclusive" if doubts else plan.verdict,
            reasons=(*plan.reasons, *doubts, *remarks),
            doubts=tuple(doubts),
            left_out=tuple(self.left_out),
        )

    def _untried(self, plan: Plan) -> list[str]:
        """For missed: the points that a search passed over."""
        size = self.walk.size
        untried = size - len(self._ended()) if self.walk.search.kind != "grid" else 0
        if plan.verdict != "missed" or untried <= 0:
            return []
        return [
            f"{untried} of the {size} points of the space were not tried, and one of them may keep the promises: "
            "widen the search (search.share, search.trials), or measure every point (search: grid)."
        ]

    def _ladder_load(self, point: dict, seed: int) -> Load:
        ladder = self.spec.ladder
        return Load(ladder.seconds, seed, ladder.sessions, asks=asked(point), precision=ladder.precision)

    def _open_load(self, best: FittedDeployment, share: float, index: int) -> tuple[Load, dict]:
        """The load of a confirmation and what the fit says that it will show."""
        seed = self.spec.seed + 1 + index  # each run draws requests of its own
        rate = self._foretold_rate(best.deployment, seed) or round(best.rate() * share, 4)
        seconds = decidable_s(self.spec, self.mix, rate)
        predicted = predict_open_run(best, self.mix, rate, seconds, np.random.default_rng(seed))
        prediction = sealed(predicted, datetime.now(UTC).isoformat(timespec="seconds"))
        steady = max(1, round(prediction["sessions"]))
        return Load(seconds, seed, (), rate, steady, asked(best.deployment)), prediction

    def _foretold_rate(self, point: dict, seed: int) -> float | None:
        """The rate of a confirmation that an earlier start has foretold: it is measured or repeated at just that."""
        for name, prediction in reversed(self.run.predictions().items()):
            rate = prediction["rate_per_s"]
            load = Load(decidable_s(self.spec, self.mix, rate), seed, (), rate, asks=asked(point))
            if name in (trial_id(point, load, repeat) for repeat in range(TRIES)):
                return rate
        return None

    def _settled(self, point: dict, load: Load) -> bool:
        """Whether a trial need not be measured."""
        return _is_settled(point, load, {each.trial_id: each for each in self._trials()})

    def _known(self, name: str) -> Trial | None:
        return next((trial for trial in self._trials() if trial.trial_id == name), None)

    def _trials(self) -> list[Trial]:
        return [*self.run.trials(), *self.in_doubt]

    def _estimated_s(self, load: Load) -> float:
        return estimated_s(load, self.run.trials())

    def _confirm_s(self) -> float:
        """The confirmation that an answer needs, and its repeat, at the rates that were seen so far."""
        share = max(self.spec.confirm.load_share)
        carried = max((rung.frames_per_s for rung in self._in_time()), default=0.0) / self.mix.mean_frames()
        seconds = decidable_s(self.spec, self.mix, share * carried) if carried else self.spec.confirm.seconds
        return TRIES * self._estimated_s(Load(seconds, 0))

    def _second_sample_s(self) -> float:
        return self._estimated_s(self._ladder_load({}, 0)) + _FIT_S

    def _whole_s(self) -> float:
        ladders = self.walk.left(len(self._ended())) * self._estimated_s(self._ladder_load({}, 0))
        confirm_s = len(self.spec.confirm.load_share) * self._estimated_s(Load(self.spec.confirm.seconds, 0))
        return _START_S + ladders + self._second_sample_s() + confirm_s + 2 * _FIT_S


@contextmanager
def measuring_lock(folder: Path | None = None) -> Iterator[None]:
    """One measurement at a time on this host: a second one would measure the first. Raises ServerError."""
    folder = folder or LOCK_FOLDER
    folder.mkdir(exist_ok=True)
    with open(folder / "measuring.lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise ServerError(f"process {file.read()} is measuring on this host: wait for it or end it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _is_settled(point: dict, load: Load, trials: Mapping[str, Trial]) -> bool:
    """Whether a trial is VALID, or was tried as often as is worth it. ``trials`` by name."""
    tries = [trials.get(trial_id(point, load, repeat)) for repeat in range(TRIES)]
    return any(trial is not None and trial.valid for trial in tries) or None not in tries


def _note(trial: Trial) -> str:
    """A finished trial in a few words."""
    verdict = "VALID" if trial.valid else f"INVALID ({'; '.join(trial.reasons)})"
    if trial.kind == "ladder":
        best = max((rung.frames_per_s for rung in trial.rungs), default=0.0)
        return f"{verdict}, up to {best * wire.SECONDS_PER_FRAME:.1f} audio s/s"
    p95 = trial.rungs[0].summary["ttfa_p95_s"] if trial.rungs else float("nan")
    return f"{verdict}, time to first audio p95 {p95:.2f} s"
