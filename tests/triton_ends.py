"""Triton (2.51) ends with a process of its models that dies holding a lock which both share: tests that kill one."""

import time


def ended_with_it(server, error: str) -> bool:
    """Whether the whole server ended, which its clients were told by ``error``; it is then started again."""
    if "ended the connection" not in error:
        return False
    deadline = time.monotonic() + 20
    while server.alive():
        assert time.monotonic() < deadline, f"the server lives, and a client was told {error}"
        time.sleep(0.1)
    assert "lock_exception" in server.log.read_text()
    server.restart()
    return True
