"""The real Triton with the whole ensemble on a device: so many streams at once, each for some frames.

Starts a server, hears from its stages what they run on (device, GPU, dtype, code), and speaks 1, 16 and 64 streams one
after another. For each: frames per second in all, milliseconds between two frames of a stream (median, p95), time to
first audio, failures; and where the time goes: for each model of the server, its executions, their mean batch, the
mean time of a request in the queue and the mean compute time of an execution, from Triton's statistics. The audio of
the first stream is kept as a WAV file. Every finding is written to OUT/streams.json at once, what the stages said of
themselves to OUT/stages.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import EXIT_FAILED, Parser, finish, request, run, say, several, table, whole  # noqa: E402

from harness import nvml, wire  # noqa: E402
from harness.client import SpeechClient  # noqa: E402
from harness.records import Outcome, Result, StageStatistics  # noqa: E402
from harness.triton.server import serving  # noqa: E402
from harness.triton.statistics import StatisticsReader, difference  # noqa: E402


async def _speak(url: str, streams: int, frames: int, keep: list[bytes]) -> list[Result]:
    async with SpeechClient(url) as client:
        requests = [request(f"stream-{number}", frames) for number in range(streams)]
        heard = [keep.append, *[None] * (streams - 1)]
        calls = [client.speak(one, "closed", on_audio=on) for one, on in zip(requests, heard, strict=True)]
        return await asyncio.gather(*calls)


def measured(url: str, streams: int, frames: int, keep: list[bytes]) -> dict:
    """One load: its streams, where the server's time went, and what every GPU of this host did at its end."""
    before = _snapshot(url)
    began = time.monotonic()
    results = asyncio.run(_speak(url, streams, frames, keep))
    took_s = time.monotonic() - began
    gpus = nvml.load()  # before anything else: it is of this moment
    done = [result for result in results if result.outcome is Outcome.DONE]
    gaps = np.concatenate([np.diff(result.chunks.received_ns) for result in done]) / 1e6 if done else np.array([np.nan])
    first = [(result.chunks.received_ns[0] - result.due_ns) / 1e9 for result in done] or [np.nan]
    errors = sorted({result.error for result in results if result.error})
    return {
        "streams": streams,
        "frames_per_s": sum(int(result.chunks.samples.sum()) for result in done) / wire.SAMPLES_PER_FRAME / took_s,
        "frame_ms_p50": float(np.median(gaps)),
        "frame_ms_p95": float(np.percentile(gaps, 95)),
        "first_audio_s_p95": float(np.percentile(first, 95)),
        "failed": len(results) - len(done),
        "errors": errors[:3],
        "models": models(difference(_snapshot(url), before)),
        "gpus": [{name: getattr(gpu, name) for name in gpu.__slots__} for gpu in gpus],
    }


def _snapshot(url: str) -> tuple[StageStatistics, ...]:
    with contextlib.closing(StatisticsReader(url)) as reader:
        return reader.snapshot()


def models(counted: Iterable[StageStatistics]) -> dict[str, dict[str, float]]:
    """By model that ran: executions, requests an execution, ms a request queued, ms of compute an execution.

    A model without counts by batch size, such as an ensemble, has its compute time by request; the two are the same
    at batch 1.
    """
    return {each.stage: _figures(each) for each in counted if each.executions > 0}


def _figures(counted: StageStatistics) -> dict[str, float]:
    by_batch = sum(batch.executions for batch in counted.batches)
    compute_ns = sum(batch.compute_ns for batch in counted.batches) if by_batch else counted.compute_ns
    return {
        "executions": counted.executions,
        "mean_batch": counted.requests / counted.executions,
        "queue_ms": counted.queue_ns / max(1, counted.requests) / 1e6,
        "compute_ms": compute_ns / max(1, by_batch or counted.requests) / 1e6,
    }


def tables(preset: str, on: str, findings: Sequence[dict]) -> list[Table]:
    """The loads, and one table of the server's models for each, at most 80 columns wide."""
    loads = table(f"Streams, {preset} on {on}", "streams", "frames/s", "ms a frame", "p95", "failed")
    for each in findings:
        figures = (f"{each[name]:.1f}" for name in ("frames_per_s", "frame_ms_p50", "frame_ms_p95"))
        loads.add_row(str(each["streams"]), *figures, str(each["failed"]))
    return [loads, *map(_model_table, findings)]


def _model_table(load: dict) -> Table:
    shown = table(f"Models at {load['streams']} streams", "model", "executions", "batch", "queue ms", "compute ms")
    for model, found in load["models"].items():
        figures = (f"{found[name]:.1f}" for name in ("mean_batch", "queue_ms", "compute_ms"))
        shown.add_row(model, str(found["executions"]), *figures)
    shown.caption, shown.caption_justify = "queue: mean of a request; compute: mean of an execution", "left"
    return shown


def main(arguments: Sequence[str]) -> int:
    parser = Parser(__doc__, "python benchmarks/gpu/streams.py --preset tiny --device cpu --out results/gpu/cpu")
    parser.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b, or a .json file of sizes")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "gpu"), help="auto: a GPU where there is one"
    )
    parser.add_argument("--streams", default=[1, 16, 64], type=several(whole(1, 512)), help="loads, one after another")
    parser.add_argument("--frames", default=75, type=whole(2, 40_500), help="of each stream")
    parser.add_argument("--out", default=Path("results/gpu/here"), type=Path, help="a folder for the findings")
    given = parser.parse_args(arguments)
    loads, frames = ([1, 4], 8) if given.quick else (given.streams, given.frames)
    given.out.mkdir(parents=True, exist_ok=True)
    findings, audio = [], []
    with serving(given.preset, device=given.device) as server:
        _write(given.out / "stages.json", [stage.content() for stage in server.stages])
        on = {stage.gpu or stage.device for stage in server.stages if stage.model in wire.STAGES}
        say(f"stages run on {', '.join(sorted(on))}")
        asyncio.run(_speak(server.url, 2, 4, []))  # what is compiled or allocated at the first frame
        for streams in loads:
            findings.append(measured(server.url, streams, frames, audio if not findings else []))
            _write(given.out / "streams.json", {"preset": given.preset, "device": sorted(on), "loads": findings})
    _write_wav(given.out / "speech.wav", b"".join(audio))
    shown = tables(given.preset, ", ".join(sorted(on)), findings)
    finish(shown, {"preset": given.preset, "device": sorted(on), "loads": findings})
    return EXIT_FAILED if any(each["failed"] for each in findings) else 0


def _write(path: Path, content) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1))
    draft.replace(path)


def _write_wav(path: Path, samples: bytes) -> None:
    loud = np.clip(np.frombuffer(samples, np.float32), -1, 1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(wire.SAMPLE_RATE_HZ)
        file.writeframes((loud * 32767).astype(np.int16).tobytes())


if __name__ == "__main__":
    run(main)
