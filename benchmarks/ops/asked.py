"""What ops/ asks Prometheus: the queries of the dashboards, and the operands of the alerts' comparisons."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import promql_parser

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "ops" / "grafana" / "dashboards"
_GPU_ONLY = "nv_gpu_", "nv_energy_"  # Triton's metrics that a host without a GPU does not have
_COMPARISONS = {"==", "!=", ">", "<", ">=", "<="}


@dataclass(frozen=True)
class PanelQuery:
    board: str
    panel: str
    unit: str
    expression: str
    legend: str

    @property
    def needs_gpu(self) -> bool:
        return any(name in self.expression for name in _GPU_ONLY)


def panel_queries() -> list[PanelQuery]:
    """Every query of every panel of the stored dashboards."""
    found = []
    for path in sorted(DASHBOARDS.glob("*.json")):
        board = json.loads(path.read_text())
        for panel in board["panels"]:
            unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
            for target in panel.get("targets", ()):
                legend = target.get("legendFormat", "")
                found.append(PanelQuery(board["title"], panel["title"], unit, target["expr"], legend))
    return found


def operands(expression: str) -> list[str]:
    """What an alert compares with its limits: the left sides of its comparisons.

    An alert that does not fire has no series; but what it compares must have some, or it would never fire.
    """
    return list(_operands(promql_parser.parse(expression)))


def _operands(node) -> Iterator[str]:
    if isinstance(node, promql_parser.ParenExpr):
        yield from _operands(node.expr)
    elif isinstance(node, promql_parser.BinaryExpr) and str(node.op) in _COMPARISONS:
        yield node.lhs.prettify()
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from _operands(node.lhs)
        yield from _operands(node.rhs)
    else:
        yield node.prettify()
