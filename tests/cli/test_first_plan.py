"""`harness init` writes plans that pass as such, from answers or options, and replaces nothing unasked."""

import itertools

import pytest
from typer.testing import CliRunner

from harness.cli.first_plan import MIXES, PRESETS, Answers, gpus_of, mix_of, name_of, rates_of, slos_of, write_plan
from harness.cli.main import app
from harness.errors import InputError
from harness.planfile.reading import load_plan


def init(*options, answers: str | None = None):
    return CliRunner().invoke(app, ["init", *map(str, options)], input=answers)


@pytest.mark.parametrize(
    ("preset", "gpus", "mix"), list(itertools.product(PRESETS, (0, 1, 8), (*MIXES, 0.5, 37.5, 5400.0)))
)
def test_every_answer_makes_a_plan_that_passes(tmp_path, preset, gpus, mix):
    answers = Answers(preset, gpus, mix, 0.8, 0.7, (0.25, 40.0), 2.5)
    plan = load_plan(write_plan(tmp_path / "first.yaml", answers))
    assert (plan.name, plan.preset, plan.targets_qps) == ("first", preset, (0.25, 40.0))
    assert (plan.device, plan.gpus) == (("gpu", gpus) if gpus else ("cpu", 1))
    assert plan.topologies == (("fused",) if gpus else ("staged",))
    assert list(plan.prices.values()) == [2.5]
    slos = {(each.metric, each.limit) for each in plan.slo_list()}
    assert slos == {("ttfa_s", 0.8), ("rtf", 0.7)}
    assert {each.traffic_class for each in plan.slo_list()} == {each.name for each in plan.traffic_mix().classes}
    lengths = {each.name: each.length.mean_frames() / 7.5 for each in plan.traffic_mix().classes}
    expected = {"short": {"short": 10}, "long": {"long": 5400}, "mixed": {"short": 10, "long": 5400}}
    assert lengths == pytest.approx(expected.get(mix, {"own": mix}), abs=0.07)


def test_five_questions_and_the_next_command(tmp_path):
    path = tmp_path / "mine.yaml"
    said = init(path, answers="1.5b\n2\nmixed\n0.5, 0.8\n1, 20 at 3.20\n")
    assert said.exit_code == 0, said.output
    assert [f"{number}/5" in said.output for number in range(1, 6)] == [True] * 5
    plan = load_plan(path)
    assert (plan.preset, plan.gpus, plan.targets_qps, plan.prices) == ("1.5b", 2, (1.0, 20.0), {"NVIDIA": 3.2})
    assert said.output.replace("\n", "").endswith(f"harness signoff {path}")


def test_an_answer_that_no_plan_can_hold_is_asked_again(tmp_path):
    said = init(tmp_path / "p.yaml", answers="2b\n7b\nmoon\ncpu\nlong\n1\n1, 0.9\nmany\n5\n")
    assert said.exit_code == 0 and load_plan(tmp_path / "p.yaml").preset == "7b"
    for words in ("preset '2b': answer one of", "'moon' is not usable", "SLOs '1': answer two", "rates 'many'"):
        assert words in said.output


def test_options_ask_nothing_and_what_is_left_out_is_the_default(tmp_path):
    said = init(tmp_path / "p.yaml", "--gpus", "4", "--mix", "90s", "--price", "2", "--yes")
    assert said.exit_code == 0 and "1/5" not in said.output
    plan = load_plan(tmp_path / "p.yaml")
    assert (plan.preset, plan.gpus, plan.prices) == ("tiny", 4, {"NVIDIA": 2.0})
    said = init(tmp_path / "q.yaml", "--mix", "short", answers="")
    assert isinstance(said.exception, InputError) and "--yes" in str(said.exception)


def test_a_plan_that_is_there_stays_as_it_is(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("mine")
    said = init(path, "--yes")
    assert isinstance(said.exception, InputError) and "--force" in str(said.exception) and path.read_text() == "mine"
    assert init(path, "--yes", "--force").exit_code == 0 and load_plan(path)
    assert [each.name for each in tmp_path.iterdir()] == ["p.yaml"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--preset", "2b"), "preset '2b'"),
        (("--gpus", "65"), "1 to 64"),
        (("--gpus", "-1"), "1 to 64"),
        (("--mix", "5401"), "up to 5400"),
        (("--mix", "nan"), "up to 5400"),
        (("--slo", "1.0,inf"), "two limits"),
        (("--qps", "0"), "such as 0.5, 1, 5"),
        (("--qps", "1,,2"), "such as 0.5, 1, 5"),
        (("--price", "free"), "such as 2.50"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(tmp_path, options, words):
    said = init(tmp_path / "p.yaml", "--yes", *options)
    assert isinstance(said.exception, InputError) and words in str(said.exception)
    assert list(tmp_path.iterdir()) == []


def test_answers_as_people_write_them():
    assert [gpus_of(text) for text in ("CPU", "gpu", "2 GPUs", "1 gpu", "8")] == [0, 1, 2, 1, 8]
    assert [mix_of(text) for text in (" Long", "45", "45s")] == ["long", 45.0, 45.0]
    assert slos_of("1,0.9") == (1.0, 0.9) and rates_of("1, 5 at 2.5") == ((1.0, 5.0), 2.5)


@pytest.mark.parametrize("file", ["my plan.yaml", "übung.yaml", "-.yaml", f"{'x' * 90}.yaml", "a b c 7.yml"])
def test_any_file_name_makes_a_name_that_a_plan_may_have(tmp_path, file):
    assert load_plan(write_plan(tmp_path / file, Answers())).name == name_of(tmp_path / file)


@pytest.mark.parametrize("file", ["plan.txt", "none/plan.yaml"])
def test_where_nothing_can_be_written_it_is_said(tmp_path, file):
    with pytest.raises(InputError, match="must end in .yaml|cannot write"):
        write_plan(tmp_path / file, Answers())
