"""The servers of a target: how they are reached, which of them gets a request, and what they counted."""

import asyncio
import contextlib
import time
from collections import Counter

import grpc
import pytest
from fake_triton import FakeTriton, Timetable, start
from hypothesis import given
from hypothesis import strategies as st
from network import Network
from replicas import Replica, TlsFiles, served
from timetable_server import TimetableServer

from harness import wire
from harness.client.replicas import ConnectionStatistics
from harness.client.stream import SpeechClient
from harness.client.target import LEAST_LOADED, ROUND_ROBIN, Target, Tls
from harness.deploy.flags import server_flags
from harness.deploy.ports import free_ports
from harness.deploy.statistics import StatisticsReader, summed
from harness.errors import ServerError
from harness.records.schema import BatchStatistics, Outcome, Request, StageStatistics

SECRET = "Bearer s3cret"
LONG = 40  # frames


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return TlsFiles(tmp_path_factory.mktemp("tls"))


def request(name="r1", frames=2) -> Request:
    return Request(name, "short", "Speaker 1: Hi.", (0,), frames)


def reach(target_of, *, credentials=None):
    """A ready client's Result from one server, or the words of the ServerError: of ``target_of(address)``."""

    async def main():
        fake = Replica()
        async with served(fake, credentials=credentials) as (address,), SpeechClient(target_of(address)) as client:
            try:
                await client.ready()
            except ServerError as error:
                assert address in str(error) and "\n" not in str(error)
                return str(error)
            return await client.speak(request(), "open")

    return asyncio.run(main())


# --- how servers are reached


def test_tls_with_the_right_authority_speaks(files):
    credentials = files.credentials("localhost", "127.0.0.1")
    result = reach(lambda address: Target.of(address, Tls(files.ca)), credentials=credentials)
    assert result.outcome is Outcome.DONE


def test_tls_that_cannot_be_trusted_is_explained(files):
    here, elsewhere = files.credentials("127.0.0.1"), files.credentials("triton.example")
    words = reach(lambda address: Target.of(address, Tls(files.other_ca)), credentials=here)
    assert f"not signed by a trusted CA (--tls-ca {files.other_ca}" in words
    words = reach(lambda address: Target.of(f"grpcs://{address}"), credentials=here)
    assert "(public CAs: " in words and "give its CA with --tls-ca" in words
    words = reach(lambda address: Target.of(address, Tls(files.ca)), credentials=elsewhere)
    assert "for another name" in words and "--tls-server-name" in words
    named = Tls(files.ca, server_name="triton.example")
    assert reach(lambda address: Target.of(address, named), credentials=elsewhere).outcome is Outcome.DONE


def test_tls_on_one_side_only_is_explained(files):
    words = reach(Target.of, credentials=files.credentials("127.0.0.1"))
    assert "with TLS write grpcs://" in words
    assert "does not speak TLS: write grpc://" in reach(lambda address: Target.of(address, Tls(files.ca)))


def test_mutual_tls_takes_those_whom_it_trusts_and_says_so_to_others(files):
    def words(*pair):
        credentials = files.credentials("127.0.0.1", mutual=True)
        return reach(lambda address: Target.of(address, Tls(files.ca, *pair)), credentials=credentials)

    assert words(files.cert, files.key).outcome is Outcome.DONE
    assert "it asks for a client's --tls-client-cert and --tls-client-key" in words()
    assert f"it does not trust --tls-client-cert {files.other_cert}" in words(files.other_cert, files.other_key)


@pytest.mark.server
def test_triton_itself_with_mutual_tls(files, tmp_path, monkeypatch):
    made = files.authority.issue_cert("127.0.0.1")
    key = files.write("triton.key", made.private_key_pem.bytes())
    cert = files.write("triton.pem", b"".join(each.bytes() for each in made.cert_chain_pems))
    tls = [f"--grpc-server-cert={cert}", f"--grpc-server-key={key}", f"--grpc-root-cert={files.ca}"]
    tls.append("--grpc-use-ssl-mutual=1")
    monkeypatch.setattr("harness.deploy.server.server_flags", lambda *folders: [*server_flags(*folders), *tls])
    ours = Tls(files.ca, files.cert, files.key)

    async def speak(url, tls):
        async with SpeechClient(Target.of(url, tls)) as client:
            await client.ready()
            return await client.speak(request(), "open")

    with TimetableServer("every=0.01 first=0", root=tmp_path, tls=ours) as server:
        assert asyncio.run(speak(server.url, ours)).outcome is Outcome.DONE
        with pytest.raises(ServerError, match="it asks for a client's --tls-client-cert"):
            asyncio.run(speak(server.url, Tls(files.ca)))


def test_headers_go_with_every_call(files):
    headers = (("authorization", SECRET), ("x-team", "speech"))

    async def main():
        fake = Replica(executions=3)
        async with served(fake, credentials=files.credentials("127.0.0.1")) as (address,):
            target = Target.of(address, Tls(files.ca), headers=headers)
            async with SpeechClient(target) as client:
                await client.ready()
                await client.speak(request(), "open")
            with contextlib.closing(StatisticsReader(target)) as reader:
                _, stage = await asyncio.to_thread(reader.snapshot)
        return fake.headers, stage.executions

    seen, executions = asyncio.run(main())
    assert len(seen) == 5 and all(set(headers) <= set(each.items()) for each in seen)
    assert executions == 3


def test_a_server_that_lets_nobody_in_is_quoted():
    class Closed(Replica):
        async def ServerReady(self, request, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

    async def main():
        async with served(Closed()) as (address,), SpeechClient(address) as client:
            await client.ready()

    with pytest.raises(ServerError, match=r"rejected the credentials \(UNAUTHENTICATED: no token\): .* --header"):
        asyncio.run(main())


def test_a_server_behind_slow_lines_is_reached():
    """Its settings take 1.2 s to come: longer than gRPC may wait before it tries once more."""

    async def main():
        fake = FakeTriton(Timetable())
        server, address = await start(fake)
        with Network(address, delay_s=1.2) as network:
            began_s = time.monotonic()
            async with SpeechClient(Target.of(network.url, ready_s=60.0)) as client:
                await client.ready()
            await server.stop(None)
        return time.monotonic() - began_s

    assert asyncio.run(main()) > 1.2  # the lines were slow, and it was reached all the same


# --- which server gets a request


def spoken(fakes, count=12, at_once=False, first=0, **choice):
    """Results of ``count`` requests, and the place of the server that each was sent to."""

    async def main():
        async with served(*fakes) as addresses:
            async with SpeechClient(Target.of(addresses, **choice), first) as client:
                await client.ready()
                streams = [client.open(request(f"r{n}", frames=6), "open") for n in range(count)]
                if at_once:
                    results = await asyncio.gather(*(stream.run() for stream in streams))
                else:
                    results = [await stream.run() for stream in streams]
            return results, [addresses.index(result.target) for result in results]

    return asyncio.run(main())


@pytest.mark.parametrize("at_once", [False, True])
def test_round_robin_goes_through_the_servers_in_order(at_once):
    fakes = [Replica() for _ in range(3)]
    results, places = spoken(fakes, at_once=at_once)
    assert places == [0, 1, 2] * 4 and all(result.outcome is Outcome.DONE for result in results)
    assert [len(fake.requests) for fake in fakes] == [4, 4, 4]
    _, places = spoken(fakes, count=4, first=2)
    assert places == [2, 0, 1, 2]


def test_the_fewest_streams_come_first_and_equals_in_order():
    fakes = [Replica() for _ in range(3)]
    assert spoken(fakes, count=4, balance=LEAST_LOADED)[1] == [0, 0, 0, 0]  # one after another: none has any
    assert spoken(fakes, count=7, at_once=True, balance=LEAST_LOADED)[1] == [0, 1, 2, 0, 1, 2, 0]
    assert spoken(fakes, count=4, at_once=True, first=1, balance=LEAST_LOADED)[1] == [1, 2, 0, 1]


def test_least_loaded_gives_a_slow_server_less():
    """Four workers: two wait for the slow server until the quick one has served ten, and the other two go on."""
    enough = 10

    class Slow(Replica):
        async def ModelStreamInfer(self, request_iterator, context):
            await served_enough.wait()
            async for response in super().ModelStreamInfer(request_iterator, context):
                yield response

    async def work(client, left, quick):
        for _ in left:
            await client.speak(request(), "closed")
            if len(quick.requests) == enough:
                served_enough.set()

    async def main():
        quick = Replica()
        async with served(Slow(), quick) as addresses:
            async with SpeechClient(Target.of(addresses, balance=LEAST_LOADED)) as client:
                await client.ready()
                left = iter(range(2 + enough))
                await asyncio.gather(*(work(client, left, quick) for _ in range(4)))
        return len(quick.requests)

    served_enough = asyncio.Event()
    assert asyncio.run(main()) == enough


class Held(FakeTriton):
    """Speaks the long request to its end only when ``go_on`` is set."""

    async def _speak(self, inputs, arrived_s):
        spoken = super()._speak(inputs, arrived_s)
        yield await anext(spoken)
        if inputs[wire.FRAMES] == [LONG]:
            await self.go_on.wait()
        async for response in spoken:
            yield response


async def becomes(replica, *, down: bool) -> None:
    while replica.down is not down:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("balance, again_to_it", [(ROUND_ROBIN, 2), (LEAST_LOADED, 4)])
def test_a_server_that_goes_and_comes_back_is_one_reconnect_and_touches_no_other(balance, again_to_it):
    async def main():
        stays = Held(Timetable())
        stays.go_on = asyncio.Event()
        staying, here = await start(stays)
        going, gone = await start(FakeTriton(Timetable(hang_after=1)), *free_ports(1))
        async with SpeechClient(Target.of([here, gone], balance=balance)) as client:
            await client.ready()
            heard = asyncio.Semaphore(0)
            heard_of = dict(on_audio=lambda _: heard.release())
            streams = [client.open(request(f"r{n}", frames=LONG), "open", **heard_of) for n in range(2)]
            running = [asyncio.create_task(stream.run()) for stream in streams]
            for _ in range(2):
                await heard.acquire()
            await going.stop(None)
            struck = await running[1]
            replica = next(each for each in client.replicas._ring if each.address == gone)
            await becomes(replica, down=True)
            meanwhile = [await client.speak(request(f"m{n}"), "open") for n in range(3)]
            again, _ = await start(FakeTriton(Timetable()), int(gone.rpartition(":")[2]))
            await becomes(replica, down=False)
            after = [await client.speak(request(f"a{n}"), "open") for n in range(4)]
            stays.go_on.set()
            untouched = await running[0]
        await asyncio.gather(staying.stop(None), again.stop(None))
        assert struck.outcome is Outcome.ERROR and struck.target == gone and "ended the connection" in struck.error
        assert (untouched.outcome, untouched.target, len(untouched.chunks)) == (Outcome.DONE, here, LONG)
        assert [each.outcome for each in (*meanwhile, *after)] == [Outcome.DONE] * 7
        assert {each.target for each in meanwhile} == {here}
        assert Counter(each.target for each in after)[gone] == again_to_it
        assert client.replicas.reconnects == Counter({gone: 1})
        assert client.replicas.passed_over[gone] > 0 and not client.replicas.passed_over[here]

    asyncio.run(main())


def test_with_all_servers_down_requests_fail_in_words():
    async def main():
        server, address = await start(FakeTriton(Timetable()))
        async with SpeechClient(address) as client:
            await client.ready()
            await server.stop(None)
            await becomes(client.replicas._ring[0], down=True)
            return await client.speak(request(), "open"), client.replicas.passed_over

    result, passed_over = asyncio.run(main())
    assert result.outcome is Outcome.ERROR and "no Triton answers at" in result.error and not +passed_over


def test_a_server_that_was_started_again_is_found_out_by_what_it_does_not_remember():
    async def main():
        one, other = [await start(FakeTriton(Timetable()), port) for port in free_ports(2)]
        async with SpeechClient(Target.of([one[1], other[1]])) as client:
            await client.ready()
            before = [await client.speak(request(f"b{n}"), "open") for n in range(6)]
            assert (await client.replicas.connection_statistics()).forgotten == Counter()
            await other[0].stop(None)
            await becomes(client.replicas._ring[1], down=True)
            again, _ = await start(FakeTriton(Timetable()), int(other[1].rpartition(":")[2]))
            await becomes(client.replicas._ring[1], down=False)
            after = [await client.speak(request(f"a{n}"), "open") for n in range(4)]
            statistics = await client.replicas.connection_statistics()
        await asyncio.gather(one[0].stop(None), again.stop(None))
        assert [each.outcome for each in (*before, *after)] == [Outcome.DONE] * 10
        assert statistics.forgotten == Counter({other[1]: 3}) and statistics.reconnects == Counter({other[1]: 1})

    asyncio.run(main())


@pytest.mark.parametrize("started_again", [True, False])
def test_processes_that_share_a_server_know_together_what_it_forgot(started_again):
    async def main():
        server, address = await start(FakeTriton(Timetable()), *free_ports(1))
        async with SpeechClient(address, 0, of=2) as one, SpeechClient(address, 1, of=2) as other:
            for client in (one, other):
                await client.ready()
            for client in (one, other):
                await client.speak(request(), "open")
            if started_again:
                await server.stop(None)
                server, _ = await start(FakeTriton(Timetable()), int(address.rpartition(":")[2]))
                for client in (one, other):
                    await becomes(client.replicas._ring[0], down=False)
            await asyncio.gather(*(client.speak(request(), "open") for client in (one, other, other)))
            statistics = [await client.replicas.connection_statistics() for client in (one, other)]
        await server.stop(None)
        assert [each.forgotten for each in statistics] == [Counter()] * 2  # neither can tell alone
        return sum(
            map(ConnectionStatistics.from_plain, (each.to_plain() for each in statistics)), ConnectionStatistics()
        )

    expected = {"127.0.0.1": 2} if started_again else {}
    assert {each.partition(":")[0]: count for each, count in asyncio.run(main()).forgotten.items()} == expected


def test_a_server_that_is_not_ready_is_named_among_several():
    async def main():
        async with served(Replica(), Replica(Timetable(model_ready=False))) as addresses:
            async with SpeechClient(Target.of(addresses)) as client:
                with pytest.raises(ServerError, match=f"{addresses[1]} does not serve the model"):
                    await client.ready()

    asyncio.run(main())


# --- what servers counted

counts = st.builds(
    StageStatistics,
    stage=st.sampled_from(wire.STAGES),
    requests=st.integers(0, 9),
    executions=st.integers(0, 9),
    queue_ns=st.integers(0, 99),
    compute_ns=st.integers(0, 99),
    batches=st.lists(
        st.builds(BatchStatistics, st.integers(1, 4), st.integers(0, 9), st.integers(0, 99)),
        max_size=3,
        unique_by=lambda batch: batch.batch_size,
    ).map(tuple),
)


@given(st.lists(st.lists(counts, max_size=3, unique_by=lambda stage: stage.stage), max_size=3))
def test_statistics_of_several_servers_are_summed_by_stage(snapshots):
    total = {stage.stage: stage for stage in summed(snapshots)}
    every = [stage for snapshot in snapshots for stage in snapshot]
    assert set(total) == {stage.stage for stage in every}
    for name, stage in total.items():
        own = [each for each in every if each.stage == name]
        for field in ("requests", "executions", "queue_ns", "compute_ns"):
            assert getattr(stage, field) == sum(getattr(each, field) for each in own)
        sizes = [batch.batch_size for batch in stage.batches]
        assert len(sizes) == len(set(sizes))
        for batch in stage.batches:
            same = [b for each in own for b in each.batches if b.batch_size == batch.batch_size]
            assert batch.executions == sum(b.executions for b in same)
            assert batch.compute_ns == sum(b.compute_ns for b in same)


def test_a_sum_needs_every_server():
    async def main():
        async with served(Replica(executions=3), Replica(executions=4)) as addresses:
            with contextlib.closing(StatisticsReader(Target.of(addresses))) as reader:
                _, stage = await asyncio.to_thread(reader.snapshot)
            assert (stage.stage, stage.executions) == (wire.LLM, 7)
            with contextlib.closing(StatisticsReader(Target.of([*addresses, "127.0.0.1:9"]))) as reader:
                with pytest.raises(ServerError, match="no statistics: no Triton answers at 127.0.0.1:9"):
                    await asyncio.to_thread(reader.snapshot)

    asyncio.run(main())
