"""What operators ask: is it alive, is it ready, how is it; and the documentation of the API."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from jinja2 import Environment, PackageLoader, select_autoescape
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from redis.exceptions import RedisError
from starlette.types import Scope

from harness.errors import ServerError
from harness.service.queue import TaskQueue
from harness.service.state import UNAUTHORIZED, UNAVAILABLE, Front, Owner

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_COUNTERS = {
    "submitted": "Tasks accepted",
    "done": "Tasks that were spoken to the end",
    "failed": "Tasks that failed",
    "cancelled": "Tasks that were cancelled",
    "segments": "Segments stored",
    "frames": "Frames stored",
    "busy_s": "Seconds of work on stored segments",
    "reclaimed": "Times that a task was taken from a worker that had ended",
    "yielded": "Times that a task made room at the end of a segment, or was given back at a worker's end",
    "retried": "Times that a segment failed and was tried again",
    "frames_repeated": "Frames of segments that were lost before they were stored",
    "duplicates": "Messages that were delivered for no task",
}
_PAGES = Environment(loader=PackageLoader("harness.service"), autoescape=select_autoescape(("html", "j2")))
router = APIRouter(tags=["operations"])


class FrontMetrics:
    """Counters of this front's requests."""

    def __init__(self):
        self.registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self._requests = Counter(
            "harness_studio_requests", "Requests, by the path's pattern", labels, registry=self.registry
        )
        self._seconds = Histogram(
            "harness_studio_request_seconds", "Seconds from a request to the end of its response", labels[:2],
            buckets=_BUCKETS, registry=self.registry,
        )  # fmt: skip

    def count(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self._requests.labels(scope["method"], path, status).inc()
        self._seconds.labels(scope["method"], path).observe(seconds)


async def _queue_metrics(queue: TaskQueue) -> Iterable[Metric]:
    """What all workers and fronts have counted in Redis."""
    counts, lengths, room = await queue.counts(), await queue.lengths(), await queue.room()
    found: list[Metric] = [
        CounterMetricFamily(f"harness_studio_{name}", about, counts.get(name, 0.0)) for name, about in _COUNTERS.items()
    ]
    tasks = GaugeMetricFamily("harness_studio_tasks", "Tasks by state", labels=["state"])
    for state, number in lengths.items():
        tasks.add_metric([state], number)
    gauges = {
        "streams": ("Streams that are listened to", room.streams),
        "streams_waiting": ("Streams that wait for room", room.impatient),
        "slots": ("Places for tasks of all workers", await queue.slots()),
    }
    return [*found, tasks, *(GaugeMetricFamily(f"harness_studio_{name}", *about) for name, about in gauges.items())]


class _Collected:
    def __init__(self, metrics: Iterable[Metric]):
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


@router.get("/healthz")
async def alive() -> dict[str, str]:
    """Whether this process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses=UNAVAILABLE)
async def ready(front: Front) -> Response:
    """Whether tasks can be accepted and spoken: Redis, a worker, and Triton."""
    checks = {"redis": await _redis(front.queue), "workers": await _workers(front.queue), "triton": "ok"}
    try:
        await front.client.any_ready()
    except ServerError as error:
        checks["triton"] = str(error)
    is_ready = all(said == "ok" for said in checks.values())
    return JSONResponse({"status": "ok" if is_ready else "not ready", **checks}, 200 if is_ready else 503)


async def _redis(queue: TaskQueue) -> str:
    try:
        await queue.lengths()
    except RedisError as error:
        return str(error)
    return "ok"


async def _workers(queue: TaskQueue) -> str:
    try:
        return "ok" if await queue.slots() else "no worker has given a sign of life"
    except RedisError:
        return "not known: Redis does not answer"


@router.get("/metrics", response_class=Response, responses=UNAUTHORIZED)
async def metrics(request: Request, _: Owner, front: Front) -> Response:
    """Figures of this front and of the queue, for Prometheus."""
    own = generate_latest(request.app.state.metrics.registry)
    shared = CollectorRegistry()
    shared.register(_Collected(await _queue_metrics(front.queue)))
    return Response(own + generate_latest(shared), media_type=CONTENT_TYPE_LATEST)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """The API, from its OpenAPI document; without a script, so that it works offline and under a strict policy."""
    return HTMLResponse(_PAGES.get_template("docs.html.j2").render(api=request.app.openapi()))


@router.get("/docs.css", include_in_schema=False)
async def docs_style() -> Response:
    return Response(_PAGES.get_template("docs.css").render(), media_type="text/css")
