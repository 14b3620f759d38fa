"""The fused engine's step on a device, without Triton: milliseconds per step, its floor, prompts, recording, memory.

step ms     pipelined as in the engine: inputs to the device, one graph, results back, the next launched before
device ms   the graph alone, replayed back to back
floor ms    the lower bound for its bytes and operations at this device's measured speed
kernels     of one step (torch.profiler), with those that take longest

Every finding is written to OUT/fused.json at once. Needs only torch and transformers. On a CPU nothing is recorded and
the kernels run in Triton's interpreter if enabled (TRITON_INTERPRET=1): that only shows that the script works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from harness import wire
from harness.vibevoice.engine.frame_step import EagerStep, Opening, PromptPart, Row
from harness.vibevoice.process.setup import prepare
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.stages.presets import Weights

TOP_KERNELS = 12


def main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    device = torch.device(given.device)
    prepare(device)
    given.out.mkdir(parents=True, exist_ok=True)
    from harness.vibevoice.engine.graph_step import GraphStep

    began = time.perf_counter()
    weights = Weights(given.preset, device=given.device, plain=given.plain, graph_batch=given.graphs)
    if given.plain and given.graphs:
        weights.graph_batch = given.graphs
    found: dict = {"preset": given.preset, "device": _name(device), "dtype": str(weights.dtype), "plain": given.plain}
    before = _allocated(device)
    step = GraphStep(weights, 1 << 36, 2 * max(given.sessions))
    settle(device)
    found |= {"ready_s": time.perf_counter() - began, "memory_gib": (_allocated(device) - before) / 2**30}
    found["reserved_gib"] = torch.cuda.memory_reserved(device) / 2**30 if device.type == "cuda" else 0.0
    speed = device_speed(device, weights.dtype) if device.type == "cuda" else (10.0, 0.05)
    roofline = Roofline(weights.config, weights.dtype.itemsize)
    found |= {"bandwidth_gb_s": speed[0], "tflop_s": speed[1], "steps": [], "prompts": []}
    print(f"ready after {found['ready_s']:.1f} s, {found['reserved_gib']:.1f} GiB reserved", flush=True)
    for context in given.contexts:
        for sessions in given.sessions:
            found["steps"].append(measured(step, sessions, context, given.steps, roofline, speed))
            write(given.out, found)
    for tokens in given.prompts:
        found["prompts"].append(read(step, tokens, given.steps))
        write(given.out, found)
    if given.profile and device.type == "cuda":
        found["kernels"] = {str(n): kernels(step, n, given.contexts[0]) for n in given.profile}
        write(given.out, found)
    if given.check:
        del step
        found["checks"] = [check(preset, dtype, given.device) for preset, dtype in given.check]
        write(given.out, found)
    print(json.dumps({name: value for name, value in found.items() if name != "kernels"}))
    return 0


def parser() -> argparse.ArgumentParser:
    whole = lambda text: [int(each) for each in text.split(",") if each]  # noqa: E731
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example:\n  python benchmarks/gpu/fused.py --preset 1.5b --device cuda --out results/gpu/here",
    )  # fmt: skip
    made.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b or a .json file of sizes")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    made.add_argument("--out", type=Path, default=Path("results/gpu/here"), help="a folder for the findings")
    made.add_argument("--sessions", type=whole, default=[1, 16, 64, 128], help="batches")
    made.add_argument("--contexts", type=whole, default=[400, 7600], help="positions that a session has behind it")
    made.add_argument("--steps", type=int, default=40, help="steps in a measurement")
    made.add_argument("--prompts", type=whole, default=[32, 256], help="tokens of prompts, read at once")
    made.add_argument("--profile", type=whole, default=[1, 64], help="batches whose kernels are listed")
    pairs = lambda text: [tuple(each.split(":")) for each in text.split(",") if each]  # noqa: E731
    made.add_argument(
        "--check", type=pairs, default=[("tiny", "float32")], help="preset:dtype, … to compare with the staged stages"
    )
    made.add_argument("--graphs", type=int, default=None, help="the largest batch that is recorded")
    made.add_argument("--plain", action="store_true", help="torch's own operations in place of the fused kernels")
    return made


def measured(step, sessions: int, context: int, steps: int, roofline: Roofline, speed: tuple[float, float]) -> dict:
    """One batch: its pipelined step, its graph alone, and its floor."""
    rows = opened(step, sessions, context, 3 * steps + 20)
    try:
        pipelined(step, rows, 5)
        began = time.perf_counter()
        pipelined(step, rows, steps)
        step_ms = 1e3 * (time.perf_counter() - began) / steps
        host_ms = 1e3 * launching(step, rows, steps)
        device_ms = replayed(step, sessions, context)
    finally:
        for row in rows:
            step.close(row.session)
    both = 2 * (context + steps)  # positions of both branches, in the middle of the measurement
    cost = roofline.step(sessions, both) + roofline.denoise(sessions, wire.DEFAULT_DIFFUSION_STEPS)
    cost += roofline.vocode(sessions, step.states.shape[1])
    line = {
        "sessions": sessions, "context": context, "step_ms": step_ms, "host_ms": host_ms, "device_ms": device_ms,
        "floor_ms": cost.floor_ms(*speed), "frames_per_s": 1e3 * sessions / step_ms,
    }  # fmt: skip
    shown = ", ".join(
        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in line.items()
    )
    print(shown, flush=True)
    return line


def opened(step, sessions: int, context: int, frames: int) -> list[Row]:
    """Sessions with this many filled (not computed) positions, ready to speak."""
    draw = np.random.default_rng(0)
    rows = []
    for number in range(1, sessions + 1):
        step.open(number, Opening(1, context + frames, context))
        step.read([PromptPart(number, [1], np.empty((0, wire.LATENT_SIZE), np.float32))])
        noise = draw.standard_normal(wire.LATENT_SIZE, np.float32)
        rows.append(Row(number, noise, wire.DEFAULT_GUIDANCE_SCALE, wire.DEFAULT_DIFFUSION_STEPS))
    return rows


def pipelined(step, rows: list[Row], steps: int) -> None:
    """As in the engine: the values of a step are read while the next one runs."""
    behind = None
    for _ in range(steps):
        launched = step.launch(rows)
        if behind:
            behind.values()
        behind = launched
    behind.values()


def launching(step, rows: list[Row], steps: int) -> float:
    """CPU seconds of this thread for a launch and for reading its values, without waiting for the device."""
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        launched = step.launch(rows)
        launch_s = time.perf_counter() - began
        settle(step.device)
        began = time.perf_counter()
        launched.values()
        taken.append(launch_s + time.perf_counter() - began)
    return float(np.median(taken))


def replayed(step, sessions: int, context: int, replays: int = 20) -> float | None:
    """Milliseconds of the graph alone; None where there is none."""
    graph = step.graphs.step(sessions, context // 512 + 1)
    if graph is None:
        return None
    return timed(graph.recorded.graph.replay, replays)


def timed(call: Callable, times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def read(step, tokens: int, times: int) -> dict:
    """Milliseconds of reading prompts of this many tokens, one session each time."""
    taken = []
    for number in range(1, times + 1):
        step.open(number, Opening(tokens, 1))
        settle(step.device)
        began = time.perf_counter()
        step.read([PromptPart(number, [1] * tokens, np.empty((0, wire.LATENT_SIZE), np.float32))])
        settle(step.device)
        taken.append(1e3 * (time.perf_counter() - began))
        step.close(number)
    line = {"tokens": tokens, "ms": float(np.median(taken))}
    print(f"prompt of {tokens} tokens: {line['ms']:.2f} ms", flush=True)
    return line


def check(preset: str, dtype: str, device: str, frames: int = 8, sessions: int = 8) -> dict:
    """How far sessions that join and leave are from the staged stages, as a share of the loudest sample.

    The stages compute one session after another with torch's own operations, in float32.
    """
    from harness.vibevoice.engine.graph_step import GraphStep

    plain = EagerStep(Weights(preset, device=device, plain=True, dtype="float32"), 1 << 34, 256)
    step = GraphStep(Weights(preset, device=device, dtype=dtype), 1 << 34, 16)
    draw = np.random.default_rng(1)
    ids = {n: draw.integers(0, 4000, 5 + 37 * n).astype(np.int32) for n in range(1, sessions + 1)}
    noise = {n: draw.standard_normal((frames, wire.LATENT_SIZE), np.float32) for n in ids}
    none = np.empty((0, wire.LATENT_SIZE), np.float32)
    row = lambda n, i: Row(n, noise[n][i], wire.DEFAULT_GUIDANCE_SCALE, 10 if n % 4 else 4)  # noqa: E731
    expected, found = {}, {n: [] for n in ids}
    for n, own in ids.items():
        plain.open(n, Opening(len(own), frames))
        plain.read([PromptPart(n, own, none)])
        expected[n] = np.concatenate([plain.launch([row(n, i)]).values()[0] for i in range(frames)])
        plain.close(n)
    waiting, speaking = list(ids), []
    while waiting or speaking:
        if waiting:
            n = waiting.pop(0)
            step.open(n, Opening(len(ids[n]), frames))
            for start in range(0, len(ids[n]), 64):
                step.read([PromptPart(n, ids[n][start : start + 64], none)])
            speaking.append(n)
        audio = step.launch([row(n, len(found[n])) for n in speaking]).values()[0]
        for n, one in zip(list(speaking), audio, strict=True):
            found[n].append(one)
            if len(found[n]) == frames:
                speaking.remove(n)
                step.close(n)
    loudest = max(float(np.abs(each).max()) for each in expected.values())
    gaps = [float(np.abs(np.array(found[n]) - expected[n]).max()) / loudest for n in ids]
    rms = [float(np.sqrt(np.mean((np.array(found[n]) - expected[n]) ** 2) / np.mean(expected[n] ** 2))) for n in ids]
    line = {"preset": preset, "dtype": dtype, "loudest": loudest, "max_share": max(gaps), "rms_share": max(rms)}
    print(line, flush=True)
    return line


def kernels(step, sessions: int, context: int) -> dict:
    """The kernels of one step, by the time that they take."""
    rows = opened(step, sessions, context, 10)
    pipelined(step, rows, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step.launch(rows).values()
    for row in rows:
        step.close(row.session)
    each = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    each.sort(key=lambda event: -event.self_device_time_total)
    top = [{"name": e.key[:90], "count": e.count, "us": e.self_device_time_total} for e in each[:TOP_KERNELS]]
    total = sum(e.self_device_time_total for e in each)
    print(f"{sessions} sessions: {sum(e.count for e in each)} kernels, {total / 1e3:.2f} ms busy", flush=True)
    for one in top:
        print(f"   {one['us']:9.1f} us {one['count']:5} {one['name']}", flush=True)
    return {"count": sum(e.count for e in each), "busy_ms": total / 1e3, "top": top}


def device_speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """GB/s of a copy, read and write, and TFLOP/s of a large matrix product."""
    source, square = torch.empty(1 << 30, dtype=torch.uint8, device=device), torch.randn(8192, 8192, device=device)
    target, square = torch.empty_like(source), square.to(dtype)
    copy_ms = min(timed(lambda: target.copy_(source), 5) for _ in range(3))
    product_ms = min(timed(lambda: square @ square, 5) for _ in range(3))
    return 2 * source.numel() / copy_ms / 1e6, 2 * 8192**3 / product_ms / 1e9


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write(folder: Path, found: dict) -> None:
    draft = folder / "fused.draft"
    draft.write_text(json.dumps(found, indent=1))
    draft.replace(folder / "fused.json")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main(sys.argv[1:]))
