"""The search through a plan's space: grid or search, no configuration twice, the same again after a kill."""

import dataclasses
from types import SimpleNamespace

import pytest
from signoff_fakes import PLAN, ROOT, FakeDriver, fakes, stand_in  # noqa: F401
from staged_rungs import point as explored
from staged_rungs import server

from harness import signoff as job
from harness import wire
from harness.deploy.config import Deployment
from harness.errors import PlanError
from harness.planfile.reading import load_plan
from harness.planfile.sections import SearchSpec
from harness.records.store import Run
from harness.runs import opening, points
from harness.sweep.progress import Watcher
from harness.sweep.search import Search
from harness.sweep.trial import Measured

SEARCH = PLAN.replace(
    "space: {diffusion_decoder.delay_us: [0, 1000, 2000]}",
    """space: {delay_us: [0, 500, 1000, 2000, 4000, 8000, 16000], instances: [1, 2, 3, 4], diffusion_steps: [10, 12]}
search: {margin: 0.1, trials: 6, objective: {maximise: frames_per_s, at_most: {ttfa_p95_s: 0.6}}}""",
)


def plan_of(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return path


class StagedDriver(FakeDriver):
    """Trials with the rungs of a staged server."""

    def run(self, request):
        trial, point = super().run(request).trial, request.point
        rungs = server(point[f"{wire.LLM}.delay_us"], point[f"{wire.LLM}.instances"])
        return Measured(dataclasses.replace(trial, rungs=rungs), (), ())


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search that ran through: its plan and folder, what was measured in order, and what it said."""
    folder, watcher, said = tmp_path_factory.mktemp("searched"), Watcher(), []
    watcher.say = said.append
    with pytest.MonkeyPatch.context() as patch:
        driver = stand_in(patch, StagedDriver)
        patch.setattr(job, "LOCK_FOLDER", folder)
        work = job.SignOff(plan_of(folder, SEARCH), folder)
        work.execute(watcher, ladders_only=True)
        return SimpleNamespace(work=work, folder=folder, measured=driver.measured, said=said)


def test_a_search_measures_a_part_says_how_sure_it_is_and_starts_nothing_again(searched, monkeypatch):
    measured, said = [each.deployment for each in searched.work.run.trials()], searched.said
    assert 4 <= len(measured) <= 6 and "best so far: frames_per_s" in said[0]
    assert "within 10.0% of the best" in said[-2] and said[-1].startswith("the search ends")
    monkeypatch.setattr(job, "TritonServer", lambda base: pytest.fail("a server was started"))
    job.SignOff(searched.work.plan_path, searched.folder).execute(ladders_only=True)


def test_a_killed_search_goes_on_as_if_nothing_had_happened(tmp_path, searched, monkeypatch):
    driver = stand_in(monkeypatch, StagedDriver)
    monkeypatch.setattr(driver, "break_after", 3)
    with pytest.raises(KeyboardInterrupt):
        job.SignOff(searched.work.plan_path, tmp_path).execute(ladders_only=True)
    monkeypatch.setattr(driver, "break_after", None)
    job.SignOff(searched.work.plan_path, tmp_path).execute(ladders_only=True)
    assert driver.measured == searched.measured


def test_spellings_of_one_configuration_are_measured_once(tmp_path, fakes):  # noqa: F811
    key = f"{wire.DIFFUSION}:dynamic_batching.max_queue_delay_microseconds"
    text = PLAN.replace("[0, 1000, 2000]}", f"[0, 1000], '{key}': [500, 1000]}}")
    plan = plan_of(tmp_path, text)
    work = job.SignOff(plan, tmp_path)
    assert len(work.spec.points()) == 4
    work.execute(ladders_only=True)
    delays = {each.deployment[key] for each in work.run.trials()}  # the path is turned last: it wins
    assert len(work.run.trials()) == 2 and delays == {500, 1000}


TOPOLOGIES = PLAN.replace(
    "space: {diffusion_decoder.delay_us: [0, 1000, 2000]}",
    "space: {diffusion_decoder.delay_us: [0, 1000, 2000], engine.max_batch: [8, 16], topology: [staged, fused]}",
)


@pytest.mark.parametrize("search", ["grid", "{kind: model, share: 1.0}", "{kind: random, share: 1.0}"])
def test_a_combination_of_knobs_that_its_topology_does_not_have_is_measured_once(tmp_path, fakes, search):  # noqa: F811
    work = job.SignOff(plan_of(tmp_path, f"{TOPOLOGIES}search: {search}"), tmp_path)
    work.execute(ladders_only=True)
    trials = work.run.trials()
    points = sorted(str(each.deployment) for each in trials)
    assert points == sorted(map(str, work.spec.points())) and len(points) == len(set(points)) == 5
    assert [each.topology for each in trials] == [each.deployment["topology"] for each in trials]
    assert work.run.manifest.topologies == ("staged", "fused")
    if search == "grid":  # one change of topology: each starts a server anew
        assert [each.topology for each in trials] == ["staged"] * 3 + ["fused"] * 2


def test_a_search_tries_every_topology_first(tmp_path, fakes):  # noqa: F811
    fused_first = TOPOLOGIES.replace("[staged, fused]", "[fused, staged]")
    work = job.SignOff(plan_of(tmp_path, fused_first + "search: {kind: model, trials: 2}"), tmp_path)
    work.execute(ladders_only=True)
    assert [each.topology for each in work.run.trials()] == ["fused", "staged"]
    assert work.base.topology == "fused"


def test_numbers_of_one_point_have_one_that_stands_for_them(tmp_path):
    search = Search(load_plan(plan_of(tmp_path, TOPOLOGIES + "search: model")), Deployment())
    space, points = search.space, search.spec.points()
    own = {space.lowest(number) for number in range(space.size)}
    assert sorted(str(space.point(number)) for number in own) == sorted(map(str, points)) and space.size == 12
    assert {space.number(point) for point in points} == own
    assert all(set(space.neighbours(number)) <= own - {number} for number in own)
    assert search.size == len(points) == 5


def test_what_requests_ask_for_by_default_is_no_other_configuration(tmp_path):
    spec = load_plan(plan_of(tmp_path, PLAN))
    search = Search(spec, Deployment())
    asks = {"diffusion_steps": spec.mix.diffusion_steps}
    assert search.key({}) == search.key(asks) != search.key({"diffusion_steps": spec.mix.diffusion_steps + 1})


@pytest.mark.parametrize(
    ("search", "kind", "most"),
    [("", "grid", 3), ("search: grid", "grid", 3), ("search: {kind: tpe, share: 0.7}", "tpe", 3),
     ("search: {trials: 2}", "model", 2)],
)  # fmt: skip
def test_how_a_plan_is_walked(tmp_path, search, kind, most):
    spec = load_plan(plan_of(tmp_path, PLAN + search))
    assert spec.searched().kind == kind and spec.searched().most(spec.size()) == most


def test_a_large_space_is_searched_unless_the_plan_says_grid(tmp_path):
    large = PLAN.replace("[0, 1000, 2000]", str(list(range(100))))
    assert load_plan(plan_of(tmp_path, large)).searched().kind == "model"
    assert load_plan(plan_of(tmp_path, large + "search: grid")).searched().kind == "grid"


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ("search: {marign: 0.1}", "search.marign: unknown key; did you mean 'margin'?"),
        ("search: modle", "search.kind"),
        ("search: {margin: 2}", "search.margin"),
        ("search: {objective: {maximize: x}}", "search.objective.maximize: unknown key; did you mean 'maximise'?"),
        ("search: {objective: {maximise: frame_per_s}}", "did you mean 'frames_per_s'?"),
        ("search: {objective: {at_most: {step_s: 1}}}", "needs either maximise or minimise"),
    ],
)
def test_mistakes_in_a_search_are_named(tmp_path, search, says):
    with pytest.raises(PlanError) as error:
        load_plan(plan_of(tmp_path, PLAN + search))
    assert says in str(error.value)


def test_points_of_a_deployment_that_the_physics_knows(tmp_path):
    spec = load_plan(plan_of(tmp_path, SEARCH))
    defaults = Search(spec, Deployment()).guide.defaults
    assert set(explored()) <= set(defaults) and all(defaults[f"{stage}.max_batch"] >= 1 for stage in wire.STAGES)


def test_a_sweep_measured_on_the_real_server_is_searched_again_with_half_of_its_points():
    run = Run.open(ROOT / "results" / "sample-sweep")
    whole = opening.spec_of(run)
    spec = whole.model_copy(update={"search": SearchSpec(margin=0.05, share=1.0)})
    search, ended = Search(spec, points.deployment_of(spec, None)), []
    while (step := search.next(run, ended)).point is not None:
        ended.append(step.point)
    rates = {str(each.deployment): each.max_rate_per_s or 0.0 for each in run.fit().deployments}
    assert len(ended) <= whole.size() / 2
    assert max(rates[str(point)] for point in ended) >= 0.95 * max(rates.values())
    assert "estimated probability" in search.said and "untried" in step.says
