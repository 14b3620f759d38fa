"""Parameters, tensors and errors in the form of Triton's Python backend, shared by the model.py adapters.

Only a Triton stub process can import this module: ``triton_python_backend_utils`` exists nowhere else.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb

from harness import gpu_memory, identity, wire
from harness.clock import Clock
from harness.errors import HarnessError, InputError, RequestError, ServerError
from harness.host import places, provenance
from harness.host.process_group import reap_children
from harness.identity import StageIdentity
from harness.server_metrics import HISTOGRAM, ServerMetric
from harness.vibevoice.process import kv_limits, restarts, shapes
from harness.vibevoice.process.exporter import CountedHistogram, Exporter, Source, session_readings
from harness.vibevoice.process.instances import instance_name
from harness.vibevoice.process.parameters import number, parameters
from harness.vibevoice.profiling import emulation

START = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
END = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END

# The module of each stage, and of its emulation, by name: the many processes of emulated stages must not load torch.
STAGES = {
    wire.LLM: ("llm", "LLMStage", emulation.EmulatedLLM),
    wire.DIFFUSION: ("diffusion", "DiffusionStage", emulation.EmulatedDiffusion),
    wire.VOCODER: ("vocoder", "VocoderStage", emulation.EmulatedVocoder),
    wire.VOICE: ("voice_encoder", "VoiceStage", emulation.EmulatedVoice),
}
_exporters: list[Exporter] = []  # of this process


def check_numpy(version: str = np.__version__) -> None:
    """Raise ServerError where this process has a numpy for which Triton's stub is not built: it corrupts tensors."""
    if int(version.partition(".")[0]) >= 2:
        place = f"{np.__file__}, with {sys.prefix} as the environment of the stub"
        raise ServerError(
            f"numpy {version} ({place}) gives wrong tensors in Triton's Python stub, which is built for numpy 1: "
            "pip install 'numpy<2' in the environment whose python3 is first on the server's PATH"
        )


def begin() -> None:
    """Make this process safe for the tensors of any request. Call it before anything else of ``pb``."""
    check_numpy()
    reap_children()
    shapes.guard(lambda: pb.Tensor("first", np.zeros(1, np.float32)).as_numpy())


def stage(args: dict):
    """The stage that a model's config asks for: on the device of this instance, or emulated with a profile's times."""
    begin()
    built = _build(args)
    owner = args["model_name"], instance_name(args)
    if hasattr(built, "sessions"):
        export(owner, partial(session_readings, built, owner))
    settle()
    restarts.attend(args, load_model, identity_of(args, built))
    return built


def export(owner: tuple[str, str], *sources: Source) -> None:
    """Export what ``sources`` read to this server's Prometheus page, if it has one; ``owner``: model and process."""
    exporter = Exporter(sources, _family, owner)
    try:
        exporter.update()
    except pb.TritonModelException as error:
        print(f"nothing of {owner[0]} is exported to the server's metrics page: {error}", flush=True)
    else:
        exporter.keep_updated()
        _exporters.append(exporter)


def close() -> None:
    """End what a model exports: call it when the model is unloaded."""
    for exporter in _exporters:
        try:
            exporter.close()
        except pb.TritonModelException as error:
            print(f"the last metrics of this process are lost: {error}", flush=True)


def _family(metric: ServerMetric):
    if metric.kind == HISTOGRAM and not hasattr(pb.MetricFamily, "HISTOGRAM"):
        return CountedHistogram(metric, partial(pb.MetricFamily, kind=pb.MetricFamily.COUNTER))
    kind = getattr(pb.MetricFamily, metric.kind.upper())
    return pb.MetricFamily(name=metric.name, description=metric.about, kind=kind)


def settle() -> None:
    """Hide all current objects from the garbage collector: scanning a model takes it a tenth of a second."""
    gc.collect()
    gc.freeze()


def load_model(model: str, config: str) -> None:
    """Make this server load a model with this configuration (JSON). Raises where it cannot."""
    pb.load_model(model, config=config)


def _build(args: dict):
    given, model = parameters(args), args["model_name"]
    module, name, emulated = STAGES[model]
    if given.get("emulate"):
        profile = emulation.ProfiledTimes(given["emulate"])
        room = (_emulated_kv_room(args, profile),) if model == wire.LLM else ()
        return emulated(profile, _emulated_gpu(args, int(given["gpus"])), *room)
    of_stage = weights(args)
    room = (kv_room(args, of_stage),) if model == wire.LLM else ()
    return getattr(import_module(f"harness.vibevoice.stages.{module}"), name)(of_stage, *room)


def weights(args: dict):
    """The weights that the config asks for, on the device of this instance; also prepares the process to compute."""
    device, given = device_of(args), parameters(args)
    import_module("harness.vibevoice.process.setup").prepare(device)
    presets = import_module("harness.vibevoice.stages.presets")
    return presets.Weights(
        given["preset"], int(given["weights_seed"]), given.get("checkpoint", ""), device,
        dtype=given.get("dtype", presets.AUTO), graph_batch=_graph_batch(given),
    )  # fmt: skip


def _graph_batch(given: dict[str, str]) -> int | None:
    """The parameter as a number; None for ``auto``. Raises InputError for any other text."""
    return None if given.get("graphs", wire.AUTO) == wire.AUTO else int(number(given, "graphs"))


def device_of(args: dict) -> str:
    """The device of an instance as torch names it.

    Raises InputError where it is not the one that the config asks for, or torch cannot use it: otherwise a stage that
    falls back to the CPU would be measured as a GPU.
    """
    asked, kind = parameters(args).get("device", identity.AUTO), args["model_instance_kind"]
    given = identity.GPU if kind == "GPU" else identity.CPU
    if asked not in (identity.AUTO, given):
        raise InputError(
            f"{args['model_name']} must run on a {asked}, but Triton gave it a {given}: set its instance_group to "
            f"KIND_{asked.upper()}, and check with `harness doctor` whether Triton finds the GPU"
        )
    if given == identity.CPU:
        return "cpu"
    index, cuda = int(args["model_instance_device_id"]), import_module("torch").cuda
    if not cuda.is_available() or index >= cuda.device_count():
        raise InputError(
            f"{args['model_name']} must run on GPU {index}, but torch {provenance.versions().get('torch')} finds "
            f"{cuda.device_count() if cuda.is_available() else 'none'}: install a CUDA build of torch that supports "
            "this driver (a CPU build sees no GPU)"
        )
    return f"cuda:{index}"


def kv_room(args: dict, of_stage, tables_bytes: int = 0) -> int:
    """Bytes for the KV caches of this instance: as configured, otherwise what its GPU has left beside the weights."""
    if (given := kv_limits.given_limit(parameters(args))) is not None:
        return given
    if of_stage.device.type != "cuda":
        return kv_limits.HOST_BYTES
    instances, counts = kv_limits.instances_on_a_gpu(args["model_config"]), of_stage.parameters()
    fused = args["model_name"] == wire.ENTRY
    own = sum(counts.values()) - counts["voice"] if fused else counts["llm"]
    numbers = sum(counts.values()) + (instances - 1) * own
    total = import_module("torch").cuda.mem_get_info(of_stage.device)[1]
    processes = gpu_memory.FUSED_PROCESSES if fused else gpu_memory.STAGED_PROCESSES
    taken = numbers * of_stage.dtype.itemsize + instances * tables_bytes
    return gpu_memory.gpu_room(total, taken, instances, of_stage.graph_batch, processes)


def _emulated_kv_room(args: dict, profile: emulation.ProfiledTimes) -> int:
    """As configured, otherwise what the profile says the GPU had left, shared by the instances on one emulated GPU."""
    given = parameters(args)
    if (limit := kv_limits.given_limit(given)) is not None:
        return limit
    on_a_gpu = -(-kv_limits.instances_on_a_gpu(args["model_config"]) // int(given["gpus"]))
    return (profile.sizes.kv_room_bytes or kv_limits.HOST_BYTES) // on_a_gpu


def identity_of(args: dict, built=None) -> StageIdentity:
    """What this process computes with; without a stage, the identity of the entry."""
    given = parameters(args)
    about = {
        "model": args["model_name"],
        "instance": instance_name(args),
        "code": str(places.CODE),
        "code_digest": provenance.code_digest(),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
    }
    if built is None:
        return StageIdentity(kind=identity.CPU, device="cpu", **about)
    about |= {
        "preset": given["preset"],
        "weights": given.get("checkpoint") or f"random, seed {given['weights_seed']}",
        "graphs": max(graphs.batches, default=0) if (graphs := getattr(built, "graphs", None)) else 0,
        "kv_limit_bytes": getattr(built, "kv_limit_bytes", 0),
        "kv_bytes_per_token": getattr(built, "kv_bytes_per_token", 0),
    }
    return StageIdentity(**about, **_computes_on(built))


def _computes_on(built) -> dict:
    if profile := getattr(built, "profile", None):
        name = f"emulated {profile.device_name}"
        return {"kind": identity.EMULATED, "device": name, "dtype": profile.dtype}
    on, dtype = built.device, str(built.dtype).removeprefix("torch.")
    if on.type != "cuda":
        return {"kind": identity.CPU, "device": "cpu", "dtype": dtype}
    gpu = import_module("torch").cuda.get_device_properties(on)
    return {
        "kind": identity.GPU,
        "device": str(on),
        "gpu": gpu.name,
        "gpu_uuid": f"GPU-{gpu.uuid}",
        "gpu_memory_bytes": gpu.total_memory,
        "dtype": dtype,
    }


def _emulated_gpu(args: dict, gpus: int) -> emulation.EmulatedGPU:
    """The emulated GPU of an instance: instance k is on GPU k. The GPU's file is stored beside the models."""
    instance = int(args["model_instance_name"].rpartition("_")[2])
    file = Path(args["model_repository"]).parent / f"gpu-{instance % gpus}"
    return emulation.EmulatedGPU(file, Clock.of(parameters(args).get(wire.DILATION, "")))


def tensor(array: np.ndarray):
    """The input type of a stage: a torch tensor, or the array itself in a process without torch."""
    torch = sys.modules.get("torch")
    return array if torch is None else torch.from_numpy(array)


def optional(request, name: str) -> np.ndarray | None:
    """An input, None where the request leaves it out. Raises RequestError for an impossible shape."""
    found = pb.get_input_tensor_by_name(request, name)
    if found is None:
        return None
    array = found.as_numpy()
    if shapes.is_impossible(array):
        raise RequestError(f"{name} has a shape that no tensor can have: send the sizes of its content")
    return array


def given(request, name: str) -> np.ndarray:
    """A required input. Raises RequestError where it is missing, which Triton (2.51) does not always detect."""
    found = optional(request, name)
    if found is None:
        raise RequestError(f"the request has no {name}: send it")
    return found


def rows(requests: list, name: str):
    """One input of many single-row requests as one batch, as ``tensor`` makes it: [N, …]."""
    arrays = [given(r, name) for r in requests]
    if any(len(array) != 1 for array in arrays):  # otherwise responses would be matched to the wrong requests
        raise RequestError(f"{name} has several rows: send one per request, the server makes the batches")
    return tensor(np.concatenate(arrays))


def response(**tensors):
    """The response to one request: torch tensors or arrays by the names of the outputs."""
    return pb.InferenceResponse(output_tensors=[pb.Tensor(name, np.asarray(value)) for name, value in tensors.items()])


def responses(**tensors) -> list:
    """The responses to a batch of requests, one row of each output per request: torch tensors or arrays by name."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}  # once: slicing a tensor costs more
    count = len(next(iter(arrays.values())))
    return [response(**{name: array[i : i + 1] for name, array in arrays.items()}) for i in range(count)]


def failure(error: Exception):
    return pb.InferenceResponse(error=pb.TritonError(error_text(error)))


def error_text(error: Exception) -> str:
    """The message of a user's mistake; any other error with its type, so that the log can be searched for it."""
    return str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"


def answer_each(requests: list, answer: Callable) -> list:
    """One response per request; an error in one does not affect the others."""
    responses = []
    for request in requests:
        try:
            responses.append(answer(request))
        except Exception as error:
            responses.append(failure(error))
    return responses


def answer_together(requests: list, answer_batch: Callable) -> list:
    """Answer all requests in one batch; if that fails, each alone, so that only the faulty one fails."""
    if not requests:
        return []
    try:
        return answer_batch(requests)
    except Exception:
        return answer_each(requests, lambda request: answer_batch([request])[0])
