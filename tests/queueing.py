"""Closed forms of queueing theory: a batching server without delay, pools of servers, and shared servers."""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize, stats

from harness.errors import InputError


def phi0(rate_per_s: float, alpha_s: float, tau0_s: float) -> float:
    """Inoue (arXiv 1912.06322, Theorem 2), first bound of the mean latency in seconds; tight at low load."""
    _check_batching(rate_per_s, alpha_s, tau0_s)
    load, setup = rate_per_s * alpha_s, rate_per_s * tau0_s
    return (alpha_s + tau0_s) / (2 * (1 - load)) * (1 + 2 * setup + (1 - setup) / (1 + load))


def phi1(rate_per_s: float, alpha_s: float, tau0_s: float) -> float:
    """Inoue (arXiv 1912.06322, Theorem 2), second bound of the mean latency in seconds; tight at high load."""
    _check_batching(rate_per_s, alpha_s, tau0_s)
    load = rate_per_s * alpha_s
    return 1.5 * tau0_s / (1 - load) + alpha_s / 2 * (load + 2) / (1 - load**2)


def batching_latency_bound_s(rate_per_s: float, alpha_s: float, tau0_s: float) -> float:
    """Upper bound min(phi0, phi1) of the mean latency, wait and service, of a batching server.

    Poisson arrivals at ``rate_per_s``; an idle server takes all that wait as one batch of S(b) = alpha b + tau0,
    without delay timer or batch limit. Raises InputError where rate x alpha is 1 or more (never stable).
    """
    return min(phi0(rate_per_s, alpha_s, tau0_s), phi1(rate_per_s, alpha_s, tau0_s))


def erlang_b(servers: int, offered: float) -> float:
    """Chance that an arrival of M/G/c/c finds no server free; ``offered`` = rate x mean service time.

    By the recursion B(0) = 1, B(k) = a B(k-1) / (k + a B(k-1)).
    """
    if servers < 1 or not offered >= 0:
        raise InputError(f"Erlang needs 1 server or more and an offered load of 0 or more: {servers}, {offered}")
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked


def erlang_c(servers: int, offered: float) -> float:
    """Chance that an arrival of M/M/c waits; ``offered`` = rate x mean service time; 1 where offered >= servers."""
    blocked = erlang_b(servers, offered)
    return 1.0 if offered >= servers else blocked / (1 - offered / servers * (1 - blocked))


def wait_above(servers: int, rate_per_s: float, service_s: float, wait_s: float) -> float:
    """Chance that an arrival of M/M/c waits longer: C exp(-(c / service - rate) wait), by Erlang C."""
    offered = rate_per_s * service_s
    return erlang_c(servers, offered) * math.exp(-max(servers - offered, 0.0) * wait_s / service_s)


def bounded_line(servers: int, places: int, rate_per_s: float, service_s: float) -> tuple[float, float]:
    """M/M/c/K with ``places`` in its queue, K = c + places: the share that is refused, and the mean wait of the others.

    P(n) ~ a^n / n! up to c, then each a / c times the one before (Kleinrock, Queueing Systems I, 3.5).
    """
    if servers < 1 or places < 0 or not (rate_per_s > 0 and service_s > 0):
        raise InputError("a bounded queue needs 1 server or more, 0 places or more, a rate and a service time above 0")
    offered = rate_per_s * service_s
    ratios = [offered / min(n, servers) for n in range(1, servers + places + 1)]
    chances = np.cumprod([1.0, *ratios])
    chances /= chances.sum()
    waiting = chances[servers:] @ np.arange(places + 1)
    return float(chances[-1]), float(waiting / (rate_per_s * (1 - chances[-1])))


def impatient_share(servers: int, rate_per_s: float, service_s: float, patience_s: float) -> float:
    """M/M/c in which an arrival gives up after ``patience_s`` in the queue: the share that does (Barrer, 1957).

    What a new arrival would wait has density rate P(c-1) exp(-(c mu - rate) x) up to the patience, and beyond it falls
    by exp(-c mu x), as none joins there; P(n) = a^n / n! P(0) below c.
    """
    if servers < 1 or not (rate_per_s > 0 and service_s > 0 and patience_s >= 0):
        raise InputError("patience needs 1 server or more, a rate and a service time above 0, and 0 seconds or more")
    offered, drift = rate_per_s * service_s, servers / service_s - rate_per_s
    below = np.cumprod([1.0, *(offered / n for n in range(1, servers))])
    inside = patience_s if abs(drift * patience_s) < 1e-9 else -math.expm1(-drift * patience_s) / drift
    beyond = math.exp(-drift * patience_s) * service_s / servers
    scale = rate_per_s * below[-1]
    return float(scale * beyond / (below.sum() + scale * (inside + beyond)))


def sharing_sessions(work_per_s: float, step_s: np.ndarray) -> float:
    """Mean sessions of a device whose sessions advance one frame a step, ``step_s`` [n] seconds with 1 to n of them.

    ``work_per_s``: frames that are asked for, a second. P(n) ~ work^n S(1) .. S(n) / n!, whatever the distribution of
    frames (Kelly, Reversibility and Stochastic Networks, 3.3). ``step_s`` must reach beyond what is at all likely.
    """
    n = np.arange(1, len(step_s) + 1)
    weights = np.concatenate([[0.0], np.cumsum(np.log(work_per_s * np.asarray(step_s) / n))])
    chances = np.exp(weights - weights.max())
    return float(chances[1:] @ n / chances.sum())


def sharing_stay_s(alone_s: float, load: float) -> float:
    """Mean time in M/G/1 with processor sharing of a session that takes ``alone_s`` alone: alone / (1 - load)."""
    return alone_s / (1 - load) if load < 1 else math.inf


def sessions_by_day(mean_per_s: float, swing: float, stay_s: float, at_s: float, period_s: float) -> float:
    """Mean sessions of M(t)/M/inf at ``at_s`` after the peak of a rate mean x (1 + swing cos(2 pi t / period)).

    Eick, Massey and Whitt, "M_t/G/infinity queues with sinusoidal arrival rates", 1993: it follows late and damped.
    """
    turn = 2 * math.pi / period_s
    late = turn * stay_s
    wave = (math.cos(turn * at_s) + late * math.sin(turn * at_s)) / (1 + late**2)
    return mean_per_s * stay_s * (1 + swing * wave)


def closed_loop_rate(users: int, servers: int, think_s: float, service_s: float) -> float:
    """Requests a second of ``users`` who think, ask, and wait for the answer, all exponential (the machine repairman).

    P(n) ~ (N! / (N - n)!) (service / think)^n / (n! up to c, then c! c^(n-c)); the rate is (N - mean n) / think.
    """
    if users < 1 or servers < 1 or not (think_s > 0 and service_s > 0):
        raise InputError("a closed loop needs 1 user and 1 server or more, and times above 0 seconds")
    ratios = [(users - n + 1) * service_s / think_s / min(n, servers) for n in range(1, users + 1)]
    weights = np.concatenate([[0.0], np.cumsum(np.log(ratios))])
    chances = np.exp(weights - weights.max())
    return float((users - chances @ np.arange(users + 1) / chances.sum()) / think_s)


def mean_wait_s(
    servers: int, rate_per_s: float, service_s: float, arrival_scv: float = 1.0, service_scv: float = 1.0
) -> float:
    """Mean wait of G/G/c by Allen-Cunneen: the wait of M/M/c times (Ca^2 + Cs^2) / 2. Exact for M/M/c and M/G/1.

    ``arrival_scv``, ``service_scv``: squared coefficients of variation (variance / mean^2). Infinite where unstable.
    """
    offered = rate_per_s * service_s
    if offered >= servers:
        return math.inf
    exponential = erlang_c(servers, offered) * service_s / (servers - offered)
    return exponential * (arrival_scv + service_scv) / 2


def halfin_whitt_wait_probability(beta: float) -> float:
    """P(wait) = [1 + beta Phi(beta) / phi(beta)]^-1 of a large pool with R + beta sqrt(R) servers (beta > 0)."""
    if not beta > 0:
        raise InputError(f"square-root staffing needs beta above 0, not {beta}")
    density = float(stats.norm.pdf(beta))
    return density / (density + beta * float(stats.norm.cdf(beta)))


def square_root_staffing(offered: float, wait_probability: float) -> int:
    """Servers c = ceil(R + beta sqrt(R)) that keep P(wait) at ``wait_probability`` (Halfin and Whitt, 1981)."""
    if not 0 < wait_probability < 1 or not offered > 0:
        raise InputError(f"staffing needs a load above 0 and a chance between 0 and 1: {offered}, {wait_probability}")
    beta = optimize.brentq(lambda b: halfin_whitt_wait_probability(b) - wait_probability, 1e-9, 38.0)
    return math.ceil(offered + beta * math.sqrt(offered))


def exact_staffing(offered: float, wait_probability: float) -> int:
    """Fewest servers of M/M/c with P(wait) at most ``wait_probability``, by Erlang C."""
    if not 0 < wait_probability < 1 or not offered > 0:
        raise InputError(f"staffing needs a load above 0 and a chance between 0 and 1: {offered}, {wait_probability}")
    servers = math.floor(offered) + 1
    while erlang_c(servers, offered) > wait_probability:
        servers += 1
    return servers


def _check_batching(rate_per_s: float, alpha_s: float, tau0_s: float) -> None:
    if min(rate_per_s, alpha_s, tau0_s) < 0:
        raise InputError("a rate and the times of a service are 0 or more")
    if rate_per_s * alpha_s >= 1:
        raise InputError(f"a rate of {rate_per_s:g} a second times alpha = {alpha_s:g} s is 1 or more: never stable")
