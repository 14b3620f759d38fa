"""Plots that work offline in Jupyter and in the page that nbconvert exports."""

from __future__ import annotations

from plotly import io
from plotly.offline import get_plotlyjs

NAME = "harness"


class Kept(io.base_renderers.PlotlyRenderer):
    """A plot as data, which Jupyter draws, and as HTML, which an exported page shows."""

    def to_mimebundle(self, fig_dict: dict) -> dict:
        html = io.to_html(fig_dict, include_plotlyjs=False, full_html=False, default_width="100%", validate=False)
        return super().to_mimebundle(fig_dict) | {"text/html": html}


class PlotlyScript:
    """Plotly's script, which an exported page needs once; displayed as nothing."""

    def _repr_html_(self) -> str:
        return f'<script>window.PlotlyConfig = {{MathJaxConfig: "local"}};</script><script>{get_plotlyjs()}</script>'


def keep_plots() -> PlotlyScript:
    """Keep all plots of this session in exported pages. Display the result before the first plot."""
    io.renderers[NAME] = Kept()
    io.renderers.default = NAME
    return PlotlyScript()
