"""The sign-off document: what it says for each verdict, that it is whole in itself, and that it says it safely."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import report_sample as sample
from report_page import Page, read, squeeze, table_with

from harness.capacity.planning.prediction import sealed
from harness.records.plan import Plan
from harness.records.prediction import Prediction
from harness.records.slo import Slo
from harness.report import decision, facts, figures, page, words
from harness.report.page import write_report

HEADINGS = [
    "Devices per target",
    "Why not another option",
    "SLOs and traffic",
    "Throughput against latency",
    "Where the time of a frame went",
    "First audio against sessions",
    "Prediction against measurement",
    "Every trial",
    "What was measured, and what was not",
    "Reproduce it",
]
HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run on disk for each verdict."""
    return {
        verdict: sample.make_run(tmp_path_factory.mktemp(verdict), verdict)
        for verdict in ("met", "missed", "inconclusive")
    }


@pytest.fixture(scope="module")
def pages(runs):
    return {verdict: read(run) for verdict, run in runs.items()}


def deployments_of(run, fit, plan):
    return facts.deployments(run.trials(), run.requests(), fit, plan)


@pytest.mark.parametrize("verdict", ["met", "missed", "inconclusive"])
def test_the_decision_comes_first_and_the_rest_in_its_order(pages, verdict):
    headings = [squeeze(text) for tag, text in Page(pages[verdict]).headings if tag == "h2"]
    assert headings[0] == " ".join(decision.TITLES[verdict])
    assert headings[1:] == HEADINGS


def test_met_answers_in_one_sentence(pages):
    assert (
        "At 5 requests per second of this mix: 5 devices, 95% interval 4 to 5; "
        "bound by the real-time factor of long requests (95th percentile)."
    ) in squeeze(Page(pages["met"]).text)


def test_missed_says_which_slo_no_device_count_keeps(pages):
    text = squeeze(Page(pages["missed"]).text)
    assert "No number of devices helps" in text
    assert "violates the SLO on the time to first audio of short requests (95th percentile)" in text
    assert "No open-loop trial was compared with a prediction" in text


def test_inconclusive_gives_the_reason_and_does_not_sign(pages):
    text = squeeze(Page(pages["inconclusive"]).text)
    assert "Not signed off. Best estimate so far: at 5 requests per second" in text
    assert sample.REASONS["inconclusive"][0] in text
    assert text.count("✕ failed") == 2
    assert "3.1% of sends were later than 5 ms (limit 1%)" in text


def test_a_prediction_shows_what_was_predicted_in_advance_and_what_is_held_against_the_limit(runs, pages):
    shown = table_with(pages["met"], "Predicted in advance")
    stored = runs["met"].plan().validation
    assert len(shown) == len(stored) == 6
    for cells, row in zip(shown, stored, strict=True):
        assert cells["Predicted in advance"] == words.figure(row.predicted_in_advance)
        assert cells["Predicted from actual arrivals"] == words.figure(row.predicted)
    text = squeeze(Page(pages["met"]).text)
    assert "predicted before it was run" not in text
    assert "these got 80% to 100% of its audio" in text


def test_each_open_run_shows_its_offered_audio_its_slos_and_its_result(pages):
    first, _, last = table_with(pages["met"], "Offered")
    assert (first["Offered"], first["Average of the mix"]) == ("11.4", "14.2")
    assert first["SLOs"] == "1 met, 1 within the limit"
    assert first["Result"] == last["Result"] == "✓ passed"
    invalid = table_with(pages["inconclusive"], "Offered")[-1]
    assert invalid["SLOs"] == "–"
    assert invalid["Result"].startswith("✕ INVALID") and "3.1% of sends" in invalid["Result"]


def test_a_figure_that_chance_can_move_is_shown_as_not_decidable(tmp_path):
    plan = sample.plan_record("inconclusive")
    plan["validation"][0] |= {"passed": None, "limit": 0.4}
    plan["open_runs"][0]["promises"][0] |= {"met": False, "measured": 1.7}
    html = read(sample.make_run(tmp_path, "inconclusive", plan=plan))
    assert table_with(html, "Predicted in advance")[0]["Result"] == "? not decidable"
    slos = table_with(html, "Offered")[0]["SLOs"]
    assert slos.startswith("1 violated, 1 within the limit")
    assert "within 1 s; it was 1.7" in slos


def test_the_clients_own_error_is_its_timers_and_delivery_is_told_apart(tmp_path):
    run = sample.make_run(tmp_path)
    trial, results, samples = sample.open_trial(9, sample.space()[0], 0.8, True, np.random.default_rng(3))
    rung = replace(trial.rungs[0], summary=replace(trial.rungs[0].summary, lateness_p99_s=0.072))
    run.append_trial(replace(trial, trial_id="late", rungs=(rung,)), results, samples)
    ladder, *_, late = table_with(read(run), "Delivery delay")
    assert late["Trial"].startswith("late") and late["Delivery delay"] == "72 ms"
    assert late["Client's own error"].startswith("2.1 ms")
    assert ladder["Client's own error"].startswith("not stored")


def test_the_scope_names_what_the_counts_leave_out(pages):
    text = squeeze(Page(pages["met"]).text)
    for named in (
        "Several devices side by side",
        "KV memory at its limit",
        "The step time against the length of the context",
        "Failures: the loss, the restart and the drain",
        "rungs of a ladder are not tested for it one by one",
    ):
        assert named in text


@pytest.mark.parametrize("verdict", ["met", "inconclusive"])
def test_every_target_has_all_its_figures(runs, pages, verdict):
    rows = [[squeeze(cell) for cell in row] for row in Page(pages[verdict]).tables[0][1:]]
    targets = runs[verdict].plan().targets
    assert len(rows) == len(targets) == 4
    for row, target in zip(rows, targets, strict=True):
        assert row[:3] == [
            words.figure(target.qps),
            words.figure(target.devices),
            words.interval(target.interval),
        ]
        assert words.metric(target.binding) in row[3]
        assert row[4:] == [
            words.percent(target.utilisation),
            words.figure(target.headroom_qps) + " req/s",
            str(target.devices_n_plus_1),
            str(target.devices_n_plus_2),
            target.basis,
        ]


def test_an_absent_device_count_is_said_in_words(tmp_path):
    plan = sample.plan_record("inconclusive")
    plan["targets"] = [sample.target_record(1.0, "missed")]
    rows = Page(read(sample.make_run(tmp_path, "missed", plan=plan))).tables[0]
    assert rows[1][1] == "not known"
    plan["verdict"] = "missed"
    assert decision.decide(sample.manifest(), Plan.of(plan)).answer.startswith("No number of devices helps")


def test_a_run_without_fit_plan_and_open_trials_is_still_a_page(tmp_path):
    page = Page(read(sample.make_run(tmp_path, "missed", fit=False, plan=False)))
    text = squeeze(page.text)
    assert decision.TITLES["none"][1] in text
    assert "No plan is stored for this run" in text
    assert "No batch service times were fitted" in text
    assert "95% of requests hear their first audio within 1 s" in text  # from the plan file in the manifest
    headings = [squeeze(text) for tag, text in page.headings if tag == "h2"]
    assert headings[1:] == [each for each in HEADINGS if each != "Why not another option"]


def test_a_run_without_trials_is_still_a_page(tmp_path):
    text = squeeze(Page(read(sample.Run.create(tmp_path, sample.manifest()))).text)
    assert "This run holds no finished trial." in text
    assert "Nothing: this run holds no finished trial." in text
    assert "No statistics of the stages are stored" in text


def test_the_device_is_named_for_what_it_is(pages):
    assert "One device here is this host (2 CPU cores) at preset tiny." in squeeze(Page(pages["met"]).text)
    assert not [html for html in pages.values() if "GPU" in Page(html).text]
    host = sample.manifest(device="NVIDIA H100", preset="7b")
    assert decision.unit(host, None) == "one NVIDIA H100 at preset 7b"
    assert decision.unit(sample.manifest(), None) == sample.UNIT


def test_emulated_figures_are_labelled_wherever_they_stand(tmp_path, pages):
    page = Page(read(sample.make_run(tmp_path, emulated=True)))
    about_files = ("As sent", "SHA-256", "Trials in the order")
    figures_of = [squeeze(caption) for caption in page.captions if not squeeze(caption).startswith(about_files)]
    assert len(figures_of) >= 9
    assert all(caption.endswith("emulated") for caption in figures_of)
    assert "(95th percentile). emulated One device here" in squeeze(page.text)
    assert all("measured" not in row[-1] for row in page.tables[0][1:])
    assert "emulated" not in squeeze(Page(pages["met"]).text.replace("Nothing was emulated", ""))


@pytest.fixture(scope="module")
def outlook(tmp_path_factory):
    """The page of a plan with all that one can hold."""
    return read(sample.make_run(tmp_path_factory.mktemp("outlook"), plan=sample.outlook_record()))


def test_what_a_plan_holds_besides_has_its_sections_and_an_older_plan_has_not(outlook, pages):
    headings = [squeeze(text) for tag, text in Page(outlook).headings if tag == "h2"]
    first = ["Devices per target", "Overload behaviour", "Why not another option", "What would change it"]
    assert headings[1:5] == first and headings[5:] == HEADINGS[2:]
    assert "surge" not in Page(pages["met"]).text and "undefined" not in outlook.lower()


def test_each_surge_says_who_is_served_who_is_told_busy_and_when_it_is_over(outlook):
    rows = table_with(outlook, "Rejected")
    assert [row["Surge"] for row in rows] == ["twice the load"] * 2 + ["an impulse"] * 2
    assert (rows[0]["SLOs met"], rows[0]["Rejected"]) == ("61%", "38%")
    assert rows[0]["Recovered after"] == "not within 5 h" and rows[1]["Recovered after"] == "at once"
    assert rows[0]["Most sessions"] == "577 extrapolated" and rows[1]["Most sessions"] == "36"


def test_a_surge_is_drawn_with_its_length_and_a_line_for_each_way_to_let_callers_in():
    rows = Plan.of(sample.outlook_record()).behaviour.surges[:2]
    figure = figures.surge(rows, {"all are admitted": "#111", "the rest are rejected": "#222"})
    assert [trace.line.color for trace in figure.data] == ["#111", "#222"]
    assert (figure.layout.shapes[0].x0, figure.layout.shapes[0].x1) == (0, 15)
    assert figure.data[0].x[5] == 0.5 and figure.data[0].y[5] == pytest.approx(61)


def test_costs_losses_drain_and_changes_are_said_with_their_basis(outlook):
    text = squeeze(Page(outlook).text)
    assert table_with(outlook, "EUR per audio hour")[0]["EUR per audio hour"] == "0.1370.11 to 0.17"
    assert "devices × 2.5 EUR an hour (given, for H100)" in text
    loss = table_with(outlook, "Sessions moved")[0]
    assert (loss["SLOs afterwards"], loss["Of the limit"]) == ("✕ violated extrapolated", "172%")
    assert (loss["In the first 10 min"], loss["Judged over"]) == ("over ten times", "16 min")
    assert "at the latest after 5.2 min, where its longest session has just begun" in text
    assert "A device with 36 sessions of 90 minutes, each" in text and "2.5 h if all have just begun. simulated" in text
    planned, longer, unknown = table_with(outlook, "Planned for one device alone")
    assert (longer["at 5 req/s"], longer["Basis"]) == ("7", "simulated")
    assert (unknown["at 5 req/s"], unknown["Basis"]) == ("–", "not known")
    grown = table_with(outlook, "Devices too few after")[0]
    assert (grown["Devices too few after"], grown["With a spare"]) == ("2.3 months", "never")
    assert (grown["A fleet of 9"], grown["Devices after 3, 6 and 12 months"]) == ("now", "6, 8, beyond 100,000")


@pytest.mark.parametrize("answer, spare, shown", [
    ("simulated", "simulated", "simulated"), ("simulated", "extrapolated", "extrapolated"),
    ("extrapolated", "simulated", "extrapolated"), ("measured", "simulated", "simulated"),
])  # fmt: skip
def test_spares_and_costs_are_known_no_better_than_what_they_rest_on(tmp_path, answer, spare, shown):
    plan = sample.outlook_record()
    for target in plan["targets"]:
        count = target["devices"] + 1
        kept = [loss | {"kept": True, "devices": count, "basis": spare} for loss in target["losses"]]
        target |= {"basis": answer, "devices_n_plus_1": count, "losses": kept}
    run = sample.make_run(tmp_path, plan=plan)
    text = squeeze(Page(read(run)).text)
    assert f"Devices needed if one fails {shown}" in text
    assert f"An hour of audio costs {answer}" in text


KINDS = ("measured", "simulated", "extrapolated", "emulated")
NOT_FIGURES = (
    "As sent", "SHA-256", "Trials in the order", "When each prediction", "Devices for each target", "The limit that",
)  # fmt: skip


def test_every_figure_says_how_it_is_known(outlook):
    captions = [squeeze(caption) for caption in Page(outlook).captions]
    figures_of = [caption for caption in captions if not caption.startswith(NOT_FIGURES)]
    assert len(figures_of) >= 14
    assert [caption for caption in figures_of if not caption.endswith(KINDS)] == []
    assert all(row["Basis"] in (*KINDS, "as above", "not known") for row in table_with(outlook, "Headroom"))


def test_when_a_prediction_was_made_is_shown_with_its_hash_and_a_changed_one_is_named(tmp_path):
    run = sample.make_run(tmp_path)
    trial, results, samples = sample.open_trial(9, sample.space()[0], 0.8, True, np.random.default_rng(3))
    early, late = (sealed(sample.PREDICTION, f"2025-01-31T{time}+00:00") for time in ("09:25:20", "09:26:30"))
    for name, prediction, written in (
        ("fine", early, early),
        ("late", late, late),
        ("turned", Prediction.of(early.to_dict() | {"sessions": 5.7}), early),
        ("unwritten", early, None),
    ):
        if written:
            run.append_prediction(name, written)
        run.append_trial(replace(trial, trial_id=name, prediction=prediction), results, samples)
    *bare, fine, too_late, turned, unwritten = table_with(read(run), "Unchanged since")
    assert (fine["Unchanged since"], fine["Before the trial"]) == ("✓ yes", "10 s")
    assert fine["sha256"] == early.sha256 and fine["Made"] == "2025-01-31 09:25:20 UTC"
    assert "after it had started" in too_late["Unchanged since"]
    assert "its hash differs" in turned["Unchanged since"]
    assert len(bare) == 3  # of the run as it was made: without a hash
    for row in (*bare, unwritten):
        assert "not the one that was written into predictions.jsonl" in row["Unchanged since"]


def test_the_page_says_when_it_expires_and_with_what(pages):
    text = squeeze(Page(pages["met"]).text)
    assert "Valid until2025-05-01" in text.replace("Valid until ", "Valid until")
    assert "On 2025-05-01 at the latest" in text and "the device and its driver: cpu" in text


def test_slos_that_no_open_run_tested_are_among_what_was_not_measured():
    """Of the sample's SLOs, that on the RTF of short requests was judged by too few, and predicted by no row."""
    said = decision.not_measured(sample.manifest(), [], Plan.of(sample.plan_record()))
    (line,) = [line for line in said if "Too few open-loop requests" in line]
    assert "real-time factor of short requests (95th percentile). There" in line and "first audio" not in line
    rows = [sample.validation_record("met")[0] | {"metric": "rtf p95 of class short"}]
    tested = decision.not_measured(sample.manifest(), [], Plan.of(sample.plan_record() | {"validation": rows}))
    assert not [line for line in tested if "Too few open-loop requests" in line]


@pytest.mark.parametrize(("gpus", "said"), [(1, ": 5 devices, "), (4, ": 5 devices (20 GPUs), ")])
def test_where_a_device_is_several_gpus_the_answer_counts_them(gpus, said):
    plan = sample.plan_record() | {"gpus_per_device": gpus}
    plan["targets"] = [plan["targets"][0] | {"devices": 5}]
    assert said in decision.decide(sample.manifest(), Plan.of(plan)).answer


def test_the_headline_prefers_a_measured_target(runs):
    plan = runs["met"].plan()
    assert plan.headline().qps == 5
    beyond = replace(plan, targets=tuple(replace(target, basis="extrapolated") for target in plan.targets))
    assert beyond.headline().qps == 20
    assert decision.decide(sample.manifest(), beyond).basis == "extrapolated"


def test_nothing_is_loaded_from_elsewhere(pages):
    for html in pages.values():
        page = Page(html)
        assert all(link.startswith(("#", "data:")) for link in page.links), page.links
        assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
        assert "default-src 'none'" in html
        assert not [mark for mark in ("http://", "https://", "@import", "url(", "<iframe") if mark in html]


def test_the_page_is_sound_html(pages):
    for html in pages.values():
        page = Page(html)
        assert page.open == []
        assert len(page.ids) == len(set(page.ids))
        levels = [int(tag[1]) for tag, _ in page.headings]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
        assert html.count("<table") == html.count("<caption>")


def test_every_plot_has_its_data_and_a_description(pages):
    html = pages["met"]
    places = html.count('class="plot"')
    data = [json.loads(text) for attributes, text in Page(html).scripts if attributes.get("type") == "application/json"]
    assert places == len(data) == 1 + 6 + 3 + 1 + 1
    assert html.count('role="img" aria-label="') == places
    assert all(figure["data"] for figure in data)


def test_names_from_a_user_are_escaped(tmp_path):
    plan = sample.plan_record("inconclusive")
    plan["promises"][0]["traffic_class"] = HOSTILE
    plan["targets"][0]["note"] = plan["validation"][0]["metric"] = plan["validation"][1]["trial_id"] = HOSTILE
    plan["reasons"] = [f"the class {HOSTILE} was not measured"]
    run = sample.make_run(
        tmp_path, "inconclusive", plan=plan, notes=(HOSTILE,), plan_path=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    trial, results, samples = sample.open_trial(9, sample.space()[1], 0.8, False, np.random.default_rng(3))
    hostile_results = [replace(result, traffic_class=HOSTILE, error=HOSTILE) for result in results]
    run.append_trial(replace(trial, reasons=(HOSTILE,)), hostile_results, samples)
    html = read(run)
    assert HOSTILE not in html
    assert "<script>alert" not in html
    page = Page(html)
    assert page.text.count(HOSTILE) >= 9
    assert len(page.scripts) == 12 + 2  # the plots' data, plotly, and the page's own


def test_a_name_in_a_plot_cannot_become_a_tag_of_plotly(runs):
    slo = Slo("<a href='x'>", "ttfa_s", 0.95, 1.0)
    run = runs["met"]
    figure = figures.first_audio(deployments_of(run, run.fit(), None), [slo])
    labels = [annotation.text for annotation in figure.layout.annotations]
    assert "SLO, &lt;a href='x'&gt;: 1,000 ms" in labels


def test_the_data_of_a_plot_cannot_close_its_script():
    figure = figures.go.Figure(layout={"meta": "</script><!-- &"})
    text = page.script_json(figure)
    assert not set("<>&") & set(text)
    assert json.loads(text)["layout"]["meta"] == "</script><!-- &"


def test_the_same_records_give_the_same_bytes(runs):
    path = write_report(runs["met"])
    assert path == runs["met"].path / "signoff.html"
    before = path.read_bytes()
    assert write_report(runs["met"]).read_bytes() == before
    assert not [left for left in runs["met"].path.iterdir() if left.name.endswith(".tmp")]


def test_the_evidence_is_hashed_and_the_commands_are_given(runs, pages):
    run = runs["met"]
    text = squeeze(Page(pages["met"]).text)
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name not in ("signoff.html", ".lock")]
    assert len(files) == 4 + 2 * 9
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert "harness signoff scenarios/quick.yaml" in text
    assert f"harness plan --run {run.path.parent.name}/{run.path.name} --qps 0.5,1,5,20" in text
    assert all(version in text for version in run.manifest.versions.values())


@pytest.mark.parametrize(("alone", "where"), [(1.0, "in a fleet planned up to 1.21"), (1.4, "planned up to 1.21")])
def test_the_first_screen_never_plans_above_a_rate_that_it_calls_the_highest(tmp_path, alone, where):
    plan = sample.plan_record() | {"utilisation_cap": 0.85}
    plan["rate_per_device"] |= {"value": alone}
    text = squeeze(Page(read(sample.make_run(tmp_path, plan=plan))).text)
    first, _, rest = text.partition("What limits it there")
    assert re.search(
        rf"Rate of one device alone ?simulated ?{alone:g} requests/s ?Poisson arrivals; 95% interval", first
    )
    assert f"{where} requests/s per device: 85% utilisation" in first
    assert ("more than alone, because random arrivals even out over many devices" in first) == (alone < 1.21)
    assert "steady rate: what one device sustains with a constant number of sessions" in rest
    assert "aximum rate" not in text and "carries at most" not in text
