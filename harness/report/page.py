"""Builds the sign-off document from stored records and writes it into the run folder."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from harness.records.day import Day
from harness.records.plan import Plan, PlannedTarget, SurgeRow, ValidationRow
from harness.records.slo import Slo
from harness.records.store import Run, replace_text
from harness.report import day_figures, decision, facts, figures, words
from harness.report.facts import SweptDeployment
from harness.report.goodput import goodput
from harness.report.mixed_fleets import fleet_rows
from harness.report.ruled_out import LostOption, lost_options
from harness.runs.analysis import why_not_of
from harness.topology import EVERY_STAGE

SMALL_MULTIPLES = 6  # deployments drawn individually; the others are in the table


def write_report(run: Run) -> Path:
    """Write ``signoff.html`` into the folder of ``run`` and return its path.

    The file is self-contained (no external font, script or style) and depends on the stored records only: writing it
    twice gives the same bytes. A part that is missing (no fit, no plan, no open-loop trial) is replaced by a sentence.
    Raises StoreError where a stored file is damaged.
    """
    path = run.path / facts.REPORT_NAME
    replace_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The whole document as HTML."""
    fit, plan = run.fit(), run.plan()
    trials, requests = run.trials(), run.requests()
    swept = facts.deployments(trials, requests, fit, plan)
    classes, classes_from = facts.traffic(requests)
    slos = facts.slos(run.manifest, plan)
    surges = plan.behaviour.surges if plan and plan.behaviour else ()
    answered = plan.headline() if plan else None
    day = day_parts(plan.day if plan else None)
    plots = _plots(swept, slos, plan.validation if plan else ()) | _surge_plots(surges) | day["plots"]
    return template("signoff.html.j2").render(
        manifest=run.manifest,
        plan=plan,
        fit=fit,
        unit=decision.unit(run.manifest, plan),
        decision=decision.decide(run.manifest, plan),
        emulated=decision.is_emulated(run.manifest, plan),
        how_emulated=decision.how_emulated(run.manifest),
        swept=swept,
        stages=facts.stages_shown(facts.shares_of(swept)),
        detailed=_detailed(swept),
        look=figures.style(swept),
        slos=slos,
        audio_shares=facts.audio_shares(plan),
        rate_level=words.level(facts.rate_confidence(fit)),
        answered=answered,
        notes=_notes(plan.targets) if plan else [],
        lost=_lost(run, plan, swept),
        mixed=fleet_rows(plan.mixed_fleets if plan else None),
        spares_basis=_spares_basis(answered) if answered else "",
        expires_at=facts.expires_at(run.manifest),
        predictions=facts.predictions(run, trials),
        surge_names=_surge_names(surges),
        admission_colours=_admission_colours(surges),
        day=day["day"],
        jobs=plan.jobs if plan else None,
        plots=plots,
        batch_stages=[stage for stage in EVERY_STAGE if f"service-time-{stage}" in plots],
        classes=classes,
        classes_from=classes_from,
        trials=facts.trial_rows(run, requests, swept),
        goodput=goodput(trials, requests, slos, swept),
        measured=decision.measured(swept, trials, requests),
        computed=decision.computed(run.manifest, plan),
        not_measured=decision.not_measured(run.manifest, trials, plan),
        evidence=facts.evidence(run.path),
        targets_qps=",".join(f"{target.qps:g}" for target in plan.targets) if plan else "1,5",
        folder="/".join(run.path.resolve().parts[-2:]),
    )


def day_parts(day: Day | None) -> dict[str, Any]:
    """What the section about a day is rendered with: the day, and its plot."""
    drawn = day is not None and day.policies
    return {"day": day, "plots": {"day": script_json(day_figures.day(day))} if drawn else {}}


def _lost(run: Run, plan: Plan | None, swept: Sequence[SweptDeployment]) -> list[LostOption]:
    """The options that lost, named by the letters of the report."""
    letters = {facts.key(entry.knobs): entry.letter for entry in swept}
    return lost_options(why_not_of(run), plan.deployment if plan else None, letters)


def _notes(targets: Sequence[PlannedTarget]) -> list[str]:
    """Notes on the device counts, without duplicates."""
    return list(dict.fromkeys(each.note for each in targets if each.note and each.devices is not None))


def _spares_basis(target: PlannedTarget) -> str:
    """Basis of a target's counts with spares: that of the losses they cover, but no better than its own count's."""
    spared = [loss for loss in target.losses if loss.met and loss.devices > (target.devices or 0)]
    known = {target.basis, *(loss.basis for loss in spared)}
    return "extrapolated" if "extrapolated" in known else "simulated"


def _plots(swept: list[SweptDeployment], slos: Sequence[Slo], validation: Sequence[ValidationRow]) -> dict[str, Markup]:
    """Every plot as JSON, by the id of its place in the page; plots without data are left out."""
    plots: dict[str, go.Figure] = {}
    if any(entry.points for entry in swept):
        plots["throughput-latency"] = figures.throughput_latency(swept)
    top_ms = figures.stage_time_top_ms(swept)
    for entry in _detailed(swept):
        plots[f"stage-time-{entry.letter}"] = figures.stage_time(entry, top_ms)
    for stage in EVERY_STAGE:
        if figures.has_service_points(swept, stage):
            plots[f"service-time-{stage}"] = figures.service_time(stage, swept)
    if any(point.first_audio_count for entry in swept for point in entry.points):
        plots["first-audio"] = figures.first_audio(swept, slos)
    if any(words.known(row.relative_error) for row in validation):
        plots["prediction"] = figures.prediction(validation)
    return {name: script_json(figure) for name, figure in plots.items()}


def _surge_plots(surges: Sequence[SurgeRow]) -> dict[str, Markup]:
    """One plot per surge, in the order of plan.json."""
    colours = _admission_colours(surges)
    groups = [[row for row in surges if row.surge == name] for name in _surge_names(surges)]
    return {f"surge-{i}": script_json(figures.surge(rows, colours)) for i, rows in enumerate(groups)}


def _admission_colours(surges: Sequence[SurgeRow]) -> dict[str, str]:
    return dict(zip(dict.fromkeys(row.admission for row in surges), figures.ADMISSION_COLOURS, strict=False))


def _surge_names(surges: Sequence[SurgeRow]) -> list[str]:
    return list(dict.fromkeys(row.surge for row in surges))


def _detailed(swept: list[SweptDeployment]) -> list[SweptDeployment]:
    """The deployments whose frame time is drawn: the best first, then in the order of the sweep."""
    with_stages = [entry for entry in swept if any(point.stages for point in entry.points)]
    return sorted(with_stages, key=lambda entry: not entry.best)[:SMALL_MULTIPLES]


def script_json(figure: go.Figure) -> Markup:
    """A figure as JSON that cannot close the script element that holds it."""
    text = figure.to_json()
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


@cache
def template(name: str) -> Template:
    """A template of the report, with the parts that all pages share."""
    environment = Environment(
        loader=PackageLoader("harness.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared: dict[str, Any] = {
        "words": words,
        "stage_colours": figures.STAGE_COLOURS,
        "rest_colour": figures.REST_COLOUR,
        "policy_colours": day_figures.POLICY_COLOURS,
        "saving": day_figures.saving,
        "stage_fit": figures.stage_fit,
        "signed_error": figures.signed_error,
        "as_yaml": as_yaml,
        "style": Markup(_resource("style.css")),
        "script": Markup(_resource("plots.js")),
        "packed_plotly": packed_plotly(),
    }
    environment.globals.update(shared)
    return environment.get_template(name)


@cache
def packed_plotly() -> str:
    """Plotly's script, gzip and base64: 2 MB in a document instead of 5 MB."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), mtime=0)).decode("ascii")


def _resource(name: str) -> str:
    return files("harness.report").joinpath(name).read_text(encoding="utf-8")


def as_yaml(value) -> str:
    """Stored plain values as YAML, in their own order."""
    return yaml.safe_dump(json.loads(json.dumps(value, default=str)), sort_keys=False, allow_unicode=True)
