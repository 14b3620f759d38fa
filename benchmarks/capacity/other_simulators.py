"""The same two workloads in Ciw and in SimPy: many servers with one queue, and one server shared by all."""

from __future__ import annotations

import heapq
import math

import ciw
import numpy as np
import simpy


def ciw_servers(servers: int, rate_per_s: float, customers: int, seed: int) -> float:
    """M/M/c with a mean service time of one second: the mean wait."""
    return _ciw(servers, rate_per_s, customers, seed, {}, lambda record: record.waiting_time)


def ciw_sharing(rate_per_s: float, customers: int, seed: int) -> float:
    """M/M/1 with processor sharing and a mean work of one second: the mean sojourn time."""
    options = {"node_class": ciw.PSNode}
    return _ciw(math.inf, rate_per_s, customers, seed, options, lambda record: record.exit_date - record.arrival_date)


def _ciw(servers: float, rate_per_s: float, customers: int, seed: int, options: dict, figure) -> float:
    ciw.seed(seed)
    network = ciw.create_network(
        arrival_distributions=[ciw.dists.Exponential(rate=rate_per_s)],
        service_distributions=[ciw.dists.Exponential(rate=1.0)],
        number_of_servers=[servers],
    )
    simulation = ciw.Simulation(network, **options)
    simulation.simulate_until_max_customers(customers, method="Arrive")
    return float(np.mean([figure(record) for record in simulation.get_all_records()]))


def simpy_servers(servers: int, rate_per_s: float, customers: int, seed: int) -> float:
    """As ``ciw_servers``."""
    rng, environment, waits = np.random.default_rng(seed), simpy.Environment(), []
    resource = simpy.Resource(environment, servers)

    def customer(service_s):
        came_s = environment.now
        with resource.request() as turn:
            yield turn
            waits.append(environment.now - came_s)
            yield environment.timeout(service_s)

    def source():
        for gap_s, service_s in _gaps_and_works(rate_per_s, customers, rng):
            yield environment.timeout(gap_s)
            environment.process(customer(service_s))

    environment.process(source())
    environment.run()
    return float(np.mean(waits))


def simpy_sharing(rate_per_s: float, customers: int, seed: int) -> float:
    """As ``ciw_sharing``: one process serves, on a clock of the work each has received; an arrival interrupts it."""
    rng, environment = np.random.default_rng(seed), simpy.Environment()
    clock, present, stays = 0.0, [], []

    def server():
        nonlocal clock
        while True:
            began_s, count = environment.now, len(present)
            try:
                yield environment.timeout((present[0][0] - clock) * count) if present else environment.event()
                clock, came_s = heapq.heappop(present)
                stays.append(environment.now - came_s)
            except simpy.Interrupt as arrival:
                clock += (environment.now - began_s) / count if count else 0.0
                heapq.heappush(present, (clock + arrival.cause, environment.now))

    def source(serving):
        for gap_s, work_s in _gaps_and_works(rate_per_s, customers, rng):
            yield environment.timeout(gap_s)
            serving.interrupt(work_s)

    environment.process(source(environment.process(server())))
    environment.run()
    return float(np.mean(stays))


def _gaps_and_works(rate_per_s: float, customers: int, rng: np.random.Generator):
    gaps_s, works_s = rng.exponential(1 / rate_per_s, customers), rng.exponential(1.0, customers)
    return zip(gaps_s.tolist(), works_s.tolist(), strict=True)
