"""Requests that are made to break a server, on the real one: it refuses them, and serves everybody else."""

import contextlib
import re
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from conftest import make_request
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import wire
from harness.client.stream import infer_message
from harness.deploy.control import CONTROL_HEADER, has_open_control
from harness.host import keys
from harness.records.schema import Outcome

pytestmark = pytest.mark.server
MANY, NEGATIVE = 1 << 62, -(1 << 63)
OVERFLOWS = [
    *((wire.ENTRY, name, [size], content) for name in (wire.SPEAKER_IDS, wire.SAY) for size, content in (
        (MANY, b""), (NEGATIVE, b""), (-MANY, b""), (MANY + 1, bytes(4)), (NEGATIVE + 2, bytes(8)),
    )),
    *((wire.VOICE, wire.WAVEFORM, [1, size], b"") for size in (MANY, -MANY, NEGATIVE)),
    *((wire.LLM, name, [1, MANY], b"") for name in (wire.TOKEN_IDS, wire.VOICE_FRAMES, wire.SAY, wire.PAST_LATENT)),
    (wire.VOCODER, wire.STATE, [1, MANY], b""),
    (wire.DIFFUSION, wire.CONDITION, [1, 2, 1 << 61], b""),
]  # fmt: skip
SESSION = np.array([[3, 10, 0, 1]], np.int32)
INPUTS = {
    wire.LLM: {wire.SESSION: SESSION},
    wire.VOCODER: {wire.LATENT: np.zeros((1, 64), np.float32), wire.TOKEN: np.ones((1, 1), np.int32)},
    wire.VOICE: {wire.WAVEFORM: np.zeros((1, 3_200), np.float32)},
    wire.DIFFUSION: {
        wire.CONDITION: np.zeros((1, 2, 64), np.float32),
        wire.NOISE: np.zeros((1, 64), np.float32),
        wire.GUIDANCE: np.ones((1, 1), np.float32),
        wire.STEPS: np.full((1, 1), 3, np.int32),
    },
    wire.FRAME: {
        wire.PREVIOUS_LATENT: np.zeros((1, 64), np.float32),
        wire.PREVIOUS_SEMANTIC: np.zeros((1, 128), np.float32),
        wire.NOISE: np.zeros((1, 64), np.float32),
        wire.GUIDANCE: np.ones((1, 1), np.float32),
        wire.STEPS: np.full((1, 1), 3, np.int32),
    },
}
TYPES = {"float32": "FP32", "int32": "INT32"}


def message_to(model, inputs=None, session=0, start=False, end=False):
    message = service_pb2.ModelInferRequest(model_name=model)
    if model == wire.ENTRY:
        message = infer_message(make_request())
    for name, array in (INPUTS.get(model, {}) if inputs is None else inputs).items():
        set_input(message, name, TYPES[array.dtype.name], array.shape, array.tobytes())
    for name, value in (("sequence_start", start), ("sequence_end", end)):
        message.parameters[name].bool_param = value
    if isinstance(session, str):
        message.parameters["sequence_id"].string_param = session
    elif session:
        message.parameters["sequence_id"].int64_param = session % 2**64 - 2**64 * (session % 2**64 >= 2**63)
    return message


def set_input(message, name, kind, shape, content):
    """Give an input this shape and content, in the place of the one that the message has."""
    for i, given in enumerate(message.inputs):
        if given.name == name:
            del message.inputs[i], message.raw_input_contents[i]
            break
    message.inputs.add(name=name, datatype=kind, shape=shape)
    message.raw_input_contents.append(content)


@contextlib.contextmanager
def connected(server):
    with grpc.insecure_channel(server.url) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def answer_to(stub, message, timeout_s=30):
    """The error that a message is answered with, "" where it is served."""
    stream = stub.ModelStreamInfer(iter([message]), timeout=timeout_s)
    said = next(stream).error_message
    stream.cancel()
    return said


def processes(server):
    return {process.pid for process in psutil.Process(server.pid).children(recursive=True)}


@pytest.fixture
def unharmed(triton, speak):
    """The server has the same processes after a test, and speaks."""
    before = processes(triton)
    yield triton
    assert processes(triton) == before
    (result,) = speak(make_request())
    assert (result.outcome, result.error) == (Outcome.DONE, "")


def test_a_shape_whose_bytes_overflow_ends_nobody(unharmed):
    with connected(unharmed) as stub:
        for model, name, shape, content in OVERFLOWS:
            message = message_to(model, session=77 if model in (wire.LLM, wire.VOCODER) else 0, start=True)
            kind = "INT32" if name in (wire.SPEAKER_IDS, wire.SAY, wire.TOKEN_IDS) else "FP32"
            set_input(message, name, kind, shape, content)
            said = answer_to(stub, message)
            expected = "shape that no tensor can have" if model == wire.ENTRY else "accepts calls from"
            assert expected in said, (model, name, shape, said)


@pytest.mark.parametrize("name", [wire.SPEAKER_IDS, wire.SAY])
def test_more_values_than_a_request_can_have_are_refused_before_anything_is_made_of_them(unharmed, name):
    with connected(unharmed) as stub:
        message = message_to(wire.ENTRY)
        set_input(message, name, "INT32", [10_000_000], bytes(40_000_000))
        assert f"{name} has 10000000 values" in answer_to(stub, message)


@pytest.mark.parametrize("model", [wire.LLM, wire.VOCODER, wire.VOICE, wire.DIFFUSION, wire.FRAME])
def test_a_stage_takes_calls_from_its_entry_only(unharmed, model):
    with connected(unharmed) as stub:
        for key in (None, "", "0" * 64, "é"):
            for session, start, end in ((0, False, False), (5, True, False), (5, True, True), ("letters", True, False)):
                if not session and model in (wire.LLM, wire.VOCODER, wire.FRAME):
                    continue
                message = message_to(model, session=session, start=start, end=end)
                if key is not None:
                    message.parameters["entry_key"].string_param = key
                said = answer_to(stub, message)
                assert f"accepts calls from {wire.ENTRY} only" in said
                assert not re.search(r"[0-9a-f]{20}", said)


def test_a_call_with_which_one_client_could_end_the_server_is_closed(unharmed):
    """Unary calls whose client leaves them at the wrong moment: with 2.51 as it is, 200 to 12,000 of them."""
    with connected(unharmed) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(message_to(wire.LLM, session=5, start=True), timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        for i in range(500):
            call = stub.ModelInfer.future(message_to(wire.LLM, session=5, start=True), timeout=0.001 * (1 + i % 5))
            if i % 2:
                call.cancel()
            else:
                call.exception()


def test_an_error_is_not_the_final_response_but_the_stream_ends_soon_after(unharmed):
    """Triton (2.51) never frees a stream that its client leaves, because of the error, after the final response."""
    with connected(unharmed) as stub:
        message = message_to(wire.ENTRY)
        set_input(message, wire.SPEAKER_IDS, "INT32", [1], (99).to_bytes(4, "little"))
        for asked in (False, True):
            message.parameters["triton_enable_empty_final_response"].bool_param = asked
            error, *rest = stub.ModelStreamInfer(iter([message]), timeout=30)
            assert "unknown voice id 99" in error.error_message
            finals = [each.infer_response.parameters["triton_final_response"].bool_param for each in (error, *rest)]
            assert finals == [False, True][: 1 + asked]


def test_sessions_that_others_open_and_leave_hold_nobody(unharmed, speak):
    """More than the stages have places: Triton keeps each until it is ended."""
    with connected(unharmed) as stub:
        for model in (wire.LLM, wire.VOCODER):
            calls = [message_to(model, session=1_000 + i, start=True) for i in range(700)]
            for said in stub.ModelStreamInfer(iter(calls), timeout=60):
                assert "accepts calls from" in said.error_message
        began = time.monotonic()
        (result,) = speak(make_request())
        assert result.outcome is Outcome.DONE and time.monotonic() - began < 10


def test_a_running_session_cannot_be_found_stepped_or_ended(unharmed):
    """Its id is drawn from 2^42, and no answer tells it: an owner's pid does not help to guess."""
    entry = next(p for p in psutil.Process(unharmed.pid).children() if any(wire.ENTRY in word for word in p.cmdline()))
    with connected(unharmed) as stub:
        stream = stub.ModelStreamInfer(iter([infer_message(make_request(frames=150))]), timeout=60)
        told = []
        for count, answer in enumerate(stream):
            assert not answer.error_message
            told.append(str(answer.infer_response.parameters))
            if count < 40:
                for guess in ((entry.pid << 42) + count, (entry.pid << 32) + count, count + 1):
                    for model in (wire.LLM, wire.VOCODER):
                        assert answer_to(stub, message_to(model, session=guess, end=True))
            if answer.infer_response.parameters["triton_final_response"].bool_param:
                break
        assert not any("sequence_id" in each for each in told)


def test_what_changes_a_server_needs_its_key(unharmed):
    load = service_pb2.RepositoryModelLoadRequest(model_name="mine")
    load.parameters["config"].string_param = '{"backend": "python"}'
    load.parameters["file:1/model.py"].bytes_param = b"raise SystemExit"
    calls = {
        "RepositoryModelLoad": load,
        "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest(model_name=wire.ENTRY),
        "RepositoryIndex": service_pb2.RepositoryIndexRequest(),
        "SystemSharedMemoryRegister": service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=1),
        "SystemSharedMemoryUnregister": service_pb2.SystemSharedMemoryUnregisterRequest(),
        "SystemSharedMemoryStatus": service_pb2.SystemSharedMemoryStatusRequest(),
        "CudaSharedMemoryStatus": service_pb2.CudaSharedMemoryStatusRequest(),
        "TraceSetting": service_pb2.TraceSettingRequest(),
        "LogSettings": service_pb2.LogSettingsRequest(),
    }
    wrong = ((CONTROL_HEADER, "0" * 64),)
    with connected(unharmed) as stub:
        for name, request in calls.items():
            for metadata in (None, wrong):
                with pytest.raises(grpc.RpcError) as refused:
                    getattr(stub, name)(request, timeout=10, metadata=metadata)
                assert "restricted" in refused.value.details()
        stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=10, metadata=unharmed.control_headers)


def test_the_key_of_a_server_is_where_only_its_owner_reads(triton):
    key = triton.control_headers[0][1]
    everything = [triton.pid, *processes(triton)]
    assert not any(key in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace") for pid in everything)
    assert keys.control_headers(triton.url) == triton.control_headers
    assert keys.control_headers("127.0.0.1:1") == ()
    shared = [*Path("/dev/shm").glob(f"{triton.shm_prefix}*"), *Path("/dev/shm").glob(f"harness-*-{triton.pid}-*")]
    assert len(shared) > 2 * len(processes(triton))
    shared += [triton.folder, triton.folder / "state.json", triton.log]
    assert [path for path in shared if path.stat().st_mode & 0o077] == []


def test_open_control_is_told_from_closed(triton):
    with grpc.insecure_channel(triton.url) as channel:
        assert not has_open_control(channel)
        assert has_open_control(channel, triton.control_headers)
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        assert not has_open_control(channel, timeout_s=1)


def test_a_server_listens_on_loopback_only_and_not_for_http(triton):
    listening = [c.laddr for c in psutil.Process(triton.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    ports = {int(url.rstrip("/metrics").rpartition(":")[2]) for url in (triton.url, triton.metrics_url)}
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"} and {
        address.port for address in listening
    } == ports
