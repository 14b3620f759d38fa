import math

import numpy as np
import pytest
import queueing
from hypothesis import given
from hypothesis import strategies as st

from harness.capacity.models import memory
from harness.errors import InputError


def batching_latency_s(rate_per_s: float, alpha_s: float, tau0_s: float, rng: np.random.Generator, n=100_000) -> float:
    """Mean latency of a server that takes all that wait as one batch, by simulation."""
    arrival_s = np.cumsum(rng.exponential(1 / rate_per_s, n))
    first, free_s, total_s = 0, 0.0, 0.0
    while first < n:
        start_s = max(free_s, arrival_s[first])
        last = np.searchsorted(arrival_s, start_s, side="right")
        free_s = start_s + alpha_s * (last - first) + tau0_s
        total_s += float(np.sum(free_s - arrival_s[first:last]))
        first = last
    return total_s / n


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.9])
def test_batching_bound_is_tight(load):
    alpha_s, tau0_s = 0.000_14, 0.001_9  # about those of ResNet-50 on a V100
    simulated = batching_latency_s(load / alpha_s, alpha_s, tau0_s, np.random.default_rng(7))
    bound = queueing.batching_latency_bound_s(load / alpha_s, alpha_s, tau0_s)
    assert simulated * 0.99 <= bound <= simulated * 1.03


def test_batching_latency_of_an_empty_system_is_one_service():
    assert queueing.phi0(0, 0.002, 0.01) == pytest.approx(0.012)


def test_batching_refuses_what_is_never_stable():
    with pytest.raises(InputError, match="never stable"):
        queueing.batching_latency_bound_s(1000, 0.001, 0.01)


def test_erlang_c_of_one_server_is_its_load():
    assert queueing.erlang_c(1, 0.7) == pytest.approx(0.7)


def test_erlang_c_of_two_servers():
    load = 0.6
    assert queueing.erlang_c(2, 2 * load) == pytest.approx(2 * load**2 / (1 + load))


@pytest.mark.parametrize(
    ("servers", "offered"), [(1, 0.0101), (2, 0.153), (5, 1.36), (10, 4.46), (20, 12.0), (50, 37.9), (100, 84.1)]
)
def test_erlang_b_is_that_of_the_published_table(servers, offered):
    """The 1% column of the usual Erlang B tables, at their three digits."""
    assert queueing.erlang_b(servers, offered) == pytest.approx(0.01, rel=0.025)  # of a load rounded to three


@pytest.mark.parametrize(
    ("servers", "offered", "published"), [(8, 5.0, 0.167), (2, 1.0, 1 / 3), (3, 2.0, 4 / 9), (5, 4.0, 0.5541)]
)
def test_erlang_c_is_that_of_published_examples(servers, offered, published):
    """Textbook values of M/M/c, at the digits that they are given with (5 Erlang on 8 agents: 16.7% wait)."""
    assert queueing.erlang_c(servers, offered) == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize(("beta", "published"), [(0.1, 0.88), (0.5, 0.50), (1.0, 0.22), (1.5, 0.08), (2.0, 0.03)])
def test_halfin_whitt_is_that_of_the_published_function(beta, published):
    """P(wait) by beta at the two digits that texts on staffing give it with."""
    assert queueing.halfin_whitt_wait_probability(beta) == pytest.approx(published, abs=0.006)


@given(servers=st.integers(1, 200), load=st.floats(0.01, 0.99))
def test_erlang_c_is_a_chance_that_falls_with_servers(servers, load):
    offered = servers * load
    here, more = queueing.erlang_c(servers, offered), queueing.erlang_c(servers + 1, offered)
    assert 0 <= more <= here <= 1


def test_mean_wait_of_one_server_is_pollaczek_khinchine():
    rate, service_s, scv = 0.8, 1.0, 2.5
    assert queueing.mean_wait_s(1, rate, service_s, service_scv=scv) == pytest.approx(0.8 / 0.2 * (1 + scv) / 2)
    assert queueing.mean_wait_s(1, 1.0, 1.0) == math.inf


def test_halfin_whitt_meets_erlang_c_in_a_large_pool():
    offered, beta = 10_000.0, 0.5
    exact = queueing.erlang_c(math.ceil(offered + beta * math.sqrt(offered)), offered)
    assert queueing.halfin_whitt_wait_probability(beta) == pytest.approx(exact, rel=0.01)


@given(offered=st.floats(0.5, 500), chance=st.floats(0.02, 0.8))
def test_square_root_staffing_is_within_a_server_or_two_of_the_exact(offered, chance):
    exact = queueing.exact_staffing(offered, chance)
    assert queueing.erlang_c(exact, offered) <= chance
    assert abs(queueing.square_root_staffing(offered, chance) - exact) <= 2


@pytest.mark.parametrize("chance", [0, 1])
def test_staffing_refuses_certainties(chance):
    with pytest.raises(InputError):
        queueing.square_root_staffing(10, chance)


def test_ninety_minutes_take_three_gigabytes():
    prompt_tokens, frames = 65_536 - 40_500, 40_500
    per_session = memory.session_bytes(prompt_tokens, frames, memory.KV_BYTES_PER_TOKEN["1.5b"])
    assert per_session == pytest.approx(3.04e9, rel=0.01)
