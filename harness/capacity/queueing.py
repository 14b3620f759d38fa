"""Closed forms of queueing theory: a batching server without delay, and pools of servers."""

from __future__ import annotations

import math

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


def erlang_c(servers: int, offered: float) -> float:
    """Chance that an arrival of M/M/c waits; ``offered`` = rate x mean service time; 1 where offered >= servers.

    From Erlang B by its recursion, B(0) = 1, B(k) = a B(k-1) / (k + a B(k-1)).
    """
    if servers < 1 or not offered >= 0:
        raise InputError(f"Erlang C needs 1 server or more and an offered load of 0 or more: {servers}, {offered}")
    if offered >= servers:
        return 1.0
    blocked = 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


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
