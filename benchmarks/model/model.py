"""The served model: prompts as the entry builds them, and the free part of its KV cache, as reported by a server."""

from __future__ import annotations

import contextlib
import re

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import wire
from harness.deploy.server import TritonServer
from harness.errors import ServerError
from harness.host import keys
from harness.records.schema import Request
from harness.vibevoice.entry.prompt import PromptBuilder
from harness.vibevoice.entry.tokenizer import tokenizer_for
from harness.vibevoice.entry.voices import frames_of, load_voices
from harness.vibevoice.stages.configuration import ModelConfig, preset_config

_CORRELATION_ID = 7  # of no session: those of an entry begin with its process id
_FREE = re.compile(r"([\d.e+]+) MiB of [\d.e+]+ MiB are free")
_BYTES_PER_VALUE = 4  # float32, on a CPU


def prompt_builder(config: ModelConfig, checkpoint: str = "", voices: str = "") -> PromptBuilder:
    """The prompt builder of a model; ``voices`` is a folder, or "" for the synthetic voices."""
    frames = {voice: frames_of(samples) for voice, samples in load_voices(voices).items()}
    return PromptBuilder(config, tokenizer_for(config, checkpoint), frames)


def prompt_tokens(prompts: PromptBuilder, request: Request) -> int:
    """Tokens of a request's prompt, including the frames of its voices."""
    checked = prompts.request(request.script.encode(), request.speaker_ids, {wire.FRAMES: request.frames})
    return len(checked.prompt.token_ids)


def bytes_per_position(preset: str) -> int:
    """KV cache of one position of one branch: keys and values of every layer and KV head, in float32."""
    text = preset_config(preset).text_config
    head_size = text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head_size * _BYTES_PER_VALUE


def session_bytes(preset: str, prompt_tokens: int, frames: int) -> int:
    """KV cache bytes of a session: prompt, "speech begin" in both branches, and twice the frames."""
    return (prompt_tokens + 2 + 2 * frames) * bytes_per_position(preset)


def kv_limit_bytes(server: TritonServer) -> int:
    return min(stage.kv_limit_bytes for stage in server.stages if stage.model == wire.LLM)


def free_mib(server: TritonServer) -> float:
    """Free KV cache by the LLM stage's own count, in MiB: it rejects a session of the limit's size with what is free.

    If nothing is held the session is admitted, and closed at once. One instance of the stage is asked.
    """
    limit_bytes = kv_limit_bytes(server)
    rows = limit_bytes // bytes_per_position(server.deployment.preset)
    prompt_tokens = 1 + (rows - 3) % 2
    session = [prompt_tokens, (rows - 2 - prompt_tokens) // 2, 0, 1]
    with contextlib.closing(grpc.insecure_channel(server.url)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            error = _ask(stub, _message(session, start=True, pid=server.pid))
        finally:
            _ask(stub, _message(session, start=False, pid=server.pid))
    if not error:
        return limit_bytes / 2**20
    found = _FREE.search(error)
    if not found:
        raise ServerError(f"the LLM stage does not report its free memory: {error}")
    return float(found.group(1))


def _ask(stub: service_pb2_grpc.GRPCInferenceServiceStub, message: service_pb2.ModelInferRequest) -> str:
    """Send one call in a stream of its own, as servers have no other; returns its error, "" for none."""
    try:
        return "".join(answer.error_message for answer in stub.ModelStreamInfer(iter([message]), timeout=10))
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"


def _message(session: list[int], start: bool, pid: int) -> service_pb2.ModelInferRequest:
    """Open a session with one prompt token of its prompt, or close it."""
    message = service_pb2.ModelInferRequest(model_name=wire.LLM)
    inputs = {
        wire.SESSION: ("INT32", np.array([session], np.int32)),
        wire.TOKEN_IDS: ("INT32", np.zeros((1, 1), np.int32)),
        wire.VOICE_FRAMES: ("FP32", np.zeros((1, 0), np.float32)),
    }
    for name, (datatype, values) in inputs.items():
        message.inputs.add(name=name, datatype=datatype, shape=values.shape)
        message.raw_input_contents.append(values.tobytes())
    message.parameters[keys.STAGE_PARAMETER].string_param = keys.shared_key(keys.stage_key_file(keys.server_mark(pid)))
    message.parameters["sequence_id"].int64_param = _CORRELATION_ID
    message.parameters["sequence_start"].bool_param = start
    message.parameters["sequence_end"].bool_param = not start
    return message
