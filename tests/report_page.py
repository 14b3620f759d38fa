"""A sign-off document as the tests of the report read it."""

from __future__ import annotations

import base64
import gzip
from html.parser import HTMLParser

from plotly.offline import get_plotlyjs

from harness.report.page import packed_plotly, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The parts of a document that the tests look at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict]] = []
        self.headings: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[tuple[dict, str]] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href", "srcset", "action", "data") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((tag, ""))
        elif tag == "script":
            self.scripts.append((attributes, ""))
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("caption", "figcaption"):
            self.captions.append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "script" in inside:
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
            return
        if "style" in inside:
            return
        self.text += data
        if {"h1", "h2", "h3", "h4"} & set(inside):
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        if {"td", "th"} & set(inside):
            self.tables[-1][-1][-1] += data
        if {"caption", "figcaption"} & set(inside):
            self.captions[-1] += data


def read(run) -> str:
    """The document without plotly's own script."""
    html = write_report(run).read_text(encoding="utf-8")
    packed = packed_plotly()
    assert html.count(packed) == 1 and gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    return html.replace(packed, "")


def squeeze(text: str) -> str:
    return " ".join(text.split())


def table_with(html: str, heading: str) -> list[dict]:
    """The rows, by their headings, of the table that has this one."""
    tables = [[[squeeze(cell) for cell in row] for row in table] for table in Page(html).tables]
    (heads, *rows) = next(table for table in tables if heading in table[0])
    return [dict(zip(heads, row, strict=True)) for row in rows]
