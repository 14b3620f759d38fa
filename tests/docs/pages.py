"""The pages of the documentation, and what is in them: code blocks, commands, links and names of files."""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").rglob("*.md"))]
}
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINES = re.compile(r"^    ((?:.*\\\n)*.+)", re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_STARTS = re.compile(r"(?:[A-Z_]+=\S+ )*(harness [a-z]|locust -|make [a-z])")


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with its page."""
    return [
        (page, text) for page, content in PAGES.items() for kind, text in _FENCE.findall(content) if kind == language
    ]


@functools.cache
def commands() -> list[tuple[str, str]]:
    """Every command of ours that a page names: in ``sh`` blocks, on indented lines, and in the text."""
    found = dict.fromkeys((page, line) for page, block in blocks("sh") for line in _commands_of(block))
    for page, content in PAGES.items():
        rest = _FENCE.sub("", content)
        lines = [" ".join(line.replace("\\\n", " ").split()) for line in _LINES.findall(rest)]
        inline = [" ".join(code.split()) for code in _INLINE.findall(_LINES.sub("", rest))]
        found |= dict.fromkeys((page, line.partition(" #")[0]) for line in lines + inline if _STARTS.match(line))
    return list(found)


def run_commands() -> list[str]:
    """The commands that are run as they stand: those of ``sh`` blocks, each once."""
    return list(dict.fromkeys(line for _, block in blocks("sh") for line in _commands_of(block)))


def _commands_of(block: str) -> list[str]:
    return [line.partition("#")[0].strip() for line in block.splitlines() if line.strip()]


def links(content: str) -> list[str]:
    """Where a page's links and pictures lead, but for those into the web."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", content)


def anchors(content: str) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"(?m)^#+ (.+)", _FENCE.sub("", content))
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def paths(content: str) -> set[str]:
    """The files and folders of the repository that a page names in code."""
    codes = (code for code in _INLINE.findall(_FENCE.sub("", content)) if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*/?", code))
    folders = {path.name for path in ROOT.iterdir()}
    return {code for code in codes if code.partition("/")[0] in folders or code.endswith((".py", ".sh", ".md"))}


def names() -> list[tuple[str, str, str]]:
    """What a page says is in a file, as ```name`` in ``file```: page, name, file."""
    said = r"`([A-Za-z_][\w.]*)`(?: (?:\([^)]*\)|and `\w+`))? (?:in|of)\s+`([\w/]+\.py)`"
    return [(page, name, file) for page, content in PAGES.items() for name, file in re.findall(said, content)]
