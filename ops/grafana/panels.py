"""The panels of the dashboards: what each asks Prometheus. ``make.py`` lays them out as Grafana's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness import wire

TIME_SERIES, STAT = "timeseries", "stat"
_STAGES = 'model=~"' + "|".join(wire.STAGES) + '"'


@dataclass(frozen=True)
class Query:
    """A PromQL expression, and the name of its lines: ``{{label}}`` stands for the value of a label."""

    expression: str
    legend: str = ""


@dataclass(frozen=True)
class View:
    """One panel; ``unit`` is one of Grafana's, ``highest`` the top of its axis."""

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = TIME_SERIES
    width: int = 12
    highest: float | None = None


@dataclass(frozen=True)
class Section:
    title: str
    views: tuple[View, ...]


@dataclass(frozen=True)
class Board:
    """One dashboard; ``uid`` is part of its address."""

    uid: str
    title: str
    about: str
    sections: tuple[Section, ...]


def _quantiles(of: Sequence[str]) -> tuple[Query, ...]:
    return tuple(Query(f"job:vibevoice_first_audio_seconds:{each}_5m", each) for each in of)


SERVICE = Board(
    "speech-service",
    "Speech service",
    "What users notice: requests, first audio, rejections; and the state of sessions and queue.",
    (
        Section(
            "Service",
            (
                View(
                    "Error budget burn rate (1 h)",
                    "1: the budget of 30 days lasts exactly that long. Alerts at 14.4 (1 h), 6 (6 h) and 1 (3 days).",
                    "none",
                    (Query("job:vibevoice_slo_budget:burn_rate1h"),),
                    STAT,
                    6,
                ),
                View(
                    "Late, rejected or failed (5 min)",
                    "Share of requests that miss the SLO on first audio.",
                    "percentunit",
                    (Query("job:vibevoice_slo_errors:ratio_rate5m"),),
                    STAT,
                    6,
                ),
                View(
                    "First audio, p95 (5 min)",
                    "From the receipt of a request by the server, its queue included.",
                    "s",
                    _quantiles(["p95"]),
                    STAT,
                    6,
                ),
                View(
                    "Servers up", "Triton servers that answer.", "none", (Query("job:vibevoice_devices:up"),), STAT, 6
                ),
                View(
                    "Requests that ended",
                    "Rejected: no room, a retry may help. Refused: no server can serve it. Cancelled: the client left.",
                    "reqps",
                    (Query("job:vibevoice_requests:rate5m", "{{outcome}}"),),
                ),
                View("First audio", "Quantiles of the last five minutes.", "s", _quantiles(["p50", "p95", "p99"])),
                View(
                    "Sessions and queue",
                    "Sessions that are admitted and not yet ended, and requests that wait for room.",
                    "none",
                    (
                        Query("job:vibevoice_sessions:sum", "sessions"),
                        Query("job:vibevoice_queue_length:sum", "waiting"),
                    ),
                ),
                View(
                    "Places taken",
                    "Sessions and waiting requests as shares of sessions_at_once and waiting_limit.",
                    "percentunit",
                    (
                        Query("job:vibevoice_sessions:sum / sum by (job) (vibevoice_sessions_limit)", "sessions"),
                        Query("job:vibevoice_queue_length:sum / sum by (job) (vibevoice_queue_limit)", "queue"),
                    ),
                    highest=1.0,
                ),
                View(
                    "Audio",
                    "Seconds of audio sent to clients in each second.",
                    "none",
                    (Query("job:vibevoice_audio_seconds:rate5m", "audio s/s"),),
                ),
                View(
                    "Orphaned sessions",
                    "Current: sessions that a stage holds and no entry speaks. Dropped: those that stages gave up.",
                    "none",
                    (
                        Query("instance:vibevoice_orphaned_sessions:min1m", "current, {{instance}}"),
                        Query("sum by (instance) (vibevoice_orphaned_sessions_total)", "dropped, {{instance}}"),
                    ),
                ),
            ),
        ),
    ),
)

STAGES = Board(
    "speech-stages",
    "Stages of a frame",
    "Where the time of a frame goes: batches, compute and queueing of each stage.",
    (
        Section(
            "Staged topology",
            (
                View(
                    "Time of a frame",
                    "One frame of one session through the three stages, and its wait for them.",
                    "s",
                    (
                        Query(
                            'sum by (job) (rate(nv_inference_request_duration_us{model="vibevoice_frame"}[1m])) / 1e6'
                            ' / (sum by (job) (rate(nv_inference_request_success{model="vibevoice_frame"}[1m])) > 0)',
                            "frame",
                        ),
                    ),
                ),
                View(
                    "Frames at each stage",
                    "Requests that each stage has served.",
                    "reqps",
                    (Query(f"sum by (model) (rate(nv_inference_count{{{_STAGES}}}[1m]))", "{{model}}"),),
                ),
                View(
                    "Mean batch",
                    "Requests in one execution of a stage.",
                    "none",
                    (Query(f"model:nv_inference_batch:mean1m{{{_STAGES}}}", "{{model}}"),),
                ),
                View(
                    "Executions",
                    "Batches that each stage computes.",
                    "ops",
                    (Query(f"model:nv_inference_exec:rate1m{{{_STAGES}}}", "{{model}}"),),
                ),
                View(
                    "Compute per request",
                    "Time in a stage's process, in which the whole batch is computed.",
                    "s",
                    (Query(f"model:nv_inference_compute_seconds:mean1m{{{_STAGES}}}", "{{model}}"),),
                ),
                View(
                    "Queueing per request",
                    "Wait for a batch and for a free instance.",
                    "s",
                    (Query(f"model:nv_inference_queue_seconds:mean1m{{{_STAGES}}}", "{{model}}"),),
                ),
                View(
                    "Waiting requests",
                    "Requests that wait at each stage now.",
                    "none",
                    (Query(f"sum by (model) (nv_inference_pending_request_count{{{_STAGES}}})", "{{model}}"),),
                ),
                View(
                    "Failed requests",
                    "Executions of any model that ended with an error.",
                    "reqps",
                    (Query("sum by (model) (rate(nv_inference_request_failure[1m]))", "{{model}}"),),
                ),
            ),
        ),
        Section(
            "Fused topology",
            (
                View(
                    "Step of the engine",
                    "Mean time of one step, in which each of its sessions gets a frame.",
                    "s",
                    (Query("job:vibevoice_engine_step_seconds:mean1m", "step"),),
                ),
                View(
                    "Sessions in a step",
                    "Steps by the number of sessions in them.",
                    "ops",
                    (Query("sum by (batch) (rate(vibevoice_engine_steps[1m]))", "{{batch}} sessions"),),
                ),
                View(
                    "Prompts read",
                    "Tokens of prompts.",
                    "none",
                    (Query("sum by (job) (rate(vibevoice_engine_prompt_tokens[1m]))", "tokens/s"),),
                ),
                View(
                    "Time for prompts",
                    "Share of the engine's time in which it reads prompts.",
                    "percentunit",
                    (Query("sum by (instance) (rate(vibevoice_engine_prompt_seconds[1m]))", "{{instance}}"),),
                ),
            ),
        ),
        Section(
            "Processes",
            (
                View(
                    "Sessions that each process holds",
                    "A session of the staged topology is one at the LLM stage and one at the vocoder.",
                    "none",
                    (Query("vibevoice_stage_sessions", "{{instance}} {{process}}"),),
                ),
                View(
                    "Cost of these metrics",
                    "Share of the time in which a process exports them, summed over the processes of a server.",
                    "percentunit",
                    (Query("sum by (instance) (rate(vibevoice_export_seconds_total[1m]))", "{{instance}}"),),
                ),
            ),
        ),
    ),
)

CAPACITY = Board(
    "speech-capacity",
    "Speech capacity",
    "Now against the plan: the constants of rules/plan.yml beside what the servers measure.",
    (
        Section(
            "Now and planned",
            (
                View(
                    "Requests",
                    "Arrivals that ended, the rate that the plan is for, and the rate at which the servers that are up "
                    "reach the plan's cap.",
                    "reqps",
                    (
                        Query('sum by (job) (job:vibevoice_requests:rate5m{outcome!="refused"})', "now"),
                        Query("vibevoice_plan:requests_per_second", "planned"),
                        Query(
                            "job:vibevoice_devices:up * on () group_left () (vibevoice_plan:utilisation_cap"
                            " * vibevoice_plan:requests_per_second_per_device)",
                            "capacity of the servers that are up",
                        ),
                    ),
                ),
                View(
                    "Servers",
                    "Up, needed for the planned rate, and with one in reserve.",
                    "none",
                    (
                        Query("job:vibevoice_devices:up", "up"),
                        Query("vibevoice_plan:devices", "planned"),
                        Query("vibevoice_plan:devices_n_plus_1", "planned, one in reserve"),
                    ),
                ),
                View(
                    "Utilisation",
                    "Share of the steady rate of the servers that are up, and the cap of the plan.",
                    "percentunit",
                    (
                        Query("job:vibevoice_devices:utilisation", "now"),
                        Query("vibevoice_plan:utilisation_cap", "cap"),
                    ),
                ),
                View(
                    "Sessions per server",
                    "Now, and what the plan has in 95% of the time.",
                    "none",
                    (
                        Query("instance:vibevoice_sessions:sum", "{{instance}}"),
                        Query("vibevoice_plan:sessions_per_device", "planned, p95"),
                    ),
                ),
                View(
                    "KV cache",
                    "Filled so far, and reserved up to the ends of the open sessions, as shares of the limit.",
                    "percentunit",
                    (
                        Query("instance:vibevoice_kv_promised:ratio", "reserved, {{instance}}"),
                        Query("instance:vibevoice_kv_used:ratio", "filled, {{instance}}"),
                    ),
                    highest=1.0,
                ),
                View(
                    "KV cache in bytes",
                    "Of each process that holds one.",
                    "bytes",
                    (
                        Query("vibevoice_kv_promised_bytes", "reserved, {{instance}} {{process}}"),
                        Query("vibevoice_kv_used_bytes", "filled, {{instance}} {{process}}"),
                    ),
                ),
                View(
                    "Plan expires in",
                    "After that it says nothing: sign off again.",
                    "s",
                    (Query("vibevoice_plan:expires_timestamp_seconds - time()"),),
                    STAT,
                    6,
                ),
                View(
                    "Rejected (5 min)",
                    "Share of requests that found no room.",
                    "percentunit",
                    (Query('job:vibevoice_requests:rate5m_share{outcome="rejected"}'),),
                    STAT,
                    6,
                ),
                View(
                    "CPU of the servers",
                    "Share of each host's cores, by Triton's own metric.",
                    "percentunit",
                    (Query("nv_cpu_utilization", "{{instance}}"),),
                    highest=1.0,
                ),
            ),
        ),
        Section(
            "GPUs (empty where a server has none)",
            (
                View(
                    "GPU utilisation",
                    "Share of time with a kernel running.",
                    "percentunit",
                    (Query("nv_gpu_utilization", "{{instance}} {{gpu_uuid}}"),),
                    highest=1.0,
                ),
                View(
                    "GPU memory",
                    "In use by all processes.",
                    "bytes",
                    (Query("nv_gpu_memory_used_bytes", "{{instance}} {{gpu_uuid}}"),),
                ),
                View(
                    "GPU power", "By the driver.", "watt", (Query("nv_gpu_power_usage", "{{instance}} {{gpu_uuid}}"),)
                ),
                View(
                    "Energy per second of audio",
                    "All GPUs of the servers, over the audio that was sent.",
                    "joule",
                    (
                        Query(
                            "sum by (job) (rate(nv_energy_consumption[5m])) / (job:vibevoice_audio_seconds:rate5m > 0)",
                            "J per s",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

BOARDS = (SERVICE, STAGES, CAPACITY)
