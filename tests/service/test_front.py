"""The HTTP API on a real Redis, with a worker: what is accepted, followed, heard and refused."""

import io
import json
import socket
import struct
import threading
import time
import wave

import numpy as np
import pytest
import requests
import soundfile
from redis.exceptions import RedisError
from service_parts import KEYS, Service, bearer
from speaking_triton import unbroken

from harness.service.queue import TaskQueue

SCRIPT = "Speaker 1: one two three\nSpeaker 2: four five six"  # 2 s of speech: 15 frames
FRAMES = 15


@pytest.fixture
def service(settings, target):
    with Service(settings(url=target)) as running:
        yield running


@pytest.fixture
def idle(settings, target):
    """``idle(**settings)``: a service without a worker, so that tasks wait."""
    opened = []

    def made(**more):
        opened.append(Service(settings(url=target, **more), works=False))
        return opened[-1].__enter__()

    yield made
    for each in opened:
        each.__exit__()


def test_a_script_becomes_a_task_that_is_downloaded(service):
    answer = service.post("/v1/tasks", {"script": SCRIPT, "options": {"seed": 7}})
    made = answer.json()
    assert answer.status_code == 202 and made["status"] in ("queued", "running") and made["remarks"] == []
    task = service.ended(made["id"])
    assert (task["status"], task["frames"], task["of_frames"], task["speakers"]) == ("done", FRAMES, FRAMES, 2)
    assert task["title"] == "one two three" and task["seconds_of_audio"] == 2.0 and task["rtf"] > 0
    assert task["created"] <= task["started"] <= task["ended"] and task["position"] is None
    heard = service.get(made["links"]["audio"])
    assert heard.status_code == 200 and heard.headers["Content-Type"] == "audio/wav"
    samples, rate = soundfile.read(io.BytesIO(heard.content), dtype="int16")
    assert rate == 24_000 and np.array_equal(samples, unbroken(7, FRAMES))


@pytest.mark.parametrize("format", ["flac", "opus"])
def test_other_formats(service, format):
    task = service.submit(SCRIPT, format=format)
    assert service.ended(task)["format"] == format
    heard = service.get(f"/v1/tasks/{task}/audio")
    assert heard.headers["Content-Type"] == {"flac": "audio/flac", "opus": "audio/ogg"}[format]
    assert soundfile.info(io.BytesIO(heard.content)).frames == FRAMES * 3200


def test_a_range_of_the_audio(service):
    task = service.submit(SCRIPT)
    service.ended(task)
    whole = service.get(f"/v1/tasks/{task}/audio")
    size = len(whole.content)
    assert size == 44 + FRAMES * 6400 and whole.headers["Accept-Ranges"] == "bytes"
    spans = {"0-9": (0, 10), "40-50": (40, 51), "1000-": (1000, size), "-500": (size - 500, size),
             "25000-26000": (25_000, 26_001), "44-999999999": (44, size)}  # fmt: skip
    for asked, (start, end) in spans.items():
        part = service.get(f"/v1/tasks/{task}/audio", headers={"Range": f"bytes={asked}"})
        assert part.status_code == 206 and part.content == whole.content[start:end], asked
        assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
    beyond = service.get(f"/v1/tasks/{task}/audio", headers={"Range": f"bytes={size}-"})
    assert beyond.status_code == 416 and beyond.headers["Content-Range"] == f"bytes */{size}"
    for ignored in ("bytes=0-1,5-6", "bytes=5-2", "items=1-2", "bytes=-"):
        assert service.get(f"/v1/tasks/{task}/audio", headers={"Range": ignored}).status_code == 200
    stale = {"Range": "bytes=0-9", "If-Range": '"other"'}
    assert service.get(f"/v1/tasks/{task}/audio", headers=stale).status_code == 200
    fresh = {"Range": "bytes=0-9", "If-Range": whole.headers["ETag"]}
    assert service.get(f"/v1/tasks/{task}/audio", headers=fresh).status_code == 206


def test_audio_is_downloaded_while_it_is_made(service, conduct):
    conduct.frame_s = 0.05
    task, got = service.submit(SCRIPT, options={"seed": 3}), b""
    while (state := service.get(f"/v1/tasks/{task}").json()["status"]) != "done" or len(got) < 44 + FRAMES * 6400:
        part = service.get(f"/v1/tasks/{task}/audio", headers={"Range": f"bytes={len(got)}-"})
        assert part.status_code in (206, 416, 404), part.text
        if part.status_code == 206:
            assert state == "done" or part.headers["Content-Range"].endswith("/*")
            got += part.content
        time.sleep(0.05)
    assert got[:4] == b"RIFF" and struct.unpack("<I", got[40:44]) == (0xFFFF_FFFF,)
    assert np.array_equal(np.frombuffer(got[44:], "<i2"), unbroken(3, FRAMES))
    samples, _ = soundfile.read(io.BytesIO(got), dtype="int16")
    assert len(samples) == FRAMES * 3200, "a WAV of unknown length is read to its end"


def test_a_task_without_audio_yet_says_so(idle):
    service = idle()
    answer = service.get(f"/v1/tasks/{service.submit()}/audio", headers={"Range": "bytes=0-"})
    assert answer.status_code == 404 and "yet" in answer.json()["detail"]


def test_a_task_is_followed_to_its_end(service, conduct):
    conduct.holds_at = 6
    task, seen = service.submit(SCRIPT), []
    answer = service.get(f"/v1/tasks/{task}/events", stream=True)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    for line in answer.iter_lines():
        if line.startswith(b"data: "):
            seen.append(json.loads(line[6:]))
            conduct.holds_at = 10 if len(seen) == 1 else 1 << 30  # the end is not before the second event
    frames = [each["frames"] for each in seen]
    assert seen[-1]["status"] == "done" and len(seen) >= 3 and frames == sorted(frames) and frames[-1] == FRAMES
    assert seen[-1] == service.get(f"/v1/tasks/{task}").json()


def test_a_mistake_is_named_at_its_line(idle):
    service = idle()
    answer = service.post("/v1/tasks", {"script": "Speaker 1: hello\n\nSpeaker 9: who"})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["line"] == 3 and problem["message"].startswith("speaker 9 is outside 1 to 4")
    for script in ("", "   \n ", "Speaker 1:"):
        assert service.post("/v1/tasks", {"script": script}).json()["detail"][0]["line"] == 1
    half = service.post(
        "/v1/tasks",
        data='{"script": "Speaker 1: a\\nSpeaker 1: \\ud800"}',
        headers={"Content-Type": "application/json"},
    )
    assert half.status_code == 422 and half.json()["detail"][0]["line"] == 2
    long = service.post("/v1/tasks", {"script": "Speaker 1: " + "word " * 20_000})
    assert long.status_code == 422 and "at most 90" in long.json()["detail"][0]["message"]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"voices": [9, 9]}, "voices"),
        ({"voices": ["nobody", 1]}, "voices"),
        ({"voices": [1]}, "voices"),
        ({"voices": [True, 1]}, "body.voices"),
        ({"format": "mp3"}, "body.format"),
        ({"options": {"guidance": 101}}, "body.options.guidance"),
        ({"options": {"steps": 3}}, "body.options.steps"),
        ({"nonsense": 1}, "body.nonsense"),
        ({"webhook": "ftp://example.com/"}, "webhook"),
        ({"webhook": "http://127.0.0.1:6379/"}, "webhook"),
        ({"webhook": "http://[::ffff:10.0.0.1]/"}, "webhook"),
    ],
)
def test_a_request_that_cannot_be_used_names_its_field(idle, more, field):
    answer = idle().post("/v1/tasks", {"script": SCRIPT, **more})
    assert answer.status_code == 422
    assert all(each["field"].startswith(field) and each["message"] for each in answer.json()["detail"])


def test_voices_are_given_by_number_or_name_in_the_order_of_speakers(service, conduct):
    for voices in ([3, 2], ["voice 3", "2"], None):
        service.ended(service.submit("Speaker 2: one two\nSpeaker 4: three", voices=voices))
    given = [each["speaker_ids"] for each in conduct.requests]
    assert given[0] == given[1] == [3, 2] and given[-1] == [2, 4]
    assert service.get("/v1/voices").json() == [{"id": n, "name": f"voice {n}"} for n in (1, 2, 3, 4)]


def test_a_repeated_request_makes_one_task(idle):
    service = idle()
    once = {"Idempotency-Key": "abc"}
    first, second = (service.post("/v1/tasks", {"script": SCRIPT}, headers=once) for _ in range(2))
    assert first.status_code == second.status_code == 202 and first.json()["id"] == second.json()["id"]
    assert service.post("/v1/tasks", {"script": "another"}, headers=once).status_code == 409
    assert len(service.get("/v1/tasks").json()) == 1


def test_tasks_are_listed_newest_first_with_their_place(idle):
    service = idle()
    tasks = [service.submit(f"Speaker 1: text {number}") for number in range(3)]
    listed = service.get("/v1/tasks?limit=2").json()
    assert [each["id"] for each in listed] == tasks[:0:-1]
    assert [each["position"] for each in listed] == [3, 2] and listed[0]["estimated_start"] is None
    assert service.get("/v1/tasks?limit=0").status_code == 422


def test_a_cancelled_task_is_gone_for_good(idle):
    service = idle()
    task = service.submit()
    cancelled = service.call("DELETE", f"/v1/tasks/{task}")
    assert cancelled.status_code == 200 and cancelled.json()["status"] == "cancelled"
    assert service.call("DELETE", f"/v1/tasks/{task}").json()["status"] == "cancelled"
    assert service.get(f"/v1/tasks/{task}/audio").status_code == 410
    assert service.get("/v1/tasks/0123").status_code == service.get("/v1/tasks/..%2f..%2fetc").status_code == 404


def test_a_task_that_has_ended_is_forgotten_with_its_audio_where_that_is_asked_for(service):
    task = service.submit(SCRIPT)
    assert service.ended(task)["status"] == "done"
    assert service.call("DELETE", f"/v1/tasks/{task}").json()["status"] == "done"
    assert service.get(f"/v1/tasks/{task}/audio").status_code == 200, "a repeated DELETE removes nothing"
    assert service.call("DELETE", f"/v1/tasks/{task}?forget=true").json()["status"] == "done"
    assert service.get(f"/v1/tasks/{task}").status_code == 404
    assert service.store.names(task) == [] and service.get("/v1/tasks").json() == []
    assert service.call("DELETE", f"/v1/tasks/{task}?forget=true").status_code == 404


def test_a_task_for_which_a_worker_may_still_write_is_not_forgotten_yet(idle):
    service = idle()
    task = service.submit()
    assert service.call("DELETE", f"/v1/tasks/{task}?forget=true").json()["status"] == "cancelled", "it was not at rest"
    again = service.call("DELETE", f"/v1/tasks/{task}?forget=true")
    assert again.status_code == 409 and again.headers["Retry-After"] == "60"
    service.ask(service.queue.done_with("trash", task))  # as housekeeping does, once it has removed the audio
    assert service.call("DELETE", f"/v1/tasks/{task}?forget=true").status_code == 200
    assert service.get(f"/v1/tasks/{task}").status_code == 404


def test_a_key_listens_to_so_many_streams_at_once_and_to_another_when_one_has_ended(idle, conduct):
    service, long = idle(open_streams=2, keys=KEYS), "word " * 300
    conduct.frame_s, conduct.holds_at = 0.1, 4

    def listen(key, text=long):
        body, url = {"input": text}, f"{service.url}/v1/audio/speech"
        return requests.post(url, json=body, headers=bearer(key), stream=True, timeout=60)

    first, second = listen(KEYS[0], "Speaker 1: one two three"), listen(KEYS[0])
    third, other = listen(KEYS[0]), listen(KEYS[1])
    assert [each.status_code for each in (first, second, third, other)] == [200, 200, 429, 200]
    assert "2 streams of this key" in third.json()["detail"] and third.headers["Retry-After"] == "5"
    conduct.go_on.set()
    assert first.content and service.ask(service.queue.room()).streams >= 1
    for _ in range(600):  # the first one has been heard, and is about to be counted out
        if (fourth := listen(KEYS[0])).status_code != 429:
            break
        time.sleep(0.05)
    assert fourth.status_code == 200
    for each in (second, other, fourth):
        each.close()


def test_limits_of_a_key_are_said_with_the_time_to_wait(idle):
    service = idle(open_tasks=2, per_minute=4, keys=KEYS)
    for key in KEYS:  # a second time where a minute ended meanwhile
        minute = time.time() // 60
        answers = [service.post("/v1/tasks", {"script": SCRIPT}, headers=bearer(key)) for _ in range(5)]
        if time.time() // 60 == minute:
            break
    assert [each.status_code for each in answers] == [202, 202, 429, 429, 429]
    assert (
        "2 tasks of this key" in answers[2].json()["detail"] and "4 requests in a minute" in answers[4].json()["detail"]
    )
    assert all(int(each.headers["Retry-After"]) > 0 for each in answers[2:])


def test_nobody_sees_the_tasks_of_another_key(idle):
    service = idle(keys=KEYS)
    mine = service.post("/v1/tasks", {"script": SCRIPT}, headers=bearer(KEYS[0])).json()["id"]
    for path in ("", "/events", "/audio"):
        other = service.get(f"/v1/tasks/{mine}{path}", headers=bearer(KEYS[1]))
        none = service.get(f"/v1/tasks/{'0' * 36}{path}", headers=bearer(KEYS[1]))
        assert other.status_code == none.status_code == 404 and other.json() == none.json()
    assert service.call("DELETE", f"/v1/tasks/{mine}", headers=bearer(KEYS[1])).status_code == 404
    assert service.get("/v1/tasks", headers=bearer(KEYS[1])).json() == []
    assert service.get(f"/v1/tasks/{mine}", headers=bearer(KEYS[0])).json()["status"] == "queued"


def test_without_a_key_nothing_is_said(idle):
    service = idle(keys=KEYS)
    paths = ["/v1/tasks", "/v1/voices", "/v1/voices/1/sample", "/metrics", f"/v1/tasks/{'0' * 36}"]
    for headers in ({}, bearer("no-key-of-anybody-at-all"), bearer(""), {"Authorization": f"Basic {KEYS[0]}"}):
        answers = [service.get(path, headers=headers) for path in paths]
        answers.append(service.post("/v1/audio/speech", {"input": SCRIPT}, headers=headers))
        assert {each.status_code for each in answers} == {401}
        assert answers[0].headers["WWW-Authenticate"] == "Bearer"
    assert service.get("/healthz").status_code == 200


def test_speech_is_heard_while_it_is_made(service, conduct):
    conduct.holds_at = 5
    body = {"input": SCRIPT, "voices": [1, 2], "options": {"seed": 5}}
    answer = service.post("/v1/audio/speech", body, stream=True)
    pieces, pcm = answer.iter_content(None), b""
    while len(pcm) < 5 * 6400:  # they are heard while the sixth frame is held back
        pcm += next(pieces)
    conduct.go_on.set()
    pcm += b"".join(pieces)
    assert answer.headers["X-Sample-Rate"] == "24000" and answer.headers["Transfer-Encoding"] == "chunked"
    assert np.array_equal(np.frombuffer(pcm, "<i2"), unbroken(5, FRAMES))


def test_speech_as_a_wav_at_the_end(service):
    body = {
        "model": "vibevoice",
        "input": "Hello there everybody",
        "voice": "voice 2",
        "response_format": "wav",
        "stream": False,
    }
    with wave.open(io.BytesIO(service.post("/v1/audio/speech", body).content)) as heard:
        assert heard.getparams()[:4] == (1, 2, 24_000, 8 * 3200)


def speaks_to_nobody(service, conduct, timeout_s=60):
    """Whether soon no stream is left, neither at the server nor in the count of streams."""
    deadline = time.monotonic() + timeout_s
    while streams := conduct.speaking + service.ask(service.queue.room()).streams:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return not streams


def test_a_listener_who_leaves_ends_the_stream_at_the_server(service, conduct):
    conduct.frame_s = 0.05
    answer = service.post("/v1/audio/speech", {"input": "word " * 300}, stream=True)
    next(answer.iter_content(None))
    assert conduct.speaking == 1
    answer.close()
    assert speaks_to_nobody(service, conduct)


def test_a_caller_who_leaves_before_the_first_sound_or_wants_all_at_once_ends_the_stream_too(service, conduct):
    conduct.frame_s = 0.05
    body = json.dumps({"input": "word " * 300, "stream": False}).encode()
    head = "POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", service.settings.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        while not conduct.speaking:
            time.sleep(0.01)
    assert speaks_to_nobody(service, conduct)


def test_a_task_that_was_queued_is_accepted_though_its_record_cannot_be_read(service, monkeypatch):
    async def away(self, task):
        raise RedisError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(TaskQueue, "record", away)
        answer = service.post("/v1/tasks", {"script": "Speaker 1: one"}, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202
    again = service.post("/v1/tasks", {"script": "Speaker 1: one"}, headers={"Idempotency-Key": "k"})
    assert again.json()["id"] == answer.json()["id"]


def test_speech_that_cannot_be_spoken_now_or_ever_is_an_answer_and_no_broken_stream(idle, conduct):
    service = idle(patience_s=0.3, speech_s=60)
    conduct.busy = 99
    full = service.post("/v1/audio/speech", {"input": SCRIPT})
    assert full.status_code == 503 and int(full.headers["Retry-After"]) > 0
    conduct.busy, conduct.refuse = 0, "it does not fit"
    assert service.post("/v1/audio/speech", {"input": SCRIPT}).json()["detail"][0]["message"] == "it does not fit"
    conduct.refuse, conduct.breaks, conduct.breaks_after = "", 1, 0
    assert service.post("/v1/audio/speech", {"input": SCRIPT}).status_code == 502
    long = service.post("/v1/audio/speech", {"input": "word " * 500})
    assert long.status_code == 422 and "POST /v1/tasks" in long.json()["detail"][0]["message"]


def test_pages_of_other_sites_and_other_names_are_refused(idle):
    service = idle()
    evil = service.post("/v1/tasks", {"script": SCRIPT}, headers={"Origin": "http://evil.example"})
    rebound = service.get("/v1/tasks", headers={"Host": "evil.example"})
    own = service.post("/v1/tasks", {"script": SCRIPT}, headers={"Origin": service.url})
    assert (evil.status_code, rebound.status_code, own.status_code) == (403, 421, 202)
    plain = service.post("/v1/tasks", data=json.dumps({"script": SCRIPT}), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 422, "a form of another page cannot send JSON"


def test_headers_keep_pages_from_doing_harm(idle):
    service = idle()
    for path in ("/v1/voices", "/docs", "/nothing"):
        headers = service.get(path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"


def test_bodies_are_bounded_in_size(idle):
    service = idle(script_bytes=1000)
    assert service.post("/v1/tasks", {"script": "x" * 100_000}).status_code == 413
    chunked = service.post(
        "/v1/tasks", data=(b"x" * 10_000 for _ in range(20)), headers={"Content-Type": "application/json"}
    )
    assert chunked.status_code == 413


def test_a_request_that_does_not_come_is_given_up(idle):
    service = idle(body_s=0.5)
    head = (
        b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    )
    assert b" 408 " in said(service, head), "a body that does not come"
    assert said(service, b"GET /v1/ta") == b"", "headers that do not come"
    assert said(service, b"") == b"", "nothing at all"
    assert service.get("/healthz").status_code == 200


def said(service, data):
    """What a connection that sends only this is told until it is closed."""
    with socket.create_connection(("127.0.0.1", service.settings.port), timeout=60) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
        return answer


def test_operators_see_whether_it_is_ready_and_how_it_is(service):
    service.ended(service.submit())
    ready = service.get("/readyz")
    assert ready.status_code == 200 and ready.json()["triton"] == "ok"
    figures = service.get("/metrics").text
    assert "harness_studio_done_total 1.0" in figures and 'harness_studio_tasks{state="queued"} 0.0' in figures
    assert 'path="/v1/tasks/{task}"' in figures and "harness_studio_frames_total 8.0" in figures


def test_without_workers_or_servers_it_is_not_ready(idle, conduct):
    answer = idle().get("/readyz")
    assert answer.status_code == 503 and "no worker" in answer.json()["workers"]


def test_without_redis_it_says_so(idle, redis_server):
    service = idle(redis="redis://127.0.0.1:1")
    assert service.get("/healthz").status_code == 200
    answer = service.post("/v1/tasks", {"script": SCRIPT})
    assert answer.status_code == 503 and "queue" in answer.json()["detail"]


def test_the_api_is_documented_without_a_script(idle):
    service = idle()
    page = service.get("/docs")
    assert page.status_code == 200 and "<script" not in page.text and "style=" not in page.text
    document = service.get("/openapi.json").json()
    assert all(path in page.text for path in document["paths"])
    for path, methods in document["paths"].items():
        for method in methods.values():
            refused = method["responses"].get("422", {"content": {"application/json": {"schema": {}}}})
            assert "HTTPValidationError" not in str(refused), f"{path} says another form than it answers with"
    assert document["paths"]["/v1/tasks"]["post"]["responses"].keys() >= {
        "202",
        "401",
        "409",
        "413",
        "422",
        "429",
        "503",
    }


def test_scripts_are_data_everywhere(idle):
    service = idle()
    task = service.submit("Speaker 1: <script>alert(1)</script>")
    answer = service.get(f"/v1/tasks/{task}")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json()["title"] == "<script>alert(1)</script>"


def test_many_follow_one_task(service, conduct):
    conduct.frame_s = 0.05
    task, ends = service.submit(SCRIPT), []

    def follow():
        answer = requests.get(f"{service.url}/v1/tasks/{task}/events", stream=True, timeout=60)
        lines = [line for line in answer.iter_lines() if line.startswith(b"data: ")]
        ends.append(json.loads(lines[-1][6:])["status"])

    threads = [threading.Thread(target=follow) for _ in range(20)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert ends == ["done"] * 20
