"""The cheapest mix of device types in the report: what it has, what it costs, and why no other is cheaper."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import report_sample as sample
from report_page import Page

from harness import wire
from harness.cli.tables import print_plan
from harness.content import content_of
from harness.device_profile import Profile
from harness.errors import InconclusiveError
from harness.records.fleet import FleetAnswer, FleetTarget, FleetType, MixedFleet, MixedPool
from harness.records.load_test import ClassRecord
from harness.records.store import Run
from harness.report.mixed_fleets import fleet_rows
from harness.report.page import write_report
from harness.report.recomputed import _differences
from harness.runs import fleets, opening

SAMPLE = Path(__file__).resolve().parents[2] / "results" / "sample-quick"


def kind(name, price, **more):
    return FleetType(
        name=name, device=name, basis="estimated", price_per_hour=price, watts=700.0, watts_basis="estimated",
        most=None, **({"ruled_out": {}} | more),
    )  # fmt: skip


def pool(name, classes, devices, share=1.0):
    return MixedPool(
        device_type=name, classes=classes, share=share, qps=1.0, devices=devices, spares=0, interval=(None, None),
        basis="estimated",
    )  # fmt: skip


def fleet(cost, *pools, **more):
    devices = {each.device_type: each.devices for each in pools}
    return MixedFleet(
        pools=pools, devices=devices, cost_per_hour=cost, cost_interval=(None, None), cost_per_audio_hour=cost / 10,
        watts=None, joules_per_audio_s=None, watts_basis="", **more,
    )  # fmt: skip


TYPES = kind("H100", 2.5), kind("<L4>", 0.6)


def answer(*targets, types=TYPES):
    one = ClassRecord(share=0.5, mean_audio_s=10.0, speakers=(1, 1), slos={"rtf_p95": 0.9})
    return FleetAnswer(
        preset="1.5b", mix={"short": one, "long": one}, slos=(), utilisation_cap=0.85, currency="EUR",
        power_limit_w=None, spares=0, types=types, targets=targets,
    )  # fmt: skip


MIXED = fleet(6.2, pool("H100", ("long",), 2), pool("<L4>", ("short",), 2))
ALONE = {"H100": fleet(7.5, pool("H100", ("short", "long"), 3))}
TARGET = FleetTarget(qps=5.0, best=MIXED, undivided=ALONE)


def page_of(tmp_path, found, **more):
    run = sample.make_run(tmp_path, plan=sample.outlook_record() | {"mixed_fleets": content_of(found)}, **more)
    return write_report(run).read_text(), run


def test_the_cheapest_mix_stands_beside_fleets_of_one_type(tmp_path):
    types = kind("H100", 2.5), kind("<L4>", 0.6, ruled_out={"short, long": "rtf p95 of class long"})
    found = answer(TARGET, types=types)
    text, run = page_of(tmp_path, found)
    page = Page(text)
    (table,) = [rows for rows in page.tables if rows[0][:2] == ["Requests/s", "Fleet"]]
    assert table[1][:4] == ["5", "2 H100 for long requests; 2 <L4> for short requests", "6.2", "0.62"]
    assert "3 H100 alone: 7.5 EUR an hour (+21%)" in table[1][4] and "estimated" in table[1][5]
    assert "<L4> alone serves no such traffic: real-time factor of long requests (95th percentile)" in table[1][4]
    assert "<L4>" not in text and "mixed-fleets" in page.ids and run.plan().mixed_fleets == found


def test_a_mix_that_saves_nothing_and_one_that_is_not_proven_say_so():
    one = FleetTarget(qps=1.0, best=ALONE["H100"], undivided=ALONE)
    unproven = FleetTarget(qps=2.0, best=replace(MIXED, proven=False, gap=0.031), undivided={})
    none = FleetTarget(qps=9.0, best=None, undivided={}, note="No fleet serves it.")
    rows = fleet_rows(answer(one, unproven, none))
    assert rows[0].pools == ("3 H100 for all requests",) and rows[0].against[0].endswith("(no mix is cheaper)")
    assert rows[1].note == "not proven: 3.1% cheaper may be possible"
    assert (rows[2].pools, rows[2].note) == ((), "No fleet serves it.")
    part = replace(TARGET, best=fleet(1.0, pool("H100", ("short", "long"), 1, share=0.4)))
    assert fleet_rows(answer(part))[0].pools == ("1 H100 for 40% of all requests",)


def test_a_mix_that_cannot_be_planned_says_why(tmp_path, monkeypatch, capsys):
    """Thirteen types; then two of which no fleet is found in time."""
    stored = Run.open(SAMPLE)
    types = [f"type-{number}" for number in range(12)]
    spec = opening.spec_of(stored).model_copy(update={"prices": {"cpu": 0.2} | dict.fromkeys(types, 1.0)})
    plan = replace(stored.plan(), targets=stored.plan().targets[:1])
    many = _with(stored, replace(stored.manifest, profiles={name: twice_as_fast() for name in types}))
    found = fleets.mixed_fleets_of(many, spec, stored.fit(), plan)
    assert found.targets == () and "a fleet of 13 types" in found.note and "leave some out" in found.note
    text, run = page_of(tmp_path, found)
    page = Page(text)
    assert "mixed-fleets" in page.ids and "a fleet of 13 types" in page.text and "Mix of types" in page.text
    print_plan(run.plan())
    assert "a fleet of 13 types" in " ".join(capsys.readouterr().out.split())

    def too_late(*_):
        raise InconclusiveError("no fleet was found within 10 s")

    monkeypatch.setattr(fleets, "plan_fleets", too_late)
    two = _with(stored, replace(stored.manifest, profiles={types[0]: twice_as_fast()}))
    late = fleets.mixed_fleets_of(two, spec, stored.fit(), plan)
    assert late.note == "No mix of device types is given: no fleet was found within 10 s."
    whole, none = (replace(plan, mixed_fleets=each) for each in (answer(TARGET), late))
    assert list(_differences(whole, none)) == list(_differences(none, whole)) == []


def test_a_search_that_proves_nothing_does_not_say_that_no_mix_is_cheaper():
    found = FleetTarget(qps=1.0, best=replace(ALONE["H100"], proven=False), undivided=ALONE)
    (row,) = fleet_rows(answer(found))
    assert row.against[0].endswith("(no cheaper mix was found)") and row.note == "not proven"


@pytest.mark.parametrize(
    ("known", "labels"),
    [("emulated", "simulated emulated"), ("emulated, extrapolated", "extrapolated emulated"),
     ("estimated, extrapolated", "estimated extrapolated emulated"), ("simulated", "simulated emulated")],
)  # fmt: skip
def test_each_word_of_a_basis_is_a_label_of_its_own(tmp_path, known, labels):
    pools = [replace(each, basis=known) for each in MIXED.pools]
    found = answer(replace(TARGET, best=replace(MIXED, pools=tuple(pools))))
    text, _ = page_of(tmp_path, found, emulated=True)
    (table,) = [rows for rows in Page(text).tables if rows[0][:2] == ["Requests/s", "Fleet"]]
    assert table[1][5].split() == labels.split()
    assert all(f'class="label {each}"' in text for each in labels.split()) and "label emulated," not in text


def test_a_run_of_one_type_shows_nothing(tmp_path):
    assert fleet_rows(None) == fleet_rows(answer(TARGET, types=(kind("H100", 2.5),))) == []
    assert "mixed-fleets" not in Page(write_report(sample.make_run(tmp_path)).read_text()).ids


def twice_as_fast() -> Profile:
    """A GPU that takes some milliseconds for a stage."""
    batches = (1, 4, 16)
    stages = {
        wire.LLM: [{"batch": b, "context": c, "ms": 4 + 0.2 * b} for b in batches for c in (100, 10_000)],
        wire.DIFFUSION: [{"batch": b, "steps": 10, "ms": 4 + 0.2 * b} for b in batches],
        wire.VOCODER: [{"batch": b, "ms": 2 + 0.2 * b} for b in batches],
    }
    model = {"hidden_size": 8, "kv_bytes_per_token": 1000, "kv_room_bytes": 10**8, "state_values": 8}
    return Profile.of({"schema": 1, "device": "NVIDIA L4", "preset": "tiny", "model": model, "stages": stages})


@pytest.mark.parametrize(("price", "cheapest"), [(0.01, "L4"), (50.0, "cpu")])
def test_the_types_are_the_runs_device_and_the_profiles_that_have_a_price(price, cheapest):
    stored = Run.open(SAMPLE)
    spec = opening.spec_of(stored).model_copy(update={"prices": {"cpu": 0.2, "L4": price}})
    plan = replace(stored.plan(), targets=stored.plan().targets[:1])
    assert fleets.mixed_fleets_of(stored, spec, stored.fit(), plan) is None  # one type
    manifest = replace(
        stored.manifest, profiles={"L4": twice_as_fast(), "B200": replace(twice_as_fast(), device="NVIDIA B200")}
    )
    stored = _with(stored, manifest)
    found = fleets.mixed_fleets_of(stored, spec, stored.fit(), plan)
    assert [(each.name, each.basis) for each in found.types] == [("cpu", "measured"), ("L4", "extrapolated")]
    (target,) = found.targets
    assert set(target.best.devices) == {cheapest} and found.types[1].watts == 72
    assert json.dumps(found.to_dict())


def _with(stored, manifest):
    class Seen:
        """A stored run with another manifest."""

        def __getattr__(self, name):
            return manifest if name == "manifest" else getattr(stored, name)

    return Seen()
