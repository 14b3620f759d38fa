"""Configurations of a server whose time is dilated: every delay and time limit takes longer on the host."""

from __future__ import annotations

from collections.abc import Iterable

from tritonclient.grpc import model_config_pb2

from harness.clock import HOST, Clock

# Parameters of the served time; the heartbeat is of the host's processes, and stays in their time.
_SECONDS = ("waiting_seconds",)


def dilate(configs: Iterable[model_config_pb2.ModelConfig], clock: Clock) -> None:
    """Set the times of these configurations to what they take on the host."""
    for config in configs if clock != HOST else ():
        _dilate(config, clock)


def _dilate(config: model_config_pb2.ModelConfig, clock: Clock) -> None:
    batching = None
    if config.HasField("dynamic_batching"):
        batching = config.dynamic_batching
    elif config.HasField("sequence_batching"):
        batching, sequences = config.sequence_batching.oldest, config.sequence_batching
        sequences.max_sequence_idle_microseconds = round(clock.host_span(sequences.max_sequence_idle_microseconds))
    if batching is not None:
        batching.max_queue_delay_microseconds = round(clock.host_span(batching.max_queue_delay_microseconds))
    for name in _SECONDS:
        if name in config.parameters:
            seconds = float(config.parameters[name].string_value)
            config.parameters[name].string_value = f"{clock.host_span(seconds):g}"
