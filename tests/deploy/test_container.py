"""The entry point of a Triton container: settings, flags, keys, and a drain that loses no session."""

import asyncio
import contextlib
import json
from concurrent import futures

import grpc
import pytest
from conftest import make_request
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import exit_codes, wire
from harness.client.stream import SpeechClient
from harness.deploy import container
from harness.deploy.config import as_json, read_config, topology_of
from harness.deploy.container_settings import ContainerSettings, variable
from harness.deploy.control import CONTROL_HEADER
from harness.errors import InputError, ServerError
from harness.records.schema import Outcome

KEY = "k" * 24


@pytest.fixture
def settings(tmp_path):
    """``settings(**more)``: those of a container on this machine's CPU."""
    (tmp_path / "key").write_text(f"{KEY}\n")

    def make(**more):
        given = {"key_file": str(tmp_path / "key"), "folder": str(tmp_path / "run"), "device": "cpu", **more}
        return ContainerSettings(**given)

    return make


def test_a_command_listens_where_it_is_told_and_has_a_key(settings):
    command = settings(exit_s=45).command()
    flags = dict(each.partition("=")[::2] for each in command[1:])
    assert command[0] == "tritonserver" and flags["--grpc-address"] == flags["--metrics-address"] == "0.0.0.0"
    assert flags["--allow-http"] == "false" and "--http-address" not in flags and "--backend-directory" not in flags
    assert flags["--exit-timeout-secs"] == "45" and flags["--model-control-mode"] == "explicit"
    assert flags["--grpc-restricted-protocol"].endswith(f":harness={KEY}")
    assert len({each.partition("=")[0] for each in command if "backend-config" not in each}) == len(
        [each for each in command if "backend-config" not in each]
    )


@pytest.mark.parametrize("topology", wire.TOPOLOGIES)
def test_a_repository_is_that_of_the_settings(settings, topology):
    knobs = {"engine.max_batch": 8} if topology == wire.FUSED else {"diffusion_decoder.delay_us": 700}
    carry = {f"{wire.ENTRY}.carry_key_file": "/run/secrets/speech-carry/key"}
    ours = settings(topology=topology, knobs=json.dumps(knobs), parameters=json.dumps(carry))
    for _ in range(2):  # a container that starts again finds the repository of its earlier start
        container.prepare(ours)
    written = {each.name: read_config(each / "config.pbtxt") for each in ours.models.iterdir()}
    assert written == ours.deployment().configs() and topology_of(written[wire.ENTRY]) == topology
    assert written[wire.ENTRY].parameters["carry_key_file"].string_value == "/run/secrets/speech-carry/key"


def test_settings_come_from_the_environment(tmp_path):
    environment = {
        "HARNESS_DEPLOY_PRESET": "1.5b",
        "HARNESS_DEPLOY_GPUS": "2",
        "HARNESS_DEPLOY_KEY_FILE": "k",
        "HOME": "/",
    }
    found = ContainerSettings.from_environment(environment)
    assert (found.preset, found.gpus, found.settle_s) == ("1.5b", 2, 15.0)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "HARNESS_DEPLOY_KEY_FILE is not set, and 0.0.0.0 can be reached from other hosts"),
        ({"HARNESS_DEPLOY_PRESETS": "tiny"}, "HARNESS_DEPLOY_PRESETS is not a setting"),
        ({"HARNESS_DEPLOY_GPUS": "two"}, "HARNESS_DEPLOY_GPUS is 'two': it must be a number"),
    ],
)
def test_a_wrong_setting_is_one_line(monkeypatch, capsys, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert container.main(["serve"]) == exit_codes.USAGE
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1


def test_an_unknown_verb_is_one_line(capsys):
    assert container.main(["stop"]) == exit_codes.USAGE and "use one of serve, ready, drain" in capsys.readouterr().err
    assert container.main(["--help"]) == 0 and "drain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "why"), [("short", "at least 20"), (f"{KEY},x=y", "at least 20"), (None, "cannot be read")]
)
def test_a_key_that_cannot_be_used_is_refused(settings, tmp_path, text, why):
    path = tmp_path / "other"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=why):
        settings(key_file=str(path)).command()


@pytest.mark.parametrize("text", ["[1]", "{", "a=b"])
def test_knobs_are_json(settings, text):
    with pytest.raises(InputError, match="HARNESS_DEPLOY_KNOBS is no JSON object"):
        settings(knobs=text).deployment()


def test_without_a_server_there_is_nothing_to_drain(settings):
    said, slept = [], []
    container.drain(settings(address="127.0.0.1", grpc_port=1), said.append, slept.append)
    assert said == ["the server ended"] and len(slept) == 1 + 5  # a port that refuses once is not closed
    assert container.VERBS["ready"] is container.ready


class Busy(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton that fails calls, then does them: what each call answers, and the keys that it was given."""

    def __init__(self, *states):
        self.states, self.keys, self.unloads = list(states), set(), 0

    def RepositoryIndex(self, request, context):
        self.keys |= {value for name, value in context.invocation_metadata() if name == CONTROL_HEADER}
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, grpc.StatusCode):
            context.abort(state, "no")
        model = service_pb2.RepositoryIndexResponse.ModelIndex(name=wire.ENTRY, version="1", state=state)
        return service_pb2.RepositoryIndexResponse(models=[model])

    def RepositoryModelUnload(self, request, context):
        self.unloads += 1
        return service_pb2.RepositoryModelUnloadResponse()


@contextlib.contextmanager
def serving(busy: Busy):
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(busy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield {"address": "127.0.0.1", "grpc_port": port, "settle_s": 0.0}
    finally:
        server.stop(0)


DOWN, LATE, REFUSED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.PERMISSION_DENIED


def test_a_drain_goes_on_after_errors_while_the_port_is_open(settings):
    """Triton answers a wrong key as UNAVAILABLE, too; and a server that started again has its entry loaded again."""
    busy, said = Busy(DOWN, "READY", LATE, "UNLOADING", "READY", REFUSED, "UNLOADING", "UNAVAILABLE"), []
    with serving(busy) as where:
        container.drain(settings(**where), said.append, lambda _: None)
    assert said[-1] == "the last session has ended" and busy.unloads == 2 and busy.states == ["UNAVAILABLE"]
    assert said[0] == "cannot drain yet: no"


@pytest.mark.parametrize(("state", "why"), [(DOWN, "cannot drain yet"), ("UNLOADING", "no answer")])
def test_a_drain_that_could_not_be_done_is_an_error(settings, monkeypatch, capsys, tmp_path, state, why):
    times = iter(range(100))
    with serving(Busy(state)) as where:
        ours = settings(**where, grace_s=10)
        with pytest.raises(ServerError, match=f"not drained after 10 s: {why}"):
            container.drain(ours, lambda _: None, lambda _: None, lambda: next(times))
        given = {**where, "grace_s": 0, "key_file": tmp_path / "key", "folder": tmp_path}
        for name, value in given.items():
            monkeypatch.setenv(variable(name), str(value))
        assert container.main(["drain"]) == exit_codes.UNAVAILABLE
    assert "is not drained after 0 s" in capsys.readouterr().err


def test_a_drain_uses_the_key_with_which_the_server_started(settings, tmp_path):
    """A secret that is replaced reaches the files of a running container, not its server."""
    busy = Busy("UNAVAILABLE")
    with serving(busy) as where:
        ours = settings(**where)
        container.prepare(ours)
        (tmp_path / "key").write_text("n" * 24)
        container.drain(ours, lambda _: None, lambda _: None)
    assert busy.keys == {KEY} and (tmp_path / "run" / "control.key").stat().st_mode & 0o777 == 0o600


async def until(condition, timeout_s=120.0):
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.server
def test_a_drain_refuses_new_sessions_and_lets_open_ones_end(triton, tmp_path):
    """Kubernetes' probe, gRPC health, turns with it."""
    (tmp_path / "key").write_text(triton.control_headers[0][1])
    host, _, port = triton.url.rpartition(":")
    ours = ContainerSettings(
        address=host, grpc_port=int(port), key_file=str(tmp_path / "key"), settle_s=0.0, grace_s=120
    )
    said, heard = [], asyncio.Event()
    health = lambda channel: channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)  # noqa: E731

    async def scene(channel):
        async with SpeechClient(triton.url) as client:
            long = make_request("long", frames=400)
            running = asyncio.create_task(client.speak(long, "closed", on_audio=lambda _: heard.set()))
            await until(lambda: heard.is_set() or running.done())
            assert heard.is_set(), await running
            draining = asyncio.create_task(asyncio.to_thread(container.drain, ours, said.append))
            await until(lambda: said or draining.done())
            late, unready = await client.speak(make_request("late"), "closed"), health(channel)
            before = draining.done()
            return await running, late, unready, before, await draining

    with grpc.insecure_channel(triton.url) as channel:
        assert health(channel) == b"\x08\x01"  # SERVING
        container.ready(ours)
        try:
            running, late, unready, before, _ = asyncio.run(scene(channel))
        finally:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            request = service_pb2.RepositoryModelLoadRequest(model_name=wire.ENTRY)
            request.parameters["config"].string_param = as_json(triton.deployment.configs()[wire.ENTRY])
            stub.RepositoryModelLoad(request, timeout=60, metadata=triton.control_headers)
    assert running.outcome is Outcome.DONE and len(running.chunks) == 400
    assert late.outcome is Outcome.ERROR and unready == b"\x08\x02" and not before  # NOT_SERVING
    assert said == [f"{wire.ENTRY} takes no new sessions", "the last session has ended"]
