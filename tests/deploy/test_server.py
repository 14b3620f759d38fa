"""The real Triton server with the real ensemble: faithful audio, clear errors, nothing left behind."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch
from conftest import make_request, still_running
from stage_speaker import Speaker
from tritonclient.grpc import service_pb2_grpc

from harness import wire
from harness.cli import doctor
from harness.client.stream import SpeechClient, infer_message
from harness.client.target import Target
from harness.deploy.config import Deployment
from harness.deploy.distribution import find_distribution
from harness.deploy.external import RemoteTriton
from harness.deploy.ports import free_ports
from harness.deploy.running import local_url, local_urls
from harness.deploy.server import TritonServer
from harness.deploy.statistics import StatisticsReader, difference
from harness.errors import InputError, ServerError
from harness.host.places import CODE
from harness.identity import Requested
from harness.records.schema import Outcome
from harness.vibevoice.entry.prompt import PromptBuilder
from harness.vibevoice.entry.tokenizer import tokenizer_for
from harness.vibevoice.entry.voices import frames_of, load_voices
from harness.vibevoice.stages.presets import Weights
from harness.vibevoice.stages.voice_encoder import VoiceStage

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
REAL_SCRIPTS = sorted((ROOT.parent / "shared" / "data" / "scripts").glob("*.txt"))


def snapshot(url):
    reader = StatisticsReader(url)
    try:
        return reader.snapshot()
    finally:
        reader.close()


def counts(url):
    return {stage.stage: stage for stage in snapshot(url)}


def audio_of(request, weights):
    """What the stages give for a request in one process, without Triton."""
    voices = load_voices()
    prompts = PromptBuilder(weights.config, tokenizer_for(weights.config), {v: frames_of(s) for v, s in voices.items()})
    checked = prompts.request(request.script.encode(), request.speaker_ids, {wire.FRAMES: request.frames})
    encoder = VoiceStage(weights)
    frames = [encoder.encode(torch.tensor(voices[voice])) for voice in checked.prompt.voices]
    speaker = Speaker(weights)
    voice_frames = torch.cat(frames) if frames else torch.empty(0, wire.LATENT_SIZE)
    speaker.open(1, torch.tensor(checked.prompt.token_ids), request.frames, voice_frames)
    noise = np.random.default_rng(request.seed)
    for _ in range(request.frames):
        speaker.step({1: torch.tensor(noise.standard_normal(wire.LATENT_SIZE, np.float32))})
    return torch.cat(speaker.audio[1]).numpy()


def test_sessions_that_share_the_server_get_the_audio_of_the_stages_alone(speak):
    requests = [
        make_request("a", "Speaker 1: One voice alone.", (1,), 30, seed=1),
        make_request("b", "Speaker 1: Two of us.\nSpeaker 2: Yes, two.", (2, 0), 9, seed=2, chunk_frames=4),
        make_request("c", "[SPEAKER_A] Nobody gave me a voice.", (0,), 17, seed=3),
        make_request("d", "\n".join(f"Speaker {n}: I am {n}." for n in (1, 2, 3, 4)), (4, 3, 2, 1), 21, seed=4),
    ]
    pieces = [[] for _ in requests]
    results = speak(*requests, on_audio=lambda i: pieces[i].append)
    assert [r.outcome for r in results] == [Outcome.DONE] * 4
    assert results[1].chunks.samples.tolist() == [4 * 3200, 4 * 3200, 3200]
    weights = Weights("tiny", seed=0)
    for request, piece in zip(requests, pieces, strict=True):
        heard = np.frombuffer(b"".join(piece), "<f4")
        np.testing.assert_allclose(heard, audio_of(request, weights), atol=1e-4)


@pytest.mark.skipif(not REAL_SCRIPTS, reason="no real scripts beside the repository")
def test_real_scripts_give_exactly_the_frames_they_ask_for(speak):
    texts = [path.read_text() for path in REAL_SCRIPTS]
    results = speak(*(make_request(f"r{i}", text, (1, 2, 3, 4), 40 + i) for i, text in enumerate(texts)))
    assert [(r.outcome, r.error) for r in results] == [(Outcome.DONE, "")] * len(texts)
    assert [int(r.chunks.samples.sum()) for r in results] == [(40 + i) * 3200 for i in range(len(texts))]


def test_chunks_arrive_while_the_rest_is_being_made(speak):
    (result,) = speak(make_request(frames=40))
    received, sent = result.chunks.received_ns, result.chunks.sent_at_ns
    assert len(result.chunks) == 40
    assert (np.diff(sent) > 0).all() and (received >= sent).all()
    assert received[0] < sent[-1]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request(script=""), "empty"),
        (make_request(script="Speaker 5: Hi", speakers=(1, 1, 1, 1, 1)), "4"),
        (make_request(script="Speaker 1:"), "no text"),
        (make_request(speakers=(7,)), "unknown voice id 7"),
        (make_request(frames=0), "1 to 40500"),
        (make_request(frames=40_501), "40500"),
        (make_request(script="word " * 70_000), "65536"),
        (make_request(frames=40_000, start_frame=501), "40501"),
    ],
)
def test_a_bad_request_gets_one_clear_error_while_others_are_served(speak, request_, message):
    bad, good = speak(request_, make_request(frames=3))
    assert bad.outcome is Outcome.ERROR and message in bad.error
    assert "Traceback" not in bad.error and "model.py" not in bad.error
    assert good.outcome is Outcome.DONE


def answer_to(url, message):
    """The first answer to a message that our client, which knows better, would not send."""
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return next(stub.ModelStreamInfer(iter([message]), timeout=30)).error_message


def test_bytes_that_are_not_utf8_are_refused_by_the_server(triton):
    message = infer_message(make_request(script="abcd"))
    message.raw_input_contents[0] = b"\x04\x00\x00\x00\xff\xfe\xfa\xfb"
    assert "UTF-8" in answer_to(triton.url, message)


@pytest.mark.parametrize("place, name", [(0, wire.TEXT_INPUT), (1, wire.SPEAKER_IDS)])
def test_an_input_that_is_left_out_is_named(triton, place, name):
    message = infer_message(make_request())
    del message.inputs[place], message.raw_input_contents[place]
    assert f"the request has no {name}" in answer_to(triton.url, message)


def add_input(message, name, datatype, array):
    message.inputs.add(name=name, datatype=datatype, shape=array.shape)
    message.raw_input_contents.append(array.tobytes())


def test_a_client_that_leaves_stops_its_session(triton):
    async def leave_after(chunks):
        async with SpeechClient(triton.url) as client:
            stream = client.open(make_request(frames=30_000), "closed", on_chunk=lambda s, *_: stop_at(s, chunks))
            return await stream.run()

    def stop_at(stream, chunks):
        if len(stream._received) == chunks:
            stream.stop(Outcome.CANCELLED)

    result = asyncio.run(leave_after(10))
    assert result.outcome is Outcome.CANCELLED and len(result.chunks) >= 10
    deadline, steps = time.monotonic() + 30, [-1, 0]
    while steps[-1] != steps[-2]:
        assert time.monotonic() < deadline, steps  # all its frames would take longer
        time.sleep(0.5)
        steps.append(counts(triton.url)[wire.LLM].requests)


def test_stages_batch_frames_of_different_sessions(triton, speak):
    before = snapshot(triton.url)
    results = speak(*(make_request(f"s{i}", frames=20, seed=i) for i in range(8)))
    assert all(r.outcome is Outcome.DONE for r in results)
    window = {stage.stage: stage for stage in difference(snapshot(triton.url), before)}
    for stage in wire.STAGES:
        assert window[stage].executions < window[stage].requests  # some executions held several sessions
        assert sum(b.batch_size * b.executions for b in window[stage].batches) == window[stage].requests
    assert window[wire.DIFFUSION].requests == 8 * 20


def test_a_reload_changes_one_stage_and_the_server_goes_on(triton, speak):
    slow = Deployment(knobs={"diffusion_decoder.delay_us": 20_000, "diffusion_decoder.instances": 2})
    try:
        assert triton.reload(slow) == [wire.DIFFUSION]
        (result,) = speak(make_request(frames=5))
        assert result.outcome is Outcome.DONE
        assert counts(triton.url)[wire.DIFFUSION].queue_ns > 5 * 15e6  # each frame waited for company
    finally:
        assert triton.reload(Deployment()) == [wire.DIFFUSION]


@pytest.mark.parametrize("stage, survives", [(wire.DIFFUSION, True), (wire.LLM, False)])
def test_what_a_reload_does_to_running_sessions(triton, stage, survives):
    """A stage without state changes under them; one with their state ends them in words and serves the next."""

    async def main():
        async with SpeechClient(triton.url) as client:
            stream = client.open(make_request(frames=30_000, chunk_frames=5), "closed")
            speaking = asyncio.create_task(stream.run())
            while len(stream._received) <= 5:
                await asyncio.sleep(0.01)
            reloaded = await asyncio.to_thread(triton.reload, Deployment(knobs={f"{stage}.delay_us": 10}))
            await asyncio.wait([speaking], timeout=1.0 if survives else 60)
            assert reloaded == [stage] and speaking.done() is not survives
            stream.stop(Outcome.CANCELLED)
            return await speaking, await client.speak(make_request(frames=5), "closed")

    try:
        first, second = asyncio.run(main())
    finally:
        triton.reload(Deployment())
    assert first.outcome is (Outcome.CANCELLED if survives else Outcome.ERROR) and len(first.chunks) > 5
    assert survives or f"{stage} ended while it served this session" in first.error and "retry" in first.error
    assert second.outcome is Outcome.DONE


def test_every_process_of_a_server_says_what_it_runs_on(triton):
    triton.identify()
    assert sorted(stage.model for stage in triton.stages) == sorted(set(wire.MODELS) - {wire.FRAME})
    for stage in triton.stages:
        assert (stage.kind, stage.device, stage.code, bool(stage.code_digest)) == ("cpu", "cpu", str(CODE), True)
        assert stage.versions["torch"]
        assert stage.model == wire.ENTRY or (stage.dtype, stage.preset) == ("float32", "tiny")
    (llm,) = (stage for stage in triton.stages if stage.model == wire.LLM)
    assert (llm.kv_limit_bytes, llm.kv_bytes_per_token) == (8 << 30, 512)
    with pytest.raises(ServerError, match="nothing is measured .*kind gpu was requested"):
        RemoteTriton(triton.url, Requested("tiny", "gpu")).__enter__()
    checks = {check.what: check for check in doctor.examine(ROOT, Target.of(triton.url))}
    told, control = checks[f"stages of {triton.url}"], checks[f"model control of {triton.url}"]
    assert (control.fine, control.found) == (True, "closed")
    assert (told.fine, told.found) == (True, "staged, cpu, float32, preset tiny")


def test_another_triton_is_used_as_it_is_found(triton):
    with RemoteTriton(f"grpc://{triton.url}", Requested("tiny")) as remote:
        assert remote.reload(Deployment()) == []
        assert remote.reload(Deployment(knobs={"diffusion_decoder.delay_us": 700})) == [wire.DIFFUSION]
        delay = remote.loaded[wire.DIFFUSION].dynamic_batching.max_queue_delay_microseconds
    assert delay == 700 and triton.alive()
    with RemoteTriton(triton.url, Requested("tiny")) as remote:  # what was turned was put back
        assert remote.found[wire.DIFFUSION].dynamic_batching.max_queue_delay_microseconds == 0
    with pytest.raises(ServerError, match="serves preset tiny"), RemoteTriton(triton.url, Requested("7b")):
        pass
    with pytest.raises(ServerError, match="no Triton"), RemoteTriton("127.0.0.1:1", Requested("tiny")):
        pass
    swept = RemoteTriton(triton.url, Requested("tiny"), topologies=("staged", "fused"))
    with pytest.raises(InputError, match="serves the staged topology, and the plan asks for the fused one"), swept:
        pass


def test_what_a_killed_sweep_left_in_another_triton_is_put_back_by_the_next(triton, tmp_path):
    keep = tmp_path / "found"
    killed = RemoteTriton(triton.url, Requested("tiny"), keep=keep).__enter__()
    killed.reload(Deployment(knobs={"diffusion_decoder.delay_us": 700}))
    with RemoteTriton(triton.url, Requested("tiny"), keep=keep) as remote:
        assert remote.loaded[wire.DIFFUSION].dynamic_batching.max_queue_delay_microseconds == 700
        assert remote.found[wire.DIFFUSION].dynamic_batching.max_queue_delay_microseconds == 0
        assert remote.reload(Deployment()) == [wire.DIFFUSION]
    assert not keep.exists()
    with RemoteTriton(triton.url, Requested("tiny")) as remote:
        assert remote.loaded[wire.DIFFUSION].dynamic_batching.max_queue_delay_microseconds == 0


def test_a_taken_port_is_said_before_anything_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} cannot be used"):
            TritonServer(Deployment(), root=tmp_path, port=port).start()
    assert not list((tmp_path / ".harness").glob("*/models"))


@pytest.mark.parametrize(("words", "starts"), [("throwing boost::interprocess::lock_exception", 3), ("error: no", 1)])
def test_a_server_that_aborts_while_it_starts_is_started_again(tmp_path, monkeypatch, words, starts):
    fake = tmp_path / "tritonserver"
    fake.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\necho '{words}'\nkill -ABRT $$\n")
    fake.chmod(0o755)
    found = replace(find_distribution(), server=fake)
    monkeypatch.setattr("harness.deploy.server.find_distribution", lambda: found)
    with pytest.raises(ServerError, match=words):
        TritonServer(Deployment(), root=tmp_path).start()
    assert (tmp_path / "starts").read_text().split() == ["started"] * starts
    assert not list((tmp_path / ".harness").iterdir())


def test_a_model_that_cannot_load_is_named_with_its_reason(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ServerError, match="config.json"):
        TritonServer(Deployment(checkpoint=str(tmp_path)), root=tmp_path).start()
    assert not list((tmp_path / ".harness").iterdir())


def test_killing_the_owner_ends_the_server_and_its_stages(tmp_path):
    """SIGKILL leaves no time to clean up: the server ends by itself, and the next start removes the rest."""
    code = (
        "import time, pathlib, sys\n"
        "from harness.deploy.server import serving\n"
        f"with serving(root=pathlib.Path({str(tmp_path)!r})) as server:\n"
        "    print(server.pid, server.shm_prefix, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid, prefix = owner.stdout.readline().split()
    family = [psutil.Process(int(pid)), *psutil.Process(int(pid)).children(recursive=True)]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert not still_running(family, 60)
    assert local_url(tmp_path) is None
    TritonServer(Deployment(), root=tmp_path)  # looking for a place removes what is stale
    assert not list((tmp_path / ".harness").iterdir())
    assert not list(Path("/dev/shm").glob(f"{prefix}*"))


def test_ctrl_c_of_serve_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "harness", "serve"]
    serve = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    line = serve.stdout.readline()
    (url,) = re.findall(r"127\.0\.0\.1:\d+", line)
    family = psutil.Process(serve.pid).children(recursive=True)
    assert url in local_urls()  # other tests may have servers there
    serve.send_signal(signal.SIGINT)
    assert serve.wait(timeout=60) == 130
    assert not still_running(family, 30)
    assert url not in local_urls()
    assert not list(Path("/dev/shm").glob(f"harness_{serve.pid}_*"))


def test_a_polite_kill_of_locust_leaves_nothing_of_a_server_that_it_is_starting():
    command = [sys.executable, "-m", "locust", "-f", "scenarios/shorts.py", "--headless", "-t", "1s"]
    locust = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    deadline = time.monotonic() + 200
    while not (state := list((ROOT / ".harness").glob(f"triton-{locust.pid}-*/state.json"))):
        assert time.monotonic() < deadline and locust.poll() is None
        time.sleep(0.02)
    family = psutil.Process(locust.pid).children(recursive=True)
    for _ in range(2):  # who is impatient
        locust.send_signal(signal.SIGTERM)
    assert locust.wait(timeout=60) == 130
    assert family and not still_running(family, 30)
    assert not state[0].parent.exists() and not list(Path("/dev/shm").glob(f"harness_{locust.pid}_*"))


def test_the_repository_loads_by_itself_with_the_flags_of_its_page(tmp_path):
    from harness.deploy.control import is_ready
    from harness.deploy.distribution import server_environment

    page = (ROOT / "docs" / "how-to" / "own-triton.md").read_text()
    flags = re.findall(r"--[a-z-]+(?:=[^\s\\`]+)?", re.search(r" tritonserver (.*?)\n\n", page, re.DOTALL).group(1))
    assert "--model-repository=model_repository" in flags
    found = find_distribution()
    backend = tmp_path / "python"
    subprocess.run(["cp", "-r", str(found.backend), str(backend)], check=True)
    subprocess.run(["cp", str(found.stub), str(backend)], check=True)
    http, grpc_port, metrics = free_ports(3)
    ports = [f"--http-port={http}", f"--grpc-port={grpc_port}", f"--metrics-port={metrics}"]
    loopback = [f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")]
    command = [str(found.server), *flags, f"--backend-directory={tmp_path}", *loopback, *ports]
    server = subprocess.Popen(command, env=server_environment(found), stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            deadline = time.monotonic() + 120
            while not is_ready(stub, Deployment().models):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(120)
