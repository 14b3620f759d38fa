"""Numbers, metrics and deployments as text for readers who are new to them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TypeGuard

from harness import wire
from harness.records.day import ScalingRule
from harness.records.plan import JudgedSlo, Plan, PlannedTarget
from harness.records.slo import Slo
from harness.topology import ENGINE, TOPOLOGY, Knobs, KnobValue, has_knob, topology_of

_DAY_S = 86_400.0
ABSENT = "–"
STAGE_NAMES = {
    wire.LLM: "LLM",
    wire.DIFFUSION: "diffusion",
    wire.VOCODER: "vocoder",
    wire.VOICE: "voice encoder",
    wire.FRAME: "frame ensemble",
    wire.ENTRY: "entry",
    "entry": "entry",
    wire.ENGINE: "fused engine",
    ENGINE: "fused engine",
}
_FULL_NAMES = {
    "ttfa": "time to first audio",
    "rtf": "real-time factor",
    "stall": "longest stall",
    "longest stall": "longest stall",
}
_TOPOLOGY_NAMES = {wire.STAGED: "staged", wire.FUSED: "fused engine"}
_BRIEF_NAMES = {"ttfa": "first audio", "rtf": "RTF", "stall": "stall", "longest stall": "stall"}
_PLAIN_NAMES = {"step_s": "step time", "frames_per_s": "frames per second"}
ONE_DEVICE = "minimum of one device"
EVENED_OUT = "random arrivals even out over many devices (statistical multiplexing)"
_CAP = re.compile(r"utilisation (0\.\d+|1)")
_REACH = re.compile(r"sessions per device, known up to (\d+)")
_METRIC = re.compile(
    r"\b(ttfa|rtf|stall|longest stall)(?:_longest)?(?:_s)?(?:_500ms|_2s)?"
    r"[ _]p(\d+(?:\.\d+)?)(?:_s)?(?: of class ([\w.-]*\w))?"
)


def known(value: object) -> TypeGuard[float]:
    """Whether a stored figure exists: a number that is not NaN."""
    return isinstance(value, Real) and not math.isnan(value)


def figure(value, digits: int = 3) -> str:
    """A number at ``digits`` significant digits, in plain notation: 0.5, 1.42, 12,300."""
    if not known(value):
        return ABSENT
    if math.isinf(value):
        return "unlimited"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def fixed(value, decimals: int) -> str:
    """A number of a column whose numbers all have so many decimals: 1,320.00."""
    return f"{value:,.{decimals}f}" if known(value) else ABSENT


def part_of(period_s: float) -> str:
    """What 1/24 of a period is called."""
    return "hour" if period_s == _DAY_S else "1/24 of the period"


def percent(share, decimals: int = 0) -> str:
    return f"{100 * share:.{decimals}f}%" if known(share) else ABSENT


def level(confidence) -> str:
    """A confidence level, unrounded: 97.5%."""
    return f"{100 * confidence:.10g}%"


def share_of_limit(share) -> str:
    """A value as a share of its limit, up to ten times it; beyond that the exact figure says no more."""
    return percent(share) if known(share) and share <= 10 else "over ten times"


def signed_percent(share) -> str:
    return f"{100 * share:+.0f}%".replace("-", "\N{MINUS SIGN}") if known(share) else ABSENT


def milliseconds(seconds) -> str:
    return f"{figure(1000 * seconds)} ms" if known(seconds) else ABSENT


def interval(bounds: Sequence | None) -> str:
    """An interval as text; where a bound is missing, it says on which side nothing is known."""
    low, high = bounds if bounds else (None, None)
    if known(low) and known(high):
        return f"{figure(low)} to {figure(high)}"
    if known(low):
        return f"at least {figure(low)}"
    return f"at most {figure(high)}" if known(high) else ABSENT


def interval_ms(bounds: Sequence | None) -> str:
    """Bounds in seconds as milliseconds, without the unit."""
    return interval([1000 * bound if known(bound) else None for bound in bounds] if bounds else None)


def duration(seconds) -> str:
    """Seconds up to two minutes, then minutes up to two hours, then hours."""
    if not known(seconds):
        return ABSENT
    if seconds < 120:
        return f"{figure(seconds, 2)} s"
    return f"{figure(seconds / 60, 2)} min" if seconds < 7200 else f"{figure(seconds / 3600, 2)} h"


def recovery(seconds, watched_s: float) -> str:
    """The recovery time after a surge; None: longer than it was watched."""
    if not known(seconds):
        return f"not within {duration(watched_s)}"
    return duration(seconds) if seconds else "at once"


def months(count) -> str:
    """Months until an event, or that it never happens."""
    if not known(count):
        return "never"
    return "now" if count == 0 else plural(round(count, 1), "month")


def devices_then(count, most: int | None) -> str:
    """A forecast count of devices; None is more than ``most``, where counting ends."""
    return figure(count, 6) if known(count) else f"beyond {most:,}"


def plural(count, noun: str) -> str:
    return f"{figure(count)} {noun}{'' if count == 1 else 's'}"


def host_fact(name: str, value) -> tuple[str, str]:
    """A fact of the host and its name as text: ``memory_gib`` at 7.6 as ("memory", "7.6 GiB")."""
    if name.endswith("_gib"):
        return name.removesuffix("_gib"), f"{value} GiB"
    return name.replace("_", " "), str(value)


def size(count_bytes: int) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count_bytes >= scale:
            return f"{figure(count_bytes / scale)} {unit}"
    return f"{count_bytes} B"


def stage(name: str) -> str:
    return STAGE_NAMES.get(name, name)


def topology(name: str) -> str:
    return _TOPOLOGY_NAMES.get(name, name)


def ordinal(quantile_percent: str) -> str:
    """``95`` as 95th, ``99.9`` as 99.9th."""
    endings = {} if re.search(r"1\d$", quantile_percent) else {"1": "st", "2": "nd", "3": "rd"}
    return quantile_percent + endings.get(quantile_percent[-1], "th")


def metric(text: str) -> str:
    """Every ``rtf p95 of class long`` within a text as "real-time factor of long requests (95th percentile)"."""
    said = _METRIC.sub(_metric_words, text or ABSENT)
    return re.sub(r"\b(step_s|frames_per_s)\b", lambda match: _PLAIN_NAMES[match[0]], said)


def _metric_words(match: re.Match) -> str:
    name, quantile, traffic_class = match.groups()
    of_class = f" of {traffic_class} requests" if traffic_class else ""
    which = "median" if quantile == "50" else f"{ordinal(quantile)} percentile"
    return f"{_FULL_NAMES[name]}{of_class} ({which})"


def metric_briefly(text: str) -> str:
    """``ttfa p95 of class short`` as "first audio p95, short", for the axis of a plot."""
    if reach := _REACH.fullmatch(text or ""):
        return f"sessions measured ({reach[1]})"
    match = _METRIC.fullmatch(text or "")
    if not match:
        return metric(text)
    name, quantile, traffic_class = match.groups()
    return f"{_BRIEF_NAMES[name]} p{quantile}" + (f", {traffic_class}" if traffic_class else "")


def constraint(text: str) -> str:
    """A binding constraint as text, for a table."""
    if cap := _CAP.fullmatch(text or ""):
        return f"cap on utilisation ({percent(float(cap[1]))})"
    if reach := _REACH.fullmatch(text or ""):
        return f"most sessions measured on a device ({reach[1]})"
    return metric(text)


def binding(text: str) -> str:
    """A binding constraint as the rest of "bound by …"."""
    said = constraint(text)
    return f"the {said}" if _METRIC.match(text or "") or said != metric(text) else said


def bound(target: PlannedTarget) -> str:
    """What bounds the count of a target of plan.json; one device is the lower bound."""
    return ONE_DEVICE if target.devices == 1 else constraint(target.binding)


def utilisation(plan: Plan) -> str:
    """What the utilisation in plan.json is a share of, and what a device sustains alone; "" where there is none."""
    rate = plan.steady_rate
    if rate is None:
        return ""
    cap, most = plan.utilisation_cap, plan.planned_limit
    limit = "" if most is None else f"; the plan's utilisation_cap allows {percent(cap)} of it, {figure(most)}"
    return (
        f"Utilisation = requests/s / (devices x {figure(rate)}). {figure(rate)} requests/s is the steady rate: what "
        f"one device sustains with a constant number of sessions within the SLOs{limit}{_alone(plan)}"
    )


def _alone(plan: Plan) -> str:
    rate = plan.rate_per_device.value
    if not known(rate):
        return ""
    more = f"; in a fleet it is planned for more, because {EVENED_OUT}" if plan.is_more_in_a_fleet else ""
    return f". One device alone sustains {figure(rate)} requests/s of Poisson arrivals{more}"


_ROUTINGS = {"least_loaded": "least loaded", "round_robin": "round robin", "random": "random"}


def routing(plan: Plan) -> str:
    """How sessions are given to devices in plan.json, with the counts of other ways; "" in older files."""
    several = [each for each in plan.targets if each.devices_by_routing and (each.devices or 0) > 1]
    if not several:
        return ""
    target = several[-1]
    counts = {name: count for name, count in (target.devices_by_routing or {}).items() if name != plan.routing}
    others = " and ".join(f"{_ROUTINGS[name]} {count or 'over half as many again'}" for name, count in counts.items())
    needs = plural(target.devices, "device")
    return f"Routing: {_ROUTINGS[plan.routing]}. At {target.qps:g} requests/s it needs {needs}; {others} (simulated)"


def ladders(plan: Plan) -> str:
    """What the interval of the rate in plan.json holds; "" in older files."""
    rate = plan.rate_per_device
    if not rate.ladders or rate.between_ladders is None:
        return ""
    determine = "1 ladder determines" if rate.ladders == 1 else f"{rate.ladders} ladders determine"
    return (
        f"{determine} the rate of a device; its interval assumes that whole ladders of one deployment differ by "
        f"{percent(rate.between_ladders)} (standard deviation, from its measurements and what was assumed before them)"
    )


def slo(record: Slo) -> str:
    """An SLO of plan.json as one sentence with its unit."""
    share, limit, name = f"{100 * record.quantile:g}%", figure(record.limit), record.metric
    if name.startswith("ttfa"):
        return f"{share} of requests hear their first audio within {limit} s"
    if name.startswith("rtf"):
        return f"{share} of requests are spoken at a real-time factor of at most {limit}"
    if name.startswith("stall"):
        return f"for {share} of requests the longest stall is at most {limit} s"
    return f"{name}: {share} of requests at most {limit}"


def slos_judged(records: Sequence[JudgedSlo]) -> str:
    """How many SLOs a run certainly met and violated, and on which side of its limit each other one was."""
    said = [_judgement(record) for record in records]
    return ", ".join(f"{said.count(kind)} {kind}" for kind in _JUDGEMENTS if kind in said) or ABSENT


_JUDGEMENTS = ("met", "violated", "within the limit", "above the limit", "without a figure")


def _judgement(record: JudgedSlo) -> str:
    if record.met is not None:
        return "met" if record.met else "violated"
    if record.measured is None:
        return "without a figure"
    return "within the limit" if record.measured <= record.limit else "above the limit"


def _knob(path: str, value) -> str:
    """One knob of a deployment as text: ``diffusion_decoder.delay_us`` at 5000 as "diffusion delay 5 ms"."""
    owner, _, knob = path.rpartition(".")
    prefix = f"{stage(owner)} " if owner else ""
    if knob == TOPOLOGY:
        return _TOPOLOGY_NAMES[value or wire.STAGED]
    if not known(value):
        return f"{prefix}{knob} as by default"
    if knob == "delay_us":
        return f"{prefix}delay {figure(value / 1000)} ms"
    if knob == "instances":
        return plural(value, f"{prefix}instance")
    if knob == "max_batch":
        return f"{prefix}batch up to {value}"
    if knob == "chunk_frames":
        return f"{prefix}{plural(value, 'frame')} per chunk"
    return f"{prefix}{knob} {value}"


def deployment(knobs: Mapping[str, KnobValue | None]) -> str:
    """The knobs of a deployment as text; a knob with one value in all frame stages is named once."""
    left, said = dict(knobs), []
    for knob in sorted({path.rpartition(".")[2] for path in left}):
        paths = [f"{name}.{knob}" for name in wire.STAGES]
        values = {left.get(path) for path in paths}
        if len(values) == 1 and None not in values:
            said.append(_knob(knob, values.pop()))
            left = {path: value for path, value in left.items() if path not in paths}
    return " · ".join(said + [_knob(path, value) for path, value in left.items()]) or "the defaults"


def name_deployments(deployments: Sequence[Knobs]) -> list[str]:
    """A short name for each: only the knobs in which they differ, or all knobs if there is only one."""
    paths = list(dict.fromkeys(path for knobs in deployments for path in knobs))
    varied = [path for path in paths if len({repr(knobs.get(path)) for knobs in deployments}) > 1] or paths
    own = [[path for path in varied if has_knob(topology_of(knobs), path)] for knobs in deployments]
    return [
        deployment({path: knobs.get(path) for path in paths}) for knobs, paths in zip(deployments, own, strict=True)
    ]


def letters(index: int) -> str:
    """0 as A, 25 as Z, 26 as AA."""
    text = ""
    while index >= 0:
        text, index = chr(ord("A") + index % 26) + text, index // 26 - 1
    return text


def scaling_rule(rule: ScalingRule) -> str:
    """An autoscaler's rule as text."""
    target, minutes = figure(rule.target_sessions_per_device), duration(rule.stabilisation_s)
    scheduled = f"; and a schedule of {plural(len(rule.schedule), 'row')}" if rule.schedule else ""
    return (
        f"{rule.minimum} to {rule.maximum} devices for {target} sessions each (within {percent(rule.tolerance)} "
        f"nothing changes), every {duration(rule.poll_s)}; up at once, down to the most of the last {minutes}; a "
        f"device serves {duration(rule.start_s)} after it was asked for{scheduled}"
    )
