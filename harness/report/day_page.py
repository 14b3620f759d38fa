"""A page of its own for a day's demand, for runs whose plan had none."""

from __future__ import annotations

from harness.records.day import Day
from harness.records.plan import Plan
from harness.records.schema import RunManifest
from harness.report import decision
from harness.report.page import day_parts, template


def render(found: Day, manifest: RunManifest, plan: Plan) -> str:
    """The whole page as HTML, self-contained."""
    return template("day_page.html.j2").render(
        title=manifest.title,
        unit=decision.unit(manifest, plan),
        emulated=decision.is_emulated(manifest, plan),
        **day_parts(found),
    )
