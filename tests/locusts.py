"""Locust as a process of its own, forked from one that has imported it: the imports take longer than most tests."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARENT = """
import json, os, sys
import locust.main
import harness.scenario

for line in sys.stdin:
    asked = json.loads(line)
    if child := os.fork():
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.setpgid(0, 0)
    for descriptor, (file, flags) in enumerate(asked["files"]):
        os.dup2(os.open(file, flags), descriptor)
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv[:] = ["locust", *asked["options"]]
    locust.main.main()
    sys.exit()
"""


@functools.cache
def _parent() -> subprocess.Popen:
    """It ends with the process that started it, by the end of its input."""
    command = [sys.executable, "-c", PARENT]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def run(*options: str, timeout: float = 250, env: dict | None = None) -> subprocess.CompletedProcess:
    """``python -m locust`` with these options, as ``subprocess.run`` captures it. Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        write = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        files = [(os.devnull, os.O_RDONLY), (str(out), write), (str(err), write)]
        asked = {"options": options, "environment": dict(os.environ if env is None else env), "files": files}
        parent = _parent()
        parent.stdin.write(json.dumps(asked).encode() + b"\n")
        child = int(parent.stdout.readline())
        late = not select.select([parent.stdout], [], [], timeout)[0]
        if late:
            os.killpg(child, signal.SIGKILL)
        code = int(parent.stdout.readline())
        if late:
            raise subprocess.TimeoutExpired(list(options), timeout, out.read_bytes(), err.read_bytes())
        return subprocess.CompletedProcess(list(options), code, out.read_text(), err.read_text())
