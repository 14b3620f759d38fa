"""Plans: the shipped one loads, its points are all combinations, and every mistake is named."""

import typing
from pathlib import Path

import pytest
import yaml

from harness import wire
from harness.errors import PlanError
from harness.planfile.plan import PlanSpec
from harness.planfile.reading import load_plan
from harness.records.slo import Slo

ROOT = Path(__file__).parents[2]
SHORT = {"short": {"rtf_p95": 0.9}}
QUICK = yaml.safe_load((ROOT / "scenarios" / "quick.yaml").read_text(encoding="utf-8"))


def write(tmp_path, **changes):
    content = {key: value for key, value in {**QUICK, **changes}.items() if value is not ...}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def custom_mix(**changes):
    return {"classes": {"short": {"weight": 1, "length": {"fixed": 2}, **changes}}}


@pytest.mark.parametrize("path", sorted((ROOT / "scenarios").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_plan_loads(path):
    plan = load_plan(path)
    assert plan.points() and plan.slo_list() and plan.traffic_mix().mean_frames() > 0


def test_the_quick_plan_says_what_it_says(tmp_path):
    plan = load_plan(ROOT / "scenarios" / "quick.yaml")
    assert plan.slo_list()[0] == Slo("short", "ttfa_s", 0.95, 1.0)
    assert len(plan.points()) == 4
    assert plan.points()[3] == {
        **{f"{stage}.delay_us": 5000 for stage in wire.STAGES},
        "diffusion_decoder.instances": 2,
    }


def test_a_knob_that_names_its_stage_wins_over_the_bare_one(tmp_path):
    plan = load_plan(write(tmp_path, space={"neural_vocoder.delay_us": [7], "delay_us": [0, 5], "chunk_frames": [4]}))
    assert [point["neural_vocoder.delay_us"] for point in plan.points()] == [7, 7]
    assert [point["diffusion_decoder.delay_us"] for point in plan.points()] == [0, 5]
    assert plan.points()[0]["chunk_frames"] == 4
    every = {f"{stage}.delay_us": [1] for stage in wire.STAGES}
    assert len(load_plan(write(tmp_path, space={"delay_us": [0, 5], **every})).points()) == 1


def test_a_point_has_the_knobs_of_its_topology_alone_and_is_there_once(tmp_path):
    space = {
        "delay_us": [0, 5000],
        "topology": ["staged", "fused"],
        "engine.max_batch": [16, 32],
        "chunk_frames": [1, 2],
    }
    plan = load_plan(write(tmp_path, space=space))
    staged = [{f"{stage}.delay_us": delay for stage in wire.STAGES} for delay in (0, 5000)]
    fused = [{"engine.max_batch": most} for most in (16, 32)]
    expected = [{"topology": "staged", **part, "chunk_frames": n} for part in staged for n in (1, 2)]
    expected += [{"topology": "fused", **part, "chunk_frames": n} for part in fused for n in (1, 2)]
    points = plan.points()
    assert len(points) == 8 and all(point in points for point in expected) and plan.size() == 8
    assert [point["topology"] for point in points] == ["staged"] * 4 + ["fused"] * 4


def test_a_plan_takes_every_topology_and_no_other(tmp_path):
    assert typing.get_args(PlanSpec.model_fields["topology"].annotation) == tuple(wire.TOPOLOGIES)
    with pytest.raises(PlanError, match="topology: must be 'staged' or 'fused', not 'split'"):
        load_plan(write(tmp_path, topology="split"))


def test_a_fused_plan_says_so_in_each_of_its_points(tmp_path):
    plan = load_plan(write(tmp_path, topology="fused", space={"engine.max_batch": [8, 16]}))
    assert plan.points() == [{"topology": "fused", "engine.max_batch": most} for most in (8, 16)]
    assert load_plan(write(tmp_path, topology="fused", space=...)).points() == [{"topology": "fused"}]


def test_nothing_swept_is_one_point(tmp_path):
    assert load_plan(write(tmp_path, space=...)).points() == [{}]


def test_a_mix_written_out_reads_its_files_beside_the_plan(tmp_path):
    (tmp_path / "lengths.csv").write_text("2\n4\n")
    (tmp_path / "talk.txt").write_text("Speaker 2: hello")
    path = write(
        tmp_path,
        mix=custom_mix(length={"empirical": "lengths.csv"}, speakers=[1, 3]),
        slos=SHORT,
        scripts=".",
    )
    plan = load_plan(path)
    assert plan.traffic_mix().mean_frames() == 22.5
    assert plan.script_source().files[0][0].text == "hello"


def test_a_class_of_a_plan_can_speak_its_scripts_whole(tmp_path):
    (tmp_path / "talk.txt").write_text("Speaker 1: one two three")
    path = write(tmp_path, mix=custom_mix(length="from_script"), slos=SHORT, scripts=".")
    assert load_plan(path).traffic_mix().mean_frames() == 8


def test_a_preferred_batch_may_reach_the_highest_that_it_is_combined_with(tmp_path):
    space = {"max_batch": [8], "neural_vocoder.max_batch": [16], "neural_vocoder.preferred_batch": [0, 16]}
    assert len(load_plan(write(tmp_path, space=space)).points()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget_minuts": 3}, "budget_minuts: unknown key; did you mean 'budget_minutes'"),
        ({"ladder": {"sesions": [1]}}, "ladder.sesions: unknown key; did you mean 'sessions'"),
        ({"name": ...}, "name: missing"),
        ({"name": "a/b"}, "name: "),
        ({"preset": "tinny"}, "preset: must be 'tiny', '1.5b' or '7b', not 'tinny'"),
        ({"seed": True}, "seed: must be a valid integer, not True"),
        ({"mix": "quik"}, "mix: no mix is named 'quik'; did you mean 'quick'"),
        ({"mix": {}}, "mix: no mix is named 'custom'"),
        ({"mix": custom_mix(lenght=1)}, "mix.classes.short.lenght: unknown key; did you mean 'length'"),
        ({"mix": custom_mix(length={"fixed": 9999}), "slos": SHORT}, "at most 5400"),
        ({"mix": custom_mix(speakers=[1, 5]), "slos": SHORT}, "mix.classes.short: .*1 to 4"),
        ({"slos": {"shrt": {"rtf_p95": 1}}}, "slos.shrt: .*did you mean 'short'"),
        ({"slos": {"short": {"rtf_95": 1}}}, "slos: short: 'rtf_95' is not an SLO"),
        ({"slos": {"short": {"rtf_p95": "1"}}}, "slos: short: the limit of rtf_p95"),
        ({"slos": {"short": {}}}, "slos: short: needs at least one SLO"),
        ({"slos": {}}, "slos: "),
        ({"targets_qps": []}, "targets_qps: "),
        ({"targets_qps": [0]}, "targets_qps.0: must be greater than 0, not 0"),
        ({"targets_qps": [float("nan")]}, "targets_qps.0: must be"),
        ({"targets_qps": [1, 2e6]}, "targets_qps.1: must be less than or equal to 1000000, not 2000000"),
        ({"space": {"delay_ms": [1]}}, "space: delay_ms: unknown knob; did you mean 'delay_us'"),
        ({"space": {"delay_us": [-1]}}, "space: delay_us: needs different whole numbers from 0 to 10000000"),
        ({"space": {"delay_us": []}}, "space: delay_us: needs one value or more"),
        ({"space": {"instances": [1, 1]}}, "space: instances: needs one value or more, each different"),
        ({"space": {"instances": [1.5]}}, "space: instances: needs different whole numbers from 1 to 64"),
        ({"space": {"topolgy": ["fused"]}}, "space: topolgy: unknown knob; did you mean 'topology'"),
        ({"space": {"topology": ["fuse"]}}, "space: topology: must be staged or fused, not"),
        ({"topology": "fuse"}, "topology: must be 'staged' or 'fused', not 'fuse'"),
        ({"topology": "fused", "space": {"topology": ["staged"]}}, "topology is given twice: leave"),
        (
            {"topology": "fused", "space": {"delay_us": [0, 5]}},
            "space: delay_us: the fused topology has no such knob: leave it out, or set topology: staged, or sweep",
        ),
        (
            {"space": {"engine.max_batch": [8]}},
            "space: engine.max_batch: the staged topology has no such knob: .*topology: fused",
        ),
        ({"space": {"vocoder:max_batch_size": [8]}}, "space: vocoder:max_batch_size: unknown model; did you mean"),
        ({"ladder": {"sessions": [1, 4, 2]}}, "ladder.sessions: must rise"),
        ({"ladder": {"seconds": 1.9}}, "ladder.seconds: must lie in 2 to 86400, not 1.9"),
        ({"ladder": {"seconds": float("inf")}}, "ladder.seconds: must lie in 2 to 86400, not inf"),
        ({"confirm": {"seconds": 4}}, "confirm.seconds: must be whole seconds from 5 to 86400, not 4"),
        ({"confirm": {"seconds": 7.5}}, "confirm.seconds: must be whole seconds from 5 to 86400, not 7.5"),
        ({"confirm": {"seconds": float("nan")}}, "confirm.seconds: must be whole seconds"),
        ({"confirm": {"load_share": [11]}}, "confirm.load_share.0: must be less than or equal to 10"),
        ({"demand": {"minimum": 2}}, "demand: needs either diurnal: {peak_qps: 5, trough_qps: 1} or trace: FILE"),
        ({"demand": {"diurnal": {"peak_qps": 1, "trough_qps": 2}}}, "demand.diurnal: trough_qps 2 is above peak_qps 1"),
        (
            {"demand": {"diurnal": {"peak_qps": 1, "trough_qps": 1, "peak_our": 1}}},
            "demand.diurnal.peak_our: unknown key",
        ),
        ({"demand": {"trace": "none.csv"}}, "demand.trace: "),
        ({"demand": {"trace": {"file": "a.csv", "hour": 2}}}, "demand.trace.hour: unknown key; did you mean 'hours'"),
        ({"demand": {"trace": "a.csv", "diurnal": {"peak_qps": 1, "trough_qps": 1}}}, "needs either diurnal"),
        ({"utilisation_cap": 1.1}, "utilisation_cap: must be less than or equal to 1, not 1.1"),
        ({"prices": {"H200": 0}}, "prices.H200: must be greater than 0"),
        ({"growth_per_month": -0.1}, "growth_per_month: must lie in 0 to 1, not -0.1"),
        ({"growth_per_month": 10.0}, "growth_per_month: must lie in 0 to 1, not 10: 0.1 means 10% more each month"),
        (
            {"search": {"objective": {"minimise": "shrot.stall_p95_s"}}},
            "search.objective: shrot.stall_p95_s: .*no class 'shrot'; did you mean 'short'",
        ),
        (
            {"search": {"objective": {"maximise": "sessions", "at_most": {"short.sessions": 1}}}},
            "search.objective: short.sessions: unknown metric of a class",
        ),
        ({"profiles": {"H200": {"profile": "x", "tflop_s": 9.0}}}, "profiles.H200: another GPU needs both"),
        (
            {"profiles": {"H200": {"profile": "x", "kv_room_gb": 9.0}}},
            "profiles.H200: kv_room_gb applies to another GPU",
        ),
        ({"profiles": {"H200": {"tflop_s": 9.0}}}, "profiles.H200.profile: "),
        ({"profiles": {"H200": 7}}, "profiles.H200: "),
        ({"fleet": 0}, "fleet: must be greater than or equal to 1"),
        ({"confidence": 1.0}, "confidence: must be less than or equal to 0.99"),
        ({"max_error": "0.25"}, "max_error: must be a valid number"),
        ({"max_others": 0}, "max_others: must be greater than 0, not 0"),
        ({"max_error": 1e9}, "max_error: must be less than or equal to 1"),
        ({"scripts": "nowhere"}, "nowhere: no .txt file"),
        (
            {"space": {"max_batch": [8, 32], "diffusion_decoder.preferred_batch": [4, 16]}},
            "space: diffusion_decoder: preferred_batch 16 is above max_batch 8",
        ),
        ({"mix": custom_mix(length=10), "slos": SHORT}, "mix.classes.short: a length must be one of .*, not 10"),
        ({"mix": custom_mix(length="from_script"), "slos": SHORT}, "from_script needs real scripts"),
    ],
)
def test_every_mistake_names_the_file_the_key_and_what_is_allowed(changes, message, tmp_path):
    with pytest.raises(PlanError, match=f"^{tmp_path}/plan.yaml: .*{message}"):
        load_plan(write(tmp_path, **changes))


def test_all_mistakes_come_in_one_error(tmp_path):
    with pytest.raises(PlanError) as caught:
        load_plan(write(tmp_path, seed=-1, confidence=2, extra=1))
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "line 1: no valid YAML"),
        (b"name: a\nseed: 1\nseed: 2", "key 'seed' is given twice"),
        (b"- x", "has no keys"),
        (b"", "has no keys"),
        (b"\x00", "no valid YAML"),
        (b"\xff\xfe\xff", "no valid YAML"),
        (b"a: 2001-99-99", "no valid YAML"),
        (b"1: 2", "1: "),
    ],
)
def test_a_file_that_is_no_plan_is_refused(content, message, tmp_path):
    (tmp_path / "plan.yaml").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.yaml")


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(PlanError, match="none.yaml: cannot be read: No such file"):
        load_plan(tmp_path / "none.yaml")


def test_promises_is_an_old_name_of_slos(tmp_path):
    slos = {"short": {"ttfa_p95_s": 2.0}}
    assert load_plan(write(tmp_path, slos=..., promises=slos)) == load_plan(write(tmp_path, slos=slos))
    with pytest.raises(PlanError, match="slos and promises are two names of one key: keep slos"):
        load_plan(write(tmp_path, slos=slos, promises=slos))
