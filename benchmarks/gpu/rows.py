"""Time of an LLM step and of a frame's denoising, with torch's operations between matrix products and with kernels.

plain, fused  ms of one replay of the step as a CUDA graph, the median; the two alternate
kernels       of one step, by torch.profiler
difference    of the kernels' result from that of torch's operations: norm of the difference / norm of the result

The LLM step covers both branches of each session at half the context each; the denoising takes all its steps. Without
a GPU the same calls run in Triton's interpreter, untimed, to show that they work. Exit code 1 if results differ by more
than rounding. Needs torch, transformers and triton.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, as transformers does

import device as measures  # noqa: E402

from harness import wire  # noqa: E402
from harness.errors import HarnessError, InputError  # noqa: E402
from harness.vibevoice.kernels import fused_rows, plain_rows, ragged  # noqa: E402
from harness.vibevoice.process.setup import prepare  # noqa: E402
from harness.vibevoice.profiling.device_time import recorded  # noqa: E402
from harness.vibevoice.profiling.profiler import free, settle  # noqa: E402
from harness.vibevoice.stages.diffusion import DiffusionStage  # noqa: E402
from harness.vibevoice.stages.llm import LLMStage  # noqa: E402
from harness.vibevoice.stages.presets import Weights  # noqa: E402

ROWS = {"plain": plain_rows, "fused": fused_rows}
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}

Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Compared:
    """One step both ways; times in ms, None without a GPU."""

    step: str
    sessions: int
    plain_ms: float | None
    fused_ms: float | None
    plain_kernels: int | None
    fused_kernels: int | None
    difference: float


def compared(step: str, sessions: int, network, call: Call, repeats: int) -> Compared:
    """``network``: what has ``rows``; ``call``: the step, whose first output is compared."""
    answers, kernels, graphs = {}, {}, {}
    for name, rows in ROWS.items():
        network.rows = rows
        answers[name] = call()[0].double()
        if ON_GPU:
            kernels[name] = sum(activity.kernel for activity in recorded(call))
            graphs[name] = measures.captured(call)
    ms = replayed(graphs, repeats) if ON_GPU else {}
    difference = float((answers["fused"] - answers["plain"]).norm() / answers["plain"].norm())
    times, counts = ([each.get(name) for name in ROWS] for each in (ms, kernels))
    return Compared(step, sessions, *times, *counts, difference)


def replayed(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, float]:
    """Median ms of a replay of each, alternating."""
    event = lambda: torch.cuda.Event(enable_timing=True)  # noqa: E731
    spans = {name: [(event(), event()) for _ in range(repeats)] for name in graphs}
    for turn in range(repeats):
        for name, graph in graphs.items():
            begun, done = spans[name][turn]
            begun.record()
            graph.replay()
            done.record()
    torch.cuda.synchronize()
    return {name: float(np.median([begun.elapsed_time(done) for begun, done in own])) for name, own in spans.items()}


def llm_call(stage: LLMStage, sessions: int, context: int) -> Call:
    """A step as recorded in a graph, over caches with random contents."""
    like, length = {"device": stage.device, "dtype": stage.dtype}, context // 2
    layers, two, heads, size = stage._kv_shape
    caches = [torch.randn(layers, two, heads, length + 1, size, **like) for _ in range(2 * sessions)]
    lengths = [length] * len(caches)
    facts = torch.tensor(ragged.facts_of(caches, lengths), device=stage.device).view(sessions, 2, 3)
    latent, semantic = (torch.randn(sessions, n, device=stage.device) for n in (wire.LATENT_SIZE, wire.SEMANTIC_SIZE))
    ids = torch.full((sessions,), -1, device=stage.device)

    def call():
        assert caches  # keeps them alive: the kernels have only their addresses
        return stage.compute(latent, semantic, ids, facts, ragged.parts_of(lengths))

    return call


def denoising_call(stage: DiffusionStage, sessions: int) -> Call:
    inputs = [torch.randn(sessions, *each.sizes, device=stage.device) for each in stage.graph_inputs()]
    return lambda: stage._graphed(*inputs, wire.DEFAULT_DIFFUSION_STEPS)


@torch.inference_mode()
def measured(weights: Weights, asked: argparse.Namespace) -> list[Compared]:
    found, llm = [], LLMStage(weights)
    for sessions in asked.batches:
        call = llm_call(llm, sessions, asked.context)
        found.append(compared("LLM", sessions, llm.backbone, call, asked.repeats))
        call = None
        free(weights.device)
    llm, head = None, DiffusionStage(weights)
    for sessions in asked.batches:
        found.append(compared("denoising", sessions, head.head, denoising_call(head, sessions), asked.repeats))
        free(weights.device)
    return found


def table(found: Sequence[Compared]) -> str:
    head = "step", "N", "plain ms", "fused ms", "plain kernels", "fused kernels", "difference"
    rows = ((*list(asdict(each).values())[:-1], f"{each.difference:.1e}") for each in found)
    return "\n".join(measures._lines(head, (["-" if value is None else value for value in row] for row in rows)))


def parser() -> measures.Parser:
    made = measures.Parser(
        description=__doc__,
        epilog="Example:\n  python benchmarks/gpu/rows.py --preset 1.5b --batches 1,16,64,128",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--quick", action="store_true", help="a short run to check that it works; its figures mean nothing"
    )
    made.add_argument(
        "--preset", default="1.5b" if ON_GPU else "tiny", help="default: 1.5b on a GPU, else tiny, which is interpreted"
    )
    made.add_argument("--dtype", default="auto", help="default: bfloat16 on a GPU, else float32")
    made.add_argument("--batches", type=measures._numbers, default=[1, 16, 64, 128], help="default: 1,16,64,128")
    made.add_argument("--context", type=int, default=400, help="positions of both branches (default: 400)")
    made.add_argument("--repeats", type=int, default=50, help="replays of each graph (default: 50)")
    return made


def main(arguments: Sequence[str]) -> int:
    asked = parser().parse_args(arguments)
    if asked.context < 2 or asked.repeats < 1 or min(asked.batches) < 1:
        raise InputError("--context takes 2 or more, --repeats and --batches 1 or more")
    if asked.quick:
        asked.batches, asked.context, asked.repeats = [1, 2], 100, 3
    prepare()
    # Plain: no graphs are recorded but those that are timed.
    weights = Weights(asked.preset, device="cuda" if ON_GPU else "cpu", plain=True, dtype=asked.dtype)
    settle()
    found = measured(weights, asked)
    where = torch.cuda.get_device_name() if ON_GPU else "cpu, interpreted"
    dtype = str(weights.dtype).removeprefix("torch.")
    print(f"Row-wise kernels on {where}, preset {asked.preset}, {dtype}")
    print(table(found))
    facts = {"device": where, "preset": asked.preset, "dtype": dtype, "context": asked.context}
    content = measures._plain(facts | {"steps": [asdict(each) for each in found]})
    print(json.dumps(content, allow_nan=False), flush=True)
    right = all(each.difference <= MOST_DIFFERENCE[weights.dtype] for each in found)  # not so for what is no number
    return 0 if right else measures.EXIT_FAILED


def run() -> int:
    try:
        return main(sys.argv[1:])
    except HarnessError as error:
        print(error, file=sys.stderr)
        return measures.EXIT_MISTAKE if isinstance(error, InputError) else measures.EXIT_FAILED
    except KeyboardInterrupt:
        return measures.EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
