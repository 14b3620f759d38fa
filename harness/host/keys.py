"""Secrets shared by the processes of one user: files that nobody else can read or write."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

from harness.errors import ServerError

SHARED_FOLDER = Path("/dev/shm")  # where Triton puts what it shares with model processes
STAGE_PARAMETER = "entry_key"  # parameter of a request to a stage: the key that identifies its entry
NOTE_SUFFIX = ".model"  # of a note that a model process keeps beside its shared memory
_STAGES, _CONTROL = "harness-stages-", "harness-control-"
_DEPLOYMENT = "carry.key"
_BYTES = 32


def shared_key(path: Path) -> str:
    """The key in a file, created by the first process that asks for it.

    Raises ServerError where others can read or write the file.
    """
    with contextlib.suppress(FileNotFoundError):
        return _read(path)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")  # a pid is not unique across containers: 1 in many
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(draft, secrets.token_hex(_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was first: use its key
            os.link(draft, path)
    except OSError as error:
        raise ServerError(f"the key {path} cannot be created: {error.strerror}; make its folder writable") from error
    finally:
        draft.unlink(missing_ok=True)
    return _read(path)


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(text)


def deployment_key(given: str = "") -> str:
    """The key of kept sessions: from the file that a deployment names, otherwise this user's on this host.

    A named file may be a container platform's secret: a link, owned by root, readable by a group. Raises ServerError
    where every user can read it, or anyone but root and this user can write it.
    """
    path = deployment_key_file(given)
    if given and path.exists():
        return _checked(path, _read_secret)
    return shared_key(path)


def _read_secret(path: Path) -> str:
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        is_ours = about.st_uid in (0, os.geteuid()) and not about.st_mode & 0o027
        if not stat.S_ISREG(about.st_mode) or not is_ours:
            raise PermissionError(errno.EPERM, "is readable or writable by others")
        return file.read()


def read_private(path: Path) -> str:
    """The text of a file that only this user can have written and read.

    Raises PermissionError for any other, without opening what could block (a pipe) or following a link; and OSError.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise PermissionError(errno.EPERM, "is accessible to other users")
        return file.read()


def stage_key_file(server_mark: str) -> Path:
    """The file of the key by which one tritonserver's stages identify calls of its entry."""
    return SHARED_FOLDER / f"{_STAGES}{server_mark}"


def remove_keys(mark: str) -> None:
    """Remove the keys of a server that has ended, by its ``server_mark``: its pid may belong to another server now."""
    for kind in (_STAGES, _CONTROL):
        with contextlib.suppress(OSError):  # not there, or another user's
            (SHARED_FOLDER / f"{kind}{mark}").unlink()


def write_control_key(server_pid: int, url: str, header: str, key: str) -> None:
    """Write the key of calls that change a server where other commands of this user find it."""
    path = SHARED_FOLDER / f"{_CONTROL}{server_mark(server_pid)}"
    path.unlink(missing_ok=True)
    write_private(path, json.dumps([url, header, key]))


def remove_orphaned_files() -> None:
    """Remove the keys, notes and shared memory of this user's ended servers, wherever they were started.

    A server of another container may share the folder: those that this one cannot see are left alone.
    """
    for kind in (_STAGES, _CONTROL):
        for path in SHARED_FOLDER.glob(f"{kind}*"):
            if _has_ended(path.name.removeprefix(kind)):
                _unlink_own(path)
    for path in SHARED_FOLDER.glob(f"*{NOTE_SUFFIX}"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if _has_ended(str(json.loads(path.read_text()).get("server"))):
                _unlink_own(path.with_suffix(""))
                _unlink_own(path)


def _has_ended(mark: str) -> bool:
    """Whether a server visible from here has ended; False for an invalid mark."""
    place, _, rest = mark.partition("-")
    pid = rest.partition("-")[0]
    if not pid.isdigit() or place != str(os.stat("/proc/self/ns/pid").st_ino):
        return False
    try:
        return server_mark(int(pid)) != mark
    except OSError:
        return True


def _unlink_own(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.lstat().st_uid == os.geteuid():
            path.unlink()


def control_headers(url: str) -> tuple[tuple[str, str], ...]:
    """The key of this user's server at an address on this host, as headers; empty for any other server."""
    host, _, port = url.rpartition(":")
    if host.lower().rstrip(".") == "localhost":
        url = f"127.0.0.1:{port}"
    for path in SHARED_FOLDER.glob(f"{_CONTROL}*"):
        with contextlib.suppress(ServerError, OSError, ValueError):
            at, header, key = json.loads(_read(path))
            if at == url and path.name == f"{_CONTROL}{server_mark(int(path.name.split('-')[-2]))}":
                return ((header, key),)
    return ()


def deployment_key_file(given: str = "") -> Path:
    """The file of the key of kept sessions: the deployment's, otherwise this user's on this host."""
    if given:
        return Path(given)
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "speech-capacity-harness" / _DEPLOYMENT


def server_mark(pid: int) -> str:
    """An identity of a server that is unique across containers sharing files: a pid alone is not."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{os.stat('/proc/self/ns/pid').st_ino}-{pid}-{started}"


def _read(path: Path) -> str:
    return _checked(path, read_private)


def _checked(path: Path, read: Callable[[Path], str]) -> str:
    try:
        key = read(path).strip()
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise ServerError(
            f"the key {path} {error.strerror}: chown it to this user, and chmod 600 (a mounted secret: mode 0400, "
            "or 0440 with a group of this user)"
        ) from error
    except OSError as error:
        raise ServerError(
            f"the key {path} cannot be read: {error.strerror}; remove it, or give this user access"
        ) from error
    except UnicodeDecodeError:
        raise ServerError(f"the key {path} is not text: write its bytes as hex or base64") from None
    if len(key) < _BYTES:
        raise ServerError(
            f"the key {path} has {len(key)} characters: at least {_BYTES} are needed; remove it to get a new one"
        )
    return key
