"""The real Triton with the whole ensemble on a device, with many concurrent streams, each for some frames.

Starts a server, asks its stages what they run on (device, GPU, dtype, code), and speaks 1, 16 and 64 streams in turn.
For each: total frames/s, milliseconds per frame of a stream (median and p95 of the streams), gaps between responses,
time to first audio, failures; and where the time goes: for each model of the server, its executions, their mean batch,
the mean queue time of a request and the mean compute time of an execution, from Triton's statistics. The audio of the
first stream is kept as a WAV file. Every finding is written at once: to OUT/streams.json, of the fused engine to
OUT/streams-fused.json; the reports of the stages to OUT/stages.json.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
import wave
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import EXIT_FAILED, Parser, finish, request, run, say, several, table, whole  # noqa: E402

from harness import wire
from harness.client.stream import SpeechClient  # noqa: E402
from harness.deploy.server import TritonServer, serving  # noqa: E402
from harness.deploy.statistics import StatisticsReader, difference  # noqa: E402
from harness.host import nvml  # noqa: E402
from harness.records.schema import Outcome, Result, StageStatistics  # noqa: E402

LEAD_S = 0.5  # for all clients to connect


class Clients:
    """Processes that read the streams: a single one would be slower than the server."""

    def __init__(self, count: int):
        self.count, self._pool = count, ProcessPoolExecutor(count, mp_context=get_context("spawn"))

    def speak(self, url: str, streams: int, frames: int, chunk_frames: int = 1, keep: list[bytes] | None = None):
        """The results of this many streams, started together; the audio of the first one is written to ``keep``."""
        begin_s = time.monotonic() + LEAD_S
        shares = [range(first, streams, self.count) for first in range(min(self.count, streams))]
        calls = [self._pool.submit(_share, url, share, frames, chunk_frames, begin_s, i == 0 and keep is not None)
                 for i, share in enumerate(shares)]  # fmt: skip
        results: list[Result] = []
        for call in calls:
            own, audio = call.result()
            results += own
            if keep is not None:
                keep += audio
        return results

    def close(self) -> None:
        self._pool.shutdown()


def _share(url, numbers, frames, chunk_frames, begin_s, keep: bool) -> tuple[list[Result], list[bytes]]:
    audio: list[bytes] = []

    async def speak() -> list[Result]:
        async with SpeechClient(url) as client:
            await asyncio.sleep(begin_s - time.monotonic())
            requests = [request(f"stream-{number}", frames, chunk_frames=chunk_frames) for number in numbers]
            heard = [audio.append if keep else None, *[None] * (len(requests) - 1)]
            calls = [client.speak(one, "closed", on_audio=on) for one, on in zip(requests, heard, strict=True)]
            return await asyncio.gather(*calls)

    return asyncio.run(speak()), audio


def measured(
    clients: Clients, url: str, streams: int, frames: int, chunk_frames: int, keep: list[bytes] | None
) -> dict:
    """One load: its streams, where the server's time went, and the state of every GPU of this host at its end."""
    before = _snapshot(url)
    results = clients.speak(url, streams, frames, chunk_frames, keep)
    gpus = nvml.load()  # first: it shows this moment
    done = [result for result in results if result.outcome is Outcome.DONE]
    gaps = np.concatenate([np.diff(result.chunks.received_ns) for result in done]) / 1e6 if done else np.array([np.nan])
    first = [(result.chunks.received_ns[0] - result.due_ns) / 1e9 for result in done] or [np.nan]
    frame_ms = [common.frame_ms(result) for result in done] or [np.nan]
    errors = sorted({result.error for result in results if result.error})
    due = [result.due_ns for result in done] or [0]
    begun, last = ([int(result.chunks.received_ns[i]) for result in done] or [0] for i in (0, -1))
    return {
        "streams": streams,
        "chunk_frames": chunk_frames,
        "frames_per_s": _rate(done, min(due), max(last)),
        "frames_per_s_all_speaking": _rate(done, max(begun), min(last)),
        "frame_ms_p50": float(np.median(frame_ms)),
        "frame_ms_p95": float(np.percentile(frame_ms, 95)),
        "gap_ms_p50": float(np.median(gaps)),
        "gap_ms_p99": float(np.percentile(gaps, 99)),
        "frames_per_chunk": float(np.mean([result.chunks.samples.mean() for result in done] or [0]))
        / wire.SAMPLES_PER_FRAME,
        "first_audio_s_p95": float(np.percentile(first, 95)),
        "failed": len(results) - len(done),
        "errors": errors[:3],
        "models": models(difference(_snapshot(url), before)),
        "gpus": [{name: getattr(gpu, name) for name in gpu.__slots__} for gpu in gpus],
    }


def _rate(done: Sequence[Result], from_ns: int, to_ns: int) -> float:
    """Frames/s that all streams received in a time window."""
    frames = 0.0
    for result in done:
        inside = (result.chunks.received_ns > from_ns) & (result.chunks.received_ns <= to_ns)
        frames += int(result.chunks.samples[inside].sum()) / wire.SAMPLES_PER_FRAME
    return frames / max(1, to_ns - from_ns) * 1e9


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
    parser.add_argument("--topology", default=wire.STAGED, choices=tuple(wire.TOPOLOGIES), help="default: staged")
    parser.add_argument("--chunk-frames", default=1, type=whole(1, 100), help="frames in one response (1)")
    cores = max(1, (os.cpu_count() or 2) // 2)
    parser.add_argument("--clients", default=cores, type=whole(1, 64), help=f"processes that read ({cores} here)")
    parser.add_argument("--out", default=Path("results/gpu/here"), type=Path, help="a folder for the findings")
    given = parser.parse_args(arguments)
    loads, frames = ([1, 4], 8) if given.quick else (given.streams, given.frames)
    given.out.mkdir(parents=True, exist_ok=True)
    findings, audio = [], []
    name = "streams" if given.topology == wire.STAGED else f"streams-{given.topology}"
    with contextlib.closing(Clients(given.clients)) as clients, _server(given) as server:
        _write(given.out / "stages.json", [stage.content() for stage in server.stages])
        on = {stage.gpu or stage.device for stage in server.stages if stage.preset}
        found = {"preset": given.preset, "topology": given.topology, "device": sorted(on), "loads": findings}
        say(f"stages run on {', '.join(sorted(on))}")
        clients.speak(server.url, 2 * given.clients, 4)  # what is compiled, allocated or imported at the first frame
        for streams in loads:
            kept = None if findings else audio
            findings.append(measured(clients, server.url, streams, frames, given.chunk_frames, kept))
            _write(given.out / f"{name}.json", found)
    _write_wav(given.out / "speech.wav", b"".join(audio))
    shown = tables(given.preset, ", ".join(sorted(on)), findings)
    finish(shown, found)
    return EXIT_FAILED if any(each["failed"] for each in findings) else 0


def _server(given) -> contextlib.AbstractContextManager[TritonServer]:
    return serving(given.preset, device=given.device, topology=given.topology)


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
