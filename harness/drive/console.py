"""A load test on the terminal: its start line, progress lines, and its result."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from harness import wire
from harness.drive.generator import LoadSettings
from harness.drive.load_report import Drift, LoadReport
from harness.drive.observed import Observed
from harness.drive.readers.live_stats import Progress
from harness.records.load_test import HostSummary
from harness.records.metrics import per_request, rising_p_value
from harness.records.schema import Outcome, Result
from harness.records.summary import ClassSummary, Summary
from harness.traffic.arrivals import Arrivals
from harness.traffic.mix import Mix

DRIFT_P_VALUE = 0.01  # below it a drift is called rising; it judges nothing
_MARKS = {True: "ok", False: "NO", None: "--"}


def start_line(settings: LoadSettings) -> str:
    """The load about to be sent, in requests and in audio seconds per second."""
    run_s = settings.load.time_limit_s
    mix = f"{_traffic(settings)}{_scripts(settings)}"
    arrivals = settings.load.arrivals
    if arrivals is None:
        return f"closed loop, {mix}: each user sends one request after another"
    words = [f"open loop, {mix}: {arrivals}", *_offered(arrivals, settings.mix, run_s)]
    if settings.load.steady:
        words.append(f"{settings.load.steady} sessions in progress at the start")
    if run_s and arrivals.ends_s < run_s:
        again = "; --trace-repeat repeats the trace" if arrivals.trace else ""
        words.append(f"they end {run_s - arrivals.ends_s:.0f} s before the test does{again}")
    return ", ".join(words)


def _traffic(settings: LoadSettings) -> str:
    """The traffic mix; with several user classes, the mix of each."""
    mean = f"{settings.mix.mean_audio_s():.4g} audio s per request on average"
    if len(settings.users) < 2:
        return f"mix {settings.mix.name}, {mean}"
    classes = ", ".join(
        f"{user.name} ({f'fixed count {user.fixed_count}' if user.fixed_count else f'weight {user.weight:g}'}, mix "
        f"{user.mix.name}, {user.mix.mean_audio_s():.4g} audio s per request)"
        for user in settings.users
    )
    return f"user classes {classes}" + (f", {mean}" if settings.load.arrivals else "")


def _scripts(settings: LoadSettings) -> str:
    """Whether the mix or the scripts set the length of a request."""
    if not settings.scripts.files:
        return ""
    whole = [each.length.from_script for each in settings.mix.classes]
    spoken = "spoken whole" if all(whole) else "cut or repeated to the lengths of the mix"
    but = ", whole in classes of length from_script" if any(whole) and not all(whole) else ""
    return f", {len(settings.scripts.files)} scripts of {settings.scripts.folder} {spoken}{but}"


def _offered(arrivals: Arrivals, mix: Mix, run_s: float | None) -> Iterator[str]:
    rate = arrivals.rate_per_s
    if run_s and not arrivals.is_steady:
        rate = arrivals.expected(run_s) / run_s
        yield f"{rate:.4g} requests/s for {run_s:.0f} s"
    if rate is not None:
        yield f"that is, {rate * mix.mean_audio_s():.4g} audio s per second"


def progress_line(seconds: float, since_s: float, before: Progress, now: Progress, memory_bytes: int) -> str:
    """Progress ``seconds`` after the start; the step time is that of the ``since_s`` seconds since ``before``."""
    frames = (now.samples - before.samples) / wire.SAMPLES_PER_FRAME
    stream_s = (before.active + now.active) / 2 * since_s
    words = [f"{int(seconds // 60):4d}:{int(seconds % 60):02d}  {now.active} streams"]
    words.append(f"{frames * wire.SECONDS_PER_FRAME / since_s:.1f} audio s/s")
    if frames:
        words.append(f"about {1e3 * stream_s / frames:.0f} ms per frame and stream")
    words.append(f"{now.stalls - before.stalls} stalls")
    if memory_bytes:
        words.append(f"server {memory_bytes / 2**20:.0f} MiB")
    return ", ".join(words)


def end_lines(observed: Observed, report: LoadReport) -> Iterator[str]:
    """The result: requests and audio, the quantiles of each class, the SLOs, and the certificate."""
    results = observed.results
    counts = Counter(result.outcome for result in results)
    yield "Speech"
    yield "  requests     " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome)
    if observed.never_sent:
        yield f"               and {observed.never_sent} prepared but not yet due when the test ended"
    if any(result.emulated for result in results):
        slower = "" if observed.dilation == 1 else f", time dilated {observed.dilation:g} times"
        yield f"  EMULATED     compute times come from a profile{slower}, and the audio is silent"
    yield from _window_lines(report)
    yield from _load_lines(observed.settings, report)
    yield from _audio_lines(results)
    yield from _class_table(results, report.summary)
    yield from _slo_lines(report)
    yield from _machine_lines(report.machine)
    yield from _drift_lines(report.drift)
    yield from _certificate_lines(report)


def _window_lines(report: LoadReport) -> Iterator[str]:
    if report.warm_up_s:
        yield (
            f"  window       {report.summary.seconds:.1f} s, after {report.warm_up_s:.1f} s of warm-up that MSER-5 "
            "derives from the number of sessions; --steady starts without one"
        )


def _load_lines(settings: LoadSettings, report: LoadReport) -> Iterator[str]:
    summary = report.summary
    offered = f"{summary.offered_rate_per_s:.4g} requests/s, {summary.offered_audio_s_per_s:.4g} audio s/s offered"
    yield f"  load         {offered}, {summary.delivered_audio_s_per_s:.4g} delivered"
    if settings.load.arrivals is not None and settings.load.arrivals.ends_s < (report.end_ns - report.start_ns) / 1e9:
        yield f"               {settings.load.arrivals.kind} arrivals ended after {settings.load.arrivals.ends_s:.0f} s"


def _audio_lines(results: Sequence[Result]) -> Iterator[str]:
    rows = per_request(results)
    done = rows[rows["outcome"] == str(Outcome.DONE)]
    cut = rows[rows["outcome"] == str(Outcome.UNFINISHED)]
    wanted, got = (done["frames"] * wire.SAMPLES_PER_FRAME).sum(), done["samples"].sum()
    equal = "equal" if wanted == got else "NOT EQUAL"
    rate = wire.SAMPLE_RATE_HZ
    yield f"  audio        {wanted / rate:.1f} s requested by completed requests, {got / rate:.1f} s delivered: {equal}"
    yield f"               {cut['audio_s'].sum():.1f} s delivered to unfinished requests"
    yield f"  stalls       {rows['stalls'].sum():.0f}, {rows['stall_total_s'].sum():.2f} s in all (no start buffer)"


def _class_table(results: Sequence[Result], summary: Summary) -> Iterator[str]:
    yield f"  {'':<12} {'TTFA p50':>9} {'p95':>7} {'RTF p50':>9} {'p95':>7} {'stall p95':>10} {'C100':>7}"
    for name in ("all", *sorted({result.traffic_class for result in results})):
        own = summary if name == "all" else summary.classes.get(name, ClassSummary())
        yield (
            f"  {name:<12} {_figure(own.ttfa_p50_s, 's'):>9} {_figure(own.ttfa_p95_s, 's'):>7} "
            f"{_figure(own.rtf_p50):>9} {_figure(own.rtf_p95):>7} "
            f"{_figure(own.stall_p95_s, 's'):>10} {_figure(100 * own.c100, '%', 1):>7}"
        )


def _slo_lines(report: LoadReport) -> Iterator[str]:
    for title, each in zip(("SLOs", *[""] * len(report.slos)), report.slos, strict=False):
        yield f"  {title:<12} {_figure(each.verdict.value):>6}  {each.verdict.reason}"
    if report.slos:
        good, whole = report.summary.goodput_per_s, report.summary.completed_rate_per_s
        yield f"  goodput      {good:.4g} requests/s met every SLO of their class, of {whole:.4g} completed"


def _machine_lines(machine: HostSummary | None) -> Iterator[str]:
    if machine and machine.samples:
        yield (
            f"  machine      {machine.busy_share:.0%} of {machine.cores} cores busy, "
            f"{machine.other_share:.0%} by others (at most {machine.other_share_max:.0%}), "
            f"{machine.stolen_share:.1%} stolen (at most {machine.stolen_share_max:.1%})"
        )


def _drift_lines(drift: Drift | None) -> Iterator[str]:
    if drift is None:
        return
    for name, values, unit in (("step time", 1e3 * drift.step_s, "ms"), ("memory", drift.memory_mib, "MiB")):
        known = values[np.isfinite(values)]
        if len(known):
            p_value = rising_p_value(known)
            rises = "too few parts to test" if math.isnan(p_value) else _rises(p_value)
            slope = drift.slope_per_hour(values)
            words = f"{name} {known[0]:.1f} to {known[-1]:.1f} {unit}, {slope:+.3g} {unit} an hour"
            yield f"  drift        {words} in {len(known)} parts of {drift.part_s:.0f} s ({rises})"


def _rises(p_value: float) -> str:
    verdict = "rising" if p_value < DRIFT_P_VALUE else "not rising"
    return f"{verdict}: Mann-Kendall p = {p_value:.2g}, rising below {DRIFT_P_VALUE:g}"


def _certificate_lines(report: LoadReport) -> Iterator[str]:
    certificate = report.certificate
    yield f"  {certificate.verdict}"
    for gate in certificate.gates:
        yield f"    {_MARKS[gate.passed]}  {gate.name:<22} {gate.says}"
    for note in filter(None, (certificate.failures, *certificate.notes)):
        yield f"    {note}"


def _figure(value: float, unit: str = "", digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}{unit}"
