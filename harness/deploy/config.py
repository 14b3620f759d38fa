"""A deployment (preset and knobs) as Triton model configurations, written and read as protobuf text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from harness import wire
from harness.clock import HOST, Clock
from harness.deploy.config_keys import Configs, as_parameter, model_of, set_key
from harness.deploy.dilation import dilate
from harness.errors import InputError, ServerError, StoreError
from harness.host import nvml
from harness.host.places import REPOSITORY, preset_name
from harness.identity import CPU, EMULATED, GPU
from harness.records.store import read_profile
from harness.topology import ENGINE, ENGINE_KNOBS, KEY, Knobs, KnobValue, has_knob, must_not_emulate, number_of
from harness.traffic.voice_folder import count_voices, voice_files

KNOBS = ("delay_us", "max_batch", "preferred_batch", "instances")
PRESETS = ("tiny", "1.5b", "7b")
MAX_GPUS = 64
DEVICES = ("auto", CPU, GPU)
DTYPES = ("auto", "float32", "bfloat16", "float16")
_KINDS = {CPU: model_config_pb2.ModelInstanceGroup.KIND_CPU, GPU: model_config_pb2.ModelInstanceGroup.KIND_GPU}
# Limits on a GPU: the largest batch that profiles measure, and sessions by the hundred. A stage has twice as many
# sessions as the entry: Triton keeps those of an entry that died until they have been idle for a while.
GPU_BATCH, GPU_SESSIONS = 128, 512
ENGINE_MOST = 1024  # sessions in a step of the engine, or engines
_MOST = (1 << 31) - 1  # largest count that Triton's configuration can hold
_OWNERS = {"entry": wire.ENTRY, **{stage: stage for stage in wire.STAGES}, wire.VOICE: wire.VOICE, ENGINE: wire.ENTRY}


@dataclass(frozen=True)
class Deployment:
    """What is deployed: a model and, per stage, the knobs that a sweep sets.

    ``knobs`` maps ``<stage>.<knob>`` to a value, e.g. ``{"diffusion_decoder.delay_us": 2000}``. Stages are ``entry``,
    the three of the frame path and ``voice_encoder``; knobs are ``delay_us``, ``max_batch``, ``preferred_batch`` (0 =
    none) and ``instances``. The fused ``topology`` has no stages: its knobs are ``engine.max_batch`` and
    ``engine.instances``. Any other key of a config.pbtxt is set as ``<model>:<path>``, e.g.
    ``{"neural_vocoder:dynamic_batching.preserve_ordering": True}``; see ``config_keys.set_key``. ``parameters``
    maps ``<model>.<parameter>`` to a value, for parameters that the model's config.pbtxt has.

    ``preset`` is a name or the path of a JSON file of sizes. ``emulate`` is the path of a profile: stages then take its
    times instead of computing. ``device`` is cpu, gpu, or auto: a GPU if this host has one. ``gpus``: how many GPUs (or
    emulated GPUs) are used; each gets as many instances of every stage as its knob ``instances`` says, by default one.
    ``dtype`` is what stages compute in; auto is bfloat16 on a GPU, float32 on
    a CPU. ``dilation``: how many times slower than the emulated GPUs everything runs; delays are given as they are on
    those GPUs. Paths are made absolute. Raises InputError for what cannot be deployed.
    """

    preset: str = "tiny"
    checkpoint: str = ""
    voices: str = ""
    weights_seed: int = 0
    knobs: Knobs = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    emulate: str = ""
    gpus: int = 1
    device: str = "auto"
    dtype: str = "auto"
    topology: str = wire.STAGED
    dilation: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "preset", checked_preset(self.preset))
        for name, known in (("device", DEVICES), ("dtype", DTYPES), ("topology", tuple(wire.TOPOLOGIES))):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}: use one of {', '.join(known)}")
        if self.emulate and self.topology == wire.FUSED:
            raise InputError("the fused topology cannot be emulated: leave emulate out, or deploy the staged one")
        if self.emulate:
            object.__setattr__(self, "emulate", _checked_profile(self.emulate, self.preset))
        if self.emulate and (self.device == GPU or self.dtype != "auto"):
            raise InputError("emulated stages compute nothing: leave out device and dtype, or emulate")
        if self.clock != HOST and not self.emulate:
            raise InputError("only emulated GPUs can run slower: leave out dilate, or give a profile to emulate")
        if self.device == CPU and self.gpus != 1:
            raise InputError(f"gpus is {self.gpus}, but the device is the CPU: leave one of them out")
        if not 1 <= self.gpus <= MAX_GPUS:
            raise InputError(f"gpus is {self.gpus}: it must lie in 1 to {MAX_GPUS}")
        for name in ("checkpoint", "voices"):
            if folder := getattr(self, name):
                object.__setattr__(self, name, str(Path(folder).absolute()))
        must_not_emulate((*self.parameters, *self.knobs))
        for knob, value in self.knobs.items():
            _check_knob(knob, value)
            self._check_owner(knob)
        if self.parameters or any(KEY in knob for knob in self.knobs):
            self.configs()  # refuses knobs that a model does not have

    def _check_owner(self, knob: str) -> None:
        other = wire.STAGED if self.topology == wire.FUSED else wire.FUSED
        if has_knob(other, knob) and not has_knob(self.topology, knob):
            own = f"{ENGINE}.<{'|'.join(ENGINE_KNOBS)}>" if self.topology == wire.FUSED else "<stage>.<knob>"
            raise InputError(
                f"{knob}: the {self.topology} topology has no such knob: leave it out, use {own}, or deploy the "
                f"{other} topology"
            )

    def configs(self, repository: Path = REPOSITORY) -> Configs:
        """The configuration of every model of a repository, with this deployment's values."""
        configs = read_repository(repository, self.topology)
        for config in configs.values():
            self._set_own_parameters(config)
        self._place(configs)
        for name, value in self.parameters.items():
            _set_parameter(configs, name, value)
        return self.turn(configs)

    def served(self, repository: Path = REPOSITORY) -> Configs:
        """The configurations as a server gets them: with their times as they are on the host."""
        configs = self.configs(repository)
        dilate(configs.values(), self.clock)
        return configs

    @property
    def clock(self) -> Clock:
        """The clock of its server."""
        return Clock(self.dilation)

    @property
    def models(self) -> tuple[str, ...]:
        """The models that this deployment's server loads."""
        return wire.TOPOLOGIES[self.topology]

    @property
    def kind(self) -> str:
        """What the stages compute on, on this host: CPU, GPU or EMULATED."""
        if self.emulate:
            return EMULATED
        return (GPU if nvml.visible() else CPU) if self.device == "auto" else self.device

    def check_host(self) -> None:
        """Raise InputError where this host lacks what the deployment needs."""
        have = len(nvml.visible())
        if self.kind == GPU and self.gpus > have:
            raise InputError(
                f"{self.gpus} GPUs are requested, but this host shows {have or 'none'}: check `harness doctor` "
                "and CUDA_VISIBLE_DEVICES; or give --device cpu, or --emulate PROFILE"
            )
        if self.kind == CPU and self.gpus != 1:
            raise InputError(
                f"gpus is {self.gpus}, but this host has no GPU: leave gpus out, or give a profile to emulate"
            )

    def _place(self, configs: Configs) -> None:
        """Set where instances run, and the limits that depend on it."""
        kind = self.kind
        if kind == GPU or self.device == CPU or nvml.visible():  # otherwise they can only run on the CPU
            self._pin(configs, GPU if kind == GPU else CPU)
        if kind == EMULATED:
            for stage in wire.STAGES:
                _set_knob(configs[stage], "instances", 1)
        if kind == GPU:
            _widen(configs)

    def check(self) -> Configs:
        """Check the configurations of this host's repository. Raises InputError if no server could start with them."""
        configs = self.configs()
        for config in configs.values():
            _check_batches(config)
            _check_folders(config)
        if self.kind == GPU and self.topology == wire.FUSED:
            _check_engine(configs[wire.ENTRY].parameters)
        return configs

    def voice_count(self) -> int:
        """Number of voices of its server; their ids are 1 to this number. Raises InputError."""
        return count_voices(self.configs()[wire.ENTRY].parameters["voices"].string_value)

    def sessions_at_once(self) -> int:
        """The most concurrent sessions that its server admits."""
        return int(self.configs()[wire.ENTRY].parameters["sessions_at_once"].string_value)

    def defaults(self) -> dict[str, int]:
        """The deployed value of every knob of its frame path."""
        configs, found = self.configs(), {}
        if self.topology == wire.FUSED:
            engine = configs[wire.ENTRY]
            most = int(engine.parameters["max_batch"].string_value)
            return {f"{ENGINE}.max_batch": most, f"{ENGINE}.instances": engine.instance_group[0].count}
        for stage in wire.STAGES:
            config, batching = configs[stage], _batching(configs[stage], "batching")
            found[f"{stage}.delay_us"] = batching.max_queue_delay_microseconds
            found[f"{stage}.preferred_batch"] = next(iter(batching.preferred_batch_size), 0)
            found[f"{stage}.max_batch"] = config.max_batch_size
            found[f"{stage}.instances"] = config.instance_group[0].count // _gpus_in_count(config)
        return found

    def turn(self, configs: Configs) -> Configs:
        """Set the knobs in these configurations, and return them."""
        for knob, value in self.knobs.items():
            if KEY in knob:
                _must_count_on_each_gpu(configs, knob)
                set_key(configs, knob, value)
            else:
                owner, _, name = knob.rpartition(".")
                _set_knob(configs[_OWNERS[owner]], name, number_of(self.knobs, knob, 0))
        if wire.FRAME in configs:  # an ensemble's batch limit must not exceed that of its smallest step
            configs[wire.FRAME].max_batch_size = min(configs[stage].max_batch_size for stage in wire.STAGES)
        return configs

    def _set_own_parameters(self, config: model_config_pb2.ModelConfig) -> None:
        values = {
            "preset": self.preset,
            "checkpoint": self.checkpoint,
            "voices": self.voices,
            "weights_seed": str(self.weights_seed),
            "emulate": self.emulate,
            "gpus": str(self.gpus),
            wire.DILATION: f"{self.dilation:g}",
            "dtype": self.dtype,
        }
        for name, value in values.items():
            if name in config.parameters:
                config.parameters[name].string_value = value

    def _pin(self, configs: Configs, device: str) -> None:
        """Make every stage run on this device, and refuse to start on another."""
        for model, config in configs.items():
            if "device" not in config.parameters:
                continue
            group = config.instance_group[0]
            group.kind = _KINDS[device]
            config.parameters["device"].string_value = device
            if device == GPU:
                group.gpus[:] = [0] if model == wire.VOICE else range(self.gpus)


def _widen(configs: Configs) -> None:
    entry = configs[wire.ENTRY].parameters
    entry["sessions_at_once"].string_value = str(GPU_SESSIONS)
    if "max_batch" in entry:
        entry["max_batch"].string_value = str(GPU_BATCH)
    for stage in wire.STAGES if wire.FRAME in configs else ():
        configs[stage].max_batch_size = GPU_BATCH
        if configs[stage].HasField("sequence_batching"):
            configs[stage].sequence_batching.oldest.max_candidate_sequences = 2 * GPU_SESSIONS


def checked_preset(preset: str) -> str:
    """A preset's name, or the absolute path of its file. Raises InputError for an unknown name or a missing file."""
    if preset in PRESETS:
        return preset
    if not preset.endswith(".json"):
        raise InputError(f"unknown preset {preset!r}: use tiny, 1.5b or 7b, or the path of a .json file of sizes")
    if not Path(preset).is_file():
        raise InputError(f"preset {preset}: no such file; give tiny, 1.5b or 7b, or the path of a .json file of sizes")
    return str(Path(preset).resolve())


def read_repository(repository: Path = REPOSITORY, topology: str = wire.STAGED) -> Configs:
    """Read the configurations of a topology's models from a repository's files. Raises ServerError."""
    configs = {
        model: read_config(folder_of(model, topology, repository) / "config.pbtxt")
        for model in wire.TOPOLOGIES[topology]
    }
    for model, config in configs.items():
        config.name = model
    return configs


def folder_of(model: str, topology: str, repository: Path = REPOSITORY) -> Path:
    """A model's folder in a repository; the engine is deployed under the name of the entry."""
    return repository / (wire.ENGINE if topology == wire.FUSED and model == wire.ENTRY else model)


def topology_of(entry: model_config_pb2.ModelConfig) -> str:
    """A server's topology, by the configuration of its entry."""
    return wire.FUSED if "max_batch" in entry.parameters else wire.STAGED


def read_config(path: Path) -> model_config_pb2.ModelConfig:
    """Read a config.pbtxt. Raises ServerError where it is missing or not valid protobuf text."""
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except OSError as error:
        raise ServerError(f"no configuration at {path}: is this a model repository? ({error.strerror})") from error
    except text_format.ParseError as error:
        raise ServerError(f"{path} is not a valid Triton configuration: {error}") from error


def write_repository(target: Path, deployment: Deployment, source: Path = REPOSITORY) -> None:
    """Write the repository of a deployment: its configurations, and links to the version folders of ``source``.

    Raises InputError for a deployment with which a server would not start.
    """
    deployment.check()
    for model, config in deployment.served(source).items():
        folder = target / model
        folder.mkdir(parents=True)
        (folder / "config.pbtxt").write_text(text_format.MessageToString(config))
        os.symlink(folder_of(model, deployment.topology, source) / "1", folder / "1")


def as_json(config: model_config_pb2.ModelConfig) -> str:
    """The configuration in the form that Triton's load call accepts."""
    return json_format.MessageToJson(config, preserving_proto_field_name=True, indent=None)


def from_json(text: str) -> model_config_pb2.ModelConfig:
    """Read the configuration that ``as_json`` wrote."""
    return json_format.Parse(text, model_config_pb2.ModelConfig())


def _checked_profile(path: str, preset: str) -> str:
    try:
        profile = read_profile(path)
    except StoreError as error:
        raise InputError(f"cannot read the profile: {error}") from None
    if profile.topology == wire.FUSED:
        raise InputError(
            f"{path} is of the fused topology, which cannot be emulated: estimate the card with --topology staged"
        )
    measured = profile.preset
    if measured != preset_name(preset):
        raise InputError(f"{path} was measured at preset {measured}, not {preset}: profile it, or change the preset")
    return str(Path(path).resolve())


def _set_parameter(configs: Configs, name: str, value: str) -> None:
    model, _, parameter = name.rpartition(".")
    model = model_of(configs, model)
    if model not in configs or parameter not in configs[model].parameters:
        known = sorted(f"{model}.{key}" for model, config in configs.items() for key in config.parameters)
        raise InputError(f"unknown parameter {name!r}: use one of {', '.join(known)}")
    configs[model].parameters[parameter].string_value = as_parameter(name, parameter, value)


def _check_batches(config: model_config_pb2.ModelConfig) -> None:
    scheduler = config.WhichOneof("scheduling_choice")
    most = config.max_batch_size
    if scheduler in ("dynamic_batching", "sequence_batching") and most < 1:
        raise InputError(f"{config.name}: max_batch is {most}: it must be at least 1")
    for group in config.instance_group:
        if group.count < 1:
            raise InputError(f"{config.name}: instances is {group.count}: it must be at least 1")
    for holder in (config.dynamic_batching, config.sequence_batching.oldest):
        for size in holder.preferred_batch_size:
            if not 1 <= size <= most:
                raise InputError(
                    f"{config.name}: preferred_batch {size} must lie in 1 to max_batch, which is {most}: "
                    "lower the one or raise the other"
                )


def _check_engine(given) -> None:
    graphs, most = given["graphs"].string_value, int(given["max_batch"].string_value)
    largest = GPU_BATCH if graphs == wire.AUTO else int(graphs)
    if largest and most > largest:
        raise InputError(
            f"engine.max_batch is {most}, and a step on a GPU takes at most {largest} sessions (`graphs` of "
            f"{wire.ENGINE}): lower the one or raise the other"
        )


def _check_folders(config: model_config_pb2.ModelConfig) -> None:
    given = {
        name: config.parameters[name].string_value for name in ("checkpoint", "voices") if name in config.parameters
    }
    if given.get("voices"):
        voice_files(given["voices"])
    if checkpoint := given.get("checkpoint"):
        if not Path(checkpoint).is_dir():
            raise InputError(f"checkpoint {checkpoint}: no such folder; give the folder of a released checkpoint")
        if not (Path(checkpoint) / "config.json").is_file():
            raise InputError(f"{checkpoint} is not a checkpoint folder: it holds no config.json")


def _check_knob(knob: str, value: KnobValue) -> None:
    if KEY in knob:
        return
    owner, _, name = knob.rpartition(".")
    if owner == ENGINE and name not in ENGINE_KNOBS:
        known = ", ".join(f"{ENGINE}.{each}" for each in ENGINE_KNOBS)
        raise InputError(f"unknown knob {knob!r}: the fused engine has {known}")
    if owner not in _OWNERS or name not in KNOBS:
        known = f"<stage>.<{'|'.join(KNOBS)}> with a stage of {', '.join(_OWNERS)}, or <model>{KEY}<path of a key>"
        raise InputError(f"unknown knob {knob!r}: use {known}")
    lowest = 0 if name in ("delay_us", "preferred_batch") else 1
    most = ENGINE_MOST if owner == ENGINE else _MOST
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= most:
        raise InputError(f"{knob} is {value}: it must be a whole number from {lowest} to {most}")


def _set_knob(config: model_config_pb2.ModelConfig, name: str, value: int) -> None:
    if name == "instances":
        config.instance_group[0].count = value * _gpus_in_count(config)
    elif name == "max_batch" and topology_of(config) == wire.FUSED:
        config.parameters["max_batch"].string_value = str(value)
    elif name == "max_batch":
        _batching(config, name)  # refuses a model that does not batch
        config.max_batch_size = value
    else:
        batching = _batching(config, name)
        if name == "delay_us":
            batching.max_queue_delay_microseconds = value
        else:
            batching.preferred_batch_size[:] = [value] if value else []


def _gpus_in_count(config: model_config_pb2.ModelConfig) -> int:
    """GPUs whose instances the count of a model's instance group holds together; the knob counts those on each.

    On real GPUs Triton starts ``count`` instances on each GPU of the group. Emulated ones are none to Triton: all
    instances of a stage of the frame path are on its CPU, and the stage shares them out among the emulated GPUs.
    """
    given = config.parameters
    if config.name not in wire.STAGES or "emulate" not in given or not given["emulate"].string_value:
        return 1
    return int(given["gpus"].string_value)


def _must_count_on_each_gpu(configs: Configs, knob: str) -> None:
    """Raise InputError for a count that would mean another number of instances on real GPUs than on emulated ones."""
    model, _, path = knob.partition(KEY)
    model = model_of(configs, model)
    if path.startswith("instance_group.") and model in configs and _gpus_in_count(configs[model]) > 1:
        raise InputError(
            f"{knob} would count the instances on all emulated GPUs together, and on real ones those on each: use "
            f"{model}.instances, which always counts those on each"
        )


def _batching(config: model_config_pb2.ModelConfig, knob: str):
    if config.HasField("sequence_batching"):
        return config.sequence_batching.oldest
    if config.HasField("dynamic_batching"):
        return config.dynamic_batching
    raise InputError(f"{config.name} does not batch: it has no {knob}")
