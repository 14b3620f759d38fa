"""The fused topology on the real server: it sounds as the staged one, says "busy", comes back, and is signed off."""

import asyncio
import contextlib
import os
import signal
import time

import numpy as np
import psutil
import pytest
from conftest import make_request
from test_server_sessions import SCRIPT, done, hear, hear_all
from triton_ends import ended_with_it

from harness import signoff as job
from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.config import Deployment
from harness.deploy.server import TritonServer
from harness.exit_codes import OF_VERDICT
from harness.records.schema import Outcome
from harness.runs import stages

pytestmark = pytest.mark.server
LIMITS = {f"{wire.ENTRY}.sessions_at_once": "2", f"{wire.ENTRY}.waiting_limit": "0", f"{wire.ENTRY}.beat_seconds": "1"}
PLAN = """
name: topologies
preset: tiny
mix: {classes: {short: {weight: 1, length: {fixed: 2}}}}
slos: {short: {rtf_p95: 2.0}}
targets_qps: [0.01]
space: {topology: [staged, fused], delay_us: [0]}
ladder: {sessions: [1, 2, 3], seconds: 4}
confirm: {load_share: [0.5], seconds: 5}
budget_minutes: 6
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    deployment = Deployment(topology=wire.FUSED, parameters=LIMITS)
    with TritonServer(deployment, root=tmp_path_factory.mktemp("fused")) as started:
        yield started


def talk(name="t", frames=12, **more):
    return make_request(name, SCRIPT, (1, 3), frames, **more)


def test_sessions_beyond_its_places_are_told_busy_and_one_that_leaves_frees_its_place(server):
    async def run():
        async with SpeechClient(server.url) as client:
            heard = [asyncio.Event(), asyncio.Event()]
            calls = [client.speak(talk("long", 4000), "closed", on_audio=lambda _, e=each: e.set()) for each in heard]
            long = [asyncio.ensure_future(call) for call in calls]
            await asyncio.wait_for(asyncio.gather(*(each.wait() for each in heard)), 60)
            refused = await hear(client, talk("third"))
            for task in long:
                task.cancel()
            await asyncio.gather(*long, return_exceptions=True)
            while (again := await hear(client, talk("after"))).result.outcome is not Outcome.DONE:
                assert time.monotonic() < deadline, again.result.error
                await asyncio.sleep(0.3)
            return refused

    deadline = time.monotonic() + 120
    refused = asyncio.run(run())
    assert refused.result.outcome is Outcome.ERROR and wire.BUSY.strip() in refused.result.error


def test_an_engine_that_dies_fails_its_sessions_with_a_descriptive_error_and_comes_back(server):
    async def run():
        async with SpeechClient(server.url) as client:
            speaking = asyncio.ensure_future(hear(client, talk("cut off", 4000)))
            await asyncio.sleep(2)
            engine_of(server).kill()
            return await asyncio.wait_for(speaking, 60)

    cut = asyncio.run(run())
    assert cut.result.outcome is Outcome.ERROR
    assert ended_with_it(server, cut.result.error) or wire.ENTRY in cut.result.error
    deadline = time.monotonic() + 90
    while (again := hear_all(server.url, talk("after"))[0]).result.outcome is not Outcome.DONE:
        assert time.monotonic() < deadline, again.result.error
        time.sleep(1)


def test_a_server_that_was_killed_is_started_again_at_its_address(server):
    url, killed = server.url, server.pid
    os.kill(killed, signal.SIGKILL)
    while server.alive():
        time.sleep(0.05)
    assert "by signal 9" in server.last_words()
    server.restart()
    assert server.url == url and server.pid != killed
    done(*hear_all(url, talk("after")))


def test_a_kept_session_goes_on_in_the_other_topology(server, triton):
    said = dict(seed=3, say=(wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_END, wire.TOKEN_SPEECH_BEGIN))
    (whole,) = done(*hear_all(triton.url, talk(frames=24, **said)))
    for kept_at, resumed_at in ((server, triton), (triton, server)):
        (first,) = done(*hear_all(kept_at.url, talk(frames=11, keep=True, **said)))
        (second,) = done(*hear_all(resumed_at.url, talk(frames=13, carry=first.carry)))
        np.testing.assert_allclose(np.concatenate([first.audio, second.audio]), whole.audio, atol=1e-4)


def test_a_change_of_topology_starts_the_server_anew_and_the_audio_stays_the_same(server):
    requests = [talk("one", 10, seed=4), talk("two", 14, seed=9, guidance_scale=2.0, diffusion_steps=5)]
    fused = done(*hear_all(server.url, *requests))
    assert set(server.reload(Deployment())) == set(wire.MODELS)
    staged = done(*hear_all(server.url, *requests))
    for ours, theirs in zip(fused, staged, strict=True):
        np.testing.assert_allclose(ours.audio, theirs.audio, atol=1e-4)


@pytest.mark.timeout(600)  # on a busy host; half a minute of it is measured, and it may wait for another one
def test_a_sign_off_over_both_topologies_ends_with_a_verdict(tmp_path, the_only_sign_off):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    work = job.SignOff(path, tmp_path)
    plan = work.execute()
    assert plan.verdict in OF_VERDICT
    trials, fit = work.run.trials(), work.run.fit()
    ladders = [trial for trial in trials if trial.kind == "ladder"]
    assert {trial.topology for trial in ladders} == set(wire.TOPOLOGIES)
    for topology in wire.TOPOLOGIES:
        assert stages.stages_by_server(work.run.manifest, topology)
    fused = next(each for each in fit.deployments if each.deployment["topology"] == wire.FUSED)
    assert wire.ENGINE in [stage.stage for stage in fused.stages if stage.points]
    if fit.best_deployment:
        best = fit.best_deployment.deployment
        written = {folder.name for folder in (work.run.path / "winner").iterdir() if folder.is_dir()}
        assert written == set(wire.TOPOLOGIES[best["topology"]])


def engine_of(server):
    for one in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(f"/{wire.ENTRY}/" in word for word in one.cmdline()):
                return one
    raise AssertionError("no process serves the entry")
