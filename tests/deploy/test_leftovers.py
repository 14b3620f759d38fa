"""What a server that was killed left behind is found by the next start."""

import contextlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from harness import wire
from harness.deploy import config, leftovers, running, server
from harness.errors import ServerError
from harness.host import keys

DEAD = 2**22 + 1  # above any process id


@pytest.fixture
def stage_of():
    """``stage_of(prefix)``: a process like a stage's, with its shared-memory region in its command."""
    started = []

    def start(prefix):
        command = [sys.executable, "-c", "import time; time.sleep(60)", f"{prefix}1234", "1048576"]
        started.append(subprocess.Popen(command))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def shared(tmp_path, monkeypatch):
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(leftovers, "_SHARED_MEMORY", folder)
    monkeypatch.setattr(keys, "SHARED_FOLDER", folder)
    return folder


def test_environments_of_a_start_that_was_killed_are_removed_by_the_next(tmp_path, shared, monkeypatch):
    temporary, folder = tmp_path / "tmp", tmp_path / ".harness" / f"triton-{DEAD}-5f"
    monkeypatch.setattr(leftovers, "_TEMPORARY", temporary)
    (folder / "models").mkdir(parents=True)
    made_s = []
    for name in ("before", "its", "later"):
        (temporary / f"python_env_{name}").mkdir(parents=True)
        made_s.append((temporary / f"python_env_{name}").stat().st_ctime)
        time.sleep(0.05)
    began_s, ended_s = np.convolve(made_s, (0.5, 0.5), "valid")  # however long this host took between them
    os.utime(folder / "models", (began_s, began_s))
    monkeypatch.setattr(leftovers, "_LONGEST_START_S", ended_s - began_s)
    leftovers.remove_stale(tmp_path)
    assert sorted(path.name for path in temporary.iterdir()) == ["python_env_before", "python_env_later"]
    assert not folder.exists()


@pytest.mark.parametrize("has_state", [True, False], ids=["that ran", "killed before it had written its state"])
def test_stages_of_a_dead_server_are_ended(tmp_path, shared, stage_of, has_state):
    folder = tmp_path / ".harness" / f"triton-{DEAD}-5f"
    folder.mkdir(parents=True)
    prefix = f"harness_{DEAD}_5f_"
    if has_state:
        dead = [DEAD, 1.0]
        (folder / "state.json").write_text(json.dumps({"owner": dead, "server": dead, "shm_prefix": prefix, "url": ""}))
    orphan, other = stage_of(prefix), stage_of(f"harness_{DEAD}_6f_")
    for name in (f"{prefix}1234", f"{prefix}1234.model", f"harness_{DEAD}_6f_1234"):
        (shared / name).touch()
    leftovers.remove_stale(tmp_path)
    assert orphan.wait(60) != 0 and other.poll() is None
    assert [path.name for path in shared.iterdir()] == [f"harness_{DEAD}_6f_1234"]
    assert not folder.exists()


def test_files_of_any_dead_server_of_this_host_are_removed_and_no_others(tmp_path, shared):
    """Its folder may be another checkout's, or long gone: its keys and notes say whose they are."""
    here = keys.server_mark(os.getpid())
    place, pid, _ = here.split("-")
    dead, reused, elsewhere = f"{place}-{DEAD}-0", f"{place}-{pid}-0", f"1-{DEAD}-0"
    for mark in (here, dead, reused, elsewhere):
        for name in (f"harness-stages-{mark}", f"harness-control-{mark}", f"harness_{mark}"):
            (shared / name).touch()
        (shared / f"harness_{mark}.model").write_text(json.dumps({"server": mark}))
    others = ("triton_python_backend_shm_region_1", "harness-stages-", "harness_1.model", "x.model", "harness-else")
    for name in others:
        (shared / name).touch()
    (shared / "x.model").write_text("[1]")
    leftovers.remove_stale(tmp_path)
    left = {path.name for path in shared.iterdir()}
    assert not any(mark in name for name in left for mark in (dead, reused))
    assert len(left) == 2 * 4 + len(others)


def test_a_log_that_was_kept_is_not_a_leftover(tmp_path, shared):
    log = tmp_path / ".harness" / f"triton-{DEAD}-5f.log"
    log.parent.mkdir()
    log.write_text("why it ended")
    leftovers.remove_stale(tmp_path)
    assert log.read_text() == "why it ended"


def test_environments_that_a_start_made_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "_TEMPORARY", tmp_path)
    for name in ("python_env_old", "python_env_new", "python_env_full", "else"):
        if name == "python_env_new":
            time.sleep(0.05)
            began_s = time.time()
            time.sleep(0.05)
        (tmp_path / name).mkdir()
    (tmp_path / "python_env_full" / "file").touch()
    leftovers.remove_environments(began_s)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["else", "python_env_full", "python_env_old"]


def test_what_a_log_says_of_restarts_is_told_once_and_nothing_else(tmp_path):
    one = server.TritonServer(config.Deployment(), root=tmp_path)
    assert one.restarts() == []
    one.folder.mkdir(parents=True)
    said = f"{wire.LLM}{wire.LOADED_AGAIN}"
    with open(one.log, "a") as log:
        log.write(f"x\nanother{wire.LOADED_AGAIN}\n{said}\n{wire.ENTRY} ended and can")
        log.flush()
        assert one.restarts() == [said] and one.restarts() == []
        log.write("not be loaded again: no memory\n")
        log.flush()
        assert one.restarts() == [f"{wire.ENTRY}{wire.NOT_LOADED}: no memory"] and one.restarts() == []


def test_a_server_that_is_not_started_has_no_process(tmp_path):
    with pytest.raises(ServerError, match="is not started, and has no process: start it first"):
        _ = server.TritonServer(config.Deployment(), root=tmp_path).pid


def test_a_server_that_ended_by_itself_keeps_its_log_and_says_how(tmp_path):
    ended = server.TritonServer(config.Deployment(), root=tmp_path)
    ended.folder.mkdir(parents=True)
    ended.log.write_text("first\nterminate called after throwing\n\n")
    ended._process = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"])
    ended._process.wait()
    ended.stages = (None,)  # it was ready
    said = ended.last_words()
    assert "by signal 6" in said and "terminate called after throwing" in said and str(ended.kept_log) in said
    ended.stop()
    assert ended.kept_log.read_text().startswith("first") and not ended.folder.exists()
    assert "by signal 6" in ended.last_words()


@pytest.mark.parametrize("said, starts", [("boost::interprocess::lock_exception", 1), ("no memory", 0)])
def test_a_reload_that_ends_triton_by_a_lock_starts_it_with_the_new_deployment(tmp_path, monkeypatch, said, starts):
    one, started = server.TritonServer(config.Deployment(), root=tmp_path), []
    one.folder.mkdir(parents=True)
    one.log.write_text(f"terminate called\n  what():  {said}\n")
    one._process = subprocess.Popen([sys.executable, "-c", "import os, time; time.sleep(0.3); os.abort()"])
    one.url, one.target, one.stages = "127.0.0.1:1", server.Target.of("127.0.0.1:1"), (None,)
    monkeypatch.setattr(server.TritonServer, "start", lambda self: started.append(self.deployment))
    wanted = config.Deployment(knobs={"neural_vocoder.delay_us": 7})
    with contextlib.nullcontext() if starts else pytest.raises(ServerError):
        assert one.reload(wanted) == list(wanted.models)
    assert started == starts * [wanted]
    one.stop()
    assert not list((tmp_path / ".harness").glob("*.log"))  # an end that is handled leaves none behind


def test_a_reload_of_a_server_that_is_stopped_is_a_servers_error(tmp_path):
    one = server.TritonServer(config.Deployment(), root=tmp_path)
    one.url, one.target = "127.0.0.1:1", server.Target.of("127.0.0.1:1")
    with pytest.raises(ServerError):
        one.reload(config.Deployment(knobs={"neural_vocoder.delay_us": 7}))


@pytest.fixture
def another_user():
    """This process acts as a user to whom nothing here belongs."""
    os.seteuid(12345)
    yield
    os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["closed", "readable"])
def test_a_folder_of_another_user_is_left_alone_and_said(tmp_path, shared, request, monkeypatch, mode):
    folder = tmp_path / ".harness" / f"triton-{DEAD}-5f"
    folder.mkdir(parents=True)
    state = {
        "owner": [DEAD, 1.0],
        "server": [DEAD, 1.0],
        "shm_prefix": f"harness_{DEAD}_5f_",
        "url": "",
        "public": True,
    }
    (folder / "state.json").write_text(json.dumps(state))
    (shared / f"harness_{DEAD}_5f_1").touch()
    for path in (folder / "state.json", folder, folder.parent):
        path.chmod(mode)
    for path in (*tmp_path.parents, tmp_path, shared):
        if "pytest" in str(path):
            path.chmod(0o755)
    request.getfixturevalue("another_user")
    leftovers.remove_stale(tmp_path)
    assert running.local_urls(tmp_path) == []
    with pytest.raises(ServerError, match="cannot be written.*start in another folder"):
        server.TritonServer(config.Deployment(), root=tmp_path)._make_folder()
    os.seteuid(0)
    assert (folder / "state.json").exists() and (shared / f"harness_{DEAD}_5f_1").exists()
