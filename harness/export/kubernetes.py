"""A planned fleet as Kustomize overlays, which stand by themselves: the base that they change is copied beside them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import yaml

from harness.deploy.config import Deployment
from harness.deploy.flags import shared_memory_needed
from harness.errors import InputError
from harness.export.fleet import EXIT_S, SETTLE_S, PlannedFleet
from harness.export.prometheus import KUBERNETES_SELECTOR, checked_selector, rule_files, sessions_query
from harness.host.places import OPS
from harness.identity import CPU, GPU
from harness.records.day import ScalingRule
from harness.server_metrics import SESSIONS

STATIC, KEDA, HPA = "static", "keda", "hpa"
OVERLAYS = (STATIC, KEDA, HPA)
_SHARED = "shared"
RULES = ("rules-static", "rules-elastic")
_COPIED = {"base": "base", "components/gateway": "gateway"}
_WRITTEN = (".yaml", ".env", ".sh")
GOAWAY_S = 30  # in which the gateway tells every connection that it ends: Envoy's --drain-time-s
_KIND = "kustomize.config.k8s.io/v1beta1"
_ABOUT = "speech/"  # prefix of annotations
_POLICIES = {"least_loaded": "LEAST_REQUEST", "round_robin": "ROUND_ROBIN", "random": "RANDOM"}
_GPU = "nvidia.com/gpu"
_MONITORING = "monitoring"  # the namespace of Prometheus, which alone reaches the servers' metrics
_CORES, _REQUESTED_GIB, _MOST_GIB = 6, 32, 48  # of a server with one GPU, as the base has them
_DAY_S = 86_400.0
_SCHEDULE_START = "00:00 UTC"
_LONGEST_WINDOW_S = 3600  # that the API of Kubernetes takes
_START_S = 1800  # in which a server has loaded its models, and its image
_LABEL = re.compile(r"NVIDIA[A-Za-z0-9_. -]{0,56}[A-Za-z0-9]")
_WEIGHTS = "# Weights are random without a checkpoint: mount its folder, and name it as HARNESS_DEPLOY_CHECKPOINT.\n"
FLEET_METRIC = "vibevoice_fleet_sessions"  # of the plain autoscaler, from an adapter of the metrics API


@dataclass(frozen=True)
class Monitoring:
    """Where the fleet's series are: Prometheus's address, and label matchers that select them. Raises InputError."""

    url: str = "http://prometheus-server.monitoring"
    selector: str = KUBERNETES_SELECTOR

    def __post_init__(self):
        if not re.fullmatch(r"https?://[^\s/]\S*", self.url):
            raise InputError(f"--prometheus {self.url!r} is no address: write it as http://HOST:PORT")
        checked_selector(self.selector)


def overlay_files(fleet: PlannedFleet, monitoring: Monitoring) -> dict[str, str]:
    """Every file of the export by relative path: ``static``, ``keda`` and ``hpa`` are overlays to choose from.

    The rules of Prometheus lie beside them: those of ``static``, and those of both autoscaled ones.
    """
    files = {**_copied(fleet), **{f"{_SHARED}/{name}": text for name, text in _shared(fleet).items()}}
    files[f"{STATIC}/kustomization.yaml"] = _text(_overlay(replicas=[{"name": "triton", "count": fleet.replicas}]))
    elastic = {
        KEDA: {"scaledobject.yaml": lambda: scaled_object(fleet, monitoring)},
        HPA: {"autoscaler.yaml": lambda: autoscaler(fleet), "prometheus-adapter.yaml": lambda: _adapter(monitoring)},
    }
    for name, parts in elastic.items():
        if name not in left_out(fleet.scaling):
            files[f"{name}/kustomization.yaml"] = _text(_overlay(next(iter(parts))))
            files |= {f"{name}/{part}": _text(content()) for part, content in parts.items()}
    files |= _rules(fleet, monitoring, elastic=False)
    if len(left_out(fleet.scaling)) < len(elastic):
        files |= _rules(fleet, monitoring, elastic=True)
    return files


def left_out(rule: ScalingRule) -> dict[str, str]:
    """The overlays that cannot hold the plan's rule, and why."""
    if not rule.schedule:
        return {}
    found = {HPA: "a HorizontalPodAutoscaler has no schedule, and the plan simulated one"}
    if rule.period_s != _DAY_S:
        found[KEDA] = f"the plan's schedule repeats every {rule.period_s:g} s, and cron can say only one of a day"
    return found


def notes(rule: ScalingRule) -> list[str]:
    """Where what is exported is not all that the plan simulated, in sentences without a full stop."""
    said = [f"no overlay {name}: {why}" for name, why in left_out(rule).items()]
    if rule.schedule and KEDA not in left_out(rule):
        said.append(f"the schedule of {KEDA} has the start of the plan's demand at {_SCHEDULE_START}")
    if rule.stabilisation_s > _LONGEST_WINDOW_S:
        said.append(
            f"Kubernetes remembers wishes for {_LONGEST_WINDOW_S} s at most, and the plan simulated "
            f"{rule.stabilisation_s:g} s: it shrinks earlier"
        )
    return said


def record_of(fleet: PlannedFleet) -> dict[str, Any]:
    """What an export was made from: nothing in it depends on when it was made."""
    return {
        "schema": 1, "run_id": fleet.run_id, "seal_sha256": fleet.seal_sha256, "qps": fleet.qps,
        "verdict": fleet.verdict, "basis": fleet.basis, "emulated": fleet.emulated, "expires_at": fleet.expires_at,
        "devices": fleet.devices, "replicas": fleet.replicas, "exported_although": list(fleet.remarks),
        "notes": notes(fleet.scaling),
    }  # fmt: skip


def _copied(fleet: PlannedFleet) -> dict[str, str]:
    """The base and the gateway, with the plan's routing."""
    files: dict[str, str] = {}
    for source, target in _COPIED.items():
        paths = sorted((OPS / "kubernetes" / source).iterdir())
        files |= {f"{target}/{path.name}": path.read_text() for path in paths if path.suffix in _WRITTEN}
    envoy = files["gateway/envoy.yaml"]
    if fleet.routing != "least_loaded":
        envoy = re.sub(r"(?m)^ *# It looks at .*\n *least_request_lb_config:.*\n", "", envoy)
        envoy = envoy.replace("lb_policy: LEAST_REQUEST", f"lb_policy: {_POLICIES[fleet.routing]}")
    return {**files, "gateway/envoy.yaml": envoy}


def _shared(fleet: PlannedFleet) -> dict[str, str]:
    drain_s = fleet.grace_s - SETTLE_S - EXIT_S
    return {
        "kustomization.yaml": _text(_kustomization(fleet)),
        "triton.env": _environment(fleet),
        "triton.yaml": _text(_triton(fleet)),
        "budget.yaml": _text(_budget(fleet)),
        "gateway.yaml": _text(_gateway(drain_s)),
    }


def _kustomization(fleet: PlannedFleet) -> dict[str, Any]:
    sessions = int(fleet.sessions * fleet.devices)
    return {
        "apiVersion": _KIND,
        "kind": "Kustomization",
        "namespace": "speech",
        "labels": [{"pairs": {"app.kubernetes.io/part-of": "speech"}, "includeSelectors": False}],
        "resources": ["../base"],
        "components": ["../gateway"],
        "configMapGenerator": [
            {"name": "triton", "behavior": "merge", "envs": ["triton.env"]},
            {"name": "studio", "behavior": "merge", "literals": [f"HARNESS_STUDIO_SESSIONS={sessions}"]},
        ],
        "patches": [{"path": name} for name in ("triton.yaml", "budget.yaml", "gateway.yaml")],
    }


def _rules(fleet: PlannedFleet, monitoring: Monitoring, *, elastic: bool) -> dict[str, str]:
    """A folder of its own for Prometheus's namespace: a ConfigMap is read by pods of its own namespace alone."""
    folder, rules = RULES[elastic], rule_files(fleet, monitoring.selector, elastic=elastic)
    config = {
        "name": "speech-rules",
        "files": sorted(rules),
        "options": {"labels": {f"{_ABOUT}rules": "yes"}, "disableNameSuffixHash": True},
    }
    content = {"apiVersion": _KIND, "kind": "Kustomization", "namespace": _MONITORING, "configMapGenerator": [config]}
    files = {"kustomization.yaml": _text(content), **rules}
    return {f"{folder}/{name}": text for name, text in files.items()}


def _environment(fleet: PlannedFleet) -> str:
    carry = {"vibevoice_full_pipeline.carry_key_file": "/run/secrets/speech-carry/key"}
    values = {
        "PRESET": fleet.preset,
        "TOPOLOGY": fleet.topology,
        "DEVICE": "cpu" if fleet.on_cpu else "gpu",
        "DTYPE": fleet.dtype,
        "GPUS": str(fleet.gpus),
        "KNOBS": json.dumps(dict(fleet.server_knobs)),
        "PARAMETERS": json.dumps({**carry, **fleet.parameters}),
        "SETTLE_S": str(SETTLE_S),
        "GRACE_S": str(fleet.grace_s - EXIT_S),
    }
    return _WEIGHTS + "".join(f"HARNESS_DEPLOY_{name}={value}\n" for name, value in values.items())


def _triton(fleet: PlannedFleet) -> dict[str, Any]:
    pod: dict[str, Any] = {"terminationGracePeriodSeconds": fleet.grace_s}
    if product := _product(fleet.device):
        pod["nodeSelector"] = {f"{_GPU}.product": product}
    if fleet.on_cpu:
        pod["tolerations"] = None
    shared_gib = _shared_memory_gib(fleet)
    pod["containers"] = [{"name": "triton", "resources": _resources(fleet, shared_gib)}]
    pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}}]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "triton", "annotations": _annotations(fleet)},
        "spec": {**_rollout(fleet), "template": {"spec": pod}},
    }


def _resources(fleet: PlannedFleet, shared_gib: int) -> dict[str, Any]:
    """For each GPU what the base has for one. Shared memory counts as memory of the container."""
    gpus = 1 if fleet.on_cpu else fleet.gpus
    return {
        "requests": {"cpu": str(_CORES * gpus), "memory": f"{_REQUESTED_GIB * gpus}Gi"},
        "limits": {
            "memory": f"{_MOST_GIB * gpus + shared_gib - 1}Gi",
            _GPU: None if fleet.on_cpu else str(fleet.gpus),  # None removes it
        },
    }


def _shared_memory_gib(fleet: PlannedFleet) -> int:
    """What the processes of the stages share, and half as much again; the base's 1 GiB at least."""
    given = {name: str(value) for name, value in fleet.parameters.items()}
    deployment = Deployment(
        fleet.preset, knobs=fleet.server_knobs, parameters=given, gpus=fleet.gpus, dtype=fleet.dtype,
        device=CPU if fleet.on_cpu else GPU, topology=fleet.topology,
    )  # fmt: skip
    return math.ceil(max(1.5 * shared_memory_needed(deployment.configs(), fleet.gpus) / 2**30, 1))


def _rollout(fleet: PlannedFleet) -> dict[str, Any]:
    """A new version takes the place of as many servers at once as the plan has spare ones: there is no further GPU.

    A batch takes as long as its servers need to drain, and nothing new is ready before that.
    """
    most = {"maxSurge": 0, "maxUnavailable": max(fleet.spare, 1)}
    return {
        "progressDeadlineSeconds": fleet.grace_s + _START_S,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": most},
    }


def _annotations(fleet: PlannedFleet) -> dict[str, str]:
    said = {
        "run": fleet.run_id,
        "seal-sha256": fleet.seal_sha256,
        "verdict": fleet.verdict,
        "basis": f"{fleet.basis}{', emulated GPUs' if fleet.emulated else ''}",
        "requests-per-second": f"{fleet.qps:g}",
        "expires-at": fleet.expires_at,
        **{name.replace("_", "-"): ", ".join(map(str, values)) for name, values in fleet.requests.items()},
        "exported-although": "; ".join(fleet.remarks),
    }
    return {f"{_ABOUT}{name}": text for name, text in said.items() if text}


def _product(device: str) -> str:
    """The label that NVIDIA's feature discovery gives the plan's type of GPU; "" where the plan names none."""
    name = device.removeprefix("emulated ")
    return name.replace(" ", "-") if _LABEL.fullmatch(name) else ""


def _budget(fleet: PlannedFleet) -> dict[str, Any]:
    """As many servers may be taken out at once as the plan has spare ones."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": "triton"},
        "spec": {"maxUnavailable": fleet.spare},
    }


def _gateway(drain_s: int) -> dict[str, Any]:
    """It ends when its streams have ended (drain.sh), at the latest when its servers would."""
    pod = {"terminationGracePeriodSeconds": drain_s + SETTLE_S + GOAWAY_S + EXIT_S}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "gateway"},
        "spec": {"template": {"spec": pod}},
    }


def _overlay(*resources: str, **more: Any) -> dict[str, Any]:
    """What is shared, which has no number of servers, with what is responsible for that number."""
    return {
        "apiVersion": _KIND,
        "kind": "Kustomization",
        "namespace": "speech",
        "resources": [f"../{_SHARED}", *resources],
        **more,
    }


def _behavior(fleet: PlannedFleet) -> dict[str, Any]:
    """Growth at once; shrinking to the most that was wished for in the window. As the rule is simulated."""
    windows_s = {"scaleUp": 0, "scaleDown": min(round(fleet.scaling.stabilisation_s), _LONGEST_WINDOW_S)}
    any_number = {"type": "Pods", "value": fleet.scaling.maximum, "periodSeconds": 15}
    return {
        name: {"stabilizationWindowSeconds": window_s, "policies": [dict(any_number)]}
        for name, window_s in windows_s.items()
    }


def scaled_object(fleet: PlannedFleet, monitoring: Monitoring) -> dict[str, Any]:
    """KEDA's autoscaler on a query. Without an answer of Prometheus the fleet has all its servers."""
    rule = fleet.scaling
    trigger = {
        "serverAddress": monitoring.url,
        "query": sessions_query(monitoring.selector),
        "threshold": f"{rule.target_sessions_per_device:g}",
        "ignoreNullValues": "false",
    }
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "triton", "labels": {"app.kubernetes.io/name": "triton"}, **_starts(rule)},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "triton"},
            "pollingInterval": round(rule.poll_s),
            "minReplicaCount": rule.minimum,
            "maxReplicaCount": rule.maximum,
            "fallback": {"failureThreshold": 3, "replicas": rule.maximum},
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior(fleet)}},
            "triggers": [{"type": "prometheus", "metricType": "AverageValue", "metadata": trigger}, *_scheduled(rule)],
        },
    }


def _starts(rule: ScalingRule) -> dict[str, Any]:
    return {"annotations": {f"{_ABOUT}schedule-starts": _SCHEDULE_START}} if rule.schedule else {}


def _scheduled(rule: ScalingRule) -> list[dict[str, Any]]:
    """The schedule as KEDA's cron triggers: the larger wish of all triggers counts. Its start is 00:00 UTC.

    Of rows within one minute, the last counts. Raises InputError for a schedule that does not repeat daily.
    """
    if rule.schedule and rule.period_s != _DAY_S:
        raise InputError(left_out(rule)[KEDA])
    rows = sorted({int(each.at_s // 60): each.devices for each in rule.schedule}.items())
    changes = [row for row, before in zip(rows, rows[-1:] + rows[:-1], strict=True) if row[1] != before[1]]
    following = changes[1:] + changes[:1]
    return [
        {"type": "cron", "metadata": {"timezone": "Etc/UTC", "start": _cron(start), "end": _cron(end),
                                      "desiredReplicas": str(devices)}}
        for (start, devices), (end, _) in zip(changes, following, strict=True) if devices > rule.minimum
    ]  # fmt: skip


def _cron(minute: int) -> str:
    return f"{minute % 60} {minute // 60} * * *"


def autoscaler(fleet: PlannedFleet) -> dict[str, Any]:
    """The plain autoscaler: the same rule but its schedule, with the metric from an adapter of the metrics API."""
    rule = fleet.scaling
    target = {"type": "AverageValue", "averageValue": _quantity(rule.target_sessions_per_device)}
    metric = {"type": "External", "external": {"metric": {"name": FLEET_METRIC}, "target": target}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "triton", "labels": {"app.kubernetes.io/name": "triton"}},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "triton"},
            "minReplicas": rule.minimum,
            "maxReplicas": rule.maximum,
            "metrics": [metric],
            "behavior": _behavior(fleet),
        },
    }


def _quantity(value: float) -> str:
    """A number as Kubernetes writes it: whole, or in thousandths."""
    return f"{int(value)}" if float(value).is_integer() else f"{round(value * 1000)}m"


def _adapter(monitoring: Monitoring) -> dict[str, Any]:
    """A rule for prometheus-adapter, which makes the external metric: values of its Helm chart, no resource."""
    series = f"{SESSIONS.name}{checked_selector(monitoring.selector)}"
    return {
        "rules": {
            "external": [
                {
                    "seriesQuery": series,
                    "name": {"as": FLEET_METRIC},
                    "resources": {"namespaced": False},
                    "metricsQuery": sessions_query(monitoring.selector),
                }
            ]
        }
    }


def _text(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=120)
