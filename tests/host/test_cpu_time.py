"""CPU time of the host and its processes: nothing is counted twice, and children that ended are not lost."""

import os
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from harness.host.cpu_time import HostTime, ProcessTime, descendants, processes, used_by, used_s

SPINS = "import time; end = time.process_time() + {}\nwhile time.process_time() < end: pass"


def process(pid, parent=1, own_s=0.0, reaped_s=0.0, started=0) -> ProcessTime:
    return ProcessTime(pid, parent, f"p{pid}", started, own_s, reaped_s)


def by_pid(*each: ProcessTime) -> dict[int, ProcessTime]:
    return {one.pid: one for one in each}


def test_a_tree_is_its_roots_and_all_below_them():
    found = by_pid(process(1, 0), process(5), process(6, 5), process(7, 6), process(8))
    assert descendants(found, [5]) == {5, 6, 7} and descendants(found, [99, 8]) == {8}
    assert descendants(by_pid(process(3, 4), process(4, 3)), [3]) == {3, 4}  # read while pids were reused


def test_a_child_that_ended_counts_only_what_it_used_since():
    before = by_pid(process(5, own_s=10), process(6, 5, own_s=100, reaped_s=3))
    now = by_pid(process(5, own_s=10.5, reaped_s=103.7))  # the child used 0.7 s more
    assert round(used_s(before, now)[5], 9) == 1.2


def test_a_whole_branch_that_ended_counts_only_what_it_used_since():
    before = by_pid(process(5), process(6, 5, own_s=40), process(7, 6, own_s=20))
    now = by_pid(process(5, reaped_s=60.5))
    assert round(used_s(before, now)[5], 9) == 0.5


def test_where_nobody_waits_for_children_the_time_of_others_stays():
    before = by_pid(process(5, own_s=10), process(6, 5, own_s=100))
    assert used_s(before, by_pid(process(5, own_s=11)))[5] == 1


def test_a_pid_that_is_used_again_is_another_process():
    before, now = by_pid(process(6, own_s=100)), by_pid(process(6, own_s=0.25, started=7))
    assert used_s(before, now) == {6: 0.25} and used_by(used_s(before, now), {6, 9}) == 0.25


@given(st.lists(st.tuples(st.integers(0, 8), st.floats(0, 50), st.floats(0, 5), st.booleans()), max_size=9))
def test_the_times_of_a_tree_add_up_however_its_processes_end(drawn):
    """Every process waits for its children: what all used together is what the survivors are charged with."""
    drawn = [(0, 1.0, 0.5, False), *drawn]
    parents = [min(parent, max(number - 1, 0)) for number, (parent, *_) in enumerate(drawn)]
    ends = []
    for number, (_, _, _, ended) in enumerate(drawn):
        ends.append(number > 0 and (ended or ends[parents[number]]))
    before = by_pid(
        *(process(10 + n, 10 + parents[n] if n else 1, own_s=was) for n, (_, was, _, _) in enumerate(drawn))
    )
    finals = [was + more for _, was, more, _ in drawn]
    reaped = [0.0] * len(drawn)
    for number in reversed(range(1, len(drawn))):
        if ends[number]:
            reaped[parents[number]] += finals[number] + reaped[number]
    alive = [n for n in range(len(drawn)) if not ends[n]]
    now = by_pid(*(process(10 + n, 10 + parents[n] if n else 1, finals[n], reaped[n]) for n in alive))
    assert abs(sum(used_s(before, now).values()) - sum(more for _, _, more, _ in drawn)) < 1e-6


def test_this_host_counts_what_a_process_and_its_ended_children_use():
    before, host = processes(), HostTime.read()
    subprocess.run([sys.executable, "-c", SPINS.format(0.3)], check=True)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    now, later = processes(), HostTime.read()
    used = used_by(used_s(before, now), descendants(now, [os.getpid()]))
    whole_s = (later.at_s - host.at_s) * host.cores
    assert 0.45 <= used <= whole_s + 0.1 and host.cores == os.cpu_count()
    assert later.counted_s - host.counted_s > 0.5 * whole_s
