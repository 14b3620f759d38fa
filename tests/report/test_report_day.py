"""The section of the report about a day: its picture, its fleets, and their rules."""

import pytest
import report_sample as sample
from report_page import Page

from harness.content import content_of
from harness.records.day import PREDICTIVE, REACTIVE, STATIC, Day, FleetDay, ScalingRule, ScheduledMinimum, SloOfDay
from harness.records.plan import Plan
from harness.report import day_figures, words
from harness.report.page import write_report

RULE = ScalingRule(target_sessions_per_device=9.2, maximum=8, schedule=(ScheduledMinimum(at_s=0.0, devices=2),))


def fleet(policy, devices, met=True, rule=RULE):
    slo = SloOfDay(traffic_class="short", metric="rtf", quantile=0.95, limit=0.9, within=0.91, worst_part=0.7, met=met)
    return FleetDay(
        policy=policy, rule=rule, devices=(devices,) * 144, most_devices=6, device_hours=24.0 * devices,
        cost=48.0 * devices, within_slos=0.991, worst_part=0.7, rejected=0.002, slos=(slo,), met=met, basis="simulated",
    )  # fmt: skip


DAY = Day(
    source="diurnal, 1 to <5> requests/s", period_s=86_400.0, window_s=600.0, peak_qps=5.0, mean_qps=3.0,
    requests=259_200, offered_qps=(3.0,) * 144, sessions=(20.0,) * 144, session_limit=18, sessions_at_cap=9.2,
    policies=(fleet(STATIC, 5.0, rule=None), fleet(REACTIVE, 4.0, met=False), fleet(PREDICTIVE, 3.0)), currency="EUR",
)  # fmt: skip


def page_of(tmp_path, day=DAY, **more):
    run = sample.make_run(tmp_path, plan=sample.outlook_record() | {"day": content_of(day)}, **more)
    return write_report(run).read_text(), run


def test_it_has_a_picture_a_table_and_the_rules(tmp_path):
    text, run = page_of(tmp_path)
    page = Page(text)
    (table,) = [rows for rows in page.tables if rows[0][:2] == ["Policy", "SLOs"]]
    assert {"demand", "day"} <= set(page.ids) and "A day" in page.text and "<5>" not in text
    assert len(set(page.ids)) == len(page.ids)
    assert [row[0] for row in table[1:]] == ["static", "reactive", "predictive"]
    assert table[2][1].startswith("✕ violatedshort: 95% of requests are spoken")
    assert table[2][1].endswith("it was 91.0%, in the worst hour 70.0%")
    assert table[3][2:9] == ["99.1%", "70.0%", "0.20%", "6", "72.0", "144.00", "−40%"]
    assert "1 to 8 devices for 9.2 sessions each" in page.text and "a schedule of 1 row" in page.text
    assert run.plan().day == DAY and run.plan().day.rule == RULE


def test_emulated_figures_are_labelled(tmp_path):
    page = Page(page_of(tmp_path, emulated=True)[0])
    captions = [" ".join(each.split()) for each in page.captions]
    assert all(each.endswith("emulated") for each in captions if each.startswith(("One period", "Above: requests")))
    assert sum(each.startswith(("One period", "Above: requests")) for each in captions) == 2


def test_a_day_that_no_fleet_carries_is_a_sentence(tmp_path):
    day = Day(source="x", period_s=1.0, window_s=1.0, peak_qps=1.0, mean_qps=1.0, note="No number of devices meets it.")
    text, _ = page_of(tmp_path, day)
    assert "No number of devices meets it." in Page(text).text and 'id="data-day"' not in text


def test_the_picture_has_the_demand_above_and_a_line_of_steps_for_each_policy():
    figure = day_figures.day(DAY)
    assert [trace.name for trace in figure.data] == ["requests/s", "static", "reactive", "predictive"]
    assert {trace.line.shape for trace in figure.data} == {"hv"} and figure.data[0].yaxis == "y2"
    assert len(figure.data[1].x) == len(figure.data[1].y) == 145 and figure.data[1].x[-1] == 24
    assert figure.layout.yaxis.domain[1] < figure.layout.yaxis2.domain[0]


@pytest.mark.parametrize(("policy", "said"), [(STATIC, ""), (REACTIVE, "−20%"), (PREDICTIVE, "−40%")])
def test_hours_are_compared_with_the_static_fleet(policy, said):
    assert day_figures.saving(DAY, policy) == said


def test_a_rule_is_a_sentence():
    assert words.scaling_rule(RULE).startswith("1 to 8 devices for 9.2 sessions each (within 10% nothing changes)")


def test_a_plan_without_a_day_has_none():
    assert Plan.of(sample.outlook_record()).day is None
