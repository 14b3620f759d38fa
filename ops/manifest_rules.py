"""Rules for rendered manifests beyond the schemas of Kubernetes: what refers to what, and what a pod may do.

Pure functions of objects as dictionaries; they need no cluster and no kubectl.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jsonschema

# Made by hand, never in a file: docs/how-to/kubernetes.md. Name to keys.
SECRETS = {
    "speech-control": ("key", "header"),
    "speech-carry": ("key",),
    "speech-redis": ("url", "password.conf"),
    "speech-callers": ("keys",),
    "speech-storage": ("id", "secret"),
}
_WORKLOADS = ("Deployment", "StatefulSet", "Job")
_OPEN = {"type": "object", "additionalProperties": True}
_COUNT = {"type": "integer", "minimum": 0}


def _texts(*names: str) -> dict:
    """An object of just these texts."""
    return {"required": list(names), "properties": {name: {"type": "string"} for name in names},
            "additionalProperties": False}  # fmt: skip


# The part of KEDA's schema that is used here (https://keda.sh/docs/latest/reference/scaledobject-spec).
OWN_SCHEMAS: dict[str, dict] = {
    "ScaledObject": {
        "type": "object",
        "additionalProperties": False,
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"const": "keda.sh/v1alpha1"},
            "kind": {"const": "ScaledObject"},
            "metadata": _OPEN,
            "spec": {
                "type": "object",
                "additionalProperties": False,
                "required": ["scaleTargetRef", "triggers"],
                "properties": {
                    "scaleTargetRef": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name"],
                        "properties": {name: {"type": "string"} for name in ("apiVersion", "kind", "name")},
                    },
                    "pollingInterval": _COUNT,
                    "cooldownPeriod": _COUNT,
                    "minReplicaCount": _COUNT,
                    "maxReplicaCount": {"type": "integer", "minimum": 1},
                    "fallback": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["failureThreshold", "replicas"],
                        "properties": {"failureThreshold": _COUNT, "replicas": _COUNT},
                    },
                    "advanced": _OPEN,
                    "triggers": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["type", "metadata"],
                            "properties": {
                                "type": {"enum": ["prometheus", "cron"]},
                                "metricType": {"enum": ["AverageValue", "Value"]},
                                "metadata": {
                                    "type": "object",
                                    "oneOf": [
                                        _texts("serverAddress", "query", "threshold", "ignoreNullValues"),
                                        _texts("timezone", "start", "end", "desiredReplicas"),
                                    ],
                                },
                            },
                        },
                    },
                },
            },
        },
    }
}


def name_of(thing: Mapping[str, Any]) -> str:
    return f"{thing.get('kind')} {thing.get('metadata', {}).get('name')}"


def broken_schema(thing: Mapping[str, Any]) -> str:
    """Why an object does not have our part of its schema, "" where it does."""
    errors = jsonschema.Draft202012Validator(OWN_SCHEMAS[thing["kind"]]).iter_errors(thing)
    return "; ".join(f"{'.'.join(map(str, each.path))}: {each.message}" for each in errors)


def broken_references(objects: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names that lead nowhere: of configurations, secrets, claims, ports, selectors, targets and accounts."""
    known = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    pods = {name_of(each): each["spec"]["template"] for each in objects if each["kind"] in _WORKLOADS}
    labels = [pod["metadata"].get("labels", {}) for pod in pods.values()]
    for owner, pod in pods.items():
        claimed = next((claims_of(each) for each in objects if name_of(each) == owner), set())
        yield from (f"{owner}: {problem}" for problem in _of_pod(pod["spec"], known, claimed))
    for each in objects:
        yield from (f"{name_of(each)}: {problem}" for problem in _of_object(each, known, pods, labels))
        if each["kind"] not in ("Namespace",) and not each["metadata"].get("namespace"):
            yield f"{name_of(each)}: it has no namespace"


def claims_of(workload: Mapping[str, Any]) -> set[str]:
    """The volumes that a StatefulSet claims for each of its pods."""
    return {each["metadata"]["name"] for each in workload["spec"].get("volumeClaimTemplates", ())}


def _of_pod(spec: Mapping[str, Any], known: Mapping[tuple[str, str], Any], claimed: set[str]) -> Iterator[str]:
    volumes = {each["name"]: each for each in spec.get("volumes", ())}
    account = spec.get("serviceAccountName")
    if ("ServiceAccount", account) not in known:
        yield f"no account {account}"
    for volume in volumes.values():
        yield from _of_volume(volume, known)
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        yield from _of_container(container, known)
        mounted = {each["name"] for each in container.get("volumeMounts", ())}
        yield from (f"no volume {name}" for name in sorted(mounted - volumes.keys() - claimed))


def _of_volume(volume: Mapping[str, Any], known: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    if secret := volume.get("secret"):
        yield from _of_secret(secret["secretName"], [each["key"] for each in secret.get("items", ())])
    if config := volume.get("configMap"):
        yield from _of_config(config["name"], [each["key"] for each in config.get("items", ())], known)
    if claim := volume.get("persistentVolumeClaim"):
        if ("PersistentVolumeClaim", claim["claimName"]) not in known:
            yield f"no claim {claim['claimName']}"


def _of_container(container: Mapping[str, Any], known: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    for source in container.get("envFrom", ()):
        yield from _of_config(source["configMapRef"]["name"], [], known)
    for variable in container.get("env", ()):
        source = variable.get("valueFrom", {})
        if secret := source.get("secretKeyRef"):
            yield from _of_secret(secret["name"], [secret["key"]])
        if config := source.get("configMapKeyRef"):
            yield from _of_config(config["name"], [config["key"]], known)
    ports = {port for each in container.get("ports", ()) for port in (each.get("name"), each["containerPort"])}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        for how in ("grpc", "tcpSocket", "httpGet"):
            port = container.get(probe, {}).get(how, {}).get("port")
            if port is not None and port not in ports:
                yield f"{container['name']}: its {probe} asks port {port}, which it does not have"


def _of_secret(name: str, keys: Iterable[str]) -> Iterator[str]:
    if name not in SECRETS:
        yield f"no secret {name} is documented"
    yield from (f"secret {name} has no {key}" for key in keys if key not in SECRETS.get(name, ()))


def _of_config(name: str, keys: Iterable[str], known: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    config = known.get(("ConfigMap", name))
    if config is None:
        yield f"no configuration {name}"
        return
    yield from (f"configuration {name} has no {key}" for key in keys if key not in config.get("data", {}))


def _of_object(each, known, pods, labels) -> Iterator[str]:
    kind, spec = each["kind"], each.get("spec", {})
    if kind == "Service" and not any(_selects(spec["selector"], one) for one in labels):
        yield "it selects no pod"
    if kind == "Service":
        chosen = [pod for pod in pods.values() if _selects(spec["selector"], pod["metadata"]["labels"])]
        named = {
            port.get("name") for pod in chosen for one in pod["spec"]["containers"] for port in one.get("ports", ())
        }
        yield from (
            f"no pod has its port {port['targetPort']}" for port in spec["ports"] if port["targetPort"] not in named
        )
    if kind == "PodDisruptionBudget" and not any(_selects(spec["selector"]["matchLabels"], one) for one in labels):
        yield "it selects no pod"
    if kind == "NetworkPolicy":
        yield from _of_policy(spec, labels)
    if kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        target = spec["scaleTargetRef"]
        scaled = known.get((target["kind"], target["name"]))
        if scaled is None:
            yield f"no {target['kind']} {target['name']}"
        elif "replicas" in scaled["spec"]:
            yield f"{target['name']} has a number of replicas of its own"
    if kind in ("Deployment", "StatefulSet") and not _selects(
        spec["selector"]["matchLabels"], spec["template"]["metadata"]["labels"]
    ):
        yield "it does not select its own pods"


def _of_policy(spec: Mapping[str, Any], labels: Sequence[Mapping[str, str]]) -> Iterator[str]:
    rules = [*spec.get("ingress", ()), *spec.get("egress", ())]
    peers = [peer for rule in rules for peer in (*rule.get("from", ()), *rule.get("to", ()))]
    for selector in (spec["podSelector"], *(peer["podSelector"] for peer in peers if "podSelector" in peer)):
        if not any(_matches(selector, one) for one in labels):
            yield f"no pod matches {selector}"


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    inside = all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))
    return inside and _selects(selector.get("matchLabels", {}), labels)


def _selects(wanted: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return wanted.items() <= labels.items()


def unsafe(objects: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the restricted standard of pods forbids, and what makes a pod unpredictable."""
    for each in objects:
        if each["kind"] not in _WORKLOADS:
            continue
        spec = each["spec"]["template"]["spec"]
        yield from (f"{name_of(each)}: {problem}" for problem in _unsafe_pod(spec))
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            where = f"{name_of(each)}, {container['name']}"
            yield from (f"{where}: {problem}" for problem in _unsafe_container(container))


def _unsafe_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    security = spec.get("securityContext", {})
    if not security.get("runAsNonRoot") or not security.get("runAsUser"):
        yield "it may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "it has no seccomp profile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "it gets a token of the API server"
    if spec.get("enableServiceLinks") is not False:
        yield "names of services become its environment"
    yield from (f"its {name} is that of the host" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))


def _unsafe_container(container: Mapping[str, Any]) -> Iterator[str]:
    security, resources = container.get("securityContext", {}), container.get("resources", {})
    if security.get("allowPrivilegeEscalation") is not False:
        yield "it may gain privileges"
    if security.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "it has capabilities"
    if not security.get("readOnlyRootFilesystem"):
        yield "it may write to its image"
    if not {"cpu", "memory"} <= resources.get("requests", {}).keys() or "memory" not in resources.get("limits", {}):
        yield "it does not say what it needs"
    tag = container["image"].rpartition("/")[2].partition(":")[2]
    if not tag or tag == "latest":
        yield f"its image {container['image']} has no version"
