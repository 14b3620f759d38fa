"""What a device does in a step of each stage: kernels, busy time, and the time of a CUDA graph of its parts.

steps   each stage's step as the harness runs it: wall time, device time (torch.profiler), kernels and copies,
        the kernels that take longest, and the torch operators behind them
graphs  parts of a step with fixed shapes, as they are ("eager") and as replays of a CUDA graph; if a part
        cannot be captured, the error's text
speed   copy bandwidth (read + write) and matrix products in the stages' dtype

Every finding is written to OUT/device.json at once. On a CPU the same steps run, without kernels and replays: wall
times and operators, labelled "cpu". Needs only torch and transformers, no Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import wire
from harness.errors import HarnessError, InputError
from harness.host.places import preset_name
from harness.vibevoice.process.setup import prepare
from harness.vibevoice.profiling.device_time import DeviceTimer, recorded
from harness.vibevoice.profiling.profiler import (
    LEAST_SECONDS,
    SPEED_POINTS,
    TIMED_SHARE,
    DiffusionBench,
    LLMBench,
    VocoderBench,
    chosen_device,
    device_speed,
    free,
    settle,
    synchronise,
)
from harness.vibevoice.profiling.roofline import Roofline
from harness.vibevoice.profiling.sampling import Sampler
from harness.vibevoice.stages.presets import Weights

EXIT_FAILED, EXIT_MISTAKE, EXIT_INTERRUPTED = 1, 64, 130
TOP_KERNELS = 8
BUDGET_S = {"cuda": 40.0, "cpu": 15.0}
WARM_UPS = 3  # before a capture, as torch requires

Call = Callable[[], object]


class Findings:
    """The findings so far, in a file that is always complete; ``file`` None: no file."""

    def __init__(self, file: Path | None, **facts):
        self.file = file
        self.content = {
            "schema": 1,
            "made_by": "benchmarks/gpu/device.py",
            **facts,
            "steps": [],
            "graphs": [],
            "errors": [],
        }
        self._write()

    def set(self, **facts) -> None:
        self.content |= _plain(facts)
        self._write()

    def add(self, kind: str, **finding) -> None:
        """One more of the ``steps``, ``graphs`` or ``errors``."""
        self.content[kind].append(_plain(finding))
        self._write()
        print(
            " ".join(f"{name} {_short(value)}" for name, value in _plain(finding).items()), file=sys.stderr, flush=True
        )

    def _write(self) -> None:
        if self.file is None:
            return
        beside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n")
            os.replace(beside, self.file)
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error.strerror}; give another --out") from error


class OperatorCount(TorchDispatchMode):
    """Counts the torch operators that reach the device's library, by name."""

    def __init__(self):
        super().__init__()
        self.names: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operators_of(call: Call) -> int:
    """Torch operators in one call: with views, without Triton kernels. On a CPU each row's attention is one more."""
    with OperatorCount() as count:
        call()
    return sum(count.names.values())


def top_kernels(call: Call) -> list[dict]:
    """The kernels and copies of one call that take longest, by name."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for activity in recorded(call):
        one = sums[activity.name[:120]]
        one[0] += 1
        one[1] += activity.end_us - activity.start_us
    most = sorted(sums.items(), key=lambda item: -item[1][1])[:TOP_KERNELS]
    return [{"name": name, "count": count, "us": us} for name, (count, us) in most]


class Device:
    """Measures the stages of one model on one device, part by part; a failure of one part does not affect others."""

    def __init__(self, weights: Weights, asked: argparse.Namespace, findings: Findings):
        self.weights, self.asked, self.findings = weights, asked, findings
        self.on_gpu = weights.device.type == "cuda"
        self.timer, self.wait = DeviceTimer.of(weights.device), synchronise(weights.device)
        self.roofline = Roofline(weights.config, weights.dtype.itemsize)
        budget_s = asked.budget_seconds or BUDGET_S[weights.device.type]
        points = points_of(asked, self.on_gpu)
        self.sampler = Sampler(budget_s, points, self.wait, TIMED_SHARE if self.on_gpu else 1.0)

    def run(self) -> None:
        with self.guarded("speed"):
            speed, _ = device_speed(self.weights, self.sampler)
            self.findings.set(speed=speed)
        for bench_type, measure in (
            (LLMBench, self.llm),
            (DiffusionBench, self.diffusion),
            (VocoderBench, self.vocoder),
        ):
            with self.guarded(bench_type.__name__):
                measure(bench_type(self.weights, self.roofline))
            free(self.weights.device)

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Record the error of a failing part as a finding, and go on."""
        try:
            yield
        except Exception as error:
            self.findings.add("errors", where=what, error=_words(error))

    def llm(self, bench: LLMBench) -> None:
        places = [{"batch": b, "context": c} for b in self.asked.batches for c in self.asked.contexts]
        for at in places:
            self.step(wire.LLM, bench.step, at)
        for at in places:
            self.part("LLM backbone at fixed lengths", at, lambda at=at: backbone_call(bench.stage, **at), bench.stage)

    def diffusion(self, bench: DiffusionBench) -> None:
        for batch in self.asked.batches:
            self.step(wire.DIFFUSION, bench.denoise, {"batch": batch, "steps": self.asked.steps})
        for batch in self.asked.batches:
            at = {"batch": batch, "steps": self.asked.steps}
            self.part("denoising", at, lambda at=at: denoising_call(bench.stage, bench.hidden, **at))

    def vocoder(self, bench: VocoderBench) -> None:
        for batch in self.asked.batches:
            self.step(wire.VOCODER, bench.vocode, {"batch": batch})
        for batch in self.asked.batches:
            self.part("vocoder towers", {"batch": batch}, lambda batch=batch: towers_call(bench.stage, batch))

    def step(self, stage: str, method: Callable, at: dict) -> None:
        """A stage's step as the harness runs it, including copies to and from the device."""
        with self.guarded(f"{stage} {at}"):
            calls, cost = method(**at)
            calls = iter(calls)
            ms = float(np.median(self.sampler.sample(calls, needed=True)))
            seconds = max(self.sampler.seconds_beside(), LEAST_SECONDS)
            found = {"ms": ms, **self.timer.split(calls, ms, seconds)}
            found["operators"] = operators_of(next(calls))
            if found["device_ms_from"] == "profiler":
                found["kernels"] = top_kernels(next(calls))
            self.findings.add("steps", stage=stage, **at, **found, bytes=int(cost.bytes), gflop=cost.operations / 1e9)
            calls = None  # closes the sessions that the step opened
        free(self.weights.device)

    def part(self, part: str, at: dict, build: Callable[[], Call], stage=None) -> None:
        """A part of a step on tensors at fixed addresses: as it is, and as a graph."""
        found = {}
        with self.guarded(f"{part} {at}"), torch.inference_mode():
            try:
                call = build()
                found["eager_ms"] = self.median_ms(call)
                found |= self.replayed(call) if self.on_gpu else {"error": "a CPU has no CUDA graphs"}
                found["operators"] = operators_of(call)
            finally:
                for session in range(at["batch"] if stage is not None else 0):
                    stage.close(session)
        if found:
            self.findings.add("graphs", part=part, **at, **found)
        call = None
        free(self.weights.device)

    def replayed(self, call: Call) -> dict:
        """``replay_ms``, or the ``error`` that prevents it."""
        try:
            return {"replay_ms": self.median_ms(captured(call).replay)}
        except Exception as error:  # of the capture: this is the finding
            return {"error": _words(error)}

    def median_ms(self, call: Call) -> float:
        return float(np.median(self.sampler.sample(itertools.repeat(call), needed=True)))


def points_of(asked: argparse.Namespace, on_gpu: bool) -> int:
    """Number of timed calls: of the speed, of each step, and of each part (on a GPU also as a replay)."""
    places = len(asked.batches) * (len(asked.contexts) + 2)  # the LLM's have contexts; diffusion and vocoder none
    return SPEED_POINTS + places * (3 if on_gpu else 2)


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A call as a CUDA graph, after warming up on a side stream. Raises what the capture raises."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def backbone_call(stage, batch: int, context: int) -> Call:
    """The backbone over both branches of sessions that stay at their lengths, all on the device."""
    for session in range(batch):
        spoken = context // 2
        stage.open(session, 1, spoken + 2, spoken)
        stage.prefill(session, torch.zeros(1, dtype=torch.long), torch.empty(0, wire.LATENT_SIZE))
    sessions = [stage.sessions.get(session) for session in range(batch)]
    branches = [s.with_prompt for s in sessions] + [s.without_prompt for s in sessions]
    like = {"device": stage.device, "dtype": stage.dtype}
    embeds = torch.randn(2 * batch, stage.hidden_size, **like)
    positions = torch.tensor([branch.length for branch in branches], device=stage.device)
    kv = stage._step_kv(branches)
    return lambda: stage.backbone(embeds, positions, kv)


def denoising_call(stage, hidden: int, batch: int, steps: int) -> Call:
    """All denoising steps of a frame on the device; the solver's noise and guidance are float32 in every dtype."""
    condition = torch.randn(2 * batch, hidden, device=stage.device, dtype=stage.dtype)
    noise = torch.randn(batch, wire.LATENT_SIZE, device=stage.device)
    guidance = torch.full((batch, 1), wire.DEFAULT_GUIDANCE_SCALE, device=stage.device)
    return lambda: stage.compute(condition, noise, guidance, steps)


def towers_call(stage, batch: int) -> Call:
    """Decoder and semantic encoder over one frame of each session, latents and states on the device."""
    like = {"device": stage.device, "dtype": stage.dtype}
    latent = torch.randn(wire.LATENT_SIZE, 1, batch, **like)
    before, after = (torch.zeros(size, batch, **like) for size in stage.sizes)
    return lambda: stage.encoder(stage.decoder(latent, before)[0], after)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _plain(value):
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value


def _short(value) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else str(value)


# What is shown


def tables(content: Mapping) -> str:
    """The findings as lines of text, at most 80 columns wide."""
    where = f"{content['device']}, preset {content['preset']}, {content['dtype']}"
    lines = [f"Steps on {where}: ms of one call (device times from the {_sources(content)})"]
    lines += _lines(
        ("stage", "N", "context", "wall", "device", "host", "kernels", "operators"),
        (
            (
                step["stage"].removeprefix("vibevoice_"), step["batch"], step.get("context", "-"),
                step["ms"], step["device_ms"], step["host_ms"],
                step.get("launches", "-"), step.get("operators", ""),
            )
            for step in content["steps"]
        ),
    )  # fmt: skip
    lines += ["", "Parts of a step: ms as they are and as a CUDA graph"]
    lines += _lines(
        ("part", "N", "context", "eager", "graph", "operators"),
        (
            (
                part["part"], part["batch"], part.get("context", "-"), part.get("eager_ms", "-"),
                part.get("replay_ms", "none"), part.get("operators", ""),
            )
            for part in content["graphs"]
        ),
    )  # fmt: skip
    lines += [f"no graph of {part}: {error}" for part, error in _causes(content)]
    lines += [f"failed: {one['where']}: {one['error']}" for one in content["errors"]]
    speed = content.get("speed")
    return "\n".join(lines + ["", _speed_words(speed)] if speed else lines)


def _speed_words(speed: Mapping) -> str:
    return f"copies {speed['bandwidth_gb_s']:.0f} GB/s, matrix products {speed['tflop_s']:.3g} TFLOP/s"


def _sources(content: Mapping) -> str:
    return ", ".join(sorted({step["device_ms_from"] for step in content["steps"] if "device_ms_from" in step})) or "-"


def _causes(content: Mapping) -> list[tuple[str, str]]:
    return sorted({(part["part"], part["error"]) for part in content["graphs"] if "error" in part})


def _lines(head: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_padded(row, widths)).rstrip() for row in cells]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]


def _cell(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


# The command line


class Parser(argparse.ArgumentParser):
    """A usage error is one line and exit code 64."""

    def error(self, message: str):
        self.exit(EXIT_MISTAKE, f"{self.prog}: {message}; see --help\n")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,6}", part) and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1, as in 1,16,64")
    return [int(part) for part in parts]


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,5}(\.\d+)?", text) or not 1 <= float(text) <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 1 to 3600")
    return float(text)


def parser() -> Parser:
    made = Parser(
        description=__doc__,
        epilog="Example:\n  python benchmarks/gpu/device.py --preset 1.5b --device cuda --out results/gpu/h100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--quick", action="store_true", help="a short run to check that it works; its figures mean nothing"
    )
    made.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b, or a .json file of sizes (default: tiny)")
    made.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one"
    )
    made.add_argument("--checkpoint", default="", help="a folder of weights (default: random ones)")
    made.add_argument("--batches", type=_numbers, default=[1, 16, 64], help="sessions in a step (default: 1,16,64)")
    made.add_argument(
        "--contexts", type=_numbers, default=[400, 7600],
        help="positions of both branches together (default: 400,7600)",
    )  # fmt: skip
    made.add_argument("--steps", type=int, default=wire.DEFAULT_DIFFUSION_STEPS, help="denoising steps (default: 10)")
    made.add_argument("--budget-seconds", type=_seconds, help="1 to 3600, for measuring (default: 40, on a CPU 15)")
    made.add_argument("--out", type=Path, help="a folder for device.json (default: none is written)")
    return made


def checked(asked: argparse.Namespace) -> argparse.Namespace:
    """Raise InputError for impossible options."""
    if not 1 <= asked.steps <= wire.MAX_DIFFUSION_STEPS:
        raise InputError(f"--steps {asked.steps}: give 1 to {wire.MAX_DIFFUSION_STEPS} denoising steps")
    if asked.contexts and min(asked.contexts) < 100:
        raise InputError(f"--contexts {min(asked.contexts)}: give 100 or more")
    if asked.quick:
        asked.batches, asked.contexts, asked.budget_seconds = [1], [400], 3.0
    return asked


def output(folder: Path | None) -> Path | None:
    """The file to write. Raises InputError where it cannot be written."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; give another --out") from error
    return folder / "device.json" if folder is not None else None


def facts_of(weights: Weights, preset: str) -> dict:
    on_gpu = weights.device.type == "cuda"
    facts = torch.cuda.get_device_properties(weights.device) if on_gpu else None
    gpu = {"memory_gib": facts.total_memory / 2**30, "capability": f"{facts.major}.{facts.minor}"} if on_gpu else None
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(weights.device) if on_gpu else "cpu",
        "gpu": gpu,
        "measured_on": weights.device.type,
        "preset": preset_name(preset),
        "dtype": str(weights.dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }


def main(arguments: Sequence[str]) -> int:
    asked = checked(parser().parse_args(arguments))
    file = output(asked.out)
    prepare()
    # plain: also on a CPU, the operators that a GPU would run
    weights = Weights(asked.preset, checkpoint=asked.checkpoint, device=chosen_device(asked.device), plain=True)
    findings = Findings(file, **facts_of(weights, asked.preset))
    settle()
    Device(weights, asked, findings).run()
    print(tables(findings.content))
    print(json.dumps(findings.content, allow_nan=False), flush=True)
    return EXIT_FAILED if findings.content["errors"] else 0


def run() -> int:
    try:
        return main(sys.argv[1:])
    except HarnessError as error:
        print(error, file=sys.stderr)
        return EXIT_MISTAKE if isinstance(error, InputError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(run())
