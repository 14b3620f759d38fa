"""The front: the HTTP API, and the page.

python -m harness.service.front        settings from HARNESS_STUDIO_*, connection options from LOCUST_*
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from redis.exceptions import RedisError
from starlette.types import Scope

from harness.client.stream import SpeechClient
from harness.client.target import Target
from harness.service import operations_api, speech_api, tasks_api
from harness.service.changes import TaskChanges
from harness.service.intake import RequestRejected
from harness.service.keys import KeyRing
from harness.service.limits import RequestLimits, timed_protocol
from harness.service.logs import log, run_part
from harness.service.operations_api import FrontMetrics
from harness.service.queue import TaskQueue, connect
from harness.service.settings import StudioSettings
from harness.service.state import FrontState
from harness.service.storage import AudioStore
from harness.service.voices import VoiceBank

PAGE = Path(__file__).resolve().parent / "page"
END_S = 3  # for requests in progress, when the front is asked to end
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked all the time: not logged


def create_app(settings: StudioSettings) -> FastAPI:
    """The application; it connects to Redis and to the servers when it starts."""
    app = FastAPI(
        title="Speech studio", description="Scripts of up to four speakers, spoken as tasks or as a stream.",
        version="1", docs_url=None, redoc_url=None, lifespan=_connected(settings),
    )  # fmt: skip
    app.state.metrics = FrontMetrics()
    for api in (tasks_api, speech_api, operations_api):
        app.include_router(api.router)
    if (PAGE / "index.html").exists():
        app.mount("/", StaticFiles(directory=PAGE, html=True))
    app.add_exception_handler(RequestRejected, _rejected)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(RedisError, _no_redis)
    app.add_exception_handler(OSError, _no_storage)
    app.add_middleware(RequestLimits, settings=settings, on_done=_counting(app.state.metrics))
    return app


def _connected(settings: StudioSettings):
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        redis = connect(settings.redis)
        async with SpeechClient(Target.from_environment(settings.url)) as client:
            changes = TaskChanges(redis)
            app.state.front = FrontState(
                settings, TaskQueue(redis, settings.lease_s), AudioStore(settings.storage_url), client,
                KeyRing(settings.keys), VoiceBank(settings.voices), changes,
            )  # fmt: skip
            listening = asyncio.create_task(changes.run())
            with contextlib.suppress(RedisError):  # the workers do it too
                await app.state.front.queue.prepare()
            try:
                yield
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
                await redis.aclose()

    return lifespan


def _counting(metrics: FrontMetrics):
    def on_done(scope: Scope, status: int, seconds: float) -> None:
        metrics.count(scope, status, seconds)
        if scope["path"] not in _QUIET:
            client = (scope.get("client") or ("",))[0]
            log(
                "request", method=scope["method"], path=scope["path"], status=status, s=round(seconds, 4), client=client
            )

    return on_done


async def _rejected(_: Request, error: Any) -> JSONResponse:
    problem = {"line": error.line, "field": error.field, "message": str(error)}
    return JSONResponse({"detail": [problem]}, 422)


async def _not_valid(_: Request, error: Any) -> JSONResponse:
    """A body or a parameter of another shape, in the same form as a script's mistakes."""
    found = [
        {"line": None, "field": ".".join(map(str, each["loc"])), "message": each["msg"]} for each in error.errors()
    ]
    return JSONResponse({"detail": found}, 422)


async def _no_redis(request: Request, error: Any) -> JSONResponse:
    log("redis failed", path=request.url.path, error=str(error))
    return JSONResponse({"detail": "the queue does not answer now: try again"}, 503, {"Retry-After": "2"})


async def _no_storage(request: Request, error: Any) -> JSONResponse:
    log("storage failed", path=request.url.path, error=str(error))
    return JSONResponse({"detail": "the storage does not answer now: try again"}, 503, {"Retry-After": "5"})


def serve() -> None:
    """Serve with the settings of the environment until SIGTERM or SIGINT."""
    settings = StudioSettings.from_environment()
    uvicorn.run(
        create_app(settings), host=settings.host, port=settings.port, http=timed_protocol(settings.body_s), ws="none",
        log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=END_S,
    )  # fmt: skip


def main() -> None:
    run_part("front", serve)


if __name__ == "__main__":
    main()
