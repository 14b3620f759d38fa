"""The measurements of a run: the ladders of its search, further ladders of the best point, and its confirmations.

Each is measured only if it is missing and the budget has time for it, so that an interrupted run resumes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property

import numpy as np

from harness.capacity.fitting.rate_search import is_of_range, steady_sessions
from harness.capacity.planning.plan import pools_of
from harness.capacity.planning.prediction import predict_open_run, sealed
from harness.clock import HOST
from harness.drive.load import Load
from harness.planfile.plan import PlanSpec
from harness.records.fit import Fit, FittedDeployment
from harness.records.plan import LeftOut
from harness.records.prediction import Prediction
from harness.records.schema import Trial
from harness.records.store import Run
from harness.runs.analysis import fit_of
from harness.runs.expected import ExpectedServer, expected_server
from harness.runs.points import describe_point
from harness.runs.rungs import sessions_that_fit
from harness.runs.stages import record_stages, stages_by_server
from harness.sweep.budget import FIT_S, MOST_LONGER, Budget, decidable_s, estimated_s
from harness.sweep.near_limit import rungs_near_limit
from harness.sweep.outlook import WindowOutlook
from harness.sweep.progress import Lane, Watcher
from harness.sweep.search import Search, Step
from harness.sweep.trial import REPEAT_SEED, SECOND_SAMPLE_SEED, TrialFailed, TrialRequest, asked, deployed, trial_id
from harness.sweep.trial_log import TRIES, TrialLog, note_of
from harness.sweep.workers import Fleet, Host, HostLost, on
from harness.topology import Knobs

FURTHER = ("second", "third")  # ladders of the best point: how far whole ladders differ shows in repeats only


@dataclass(frozen=True, kw_only=True)
class BudgetedTrial(TrialRequest):
    """A trial to be measured. ``later_s``: seconds of the budget to reserve for what follows it.

    ``decisive``: without this trial there is no answer.
    """

    what: str
    later_s: float
    decisive: bool = True


class Campaign:
    """The measurements of one run."""

    def __init__(self, spec: PlanSpec, search: Search, run: Run):
        self.spec, self.search, self.run = spec, search, run
        self.mix = spec.traffic_mix()
        self.room = sessions_that_fit(spec)
        self.log = TrialLog(run)
        self.watcher = Watcher()
        self.budget = Budget(spec.budget_minutes)
        self.left_out: list[LeftOut] = []  # what the budget had no time for
        self._out_of_time = False  # set once it was too late for a ladder
        self._in_flight: list[Knobs] = []  # points being measured, one per host
        self._turn = threading.RLock()  # held by the host that reads or writes any of these

    def begin(self, watcher: Watcher) -> None:
        """Start counting the minutes of the budget."""
        self.watcher, self.budget = watcher, Budget(self.spec.budget_minutes)

    def next_ladder(self) -> Step:
        return self.search.next(self.run, self.settled_points(), self._in_flight)

    def settled_points(self) -> list[Knobs]:
        """Points whose ladders need no more trials, in the order of their first trials."""
        return self.log.settled_points(lambda point: self._ladder_load(point, self.spec.seed))

    # Ladders

    def ladders(self, fleet: Fleet) -> None:
        """Measure the points of the search on all hosts, until there are none left or there is no time for one."""
        lanes = {host.name: Lane(self.watcher, host.name, self._turn) for host in fleet.hosts if len(fleet.hosts) > 1}
        while (step := self.next_ladder()).point is not None and not self._out_of_time:
            fleet.each(lambda host: self._ladder(host, lanes.get(host.name, self.watcher)))
            for lost in fleet.take_lost():
                self.watcher.say(f"{lost}; its points go to the others")
        if step.point is None:
            self.watcher.say(step.says)
        else:
            self._leave_out_points(step.point, step.says)

    def _ladder(self, host: Host, watcher: Watcher) -> bool:
        """Measure the next point's ladder on a host; False if there is no point for it, or no time."""
        with self._turn:
            step = self.next_ladder()
            if step.point is None:
                return False
            self._in_flight.append(step.point)
        try:
            load = self._ladder_load(step.point, self.spec.seed)
            request = BudgetedTrial(step.point, load, what=step.says, later_s=self.later_s())
            measured = self._measure(host, request, watcher)
        finally:
            with self._turn:
                self._in_flight.remove(step.point)
        if said := self.log.best_so_far() if self.search.settings.kind == "grid" else self.search.said:
            watcher.say(said)
        return measured and not self._out_of_time

    def _leave_out_points(self, first: Knobs, says: str) -> None:
        ended = len(self.settled_points())
        count = self.search.left(ended)
        seconds = count * self._estimated_s(self._ladder_load(first, self.spec.seed))
        what = f"{count} of {self.search.most_points()} points, from {says}"
        self._leave_out(LeftOut(what, seconds, decisive=not ended))

    def _leave_out(self, left_out: LeftOut) -> None:
        self.left_out.append(left_out)
        self.watcher.say(f"the budget of {self.budget.minutes:g} min leaves no time for {left_out.what}")

    # Confirmations

    def confirm(self, host: Host) -> None:
        """Measure open-loop runs; the prediction of each is stored before it starts."""
        best = self._fitted_best(host)
        if best is None:
            self.watcher.say("no deployment has a rate at which it meets the SLOs: nothing to confirm")
            return
        best = self._further_ladders(host, best)
        shares = sorted(enumerate(self.spec.confirm.load_share), key=lambda each: each[1], reverse=True)
        for index, share in shares:  # the highest first: an answer needs it
            load, prediction = self._open_load(best, share, index)
            what = f"open loop at {prediction.rate_per_s:.2f} requests/s ({share:.0%} of the highest)"
            decisive = share == shares[0][1]
            outlook = WindowOutlook.of(self.spec, self.mix, prediction.rate_per_s, prediction.step_s)
            if decisive and outlook.problem:
                self.watcher.say(f"warning: {outlook.problem}")
            self._measure_or_leave_out(
                host, BudgetedTrial(best.deployment, load, prediction, what=what, later_s=FIT_S, decisive=decisive)
            )

    def _fitted_best(self, host: Host) -> FittedDeployment | None:
        """The best deployment. Where too little was measured for any rate, one point gets its further ladders first.

        On a disturbed host a ladder may keep too few rungs, or too few requests of a class, for its SLOs.
        """
        fit = self.fit()
        point = None if fit.best_deployment else self._promising(fit)
        for number in range(1, len(FURTHER) + 1):
            if point is None or fit.best_deployment:
                break
            if not self._measure_or_leave_out(host, self._further_ladder(host, point, number)):
                break
            fit = self.fit()
        return fit.best_deployment

    def _promising(self, fit: Fit) -> FittedDeployment | None:
        """Of the deployments with a VALID ladder and yet no rate, the one that delivered the most audio in time.

        After a restart it is the one that has a further ladder.
        """
        unknown = [each for each in fit.deployments if each.max_rate_per_s is None]
        further = (each for each in self.log.all() if each.load.seed >= self.spec.seed + SECOND_SAMPLE_SEED)
        begun = [each.deployment for each in further if each.kind == "ladder"]
        if found := next((each for each in unknown if each.deployment in begun), None):
            return found
        for _, trial in sorted(self.log.in_pace(), key=lambda pair: pair[0].frames_per_s, reverse=True):
            if found := next((each for each in unknown if each.deployment == trial.deployment), None):
                return found
        return None

    def _further_ladders(self, host: Host, best: FittedDeployment) -> FittedDeployment:
        """The best deployment after further ladders with other requests, since the first is biased by its selection.

        It stays the best (``fit.best_of``), unless a further ladder shows that it meets no SLO at any rate.
        """
        number = 1
        while number <= len(FURTHER):
            further, known = self._further_ladder(host, best, number), best
            if not self.log.settled(further.point, further.load) and self._measure_or_leave_out(host, further):
                best = self.fit().best_deployment or best
            number = number + 1 if best.deployment == known.deployment else 1
        return best

    def _further_ladder(self, host: Host, best: FittedDeployment, number: int) -> BudgetedTrial:
        load = self._further_load(best, self.spec.seed + number * SECOND_SAMPLE_SEED, host.ours)
        what = f"{FURTHER[number - 1]} ladder of the best point: {describe_point(best.deployment)}"
        later_s = self.confirm_s() + FIT_S * len(self.spec.confirm.load_share)
        return BudgetedTrial(best.deployment, load, what=what, later_s=later_s, decisive=number == 1)

    def fit(self) -> Fit:
        """Fit the stored trials, and store the fit."""
        self.watcher.step("fitting", FIT_S / 2)
        fit = fit_of(self.run)
        self.run.write_fit(fit)
        self.watcher.done()
        return fit

    # One trial

    def _measure_or_leave_out(self, host: Host, request: BudgetedTrial) -> bool:
        """Measure a trial, and repeat it once if INVALID; False, and recorded, if the budget had no time for it."""
        self._measure(host, request, self.watcher)
        settled = self.log.settled(request.point, request.load)
        if not settled:
            self._leave_out(LeftOut(request.what, self._estimated_s(request.load), request.decisive))
        return settled

    def _measure(self, host: Host, request: BudgetedTrial, watcher: Watcher) -> bool:
        """Measure a trial, and repeat it once if INVALID; False if the budget had no time to measure it at all."""
        point, load = request.point, request.load
        while not self.log.settled(point, load):
            again = self.log.known(trial_id(point, load)) is not None
            if self.budget.left_s() < self._estimated_s(load) + request.later_s:
                self._out_of_time = True
                return again
            watcher.step(request.what + (", once more" if again else ""), self._estimated_s(load))
            watcher.done(note_of(self._trial(host, request)))
        return True

    def _trial(self, host: Host, request: TrialRequest) -> Trial:
        """Measure a point; if the server or Locust failed, the trial has a reason and no rungs."""
        with self._turn:
            request = replace(request, repeat=self.log.repeats(request.point, request.load))
            self.run.must_have_room()
            if request.prediction:
                self.run.append_prediction(request.trial_id, request.prediction)
        try:
            measured = on(host, host.run(request))
        except TrialFailed as error:
            return self._failed(host, request, error)
        with self._turn:
            if not self.run.manifest.emulated and any(result.emulated for result in measured.results):
                self.run.update_manifest(emulated=True)  # an external server may emulate
            self._record_topology(host, measured.trial.topology)
            self.log.keep(measured)
        return measured.trial

    def _record_topology(self, host: Host, topology: str) -> None:
        """Store what the stages of a topology run on, the first time it is deployed."""
        if len(self.spec.topologies) > 1 and not stages_by_server(self.run.manifest, topology):
            record_stages(self.run, {host.url: host.stages})

    def _failed(self, host: Host, request: TrialRequest, error: Exception) -> Trial:
        """Note a failed trial, and restart our server. Raises ServerError if the cause seems to be more than the point.

        Raises HostLost where the server is external.
        """
        try:
            host.recover()
        except HostLost as lost:
            raise HostLost(f"{lost}: {error}") from error
        with self._turn:
            return self.log.doubt(request, error)

    # Loads

    def _ladder_load(self, point: Knobs, seed: int, sessions: tuple[int, ...] | None = None) -> Load:
        """``sessions``: other rungs than those of the plan."""
        ladder = self.spec.ladder
        rungs = sessions or ladder.sessions
        return Load.ladder(ladder.seconds, seed, rungs, asks=asked(point), precision=ladder.precision)

    def _further_load(self, best: FittedDeployment, seed: int, ours: bool) -> Load:
        """A further ladder of the best deployment, with a rung near its limit; the same one again after a restart.

        ``ours``: the server is known to admit as many sessions as its configuration says.
        """
        seeds = (seed, seed + REPEAT_SEED)
        begun = (each.load for each in self.log.all() if each.deployment == best.deployment)
        known = next((load.sessions for load in begun if load.sessions and load.seed in seeds), None)
        return self._ladder_load(best.deployment, seed, known or self._further_rungs(best, ours))

    def _further_rungs(self, best: FittedDeployment, ours: bool) -> tuple[int, ...]:
        """The rungs of the plan where the last fit has no best deployment: a further ladder of it was too noisy."""
        fit, rungs = self.run.fit(), self.spec.ladder.sessions
        if fit is None or fit.best_deployment is None:
            return rungs
        spec = self.spec
        pools = pools_of(fit, best, self.mix, spec.slo_list(), spec.utilisation_cap, spec.routing)
        admitted = deployed(self.search.base, best.deployment).sessions_at_once() if ours else rungs[-1]
        most = steady_sessions(pools.device, pools.limits)
        room = min(pools.limits.room, admitted, self.room)
        return rungs_near_limit(rungs, most, reached=not is_of_range(best.binding), room=room)

    def _open_load(self, best: FittedDeployment, share: float, index: int) -> tuple[Load, Prediction]:
        """The load of a confirmation and what the fit predicts for it."""
        seed = self.spec.seed + 1 + index  # each run draws its own requests
        rate = self._predicted_rate(best.deployment, seed) or round(best.rate() * share, 4)
        seconds = decidable_s(self.spec, self.mix, rate)
        predicted = predict_open_run(best, self.mix, rate, seconds, np.random.default_rng(seed))
        prediction = sealed(predicted, datetime.now(UTC).isoformat(timespec="seconds"))
        steady = max(1, round(prediction.sessions))
        return Load.poisson(seconds, seed, rate, steady, asked(best.deployment)), prediction

    def _predicted_rate(self, point: Knobs, seed: int) -> float | None:
        """The rate of a confirmation predicted before a restart: it is measured or repeated at exactly that rate."""
        for name, prediction in reversed(self.run.predictions().items()):
            rate = prediction.rate_per_s
            load = Load.poisson(decidable_s(self.spec, self.mix, rate), seed, rate, asks=asked(point))
            if name in (trial_id(point, load, repeat) for repeat in range(TRIES)):
                return rate
        return None

    # Times

    def _estimated_s(self, load: Load) -> float:
        return estimated_s(load, self.run.trials(), self.run.manifest.clock)

    def confirm_s(self) -> float:
        """Seconds for the confirmation that an answer needs, from the rates measured so far, and for its repeat.

        In dilated time, which is dear: as long as it may become where no rate is known or expected, and no repeat.
        """
        share = max(self.spec.confirm.load_share)
        carried = self._rate_so_far()
        seconds = decidable_s(self.spec, self.mix, share * carried) if carried else self.spec.confirm.seconds
        if self.run.manifest.clock == HOST:
            return TRIES * self._estimated_s(Load(seconds, 0))
        return self._estimated_s(Load(seconds if carried else MOST_LONGER * seconds, 0))

    @cached_property
    def expected(self) -> ExpectedServer | None:
        """What a server of the plan is expected to sustain, where it emulates GPUs."""
        return expected_server(self.spec)

    def _rate_so_far(self) -> float:
        """Requests/s of a server by the rungs measured so far, otherwise as expected; 0 if not known."""
        carried = max((rung.frames_per_s for rung, _ in self.log.in_pace()), default=0.0) / self.mix.mean_frames()
        return carried or (self.expected.rate_per_s if self.expected else 0.0)

    def later_s(self) -> float:
        """Seconds to reserve, while points are measured, for what follows them.

        While no ladder is VALID, for what an answer needs alone: there is none without another point.
        """
        any_valid = any(trial.valid and trial.kind == "ladder" for trial in self.log.all())
        further_s = self.further_ladders_s() if any_valid else self.further_ladders_s() / len(FURTHER)
        return further_s + self.confirm_s() + 2 * FIT_S

    def least_s(self) -> float:
        """Seconds for the least that an answer needs: a ladder, a further one, a confirmation; 0 once any is stored."""
        return 0.0 if self.log.all() else self._estimated_s(self._ladder_load({}, 0)) + self.later_s()

    def further_ladders_s(self) -> float:
        """Seconds for the further ladders of the best point."""
        rungs = self.spec.ladder.sessions
        longest = self._ladder_load({}, 0, rungs_near_limit(rungs, rungs[-1], reached=False, room=self.room))
        return len(FURTHER) * (self._estimated_s(longest) + FIT_S)

    def whole_s(self) -> float:
        """Seconds for all that is still to be measured, if every ladder takes as long as those so far."""
        ladders = self.search.left(len(self.settled_points())) * self._estimated_s(self._ladder_load({}, 0))
        confirm_s = len(self.spec.confirm.load_share) * self._estimated_s(Load(self.spec.confirm.seconds, 0))
        return ladders + self.further_ladders_s() + confirm_s + 2 * FIT_S
