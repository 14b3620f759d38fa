"""From fit.json and the open-loop runs to plan.json: devices per target rate, and whether that can be signed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from harness.capacity.confirmation import confirm
from harness.capacity.device import Device
from harness.capacity.fit import limits_of
from harness.capacity.pools import Pools, drain_times_s
from harness.capacity.search import Traffic, range_name, steady_draws, steady_limit
from harness.records import Trial


def make_plan(
    fit: dict,
    trials: Sequence[Trial],
    requests: pd.DataFrame,
    mix,
    promises: Sequence,
    targets_qps: Sequence[float],
    rng: np.random.Generator,
    *,
    utilisation_cap: float,
    confidence: float,
    max_error: float,
    unit: str,
    preset: str,
    device: str,
    emulated: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict:
    """plan.json: the devices that each target needs on the best deployment, the validation, and the verdict.

    ``fit``: of fit_run. ``requests``: as for fit_run, the open-loop trials' among them. met: every target has a
    count inside the measured range, no open-loop run of the deployment failed (its predictions, its promises), and the
    one with the highest rate passed. missed: a promise cannot be kept at any rate on any deployment. inconclusive:
    anything else; ``reasons`` names the measurement that would settle it.
    """
    chosen = fit["deployments"][fit["best"]] if fit["best"] is not None else None
    plan = {
        "schema": 1,
        "verdict": "inconclusive",
        "reasons": [],
        "unit": unit,
        "preset": preset,
        "device": device,
        "emulated": emulated,
        "confidence": confidence,
        "utilisation_cap": utilisation_cap,
        "deployment": chosen["deployment"] if chosen else None,
        "promises": [_promise_record(promise) for promise in promises],
        "rate_per_device": _rate_record(chosen),
        "targets": [_no_target(qps) for qps in targets_qps],
        "validation": [],
        "open_runs": [],
        "drain": None,
    }
    if chosen is None:
        return plan | _without_rate(fit, targets_qps)
    deployment, judging = chosen["deployment"], {"confidence": confidence, "max_error": max_error}
    confirmed = confirm(deployment, trials, requests, mix, promises, rng, **judging)
    pools = _pools(fit, chosen, mix, promises, utilisation_cap)
    shares = steady_draws(pools.device, pools.limits, rng) / steady_limit(pools.device, pools.limits)[0]
    plan["validation"], plan["open_runs"] = confirmed.rows, confirmed.runs
    plan["targets"] = []
    for qps in targets_qps:
        if progress:
            progress(f"planning {qps:g} requests a second")
        plan["targets"].append(_target(pools, qps, shares, confidence, confirmed.highest_rate_per_s))
    plan["drain"] = _drain(pools, rng)
    doubts = [*confirmed.doubts, *_doubts_about(plan["targets"], chosen["step_time"]["max_sessions"])]
    verdict = "inconclusive" if doubts else "met"
    return plan | {"verdict": verdict, "reasons": [*doubts, *_remarks(fit, chosen, pools)]}


def _pools(fit: dict, chosen: dict, mix, promises: Sequence, utilisation_cap: float) -> Pools:
    limits = limits_of(chosen, promises, fit["session_limit"], fit["extrapolation"])
    traffic = Traffic.draw(mix, np.random.default_rng(fit["traffic_seed"]))
    return Pools(Device.from_fit(chosen), traffic, limits, utilisation_cap)


_TOO_NEAR = "One session alone is so near to breaking a promise that no number of devices is sure to keep it."


def _target(pools: Pools, qps: float, shares: np.ndarray, confidence: float, confirmed_rate: float) -> dict:
    """Devices for a target rate, their interval by the bootstrap of the rate per device, and what it rests on.

    ``confirmed_rate``: the highest rate per second that an open-loop run on one device has confirmed.
    """
    expected = int(pools.devices_for(qps, np.ones(1))[0])
    # The interpolation between simulated sizes may be a device short.
    loads = (pools.judge(qps, devices) for devices in range(expected, expected + 3 + expected // 20))
    load = next((load for load in loads if load.kept), None)
    if load is None:
        return _no_target(qps) | {"binding": pools.binding(expected), "note": _TOO_NEAR}
    devices = load.devices
    counts = pools.devices_for(qps, shares)
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(counts, tails, method="inverted_cdf")
    carried = float(pools.rates(np.array([devices]), qps)[0])
    in_range = load.sessions_p95 <= round(pools.device.max_sessions)
    return {
        "qps": qps,
        "devices": devices,
        "interval": [int(min(low, devices)), int(max(high, devices)) if math.isfinite(high) else None],
        "binding": pools.binding(devices),
        "utilisation": qps / (devices * pools.steady_rate()),
        "headroom_qps": max(carried - qps, 0.0),
        "devices_n_plus_1": devices + 1,
        "devices_n_plus_2": devices + 2,
        "sessions_per_device_p95": load.sessions_p95,
        "basis": _basis(in_range, devices == 1 and qps <= confirmed_rate),
        "note": "One device was measured; several are taken not to slow each other down." if devices > 1 else "",
    }


def _doubts_about(targets: list[dict], max_sessions: float) -> list[str]:
    if any(each["devices"] is None for each in targets):
        return [_TOO_NEAR + " Repeat the ladder, or choose a faster deployment."]
    if any(each["interval"][1] is None for each in targets):
        return [
            "The ladders are too noisy to bound the counts: with some likely step time one session alone breaks a "
            "promise. Repeat the ladder, with longer rungs and more of them."
        ]
    beyond = [f"{each['qps']:g}" for each in targets if each["basis"] == "extrapolated"]
    if not beyond:
        return []
    needed = max(each["sessions_per_device_p95"] for each in targets)
    return [
        f"The counts for {', '.join(beyond)} requests a second put up to {needed:.0f} sessions on a device, and "
        f"{max_sessions:.0f} were measured: add a rung at {needed:.0f} sessions to the ladder."
    ]


def _remarks(fit: dict, chosen: dict, pools: Pools) -> list[str]:
    """What a reader should know, and what does not change the verdict."""
    remarks = _left_out(fit)
    if chosen["binding"] == range_name(pools.limits):
        most = pools.limits.most_sessions
        remarks.append(
            f"No promise binds up to {most} sessions on a device, the most that were measured: the counts are on the "
            f"safe side, and a ladder beyond {most} sessions may show that fewer devices do."
        )
    return remarks


def _left_out(fit: dict) -> list[str]:
    return [f"{each['trial_id']} was left out: {'; '.join(each['reasons'])}." for each in fit["excluded"]]


def _without_rate(fit: dict, targets_qps: Sequence[float]) -> dict:
    """Verdict where no deployment has a rate: missed only if all were fitted, and all break a promise at any rate."""
    fits = fit["deployments"]
    unknown = [each for each in fits if each["inconclusive"]]
    if not fits:
        reasons = ["No ladder was measured: run the sweep."]
    elif unknown:
        reasons = [f"{_knobs(each['deployment'])}: {each['inconclusive']}." for each in unknown]
    else:
        reasons = [
            f"{_knobs(each['deployment'])}: no rate keeps {each['binding']}, not even one session." for each in fits
        ]
    broken = [each for each in fits if not each["inconclusive"]]
    missed = bool(fits) and not unknown
    binding = broken[0]["binding"] if broken else ""
    return {
        "verdict": "missed" if missed else "inconclusive",
        "reasons": [
            *reasons,
            *(f"{e['trial_id']} was not fitted: {'; '.join(e['reasons'])}." for e in fit["excluded"]),
        ],
        "deployment": broken[0]["deployment"] if missed else None,
        "rate_per_device": _rate_record(broken[0] if missed else None),
        "targets": [_no_target(qps) | {"binding": binding} for qps in targets_qps],
    }


def _rate_record(chosen: dict | None) -> dict:
    if chosen is None:
        return {"value": None, "interval": [None, None], "binding": "", "max_sessions_measured": None}
    return {
        "value": chosen["max_rate_per_s"],
        "interval": chosen["max_rate_interval"],
        "binding": chosen["binding"],
        "max_sessions_measured": chosen["step_time"]["max_sessions"],
    }


def _basis(in_range: bool, confirmed: bool) -> str:
    """How a count is known: one device at a rate that a run confirmed, simulated, or beyond what was measured."""
    if not in_range:
        return "extrapolated"
    return "measured" if confirmed else "simulated"


def _no_target(qps: float) -> dict:
    unknown = (
        "devices",
        "utilisation",
        "headroom_qps",
        "devices_n_plus_1",
        "devices_n_plus_2",
        "sessions_per_device_p95",
    )
    empty = dict.fromkeys(unknown) | {"interval": [None, None], "binding": "", "basis": ""}
    return {"qps": qps, **empty, "note": "No rate per device is known."}


def _promise_record(promise) -> dict:
    return {name: getattr(promise, name) for name in ("traffic_class", "metric", "quantile", "limit")}


def _drain(pools: Pools, rng: np.random.Generator) -> dict:
    """Seconds that a device takes to empty, at the sessions that it holds at its highest rate."""
    rate, _ = pools.rate(1)
    sessions = max(round(pools.judge(rate, 1).sessions), 1)
    times_s = drain_times_s(pools.device, pools.traffic, sessions, rng)
    return {"sessions": sessions, "p50_s": float(np.median(times_s)), "p95_s": float(np.quantile(times_s, 0.95))}


def _knobs(deployment: dict) -> str:
    return ", ".join(f"{knob} {value}" for knob, value in deployment.items()) or "the deployment"
