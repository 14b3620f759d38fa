"""A real Triton whose entry speaks on a timetable (``timetable/``): a server whose every figure is known beforehand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from google.protobuf import text_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from harness import wire
from harness.client.target import Target, Tls
from harness.deploy.config import Deployment, read_config
from harness.deploy.server import TritonServer
from harness.errors import ServerError
from harness.host.places import ROOT

REPOSITORY = Path(__file__).resolve().parent / "timetable"
FAILURE = "the stage failed on its timetable"  # what a request with the word "error" is told


class TimetableServer(TritonServer):
    """A Triton with the timetable model alone in it; ``words`` apply to every request (see its model.py)."""

    def __init__(self, words: str = "", *, root: Path = ROOT, port: int | None = None, tls: Tls | None = None):
        super().__init__(Deployment(), root=root, port=port)
        self.words, self.tls = words, tls

    def start_again(self) -> None:
        """Another server in the place of this one, at the same address."""
        self.stop()
        self.port = int(self.url.rpartition(":")[2])
        self.start()

    def taken(self) -> int:
        """Requests that have reached the model since the server started."""
        with grpc.insecure_channel(self.url) as channel:
            asked = pb.ModelStatisticsRequest(name=wire.ENTRY)
            return GRPCInferenceServiceStub(channel).ModelStatistics(asked, timeout=30).model_stats[0].inference_count

    def identify(self) -> None:
        """Its models are stand-ins, which compute nothing and say nothing of themselves."""

    def _lay_out(self, found) -> None:
        self._copy_programs(found)
        source, target = REPOSITORY / wire.ENTRY, self.folder / "models" / wire.ENTRY
        target.mkdir(parents=True)
        config = read_config(source / "config.pbtxt")
        config.parameters["timetable"].string_value = self.words
        (target / "config.pbtxt").write_text(text_format.MessageToString(config))
        os.symlink(source / "1", target / "1")

    def _wait_ready(self, timeout_s: float, interrupted: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + timeout_s
        with Target.of(self.url, self.tls).channel(self.url) as channel:
            stub = GRPCInferenceServiceStub(channel)
            while time.monotonic() < deadline_s:
                if not self.alive():
                    raise ServerError(f"Triton ended while starting:\n{self._why()}")
                if interrupted() or _is_ready(stub):
                    return
                time.sleep(0.05)
        raise ServerError(f"Triton was not ready after {timeout_s:.0f} s:\n{self._why()}")


def _is_ready(stub: GRPCInferenceServiceStub) -> bool:
    try:
        return stub.ModelReady(pb.ModelReadyRequest(name=wire.ENTRY), timeout=5).ready
    except grpc.RpcError:
        return False
