"""A search, random search and TPE compared with the whole grid: quality of the best point, and points measured.

The spaces are emulated servers (search_spaces.py) whose every point is known without noise. A search sees a point as a
trial with 2.5% noise. Its best is the point that it estimates to be best, valued by the truth.

Our search continues past its share of points until it states that no untried point is likely to win by more than the
margin (or has used three times its share); the truth of those statements is counted. Nothing was tuned on the space
"held-out".
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from scipy import stats
from search_spaces import SESSIONS, Emulated, spaces

from harness.sweep.optimizer.decide import Aim
from harness.sweep.optimizer.guide import Guide, MeasuredPoint
from harness.sweep.optimizer.objective import Value
from harness.sweep.optimizer.optuna_engine import KINDS

SEEDS, SHARE, MARGIN, SURE = 10, 0.1, 0.02, 0.9
AT_LEAST, LONGER = 0.95, 3


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__.partition("\n\n")[0], "python benchmarks/sweep/search.py --seeds 10")
    parser.add_argument("--seeds", type=common.whole(1, 1000), default=SEEDS, help="searches of every space")
    parser.add_argument("--share", type=common.real(0.01, 1), default=SHARE, help="most points, as a share of the grid")
    parser.add_argument(
        "--margin", type=common.real(0.001, 0.5), default=MARGIN, help="by which a better point counts as better"
    )
    parser.add_argument("--jobs", type=common.whole(1, 64), default=1, help="searches at one time")
    parser.add_argument("--only", type=common.several(str), default=[], help="names of spaces; left out = all")
    asked = parser.parse_args(arguments)
    seeds = 2 if asked.quick else asked.seeds
    chosen = [each for each in spaces(asked.quick) if each.name in asked.only or not asked.only]
    table = common.table(
        f"Best found over the grid's best: median (lowest) of {seeds} seeds",
        "space", "points", "worst", "median", *KINDS, "points tried", "stated, true",
    )  # fmt: skip
    figures = {}
    for space in chosen:
        found = {kind: _searches(space, kind, seeds, asked) for kind in KINDS}
        figures[space.name] = _figures(space, found)
        row = _row(space, figures[space.name])
        table.add_row(*row)
        common.say(f"{space.name}: {', '.join(row[4:])}")
    overall = _overall(figures)
    common.finish(table, {**overall, "seeds": seeds, "margin": asked.margin, "sure": SURE, "spaces": figures})
    return 0 if overall["best_share_median"] >= AT_LEAST and overall["points_share"] <= asked.share else 1


def _searches(space: Emulated, kind: str, seeds: int, asked) -> list[dict]:
    common.say(f"{space.name}: {space.points.size} points of {space.figures}, searched by {kind} …")
    assert len(space.truth) == space.points.size  # built before concurrent searches start
    search = partial(_search, space.name, kind, asked.share, asked.margin)
    if asked.jobs == 1 or kind != "model":
        return [search(seed) for seed in range(seeds)]
    with ProcessPoolExecutor(asked.jobs) as pool:
        return list(pool.map(search, range(seeds)))


def _search(name: str, kind: str, share: float, margin: float, seed: int) -> dict:
    """One search: the true value of its best when its share is spent / the grid's best, and its final statement."""
    space = next(each for each in spaces() if each.name == name)
    most = int(space.points.size * share)
    aim = Aim(margin, SURE, most * LONGER if kind == "model" else most)
    guide = Guide(space.points, space.slos, kind, aim, seed, SESSIONS, {})
    measured: list[MeasuredPoint] = []
    decisions = []
    began = time.process_time()
    while (decision := guide.next(measured)).number is not None:
        decisions.append(decision)
        rungs, value = space.trial(decision.number, seed)
        measured.append(MeasuredPoint(decision.number, Value(value), rungs))
    decisions.append(decision)
    tried = min(most, len(measured))
    return {
        "best": float(space.truth[decisions[tried].best] / space.truth.max()),
        "tried": tried,
        "confidence": decisions[tried].confidence,
        "stated_after": len(measured) if len(measured) < aim.most else None,
        "stated_true": _no_untried_wins(space, measured, decision.best, margin),
        "seconds": (time.process_time() - began) / len(measured),
    }


def _no_untried_wins(space: Emulated, measured: Sequence[MeasuredPoint], best: int, margin: float) -> bool:
    untried = np.delete(space.truth, [each.number for each in measured])
    return bool(space.truth[best] >= (1 - margin) * untried.max())


def _figures(space: Emulated, found: dict[str, list[dict]]) -> dict:
    model, top = found["model"], space.truth.max()
    stated = [each for each in model if each["stated_after"]]
    return {
        "points": space.points.size,
        "worst_share": float(space.truth.min() / top),
        "median_share": float(np.median(space.truth) / top),
        **{f"{kind}_share_median": float(np.median([each["best"] for each in found[kind]])) for kind in KINDS},
        **{f"{kind}_share_lowest": min(each["best"] for each in found[kind]) for kind in KINDS},
        "points_share": float(np.median([each["tried"] for each in model])) / space.points.size,
        "points_tried": [each["tried"] for each in model],
        "confidence_mean": float(np.mean([each["confidence"] for each in model])),
        "stated": len(stated),
        "stated_true": sum(each["stated_true"] for each in stated),
        "stated_after": sorted(each["stated_after"] for each in stated),
        "decision_s": float(np.mean([each["seconds"] for each in model])),
        "figures_from": space.figures,
    }


def _row(space: Emulated, figures: dict) -> list[str]:
    shares = [f"{figures[f'{kind}_share_median']:.3f} ({figures[f'{kind}_share_lowest']:.3f})" for kind in KINDS]
    sure = f"{figures['stated']}, {figures['stated_true']}"
    levels = f"{figures['worst_share']:.2f}", f"{figures['median_share']:.2f}"
    return [space.name, str(figures["points"]), *levels, *shares, f"{figures['points_share']:.1%}", sure]


def _overall(figures: dict[str, dict]) -> dict:
    """The median over spaces of their medians, the lowest of them, and the largest share of points."""
    shares = [each["model_share_median"] for each in figures.values()]
    others = {f"{kind}_share_median": float(np.median([each[f"{kind}_share_median"] for each in figures.values()]))
              for kind in KINDS if kind != "model"}  # fmt: skip
    stated, true = (sum(each[key] for each in figures.values()) for key in ("stated", "stated_true"))
    low, high = stats.binomtest(true, stated).proportion_ci(method="wilson") if stated else (0.0, 1.0)
    return {
        "best_share_median": float(np.median(shares)),
        "best_share_worst_space": min(shares),
        "points_share": max(each["points_share"] for each in figures.values()),
        "stated": stated,
        "stated_true": true,
        "stated_true_interval": [low, high],
        **others,
    }


if __name__ == "__main__":
    common.run(main)
