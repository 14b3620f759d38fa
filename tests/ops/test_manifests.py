"""Manifests of ``ops/kubernetes``: each overlay renders, each object has its schema, and all names lead somewhere."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from harness import exit_codes
from harness.planfile.reading import load_plan

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "ops"))

import check_manifests as checker  # noqa: E402
import manifest_rules as rules  # noqa: E402

from harness.export.kubernetes import GOAWAY_S  # noqa: E402

KUBERNETES = ROOT / "ops" / "kubernetes"
needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl, which renders overlays, is not here")


def written(*folders: str) -> list[dict]:
    """The objects of folders as they are written, with the configurations that their kustomizations generate."""
    found = []
    for folder in folders:
        for path in sorted((KUBERNETES / folder).glob("*.yaml")):
            for each in yaml.safe_load_all(path.read_text()):
                if path.name == "kustomization.yaml":
                    found += [_generated(one) for one in each.get("configMapGenerator", ())]
                elif each and "kind" in each:
                    found.append(each)
    return [{**each, "metadata": {**each["metadata"], "namespace": "speech"}} for each in found]


def _generated(generator: dict) -> dict:
    named = [*generator.get("literals", ()), *(f"{name}=" for name in generator.get("files", ()))]
    keys = {each.partition("=")[0]: "" for each in named}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": keys}


def everything() -> list[dict]:
    return written("base", "components/gateway", "components/load", "components/signoff")


@pytest.fixture(scope="module")
def checked():
    return checker.check()


@needs_kubectl
def test_every_overlay_renders_and_is_valid(checked):
    assert checked["failures"] == []
    exported = {f"export, {name}" for name in ("static", "keda", "hpa", "rules-static", "rules-elastic")}
    assert checked["overlays"].keys() == {"fleet", "one-gpu"} | exported
    assert checked["objects"] > 130


@pytest.mark.parametrize("failures", [0, 2])
def test_the_script_prints_a_table_and_json(monkeypatch, capsys, failures):
    overlays = {"fleet": {"objects": 36, "failures": failures}}
    found = {"objects": 36, "failures": ["fleet: Job a: b"] * failures, "overlays": overlays}
    monkeypatch.setattr(checker, "check", lambda: found)
    monkeypatch.setattr(sys, "argv", ["check_manifests.py"])
    assert checker.main() == bool(failures)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["fleet", "36", str(failures)] and len(said) == 3 + failures
    assert json.loads(said[-1]) == {"objects": 36, "failures": failures}


def test_it_can_be_loaded_by_its_path():
    """As `make ops-check` does."""
    spec = importlib.util.spec_from_file_location("loaded_by_path", ROOT / "ops" / "check_manifests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.check)


def test_without_kubectl_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(checker.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["check_manifests.py"])
    assert checker.main() == 2 and "kubectl is not installed" in capsys.readouterr().err


def test_written_objects_refer_to_what_is_there_and_are_safe():
    """Without kubectl, too: what is written, before overlays change it."""
    objects = everything()
    assert len(objects) > 30
    assert list(rules.broken_references(objects)) == [] and list(rules.unsafe(objects)) == []
    assert [each["kind"] for each in objects if checker.schema_problem(each)] == []


def container(objects, workload="triton"):
    deployment = next(
        each for each in objects if each["kind"] == "Deployment" and rules.name_of(each).endswith(workload)
    )
    return deployment["spec"]["template"]["spec"]["containers"][0]


def pod(objects, workload="triton"):
    deployment = next(
        each for each in objects if each["kind"] == "Deployment" and rules.name_of(each).endswith(workload)
    )
    return deployment["spec"]["template"]["spec"]


def of_kind(objects, kind, name="triton"):
    return next(each for each in objects if (each["kind"], each["metadata"]["name"]) == (kind, name))


FAULTS = {
    "no configuration speech": lambda o: container(o)["envFrom"][0]["configMapRef"].update(name="speech"),
    "no secret speech-keys": lambda o: pod(o)["volumes"][3]["secret"].update(secretName="speech-keys"),
    "secret speech-redis has no uri": lambda o: container(o, "front")["env"][0]["valueFrom"]["secretKeyRef"].update(
        key="uri"
    ),
    "no volume cache": lambda o: container(o)["volumeMounts"].append({"name": "cache", "mountPath": "/cache"}),
    "its readinessProbe asks port 8003": lambda o: container(o)["readinessProbe"]["grpc"].update(port=8003),
    "no pod has its port web": lambda o: of_kind(o, "Service", "front")["spec"]["ports"][0].update(targetPort="web"),
    "it selects no pod": lambda o: of_kind(o, "PodDisruptionBudget")["spec"]["selector"].update(matchLabels={"a": "b"}),
    "no pod matches": lambda o: of_kind(o, "NetworkPolicy")["spec"]["podSelector"].update(matchLabels={"a": "b"}),
    "no account root": lambda o: pod(o).update(serviceAccountName="root"),
    "no claim other": lambda o: o[-1] and _claim(o).update(claimName="other"),
    "it may run as root": lambda o: pod(o)["securityContext"].update(runAsNonRoot=False),
    "it gets a token": lambda o: pod(o).pop("automountServiceAccountToken"),
    "names of services become": lambda o: pod(o).pop("enableServiceLinks"),
    "it may gain privileges": lambda o: container(o)["securityContext"].pop("allowPrivilegeEscalation"),
    "it has capabilities": lambda o: container(o)["securityContext"].update(capabilities={"drop": []}),
    "it may write to its image": lambda o: container(o)["securityContext"].pop("readOnlyRootFilesystem"),
    "it does not say what it needs": lambda o: container(o)["resources"].pop("requests"),
    "has no version": lambda o: container(o).update(image="speech/triton:latest"),
    "hostNetwork is that of the host": lambda o: pod(o).update(hostNetwork=True),
    "it does not select its own pods": lambda o: of_kind(o, "Deployment")["spec"]["selector"].update(
        matchLabels={"a": "b"}
    ),
    "it has no namespace": lambda o: of_kind(o, "Service")["metadata"].pop("namespace"),
}


def _claim(objects):
    volumes = of_kind(objects, "Job", "signoff")["spec"]["template"]["spec"]["volumes"]
    return next(each["persistentVolumeClaim"] for each in volumes if "persistentVolumeClaim" in each)


@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_found(said):
    objects = copy.deepcopy(everything())
    FAULTS[said](objects)
    problems = [*rules.broken_references(objects), *rules.unsafe(objects)]
    assert any(said in each for each in problems), problems


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one["spec"].update(replica=3), "replica"),
        (lambda one: one["spec"].update(replicas="three"), "three"),
        (lambda one: one["spec"]["template"]["spec"]["containers"][0].update(livenessprobe={}), "livenessprobe"),
    ],
)
def test_a_field_that_kubernetes_does_not_know_is_found(change, said):
    one = copy.deepcopy(of_kind(everything(), "Deployment"))
    change(one)
    assert said in checker.schema_problem(one)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: spec.update(maxReplicas=3), "maxReplicas"),
        (lambda spec: spec["triggers"][0]["metadata"].update(threshold=11), "threshold"),
        (lambda spec: spec["triggers"][0]["metadata"].pop("query"), "spec.triggers.0.metadata"),
    ],
)
def test_a_field_that_keda_does_not_know_is_found(change, said):
    metadata = {"serverAddress": "http://p", "query": "sum(a)", "threshold": "11", "ignoreNullValues": "false"}
    spec = {"scaleTargetRef": {"name": "triton"}, "triggers": [{"type": "prometheus", "metadata": metadata}]}
    change(spec)
    one = {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "a"}, "spec": spec}
    assert said in checker.schema_problem(one)


def test_every_documented_secret_is_used_and_made():
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    text = "".join(path.read_text() for path in KUBERNETES.rglob("*.yaml"))
    for name, keys in rules.SECRETS.items():
        assert name in text and f"create secret generic {name} " in page
        assert all(f"--from-literal={key}=" in page or f"--from-file={key}=" in page for key in keys), name


def test_the_job_signs_off_a_plan_that_can_be_read():
    """Of the GPU that its server gets, and of the topology that the server has: a running one cannot change it."""
    spec = load_plan(KUBERNETES / "components" / "signoff" / "plan.yaml")
    lines = (KUBERNETES / "base" / "triton.env").read_text().splitlines()
    served = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    assert (spec.preset, spec.device, spec.topologies) == (
        served["HARNESS_DEPLOY_PRESET"], served["HARNESS_DEPLOY_DEVICE"], (served["HARNESS_DEPLOY_TOPOLOGY"],),
    )  # fmt: skip
    job = of_kind(everything(), "Job", "signoff")["spec"]
    assert job["suspend"] is True and job["activeDeadlineSeconds"] > 60 * spec.budget_minutes * 2
    verdicts = next(rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert set(verdicts["onExitCodes"]["values"]) == {exit_codes.MISSED, exit_codes.INCONCLUSIVE, exit_codes.USAGE}


def test_a_gateway_outlives_the_longest_session_that_it_carries():
    spec = pod(everything(), "gateway")
    assert spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["bash", "/etc/envoy/drain.sh"]
    assert spec["terminationGracePeriodSeconds"] > 5400 + GOAWAY_S
    assert pod(everything())["terminationGracePeriodSeconds"] > 5400


class Envoy(BaseHTTPRequestHandler):
    """Its admin interface: what was asked, and how many streams are under way at each look."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, text: str = "OK\n") -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self):
        self.answer(200 if self.server.asked else 503)

    def do_GET(self):
        self.answer(200, f"http.grpc.downstream_rq_active: {self.server.streams.pop(0)}\n")

    def log_message(self, *_):
        pass


def test_a_gateway_tells_its_clients_and_waits_for_their_streams():
    """Ten streams are not none; and a client may open its next one between two looks."""
    with HTTPServer(("127.0.0.1", 0), Envoy) as admin:
        admin.asked, admin.streams = [], [10, 1, 0, 0, 1, 0, 0, 0]
        threading.Thread(target=admin.serve_forever, daemon=True).start()
        short = {"ADMIN_PORT": str(admin.server_port), "SETTLE_S": "0", "DRAIN_S": "0", "LOOK_S": "0.02"}
        hook = ["bash", str(KUBERNETES / "components" / "gateway" / "drain.sh")]
        done = subprocess.run(hook, env={**os.environ, **short}, timeout=200, capture_output=True, text=True)
        admin.shutdown()
    assert done.returncode == 0 and admin.streams == []
    assert admin.asked[:2] == ["POST /drain_listeners?graceful&skip_exit"] * 2  # again, where it had no success
    assert set(admin.asked[2:]) == {"GET /stats?filter=http.grpc.downstream_rq_active"}
    envoy = yaml.safe_load((KUBERNETES / "components" / "gateway" / "envoy.yaml").read_text())
    assert envoy["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}
    arguments = pod(everything(), "gateway")["containers"][0]["args"]
    assert arguments[arguments.index("--drain-time-s") + 1] == str(GOAWAY_S)


def test_the_job_does_not_take_the_gpu_of_the_server():
    """It waits; and since a Job's pod cannot be changed, the page says what to delete before the next apply."""
    assert of_kind(everything(), "Job", "signoff")["spec"]["suspend"] is True
    page = (ROOT / "docs" / "how-to" / "kubernetes.md").read_text()
    deleted, ended = (
        page.index(f"kubectl -n speech {each}") for each in ("delete job signoff", "scale deployment triton")
    )
    assert ended < page.index("patch job signoff") < deleted
