"""Triton's own counts: a snapshot of every stage, differences of snapshots, and the figures of its Prometheus page."""

from __future__ import annotations

import itertools
import math
import urllib.request
from collections.abc import Iterable, Mapping

import grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from harness import wire
from harness.client.replicas import described
from harness.client.target import Target
from harness.clock import HOST, Clock
from harness.errors import ServerError
from harness.records.schema import BatchStatistics, StageStatistics

TIMEOUT_S = 3
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # direct, like gRPC: not through a proxy
_ENGINE = (wire.ENGINE_STEPS, wire.ENGINE_STEP_SECONDS, wire.ENGINE_PROMPT_TOKENS, wire.ENGINE_PROMPT_SECONDS)
COUNTED = (wire.ENTRY, wire.FRAME, *wire.STAGES, wire.VOICE)


class StatisticsReader:
    """Reads the statistics of the stages from every server of a target, in times of its clock. Close it after use."""

    def __init__(self, target: Target | str, clock: Clock = HOST):
        self._target, self._clock = Target.of(target), clock
        self._channels = {address: self._target.channel(address) for address in self._target.addresses}

    def snapshot(self) -> tuple[StageStatistics, ...]:
        """Cumulative counts since each stage was loaded, summed over the servers.

        Raises ServerError where one does not answer: the sum would be incomplete.
        """
        return summed(self._ask(address) for address in self._channels)

    def _ask(self, address: str) -> tuple[StageStatistics, ...]:
        stub = GRPCInferenceServiceStub(self._channels[address])
        try:
            answer = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise ServerError(f"no statistics: {described(error, address, self._target.tls)}") from error
        return tuple(_stage(model, self._clock) for model in answer.model_stats if model.name in COUNTED)

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()


def prometheus(url: str, timeout_s: float = 1.0) -> dict[str, float]:
    """Figures of a server's Prometheus page that the statistics lack.

    These are pending requests, failures, and the use of CPU, GPU and memory, by ``name`` or ``name{model}`` (other
    labels joined with commas), summed over the versions of a model; failures only where there were some. Counters of
    the fused engine are included: see ``engine_stage``. Empty where the page cannot be read.
    """
    try:
        with _DIRECT.open(url, timeout=timeout_s) as page:
            text = page.read().decode("utf-8", errors="replace")
        return _telling(text)
    except (OSError, ValueError):
        return {}


def _telling(text: str) -> dict[str, float]:
    told: dict[str, float] = {}
    lines = text.replace("\r\n", "\n")  # a proxy may change line ends: the parser accepts only one kind
    for sample in itertools.chain.from_iterable(family.samples for family in text_string_to_metric_families(lines)):
        base = sample.name.removesuffix("_total")  # the parser appends _total to the names of counters
        if not (base.startswith("nv_") or base in _ENGINE) or not math.isfinite(sample.value):
            continue
        if base.startswith("nv_inference") and base != "nv_inference_pending_request_count":
            if base != "nv_inference_request_failure" or sample.value == 0:
                continue  # in the statistics already
        of = ",".join(said for key, said in sample.labels.items() if key != "version")
        name = f"{base}{{{of}}}" if of else base
        told[name] = told.get(name, 0.0) + sample.value
    return told


def engine_stage(metrics: Mapping[str, float]) -> tuple[dict[str, float], StageStatistics | None]:
    """Split a metrics page into the figures without the engine's steps, and the steps as the counts of a stage.

    As in a staged server, one request is one frame of one session. The stage is None where there is no engine.
    """
    steps, seconds, rest = {}, {}, {}
    for key, value in metrics.items():
        name, _, batch = key.rstrip("}").partition("{")
        by_batch = {wire.ENGINE_STEPS: steps, wire.ENGINE_STEP_SECONDS: seconds}.get(name)
        if by_batch is None:
            rest[key] = value
        else:
            by_batch[batch] = value
    if not steps:
        return rest, None
    sizes = {int(batch): batch for batch in steps}
    ns = {size: round(1e9 * seconds.get(batch, 0.0)) for size, batch in sizes.items()}
    counted = tuple(BatchStatistics(size, round(steps[sizes[size]]), ns[size]) for size in sorted(sizes))
    stage = StageStatistics(
        stage=wire.ENGINE,
        requests=sum(each.batch_size * each.executions for each in counted),
        executions=sum(each.executions for each in counted),
        queue_ns=0,
        compute_ns=sum(each.batch_size * each.compute_ns for each in counted),
        batches=counted,
    )
    return rest, stage


def summed(snapshots: Iterable[Iterable[StageStatistics]]) -> tuple[StageStatistics, ...]:
    """The counts of several servers added up, by stage."""
    totals: dict[str, StageStatistics] = {}
    for stage in itertools.chain.from_iterable(snapshots):
        totals[stage.stage] = _add(totals[stage.stage], stage) if stage.stage in totals else stage
    return tuple(totals.values())


def difference(after: Iterable[StageStatistics], before: Iterable[StageStatistics]) -> tuple[StageStatistics, ...]:
    """What happened between two snapshots. A stage reloaded in between counts from its reload."""
    earlier = {stage.stage: stage for stage in before}
    return tuple(_subtract(stage, earlier.get(stage.stage)) for stage in after)


def _stage(model, clock: Clock) -> StageStatistics:
    inference = model.inference_stats
    parts = (inference.compute_input, inference.compute_infer, inference.compute_output)
    batches = tuple(
        BatchStatistics(
            int(batch.batch_size),
            int(batch.compute_infer.count),
            clock.of_host(int(batch.compute_input.ns + batch.compute_infer.ns + batch.compute_output.ns)),
        )
        for batch in model.batch_stats
    )
    return StageStatistics(
        stage=model.name,
        requests=int(inference.success.count),
        executions=int(model.execution_count),
        queue_ns=clock.of_host(int(inference.queue.ns)),
        compute_ns=clock.of_host(int(sum(part.ns for part in parts))),
        batches=batches,
    )


def _add(one: StageStatistics, other: StageStatistics) -> StageStatistics:
    batches = {batch.batch_size: batch for batch in one.batches}
    for batch in other.batches:
        before = batches.get(batch.batch_size, BatchStatistics(batch.batch_size, 0, 0))
        batches[batch.batch_size] = BatchStatistics(
            batch.batch_size, before.executions + batch.executions, before.compute_ns + batch.compute_ns
        )
    return StageStatistics(
        stage=one.stage,
        requests=one.requests + other.requests,
        executions=one.executions + other.executions,
        queue_ns=one.queue_ns + other.queue_ns,
        compute_ns=one.compute_ns + other.compute_ns,
        batches=tuple(batches[size] for size in sorted(batches)),
    )


def _subtract(after: StageStatistics, before: StageStatistics | None) -> StageStatistics:
    if before is None or after.executions < before.executions:
        return after
    earlier = {batch.batch_size: batch for batch in before.batches}
    none = BatchStatistics(0, 0, 0)
    batches = tuple(
        BatchStatistics(b.batch_size, b.executions - e.executions, b.compute_ns - e.compute_ns)
        for b in after.batches
        for e in [earlier.get(b.batch_size, none)]
        if b.executions > e.executions
    )
    return StageStatistics(
        stage=after.stage,
        requests=after.requests - before.requests,
        executions=after.executions - before.executions,
        queue_ns=after.queue_ns - before.queue_ns,
        compute_ns=after.compute_ns - before.compute_ns,
        batches=batches,
    )
