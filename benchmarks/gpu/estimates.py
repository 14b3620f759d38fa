"""Estimates of cards held against what others published and against what was measured on an H100; nothing is fitted.

published   milliseconds of a frame with one stream, by other software with the same model: the released networks'
            own kernels (counted on the meta device), launched one by one from Python or from C++
bounds      first audio of other models on an L20: the tokens of the first chunk through an LLM of 0.5B alone; the
            published time must be longer
H100        every point of the measured profile, and steps of the fused engine, against the estimate for this card
from        the fused engine's steps again, estimated from the profile of the staged stages on the same card
inside      whether a published or measured time lies in the estimate's 95% interval

The ranges behind the estimates are wide and come from published figures, but whoever wrote them down had seen the
H100's profile: only cards whose profile comes later test them strictly. With measured profiles of two cards under
results/gpu, each is predicted from the other (cross_card_error_median; null with one).
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
from rich.table import Table

from harness import wire
from harness.cards.assumptions import EAGER, HOP, SPLIT, Assumptions
from harness.cards.card import card_of
from harness.cards.costs import PLAIN, Work, costs_of
from harness.cards.estimate import assumptions_for
from harness.cards.ranges import HIGH, LOW, Range, draws_of
from harness.cards.times import CardTimes
from harness.device_profile import ESTIMATED, PREFILL, Profile, StagePoint
from harness.records.store import read_profile

ROOT = Path(__file__).resolve().parents[2]
H100 = ROOT / "results" / "gpu" / "nvidia-h100-80gb-hbm3"
GENERATE_OPERATORS = 4850  # of a frame of transformers' generate, eager, counted
CPP_LAUNCH = Range(low=2.5, likely=4.0, high=8.0, source="µs; CUDA's own launches, 4 to 6 in public measurements")
MEAN_CONTEXT = 21_600 + 150 + 40_500  # positions of both branches, half way through 90 minutes
SEED = 0


@dataclass(frozen=True)
class Compared:
    """A time in milliseconds and the estimate for it: likely, low, high."""

    what: str
    given_ms: float
    likely_ms: float
    low_ms: float
    high_ms: float
    source: str = ""

    @property
    def inside(self) -> bool:
        return self.low_ms <= self.given_ms <= self.high_ms

    @property
    def ratio(self) -> float:
        return self.given_ms / self.likely_ms


Estimated = Callable[[CardTimes], np.ndarray]


class Estimator:
    """Estimates on a card: likely times, and their interval over draws."""

    def __init__(self, card: str, preset: str, topology: str, draws: int, assumed: Assumptions | None = None):
        self.card, self.costs, self.topology = card_of(card), costs_of(preset), topology
        self.assumed = assumed or Assumptions.of(self.card, topology, ESTIMATED)
        self.draws = draws_of([*self.assumed.names, "C++"], np.random.default_rng(SEED), draws)

    def compare(self, what: str, given_ms: float, timed: Estimated, source: str = "") -> Compared:
        likely = CardTimes(self.card, self.costs, self.topology, self.assumed)
        drawn = CardTimes(self.card, self.costs, self.topology, self.assumed, self.draws)
        low, high = np.quantile(timed(drawn), (LOW, HIGH))
        return Compared(what, given_ms, float(timed(likely)), float(low), float(high), source)


def main(arguments: Sequence[str]) -> int:
    options = common.Parser(__doc__, "python benchmarks/gpu/estimates.py").parse_args(arguments)
    draws = 50 if options.quick else 400
    published, bounds = of_others(draws), bounds_of_others(draws)
    stages, steps, scaled = of_the_profile(draws), of_the_engine(draws), of_the_engine(draws, from_profile=True)
    streams = of_staged_streams(draws)
    tables = [
        table("Published by others, ms a frame at one stream", published),
        bounds_table(bounds),
        stage_table(stages),
        table("The fused engine on an H100, ms a step (measured), against the estimate", steps),
        table("The same, estimated from the profile of the staged stages on this card", scaled),
        table("Staged streams through Triton on an H100, ms a frame (measured)", streams),
    ]
    everything = [*(each for group in stages.values() for each in group), *steps, *streams]
    common.finish(tables, figures(draws, published, bounds, everything, scaled))
    return 0


def figures(
    draws: int, published: list[Compared], bounds: list, measured: list[Compared], scaled: list[Compared]
) -> dict:
    return {
        "published_inside_interval": sum(each.inside for each in published),
        "published_total": len(published),
        "bounds_held": sum(low_ms < given_ms for _, given_ms, low_ms, _ in bounds),
        "bounds_total": len(bounds),
        "h100_inside_interval": sum(each.inside for each in measured),
        "h100_total": len(measured),
        "h100_measured_over_estimate_median": statistics.median(each.ratio for each in measured),
        "h100_error_median": statistics.median(abs(each.ratio - 1) for each in measured),
        "fused_from_staged_inside_interval": sum(each.inside for each in scaled),
        "fused_from_staged_total": len(scaled),
        "fused_from_staged_error_median": statistics.median(abs(each.ratio - 1) for each in scaled),
        "cross_card_error_median": statistics.median(errors) if (errors := cross_card_errors(draws)) else None,
    }


# Published by others


def of_others(draws: int) -> list[Compared]:
    """Times of one stream at 1.5b unless said otherwise; a frame is 133 ms of audio."""
    issue = "github.com/microsoft/VibeVoice issue"
    eager, cpp = whole_frame(EAGER, operators=GENERATE_OPERATORS), whole_frame("C++")
    h200, h200_7b = Estimator("h200", "1.5b", PLAIN, draws), Estimator("h200", "7b", PLAIN, draws)
    rtx = Estimator("rtx-5090", "1.5b", PLAIN, draws)
    frame_ms = 1e3 * wire.SECONDS_PER_FRAME
    return [
        h200.compare("generate, H200, RTF 0.5", 0.5 * frame_ms, eager(2_000), f"{issue} 268"),
        h200_7b.compare("generate, H200, 7b, RTF 0.5", 0.5 * frame_ms, eager(2_000), f"{issue} 268"),
        rtx.compare(
            "generate, RTX 5090, 93.6 min in 65.7", 65.7 / 93.6 * frame_ms, eager(MEAN_CONTEXT), f"{issue} 416"
        ),
        rtx.compare(
            "audio.cpp, RTX 5090, 93.6 min in 22.95", 22.95 / 93.6 * frame_ms, cpp(MEAN_CONTEXT), f"{issue} 416"
        ),
        rtx.compare(
            "audio.cpp later (26 ms), 93.9 min in 18.2", 18.2 / 93.9 * frame_ms, cpp(MEAN_CONTEXT),
            "github.com/vibevoice-community/VibeVoice issue 64; its author's earlier card",
        ),
    ]  # fmt: skip


def whole_frame(launching: str, operators: int | None = None) -> Callable[[int], Estimated]:
    """A frame by the released networks: branches one after the other, each kernel launched from the host."""

    def at(context: int) -> Estimated:
        def timed(times: CardTimes) -> np.ndarray:
            works = _released_frame(times, context)
            device_ms = sum(times.device_ms(stage, work) for stage, work in works)
            launches = operators or sum(work.launches for _, work in works)
            return np.maximum(device_ms, launches * _launch_us(times, launching) / 1e3)

        return timed

    return at


def _released_frame(times: CardTimes, context: int) -> list[tuple[str, Work]]:
    costs = times.costs
    again = Work(  # the second branch reads the backbone's weights again
        bytes=costs.parts["backbone"].parameters * costs.itemsize, operations=0.0, activation_bytes=0.0,
        launches=costs.steps[PLAIN][wire.LLM].launches,
    )  # fmt: skip
    llm = costs.step(PLAIN, 1, context) + again
    return [(wire.LLM, llm), (wire.DIFFUSION, costs.denoise(PLAIN, 1)), (wire.VOCODER, costs.vocode(PLAIN, 1))]


def _launch_us(times: CardTimes, launching: str) -> np.ndarray:
    if launching == EAGER:
        return times.assumptions.common_values(times.draw)[EAGER]
    return CPP_LAUNCH.at(times.draw.get("C++", 0.5))


def bounds_of_others(draws: int) -> list[tuple[str, float, float, str]]:
    """What, published ms, the least ms of its LLM alone (the low end of the interval), and what that holds.

    Qwen2.5-0.5B: 494 M parameters, 24 layers of about 9 kernels. Its tokens of a first chunk: CosyVoice2 25 and 3
    ahead, Spark-TTS 50 (a second). What comes after the LLM is left out: its shapes are not published with the times.
    """
    estimator = Estimator("l20", "1.5b", PLAIN, draws)
    step = Work(bytes=494e6 * 2, operations=2 * 494e6, activation_bytes=0.0, launches=24 * 9)
    found = []
    for name, given_ms, tokens in (("CosyVoice2, L20", 220.0, 28), ("Spark-TTS, L20", 210.0, 50)):
        timed = lambda times, tokens=tokens: tokens * times.device_ms(wire.LLM, step)  # noqa: E731
        compared = estimator.compare(name, given_ms, timed)
        found.append((name, given_ms, compared.low_ms, f"{tokens} tokens; likely {compared.likely_ms:.0f} ms"))
    return found


# Measured on an H100


def of_the_profile(draws: int) -> dict[str, list[Compared]]:
    """Every point of the measured profile by stage; its kernels were those of "plain"."""
    profile = read_profile(H100 / "nvidia-h100-80gb-hbm3-1.5b.json")
    return points_of(profile, Estimator("h100", "1.5b", PLAIN, draws))


def cross_card_errors(draws: int, files: Sequence[Path] | None = None) -> list[float]:
    """Relative errors of every point of each measured profile, predicted from each profile of another card."""
    files = sorted(ROOT.glob("results/gpu/*/*-1.5b.json")) if files is None else files
    profiles, costs = [read_profile(file) for file in files], costs_of("1.5b")
    errors = []
    for target, source in itertools.permutations(profiles, 2):
        card = card_of(target.device)
        if card_of(source.device) != card:
            assumed = assumptions_for(card, costs, wire.STAGED, source)
            points = points_of(target, Estimator(card.key, "1.5b", counts_of(target), draws, assumed))
            errors += [abs(row.ratio - 1) for rows in points.values() for row in rows]
    return errors


def counts_of(profile: Profile) -> str:
    """Which kernels a profile was measured with, by the launches of an LLM step."""
    launches = profile.timed(wire.LLM)[0].launches or 0
    steps = costs_of("1.5b").steps
    return min((PLAIN, wire.STAGED), key=lambda name: abs(steps[name][wire.LLM].launches - launches))


def points_of(profile: Profile, estimator: Estimator) -> dict[str, list[Compared]]:
    """Every measured point by stage, against the estimate."""
    return {
        stage: [estimator.compare(_where(p), p.ms, _timed(stage, p)) for p in points if isinstance(p, StagePoint)]
        for stage, points in profile.stages.items()
    }


def _where(point: StagePoint) -> str:
    known = {name: getattr(point, name) for name in ("batch", "tokens", "seconds", "context", "steps")}
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def _timed(stage: str, point: StagePoint) -> Estimated:
    by_stage: dict[str, Estimated] = {
        wire.LLM: lambda times: times.step(point.at("batch"), point.at("context")).ms,
        PREFILL: lambda times: times.prefill(point.at("tokens"), point.at("context")).ms,
        wire.DIFFUSION: lambda times: times.denoise(point.at("batch"), point.at("steps")).ms,
        wire.VOCODER: lambda times: times.vocode(point.at("batch")).ms,
        wire.VOICE: lambda times: times.encode(point.at("seconds")).ms,
    }
    return by_stage[stage]


def of_the_engine(draws: int, from_profile: bool = False) -> list[Compared]:
    """Steps of the fused engine; ``context`` of the files is of one branch."""
    card, costs = card_of("h100"), costs_of("1.5b")
    measured = read_profile(H100 / "nvidia-h100-80gb-hbm3-1.5b.json") if from_profile else None
    assumed = assumptions_for(card, costs, wire.FUSED, measured)
    estimator = Estimator("h100", "1.5b", wire.FUSED, draws, assumed)
    found = []
    for file in ("step.json", "step-first.json"):
        for step in json.loads((H100 / "fused" / file).read_text())["steps"]:
            batch, context = step["sessions"], 2 * step["context"]
            timed = lambda times, b=batch, c=context: times.frame_ms(b, c)  # noqa: E731
            found.append(estimator.compare(f"{file}: {batch} sessions at {context}", step["step_ms"], timed))
    return found


def of_staged_streams(draws: int) -> list[Compared]:
    """The median stream's frame time through Triton, all stages on one GPU."""
    estimator = Estimator("h100", "1.5b", PLAIN, draws, assumptions_for(card_of("h100"), costs_of("1.5b"), wire.STAGED))

    def timed_at(streams: int) -> Estimated:
        def timed(times: CardTimes) -> np.ndarray:
            values = times.assumptions.common_values(times.draw)
            split = 1 + (values[SPLIT] - 1) * (1 - 1 / streams)
            return times.frame_ms(streams, 500) * split + len(wire.STAGES) * values[HOP]

        return timed

    loads = json.loads((H100 / "streams.json").read_text())["loads"]
    return [
        estimator.compare(f"{load['streams']} streams", load["frame_ms_p50"], timed_at(load["streams"]))
        for load in loads
    ]


# Tables


def table(title: str, rows: Sequence[Compared]) -> Table:
    made = common.table(title, "what", "given", "estimate", "interval", "given / estimate", "inside", "source")
    for row in rows:
        made.add_row(
            row.what, f"{row.given_ms:.3g}", f"{row.likely_ms:.3g}", f"{row.low_ms:.3g} to {row.high_ms:.3g}",
            f"{row.ratio:.2f}", "yes" if row.inside else "no", row.source,
        )  # fmt: skip
    return made


def bounds_table(rows: Sequence[tuple[str, float, float, str]]) -> Table:
    made = common.table("First audio of other models, ms", "what", "published", "LLM alone, at least", "holds", "of")
    for name, given_ms, low_ms, of in rows:
        made.add_row(name, f"{given_ms:.3g}", f"{low_ms:.3g}", "yes" if low_ms < given_ms else "no", of)
    return made


def stage_table(stages: dict[str, list[Compared]]) -> Table:
    made = common.table("The staged stages on an H100 (measured profile), against the estimate", "stage", "points",
                        "inside", "measured / estimate", "from", "to")  # fmt: skip
    for stage, rows in stages.items():
        ratios = sorted(row.ratio for row in rows)
        cells = statistics.median(ratios), ratios[0], ratios[-1]
        inside = sum(row.inside for row in rows)
        made.add_row(stage, str(len(rows)), str(inside), *(f"{each:.2f}" for each in cells))
    return made


if __name__ == "__main__":
    common.run(main)
