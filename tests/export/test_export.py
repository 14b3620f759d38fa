"""``harness export``: a signed plan becomes an overlay and rules, the same each time, or is refused in a sentence."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import yaml
from exports import BEFORE_EXPIRY, ROOT, SAMPLE, SIGNED, planned_fleet

from harness import wire
from harness.cli import main, measuring
from harness.clock import HOST
from harness.deploy.config import Deployment
from harness.deploy.container_settings import ContainerSettings
from harness.deploy.flags import shared_memory_needed
from harness.errors import InputError, ServerError
from harness.exit_codes import USAGE
from harness.export import folder as exported
from harness.export.fleet import _STUDIO as STUDIO
from harness.export.fleet import EXIT_S, SETTLE_S, Accepted, fleet_of
from harness.export.fleet import _device as device_of
from harness.export.folder import write_folder
from harness.export.kubernetes import Monitoring, autoscaler, overlay_files, record_of, scaled_object
from harness.export.prometheus import plan_rules
from harness.export.store import copy_run
from harness.identity import CPU, EMULATED, GPU, StageIdentity
from harness.records.day import REACTIVE, Day, FleetDay, ScalingRule, ScheduledMinimum
from harness.records.schema import StageRecord
from harness.records.store import Run
from harness.service.segments import request_of
from harness.service.task import TaskSpec


@pytest.fixture(scope="module")
def fleet():
    return planned_fleet()


@pytest.fixture
def copied(tmp_path):
    """A run that may be changed."""
    return Path(shutil.copytree(SAMPLE, tmp_path / "run"))


def changed_plan(run: Path, **changes) -> None:
    path = run / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def export(monkeypatch, capsys):
    """``export(*arguments)``: exit code and output of the command."""

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(main.sys, "argv", ["harness", "export", *map(str, arguments)])
        monkeypatch.setattr(main.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            main.main()
        return ended.value.code or 0, "".join(capsys.readouterr())

    return call


def test_a_fleet_has_the_figures_of_the_signed_plan(fleet):
    plan = Run.open(SAMPLE).plan()
    target = next(each for each in plan.targets if each.qps == 5)
    assert (fleet.devices, fleet.replicas) == (target.devices, target.devices_n_plus_1)
    assert fleet.spare == target.devices_n_plus_1 - target.devices
    assert fleet.sessions == plan.drain.sessions and fleet.sessions_p95 == target.sessions_per_device_p95
    assert fleet.grace_s >= max(plan.drain.p95_s, plan.drain.longest_s) + SETTLE_S + EXIT_S
    assert fleet.server_knobs == plan.deployment and fleet.remarks == ()
    assert datetime.fromtimestamp(fleet.expires_unix_s, UTC).isoformat() == fleet.expires_at


@pytest.mark.parametrize(
    ("kinds", "gpus", "named", "device"),
    [
        (("GPU", "GPU"), ("NVIDIA L40S", "NVIDIA L40S"), "the Triton at gpu7:8001", "NVIDIA L40S"),
        (("GPU", "GPU"), ("NVIDIA L40S", "NVIDIA L4"), "the Triton at gpu7:8001", "the Triton at gpu7:8001"),
        (("CPU", "CPU"), ("", ""), "the Triton at gpu7:8001", "cpu"),
        (("EMULATED",), ("",), "emulated NVIDIA L40S", "emulated NVIDIA L40S"),
        ((), (), "cpu", "cpu"),
    ],
)
def test_a_device_is_what_the_stages_reported(kinds, gpus, named, device):
    """Of a server that was named by --url the plan knows no more than its address."""
    known = {"CPU": CPU, "GPU": GPU, "EMULATED": EMULATED}
    identities = [StageIdentity(wire.LLM, "0", known[kind], "", gpu) for kind, gpu in zip(kinds, gpus, strict=True)]
    stages = [StageRecord("a", wire.STAGED, each) for each in identities]
    run = SimpleNamespace(manifest=SimpleNamespace(stages=stages))
    assert device_of(run, SimpleNamespace(device=named)) == device


def test_the_overlay_has_the_figures_of_the_fleet(fleet):
    files = overlay_files(fleet, Monitoring())
    deployment, budget = (yaml.safe_load(files[f"shared/{name}.yaml"]) for name in ("triton", "budget"))
    counted = yaml.safe_load(files["static/kustomization.yaml"])["replicas"]
    assert counted == [{"name": "triton", "count": fleet.replicas}]
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == fleet.grace_s
    assert budget["spec"]["maxUnavailable"] == fleet.spare
    most = deployment["spec"]["strategy"]["rollingUpdate"]
    assert most == {"maxSurge": 0, "maxUnavailable": fleet.spare}  # N+1 GPUs have no room for another server
    assert deployment["spec"]["progressDeadlineSeconds"] > fleet.grace_s
    lines = files["shared/triton.env"].splitlines()
    environment = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert json.loads(environment["HARNESS_DEPLOY_KNOBS"]) == dict(fleet.server_knobs)
    assert environment["HARNESS_DEPLOY_PRESET"] == "tiny" and environment["HARNESS_DEPLOY_DEVICE"] == "cpu"
    kustomization = yaml.safe_load(files["shared/kustomization.yaml"])
    studio = next(each for each in kustomization["configMapGenerator"] if each["name"] == "studio")
    assert studio["literals"] == [f"HARNESS_STUDIO_SESSIONS={int(fleet.sessions * fleet.devices)}"]


def test_the_overlay_stands_by_itself(fleet):
    """Every file that a kustomization names is in the export."""
    files = overlay_files(fleet, Monitoring())
    folders = {name.rpartition("/")[0] for name in files}
    for name, text in files.items():
        if name.endswith("kustomization.yaml"):
            content, here = yaml.safe_load(text), name.rpartition("/")[0]
            named = [*content.get("resources", ()), *content.get("components", ())]
            named += [each["path"] for each in content.get("patches", ()) if "path" in each]
            for each in content.get("configMapGenerator", ()):
                named += [*each.get("envs", ()), *each.get("files", ())]
            for path in named:
                inside = path.removeprefix("../") if path.startswith("../") else f"{here}/{path}"
                assert inside in files or inside in folders, (name, path)


def test_only_the_static_overlay_has_a_number_of_servers(fleet):
    """An applied number that is taken away later makes Kubernetes scale to one, which ends the others."""
    files = overlay_files(fleet, Monitoring())
    assert [name for name, text in files.items() if name.endswith(".yaml") and "/triton" in name] == [
        "base/triton.yaml", "shared/triton.yaml",
    ]  # fmt: skip
    written = [each for name in ("base", "shared") for each in yaml.safe_load_all(files[f"{name}/triton.yaml"])]
    assert not any("replicas" in each.get("spec", {}) for each in written)
    for name in ("keda", "hpa", "shared"):
        content = yaml.safe_load(files[f"{name}/kustomization.yaml"])
        assert "replicas" not in content
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    assert "kubectl.kubernetes.io/last-applied-configuration-" in page


def test_rules_are_for_the_namespace_of_prometheus(fleet):
    """No pod mounts a ConfigMap of another namespace; and an overlay sets its namespace on all that it includes."""
    files = overlay_files(fleet, Monitoring())
    for folder, least in (("rules-static", fleet.devices), ("rules-elastic", fleet.scaling.minimum)):
        content = yaml.safe_load(files[f"{folder}/kustomization.yaml"])
        (config,) = content["configMapGenerator"]
        assert content["namespace"] == "monitoring" and config["options"]["disableNameSuffixHash"] is True
        assert set(config["files"]) == {"plan.yml", "alerts.yml", "recording.yml"}
        groups = yaml.safe_load(files[f"{folder}/plan.yml"])["groups"]
        said = {each.get("record"): each["expr"] for group in groups for each in group["rules"]}
        assert said["vibevoice_plan:devices_least"] == f"vector({least})"
    assert "speech-rules" not in "".join(files[f"{name}/kustomization.yaml"] for name in ("static", "keda", "hpa"))


def test_both_autoscalers_have_the_rule_of_the_plan(fleet):
    keda, plain = scaled_object(fleet, Monitoring("http://p", 'job="triton"'))["spec"], autoscaler(fleet)["spec"]
    trigger = keda["triggers"][0]
    assert float(trigger["metadata"]["threshold"]) == fleet.sessions == 11
    assert plain["metrics"][0]["external"]["target"] == {"type": "AverageValue", "averageValue": "11"}
    assert trigger["metricType"] == "AverageValue" and trigger["metadata"]["serverAddress"] == "http://p"
    assert trigger["metadata"]["query"] == (
        'sum(vibevoice_sessions{job="triton"}) + sum(vibevoice_queue_length{job="triton"})'
    )
    assert keda["minReplicaCount"] == plain["minReplicas"] == 1 + fleet.spare
    assert keda["maxReplicaCount"] == plain["maxReplicas"] == keda["fallback"]["replicas"] == fleet.replicas
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == plain["behavior"]
    assert plain["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
    assert (
        autoscaler(replace(fleet, sessions=2.5))["spec"]["metrics"][0]["external"]["target"]["averageValue"] == "2500m"
    )


SCHEDULE = tuple(ScheduledMinimum(at_s=at_s, devices=devices) for at_s, devices in ((0, 1), (23400, 3), (79200, 2)))
RULE = ScalingRule(target_sessions_per_device=9.25, maximum=8, stabilisation_s=600.0, schedule=SCHEDULE)


def test_the_rule_that_was_simulated_over_a_day_is_the_rule_that_is_exported(fleet):
    """Its schedule becomes cron triggers: spans that wish for more than the minimum, the last one over midnight."""
    daily = replace(fleet, simulated_rule=RULE)
    spec = scaled_object(daily, Monitoring())["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"], spec["pollingInterval"]) == (1, 8, 30)
    first, *others = spec["triggers"]
    assert first["metadata"]["threshold"] == "9.25" and [each["type"] for each in others] == ["cron", "cron"]
    spans = [tuple(each["metadata"][name] for name in ("start", "end", "desiredReplicas")) for each in others]
    assert spans == [("30 6 * * *", "0 22 * * *", "3"), ("0 22 * * *", "0 0 * * *", "2")]
    plain = autoscaler(daily)["spec"]
    assert (plain["minReplicas"], plain["maxReplicas"]) == (1, 8)
    assert plain["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 600
    with pytest.raises(InputError, match="only one of a day"):
        scaled_object(replace(fleet, simulated_rule=replace(RULE, period_s=3600.0)), Monitoring())


def test_an_overlay_that_cannot_hold_the_rule_is_left_out_alone(fleet):
    def of(rule):
        rule_of = replace(fleet, simulated_rule=rule)
        files = overlay_files(rule_of, Monitoring())
        return {name.partition("/")[0] for name in files} - {"base", "gateway", "shared"}, record_of(rule_of)["notes"]

    everything, daily, odd = of(replace(RULE, schedule=())), of(RULE), of(replace(RULE, period_s=3600.0))
    assert everything == ({"static", "keda", "hpa", "rules-static", "rules-elastic"}, [])
    assert daily[0] == {"static", "keda", "rules-static", "rules-elastic"}
    assert daily[1][0].startswith("no overlay hpa") and "start of the plan's demand at 00:00 UTC" in daily[1][1]
    assert odd[0] == {"static", "rules-static"} and "repeats every 3600 s" in odd[1][1]
    about = scaled_object(replace(fleet, simulated_rule=RULE), Monitoring())["metadata"]["annotations"]
    assert about == {"speech/schedule-starts": "00:00 UTC"}


@pytest.mark.parametrize("rows", [((0, 4),), ((0, 4), (40_000, 4)), ((0, 2), (20, 4))])
def test_a_schedule_that_never_changes_is_a_minimum(fleet, rows):
    """Cron cannot say a span that ends when it starts."""
    schedule = tuple(ScheduledMinimum(at_s=at_s, devices=devices) for at_s, devices in rows)
    spec = scaled_object(replace(fleet, simulated_rule=replace(RULE, schedule=schedule)), Monitoring())["spec"]
    assert spec["minReplicaCount"] == 4 and len(spec["triggers"]) == 1


def test_a_window_is_one_that_kubernetes_takes(fleet):
    long = replace(fleet, simulated_rule=replace(RULE, schedule=(), stabilisation_s=7200.0))
    assert autoscaler(long)["spec"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 3600
    assert "3600 s at most, and the plan simulated 7200 s" in record_of(long)["notes"][0]


@pytest.mark.parametrize(("peak_qps", "rule"), [(5.0, RULE), (4.0, RULE), (20.0, None)])
def test_the_rule_of_a_day_is_that_of_a_fleet_for_its_peak(copied, peak_qps, rule):
    elastic = FleetDay(
        policy=REACTIVE, rule=RULE, devices=(2.0,), most_devices=3, device_hours=40, within_slos=1.0, worst_part=1.0,
        rejected=0.0, slos=(), met=True, basis="simulated",
    )  # fmt: skip
    day = Day(source="a curve", period_s=86400, window_s=1800, peak_qps=peak_qps, mean_qps=2, policies=(elastic,))
    run = Run.open(copied)
    run.write_plan(replace(run.plan(), day=day))
    assert fleet_of(copied, 5, Accepted(force=True), BEFORE_EXPIRY).simulated_rule == rule


@pytest.mark.parametrize(
    ("device", "gpus", "selector", "limit"),
    [
        ("NVIDIA H100 80GB HBM3", 1, {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}, "1"),
        ("emulated NVIDIA L40S", 4, {"nvidia.com/gpu.product": "NVIDIA-L40S"}, "4"),
        ("the Triton at gpu7:8001", 1, None, "1"),
        ("cpu", 1, None, None),
    ],
)
def test_a_server_gets_the_device_of_the_plan(fleet, device, gpus, selector, limit):
    files = overlay_files(replace(fleet, device=device, gpus=gpus), Monitoring())
    pod = yaml.safe_load(files["shared/triton.yaml"])["spec"]["template"]["spec"]
    assert pod.get("nodeSelector") == selector
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == limit  # None takes it away
    assert f"HARNESS_DEPLOY_DEVICE={'cpu' if device == 'cpu' else 'gpu'}\n" in files["shared/triton.env"]


def test_a_server_of_eight_gpus_gets_cores_memory_and_shared_memory_for_eight(fleet):
    """One of one GPU gets what the base has; shared memory is that of the stages' processes."""
    eight = replace(fleet, device="NVIDIA L40S", preset="1.5b", gpus=8, parameters={}, dtype="auto")
    found = {}
    for which in (
        replace(eight, gpus=1),
        eight,
        replace(eight, knobs={**fleet.knobs, "diffusion_decoder.instances": 9}),
    ):
        pod = yaml.safe_load(overlay_files(which, Monitoring())["shared/triton.yaml"])["spec"]["template"]["spec"]
        (volume,), resources = pod["volumes"], pod["containers"][0]["resources"]
        size = int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        found[len(found)] = (size, resources["requests"], resources["limits"]["memory"])
        deployment = Deployment("1.5b", knobs=which.server_knobs, gpus=which.gpus, device=GPU)
        assert size * 2**30 > shared_memory_needed(deployment.configs(), which.gpus) and volume["name"] == "shm"
    assert found[0] == (1, {"cpu": "6", "memory": "32Gi"}, "48Gi") and found[1][1] == {"cpu": "48", "memory": "256Gi"}
    assert found[2][0] > found[1][0] and int(found[2][2].removesuffix("Gi")) > int(found[1][2].removesuffix("Gi"))


@pytest.mark.parametrize(("routing", "policy"), [("round_robin", "ROUND_ROBIN"), ("random", "RANDOM")])
def test_the_gateway_routes_as_the_plan_does(fleet, routing, policy):
    def cluster(which):
        return yaml.safe_load(overlay_files(which, Monitoring())["gateway/envoy.yaml"])["static_resources"]["clusters"][
            0
        ]

    assert cluster(fleet)["lb_policy"] == "LEAST_REQUEST" and cluster(fleet)["ignore_health_on_host_removal"] is True
    other = cluster(replace(fleet, routing=routing))
    assert other["lb_policy"] == policy and "least_request_lb_config" not in other


def test_the_same_run_gives_the_same_files(fleet):
    assert overlay_files(fleet, Monitoring()) == overlay_files(
        fleet_of(SAMPLE, 5.0, SIGNED, BEFORE_EXPIRY), Monitoring()
    )


def test_a_rate_that_was_not_planned_is_refused():
    with pytest.raises(InputError, match="planned for 0.5, 1, 5, 20 requests/s, not for 3"):
        fleet_of(SAMPLE, 3, SIGNED, BEFORE_EXPIRY)


def test_an_expired_plan_is_refused_unless_forced():
    late = datetime(2030, 1, 1, tzinfo=UTC)
    with pytest.raises(InputError, match="expired at .*; or export it anyway with --force"):
        fleet_of(SAMPLE, 5, SIGNED, late)
    (remark,) = fleet_of(SAMPLE, 5, Accepted(force=True), late).remarks
    assert "expired" in remark


def test_a_plan_that_was_changed_is_refused_unless_forced(copied):
    changed_plan(copied, unit="another")
    with pytest.raises(InputError, match="plan.json was changed"):
        fleet_of(copied, 5, SIGNED, BEFORE_EXPIRY)
    assert fleet_of(copied, 5, Accepted(force=True), BEFORE_EXPIRY).remarks


def test_a_plan_that_is_not_signed_is_refused_unless_forced(copied):
    (copied / "signoff.json").unlink()
    with pytest.raises(InputError, match="signoff.json"):
        fleet_of(copied, 5, SIGNED, BEFORE_EXPIRY)
    assert fleet_of(copied, 5, Accepted(force=True), BEFORE_EXPIRY).seal_sha256 == ""


def test_an_inconclusive_plan_needs_a_word_of_its_own(copied):
    changed_plan(copied, verdict="inconclusive", reasons=["The ladder is noisy."])
    with pytest.raises(InputError, match="inconclusive: The ladder is noisy; or export it anyway with --accept"):
        fleet_of(copied, 5, Accepted(force=True), BEFORE_EXPIRY)
    taken = fleet_of(copied, 5, Accepted(force=True, inconclusive=True), BEFORE_EXPIRY)
    assert taken.verdict == "inconclusive" and "# Exported although: its verdict is inconclusive" in plan_rules(taken)
    about = yaml.safe_load(overlay_files(taken, Monitoring())["shared/triton.yaml"])["metadata"]["annotations"]
    assert "inconclusive" in about["speech/exported-although"]


def test_a_plan_of_other_requests_than_the_studio_sends_needs_a_word(copied):
    """Half the denoising steps are half the work: the studio does not ask for them by itself."""
    knobs = json.loads((copied / "plan.json").read_text())["deployment"]
    changed_plan(copied, deployment={**knobs, "diffusion_steps": 5, "chunk_frames": 1})
    with pytest.raises(
        InputError, match="of requests with diffusion_steps 5, which the studio sends with 10.*--accept"
    ):
        fleet_of(copied, 5, Accepted(force=True), BEFORE_EXPIRY)
    taken = fleet_of(copied, 5, Accepted(force=True, inconclusive=True), BEFORE_EXPIRY)
    about = yaml.safe_load(overlay_files(taken, Monitoring())["shared/triton.yaml"])["metadata"]["annotations"]
    assert (about["speech/diffusion-steps"], about["speech/chunk-frames"]) == ("5", "1")
    assert "diffusion_steps 5" in about["speech/exported-although"] and taken.server_knobs == knobs


def test_what_the_studio_asks_for_is_what_an_export_takes_it_to_ask_for():
    task = TaskSpec(script="Speaker 1: Hello.", voices=(1,), frames=1, estimate=1)
    request = request_of("a", "task", task, 1)
    assert {name: getattr(request, name) for name in STUDIO} == STUDIO


def test_a_plan_without_a_count_is_refused_whatever_is_accepted(copied):
    content = json.loads((copied / "plan.json").read_text())
    changed_plan(copied, targets=[{**each, "devices": None} for each in content["targets"]])
    with pytest.raises(InputError, match="no count of devices"):
        fleet_of(copied, 5, Accepted(force=True, inconclusive=True), BEFORE_EXPIRY)


def test_an_export_is_never_half_written(tmp_path, fleet, monkeypatch):
    files, out = overlay_files(fleet, Monitoring()), tmp_path / "fleet"
    write_folder(out, files, record_of(fleet))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(before) == len(files) + 1
    write = Path.write_text

    def full(path, text, *more, **named):
        if path.name == "budget.yaml":
            raise OSError(28, "No space left on device")
        return write(path, text, *more, **named)

    monkeypatch.setattr(exported.Path, "write_text", full)
    for target, replace_it in ((tmp_path / "new", False), (out, True)):
        with pytest.raises(InputError, match="No space left"):
            write_folder(target, files, record_of(fleet), replace=replace_it)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["fleet"]


def test_a_folder_that_is_not_an_export_is_left_alone(tmp_path, fleet):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="not empty, and no export"):
        write_folder(tmp_path / "mine", {"a": "b"}, {}, replace=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"
    write_folder(tmp_path / "one", {"a": "b"}, {})
    with pytest.raises(InputError, match="--replace"):
        write_folder(tmp_path / "one", {"a": "c"}, {})
    write_folder(tmp_path / "one", {"b": "c"}, {}, replace=True)
    assert sorted(each.name for each in (tmp_path / "one").iterdir()) == ["b", "export.json"]


@pytest.mark.parametrize("name", ["mine/kustomization.yaml", "b", "link", ".env"])
def test_replacing_an_export_loses_nothing_that_a_user_wrote(tmp_path, name):
    out = tmp_path / "one"
    write_folder(out, {"b": "c", "sub/d": "e"}, {})
    (out / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (out / name).symlink_to(tmp_path)
    else:
        (out / name).write_text("my registry")
    with pytest.raises(InputError, match=f"holds {name}.*, which .* --replace would lose it"):
        write_folder(out, {"b": "f"}, {}, replace=True)
    assert (out / name).exists() and (out / "sub" / "d").read_text() == "e"
    (out / "export.json").write_text('{"schema": 1}')  # of an earlier version
    with pytest.raises(InputError, match="does not say what it wrote"):
        write_folder(out, {"b": "f"}, {}, replace=True)


def test_the_command_writes_both_and_says_what(tmp_path, export):
    code, said = export("kubernetes", "--run", SAMPLE, "--qps", 5, "--out", tmp_path / "fleet", "--force")
    assert code == 0 and "5 requests/s: 3 servers, 1 of them spare" in said and "kubectl apply -k" in said
    code, said = export("prometheus", "--run", SAMPLE, "--qps", 5, "--out", tmp_path / "rules", "--force")
    assert code == 0 and (tmp_path / "rules" / "plan.yml").is_file()
    record = json.loads((tmp_path / "rules" / "export.json").read_text())
    assert record["run_id"] == Run.open(SAMPLE).manifest.run_id and record["replicas"] == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("helm", "--run", SAMPLE, "--qps", 5), "'helm' cannot be exported: use one of kubernetes, prometheus"),
        (("kubernetes", "--run", SAMPLE, "--qps", 3), "planned for 0.5, 1, 5, 20"),
        (("kubernetes", "--run", ROOT / "results" / "none", "--qps", 5), "holds no manifest.json"),
        (("kubernetes", "--run", SAMPLE, "--qps", 0), "above 0"),
        (
            ("kubernetes", "--run", SAMPLE, "--qps", 5, "--prometheus", "prometheus:9090"),
            "write it as http://HOST:PORT",
        ),
        (("prometheus", "--run", SAMPLE, "--qps", 5, "--selector", "job='a'"), "write label matchers"),
        (("prometheus", "--run", SAMPLE, "--qps", 5, "--out", SAMPLE / "fleet"), "give a folder elsewhere"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, export, arguments, sentence):
    code, said = export(*arguments, *(() if "--out" in arguments else ("--out", tmp_path / "out")))
    assert code == USAGE and sentence in said and "Traceback" not in said and not (tmp_path / "out").exists()


def test_a_run_is_stored_with_its_seal_last(tmp_path, monkeypatch):
    stored = tmp_path / "bucket"
    order = []
    kind = type(fsspec.filesystem("file"))
    put = kind.put_file
    monkeypatch.setattr(kind, "put_file", lambda self, one, *more, **n: order.append(one) or put(self, one, *more, **n))
    where = copy_run(SAMPLE, str(stored))
    assert where == f"{stored}/sample-quick" and Path(order[-1]).name == "signoff.json"
    ours = {path.relative_to(SAMPLE) for path in SAMPLE.rglob("*") if path.is_file()}
    assert {path.relative_to(where) for path in Path(where).rglob("*") if path.is_file()} == ours
    assert fleet_of(Path(where), 5, SIGNED, BEFORE_EXPIRY).replicas == 3  # it verifies there, too


def test_a_storage_that_fails_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--store nothing://x cannot be used"):
        copy_run(SAMPLE, "nothing://x")

    def refuse(*_, **__):
        raise PermissionError("the bucket is read-only")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "put_file", refuse)
    with pytest.raises(ServerError, match="read-only.*copy it"):
        copy_run(SAMPLE, str(tmp_path))


def test_a_sign_off_copies_its_run_and_refuses_a_storage_before_it_measures(tmp_path, monkeypatch, capsys):
    measuring._conclude(Run.open(SAMPLE), None, str(tmp_path / "bucket"))
    assert f"Stored: {tmp_path / 'bucket' / 'sample-quick'}" in capsys.readouterr().out
    assert (tmp_path / "bucket" / "sample-quick" / "signoff.html").is_file()
    monkeypatch.setattr(main.sys, "argv", ["harness", "signoff", "quick", "--store", "nothing://x"])
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == USAGE and "--store nothing://x cannot be used" in capsys.readouterr().err


def test_the_export_of_an_emulated_run_deploys_real_devices():
    """What was emulated, and how, stays in the run's records."""
    run = Run.open(ROOT / "results" / "sample-h100")
    assert run.manifest.emulated and run.manifest.clock != HOST and run.manifest.plan["emulate"]
    files = overlay_files(fleet_of(run.path, 5, Accepted(force=True, inconclusive=True)), Monitoring())
    lines = [line.split("=", 1) for line in files["shared/triton.env"].splitlines() if not line.startswith("#")]
    deployed = ContainerSettings.from_environment({**dict(lines), "HARNESS_DEPLOY_ADDRESS": "127.0.0.1"}).deployment()
    assert (deployed.emulate, deployed.clock, deployed.device) == ("", HOST, GPU)
    assert not any(run.manifest.plan["emulate"] in text for text in files.values())
