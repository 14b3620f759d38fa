"""A day on static, reactive and predictive fleets: GPU hours, SLO attainment, cost; closed forms; 1,000 GPUs in time.

The demand is diurnal, or a real trace of one hour (Azure, LLM conversations, 2023) stretched to a day with its bursts.
A device takes 60 ms and 2 ms per session for a frame; sessions last 20 s to 90 minutes; a device serves 5 or 30
minutes after it was asked for, and drains for as long as its sessions last. The rule is the one that
an export to Kubernetes gets: its devices are compared, sync by sync, with Kubernetes' algorithm written down again,
without and with a time to start, a schedule, and a maximum that is reached. Without the file of the trace it fails,
and with a closed form that the simulated days do not know to 1%.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import autoscale_forms
import common
import numpy as np

from harness.capacity.fitting.rate_search import Limits, Traffic
from harness.capacity.models.device import Device
from harness.capacity.models.spreads import Sample, Spread
from harness.capacity.models.steps import StepTime
from harness.capacity.planning.day import DayStage, DayTerms, plan_day
from harness.capacity.planning.pools import Pools
from harness.capacity.planning.scaling import ScalingTerms
from harness.records.day import STATIC, Day, DemandCurve
from harness.records.plan import Price
from harness.traffic.arrivals import Trace
from harness.traffic.demand import diurnal, of_trace
from harness.traffic.mix import Lengths, Mix, TrafficClass

TRACE = Path(__file__).resolve().parents[3] / "shared" / "data" / "traces" / "azure_llm_2023_conv.csv"
ALLOWED_S, ALLOWED_ERROR = 60.0, 0.03
ALLOWED_DOUBT = 0.01  # standard error of a closed form: beyond it, an error may be chance
PRICE = Price(device_type="one", price_per_device_hour=2.5, currency="USD", basis="given")
SLOS = {"ttfa_p95_s": 2.0, "rtf_p95": 0.9}
MIX = Mix(
    "day",
    (
        TrafficClass("short", 0.80, Lengths.parse({"lognormal": {"median": 20, "sigma": 0.7, "max": 120}})),
        TrafficClass("podcast", 0.17, Lengths.parse({"lognormal": {"median": 600, "sigma": 0.6, "max": 3600}})),
        TrafficClass("ninety minutes", 0.03, Lengths.parse({"fixed": 5400})),
    ),
).with_slos({name: SLOS for name in ("short", "podcast", "ninety minutes")})


def pools() -> Pools:
    """Pools of a device that was measured up to 32 sessions; real time is 36."""
    exact = Spread(Sample(1000, 1000.0, (1.0,) * 13), {})
    device = Device(StepTime("linear", (0.06, 0.002)), 0.05, 2.5, exact, exact, {}, 32.0, ())
    return Pools(device, Traffic.draw(MIX, np.random.default_rng(1)), Limits(MIX.slos, 32), 0.85)


def demands(peak_qps: float, trace: Path) -> dict[str, DemandCurve]:
    """The demands by name; without the file of the trace, the diurnal one alone."""
    found = {"diurnal": diurnal(peak_qps, 0.2 * peak_qps)}
    if trace.is_file():
        found["azure trace"] = of_trace(Trace.read(trace), hours=24, mean_qps=0.6 * peak_qps)
    return found


def planned(own: Pools, curve: DemandCurve, start_s: float, seed: int) -> tuple[float, Day]:
    began = time.perf_counter()
    day = plan_day(own, MIX, curve, DayTerms(ScalingTerms(start_s=start_s), price=PRICE), seed, common.say)
    return time.perf_counter() - began, day


def thousand(own: Pools, devices: int, seed: int) -> dict[str, float]:
    """Simulate an elastic day that needs so many devices at its peak: seconds, of this process and of the clock.

    The simulation is one thread that waits for nothing: on a busy host only the first are its own.
    """
    rate = float(own.rates(np.array([64]), np.inf)[0]) / 64
    curve = diurnal(rate * devices, 0.2 * rate * devices)
    stage = DayStage(own, MIX, curve, seed)
    rule = ScalingTerms().rule(0.7 * stage.session_limit, devices)
    began = time.process_time(), time.perf_counter()
    result = stage.play(devices, rule)
    cpu_s, took_s = time.process_time() - began[0], time.perf_counter() - began[1]
    return {
        "fleet_devices": devices,
        "fleet_most_devices": float(result.devices_owned.max()),
        "fleet_requests": sum(int(each.arrived.sum()) for each in result.classes.values()),
        "fleet_cpu_s": cpu_s,
        "fleet_s": took_s,
    }


def show_day(name: str, day: Day, took_s: float):
    title = f"{name}: {day.requests:,} requests, at most {day.peak_qps:.3g}/s; planned in {took_s:.1f} s"
    columns = ("policy", "SLOs", "within all", "worst hour", "rejected", "most GPUs", "GPU hours", "USD", "target")
    table = common.table(title, *columns)
    for each in day.policies:
        target = each.rule.target_sessions_per_device if each.rule else None
        met = {True: "met", False: "violated", None: "not known"}[each.met]
        table.add_row(
            each.policy, met, f"{each.within_slos:.2%}", f"{each.worst_part:.2%}",
            f"{each.rejected:.3%}", f"{each.most_devices}", f"{each.device_hours:,.0f}", f"{each.cost:,.0f}",
            "-" if target is None else f"{target:.1f}",
        )  # fmt: skip
    return table


def figures_of(day: Day) -> dict[str, dict]:
    static = day.policy(STATIC)
    assert static is not None
    return {
        each.policy: {
            "gpu_hours": each.device_hours,
            "against_static": each.device_hours / static.device_hours,
            "attainment": each.within_slos,
            "worst_hour": each.worst_part,
            "rejected": each.rejected,
            "cost": each.cost,
            "most_devices": each.most_devices,
            "met": each.met,
        }
        for each in day.policies
    }


def is_good(figures: dict, *, quick: bool) -> bool:
    """Whether every gate is met. A quick run has few days for the closed forms, and may lack the file of the trace."""
    known = figures["closed_form_standard_error_max"] <= ALLOWED_DOUBT
    fine = known and figures["closed_form_error_max"] <= ALLOWED_ERROR and figures["trace"]
    fine = fine and figures["fleet_cpu_s"] <= ALLOWED_S
    return not figures["rule_mismatches"] and (quick or fine)


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, "python benchmarks/capacity/autoscale.py --peak 2 --devices 1000")
    parser.add_argument("--peak", type=common.real(0.01, 1000), default=2.0, help="requests/s at the peak of the day")
    parser.add_argument("--devices", type=common.whole(1, 10**5), default=1000, help="GPUs of the fleet that is timed")
    parser.add_argument(
        "--starts",
        type=common.several(common.real(0, 86_400)),
        default=[300.0, 1800.0],
        help="seconds to start a device",
    )
    parser.add_argument(
        "--days",
        type=common.whole(2, 10**4),
        default=40,
        help="simulated days of a closed form; fewer than 20 are not known to 1%%",
    )
    parser.add_argument("--trace", type=Path, default=TRACE, help="CSV file of arrivals")
    parser.add_argument("--seed", type=common.whole(0, 10**9), default=1)
    options = parser.parse_args(arguments)
    peak, devices, days = options.peak, options.devices, options.days
    if options.quick:
        peak, devices, days = 0.2, 20, 2
    own = pools()
    curves = demands(peak, options.trace)
    found = {
        f"{name}, {start_s / 60:g} min to start": planned(own, curve, start_s, options.seed)
        for name, curve in curves.items()
        for start_s in options.starts
    }
    forms = autoscale_forms.forms(days, options.seed)
    mismatches = [
        autoscale_forms.rule_mismatches(autoscale_forms.small(), options.seed + number, rule)
        for number, rule in enumerate(autoscale_forms.RULES)
    ]
    fleet = thousand(own, devices, options.seed)
    columns = "figure", "theory", "simulated", "error", "standard error"
    checks = common.table(f"Closed forms, {days} days or more", *columns)
    for form in forms:
        row = f"{form.expected:.5g}", f"{form.simulated:.5g}", f"{form.error:+.2%}", f"{form.standard_error:.2%}"
        checks.add_row(form.name, *row)
    figures = {
        "demands": {name: figures_of(day) for name, (_, day) in found.items()},
        "closed_form_error_max": max(abs(form.error) for form in forms),
        "closed_form_standard_error_max": max(form.standard_error for form in forms),
        "rule_mismatches": sum(wrong for wrong, _ in mismatches),
        "rule_syncs": sum(syncs for _, syncs in mismatches),
        **fleet,
        "trace": "azure trace" in curves,
    }
    common.finish([*(show_day(name, day, s) for name, (s, day) in found.items()), checks], figures)
    return 0 if is_good(figures, quick=options.quick) else common.EXIT_FAILED


if __name__ == "__main__":
    common.run(main)
