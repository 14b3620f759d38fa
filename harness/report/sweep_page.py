"""Builds the page of a sweep from stored records, and writes it and the winner's files into the run folder."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from harness import wire
from harness.records.store import Run, replace_text
from harness.report import decision, facts, figures, sweep_facts, sweep_figures, winner, words
from harness.report.facts import Point, SweptDeployment
from harness.report.page import script_json, template
from harness.report.sweep_facts import Answer
from harness.topology import EVERY_STAGE, Knobs, topology_of

SHOWN_LEVELS = 6  # factors whose levels are drawn


def write_sweep_report(run: Run) -> Path:
    """Write ``sweep.html`` and, where a deployment was found, ``winner/`` into the folder of ``run``.

    The page is self-contained and depends on the stored records only. The ``winner/`` of a signed run is not changed.
    Returns the page's path. Raises StoreError.
    """
    best = winning_point(run)
    if best is not None and not facts.is_signed(run):
        winner.write_winner(run, best)
    path = run.path / facts.SWEEP_NAME
    replace_text(path, render(run))
    return path


def winning_point(run: Run) -> Knobs | None:
    """The best deployment in the stored fit; None without one."""
    fit = run.fit()
    return fit.best_deployment.deployment if fit and fit.best_deployment else None


def render(run: Run) -> str:
    """The whole page as HTML."""
    fit, trials, requests = run.fit(), run.trials(), run.requests()
    swept = facts.deployments(trials, requests, fit, None)
    found = sweep_facts.answers(swept, trials)
    of = sweep_facts.response(found)
    told, no_effects = sweep_facts.effects(found, of)
    load = sweep_facts.common_load(swept)
    lone = sweep_facts.delay_bars(swept, _fewest(swept))
    best = next((entry for entry in swept if entry.best), None)
    return template("sweep.html.j2").render(
        manifest=run.manifest,
        unit=decision.unit(run.manifest, None),
        emulated=decision.is_emulated(run.manifest, None),
        how_emulated=decision.how_emulated(run.manifest),
        swept=swept,
        stages=facts.stages_shown(facts.shares_of(swept)),
        found=found,
        best=best,
        level=words.level(facts.rate_confidence(fit)),
        best_answer=next((answer for answer in found if answer.entry.best), None),
        response=of,
        told=told,
        no_effects=no_effects,
        factor_names=sweep_facts.factor_names(told) if told else [],
        front=sweep_facts.pareto(swept),
        load=load,
        lone=lone,
        largest_delay_s=sweep_facts.largest_delay_s(lone[0]) if lone else None,
        fused_winner=best is not None and topology_of(best.knobs) == wire.FUSED,
        any_staged=any(topology_of(entry.knobs) == wire.STAGED for entry in swept),
        changes=winner.changes_or_reason(run, best.knobs) if best else "",
        asks=winner.asked(best.knobs) if best else {},
        trials=facts.trial_rows(run, requests, swept),
        plots=_plots(swept, found, told, of, load),
        batch_stages=_batch_stages(swept),
        look=figures.style(swept),
        folder=f"{run.path.parent.name}/{run.path.name}",
    )


def _plots(swept: list[SweptDeployment], found: list[Answer], told, of, load: float) -> dict:
    best = next((entry for entry in swept if entry.best), None)
    plots: dict[str, go.Figure] = {}
    for name, sessions in (("delays-lone", _fewest(swept)), ("delays-load", load)):
        bars = sweep_facts.delay_bars(swept, sessions)
        if bars:
            plots[name] = sweep_figures.delays(bars)
    if any(entry.points for entry in swept):
        plots["pareto"] = sweep_figures.throughput_latency(swept, sweep_facts.pareto(swept), best)
    side_by_side = _side_by_side(found, load)
    if side_by_side:
        plots["frame-time"] = sweep_figures.frame_time(side_by_side)
    for stage in _batch_stages(swept):
        plots[f"service-time-{stage}"] = figures.service_time(stage, swept)
    if told:
        plots["effects"] = sweep_figures.effects(told, sweep_facts.factor_names(told))
        for number in range(min(len(told.factors), SHOWN_LEVELS)):
            plots[f"main-{number}"] = sweep_figures.main_effect(told, number, of.unit)
    return {name: script_json(figure) for name, figure in plots.items()}


def _side_by_side(found: list[Answer], load: float) -> list[tuple[SweptDeployment, Point]]:
    pairs = [(answer.entry, sweep_facts.nearest(answer.entry, load)) for answer in found]
    return [(entry, point) for entry, point in pairs if point is not None and point.stages]


def _batch_stages(swept: list[SweptDeployment]) -> list[str]:
    return [stage for stage in EVERY_STAGE if figures.has_service_points(swept, stage)]


def _fewest(swept: list[SweptDeployment]) -> float:
    return min((point.sessions for entry in swept for point in entry.points), default=1.0)


def describe_best(run: Run) -> str:
    """The winner of a sweep in one line, for the terminal."""
    fit = run.fit()
    best = fit.best_deployment if fit else None
    if best is None:
        return "no deployment of the sweep meets the SLOs at any rate"
    interval = f"{words.level(facts.rate_confidence(fit))} interval {words.interval(best.max_rate_interval)}"
    rate = f"{words.figure(best.max_rate_per_s)} requests/s ({interval})"
    bound = words.binding(best.binding)
    return f"best: {words.deployment(best.deployment)}: one device sustains {rate}, bound by {bound}"
