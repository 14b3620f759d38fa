"""Tables and plots for notebooks: emulated figures say so, and requests that failed are not left out."""

import pandas as pd
import pytest
import report_sample as sample

from harness.records.plan import Plan
from harness.report import notebook_plots, tables


@pytest.mark.parametrize("emulated", [False, True])
def test_emulated_figures_say_so_and_are_never_measured(emulated):
    plan = Plan.of(sample.outlook_record() | {"emulated": emulated})
    found = [*tables.targets(plan)["basis"], *tables.surges(plan)["basis"], *tables.sensitivity(plan)["basis"]]
    known = [basis for basis in found if basis]
    assert ("measured" in known) == (not emulated)
    assert all(basis.endswith("emulated") for basis in known) == emulated


def test_requests_that_failed_keep_the_line_of_a_slo_below_all():
    """Of four requests one failed and one was cut off by the end of the window: two of three are heard."""
    requests = pd.DataFrame(
        {
            "traffic_class": "short",
            "outcome": ["done", "done", "error", "unfinished"],
            "ttfa_s": [0.2, 0.1, 0.05, None],
            "start_frame": 0,
        }
    )
    line = notebook_plots.distribution(requests, "ttfa_s", []).data[0]
    assert list(line.x) == [0.1, 0.2] and list(line.y) == pytest.approx([1 / 3, 2 / 3])
    assert line.name == "short: 3 requests, 1 failed"
