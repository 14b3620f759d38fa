"""Secrets in files: made once, read by their owner only."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from harness.errors import ServerError
from harness.host import keys
from harness.host.process_group import hide_argument, spawn


def test_processes_that_ask_at_the_same_time_get_one_key(tmp_path):
    path = tmp_path / "new" / "key"
    ask = f"from harness.host import keys; from pathlib import Path; print(keys.shared_key(Path({str(path)!r})))"
    with ThreadPoolExecutor(4) as pool:
        run = lambda _: subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)  # noqa: E731
        told = {each.stdout.strip() for each in pool.map(run, range(4))}
    assert told == {path.read_text()} and len(told.pop()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_a_key_that_others_can_read_or_write_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    keys.shared_key(path)
    path.chmod(mode)
    with pytest.raises(ServerError, match="chmod 600"):
        keys.shared_key(path)


def test_a_key_behind_a_link_is_refused(tmp_path):
    keys.shared_key(tmp_path / "real")
    (tmp_path / "key").symlink_to(tmp_path / "real")
    with pytest.raises(ServerError, match="cannot be read"):
        keys.shared_key(tmp_path / "key")


@pytest.mark.parametrize("content", ["", "short", "x" * 31])
def test_a_key_that_is_too_short_is_refused(tmp_path, content):
    path = tmp_path / "key"
    keys.write_private(path, content)
    with pytest.raises(ServerError, match="at least 32 are needed"):
        keys.shared_key(path)


def test_the_control_key_of_a_server_is_found_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "SHARED_FOLDER", tmp_path)
    server = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    keys.write_control_key(server.pid, "127.0.0.1:5", "name", "secret")
    keys.shared_key(keys.stage_key_file(keys.server_mark(server.pid)))
    assert keys.control_headers("127.0.0.1:5") == (("name", "secret"),)
    assert keys.control_headers("localhost:5") == keys.control_headers("LOCALHOST.:5") == (("name", "secret"),)
    for other in ("127.0.0.1:6", "localhost:6", "localhost", "[::1]:5", "notlocalhost:5", "127.0.0.1"):
        assert keys.control_headers(other) == ()
    mark = keys.server_mark(server.pid)
    server.communicate(b"\n")
    assert keys.control_headers("127.0.0.1:5") == ()  # its port may be another's now
    namespace, pid, started = mark.split("-")
    for other in (f"{namespace}-{int(pid) + 1}-{started}", f"1{namespace}-{pid}-{started}", f"{namespace}-{pid}-1", ""):
        keys.remove_keys(other)  # another process, namespace or start: a server that lives, perhaps
    assert len(list(tmp_path.iterdir())) == 2
    keys.remove_keys(mark)
    assert list(tmp_path.iterdir()) == []


def test_an_argument_of_a_child_can_be_hidden(tmp_path):
    script = "import sys, time; print(sys.argv[1], flush=True); time.sleep(60)"
    child = spawn([sys.executable, "-c", script, "--key=a-secret-word", "more"], tmp_path / "log")
    try:
        while "a-secret-word" not in (tmp_path / "log").read_text():
            assert child.poll() is None
        command = Path(f"/proc/{child.pid}/cmdline")
        assert b"a-secret-word" in command.read_bytes()
        assert hide_argument(child.pid, "a-secret-word")
        assert b"a-secret-word" not in command.read_bytes() and b"more" in command.read_bytes()
        assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600
    finally:
        child.kill()
        child.wait()
    assert not hide_argument(child.pid, "a-secret-word")


def test_a_pipe_or_a_link_that_others_left_is_refused_and_blocks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "SHARED_FOLDER", tmp_path)
    os.mkfifo(tmp_path / "harness-control-1-1-1", 0o600)
    (tmp_path / "harness-control-2-2-2").symlink_to(tmp_path / "harness-control-1-1-1")
    assert keys.control_headers("127.0.0.1:5") == ()
    for name in ("harness-control-1-1-1", "harness-control-2-2-2"):
        with pytest.raises(OSError):
            keys.read_private(tmp_path / name)


def test_a_key_of_raw_bytes_is_refused_with_what_to_write(tmp_path):
    (tmp_path / "key").write_bytes(bytes(range(128, 256)))
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ServerError, match="hex or base64"):
        keys.shared_key(tmp_path / "key")


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_key_that_is_mounted_as_a_secret_is_taken(tmp_path, mode):
    """Kubernetes mounts links to files of root, which a group may read."""
    data = tmp_path / "..data"
    data.mkdir()
    keys.write_private(data / "key", "k" * 44 + "\n")
    (data / "key").chmod(mode)
    (tmp_path / "key").symlink_to(data / "key")
    assert keys.deployment_key(str(tmp_path / "key")) == "k" * 44


@pytest.mark.parametrize("mode", [0o444, 0o404, 0o620, 0o660, 0o602])
def test_a_secret_that_all_can_read_or_another_can_write_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    keys.write_private(path, "k" * 44)
    path.chmod(mode)
    with pytest.raises(ServerError, match="is readable or writable by others.* mode 0400"):
        keys.deployment_key(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_secret_of_another_user_is_refused(tmp_path):
    path = tmp_path / "key"
    keys.write_private(path, "k" * 44)
    os.chown(path, 12345, -1)
    with pytest.raises(ServerError, match="by others"):
        keys.deployment_key(str(path))


def test_what_is_no_file_is_no_secret(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ServerError):
            keys.deployment_key(str(path))


def test_a_named_key_that_is_not_there_is_made(tmp_path):
    made = keys.deployment_key(str(tmp_path / "new"))
    assert len(made) == 64 and keys.deployment_key(str(tmp_path / "new")) == made
