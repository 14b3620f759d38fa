"""Trials on the hosts of a Ray cluster, on a local one; skipped where Ray is not installed."""

import os

import pytest

from harness import signoff as job
from harness.deploy.config import Deployment
from harness.drive.load import Load
from harness.errors import InputError
from harness.records.store import Run
from harness.sweep import ray_workers as subject
from harness.sweep.trial import TrialFailed, TrialRequest
from harness.sweep.workers import Fleet, HostLost

PLAN = """
name: ray
preset: tiny
mix: quick
slos: {short: {rtf_p95: 0.9}}
targets_qps: [1]
space: {diffusion_decoder.delay_us: [0, 1000]}
ladder: {sessions: [1, 2], seconds: 2}
budget_minutes: 10
"""
LOAD = Load.ladder(2.0, 1, (1, 2))
BREAK, DIE = {"delay_us": 1}, {"delay_us": 2}  # points


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


def test_without_ray_it_says_how_to_get_it(plan, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install '\.\[ray\]'"):
        subject.ray_hosts("auto", plan, Deployment())


def test_a_cluster_and_servers_are_not_given_together(plan, tmp_path):
    with pytest.raises(InputError, match="either --url"):
        job.SignOff(plan, tmp_path, url="A:8001", ray="auto")


def test_a_failed_trial_is_told_as_such_and_a_lost_actor_is_a_lost_host(ray, plan, monkeypatch):
    class Made:
        def __init__(self, plan_path, plan, base):
            assert "name: ray" in plan

        def start(self):
            return "127.0.0.1:1"

        def run(self, request):
            if request.point == DIE:
                os._exit(1)
            if request.point == BREAK:
                raise TrialFailed("the server ended")
            return request

        def recover(self):
            return "127.0.0.1:2"

        def abort(self): ...

        def close(self): ...

    monkeypatch.setattr(subject, "Worker", Made)
    with Fleet(subject.ray_hosts("local", plan, Deployment())) as fleet:
        (host,) = fleet.hosts
        assert host.name.startswith("ray:") and host.url == "127.0.0.1:1"
        assert host.run(TrialRequest({}, LOAD, repeat=1)) == TrialRequest({}, LOAD, repeat=1)
        with pytest.raises(TrialFailed, match="the server ended"):
            host.run(TrialRequest(BREAK, LOAD))
        host.recover()
        assert host.url == "127.0.0.1:2"
        with pytest.raises(HostLost, match="is lost"):
            host.run(TrialRequest(DIE, LOAD))


@pytest.mark.server
@pytest.mark.timeout(600)  # it may wait for another one
def test_a_sweep_runs_on_a_cluster_and_its_trials_say_where(ray, plan, tmp_path, the_only_sign_off):
    work = job.SignOff(plan, tmp_path, ray="local")
    work.execute(ladders_only=True)
    trials = Run.open(work.run.path).trials()
    assert [trial.deployment for trial in trials if trial.valid] == work.spec.points()
    assert {trial.target[:4] for trial in trials} == {"ray:"}
    assert work.run.manifest.device == "host of the Ray cluster local"
