"""Makes a stored sample run, and the tables of pages, from a finished run: ``make sample RUN=results/quick-1a2b3c4d``.

A run of the plan ``quick`` replaces ``results/sample-quick``, and so do runs of ``mixed`` and ``h100``. Without a run
it makes the tables of the README and of the documentation anew from the samples as they are.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from harness.errors import HarnessError, InputError
from harness.records.estimate import PlanningEstimate
from harness.records.plan import Plan, PlannedTarget
from harness.records.store import Run
from harness.report import words
from harness.report.facts import SWEEP_NAME
from harness.report.seal import check_seal, report_again

ROOT = Path(__file__).resolve().parents[1]
ESTIMATE = ROOT / "results" / "sample-estimate" / "estimate.json"
SAMPLES = {name: ROOT / "results" / f"sample-{name}" for name in ("quick", "mixed", "h100")}
README = ROOT / "README.md"
PAGES = {"quick": README, "mixed": README, "h100": ROOT / "docs" / "how-to" / "before-a-gpu.md"}
_TABLE = re.compile(r"(<!-- table of (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def table(plan: Plan) -> str:
    """The README's table of a plan."""
    rows = [f"| {' | '.join(_cells(target, plan.emulated))} |\n" for target in plan.targets]
    head = f"Verdict: **{plan.verdict}**. One device = {plan.unit}.\n\n"
    columns = "| requests/s | devices | 95% interval | bound by | utilisation | with one spare | basis |\n"
    return head + columns + "|---:|---:|:---:|---|---:|---:|---|\n" + "".join(rows) + f"\n{words.utilisation(plan)}.\n"


def estimate_table(estimate: PlanningEstimate) -> str:
    """The README's table of GPUs on cards that were not measured."""
    cards = [card for card in estimate.cards if not card.problem]
    head = f"| requests/s | {' | '.join(f'{card.name} ({card.basis})' for card in cards)} |\n"
    rows = zip(*(card.targets for card in cards), strict=True)
    lines = [f"| {row[0].qps:g} | {' | '.join(map(_estimated, row))} |\n" for row in rows]
    return head + "|---:|" + "---:|" * len(cards) + "\n" + "".join(lines)


def _estimated(target: PlannedTarget) -> str:
    return f"{words.figure(target.devices)} ({words.interval(target.interval)})"


def _cells(target: PlannedTarget, emulated: bool) -> list[str]:
    counts = [f"{target.qps:g}", words.figure(target.devices), words.interval(target.interval)]
    rest = [words.percent(target.utilisation), words.figure(target.devices_n_plus_1)]
    rest.append(f"{target.basis}{', emulated' if emulated else ''}")
    return [*counts, words.bound(target), *rest]


def take(source: Path, sample: Path) -> None:
    """Replace the sample by a finished run whose evidence is as it was signed; its report is written where it lies."""
    found = check_seal(source)
    if found.problems:
        raise InputError(f"{source} failed verification: {'; '.join(found.problems)}")
    fresh = sample.with_name(f".{sample.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh, ignore=shutil.ignore_patterns(".*", "*.lock", "*.tmp"))
    shutil.rmtree(sample, ignore_errors=True)
    fresh.rename(sample)
    report_again(Run.open(sample))
    (sample / SWEEP_NAME).unlink(missing_ok=True)  # not signed, large, and made again by harness report


def with_tables(page: str) -> str:
    """The page with the tables of the stored samples."""

    def made(found: re.Match) -> str:
        if found[2] == "estimates":
            return found[1] + estimate_table(stored_estimate()) + found[3]
        return found[1] + table(Run.open(SAMPLES[found[2]]).plan()) + found[3]

    return _TABLE.sub(made, page)


def stored_estimate() -> PlanningEstimate:
    return PlanningEstimate.of(json.loads(ESTIMATE.read_text()))


def main(arguments: list[str]) -> None:
    if arguments:
        source = Path(arguments[0])
        name = Run.open(source).manifest.plan["name"]
        if name not in SAMPLES:
            raise InputError(f"{source} is a run of the plan {name}: only those of {', '.join(SAMPLES)} are samples")
        take(source, SAMPLES[name])
    for page in set(PAGES.values()):
        page.write_text(with_tables(page.read_text()))
    for name, sample in SAMPLES.items():
        where = PAGES[name].relative_to(ROOT)
        print(f"{sample.relative_to(ROOT)} and its table in {where} are of run {Run.open(sample).manifest.run_id}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except HarnessError as error:
        sys.exit(f"make_sample: {error}")
