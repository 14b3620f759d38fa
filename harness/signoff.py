"""The sign-off: deploy, sweep, fit, confirm, plan, report. It resumes an interrupted run."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal, overload

from harness.capacity.ready import compiled_beside
from harness.clock import AUTO, HOST
from harness.deploy.external import RemoteTriton
from harness.deploy.server import TritonServer
from harness.drive.dilation import choose_dilation
from harness.errors import InputError, ServerError, StoreError
from harness.host.places import ROOT
from harness.identity import Requested
from harness.planfile.reading import deployed_as, load_plan
from harness.records.estimate import VERDICT
from harness.records.fit import Fit
from harness.records.plan import Plan
from harness.report.facts import REPORT_NAME
from harness.report.page import write_report
from harness.report.seal import must_be_reliable, must_be_signed, reopen, report_again, sign
from harness.report.sweep_page import write_sweep_report
from harness.runs.analysis import behaviour_of, day_of, jobs_of, plan_of
from harness.runs.fleets import mixed_fleets_of
from harness.runs.opening import open_run
from harness.runs.points import deployment_of
from harness.runs.rungs import within_room
from harness.runs.stages import record_stages
from harness.sweep.budget import CHOOSE_S, FIT_S, START_SERVER_S, minutes_needed
from harness.sweep.campaign import Campaign
from harness.sweep.outlook import OF_FIRST, window_of
from harness.sweep.progress import Watcher
from harness.sweep.ray_workers import ray_hosts
from harness.sweep.search import Search
from harness.sweep.trial import Driver, deployed
from harness.sweep.workers import Fleet, Host

ANSWERED = ("met", VERDICT)  # VERDICT: what would be met is an estimate
JOBS_S = 60.0  # of the simulations of fleets for tasks
LOCK_FOLDER = ROOT / ".harness"


class SignOff:
    """One run of a plan. ``execute`` does what is still missing and returns the content of plan.json."""

    def __init__(
        self,
        plan_path: Path,
        results: Path,
        *,
        url: str | None = None,
        ray: str | None = None,
        topology: str = "",
        dilate: float | str | None = None,
        measured: bool = False,
        deployment: dict | None = None,
    ):
        """``topology`` and ``dilate`` replace the plan's own; ``measured``: nothing is emulated, whatever it says.

        Raises InputError for what cannot be signed off.
        """
        if url and ray:
            raise InputError("give either --url for running servers, or --ray for the hosts of a cluster")
        self.plan_path = Path(plan_path)
        self.spec = deployed_as(load_plan(self.plan_path), topology, dilate, measured)
        if ray and self.spec.dilate == AUTO:
            raise InputError(
                "dilate: auto looks at this host, and --ray measures on others: give a factor, --dilate 20"
            )
        self.url, self.ray = url, ray
        self.base = deployment_of(self.spec, url, **(deployment or {}))
        self.spec, self._clipped = within_room(self.spec)
        self.search = Search(self.spec, self.base)
        if not url:
            self._check_deployable()
        self.run = open_run(self.plan_path, self.spec, results, url, ray)
        self.campaign = Campaign(self.spec, self.search, self.run)

    def _check_deployable(self) -> None:
        """Raise InputError for what no server that is started here can do, before one is started."""
        for point in self.search.every_value():
            deployed(self.base, point).check()
        count = self.base.voice_count()
        if unknown := [voice for voice in self.spec.mix.voices if voice > count]:
            raise InputError(
                f"{self.plan_path}: mix.voices: {', '.join(map(str, unknown))}: the server has voices 1 to {count}; "
                "use these, or deploy a folder with more"
            )

    @overload
    def execute(
        self, watcher: Watcher | None = None, *, ladders_only: Literal[False] = False, go_on: bool = False
    ) -> Plan: ...

    @overload
    def execute(self, watcher: Watcher | None = None, *, ladders_only: Literal[True], go_on: bool = False) -> None: ...

    def execute(
        self, watcher: Watcher | None = None, *, ladders_only: bool = False, go_on: bool = False
    ) -> Plan | None:
        """Measure what is missing, then fit, confirm and plan.

        A finished run returns its stored answer; with ``go_on`` what its budget left out is measured first.
        """
        watcher = watcher or Watcher()
        with self.run.lock():
            if self.run.manifest.finished_at and not ladders_only:
                stored = self._stored(watcher)
                if not (go_on and stored.left_out):
                    return stored
            self.campaign.begin(watcher)
            watcher.begin(START_SERVER_S + self.campaign.whole_s())
            for remark in (*self.spec.script_source().remarks, *filter(None, [self._clipped])):
                watcher.say(f"warning: {remark}")
            if self._anything_to_measure(ladders_only):
                with measuring_lock():
                    self._measure(watcher, ladders_only)
            return self._report_sweep() if ladders_only else self._conclude(watcher)

    def _anything_to_measure(self, ladders_only: bool) -> bool:
        if not ladders_only:
            return True
        return not self.run.manifest.finished_at and self.campaign.next_ladder().point is not None

    def _stored(self, watcher: Watcher) -> Plan:
        """The answer of a finished run; files that a kill at the very end left unwritten are written now.

        Raises InputError where signed files were changed, or the answer has expired.
        """
        if must_be_signed(self.run):
            self.campaign.watcher = watcher
            self.campaign.left_out = list(self._stored_plan().left_out)
            return self._conclude(watcher)
        if not (self.run.path / REPORT_NAME).exists():
            report_again(self.run)
        must_be_reliable(self.run)
        return self._stored_plan()

    def _stored_plan(self) -> Plan:
        plan = self.run.plan()
        if plan is None:
            raise StoreError(f"{self.run.path}: its plan.json is missing: restore it, or measure again with --fresh")
        return plan

    def _measure(self, watcher: Watcher, ladders_only: bool) -> None:
        self._choose_dilation(watcher)
        self._check_budget()
        if not ladders_only:
            self._check_windows(watcher)
        watcher.step(f"reaching {self.url or self.ray}" if self.url or self.ray else "starting Triton", START_SERVER_S)
        try:
            with compiled_beside() as compiling, Fleet(self._hosts()) as fleet:
                stages = {host.url: host.stages for host in fleet.hosts}
                record_stages(self.run, stages)
                reopen(self.run)  # only once a suitable server is ready to measure more
                record_stages(self.run, stages)
                compiling.wait()
                watcher.done(", ".join(host.url for host in fleet.hosts))
                self.campaign.ladders(fleet)
                if not ladders_only:
                    self.campaign.confirm(fleet.hosts[0])
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _choose_dilation(self, watcher: Watcher) -> None:
        """Deploy with the run's time dilation, which is chosen before anything is measured."""
        if self.run.manifest.dilation is None:
            watcher.step("choosing the time dilation", CHOOSE_S)
            mix, scripts, sessions = self.spec.traffic_mix(), self.spec.script_source(), self.spec.ladder.sessions[-1]
            chosen = choose_dilation(self.base, mix, sessions, scripts, watcher.say)
            self.run.update_manifest(dilation=chosen)
            watcher.done(f"time is dilated {chosen:g} times")
            watcher.begin(START_SERVER_S + self.campaign.whole_s())
        self.base = replace(self.base, dilation=self.run.manifest.clock.dilation)

    def _check_budget(self) -> None:
        """Raise InputError where dilated time leaves the budget too short for any answer, before it is spent."""
        clock, budget = self.run.manifest.clock, self.campaign.budget
        least_s, left_s = self.campaign.least_s(), max(budget.left_s(), 0.0)
        missing_s = START_SERVER_S + least_s - left_s
        if clock != HOST and missing_s > 0:
            raise InputError(
                f"{self.plan_path}: with time dilated {clock.dilation:g} times, what an answer needs takes about "
                f"{math.ceil(least_s / 60)} min, and {left_s / 60:.0f} of budget_minutes {budget.minutes:g} are left: "
                f"give budget_minutes {math.ceil(budget.minutes + missing_s / 60)}, shorter or fewer rungs (ladder), "
                "a shorter confirmation (confirm.seconds), or use a host with more cores"
            )

    def _check_windows(self, watcher: Watcher) -> None:
        """Say that the confirmation is too short for any SLO, as far as a rate is expected of emulated GPUs.

        Raises InputError in dilated time, which is dear, unless another point of the space may be faster.
        """
        server = None if self.campaign.log.all() else self.campaign.expected
        if server is None or not server.rate_per_s:
            return
        problem = window_of(self.spec, self.campaign.mix, server).problem
        if problem and server.of_all and self.run.manifest.clock != HOST:
            raise InputError(f"{self.plan_path}: {problem} (see harness signoff --dry-run)")
        if problem:
            watcher.say(f"warning: {problem}{'' if server.of_all else OF_FIRST}")

    @property
    def _scratch(self) -> Path:
        return self.run.path / ".work"

    def _hosts(self) -> Sequence[Host]:
        """Where trials run: a Triton that is started here, external ones, or the hosts of a cluster."""
        if self.ray:
            return ray_hosts(self.ray, self.plan_path, self.base)
        if not self.url:
            return [Host("", lambda: TritonServer(self.base), partial(self._driver, 0), ours=True)]
        urls = dict.fromkeys(filter(None, (url.strip() for url in self.url.split(","))))
        return [self._external_host(number, url) for number, url in enumerate(urls)]

    def _external_host(self, number: int, url: str) -> Host:
        keep = self.run.path / f".{number}.found"
        requested = Requested(self.base.preset, self.base.device, self.base.dtype)
        server = partial(RemoteTriton, url, requested, keep=keep, topologies=self.spec.topologies)
        return Host(url, server, partial(self._driver, number), ours=False)

    def _driver(self, number: int, server) -> Driver:
        return Driver(server, self.plan_path, self.spec, self._scratch / str(number), self.base)

    def _report_sweep(self) -> None:
        self.campaign.log.keep_failed()
        if not self.run.manifest.finished_at:  # signed files are not changed
            self.campaign.fit()
        write_sweep_report(self.run)

    def _conclude(self, watcher: Watcher) -> Plan:
        self.campaign.log.keep_failed()
        fit = self.campaign.fit()
        plan = self._with_what_was_left_out(self._planned(watcher, fit))
        self.run.write_plan(plan)
        if not self.campaign.left_out or plan.verdict in ANSWERED:
            self.run.update_manifest(finished_at=datetime.now(UTC).isoformat(timespec="seconds"))
        write_sweep_report(self.run)
        if self.run.manifest.finished_at:
            sign(self.run)
        else:
            write_report(self.run)
        return plan

    def _planned(self, watcher: Watcher, fit: Fit) -> Plan:
        """The plan and its sections, from stored records; tasks and mixes take long, so that each is a step."""
        watcher.step("planning", FIT_S / 2)
        plan = plan_of(self.run, self.spec, fit, self.spec.targets_qps)
        day, behaviour = day_of(self.run.manifest, self.spec, fit, plan), behaviour_of(self.spec, fit, plan)
        watcher.done()
        jobs, fleets = None, None
        if self.spec.jobs:
            watcher.step("simulating fleets for streams and tasks", JOBS_S)
            jobs = jobs_of(self.run, self.spec, plan)
            watcher.done(jobs.note if jobs else "")
        if self.spec.prices and self.spec.profiles:
            watcher.step("the cheapest mix of device types", FIT_S * len(plan.targets))
            fleets = mixed_fleets_of(self.run, self.spec, fit, plan)
            watcher.done(fleets.note if fleets else "")
        return replace(plan, behaviour=behaviour, day=day, jobs=jobs, mixed_fleets=fleets)

    def _with_what_was_left_out(self, plan: Plan) -> Plan:
        """The plan, made inconclusive if something that was not measured may change its verdict, or no fleet has tasks.

        "met", or its estimate, rests on the confirmed deployment, whatever others show; "missed" needs every point.
        """
        doubts, remarks = self._untried(plan), []
        if plan.jobs and plan.jobs.doubt:
            doubts.append(plan.jobs.doubt)
        left_out, budget = self.campaign.left_out, self.campaign.budget
        for each in left_out:
            if each.decisive or plan.verdict not in ANSWERED:
                doubts.append(f"The budget left no time for {each.what}: start the sign-off again to resume.")
            else:
                minutes = f"{max(1, round(each.seconds / 60))} min"
                remarks.append(
                    f"Not measured for lack of time: {each.what}. It may show a better deployment or narrow the "
                    f"interval: `harness signoff PLAN --go-on` measures it, in about {minutes}; a budget_minutes of "
                    f"{minutes_needed(budget, left_out)} suffices for all."
                )
        return replace(
            plan,
            verdict="inconclusive" if doubts else plan.verdict,
            reasons=(*plan.reasons, *doubts, *remarks),
            doubts=tuple(doubts),
            left_out=tuple(left_out),
        )

    def _untried(self, plan: Plan) -> list[str]:
        """For missed: the points that a search did not try."""
        size = self.search.size
        untried = size - len(self.campaign.settled_points()) if self.search.settings.kind != "grid" else 0
        if plan.verdict != "missed" or untried <= 0:
            return []
        return [
            f"{untried} of the {size} points of the space were not tried, and one of them may meet the SLOs: "
            "widen the search (search.share, search.trials), or measure every point (search: grid)."
        ]


@contextmanager
def measuring_lock(folder: Path | None = None) -> Iterator[None]:
    """Lock that allows one measurement at a time on this host: a second would disturb it. Raises ServerError."""
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
