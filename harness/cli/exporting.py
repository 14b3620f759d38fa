"""The command `harness export`: from a signed plan to what runs and watches a fleet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.app import RunFolder, app, out, rates_of, say_aside
from harness.errors import InputError

if TYPE_CHECKING:
    from harness.export.fleet import PlannedFleet

KUBERNETES, PROMETHEUS = KINDS = ("kubernetes", "prometheus")


@app.command(epilog="Example: `harness export kubernetes --run results/sample-quick --qps 5 --out build/fleet`")
def export(
    what: Annotated[str, typer.Argument(metavar="kubernetes|prometheus", help="What to write.")],
    run: RunFolder,
    qps: Annotated[float, typer.Option("--qps", help="One of the plan's target rates, requests per second.")],
    folder: Annotated[Path, typer.Option("--out", help="A new folder.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier export in that folder.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where the plan has expired, or its seal does not hold.")
    ] = False,
    accept: Annotated[
        bool,
        typer.Option(
            "--accept-inconclusive",
            help="Also where the plan does not answer for certain, or not for the studio's requests.",
        ),
    ] = False,
    prometheus: Annotated[
        str, typer.Option("--prometheus", metavar="URL", help="Prometheus's address within the cluster.")
    ] = "http://prometheus-server.monitoring",
    selector: Annotated[
        str | None,
        typer.Option(
            "--selector",
            metavar="LABELS",
            help='Labels of the fleet\'s series, where not job="triton" (on Kubernetes with namespace="speech").',
        ),
    ] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="For prometheus: the rules of a fleet with an autoscaler.")
    ] = False,
) -> None:
    """Write the signed plan of a run for one target rate, so that nothing has to be retyped.

    kubernetes: Kustomize overlays with servers, drain times, disruption budget and autoscaler. prometheus: the plan's
    figures as recording rules, with the alerts that compare servers with them. The same run gives the same files.
    """
    from harness.export import kubernetes
    from harness.export.fleet import Accepted, fleet_of
    from harness.export.folder import must_be_free, write_folder
    from harness.export.prometheus import HOSTS_SELECTOR, KUBERNETES_SELECTOR, rule_files

    if what not in KINDS:
        raise InputError(f"{what!r} cannot be exported: use one of {', '.join(KINDS)}")
    if selector is None:
        selector = KUBERNETES_SELECTOR if what == KUBERNETES else HOSTS_SELECTOR
    monitoring = kubernetes.Monitoring(prometheus, selector)
    if folder.resolve().is_relative_to(run.resolve()):
        raise InputError(f"--out {folder} lies in the run, whose files are sealed: give a folder elsewhere")
    must_be_free(folder, replace=replace)
    fleet = fleet_of(run, rates_of(str(qps))[0], Accepted(force=force, inconclusive=accept))
    files = (
        kubernetes.overlay_files(fleet, monitoring)
        if what == KUBERNETES
        else rule_files(fleet, selector, elastic=elastic)
    )
    write_folder(folder, files, {"kind": what, **kubernetes.record_of(fleet)}, replace=replace)
    _say(fleet, what, folder, files)


def _say(fleet: PlannedFleet, what: str, folder: Path, files: Mapping[str, str]) -> None:
    """Print what was exported, on what it rests, and what comes next."""
    from harness.export import kubernetes

    for remark in fleet.remarks:
        say_aside(f"exported although {remark}", "yellow")
    for note in kubernetes.notes(fleet.scaling) if what == KUBERNETES else ():
        say_aside(note, "yellow")
    spare = f", {fleet.spare} of them spare" if fleet.spare else ""
    out.print(
        f"{fleet.qps:g} requests/s: {fleet.replicas} servers{spare}, {fleet.sessions:g} sessions each at the cap, "
        f"{fleet.grace_s} s to drain ({fleet.basis}{', emulated' if fleet.emulated else ''}; valid until "
        f"{fleet.expires_at})",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    apply = ""
    if what == KUBERNETES:
        apply = (
            f"; next: kubectl apply -k {folder}/{kubernetes.STATIC}, or another overlay. "
            "To move a running fleet from static to an autoscaler see docs/how-to/kubernetes.md, or it scales to 1"
        )
    names = ", ".join(sorted({name.partition("/")[0] for name in files}))
    out.print(f"{folder}: {names}{apply}", soft_wrap=True, markup=False, highlight=False)
