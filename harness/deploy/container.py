"""The entry point of a Triton container; its settings come from ``HARNESS_DEPLOY_*``.

python -m harness.deploy.container serve    write the model repository, and become tritonserver (the default)
python -m harness.deploy.container ready    exit with 0 where the entry accepts requests
python -m harness.deploy.container drain    refuse new sessions, and return when the last one has ended, with an error
                                            where that could not be done
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from harness import exit_codes, wire
from harness.client.channels import status_of
from harness.client.target import Target
from harness.deploy import stub
from harness.deploy.config import write_repository
from harness.deploy.container_settings import ContainerSettings
from harness.deploy.control import Headers, is_ready
from harness.errors import HarnessError, InputError, ServerError

_CALL_S, _LOOK_S = 10.0, 1.0
_CLOSED_LOOKS = 5  # in a row: a server that is busy may refuse a connection
_OPEN, _CLOSED, _EMPTY = "open", "closed", "empty"  # what a look sees of a server that is drained
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
Say = Callable[[str], None]


def prepare(settings: ContainerSettings) -> list[str]:
    """Write the repository over that of an earlier start; returns the command. Raises InputError or ServerError."""
    deployment = settings.deployment()
    deployment.check_host()
    stub.check(stub.search_path())
    command = settings.command()  # reads the key before anything is written
    shutil.rmtree(settings.models, ignore_errors=True)
    write_repository(settings.models, deployment)
    settings.keep_key()
    return command


def serve(settings: ContainerSettings) -> None:
    """Become tritonserver, which then gets the signals of the container."""
    command = prepare(settings)
    try:
        os.execvpe(command[0], command, {**_ENVIRONMENT, **os.environ})
    except OSError as error:
        raise ServerError(f"{command[0]} cannot be started: {error.strerror}; use an image with Triton") from None


def ready(settings: ContainerSettings) -> None:
    """Raise ServerError where the entry does not accept requests."""
    with Target.of(settings.url).channel(settings.url) as channel:
        if not is_ready(service_pb2_grpc.GRPCInferenceServiceStub(channel), (wire.ENTRY,)):
            raise ServerError(f"{wire.ENTRY} is not ready at {settings.url}")


def drain(
    settings: ContainerSettings,
    say: Say = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Unload the entry once clients had time to leave, and wait until its last session has ended.

    Open sessions go on to their ends, since the stages stay loaded; new requests get an error at once. A server whose
    port stays closed is gone; whatever else fails is tried again. Raises ServerError where sessions may be open still
    at the end of ``grace_s``.
    """
    until_s = clock() + settings.grace_s
    sleep(settings.settle_s)
    closed, told, headers = 0, "", settings.started_headers()
    with Target.of(settings.url).channel(settings.url) as channel:
        server = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        while closed < _CLOSED_LOOKS:
            seen, words = _look(server, settings, headers)
            if words and words != told:
                say(told := words)
            if seen == _EMPTY:
                return
            closed = closed + 1 if seen == _CLOSED else 0
            if clock() >= until_s:
                raise ServerError(f"{settings.url} is not drained after {settings.grace_s:g} s: {told or 'no answer'}")
            sleep(_LOOK_S)
    say("the server ended")


def _look(server, settings: ContainerSettings, headers: Headers) -> tuple[str, str]:
    """Look at the entry, and unload it where it is loaded: what was seen, and what is to be said of it."""
    try:
        states = _states(server, headers)
        if "READY" in states:
            _unload(server, headers)
            return _OPEN, f"{wire.ENTRY} takes no new sessions"
        return (_OPEN, "") if states & {"LOADING", "UNLOADING"} else (_EMPTY, "the last session has ended")
    except grpc.RpcError as error:
        return (_CLOSED, "") if _is_closed(settings) else (_OPEN, f"cannot drain yet: {status_of(error)[1]}")


def _unload(server, headers: Headers) -> None:
    request = service_pb2.RepositoryModelUnloadRequest(model_name=wire.ENTRY)
    server.RepositoryModelUnload(request, timeout=_CALL_S, metadata=headers or None)


def _states(server, headers: Headers) -> set[str]:
    """The states of the entry's versions: Triton keeps a model while a session of it is open."""
    index = server.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_CALL_S, metadata=headers or None)
    return {model.state for model in index.models if model.name == wire.ENTRY}


def _is_closed(settings: ContainerSettings) -> bool:
    """Whether nobody listens on the server's port: then it is gone, and its sessions with it."""
    host, _, port = settings.url.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


VERBS: dict[str, Callable[[ContainerSettings], None]] = {"serve": serve, "ready": ready, "drain": drain}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; what is wrong with the settings is one line."""
    given = list(sys.argv[1:] if arguments is None else arguments) or ["serve"]
    if given[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    try:
        if len(given) != 1 or given[0] not in VERBS:
            raise InputError(f"{' '.join(given)!r} is no verb of a container: use one of {', '.join(VERBS)}")
        VERBS[given[0]](ContainerSettings.from_environment())
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr)
        return exit_codes.UNAVAILABLE if isinstance(error, ServerError) else exit_codes.USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
