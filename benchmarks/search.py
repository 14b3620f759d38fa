"""A search against the whole grid: how good its best is, and how few points it measured; beside random and TPE.

The spaces are emulated servers (search_spaces.py) whose every point is known without noise. A search sees a point as a
trial of 2.5% noise shows it. Its best is the point that it believes best, valued by the truth.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import common
import numpy as np
from search_spaces import SESSIONS, Emulated, spaces

from harness.explore.decide import Aim
from harness.explore.engine import KINDS
from harness.explore.guide import Guide, Measured
from harness.explore.objective import Value

SEEDS, SHARE, MARGIN, SURE = 10, 0.1, 0.02, 0.9
AT_LEAST = 0.95


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__.partition("\n\n")[0], "python benchmarks/search.py --seeds 10")
    parser.add_argument("--seeds", type=common.whole(1, 1000), default=SEEDS, help="searches of every space")
    parser.add_argument("--share", type=common.real(0.01, 1), default=SHARE, help="most points, as a share of the grid")
    parser.add_argument(
        "--margin", type=common.real(0.001, 0.5), default=MARGIN, help="by which a better point matters"
    )
    parser.add_argument("--only", type=common.several(str), default=[], help="names of spaces; left out = all")
    asked = parser.parse_args(arguments)
    seeds = 2 if asked.quick else asked.seeds
    chosen = [each for each in spaces(asked.quick) if each.name in asked.only or not asked.only]
    table = common.table(
        f"Best found over the grid's best: median (lowest) of {seeds} seeds",
        "space", "points", "worst", "median", *KINDS, "points tried", "sure, right",
    )  # fmt: skip
    figures = {}
    for space in chosen:
        found = {kind: _searches(space, kind, seeds, asked.share, asked.margin) for kind in KINDS}
        figures[space.name] = _figures(space, found, asked.margin)
        table.add_row(*_row(space, figures[space.name]))
    overall = _overall(figures)
    common.finish(table, {**overall, "seeds": seeds, "spaces": figures})
    return 0 if overall["best_share_median"] >= AT_LEAST and overall["points_share"] <= asked.share else 1


def _searches(space: Emulated, kind: str, seeds: int, share: float, margin: float) -> list[dict]:
    common.say(f"{space.name}: {space.points.size} points of {space.figures}, searched by {kind} …")
    aim = Aim(margin, SURE, int(space.points.size * share))
    return [_search(space, kind, aim, seed) for seed in range(seeds)]


def _search(space: Emulated, kind: str, aim: Aim, seed: int) -> dict:
    """One search to its end: the true value of its best over the grid's, and the share of points measured."""
    guide = Guide(space.points, space.promised, kind, aim, seed, SESSIONS, {})
    measured: list[Measured] = []
    began = time.process_time()
    while (decision := guide.next(measured)).number is not None:
        rungs, value = space.trial(decision.number, seed)
        measured.append(Measured(decision.number, Value(value), rungs))
    return {
        "best": float(space.truth[decision.best] / space.truth.max()),
        "tried": len(measured),
        "confidence": decision.confidence,
        "seconds": (time.process_time() - began) / len(measured),
        "steps": [each.number for each in measured],
    }


def _figures(space: Emulated, found: dict[str, list[dict]], margin: float) -> dict:
    model, top = found["model"], space.truth.max()
    return {
        "points": space.points.size,
        "worst_share": float(space.truth.min() / top),
        "median_share": float(np.median(space.truth) / top),
        **{f"{kind}_share_median": float(np.median([each["best"] for each in found[kind]])) for kind in KINDS},
        **{f"{kind}_share_lowest": min(each["best"] for each in found[kind]) for kind in KINDS},
        "points_share": float(np.median([each["tried"] for each in model])) / space.points.size,
        "points_tried": [each["tried"] for each in model],
        "confidence_mean": float(np.mean([each["confidence"] for each in model])),
        "within_margin": float(np.mean([each["best"] >= 1 - margin for each in model])),
        "decision_s": float(np.mean([each["seconds"] for each in model])),
        "figures_from": space.figures,
    }


def _row(space: Emulated, figures: dict) -> list[str]:
    shares = [f"{figures[f'{kind}_share_median']:.3f} ({figures[f'{kind}_share_lowest']:.3f})" for kind in KINDS]
    sure = f"{figures['confidence_mean']:.0%}, {figures['within_margin']:.0%}"
    levels = f"{figures['worst_share']:.2f}", f"{figures['median_share']:.2f}"
    return [space.name, str(figures["points"]), *levels, *shares, f"{figures['points_share']:.1%}", sure]


def _overall(figures: dict[str, dict]) -> dict:
    """The median over spaces of their medians, the lowest of them, and the largest share of points."""
    shares = [each["model_share_median"] for each in figures.values()]
    others = {f"{kind}_share_median": float(np.median([each[f"{kind}_share_median"] for each in figures.values()]))
              for kind in KINDS if kind != "model"}  # fmt: skip
    return {
        "best_share_median": float(np.median(shares)),
        "best_share_worst_space": min(shares),
        "points_share": max(each["points_share"] for each in figures.values()),
        **others,
    }


if __name__ == "__main__":
    common.run(main)
