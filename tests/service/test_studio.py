"""The studio: what it refuses, what it starts and ends, and a real Triton whose tasks are spoken whatever dies."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
from conftest import still_running, wait_for
from speaking_triton import Conduct, speaking

from harness.deploy.ports import free_ports
from harness.errors import InputError, ServerError
from harness.service.redis_server import RedisServer, redis_program
from harness.service.settings import StudioSettings
from harness.service.studio import Studio, StudioPlan

QUIET = lambda line: None  # noqa: E731


def plan_of(folder, url, **more):
    return StudioPlan(StudioSettings(folder=str(folder), url=url, port=0, **more), None)


def written(server):
    """Wait until Redis has written what it was told: while a slow disk syncs it puts that off for up to 2 s."""
    import redis

    with redis.Redis.from_url(server.url) as client:
        wait_for(lambda: client.info("persistence")["aof_buffer_length"] == 0)


def test_everything_is_started_restarted_and_ended(tmp_path):
    """Front, worker and Redis are killed one after the other; the task is spoken all the same."""
    with speaking(Conduct(frame_s=0.1)) as fake:
        with Studio(plan_of(tmp_path, fake.url, segment_s=1.0, lease_s=2.0), QUIET) as studio:
            task = requests.post(f"{studio.url}/v1/tasks", json={"script": "Speaker 1: " + "word " * 30}, timeout=30)
            address = f"{studio.url}/v1/tasks/{task.json()['id']}"
            pids = [studio.workers[0].pid, studio.front.pid, studio.redis.pid]
            written(studio.redis)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                time.sleep(0.3)
                studio.look()

            def is_done():
                studio.look()
                with contextlib.suppress(requests.ConnectionError):
                    return requests.get(address, timeout=30).json().get("status") == "done"

            wait_for(is_done)
            assert requests.get(f"{address}/audio", timeout=30).content[44:] != b""
            processes = [
                psutil.Process(studio.redis.pid),
                *map(psutil.Process, (studio.front.pid, studio.workers[0].pid)),
            ]
            assert not set(pids) & {each.pid for each in processes}
        assert still_running(processes, 60) == []
        port = studio.settings.port
    with pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
    assert not list(tmp_path.rglob("*.sock")) and {each.name for each in tmp_path.iterdir()} == {
        ".lock", "audio", "logs", "redis",
    }  # fmt: skip


def test_tasks_go_on_at_the_next_start(tmp_path):
    with speaking(Conduct(frame_s=0.1)) as fake:
        plan = plan_of(tmp_path, fake.url, segment_s=0.5, lease_s=2.0)
        with Studio(plan, QUIET) as studio:
            body = {"script": "Speaker 1: " + "word " * 40}
            task = requests.post(f"{studio.url}/v1/tasks", json=body, timeout=30).json()["id"]
            wait_for(lambda: requests.get(f"{studio.url}/v1/tasks/{task}", timeout=30).json()["frames"] > 4)
        with Studio(plan, QUIET) as studio:
            assert requests.get(f"{studio.url}/v1/tasks/{task}", timeout=30).json()["frames"] >= 4
            wait_for(lambda: requests.get(f"{studio.url}/v1/tasks/{task}", timeout=30).json()["status"] == "done")


def test_one_folder_has_one_studio_at_a_time(tmp_path):
    with speaking(Conduct()) as fake, Studio(plan_of(tmp_path, fake.url), QUIET):
        with pytest.raises(InputError, match="a studio runs in"), Studio(plan_of(tmp_path, fake.url), QUIET):
            pass


def test_a_part_that_ends_again_and_again_is_given_up(tmp_path):
    studio = Studio(plan_of(tmp_path, "127.0.0.1:1"), QUIET)
    with pytest.raises(ServerError, match="front ended 5 times in a row"):
        for _ in range(9):
            studio._again("front", lambda: None)


def test_a_redis_that_cannot_start_says_why(tmp_path):
    (tmp_path / "appendonly.aof").write_text("this is no such file")
    with pytest.raises(ServerError, match="Redis did not start"):
        RedisServer(tmp_path).start()


def test_redis_is_behind_a_password_on_loopback_and_ends(tmp_path):
    import redis

    server = RedisServer(tmp_path).start()
    process = psutil.Process(server.pid)
    try:
        assert Path(redis_program()).exists() and {each.laddr.ip for each in process.net_connections()} == {"127.0.0.1"}
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server._port).ping()
    finally:
        server.stop()
    assert still_running([process], 60) == []


def command(tmp_path, *more):
    return [sys.executable, "-m", "harness", "studio", "--folder", str(tmp_path), *more]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "0.0.0.0"), "callers need a key"),
        (("--keys-file", "none.txt"), "--keys-file none.txt cannot be read"),
        (("--url", "http://x"), "cannot stream from 'http://x'"),
        (("--url", "127.0.0.1:1", "--storage", "nonsense://x", "--port", "0"), "storage nonsense://x cannot be used"),
        (("--workers", "0"), "--workers 0"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, here, options, said):
    code, printed = here("studio", "--folder", tmp_path, *options)
    assert code in (64, 69) and said in printed
    assert "Traceback" not in printed


def test_ctrl_c_ends_the_command_and_leaves_no_process(tmp_path):
    with speaking(Conduct()) as fake:
        port = str(free_ports(1)[0])
        running = subprocess.Popen(
            command(tmp_path, "--url", fake.url, "--port", port), stdout=subprocess.PIPE, text=True
        )
        lines = []
        while line := running.stdout.readline():
            lines.append(line)
            if line.startswith("studio:"):
                break
        children = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130 and len(children) >= 3 and still_running(children, 60) == []
        assert port in lines[-1]


@pytest.mark.server
def test_a_task_on_the_real_server_equals_one_request(tmp_path):
    """Three segments on Triton at preset tiny, one of them begun by a worker that is killed."""
    import asyncio

    import numpy as np

    from harness.client.stream import SpeechClient
    from harness.deploy.config import Deployment
    from harness.service.audio import to_pcm
    from harness.service.segments import request_of
    from harness.service.task import TaskSpec

    settings = StudioSettings(folder=str(tmp_path), port=0, segment_s=40 / 7.5, lease_s=2.0)
    script = "\n".join(f"Speaker {1 + n % 4}: It is early, and nobody is here yet." for n in range(6))
    with Studio(StudioPlan(settings, Deployment()), QUIET) as studio:
        body = {"script": script, "options": {"seed": 11}}
        task = requests.post(f"{studio.url}/v1/tasks", json=body, timeout=60).json()["id"]
        address = f"{studio.url}/v1/tasks/{task}"
        state = lambda: requests.get(address, timeout=60).json()  # noqa: E731
        wait_for(lambda: state()["frames"] > 45)
        os.kill(studio.workers[0].pid, signal.SIGKILL)
        wait_for(lambda: studio.look() or state()["status"] == "done", 120)
        heard = np.frombuffer(requests.get(f"{address}/audio", timeout=60).content[44:], "<i2")

        async def whole():
            pieces = []
            async with SpeechClient(studio.settings.url) as client:
                frames = state()["of_frames"]
                spec = TaskSpec(script=script, voices=(1, 2, 3, 4), frames=frames, estimate=frames, seed=11)
                await client.speak(request_of("w", "t", spec, frames), "closed", on_audio=pieces.append)
            return np.frombuffer(b"".join(map(to_pcm, pieces)), "<i2")

        expected = asyncio.run(whole())
    assert heard.shape == expected.shape
    assert np.abs(heard.astype(int) - expected).max() <= 4, "as a kept session may differ: 1e-4 of full scale"
