"""Speech in Locust's web pages: live figures, charts, the verdict with its gates and SLOs, and the records as CSV."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

import gevent
import numpy as np
import pandas as pd
from flask import jsonify, make_response, request
from werkzeug.datastructures import ImmutableMultiDict

from harness.drive.console import start_line
from harness.drive.readers.live_stats import ChartPoint, History, Progress
from harness.errors import HarnessError
from harness.records.metrics import per_request
from harness.records.schema import Outcome

TAB = "speech"
ALL = "Aggregated"
COLUMNS = {
    "name": "Class",
    "active": "Active streams",
    "ttfa_p50": "TTFA p50 (s)",
    "ttfa_p95": "TTFA p95 (s)",
    "rtf_p50": "RTF p50",
    "rtf_p95": "RTF p95",
    "stalls": "Stalls > 50 ms",
    "done": "# Done",
    "errors": "# Errors",
    "unfinished": "# Unfinished",
    "audio_rate": "Audio s per s",
    "audio_s": "Audio (s)",
}
SAMPLE_EVERY_S = 1.0
_MARKS = {True: "ok", False: "failed", None: "not tested"}
_SLO = {True: "met", False: "violated", None: "inconclusive"}


class LiveTable:
    """Rows of figures over the Results so far and the streams in progress; each Result is added once."""

    def __init__(self):
        self._results: list | None = None
        self._frames: list[pd.DataFrame] = []
        self._ended: set[str] = set()
        self._folded = 0

    def rows(self, results: list, progress: Progress) -> list[dict]:
        """One row per class and one for all, as the page's text; "" where there is no figure yet."""
        done = self._fold(results)
        # Progress is up to a second old: streams that ended since then are in the Results already.
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


def _quantile(values: Sequence[float], quantile: float) -> str:
    value = float(np.quantile(values, quantile)) if values else math.nan
    return "" if math.isnan(value) else f"{value:.3f}"


def records_csv(results: list) -> str:
    """One line per request with all its figures (see ``metrics.per_request``)."""
    return per_request(results).to_csv(index=False)


class Live:
    """What our own page shows of the current test, or of the last one."""

    def __init__(self, test):
        self._test, self._table = test, LiveTable()
        self._recorder, self._history = None, History()

    def rows(self) -> list[dict]:
        return self._table.rows(self._test.results, self._test.progress())

    def sample(self) -> None:
        """Add a point to the charts while a test runs."""
        test, recorder = self._test, self._test.recorder
        if not test.running or recorder is None:
            return
        if recorder is not self._recorder:
            self._recorder, self._history = recorder, History()
        at_s = (test.clock.now_ns() - recorder.start_ns) / 1e9
        if at_s >= 0:
            self._history.add(at_s, test.progress(), test.results)

    def keep_sampling(self) -> None:
        while True:
            gevent.sleep(SAMPLE_EVERY_S)
            self.sample()

    def brief(self) -> dict:
        """The state of the test, in one line."""
        report = self._test.report
        if report is not None:
            slos = Counter(_SLO[each.verdict.met] for each in report.slos)
            counted = ", ".join(f"{slos[word]} {word}" for word in _SLO.values() if slos[word])
            return {
                "state": "ended",
                "valid": report.valid,
                "says": report.certificate.verdict,
                "slos_say": f"SLOs: {counted}" if counted else "no SLOs in this mix",
            }
        says = "the test runs: verdict and SLOs come at its end" if self._test.running else "no test has run yet"
        return {"state": "running" if self._test.running else "ready", "valid": None, "says": says, "slos_say": ""}

    def whole(self) -> dict:
        """Everything that the page shows, as plain values."""
        points = self._history.points if self._test.recorder is self._recorder else []
        series = dict(zip(ChartPoint._fields, zip(*points, strict=True), strict=True)) if points else {}
        return {
            **self.brief(),
            "load": start_line(self._test.settings),
            "window_s": self._history.window_s,
            "columns": list(COLUMNS.items()),  # a list, because Flask sorts JSON objects
            "rows": self.rows(),
            "points": series,
            "gates": self._gates(),
            "slos": self._slos(),
            "notes": self._notes(),
        }

    def _gates(self) -> list[dict]:
        report = self._test.report
        gates = report.certificate.gates if report else ()
        return [{"name": gate.name, "mark": _MARKS[gate.passed], "says": gate.says} for gate in gates]

    def _slos(self) -> list[dict]:
        if report := self._test.report:
            return [
                {"slo": str(each.slo), "mark": _SLO[each.verdict.met], "value": _plain(each.verdict.value),
                 "says": each.verdict.reason}
                for each in report.slos
            ]  # fmt: skip
        slos = self._test.settings.mix.slos
        return [{"slo": str(each), "mark": "", "value": None, "says": "judged at the end"} for each in slos]

    def _notes(self) -> list[str]:
        report = self._test.report
        return [*filter(None, (report.certificate.failures, *report.certificate.notes))] if report else []


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _file(name: str) -> str:
    return (files("harness.drive") / name).read_text(encoding="utf-8")


def _take_time_limit(test) -> None:
    """Take over the form's time limit, so that it counts from when all processes can send."""
    from locust.util.timespan import parse_timespan  # here: importing Locust patches the process's sockets

    run_time = request.form.get("run_time", "")
    try:
        test.keep_time(parse_timespan(run_time) if run_time else None)
    except ValueError:
        return  # Locust rejects it
    request.form = ImmutableMultiDict([each for each in request.form.items(multi=True) if each[0] != "run_time"])


def install(environment) -> None:
    """Add the Speech tab, our own page, the download and a check of the form, through the hooks of Locust and Flask."""
    page, test = environment.web_ui, environment.speech
    live = Live(test)
    base = environment.parsed_options.web_base_path or ""
    page.template_args |= {
        "extended_tabs": [{"title": "Speech", "key": TAB}],
        "extended_tables": [
            {"key": TAB, "structure": [{"key": key, "title": title} for key, title in COLUMNS.items()]}
        ],
        "extended_csv_files": [{"href": "./speech/records.csv", "title": "Download speech records CSV"}],
    }
    gevent.spawn(live.keep_sampling)

    @page.auth_required_if_enabled
    def refusal():
        form = request.form.to_dict()
        try:
            test.check(form, request.form.getlist("user_classes"))
        except HarnessError as error:
            return jsonify(success=False, message=str(error), host=environment.host)
        if not test.settings.load.sessions:
            _take_time_limit(test)

    @page.app.before_request
    def check_form():
        return refusal() if request.path == f"{base}/swarm" else None

    @page.app.after_request
    def add_speech(response):
        if request.path == f"{base}/stats/requests" and response.is_json:
            rows = live.rows()
            response.set_data(json.dumps({**response.json, "extended_stats": [{"key": TAB, "data": rows}]}))
        elif request.path == f"{base}/" and response.mimetype == "text/html":
            response.set_data(response.get_data(as_text=True).replace("<body>", f"<body>{_file('strip.html')}", 1))
        return response

    @page.app.route(f"{base}/speech")
    @page.auth_required_if_enabled
    def show_speech():
        return make_response(_file("speech.html"))

    @page.app.route(f"{base}/speech/live.json")
    @page.auth_required_if_enabled
    def live_speech():
        return jsonify(live.brief() if "brief" in request.args else live.whole())

    @page.app.route(f"{base}/speech/records.csv")
    @page.auth_required_if_enabled
    def download_records():
        response = make_response(records_csv(test.results))
        response.headers["Content-Type"] = "text/csv"
        response.headers["Content-Disposition"] = "attachment;filename=speech-records.csv"
        return response
