"""How much reading a long prompt delays streams: short streams, one of 90 minutes, and a script of hours to read.

Runs the fused topology on the real Triton. With the model's default, streams pause while their listeners have buffered
audio; --in-hand-seconds 1e9 prevents that. Gaps between the frames of every stream, before the long script arrives and
while it is read, in units of the median gap before it:

p99, longest    of all streams' gaps
first audio     seconds from the long script's request to its first frame
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np

from harness import wire
from harness.client.stream import SpeechClient
from harness.records.schema import Result

WORDS = "the quick brown fox jumps over a lazy dog while five wizards pack my box".split()
SETTLE_S, LEAD_S = 1.0, 4.0  # after the last stream's first frame; before the long script arrives
LIMIT = 1.5  # steps: limit of the median gap while a prompt is read, which should take half a step


@dataclass(frozen=True)
class Window:
    """Gaps of all streams in a time window."""

    gaps_ms: np.ndarray

    @classmethod
    def of(cls, results: Sequence[Result], from_ns: int, to_ns: int) -> Window:
        received = [result.chunks.received_ns for result in results]
        inside = [times[(times >= from_ns) & (times <= to_ns)] for times in received]
        return cls(np.concatenate([np.diff(times) for times in inside]) / 1e6)


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    if options.quick:
        options.streams, options.tokens = 4, 600
    parameters = {} if options.in_hand_seconds is None else {f"{wire.ENTRY}.in_hand_seconds": options.in_hand_seconds}
    with common.served(options.preset, topology=wire.FUSED, parameters=parameters) as server:
        streams, long, came_ns = asyncio.run(speak(server.url, options))
    if long.error or not len(long.chunks.received_ns):
        raise common.HarnessError(f"the long script was not spoken: {long.error}")
    first_ns = int(long.chunks.received_ns[0])
    before = Window.of(streams, came_ns - round(1e9 * (LEAD_S - SETTLE_S)), came_ns)
    during = Window.of(streams, came_ns, first_ns)
    step_ms = float(np.median(before.gaps_ms))
    figures: dict = {"streams": len(streams), "prompt_tokens": options.tokens, "step_ms": step_ms}
    shown = common.table(f"Gaps of {len(streams)} streams", "", "gaps", "median", "p99", "longest")
    for name, window in (("before", before), ("while it is read", during)):
        ratios = {key: float(value / step_ms) for key, value in measures(window).items()}
        shown.add_row(name, str(len(window.gaps_ms)), *(f"{value:.2f}" for value in ratios.values()))
        figures |= {f"{key}_{name.partition(' ')[0]}": value for key, value in ratios.items()}
    figures |= {
        "first_audio_s": (first_ns - came_ns) / 1e9,
        "gap_ratio_p99": figures["p99_while"] / figures["p99_before"],
    }
    shown.caption = (
        f"in steps of {step_ms:.1f} ms; first audio of the long script after {figures['first_audio_s']:.1f} s"
    )
    common.finish(shown, figures)
    strict = not options.quick and options.in_hand_seconds == 1e9
    return common.EXIT_FAILED if strict and figures["median_while"] > LIMIT else 0


def measures(window: Window) -> dict[str, float]:
    gaps = window.gaps_ms
    if not len(gaps):
        raise common.HarnessError("no stream spoke two frames in that time: give more --tokens")
    return {"median": float(np.median(gaps)), "p99": float(np.percentile(gaps, 99)), "longest": float(gaps.max())}


def parser() -> common.Parser:
    made = common.Parser(
        __doc__, "python benchmarks/model/fairness.py --streams 60 --tokens 25000 --in-hand-seconds 1e9"
    )
    made.add_argument("--preset", default="tiny", help="tiny, or a .json file of sizes (default: tiny)")
    made.add_argument(
        "--in-hand-seconds", type=common.real(0, 1e9),
        help="seconds of buffered audio above which prompts may take more than half a step (default: the model's)",
    )  # fmt: skip
    made.add_argument("--streams", type=common.whole(1, 200), default=60, help="short ones (60)")
    made.add_argument(
        "--tokens", type=common.whole(100, 60_000), default=25_000, help="approximate tokens of the long script (25000)"
    )
    return made


async def speak(url: str, options) -> tuple[list[Result], Result, int]:
    """The results of the streams and of the long script, and when the script was requested."""
    async with SpeechClient(url) as client:
        requests = [common.request(f"short-{number}", wire.MAX_FRAMES // 4) for number in range(options.streams)]
        requests.append(common.request("90 minutes", wire.MAX_FRAMES // 2, start_frame=wire.MAX_FRAMES // 2))
        calls = [client.open(request, "closed") for request in requests]
        running = [asyncio.ensure_future(call.run()) for call in calls]
        await asyncio.sleep(SETTLE_S + LEAD_S if not options.quick else 1.0)
        came_ns = time.monotonic_ns()
        long = await client.speak(common.request("long", 4, script=script(options.tokens)), "closed")
        for call in calls:
            call.stop(common.Outcome.CANCELLED)
        return list(await asyncio.gather(*running)), long, came_ns


def script(tokens: int) -> str:
    draw = np.random.default_rng(0)
    return "Speaker 1: " + " ".join(draw.choice(WORDS, size=round(tokens / 1.4)))


if __name__ == "__main__":
    common.run(main)
