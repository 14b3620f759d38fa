"""The service as its page sees it: the requests of the page are answered, and nothing is computed."""

from __future__ import annotations

import io
import itertools
import json
import threading
import time
import urllib.parse
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files

import numpy as np

RATE = 24_000
FRAME_BYTES = 6_400
STRICT = "default-src 'self'"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
PAGE = files("harness") / "service" / "page"


def tone(seconds: float, hertz: float = 220.0) -> bytes:
    """A tone as 16-bit samples whose bytes are all different enough to notice a wrong order."""
    at = np.arange(round(seconds * RATE)) / RATE
    return (3000 * np.sin(2 * np.pi * hertz * at) + 40 * at).astype("<i2").tobytes()


def wav(samples: bytes) -> bytes:
    with io.BytesIO() as out:
        with wave.open(out, "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(samples)
        return out.getvalue()


class FakeStudio:
    """The state of the service, which tests change while the page looks.

    ``speech``: what one request for speech gets: bytes, seconds of silence on the wire, or an event to wait for.
    ``refusals``: (status, detail) by "METHOD path", instead of an answer. ``calls``: "METHOD path" of each request.
    """

    def __init__(self) -> None:
        self.address = ""
        self.voices = [{"id": k, "name": name} for k, name in enumerate(("Alice", "Carter", "Frank", "Maya"), 1)]
        self.speech: list = [tone(2.0)]
        self.key = ""
        self.policy = POLICY
        self.refusals: dict[str, tuple[int, object]] = {}
        self.calls: list[str] = []
        self.spoken: list[dict] = []
        self.asked: dict[str, str] = {}  # the task of each idempotency key
        self.bodies: dict[str, dict] = {}
        self.tasks: dict[str, dict] = {}
        self.audio: dict[str, bytes] = {}
        self.lost_answers = 0  # of the next requests for tasks
        self.changed = threading.Condition()
        self._ids = (f"task{k}" for k in itertools.count(1))

    def add(self, body: dict, once: str = "", **more) -> dict:
        """A new task, or the one that the same key made before."""
        if once in self.asked:
            return self.tasks[self.asked[once]]
        task = {
            "id": next(self._ids), "status": "queued", "position": 1, "estimated_start": None, "frames": 0,
            "of_frames": 75, "seconds_of_audio": 0, "rtf": None, "eta_s": None, "error": None, "created": now(),
            "started": None, "ended": None, "speakers": len(body.get("voices") or [1]), **more,
        }  # fmt: skip
        self.tasks[task["id"]] = task
        self.bodies[task["id"]] = body
        if once:
            self.asked[once] = task["id"]
        self.change(task["id"])
        return task

    def change(self, task: str, **fields) -> None:
        with self.changed:
            self.tasks[task].update(fields)
            self.changed.notify_all()

    def state(self, task: str) -> str:
        """A task as JSON; "" if it is gone."""
        return json.dumps(self.tasks[task]) if task in self.tasks else ""

    def state_after(self, task: str, seen: str) -> str:
        """The state of a task when it is another one than was seen, or after a second."""
        with self.changed:
            self.changed.wait_for(lambda: self.state(task) != seen, timeout=1)
            return self.state(task)

    def run(self, task: str, frames: int, **fields) -> None:
        """So many frames of a task are made; the rest comes at three times the speed of speech."""
        about = self.tasks[task]
        self.audio[task] = tone(about["of_frames"] / 7.5)[: frames * FRAME_BYTES]
        left_s = (about["of_frames"] - frames) / 7.5 / 3
        progress = {"frames": frames, "seconds_of_audio": frames / 7.5, "rtf": 0.333, "eta_s": left_s, "position": None}
        self.change(task, **{"status": "running", "started": now(), **progress, **fields})

    def finish(self, task: str) -> None:
        self.run(task, self.tasks[task]["of_frames"])
        self.change(task, status="done", ended=now(), eta_s=None)


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@contextmanager
def serving() -> Iterator[FakeStudio]:
    """A fake service at its ``address``."""
    studio = FakeStudio()
    handler = type("Handler", (_Handler,), {"studio": studio})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        studio.address = f"http://127.0.0.1:{server.server_port}/"
        yield studio
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A browser that leaves is no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    studio: FakeStudio

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(
            {
                "v1/voices": lambda: self._json(200, self.studio.voices),
                "v1/tasks": lambda: self._json(200, [*self.studio.tasks.values()][::-1]),
            },
            {"v1/tasks": self._task, "v1/voices": self._sample},
        )

    def do_POST(self) -> None:
        posts = {"v1/audio/speech": self._speak, "v1/tasks": self._make, "v1/voices": self._add_voice}
        self._answer(posts, {})

    def do_DELETE(self) -> None:
        self._answer({}, {"v1/tasks": self._cancel})

    def _answer(self, whole: dict, below: dict) -> None:
        path = urllib.parse.urlsplit(self.path).path.strip("/")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.studio.calls.append(f"{self.command} {path}")
        parts = [urllib.parse.unquote(part) for part in path.split("/")]
        refusal = self.studio.refusals.get(f"{self.command} {path}")
        if not path.startswith("v1/"):
            self._file(path or "index.html")
        elif self.studio.key and self.headers.get("Authorization") != f"Bearer {self.studio.key}":
            self._json(401, {"detail": "a key is needed"})
        elif refusal:
            self._json(refusal[0], {"detail": refusal[1]})
        elif path in whole:
            whole[path]()
        elif (act := below.get("/".join(parts[:2]))) and len(parts) > 2:
            act(*parts[2:])
        else:
            self._json(404, {"detail": "not found"})

    def _file(self, name: str) -> None:
        path = PAGE / name
        if "/" in name or not path.is_file():
            return self._json(404, {"detail": "not found"})
        return self._send(200, TYPES[name.rpartition(".")[2]], path.read_bytes())

    def _json(self, status: int, content: object) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, body: bytes, **headers: str) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Security-Policy": self.studio.policy, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def _chunks(self, kind: str, pieces: Iterator[bytes], **headers: str) -> None:
        self._head(200, kind, {"Transfer-Encoding": "chunked", **headers})
        try:
            for piece in pieces:
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.studio.calls.append("closed")
            self.close_connection = True

    def _speak(self) -> None:
        self.studio.spoken.append(json.loads(self.body))
        self._chunks("application/octet-stream", self._pieces(), X_Sample_Rate=str(RATE))

    def _pieces(self) -> Iterator[bytes]:
        for step in self.studio.speech:
            if isinstance(step, bytes):
                yield from (step[at : at + FRAME_BYTES + 1] for at in range(0, len(step), FRAME_BYTES + 1))
            elif isinstance(step, threading.Event):
                step.wait(60)
            else:
                time.sleep(step)

    def _make(self) -> None:
        task = self.studio.add(json.loads(self.body), self.headers.get("Idempotency-Key", ""))
        if self.studio.lost_answers:
            self.studio.lost_answers -= 1
            self.close_connection = True
            return
        self._json(202, {"id": task["id"], "status": task["status"], "links": {}, "remarks": []})

    def _task(self, task: str, part: str = "") -> None:
        if task not in self.studio.tasks:
            self._json(404, {"detail": "not found"})
        elif part == "events":
            self._chunks("text/event-stream", self._events(task))
        elif part == "audio":
            self._audio(wav(b"") + self.studio.audio.get(task, b""))
        else:
            self._json(200, self.studio.tasks[task])

    def _events(self, task: str) -> Iterator[bytes]:
        seen = ""
        while True:
            state = self.studio.state_after(task, seen)
            if not state:
                return
            yield f"event: task\ndata: {state}\n\n".encode() if state != seen else b": alive\n\n"
            seen = state
            if json.loads(state)["status"] not in ("queued", "running"):
                return

    def _audio(self, audio: bytes) -> None:
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        last = min(self._last(), len(audio) - 1)
        if first >= len(audio):
            self._send(416, "audio/wav", b"", Content_Range=f"bytes */{len(audio)}")
        else:
            place = {"Content_Range": f"bytes {first}-{last}/{len(audio)}", "Accept_Ranges": "bytes"}
            self._send(206, "audio/wav", audio[first : last + 1], **place)

    def _last(self) -> int:
        end = self.headers.get("Range", "bytes=0-").split("-")[1]
        return int(end) if end else 1 << 60

    def _cancel(self, task: str) -> None:
        self.studio.change(task, status="cancelled", ended=now())
        self._json(200, self.studio.tasks[task])

    def _sample(self, voice: str, _part: str) -> None:
        self._send(200, "audio/wav", wav(tone(3.0)))

    def _add_voice(self) -> None:
        named = self.body.split(b'filename="')[1].split(b'"')[0].decode()
        voice = {"id": len(self.studio.voices) + 1, "name": named.removesuffix(".wav")}
        self.studio.voices.append(voice)
        self._json(201, voice)
