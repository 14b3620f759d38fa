"""Servers to be reached by every way that a Target has: with TLS, with headers, several at once."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import trustme
from fake_triton import FakeTriton, Timetable
from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from harness import wire


class Replica(FakeTriton):
    """A server that also keeps the headers of every call, and tells statistics."""

    def __init__(self, timetable: Timetable = Timetable(), executions: int = 0):  # noqa: B008 (never changed)
        super().__init__(timetable)
        self.headers: list[dict[str, str]] = []
        self.executions = executions

    def _keep(self, context) -> None:
        self.headers.append(dict(context.invocation_metadata()))

    async def ServerReady(self, request, context):
        self._keep(context)
        return await super().ServerReady(request, context)

    async def ModelReady(self, request, context):
        self._keep(context)
        return await super().ModelReady(request, context)

    async def ModelStreamInfer(self, request_iterator, context):
        self._keep(context)
        async for response in super().ModelStreamInfer(request_iterator, context):
            yield response

    async def ModelStatistics(self, request, context):
        self._keep(context)
        answer = await super().ModelStatistics(request, context)
        if request.name != wire.ENTRY:
            answer.model_stats.add(name=wire.LLM, execution_count=self.executions)
        return answer


class TlsFiles:
    """PEM files of an authority, a server and a client; ``other`` is an authority that nobody knows."""

    def __init__(self, folder):
        self.authority, self.other = trustme.CA(), trustme.CA()
        self.folder = folder
        self.ca = self.write("ca.pem", self.authority.cert_pem.bytes())
        self.other_ca = self.write("other.pem", self.other.cert_pem.bytes())
        self.cert, self.key = self.pair("client", self.authority)
        self.other_cert, self.other_key = self.pair("stranger", self.other)

    def pair(self, name: str, authority) -> tuple[str, str]:
        made = authority.issue_cert(f"{name}@example.org")
        cert = b"".join(each.bytes() for each in made.cert_chain_pems)
        return self.write(f"{name}.pem", cert), self.write(f"{name}.key", made.private_key_pem.bytes())

    def write(self, name: str, content: bytes) -> str:
        (self.folder / name).write_bytes(content)
        return str(self.folder / name)

    def credentials(self, *names: str, mutual: bool = False) -> grpc.ServerCredentials:
        made = self.authority.issue_cert(*names)
        pair = made.private_key_pem.bytes(), b"".join(each.bytes() for each in made.cert_chain_pems)
        return grpc.ssl_server_credentials([pair], self.authority.cert_pem.bytes() if mutual else None, mutual)


@contextlib.asynccontextmanager
async def served(*fakes: Replica, credentials: grpc.ServerCredentials | None = None):
    """The addresses of started servers."""
    servers = [grpc.aio.server() for _ in fakes]
    addresses = []
    for server, fake in zip(servers, fakes, strict=True):
        add_GRPCInferenceServiceServicer_to_server(fake, server)
        address = "127.0.0.1:0"
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        addresses.append(f"127.0.0.1:{port}")
        await server.start()
    try:
        yield addresses
    finally:
        await asyncio.gather(*(server.stop(None) for server in servers))
