"""The main job goes on where it stopped, and never measures twice."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import signoff_fakes
from conftest import still_running
from fake_triton import Timetable, serving
from signoff_fakes import PLAN, ROOT, FakeServer

from harness import signoff as job
from harness import wire
from harness.deploy.config import Deployment
from harness.drive.load import Load
from harness.errors import InputError, ServerError, StoreError
from harness.exit_codes import OF_VERDICT
from harness.planfile.reading import load_plan
from harness.records import store
from harness.records.store import Run
from harness.runs import analysis, opening, stages
from harness.sweep import campaign
from harness.sweep.progress import Watcher
from harness.sweep.trial import Driver, TrialFailed, TrialRequest
from harness.sweep.trial_log import FAILED_IN_A_ROW, TRIES

plan, fakes, fitted = signoff_fakes.plan, signoff_fakes.fakes, signoff_fakes.fitted


def test_an_interrupted_sweep_goes_on_without_repeating_a_trial(plan, tmp_path, fakes):
    fakes.break_after = 2
    with pytest.raises(KeyboardInterrupt):
        job.SignOff(plan, tmp_path / "results").execute(ladders_only=True)
    assert len(fakes.measured) == 2
    fakes.break_after = None
    again = job.SignOff(plan, tmp_path / "results")
    again.execute(ladders_only=True)
    assert len(fakes.measured) == len(set(fakes.measured)) == 3
    assert [trial.trial_id for trial in again.run.trials()] == fakes.measured
    assert not (again.run.path / ".work").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix: quick": "mix: {name: quick, voices: [1, 99]}"}, "mix.voices: 99: the server has voices 1 to 4"),
        ({"diffusion_decoder.delay_us: [0, 1000, 2000]": "preferred_batch: [0, 64]"}, "preferred_batch 64 .* is 32"),
        (
            {"seed: 3": "seed: 3\nparameters: {vibevoice_full_pipeline.voices: none}"},
            "voices folder none: no such folder",
        ),
        ({"seed: 3": "seed: 3\nparameters: {vibevoice_llm_encoder.kv_limit_bytes: 8G}"}, "kv_limit_bytes is 8G"),
    ],
)
def test_a_plan_that_no_server_can_carry_is_refused_when_it_is_read(plan, tmp_path, fakes, changes, message):
    text = PLAN
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    plan.write_text(text)
    with pytest.raises(InputError, match=message):
        job.SignOff(plan, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_voices_of_servers_that_are_not_ours_are_theirs_to_know(plan, tmp_path):
    plan.write_text(PLAN.replace("mix: quick", "mix: {name: quick, voices: [99]}"))
    assert job.SignOff(plan, tmp_path, url="127.0.0.1:1").campaign.mix.voices == (99,)


def test_what_a_server_refuses_for_good_ends_the_job_as_a_mistake_in_the_plan(plan, tmp_path):
    """Exit code 64, and no ladder after the first: a retry cannot help."""
    refusal = f"{wire.REFUSED}unknown voice id 99 for speaker 1"
    with serving(Timetable(fail_after=0, error=refusal)) as fake:
        server = FakeServer()
        server.url, server.target, server.metrics_url = fake.url, fake.url, ""
        server.reload = lambda deployment: []
        driver = Driver(server, plan, load_plan(plan), tmp_path, Deployment())
        with pytest.raises(InputError, match="^the server rejects what the plan asks for.*: unknown voice id 99"):
            driver.run(TrialRequest({}, Load.ladder(30, seed=1, sessions=(1, 2))))


def test_a_finished_sweep_starts_no_server(plan, tmp_path, fakes, monkeypatch):
    job.SignOff(plan, tmp_path).execute(ladders_only=True)
    monkeypatch.setattr(job, "TritonServer", lambda base: pytest.fail("a server was started"))
    job.SignOff(plan, tmp_path).execute(ladders_only=True)


def test_data_that_carry_no_answer_end_inconclusive_with_a_report(plan, tmp_path, fakes):
    work = job.SignOff(plan, tmp_path)
    content = work.execute()
    assert content.verdict == "inconclusive" and content.reasons
    assert [row.devices for row in content.targets] == [None, None]
    assert "inconclusive" in (work.run.path / "signoff.html").read_text().lower()
    assert work.run.manifest.finished_at
    assert job.SignOff(plan, tmp_path).execute() == content  # answered from the store
    assert len(fakes.measured) == 3


@pytest.mark.parametrize("url", ["a:8001", "a:8001,b:8001"])
def test_the_kv_memory_of_servers_of_somebody_else_is_not_known(plan, tmp_path, url):
    run = job.SignOff(plan, tmp_path, url=url).run
    assert stages.kv_room(run.manifest, opening.spec_of(run)) is None
    ours = job.SignOff(plan, tmp_path).run
    assert stages.kv_room(ours.manifest, opening.spec_of(ours)).room_bytes > 0


def test_a_plan_in_a_manifest_of_another_harness_is_refused_in_words(plan, tmp_path):
    run = job.SignOff(plan, tmp_path).run
    run.update_manifest(plan={**run.manifest.plan, "horizon": 3})
    with pytest.raises(InputError, match="manifest.json holds a plan that this harness cannot read"):
        opening.spec_of(run)


def test_an_invalid_trial_is_measured_once_more_and_no_oftener(plan, tmp_path, fakes):
    fakes.valid = False
    work = job.SignOff(plan, tmp_path)
    work.execute(ladders_only=True)
    assert len(work.run.trials()) == len(set(fakes.measured)) == 3 * TRIES
    job.SignOff(plan, tmp_path).execute(ladders_only=True)
    assert len(fakes.measured) == 3 * TRIES


def test_a_report_that_a_kill_kept_from_being_written_is_written_at_the_next_start(plan, tmp_path, fakes):
    work = job.SignOff(plan, tmp_path)
    content = work.execute()
    (work.run.path / "signoff.html").unlink()
    assert job.SignOff(plan, tmp_path).execute().verdict == content.verdict
    assert (work.run.path / "signoff.html").exists()


def test_whoever_is_best_is_measured_three_times_before_the_open_runs(plan, tmp_path, fakes, fitted):
    fitted(best_of=lambda looks: min(looks, 1))
    work = job.SignOff(plan, tmp_path)
    work.execute()
    loads = [(trial.kind, trial.load.seed > 1000, trial.deployment) for trial in work.run.trials()[3:]]
    first, second = (trial.deployment for trial in work.run.trials()[:2])
    assert loads == [
        ("ladder", True, first),  # the best of the first ladders
        ("ladder", True, second),  # its second ladder was lower than the first one of this
        ("ladder", True, second),
        ("open", False, second),
    ]
    before = len(fakes.measured)
    job.SignOff(plan, tmp_path).execute()
    assert len(fakes.measured) == before


@pytest.mark.parametrize(("needed", "kinds"), [(1, "LLO"), (2, "LLO"), (3, "LL")])
def test_where_too_little_was_measured_for_any_rate_one_point_is_measured_again(
    plan, tmp_path, fakes, fitted, monkeypatch, needed, kinds
):
    """As beside other load: a start ended after 2.7 of 9.5 minutes, one request short of its percentile."""

    def in_pace(log):
        ladders = [trial for trial in log.run.trials() if trial.kind == "ladder"]
        return [(SimpleNamespace(frames_per_s=float(place % 3)), trial) for place, trial in enumerate(ladders[:3])]

    fitted(best_of=lambda looks: 2 if looks >= needed else None, rate_of=lambda looks: 1.0 if looks >= needed else None)
    monkeypatch.setattr(campaign.TrialLog, "in_pace", in_pace)
    work = job.SignOff(plan, tmp_path)
    work.execute()
    further = work.run.trials()[3:]
    assert "".join(trial.kind[0].upper() for trial in further) == kinds
    assert {str(trial.deployment) for trial in further} == {str(work.run.trials()[2].deployment)}
    before = len(fakes.measured)
    job.SignOff(plan, tmp_path).execute()
    assert len(fakes.measured) == before


def test_an_open_run_that_was_foretold_keeps_its_rate_whatever_a_later_fit_says(plan, tmp_path, fakes, fitted):
    fitted(best_of=lambda looks: 0)
    fakes.break_after = 5
    with pytest.raises(KeyboardInterrupt):
        job.SignOff(plan, tmp_path).execute()
    fakes.break_after = None
    fitted(best_of=lambda looks: 0, rate_of=lambda looks: 3.0)
    for _ in range(2):
        work = job.SignOff(plan, tmp_path)
        work.execute()
        (confirmed,) = [trial for trial in work.run.trials() if trial.kind == "open"]
        assert confirmed.load.rate_per_s == 0.5 and confirmed.trial_id in work.run.predictions()


NO_PROFILE = '{"schema": 1}'
WRONG_PROFILES = {"": "cannot be read", "{": "damaged", NO_PROFILE: "it has no 'device', 'preset', ", "[]": "damaged"}


@pytest.mark.parametrize("content", WRONG_PROFILES)
def test_a_profile_of_another_device_is_read_before_anything_is_measured(plan, tmp_path, content):
    plan.write_text(PLAN + "profiles: {H200: h200.json}\n")
    if content:
        (tmp_path / "h200.json").write_text(content)
    with pytest.raises(InputError, match="profiles.H200: .*h200.json") as raised:
        job.SignOff(plan, tmp_path / "results")
    assert WRONG_PROFILES[content] in str(raised.value) and not (tmp_path / "results").exists()


def test_a_run_keeps_the_profiles_that_it_began_with(plan, tmp_path):
    profile = tmp_path / "h200.json"
    shutil.copy(ROOT / "results" / "profiles" / "amd-epyc-tiny.json", profile)
    plan.write_text(PLAN + "profiles: {H200: h200.json}\n")
    run = job.SignOff(plan, tmp_path / "results").run
    content = store.read_profile(profile)
    profile.write_text(profile.read_text().replace("AMD", "XYZ"))
    assert job.SignOff(plan, tmp_path / "results").run.path != run.path
    profile.unlink()
    again = Run.open(run.path)
    assert analysis.terms_of(again.manifest, opening.spec_of(again)).profiles == {"H200": content}


def test_a_plan_can_ask_what_a_gpu_would_carry_that_nobody_profiled(plan, tmp_path):
    shutil.copy(ROOT / "results" / "profiles" / "amd-epyc-tiny.json", tmp_path / "cpu.json")
    plan.write_text(PLAN + "profiles: {twice: {profile: cpu.json, bandwidth_gb_s: 121.4, tflop_s: 0.2074}}\n")
    run = job.SignOff(plan, tmp_path / "results").run
    content = analysis.terms_of(run.manifest, opening.spec_of(run)).profiles["twice"]
    (first, *_) = content.timed(wire.LLM)
    assert content.device == "twice" and "scaled from the profile of AMD EPYC" in content.note
    assert first.ms == pytest.approx(0.29424 / 2, rel=1e-3)  # all of it, as older profiles do not separate it
    plan.write_text(PLAN + "profiles: {twice: {profile: cpu.json, bandwidth_gb_s: 121.4}}\n")
    with pytest.raises(InputError, match="profiles.twice.*both bandwidth_gb_s and tflop_s"):
        job.SignOff(plan, tmp_path / "results")


def test_one_measurement_at_a_time_on_a_host(tmp_path):
    with job.measuring_lock(tmp_path):
        with pytest.raises(ServerError, match="is measuring on this host"), job.measuring_lock(tmp_path):
            pass
    with job.measuring_lock(tmp_path):
        pass


@pytest.fixture
def failing(fakes, monkeypatch):
    """Trials that fail: give it how many, or the point that always does."""
    run = fakes.run

    def arrange(times=0, point=None):
        left = [TrialFailed("the server ended")] * times

        def failed(self, request):
            if left or request.point == point:
                raise left.pop() if left else TrialFailed("no stage loads this")
            return run(self, request)

        monkeypatch.setattr(fakes, "run", failed)

    return arrange


def test_a_failed_trial_is_stored_with_its_reason_and_measured_once_more(plan, tmp_path, fakes, failing):
    failing(times=1)
    work = job.SignOff(plan, tmp_path)
    work.execute(ladders_only=True)
    failed, *measured = work.run.trials()
    assert failed.reasons == ("failed: the server ended",) and not failed.valid and not failed.rungs
    assert [trial.valid for trial in measured] == [True] * 3
    assert failed.deployment == measured[0].deployment and failed.trial_id != measured[0].trial_id


def test_a_point_that_always_fails_is_left_out_with_its_reason(plan, tmp_path, fakes, failing):
    point = job.SignOff(plan, tmp_path).spec.points()[1]
    failing(point=point)
    work = job.SignOff(plan, tmp_path)
    content = work.execute()
    failed = [trial for trial in work.run.trials() if not trial.valid]
    assert [trial.deployment for trial in failed] == [point] * TRIES
    assert content.verdict in OF_VERDICT
    failing()
    assert job.SignOff(plan, tmp_path).execute(ladders_only=True) is None
    assert len(work.run.trials()) == len(failed) + len(fakes.measured)  # nothing is measured twice


def test_when_every_trial_breaks_the_job_stops_and_the_next_start_measures_them(plan, tmp_path, failing):
    failing(times=FAILED_IN_A_ROW)
    with pytest.raises(ServerError, match="4 trials failed in a row; none of them is stored"):
        job.SignOff(plan, tmp_path).execute(ladders_only=True)
    failing()
    work = job.SignOff(plan, tmp_path)
    work.execute(ladders_only=True)
    assert [trial.valid for trial in work.run.trials()] == [True] * 3


def test_a_full_disk_stops_the_job_before_a_trial(plan, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(store, "ROOM_FOR_A_TRIAL", 1 << 60)
    with pytest.raises(StoreError, match="free some and start again"):
        job.SignOff(plan, tmp_path).execute(ladders_only=True)
    assert fakes.measured == []


def test_the_same_plan_leads_to_the_same_run_and_another_to_another(plan, tmp_path):
    first = job.SignOff(plan, tmp_path / "results").run.path
    assert job.SignOff(plan, tmp_path / "results").run.path == first
    plan.write_text(PLAN.replace("seed: 3", "seed: 4"))
    assert job.SignOff(plan, tmp_path / "results").run.path != first


def test_two_jobs_may_not_write_one_run(plan, tmp_path, fakes):
    work = job.SignOff(plan, tmp_path)
    with work.run.lock(), pytest.raises(StoreError, match="is being written by process"):
        job.SignOff(plan, tmp_path).execute()


@pytest.mark.server
@pytest.mark.timeout(600)  # it may wait for another one
def test_a_killed_sign_off_goes_on_and_an_interrupted_one_leaves_nothing(tmp_path, the_only_sign_off):
    """The real thing: SIGKILL during the second trial, Ctrl-C during the third, then the trials that are kept."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN)
    kept = []
    for how, stop_at, code in ((signal.SIGKILL, "ladder 2/3", -9), (signal.SIGINT, "ladder 3/3", 130)):
        process = start_signoff(plan, tmp_path)
        read_until(process, stop_at)
        family = wait_for_locust(process)
        time.sleep(2.0)
        process.send_signal(how)
        assert process.wait(timeout=60) == code
        assert not still_running(family, 60)
        run = Run.open(next(tmp_path.glob("small-*")))
        assert [trial.trial_id for trial in run.trials()][: len(kept)] == kept
        kept = [trial.trial_id for trial in run.trials()]
        if how is signal.SIGINT:
            assert not [path for path in Path("/dev/shm").glob(f"harness_{process.pid}_*")]
            for log in (ROOT / ".harness").glob(f"triton-{process.pid}-*"):  # kept only of a Triton that aborted
                assert "Signal (6)" in log.read_text()  # in gRPC, while it stopped: rare, and not the harness's
                log.unlink()
    assert len(kept) == 2


def start_signoff(plan, results):
    command = [sys.executable, "-u", "-m", "harness", "signoff", str(plan), "--results", str(results)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def wait_for_locust(process, timeout_s=200.0):
    """The processes of the job, once Locust is among them."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        family = psutil.Process(process.pid).children(recursive=True)
        if any(one.name().startswith("python") and "locust" in one.cmdline() for one in family):
            return family
        time.sleep(0.1)
    pytest.fail("Locust never started")


def read_until(process, words):
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"the job ended before {words!r}")


def test_several_servers_share_the_points_and_each_trial_says_where_it_ran(plan, tmp_path, fakes, monkeypatch):
    monkeypatch.setattr(job, "RemoteTriton", lambda url, preset, keep, topologies: FakeServer())
    said = []
    watcher = Watcher()
    watcher.say = said.append
    work = job.SignOff(plan, tmp_path, url="A:8001, B:8001")
    work.execute(watcher, ladders_only=True)
    trials = work.run.trials()
    points = [trial.deployment for trial in trials]
    assert len(points) == 3 and all(point in points for point in work.spec.points())
    assert {trial.target for trial in trials} <= {"A:8001", "B:8001"}
    assert any(" on A:8001 …" in line or " on B:8001 …" in line for line in said)


def test_a_server_that_is_gone_gives_its_point_to_the_others(plan, tmp_path, fakes, monkeypatch):
    run = fakes.run

    class Gone(FakeServer):
        running = False

    def on_b(self, *args, **kw):
        if isinstance(self.server, Gone):
            raise TrialFailed("no answer")
        return run(self, *args, **kw)

    monkeypatch.setattr(fakes, "run", on_b)
    monkeypatch.setattr(
        job, "RemoteTriton", lambda url, preset, keep, topologies: Gone() if url == "B:8001" else FakeServer()
    )
    work = job.SignOff(plan, tmp_path, url="A:8001,B:8001")
    work.execute(ladders_only=True)
    assert {trial.target for trial in work.run.trials()} == {"A:8001"}
    assert [trial.valid for trial in work.run.trials()] == [True] * 3


def test_the_highest_share_is_confirmed_first(plan, tmp_path, fakes, fitted):
    plan.write_text(PLAN.replace("load_share: [0.5]", "load_share: [0.5, 0.9, 0.7]"))
    fitted(best_of=lambda looks: 0)
    work = job.SignOff(plan, tmp_path)
    work.execute()
    assert [trial.load.rate_per_s for trial in work.run.trials() if trial.kind == "open"] == [0.9, 0.7, 0.5]


def test_a_run_keeps_the_demand_that_it_began_with(plan, tmp_path):
    trace = tmp_path / "calls.csv"
    trace.write_text("TIMESTAMP\n" + "\n".join(str(second) for second in range(2000)))
    plan.write_text(PLAN + "demand: {trace: calls.csv, minimum: 2}\n")
    run = job.SignOff(plan, tmp_path / "results").run
    assert run.manifest.demand.mean_qps == pytest.approx(1.0, rel=0.01)
    trace.write_text(trace.read_text() + "\n2500")
    assert job.SignOff(plan, tmp_path / "results").run.path != run.path
    trace.unlink()
    again = Run.open(run.path)
    assert again.manifest.demand == run.manifest.demand and opening.spec_of(again).demand.minimum == 2
    with pytest.raises(InputError, match=r"plan.yaml: demand.trace: .*calls.csv"):
        job.SignOff(plan, tmp_path / "results")


def test_a_run_keeps_the_tasks_that_it_began_with(plan, tmp_path, monkeypatch):
    """Also the lengths that their file takes from another; with both changed it is another run."""
    tasks, lengths = tmp_path / "tasks.yaml", tmp_path / "lengths.csv"
    lengths.write_text("seconds\n30\n60\n")
    tasks.write_text("per_hour: 6\nlength: {empirical: lengths.csv}\nslos: {turnaround_p95: 4x}\n")
    plan.write_text(PLAN + "jobs: tasks.yaml\n")
    work, planned = job.SignOff(plan, tmp_path / "results"), []
    kept = work.run.manifest.jobs
    lengths.write_text("seconds\n30\n90\n")
    other = job.SignOff(plan, tmp_path / "results").run
    assert other.path != work.run.path and other.manifest.jobs != kept
    lengths.unlink()
    tasks.unlink()
    assert Run.open(work.run.path).manifest.jobs == kept
    answer = SimpleNamespace(headline=lambda: SimpleNamespace(qps=0.5))
    monkeypatch.setattr(analysis, "shared_plan_of", lambda run, demand, qps: planned.append(demand))
    monkeypatch.setattr(analysis, "jobs_plan", lambda *_: None)
    analysis.jobs_of(Run.open(work.run.path), work.spec, answer)
    assert planned[0].lengths.frames.tolist() == [225, 450]
