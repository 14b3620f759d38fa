"""Triton's own counts: a snapshot of every stage, and the difference of two."""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import wire
from harness.errors import ServerError
from harness.records import BatchStatistics, StageStatistics

COUNTED = (wire.ENTRY, wire.FRAME, *wire.STAGES, wire.VOICE)


class StatisticsReader:
    """Reads statistics of the stages from a running server; close it after use."""

    def __init__(self, url: str):
        self.url = url
        self._channel = grpc.insecure_channel(url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def snapshot(self) -> tuple[StageStatistics, ...]:
        """Cumulative counts since each stage was loaded. Raises ServerError where the server does not answer."""
        try:
            answer = self._stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=3)
        except grpc.RpcError as error:
            raise ServerError(
                f"no statistics from {self.url}: {error.details()}; is the server still there?"
            ) from error
        return tuple(_stage(model) for model in answer.model_stats if model.name in COUNTED)

    def close(self) -> None:
        self._channel.close()


def difference(after: Iterable[StageStatistics], before: Iterable[StageStatistics]) -> tuple[StageStatistics, ...]:
    """What happened between two snapshots. A stage reloaded in between counts from its reload."""
    earlier = {stage.stage: stage for stage in before}
    return tuple(_subtract(stage, earlier.get(stage.stage)) for stage in after)


def _stage(model) -> StageStatistics:
    inference = model.inference_stats
    parts = (inference.compute_input, inference.compute_infer, inference.compute_output)
    batches = tuple(
        BatchStatistics(
            int(batch.batch_size),
            int(batch.compute_infer.count),
            int(batch.compute_input.ns + batch.compute_infer.ns + batch.compute_output.ns),
        )
        for batch in model.batch_stats
    )
    return StageStatistics(
        stage=model.name,
        requests=int(inference.success.count),
        executions=int(model.execution_count),
        queue_ns=int(inference.queue.ns),
        compute_ns=int(sum(part.ns for part in parts)),
        batches=batches,
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
