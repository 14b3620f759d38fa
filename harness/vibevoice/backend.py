"""What the model.py adapters share: parameters, tensors and errors in the form of Triton's Python backend.

Only a Triton stub process can import this module: ``triton_python_backend_utils`` exists nowhere else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Callable

import numpy as np
import torch
import triton_python_backend_utils as pb

from harness.errors import HarnessError
from harness.vibevoice.presets import Weights

START = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
END = pb.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END


def parameters(args: dict) -> dict[str, str]:
    """The string parameters of the model's config.pbtxt."""
    config = json.loads(args["model_config"])
    return {name: value["string_value"] for name, value in config.get("parameters", {}).items()}


def weights(args: dict) -> Weights:
    """The weights that the config asks for, on the device of this instance; one CPU thread per instance."""
    _keep_freed_memory()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    on_gpu = args["model_instance_kind"] == "GPU"
    device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
    given = parameters(args)
    return Weights(given["preset"], int(given["weights_seed"]), given.get("checkpoint", ""), device)


def _keep_freed_memory() -> None:
    """A stage frees and takes the same large buffers at every step: kept by glibc, they cost no page faults."""
    m_trim_threshold, m_mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 32 << 20)  # the largest that glibc takes
        mallopt(m_trim_threshold, (1 << 31) - 1)


def optional(request, name: str) -> np.ndarray | None:
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def rows(requests: list, name: str) -> torch.Tensor:
    """One input of many single-row requests as one batch: [N, …]."""
    return torch.from_numpy(np.concatenate([pb.get_input_tensor_by_name(r, name).as_numpy() for r in requests]))


def response(**tensors: torch.Tensor | np.ndarray):
    return pb.InferenceResponse(output_tensors=[pb.Tensor(name, np.asarray(value)) for name, value in tensors.items()])


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
