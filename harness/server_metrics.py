"""The metrics that a server adds to Triton's own on its Prometheus page: names, labels and meaning.

One table for the server that exports them, the documentation, and the rules and dashboards of ``ops/``.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness import wire

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
MODEL, PROCESS, OUTCOME = "model", "process", "outcome"  # labels
DONE, REJECTED, REFUSED, FAILED, CANCELLED = OUTCOMES = ("done", "rejected", "refused", "failed", "cancelled")
# Upper bounds of the histogram of first audio, in seconds: an SLO on it must be one of them to be judged exactly.
FIRST_AUDIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class ServerMetric:
    """One metric family; ``buckets`` are the upper bounds of a histogram."""

    name: str
    kind: str
    unit: str
    about: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_EACH = (MODEL, PROCESS)

SESSIONS = ServerMetric(
    "vibevoice_sessions", GAUGE, "1", "Sessions admitted and not yet ended, by process of the entry", _EACH
)
SESSIONS_LIMIT = ServerMetric(
    "vibevoice_sessions_limit", GAUGE, "1", "Sessions that a process of the entry admits at once", _EACH
)
QUEUE_LENGTH = ServerMetric(
    "vibevoice_queue_length", GAUGE, "1", "Requests in the admission queue, by process of the entry", _EACH
)
QUEUE_LIMIT = ServerMetric(
    "vibevoice_queue_limit", GAUGE, "1", "Requests that the admission queue of a process takes", _EACH
)
REQUESTS = ServerMetric(
    "vibevoice_requests_total",
    COUNTER,
    "1",
    "Requests that ended: done, rejected (no room: a retry may help), refused (no retry helps), failed, or cancelled "
    "by the client",
    (OUTCOME,),
)
FRAMES = ServerMetric("vibevoice_frames_total", COUNTER, "1", "Frames of audio sent to clients; 7.5 are one second")
FIRST_AUDIO = ServerMetric(
    "vibevoice_first_audio_seconds",
    HISTOGRAM,
    "s",
    "Time from the receipt of a request to its first audio, queueing included",
    buckets=FIRST_AUDIO_BUCKETS,
)
KV_USED = ServerMetric(
    "vibevoice_kv_used_bytes", GAUGE, "bytes", "KV cache that open sessions have filled so far", _EACH
)
KV_PROMISED = ServerMetric(
    "vibevoice_kv_promised_bytes", GAUGE, "bytes", "KV cache reserved for open sessions up to their ends", _EACH
)
KV_LIMIT = ServerMetric(
    "vibevoice_kv_limit_bytes", GAUGE, "bytes", "KV cache that may be reserved: kv_limit_bytes", _EACH
)
STAGE_SESSIONS = ServerMetric(
    "vibevoice_stage_sessions", GAUGE, "1", "Sessions that a process of a stage, or of the engine, holds", _EACH
)
ORPHANED = ServerMetric(
    "vibevoice_orphaned_sessions_total",
    COUNTER,
    "1",
    "Sessions that a stage dropped because they were idle for too long, or the process that opened them had ended",
    _EACH,
)
EXPORT_SECONDS = ServerMetric(
    "vibevoice_export_seconds_total",
    COUNTER,
    "s",
    "Time that a process took to export these metrics: at most so long its interpreter was held",
    _EACH,
)
ENGINE_STEPS = ServerMetric(
    wire.ENGINE_STEPS, COUNTER, "1", "Steps of the fused engine, by the sessions in them", (wire.ENGINE_BATCH,)
)
ENGINE_STEP_SECONDS = ServerMetric(
    wire.ENGINE_STEP_SECONDS,
    COUNTER,
    "s",
    "Seconds of the steps of the fused engine, by the sessions in them",
    (wire.ENGINE_BATCH,),
)
ENGINE_PROMPT_TOKENS = ServerMetric(
    wire.ENGINE_PROMPT_TOKENS, COUNTER, "1", "Prompt tokens that the fused engine has read"
)
ENGINE_PROMPT_SECONDS = ServerMetric(
    wire.ENGINE_PROMPT_SECONDS, COUNTER, "s", "Seconds in which the fused engine has read prompts"
)

SERVER_METRICS = (
    SESSIONS,
    SESSIONS_LIMIT,
    QUEUE_LENGTH,
    QUEUE_LIMIT,
    REQUESTS,
    FRAMES,
    FIRST_AUDIO,
    KV_USED,
    KV_PROMISED,
    KV_LIMIT,
    STAGE_SESSIONS,
    ORPHANED,
    EXPORT_SECONDS,
    ENGINE_STEPS,
    ENGINE_STEP_SECONDS,
    ENGINE_PROMPT_TOKENS,
    ENGINE_PROMPT_SECONDS,
)
FUSED_ONLY = (ENGINE_STEPS, ENGINE_STEP_SECONDS, ENGINE_PROMPT_TOKENS, ENGINE_PROMPT_SECONDS)


def series(metric: ServerMetric) -> tuple[str, ...]:
    """The names of a metric's time series in Prometheus."""
    if metric.kind != HISTOGRAM:
        return (metric.name,)
    return tuple(f"{metric.name}_{part}" for part in ("bucket", "sum", "count"))


def bound(seconds: float) -> str:
    """A bucket's upper bound as the text of its label ``le``."""
    return f"{seconds:g}"
