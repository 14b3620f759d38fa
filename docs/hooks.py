"""MkDocs hooks: pages at the top of the repository become pages of the site, and links to other files become text.

A link of a page leads to where the file lies in the repository, so that it works on the page itself, too. On the site,
what is no page cannot be linked: the link's text stays, with the file's name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
TOP_PAGES = {name: f"project/{name.lower()}" for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)]*)?\)")


def on_files(files, config):
    """Add the pages of the top folder."""
    for name, uri in TOP_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Lead every link to a page of the site, or show its file's name."""
    top = {uri: ROOT / name for name, uri in TOP_PAGES.items()}
    source = top.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri)
    return _LINK.sub(lambda found: _link(found, source, page.file.src_uri), markdown)


def _link(found: re.Match, source: Path, uri: str) -> str:
    target = Path(os.path.normpath(source.parent / found[2]))
    if not target.exists():
        return found[0]  # a strict build refuses it
    name = target.relative_to(ROOT).as_posix()
    if name in TOP_PAGES or (name.startswith("docs/") and target.is_file()):
        to = TOP_PAGES.get(name, name.removeprefix("docs/"))
        return f"[{found[1]}]({os.path.relpath(to, Path(uri).parent)}{found[3] or ''})"
    return found[1] if found[1].strip("`") in (name, target.name) else f"{found[1]} (`{name}`)"
