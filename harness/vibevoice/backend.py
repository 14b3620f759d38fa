"""What the model.py adapters share: parameters, tensors and errors in the form of Triton's Python backend.

Only a Triton stub process can import this module: ``triton_python_backend_utils`` exists nowhere else.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb

from harness import wire
from harness.errors import HarnessError, RequestError, ServerError
from harness.vibevoice import emulation, mending
from harness.vibevoice.parameters import number, parameters

START = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
END = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END

# Where a stage is, and what emulates it. By name: an emulated one must not load torch, of which there may be dozens.
STAGES = {
    wire.LLM: ("llm", "LLMStage", emulation.EmulatedLLM),
    wire.DIFFUSION: ("diffusion", "DiffusionStage", emulation.EmulatedDiffusion),
    wire.VOCODER: ("vocoder", "VocoderStage", emulation.EmulatedVocoder),
    wire.VOICE: ("voice", "VoiceStage", emulation.EmulatedVoice),
}


def check_numpy(version: str = np.__version__) -> None:
    """Raise ServerError where this process has a numpy for which Triton's stub is not built: tensors arrive wrong."""
    if int(version.partition(".")[0]) >= 2:
        place = f"{np.__file__}, with {sys.prefix} as the environment of the stub"
        raise ServerError(
            f"numpy {version} ({place}) gives wrong tensors in Triton's Python stub, which is built for numpy 1: "
            "pip install 'numpy<2' in the environment whose python3 is first on the server's PATH"
        )


def stage(args: dict):
    """The stage that a model's config asks for: on the device of this instance, or emulated with a profile's times."""
    check_numpy()
    built = _build(args)
    settle()
    mending.attend(args, load_model)
    return built


def settle() -> None:
    """Hide what there is now from the garbage collector: to look through a model takes it a tenth of a second."""
    gc.collect()
    gc.freeze()


def load_model(model: str, config: str) -> None:
    """Have this server load a model with this configuration (JSON). Raises where it cannot."""
    pb.load_model(model, config=config)


def _build(args: dict):
    given, model = parameters(args), args["model_name"]
    module, name, emulated = STAGES[model]
    limits = (number(given, "kv_limit_bytes", 1),) if model == wire.LLM else ()
    if given.get("emulate"):
        return emulated(emulation.Profile(given["emulate"]), _emulated_gpu(args, int(given["gpus"])), *limits)
    return getattr(import_module(f"harness.vibevoice.{module}"), name)(weights(args), *limits)


def weights(args: dict):
    """The weights that the config asks for, on the device of this instance, in a process made ready to compute."""
    import_module("harness.vibevoice.process").prepare()
    given = parameters(args)
    on_gpu = args["model_instance_kind"] == "GPU"
    device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
    presets = import_module("harness.vibevoice.presets")
    return presets.Weights(given["preset"], int(given["weights_seed"]), given.get("checkpoint", ""), device)


def _emulated_gpu(args: dict, gpus: int) -> emulation.EmulatedGPU:
    """Instance k of a stage is on GPU k; the GPU's file lies beside the models, and goes with them."""
    instance = int(args["model_instance_name"].rpartition("_")[2])
    return emulation.EmulatedGPU(Path(args["model_repository"]).parent / f"gpu-{instance % gpus}")


def tensor(array: np.ndarray):
    """What a stage computes on: a torch tensor, or the array itself in a process without torch."""
    torch = sys.modules.get("torch")
    return array if torch is None else torch.from_numpy(array)


def optional(request, name: str) -> np.ndarray | None:
    found = pb.get_input_tensor_by_name(request, name)
    return None if found is None else found.as_numpy()


def rows(requests: list, name: str):
    """One input of many single-row requests as one batch, as ``tensor`` makes it: [N, …]."""
    arrays = [pb.get_input_tensor_by_name(r, name).as_numpy() for r in requests]
    if any(len(array) != 1 for array in arrays):  # the answers to the others would go astray
        raise RequestError(f"{name} has several rows: ask for one at a time, the server makes the batches")
    return tensor(np.concatenate(arrays))


def response(**tensors):
    """The answer to one request: torch tensors or arrays by the names of the outputs."""
    return pb.InferenceResponse(output_tensors=[pb.Tensor(name, np.asarray(value)) for name, value in tensors.items()])


def responses(**tensors) -> list:
    """The answers to a batch of requests, a row of each output for each: torch tensors or arrays by their names."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}  # once: a slice of a tensor costs more
    count = len(next(iter(arrays.values())))
    return [response(**{name: array[i : i + 1] for name, array in arrays.items()}) for i in range(count)]


def failure(error: Exception):
    return pb.InferenceResponse(error=pb.TritonError(error_text(error)))


def error_text(error: Exception) -> str:
    """A user's mistake as it is worded; anything else with its type, so that the log can be searched for it."""
    return str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"


def answer_each(requests: list, answer: Callable) -> list:
    """One response per request; an error in one leaves the others alone."""
    responses = []
    for request in requests:
        try:
            responses.append(answer(request))
        except Exception as error:
            responses.append(failure(error))
    return responses


def answer_together(requests: list, answer_batch: Callable) -> list:
    """All requests in one batch; if that fails, each alone, so that a broken one fails by itself."""
    if not requests:
        return []
    try:
        return answer_batch(requests)
    except Exception:
        return answer_each(requests, lambda request: answer_batch([request])[0])
