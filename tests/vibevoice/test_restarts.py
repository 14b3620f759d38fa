"""Who loads a model again whose process died, when, and with what configuration."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from harness import wire
from harness.vibevoice.process import restarts
from harness.vibevoice.process.restarts import Note, Registry, Restarter, restart_of, server_mark
from harness.vibevoice.process.stubs import Stub, started_ns
from harness.vibevoice.sessions.table import is_alive, is_stopped, session_ids

SERVER = "1-7-1"
DEAD = 2**22 + 1  # above any process id
CONFIG = json.dumps({"name": "x", "parameters": {"preset": {"string_value": "tiny"}}})
ASKED = CONFIG.replace("tiny", "asked for")


@pytest.fixture
def sleeper():
    """A process that can be killed; until it is waited for it is then a zombie, as Triton's are."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def registry(tmp_path):
    return Registry(SERVER, tmp_path)


def note_of(model, pid, instance=0, server=SERVER, since_ns=0, config=CONFIG, started_ns=0):
    return Note(server, pid, f"{model}_0_{instance}", model, config, since_ns, started_ns=started_ns)


def restarter_of(registry, pid=None, fail=(), stubs=()):
    loaded = []

    def load(model, config):
        if model in fail:
            raise RuntimeError("no explicit model control")
        loaded.append((model, json.loads(config)["parameters"]["restarts"]["string_value"]))

    return Restarter(registry, load, os.getpid() if pid is None else pid, lambda: stubs), loaded


def looks(restarter, now_s):
    """What two checks in a row restart: a single one does not restart yet."""
    return restarter.look(now_s) + restarter.look(now_s)


def test_a_process_that_died_is_told_from_one_that_runs(sleeper):
    assert is_alive(os.getpid()) and is_alive(sleeper.pid)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert not is_alive(sleeper.pid)
    sleeper.wait()
    assert not is_alive(sleeper.pid)


def test_a_process_that_stays_stopped_is_ended_before_its_model_is_loaded(registry, sleeper):
    """One that goes on after Triton has replaced it ends the server. A short stop, as of a whole host, is none."""
    registry.put(note_of(wire.VOCODER, os.getpid()), "a")
    registry.put(note_of(wire.VOICE, sleeper.pid), "b")
    registry.put(note_of(wire.LLM, os.getpid()), "c")
    restarter, loaded = restarter_of(registry)
    for _ in range(2):
        sleeper.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
        assert [restarter.look(0.0) for _ in range(4)] == [[]] * 4 and is_alive(sleeper.pid)
        sleeper.send_signal(signal.SIGCONT)
        while is_stopped(sleeper.pid):
            time.sleep(0.01)
        assert restarter.look(0.0) == []
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED)
    for _ in range(6):
        restarter.look(0.0)
    sleeper.wait(60)
    assert looks(restarter, 1.0) == [wire.VOICE] and loaded == [(wire.VOICE, "1")]


def test_a_model_whose_process_died_is_loaded_again_once(registry, sleeper):
    registry.put(note_of(wire.VOICE, os.getpid()), "a")
    registry.put(note_of(wire.VOCODER, sleeper.pid), "b")
    restarter, loaded = restarter_of(registry)
    for region in ("a", "b"):
        (registry.folder / region).touch()
    assert restarter.look(0.0) == [] and len(registry.notes()) == 2
    sleeper.kill()
    sleeper.wait()
    assert looks(restarter, 1.0) == [wire.VOCODER]
    assert looks(restarter, 2.0) == []
    assert loaded == [(wire.VOCODER, "1")]
    assert [note.model for note in registry.notes().values()] == [wire.VOICE]
    assert sorted(path.name for path in registry.folder.iterdir()) == ["a", "a.model"]  # a region is 16 MiB


def test_only_the_first_of_the_watchers_acts(registry, sleeper):
    """The voice encoder before the LLM stage, the LLM stage before an entry; a stage that does not watch never."""
    registry.put(note_of(wire.ENTRY, os.getpid()), "a")
    registry.put(note_of(wire.DIFFUSION, DEAD), "dead")
    registry.put(note_of(wire.LLM, sleeper.pid), "b")
    entry, loaded = restarter_of(registry)
    assert looks(entry, 0.0) == []
    sleeper.kill()
    sleeper.wait()
    assert set(looks(entry, 0.0)) == {wire.DIFFUSION, wire.LLM} and len(loaded) == 2


def test_a_process_whose_place_was_taken_is_left_alone(registry):
    """A model that was loaded anew meanwhile; of two dead instances of one model it is loaded once."""
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.LLM, DEAD), "old")
    registry.put(note_of(wire.LLM, os.getpid(), since_ns=5), "new")
    for instance in range(2):
        registry.put(note_of(wire.VOCODER, DEAD + 1 + instance, instance), f"dead{instance}")
    restarter, loaded = restarter_of(registry)
    assert looks(restarter, 0.0) == [wire.VOCODER]
    assert loaded == [(wire.VOCODER, "1")] and len(registry.notes()) == 2


def test_one_that_lives_on_after_its_successor_came_does_not_stand_for_it(registry):
    """And what is loaded again is the configuration of the successor."""
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.ENTRY, os.getpid(), since_ns=1), "old")
    registry.put(note_of(wire.ENTRY, DEAD, since_ns=2, config=once(CONFIG)), "new")
    registry.put(note_of(wire.ENTRY, DEAD + 1, since_ns=0), "oldest")
    restarter, loaded = restarter_of(registry)
    assert looks(restarter, 0.0) == [wire.ENTRY]
    assert loaded == [(wire.ENTRY, "2")] and len(registry.notes()) == 2


def test_a_deployment_that_was_replaced_does_not_come_back(registry):
    """Of two instances one died; before that was seen, the model was loaded with one instance."""
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    two = json.dumps({**json.loads(CONFIG), "instance_group": [{"count": 2}]})
    registry.put(note_of(wire.VOCODER, DEAD, instance=1, config=two), "old")
    registry.put(note_of(wire.VOCODER, os.getpid(), since_ns=5), "new")
    restarter, loaded = restarter_of(registry)
    assert looks(restarter, 0.0) == [] and loaded == []


def test_notes_of_another_server_and_files_of_others_mean_nothing(registry, tmp_path):
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.VOCODER, DEAD, server=SERVER + "1"), "foreign")
    for number, content in enumerate(("", "[1]", '{"server": 7}', "\0\1")):
        (tmp_path / f"{number}.model").write_text(content)
    restarter, loaded = restarter_of(registry)
    assert looks(restarter, 0.0) == [] and loaded == []


def test_a_load_that_fails_is_tried_again_later(registry, capsys):
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.VOCODER, DEAD), "dead")
    fail = [wire.VOCODER]
    restarter, loaded = restarter_of(registry, fail=fail)
    assert [looks(restarter, now) for now in (0.0, 5.0, 9.9)] == [[]] * 3
    assert capsys.readouterr().out.count("cannot be loaded again: no explicit model control") == 1
    fail.clear()
    assert looks(restarter, 10.0) == [wire.VOCODER]


def test_every_restart_makes_another_configuration():
    again = json.loads(once(once(CONFIG, pid=4), pid=5))
    values = {"preset": "tiny", "restarts": "2", "replaces": "5 7"}
    assert again["parameters"] == {name: {"string_value": value} for name, value in values.items()}
    assert json.loads(once("{}"))["parameters"]["restarts"] == {"string_value": "1"}


def once(config, pid=4):
    """The configuration of a restart."""
    return restart_of(note_of(wire.LLM, pid), config, 7)


def test_a_model_that_is_being_loaded_is_not_restarted_with_the_configuration_that_it_replaces(registry):
    """Its process was killed during a reload: the one that replaces it has written no note yet."""
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.LLM, DEAD, since_ns=5, started_ns=4), "old")
    replacing = [Stub(DEAD + 1, wire.LLM, "new", 1, started_ns=9)]
    restarter, loaded = restarter_of(registry, stubs=replacing)
    assert [looks(restarter, now) for now in range(5)] == [[]] * 5 and not loaded
    registry.put(note_of(wire.LLM, os.getpid(), since_ns=10, config=ASKED), "new")
    assert looks(restarter, 6.0) == [] and not (registry.folder / "old.model").exists()


def test_a_load_that_fails_and_an_old_process_that_is_slow_to_end_keep_no_model_from_its_restart(registry):
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.LLM, DEAD, since_ns=5, started_ns=4), "old")
    stubs = [Stub(os.getpid(), wire.LLM, "older", 1, started_ns=2), Stub(7, wire.VOCODER, "other", 1, started_ns=9)]
    loads = Stub(DEAD + 1, wire.LLM, "new", 1, started_ns=9)
    restarter, loaded = restarter_of(registry, stubs=[*stubs, loads])
    assert looks(restarter, 0.0) == []
    restarter.stubs = lambda: stubs  # the one that loaded has failed
    assert looks(restarter, 1.0) == [wire.LLM]


def test_when_processes_started_is_compared_by_one_clock_also_after_a_host_was_suspended(registry):
    """The clock of /proc is then ahead of that of the notes: every process looks younger than every note."""
    ahead = 10**15
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.LLM, DEAD, since_ns=5, started_ns=ahead + 4), "old")
    older = Stub(os.getpid(), wire.LLM, "older", 1, started_ns=ahead + 2)
    restarter, loaded = restarter_of(registry, stubs=[older])
    assert looks(restarter, 0.0) == [wire.LLM]


def test_a_note_tells_when_its_process_started_as_the_stubs_of_a_server_do(registry, monkeypatch, tmp_path):
    monkeypatch.setattr(restarts, "Registry", lambda server: Registry(server, tmp_path))
    monkeypatch.setattr(restarts.atexit, "register", lambda *_, **__: None)
    args = {
        "model_name": wire.VOCODER,
        "model_config": CONFIG,
        "model_instance_name": "x_0",
        "model_instance_device_id": "0",
    }
    restarts.attend(args, lambda *_: None, None)
    (note,) = Registry(server_mark(os.getppid()), tmp_path).notes().values()
    assert note.started_ns == started_ns(os.getpid()) > 0
    assert abs(time.monotonic_ns() - note.since_ns) < 60e9  # what clients compare its age with


def test_a_model_that_another_loaded_during_the_restart_before_it_keeps_its_sessions(registry):
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    for number, model in enumerate((wire.LLM, wire.VOCODER, wire.DIFFUSION)):
        registry.put(note_of(model, DEAD + number, since_ns=number), model)
    given = []

    def load(model, config):
        given.append(model)
        meanwhile = (wire.LLM, wire.VOCODER) if len(given) == 1 else ()  # a client loads them
        for other in {model, *meanwhile}:
            registry.put(note_of(other, os.getpid(), since_ns=9), f"{other} again")

    restarter = Restarter(registry, load, os.getpid(), tuple)
    assert looks(restarter, 0.0) == given
    assert sorted(given) in [
        [wire.DIFFUSION],
        sorted([wire.DIFFUSION, wire.LLM]),
        sorted([wire.DIFFUSION, wire.VOCODER]),
    ]
    assert looks(restarter, 1.0) == []


def test_a_restart_that_overtook_a_load_is_followed_by_what_was_asked_for(registry):
    """Triton carries loads of one model out one after the other: the restart may come after the newer one."""
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.LLM, DEAD, since_ns=5), "old")
    asked, given = note_of(wire.LLM, os.getpid(), since_ns=8, config=ASKED), []

    def load(model, config):
        if not given:  # the server has just carried out the other load, and ends its process after this one
            registry.put(asked, "asked")
        given.append(config)
        note = note_of(model, os.getpid(), since_ns=8 + len(given), config=config)
        registry.put(note.among(registry.notes().values()), f"restart-{len(given)}")
        (registry.folder / "asked.model").unlink(missing_ok=True)

    restarter = Restarter(registry, load, os.getpid(), tuple)
    for now in range(6):
        restarter.look(float(now))
    presets = [json.loads(config)["parameters"]["preset"]["string_value"] for config in given]
    assert presets == ["tiny", "asked for"]


def test_a_configuration_that_a_client_read_after_a_restart_and_loads_later_is_a_new_one(registry):
    """As a sweep of an external server does at its end."""
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.LLM, os.getpid(), since_ns=20, config=ASKED), "swept")
    restored = note_of(wire.LLM, os.getpid(), since_ns=30, config=once(CONFIG, pid=DEAD))
    registry.put(restored.among(registry.notes().values()), "restored")
    restarter, loaded = restarter_of(registry)
    assert looks(restarter, 0.0) == [] and not loaded


def test_session_ids_of_two_processes_never_meet_and_cannot_be_guessed():
    drawn = {pid: [next(ids) for _ in range(1_000)] for pid in (1, 5, 6, 2**22 - 1) for ids in [session_ids(pid)]}
    for pid, ids in drawn.items():
        assert {session >> 42 for session in ids} == {pid}
        assert len(set(ids)) == 1_000 and 0 < min(ids) and max(ids) < 2**64
        ahead = np.diff([session % 2**42 for session in ids])
        assert abs((ahead > 0).mean() - 0.5) < 0.1 and np.abs(ahead).min() > 1_000  # no counter


def test_servers_of_one_pid_are_told_apart_by_when_they_started(sleeper):
    mark = server_mark(sleeper.pid)
    assert mark == server_mark(sleeper.pid) != server_mark(os.getpid())
    namespace, pid, started = mark.split("-")
    assert int(namespace) > 0 and int(pid) == sleeper.pid and int(started) > 0


def test_a_note_that_another_user_put_means_nothing(registry, monkeypatch):
    registry.put(note_of(wire.VOICE, os.getpid()), "voice")
    registry.put(note_of(wire.VOCODER, DEAD), "dead")
    monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    restarter, loaded = restarter_of(registry)
    assert looks(restarter, 0.0) == [] and loaded == []
