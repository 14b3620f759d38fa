"""What Prometheus has to know of a plan: its figures as series, and an alert at its cap."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from harness.errors import InputError
from harness.export.fleet import PlannedFleet
from harness.host.places import OPS
from harness.records.slo import Slo
from harness.server_metrics import FIRST_AUDIO, QUEUE_LENGTH, SESSIONS

PLAN_RULES, ALERT_RULES = "plan.yml", "alerts.yml"
_OF_MISSING = ("SpeechServerDown", "SpeechServersBelowPlan")
_NOTICED_S = 120  # until an autoscaler has seen that a server is missing, and Prometheus that the new one is up
_FIRST_AUDIO_SLO = "ttfa_s"
HOSTS_SELECTOR = 'job="triton"'  # as ops/prometheus/prometheus.yml scrapes
KUBERNETES_SELECTOR = 'job="triton",namespace="speech"'  # as ops/prometheus/kubernetes.yml scrapes


def rule_files(fleet: PlannedFleet, selector: str = HOSTS_SELECTOR, *, elastic: bool = False) -> dict[str, str]:
    """The rules of a fleet by file: those of its plan, and those of every fleet, which compare the servers with it.

    ``elastic``: for a fleet whose autoscaler owns the number of servers.
    """
    shared = {path.name: path.read_text() for path in _shared_rules()}
    if elastic:
        shared[ALERT_RULES] = _patient(shared[ALERT_RULES], math.ceil(fleet.scaling.start_s) + _NOTICED_S)
    return {**shared, PLAN_RULES: plan_rules(fleet, selector, elastic=elastic)}


def _patient(alerts: str, seconds: int) -> str:
    """Alerts with those on missing servers after ``seconds`` only: an autoscaler starts others in that time."""
    for name in _OF_MISSING:
        head, found, tail = alerts.partition(f"- alert: {name}\n")
        assert found, name
        tail, changed = re.subn(r"(?m)^( +for: )\S+$", rf"\g<1>{seconds}s", tail, count=1)
        assert changed, name
        alerts = head + found + tail
    return alerts


def _shared_rules() -> list[Path]:
    return [path for path in sorted((OPS / "prometheus" / "rules").glob("*.yml")) if path.name != PLAN_RULES]


def sessions_query(selector: str = HOSTS_SELECTOR) -> str:
    """All sessions of the fleet, those that wait and those of servers that end included."""
    checked = checked_selector(selector)
    return f"sum({SESSIONS.name}{checked}) + sum({QUEUE_LENGTH.name}{checked})"


def checked_selector(selector: str) -> str:
    """Label matchers, such as ``job="triton"``, in braces; "" for none. Raises InputError."""
    inner = selector.strip().removeprefix("{").removesuffix("}").strip()
    if any(letter in inner for letter in "{}\n'"):
        raise InputError(f'--selector {selector!r}: write label matchers such as job="triton",namespace="speech"')
    return f"{{{inner}}}" if inner else ""


def plan_rules(fleet: PlannedFleet, selector: str = HOSTS_SELECTOR, *, elastic: bool = False) -> str:
    """The text of ``plan.yml``: the plan's figures as recording rules, and the alert at its cap."""
    heading = [
        f"# The plan of {fleet.run_id} for {fleet.qps:g} requests/s, as `harness export` wrote it: do not edit.",
        f"# Verdict {fleet.verdict}, figures {fleet.basis}{', of emulated GPUs' if fleet.emulated else ''}.",
        *(f"# Exported although: {' '.join(each.split())}" for each in fleet.remarks),
    ]
    return "\n".join(
        [
            *heading, "groups:", "  - name: vibevoice-plan", "    rules:", *_records(fleet, elastic),
            *_alert(fleet, selector), "",
        ]
    )  # fmt: skip


def _records(fleet: PlannedFleet, elastic: bool) -> list[str]:
    device_audio = fleet.steady_rate * fleet.mean_audio_s
    figures: Mapping[str, tuple[str, float | int]] = {
        "requests_per_second": ("The target rate", fleet.qps),
        "devices": ("Servers that serve it within the SLOs", fleet.devices),
        "devices_n_plus_1": ("With spare ones", fleet.replicas),
        "devices_least": ("How many must be up", fleet.scaling.minimum if elastic else fleet.devices),
        "sessions_per_device": ("What a server exceeds in 5% of the time", fleet.sessions_p95),
        "sessions_per_device_at_cap": ("The mean at the plan's cap: the autoscaler's target", fleet.sessions),
        "requests_per_second_per_device": ("The steady rate of a server, at utilisation 1", fleet.steady_rate),
        "audio_seconds_per_second": ("The target rate in audio", fleet.qps * fleet.mean_audio_s),
        "audio_seconds_per_second_per_device": ("The steady rate in audio", device_audio),
        "utilisation_cap": ("The highest share of that rate that is planned", fleet.utilisation_cap),
        "expires_timestamp_seconds": (f"{fleet.expires_at}, in Unix time", fleet.expires_unix_s),
    }
    lines = [line for name, (about, value) in figures.items() for line in _record(name, about, _number(value))]
    return [*lines, *_first_audio(fleet.slos)]


def _record(name: str, about: str, value: str) -> list[str]:
    return [f"      # {about}", f"      - record: vibevoice_plan:{name}", f"        expr: vector({value})"]


def _first_audio(slos: tuple[Slo, ...]) -> list[str]:
    """The loosest SLO on first audio: servers do not know the class of a request. Nothing where there is none."""
    known = [slo for slo in slos if slo.metric == _FIRST_AUDIO_SLO]
    if not known:
        return ["      # The plan has no SLO on first audio."]
    loosest = max(known, key=lambda slo: (slo.limit, -slo.quantile))
    bound = max((each for each in FIRST_AUDIO.buckets if each <= loosest.limit), default=FIRST_AUDIO.buckets[0])
    about = f"The loosest SLO on first audio: this share within {loosest.limit:g} s"
    exact = "" if bound == loosest.limit else f", judged at {bound:g} s, the next lower bound of the histogram"
    # Prometheus 3 writes whole numbers as "2.0", earlier ones as "2".
    le = f'le=~"{bound:g}(\\\\.0)?"' if float(bound).is_integer() else f'le="{bound:g}"'
    return [
        *_record("first_audio_slo", f"{about}{exact}", _number(loosest.quantile)),
        "      - record: vibevoice:first_audio_in_time_total",
        f"        expr: 'sum without (le) ({FIRST_AUDIO.name}_bucket{{{le}}})'",
        "      - record: vibevoice:first_audio_total",
        f"        expr: 'sum without (le) ({FIRST_AUDIO.name}_bucket{{le=\"+Inf\"}})'",
    ]


def _alert(fleet: PlannedFleet, selector: str) -> list[str]:
    most = fleet.sessions * fleet.devices
    return [
        "  - name: vibevoice-plan-cap",
        "    rules:",
        "      - alert: SpeechPlanSessionsExceeded",
        f"        expr: '{sessions_query(selector)} > {_number(most)}'",
        "        for: 15m",
        "        labels: {severity: ticket}",
        "        annotations:",
        f"          summary: 'plan exceeded: {{{{ $value | humanize }}}} sessions, and {fleet.devices} servers hold "
        f"{_number(most)} at the cap of the plan'",
        f"          description: 'The plan {fleet.run_id} is for {fleet.qps:g} requests/s. Above its cap a lost server "
        "or a burst violates SLOs: export the plan for a higher target, and add servers.'",
    ]


def _number(value: float) -> str:
    return f"{value:.7g}" if not float(value).is_integer() else f"{int(value)}"
