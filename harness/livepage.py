"""Speech in Locust's own web page: a table of live figures for each class, and the records as CSV."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable

import numpy as np
import pandas as pd
from flask import jsonify, make_response, request

from harness.errors import HarnessError
from harness.metrics import per_request
from harness.records import Outcome
from harness.watch import Progress

TAB = "speech"
ALL = "Aggregated"
COLUMNS = {
    "name": "Class",
    "active": "Active streams",
    "audio_rate": "Audio s per s",
    "done": "# Done",
    "errors": "# Errors",
    "unfinished": "# Unfinished",
    "ttfa_p50": "TTFA p50 (s)",
    "ttfa_p95": "TTFA p95 (s)",
    "rtf_p50": "RTF p50",
    "rtf_p95": "RTF p95",
    "stalls": "Stalls > 50 ms",
    "audio_s": "Audio (s)",
}


class LiveTable:
    """Rows of figures over the Results so far and the streams under way; each Result is folded once."""

    def __init__(self):
        self._results: list | None = None
        self._frames: list[pd.DataFrame] = []
        self._ended: set[str] = set()
        self._folded = 0

    def rows(self, results: list, progress: Progress) -> list[dict]:
        """One row a class and one for all, as the page shows them: text, empty where there is no figure yet."""
        done = self._fold(results)
        # A look is up to a second old: what has ended since is in the Results already.
        running = [each for each in progress.running if each.request_id not in self._ended]
        running = pd.DataFrame(
            [[each.traffic_class, each.ttfa_s, each.rtf, each.stalls, each.audio_s] for each in running],
            columns=["traffic_class", "ttfa_s", "rtf", "audible_stalls", "audio_s"],
        )
        names = sorted({*done["traffic_class"], *running["traffic_class"]})
        rows = [_row(name, _of(done, name), _of(running, name)) for name in names]
        now = {"active": str(progress.active), "audio_rate": f"{progress.audio_s_per_s:.1f}"}
        return [*rows, _row(ALL, done, running) | now]

    def _fold(self, results: list) -> pd.DataFrame:
        if results is not self._results:
            self._results, self._frames, self._ended, self._folded = results, [per_request([])], set(), 0
        fresh = results[self._folded :]
        if fresh:
            self._frames = [pd.concat([*self._frames, per_request(fresh)]) if self._folded else per_request(fresh)]
            self._ended.update(each.request_id for each in fresh)
            self._folded += len(fresh)
        return self._frames[0]


def _of(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return frame[frame["traffic_class"] == name]


def _row(name: str, done: pd.DataFrame, running: pd.DataFrame) -> dict:
    outcomes = done["outcome"].value_counts()
    ttfa_s, rtf = ([*done[column].dropna(), *running[column].dropna()] for column in ("ttfa_s", "rtf"))
    return {
        "name": name,
        "active": str(len(running)),
        "audio_rate": "",
        "done": str(outcomes.get(Outcome.DONE, 0)),
        "errors": str(outcomes.get(Outcome.ERROR, 0)),
        "unfinished": str(outcomes.get(Outcome.UNFINISHED, 0)),
        "ttfa_p50": _quantile(ttfa_s, 0.5),
        "ttfa_p95": _quantile(ttfa_s, 0.95),
        "rtf_p50": _quantile(rtf, 0.5),
        "rtf_p95": _quantile(rtf, 0.95),
        "stalls": str(int(done["audible_stalls"].sum() + running["audible_stalls"].sum())),
        "audio_s": f"{done['audio_s'].sum() + running['audio_s'].sum():.1f}",
    }


def _quantile(values: Iterable[float], quantile: float) -> str:
    value = float(np.quantile(values, quantile)) if values else math.nan
    return "" if math.isnan(value) else f"{value:.3f}"


def records_csv(results: list) -> str:
    """One line a request with all its figures (see ``metrics.per_request``)."""
    return per_request(results).to_csv(index=False)


def install(environment) -> None:
    """Add the Speech tab, the download and a check of the form to the page, through the hooks of Locust and Flask."""
    page, test, table = environment.web_ui, environment.speech, LiveTable()
    base = environment.parsed_options.web_base_path or ""
    page.template_args |= {
        "extended_tabs": [{"title": "Speech", "key": TAB}],
        "extended_tables": [
            {"key": TAB, "structure": [{"key": key, "title": title} for key, title in COLUMNS.items()]}
        ],
        "extended_csv_files": [{"href": "./speech/records.csv", "title": "Download speech records CSV"}],
    }

    @page.auth_required_if_enabled
    def refusal():
        try:
            test.check(request.form.to_dict())
        except HarnessError as error:
            return jsonify(success=False, message=str(error), host=environment.host)

    @page.app.before_request
    def check_form():
        return refusal() if request.path == f"{base}/swarm" else None

    @page.app.after_request
    def add_speech(response):
        if request.path == f"{base}/stats/requests" and response.is_json:
            rows = table.rows(test.results, test.progress())
            response.set_data(json.dumps({**response.json, "extended_stats": [{"key": TAB, "data": rows}]}))
        return response

    @page.app.route(f"{base}/speech/records.csv")
    @page.auth_required_if_enabled
    def download_records():
        response = make_response(records_csv(test.results))
        response.headers["Content-Type"] = "text/csv"
        response.headers["Content-Disposition"] = "attachment;filename=speech-records.csv"
        return response
