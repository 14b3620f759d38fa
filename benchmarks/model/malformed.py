"""Malformed requests for speech, for stages and for model control, from a seeded generator."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.client.stream import infer_message
from harness.records.schema import Request

EXTREMES = (0, 1, -1, 2, 7, 40_000, 2**31 - 1, -(2**31), 2**40, 2**61, 2**62, 2**62 + 1, -(2**62), 2**63 - 1, -(2**63))
SIZES = {"INT32": 4, "FP32": 4, "INT64": 8, "UINT8": 1, "BOOL": 1, "BYTES": 1}
SCRIPT = "Speaker 1: Good morning, and welcome.\nSpeaker 2: Thank you. It is early."


def request(name: str, script: str = SCRIPT, frames: int = 4, speakers=(0, 0), **more) -> Request:
    return Request(name, "short", script, tuple(speakers), frames, due_ns=time.monotonic_ns(), **more)


def shape_of(numbers: np.random.Generator, honest: Sequence[int]) -> list[int]:
    kind = numbers.integers(5)
    if kind == 0:
        return [int(EXTREMES[numbers.integers(len(EXTREMES))]) for _ in honest]
    if kind == 1:
        return [*honest, int(EXTREMES[numbers.integers(len(EXTREMES))])]
    if kind == 2:
        return []
    if kind == 3:
        shape = list(honest) or [1]
        shape[int(numbers.integers(len(shape)))] = int(EXTREMES[numbers.integers(len(EXTREMES))])
        return shape
    return list(honest)


def text_of(numbers: np.random.Generator) -> bytes:
    kinds = (
        b"", b"\n" * 4_000, b"Speaker 9: x", b"Speaker 1:", b"\xff\xfe\x00", b"[Speaker 1] " * 300, b"a" * 9_000,
        "Speaker 1: \u202e\u0000\x1b[31mred".encode(), b"Speaker 1: =1+1", numbers.bytes(200), SCRIPT.encode(),
    )  # fmt: skip
    return kinds[int(numbers.integers(len(kinds)))]


def broken_input(numbers: np.random.Generator, message: pb.ModelInferRequest) -> None:
    """Damage one input of a message: its shape, content, type or name, or omit or duplicate it."""
    place = int(numbers.integers(len(message.inputs)))
    given, kind = message.inputs[place], numbers.integers(8)
    if kind <= 2:
        shape = shape_of(numbers, given.shape)
        given.shape[:] = shape
        if kind == 2:
            count = max(0, int(np.prod([min(abs(size), 64) for size in shape] or [1])))
            message.raw_input_contents[place] = numbers.bytes(min(count * SIZES.get(given.datatype, 1), 1 << 16))
    elif kind == 3:
        extreme = EXTREMES[int(numbers.integers(len(EXTREMES)))]
        size = SIZES.get(given.datatype, 8)
        message.raw_input_contents[place] = struct.pack("<q", extreme if -(2**63) <= extreme < 2**63 else 0)[:size]
    elif kind == 4:
        given.datatype = ("INT32", "FP32", "BYTES", "UINT8", "INT64", "FP64", "BF16", "", "X")[int(numbers.integers(9))]
    elif kind == 5:
        del message.inputs[place], message.raw_input_contents[place]
    elif kind == 6:
        message.inputs.add().CopyFrom(given)
        message.raw_input_contents.append(message.raw_input_contents[place])
    else:
        message.raw_input_contents[place] = numbers.bytes(int(numbers.integers(64)))


def entry_message(numbers: np.random.Generator) -> pb.ModelInferRequest:
    """A request for speech with up to three faults in it."""
    flags = {"keep": bool(numbers.integers(2)), "until_end": bool(numbers.integers(2))}
    steps = int(numbers.integers(1, 4))  # not the default, which is not sent
    message = infer_message(request(f"r{numbers.integers(9)}", say=(0, 2), diffusion_steps=steps, **flags))
    if numbers.integers(3) == 0:
        text = text_of(numbers)
        message.raw_input_contents[0] = struct.pack("<I", len(text)) + text
    if numbers.integers(12) == 0:
        message.inputs.add(name=wire.DESCRIBE, datatype="BOOL", shape=[1])
        message.raw_input_contents.append(numbers.bytes(1))
    if numbers.integers(6) == 0:
        message.inputs.add(name=wire.CARRY, datatype="UINT8", shape=[64])
        message.raw_input_contents.append(numbers.bytes(64))
    for _ in range(int(numbers.integers(1, 4))):
        if message.inputs:
            broken_input(numbers, message)
    odd_parameters(numbers, message)
    if numbers.integers(8) == 0:
        message.outputs.add(name=("audio_output", "nothing", "")[int(numbers.integers(3))])
    if numbers.integers(16) == 0:
        message.model_version = ("1", "2", "-1", "x" * 300)[int(numbers.integers(4))]
    if numbers.integers(16) == 0:
        message.id = ("\x1b[2J", "x" * 10_000, "\u202e")[int(numbers.integers(3))]
    return message


def odd_parameters(numbers: np.random.Generator, message) -> None:
    names = ("sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "entry_key", "x", "binary_data")
    for name in names:
        if numbers.integers(10):
            continue
        value, parameter = EXTREMES[int(numbers.integers(len(EXTREMES)))], message.parameters[name]
        kind = numbers.integers(4)
        if kind == 0:
            parameter.bool_param = bool(value % 2)
        elif kind == 1:
            parameter.int64_param = value
        elif kind == 2:
            parameter.string_param = str(value)
        else:
            parameter.double_param = float(value)


STAGE_INPUTS = {
    wire.LLM: {wire.SESSION: ("INT32", [1, 4], struct.pack("<4i", 3, 10, 0, 1))},
    wire.VOCODER: {wire.LATENT: ("FP32", [1, 64], bytes(256)), wire.TOKEN: ("INT32", [1, 1], bytes(4))},
    wire.VOICE: {wire.WAVEFORM: ("FP32", [1, 3200], bytes(12_800))},
    wire.DIFFUSION: {
        wire.CONDITION: ("FP32", [1, 2, 64], bytes(512)),
        wire.NOISE: ("FP32", [1, 64], bytes(256)),
        wire.GUIDANCE: ("FP32", [1, 1], bytes(4)),
        wire.STEPS: ("INT32", [1, 1], struct.pack("<i", 3)),
    },
    wire.FRAME: {
        wire.PREVIOUS_LATENT: ("FP32", [1, 64], bytes(256)),
        wire.PREVIOUS_SEMANTIC: ("FP32", [1, 128], bytes(512)),
        wire.NOISE: ("FP32", [1, 64], bytes(256)),
        wire.GUIDANCE: ("FP32", [1, 1], bytes(4)),
        wire.STEPS: ("INT32", [1, 1], struct.pack("<i", 3)),
    },
}
OPTIONAL = {
    wire.LLM: {
        wire.TOKEN_IDS: ("INT32", [1, 3], bytes(12)), wire.VOICE_FRAMES: ("FP32", [1, 64], bytes(256)),
        wire.SAY: ("INT32", [1, 1], bytes(4)), wire.PAST_TOKEN: ("INT32", [1, 1], bytes(4)),
        wire.PAST_LATENT: ("FP32", [1, 64], bytes(256)), wire.PAST_SEMANTIC: ("FP32", [1, 128], bytes(512)),
        wire.LATENT: ("FP32", [1, 64], bytes(256)), wire.SEMANTIC: ("FP32", [1, 128], bytes(512)),
    },
    wire.VOCODER: {wire.STATE: ("FP32", [1, 9], bytes(36))},
}  # fmt: skip


def stage_message(numbers: np.random.Generator, stage: str, session: int | None = None) -> pb.ModelInferRequest:
    """A call of a stage behind the entry, valid or with a fault in it."""
    message = pb.ModelInferRequest(model_name=stage)
    inputs = dict(STAGE_INPUTS[stage])
    inputs |= {name: one for name, one in OPTIONAL.get(stage, {}).items() if numbers.integers(3) == 0}
    for name, (kind, shape, content) in inputs.items():
        message.inputs.add(name=name, datatype=kind, shape=shape)
        message.raw_input_contents.append(content)
    if numbers.integers(2):
        broken_input(numbers, message)
    odd_parameters(numbers, message)
    if stage in (wire.LLM, wire.VOCODER, wire.FRAME):
        message.parameters["sequence_id"].int64_param = (
            int(numbers.integers(1, 1 << 62)) if session is None else session
        )
        message.parameters["sequence_start"].bool_param = bool(numbers.integers(2))
        message.parameters["sequence_end"].bool_param = bool(numbers.integers(4) == 0)
    return message


def control_call(numbers: np.random.Generator) -> tuple[str, object]:
    load = pb.RepositoryModelLoadRequest(model_name=("mine", wire.ENTRY, "../x")[int(numbers.integers(3))])
    load.parameters["config"].string_param = '{"backend": "python"}'
    load.parameters["file:1/model.py"].bytes_param = b"raise SystemExit"
    calls = (
        ("RepositoryModelLoad", load),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=wire.ENTRY)),
        ("RepositoryIndex", pb.RepositoryIndexRequest()),
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=2**62)),
        ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
        ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest()),
        ("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()),
        ("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest()),
        ("CudaSharedMemoryRegister", pb.CudaSharedMemoryRegisterRequest(name="x", raw_handle=b"x", byte_size=2**62)),
        ("TraceSetting", pb.TraceSettingRequest()),
        ("LogSettings", pb.LogSettingsRequest()),
    )
    return calls[int(numbers.integers(len(calls)))]
