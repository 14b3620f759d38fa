"""A deployment (preset and knobs) as Triton model configurations, written and read as protobuf text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from harness import wire
from harness.errors import InputError, ServerError

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"
KNOBS = ("delay_us", "max_batch", "instances")
_OWNERS = {"entry": wire.ENTRY, **{stage: stage for stage in wire.STAGES}, wire.VOICE: wire.VOICE}


Configs = dict[str, model_config_pb2.ModelConfig]  # by model


@dataclass(frozen=True)
class Deployment:
    """What is deployed: a model and, per stage, the knobs that a sweep turns.

    ``knobs`` maps ``<stage>.<knob>`` to a value, e.g. ``{"diffusion_decoder.delay_us": 2000}``; stages are
    ``entry``, the three of the frame path and ``voice_encoder``; knobs are ``delay_us``, ``max_batch``, ``instances``.
    """

    preset: str = "tiny"
    checkpoint: str = ""
    voices: str = ""
    weights_seed: int = 0
    knobs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        for knob, value in self.knobs.items():
            owner, _, name = knob.rpartition(".")
            if owner not in _OWNERS or name not in KNOBS:
                known = f"<stage>.<{'|'.join(KNOBS)}> with a stage of {', '.join(_OWNERS)}"
                raise InputError(f"unknown knob {knob!r}: use {known}")
            if value < (0 if name == "delay_us" else 1):
                raise InputError(f"{knob} is {value}: it must be at least {0 if name == 'delay_us' else 1}")

    def configs(self, repository: Path = REPOSITORY) -> Configs:
        """The configuration of every model of a repository, with this deployment's values in it."""
        configs = {model: read_config(repository / model / "config.pbtxt") for model in wire.MODELS}
        for config in configs.values():
            self._set_parameters(config)
        return self.turn(configs)

    def turn(self, configs: Configs) -> Configs:
        """Set the knobs in these configurations, and return them."""
        for knob, value in self.knobs.items():
            owner, _, name = knob.rpartition(".")
            _set_knob(configs[_OWNERS[owner]], name, value)
        batch = min(configs[stage].max_batch_size for stage in wire.STAGES)
        configs[wire.FRAME].max_batch_size = batch  # an ensemble may not promise more than its smallest step
        return configs

    def _set_parameters(self, config: model_config_pb2.ModelConfig) -> None:
        values = {
            "preset": self.preset,
            "checkpoint": self.checkpoint,
            "voices": self.voices,
            "weights_seed": str(self.weights_seed),
        }
        for name, value in values.items():
            if name in config.parameters:
                config.parameters[name].string_value = value


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """Read a config.pbtxt. Raises ServerError where it is missing or not valid protobuf text."""
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except OSError as error:
        raise ServerError(f"no configuration at {path}: is this a model repository? ({error.strerror})") from error
    except text_format.ParseError as error:
        raise ServerError(f"{path} is not a valid Triton configuration: {error}") from error


def write_repository(target: Path, deployment: Deployment, source: Path = REPOSITORY) -> None:
    """Write a repository for a deployment: its configurations, and links to the version folders of ``source``."""
    for model, config in deployment.configs(source).items():
        folder = target / model
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
        os.symlink(source / model / "1", folder / "1")


def as_json(config: model_config_pb2.ModelConfig) -> str:
    """The form in which Triton's load call takes a configuration."""
    return json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None)


def _set_knob(config: model_config_pb2.ModelConfig, name: str, value: int) -> None:
    if name == "instances":
        config.instance_group[0].count = value
    elif name == "max_batch":
        config.max_batch_size = value
    elif config.HasField("sequence_batching"):
        config.sequence_batching.oldest.max_queue_delay_microseconds = value
    elif config.HasField("dynamic_batching"):
        config.dynamic_batching.max_queue_delay_microseconds = value
    else:
        raise InputError(f"{config.name} does not batch: it has no delay_us")
