"""What the tests of the page do on it, and read from it."""

from __future__ import annotations


def write(tab, script: str) -> None:
    tab.locator("#script").fill(script)


def lines_with(tab, kind: str) -> list[int]:
    """The numbers of the lines that are marked as ``error`` or ``remark``."""
    return tab.evaluate(
        f"[...document.querySelectorAll('.line')].flatMap((e, k) => e.matches('.has-{kind}') ? k + 1 : [])"
    )


def played(tab) -> dict:
    return tab.evaluate("window.studio.played")


def until_played(tab, state: str, timeout_ms: int = 100_000) -> dict:
    """What the audio thread counted when it was in a state."""
    tab.wait_for_function("state => window.studio.played.state === state", arg=state, timeout=timeout_ms)
    return played(tab)


def fnv1a(data: bytes) -> int:
    """The digest of the page's audio thread: FNV-1a, 32 bits (draft-eastlake-fnv-17.2, section 2)."""
    digest = 0x811C9DC5
    for byte in data:
        digest = (digest ^ byte) * 0x01000193 & 0xFFFFFFFF
    return digest
