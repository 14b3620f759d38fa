"""The cost of device counts, and when traffic growth exceeds them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from harness import wire
from harness.records.plan import Forecast, ForecastRow, PlannedTarget

if TYPE_CHECKING:
    from harness.capacity.planning.pools import Pools  # compiles; estimates of cards have costs without it

MONTHS = (3, 6, 12)
MOST_DEVICES = 100_000  # largest count of a forecast
_PLACES = "the Triton at ", "Triton of ", "host of the Ray cluster "  # these name a place, not a type


def price_of(prices: Mapping[str, float], device: str) -> tuple[str, float] | None:
    """The type among ``prices`` (type -> price per GPU or host and hour) in a device's name, and its price.

    Matches whole words, and the longest type that fits: "H100 NVL" before "H100", and "A10" does not match "A100". A
    device with several GPUs costs their sum: "2 NVIDIA H100", "2 emulated NVIDIA H100", "NVIDIA A10 and 2 NVIDIA L4".
    None where one of them has no price, or the name only says where the device is.
    """
    if device.startswith(_PLACES):
        told = re.search(r" \((.+)\)$", device)
        return price_of(prices, told[1]) if told else None
    parts = [part for each in device.split(" and ") if (part := re.fullmatch(r"(?:(\d+) )?(.+)", each))]
    fitting = [max((each for each in prices if _holds(part[2], each)), key=len, default=None) for part in parts]
    kinds = [kind for kind in fitting if kind is not None]
    if not kinds or len(kinds) < len(fitting):
        return None
    counts = [int(part[1] or 1) for part in parts]
    names = [kind if count == 1 else f"{count} x {kind}" for count, kind in zip(counts, kinds, strict=True)]
    return " + ".join(names), sum(count * prices[kind] for count, kind in zip(counts, kinds, strict=True))


def _holds(device: str, kind: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(kind)}(?!\w)", device, re.IGNORECASE) is not None


def with_costs(target: PlannedTarget, price_per_hour: float, mean_frames: float) -> PlannedTarget:
    """Add the costs: of an hour of its devices, and of an hour of audio with the interval of the count."""

    def per_audio_hour(devices: int | None) -> float | None:
        return cost_per_audio_hour(devices, target.qps, price_per_hour, mean_frames)

    low, high = target.interval
    return replace(
        target,
        cost_per_hour=None if target.devices is None else target.devices * price_per_hour,
        cost_per_audio_hour=per_audio_hour(target.devices),
        cost_per_audio_hour_interval=(per_audio_hour(low), per_audio_hour(high)),
    )


def cost_per_audio_hour(devices: int | None, qps: float, price_per_hour: float, mean_frames: float) -> float | None:
    """Cost of an hour of audio with this many devices at a rate; None where the number is not known.

    Also its energy (kWh), with the power of a device (kW) as its price.
    """
    return None if devices is None else devices * price_per_hour / (qps * mean_frames * wire.SECONDS_PER_FRAME)


def with_energy(target: PlannedTarget, watts: float, mean_frames: float) -> PlannedTarget:
    """Add the kWh of an hour of audio, if each device draws so many watts all the time."""
    per_audio_hour = cost_per_audio_hour(target.devices, target.qps, watts / 1000, mean_frames)
    return replace(target, kwh_per_audio_hour=per_audio_hour)


def forecast(pools: Pools, targets: Sequence[PlannedTarget], growth_per_month: float, fleet: int | None) -> Forecast:
    """plan.json's ``forecast``: when rates that grow by a share each month exceed what the devices sustain.

    For each target: the months until its own count, one more spare, and the ``fleet`` (existing devices) are too few,
    0 where they already are, None where they never will be; and its devices after some months, None beyond
    ``most_devices``.
    """
    rows = [_forecast(pools, each, growth_per_month, fleet) for each in targets if each.devices is not None]
    return Forecast(
        growth_per_month=growth_per_month,
        fleet=fleet,
        most_devices=MOST_DEVICES,
        basis="extrapolated",
        targets=tuple(rows),
    )


def _forecast(pools: Pools, target: PlannedTarget, growth: float, fleet: int | None) -> ForecastRow:
    qps = target.qps

    def months(devices: int | None) -> float | None:
        return None if devices is None else months_until(qps, carried(pools, devices), growth)

    after = {str(n): float(pools.devices_for(qps * (1 + growth) ** n, np.ones(1))[0]) for n in MONTHS}
    return ForecastRow(
        qps=qps,
        months_until_too_small=months(target.devices),
        months_until_too_small_n_plus_1=months(target.devices_n_plus_1),
        months_until_fleet_too_small=months(fleet),
        devices_after_months={n: int(count) if count <= MOST_DEVICES else None for n, count in after.items()},
    )


def carried(pools: Pools, devices: int) -> float:
    """Requests/s that this many devices sustain."""
    return float(pools.rates(np.array([devices]), math.inf)[0])


def months_until(qps: float, limit_qps: float, growth: float) -> float | None:
    """Months until a rate that grows by the share ``growth`` per month exceeds a limit; None for never.

    ln(limit / rate) / ln(1 + growth).
    """
    if qps >= limit_qps:
        return 0.0
    return math.log(limit_qps / qps) / math.log1p(growth) if growth > 0 else None
