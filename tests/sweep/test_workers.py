"""Hosts side by side: points are shared out, a lost host loses no trial, an interrupt aborts trials."""

import contextlib
import signal
import sys
import threading

import pytest

from harness.deploy.config import Deployment
from harness.drive.load import Load
from harness.errors import StoreError
from harness.sweep import trial
from harness.sweep.trial import TrialFailed, TrialRequest
from harness.sweep.workers import Fleet, Host, HostLost, TrialAborted

LOAD = Load.ladder(2.0, 1, (1, 2))
POLITE = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True)"


class Server:
    url = "127.0.0.1:1"

    def __init__(self):
        self.answers, self.stopped = True, 0

    def alive(self):
        return self.answers

    def stop(self):
        self.stopped += 1


class Driver:
    """Runs what it is told to: returns the point, breaks, or waits until it is cut off."""

    def __init__(self, server, breaks=(), waits=False):
        self.server, self.breaks, self.waits = server, list(breaks), waits
        self.aborted, self.begun = threading.Event(), threading.Event()

    def run(self, request):
        self.begun.set()
        if self.waits:
            assert self.aborted.wait(120)
            raise TrialFailed("Locust was aborted")
        if self.breaks and self.breaks.pop(0):
            raise TrialFailed("the server ended")
        return request.point

    def abort(self):
        self.aborted.set()


@contextlib.contextmanager
def running(server):
    yield server


def host(name="A", ours=True, **how) -> Host:
    servers = []

    def open_server():
        servers.append(Server())
        return running(servers[-1])

    made = Host(name, open_server, lambda server: Driver(server, **how), ours=ours)
    made.servers = servers
    return made


def test_points_are_shared_out_and_each_is_measured_once():
    points, done, lock = list(range(20)), [], threading.Lock()

    def work(at: Host) -> bool:
        with lock:
            if not points:
                return False
            point = points.pop()
        done.append((at.run(TrialRequest({"delay_us": point}, LOAD)), at.name))
        return True

    with Fleet([host("A"), host("B"), host("C")]) as fleet:
        fleet.each(work)
    assert sorted(point["delay_us"] for point, _ in done) == list(range(20))


def test_our_server_is_started_anew_and_somebody_elses_is_given_up():
    with host(breaks=[True]) as ours:
        with pytest.raises(TrialFailed):
            ours.run(TrialRequest({}, LOAD))
        ours.recover()
        assert [server.stopped for server in ours.servers] == [1, 0] and ours.run(TrialRequest({}, LOAD)) == {}
    with host(ours=False) as theirs:
        theirs.recover()
        theirs.servers[0].answers = False
        with pytest.raises(HostLost, match="A no longer answers"):
            theirs.recover()
        assert theirs.servers[0].stopped == 0


def test_a_host_that_is_gone_takes_no_more_and_the_others_go_on():
    done = []

    def work(at: Host) -> bool:
        if at.name == "B":
            raise HostLost("B does not answer any more")
        done.append(at.name)
        return len(done) < 5

    with Fleet([host("A"), host("B")]) as fleet:
        fleet.each(work)
        assert done == ["A"] * 5 and fleet.lost == ["B does not answer any more"]
        assert [left.name for left in fleet.hosts] == ["A"]


def test_when_all_hosts_are_lost_the_last_reason_is_said():
    def lost(at: Host) -> bool:
        raise HostLost(f"{at.name} is lost")

    with Fleet([host("A"), host("B")]) as fleet, pytest.raises(HostLost, match="is lost"):
        fleet.each(lost)


def test_another_error_ends_the_work_of_all():
    def work(at: Host) -> bool:
        if at.name == "B":
            raise StoreError("the disk is full")
        return True  # would go on for ever

    with Fleet([host("A"), host("B")]) as fleet, pytest.raises(StoreError, match="disk is full"):
        fleet.each(work)


def test_an_interrupt_cuts_off_the_trials_under_way(monkeypatch):
    cut = []

    def work(at: Host) -> bool:
        try:
            at.run(TrialRequest({}, LOAD))
        except TrialAborted:
            cut.append(at.name)
            raise
        return True

    fleet = Fleet([host("A", waits=True), host("B", waits=True)])

    def interrupt(futures, return_when):
        assert all(each._driver.begun.wait(120) for each in fleet.hosts)
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.sweep.workers.wait", interrupt)
    with fleet, pytest.raises(KeyboardInterrupt):
        fleet.each(work)
    assert sorted(cut) == ["A", "B"]


def test_the_last_host_goes_on_with_what_is_left_after_another_was_lost():
    """Work is given out anew after a loss: a host on its own must not still be told to stop."""
    done = []
    with Fleet([host("A"), host("B", ours=False)]) as fleet:
        fleet.each(lambda each: False)
        fleet.hosts.pop()
        fleet.each(lambda each: done.append(each.name) or len(done) < 3)
    assert done == ["A"] * 3


def test_a_trial_that_is_cut_off_is_none_though_locust_ends_well(tmp_path, monkeypatch):
    spawned = trial.spawn
    monkeypatch.setattr(
        trial, "spawn", lambda _, log, **how: spawned([sys.executable, "-c", f"{POLITE}; time.sleep(60)"], log)
    )
    driver = trial.Driver(Server(), tmp_path / "plan.yaml", None, tmp_path, Deployment())
    codes = []
    running = threading.Thread(target=lambda: codes.append(driver._locust(tmp_path / "records", LOAD)[0]))
    running.start()
    while not ((log := tmp_path / "locust.log").exists() and log.read_text()):
        threading.Event().wait(0.01)
    driver.abort()
    running.join()
    assert codes == [-signal.SIGTERM]
