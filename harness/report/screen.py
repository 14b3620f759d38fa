"""Tables that no terminal truncates: a table that is too wide is printed as a block of lines per row."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.console import Console, Group
from rich.table import Column, Table
from rich.text import Text

MOST_LINES = 3  # per row; taller rows are easier to read as blocks
_PATH = 20  # minimum width of a column of paths, which may break anywhere
_INDENT = 2
_UNBOUNDED = 100_000


class Screen(Console):
    """A console that shows every cell of a table in full, at any width, in colour or not.

    Without ``width``, the environment's COLUMNS counts as it is whenever something is printed.
    """

    def __init__(self, *, width: int | None = None, **options) -> None:
        super().__init__(width=width, **options)
        self._width = width  # Console keeps the COLUMNS that it finds when it is made

    def print(self, *objects, **options) -> None:
        shown = (readable(each, self) if isinstance(each, Table) else each for each in objects)
        super().print(*shown, **options)


def readable(table: Table, console: Console) -> Table | Group:
    """The table with wrapped, never truncated cells; as blocks of lines if that is still too wide or too tall."""
    needed = [_needed(column, console) for column in table.columns]
    for column, width in zip(table.columns, needed, strict=True):
        column.overflow, column.no_wrap, column.width = "fold", False, width
    roomy = console.options.update(width=_UNBOUNDED)  # a measurement never exceeds the width it is taken at
    spare = console.width - console.measure(table, options=roomy).minimum
    if spare < 0:
        return Group(*_blocks(table, console))
    wanted = [_natural(column, console) for column in table.columns]
    for column, width in zip(table.columns, _spread(needed, wanted, spare), strict=True):
        column.width = width
    return table if _is_flat(table, console) else Group(*_blocks(table, console))


def _spread(needed: list[int], wanted: list[int], spare: int) -> list[int]:
    """Column widths after giving the spare characters, one by one, to the column that would wrap most."""
    widths = list(needed)
    for _ in range(spare):
        most = max(range(len(widths)), key=lambda at: wanted[at] / widths[at], default=None)
        if most is None or wanted[most] <= widths[most]:
            break
        widths[most] += 1
    return widths


def _natural(column: Column, console: Console) -> int:
    """The width at which no cell of a column wraps."""
    texts = [*_cells(column, console), _text(column.header, console)]
    return max([1, *(len(line) for text in texts for line in text.splitlines())])


def _needed(column: Column, console: Console) -> int:
    """The width of a column's longest unbreakable part: a figure with its unit, or a word."""
    parts = [part for cell in _cells(column, console) for part in _parts(cell, column.justify == "right")]
    return max([1, *map(_least, [*parts, *_parts(_text(column.header, console), False)])])


def _parts(cell: str, whole: bool) -> list[str]:
    return cell.splitlines() if whole else cell.split()


def _least(part: str) -> int:
    return min(len(part), _PATH) if "/" in part else len(part)


def _is_flat(table: Table, console: Console) -> bool:
    """Whether its rows stay low: a column of words one below the other is hard to read."""
    bare = Table(*table.columns, box=table.box, show_header=False, pad_edge=table.pad_edge)
    bare.rows.extend(table.rows)
    lines = console.render_lines(bare)
    return len(lines) <= MOST_LINES * max(table.row_count, 1) + 2


def _blocks(table: Table, console: Console) -> Iterator[Text]:
    """Each row as its first cell, and below it a line ``name: value`` per other cell."""
    if table.title:
        yield Text.assemble((_text(table.title, console), "italic"))
    heads = [" ".join(_text(column.header, console).split()) for column in table.columns]
    name_width = max(map(len, heads[1:]), default=0) + 1
    columns = [list(_cells(column, console)) for column in table.columns]
    for row in zip(*columns, strict=True):
        lead, *rest = zip(heads, row, strict=True)
        mark = "" if lead[0] else f"{lead[1]} "  # a column of marks has no name: put it before the next one
        lead, *rest = (lead, *rest) if lead[0] else rest
        yield from _wrapped(f"{mark}{lead[0]}: {lead[1]}", 0, console.width, "bold")
        for head, value in rest:
            if value:
                line = f"{' ' * _INDENT}{f'{head}:':<{name_width}} {' '.join(value.split())}"
                yield from _wrapped(line, _INDENT + name_width + 1, console.width)
    if table.caption:
        for paragraph in _text(table.caption, console).splitlines():
            yield from _wrapped(paragraph, 0, console.width, "dim")


def _wrapped(line: str, indent: int, width: int, style: str = "") -> Iterator[Text]:
    indent = min(indent, width // 2)
    wrapper = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_on_hyphens=False)
    return (Text(each, style) for each in wrapper.wrap(line))


def _cells(column: Column, console: Console) -> Iterator[str]:
    return (_text(cell, console) for cell in column.cells)


def _text(cell, console: Console) -> str:
    return cell.plain if isinstance(cell, Text) else console.render_str(str(cell)).plain
