"""Results travel whole, and a records file survives a kill."""

import json
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.client.target import Target
from harness.errors import StoreError
from harness.records.load_log import (
    FILE_NAME,
    RecordsWriter,
    check_folder,
    mixture,
    read_records,
    request_from_plain,
    request_to_plain,
    result_from_plain,
    result_to_plain,
)
from harness.records.load_test import (
    AskedLoad,
    ClassRecord,
    HeldRung,
    ServerRequests,
    TestEnd,
    TestRun,
    UserRecord,
)
from harness.records.schema import Chunks, Outcome, Request, Result
from harness.records.store import read_load_test
from harness.records.summary import METRICS, Summary

int64s = st.integers(0, 2**63 - 1)
columns = st.integers(0, 5).flatmap(lambda n: st.tuples(*[st.lists(int64s, min_size=n, max_size=n)] * 3))


ASKED = AskedLoad(
    loop="open",
    arrivals="poisson",
    rate_per_s=2,
    mix="quick",
    users={"Reader": UserRecord(mix="quick", weight=1, fixed_count=0)},
    classes={"short": ClassRecord(share=1.0, mean_audio_s=2.5, speakers=(1, 2), slos={"rtf_p95": 0.9})},
    mean_audio_s=2.5,
    chunk_frames=1,
    diffusion_steps=10,
    seed=1,
    steady=None,
    iterations=None,
    readers=1,
    sessions=(),
    rung_s=10.0,
    precision=None,
    until_saturated=False,
)
RUN = TestRun(url="a:1", target=Target.of("a:1").record(), run_s=60, asked=ASKED)
END = TestEnd(
    origin_ns=1,
    start_ns=2,
    end_ns=9,
    warm_up_s=0.5,
    ladder_ended="",
    submitted=2,
    never_sent=0,
    lost=0,
    lag_p99_s=0.002,
    replicas=(ServerRequests(address="a:1", requests=2, reconnects=0, passed_over=0, forgotten=0),),
    valid=True,
    verdict="VALID",
    reasons=(),
    gates=(("audio", True, "3 frames"), ("steady state", None, "not asked for")),
    slos=(("rtf p95 of class short <= 0.9", None, 0.4),),
    machine=None,
    drift=None,
    summary=Summary(**dict.fromkeys((metric.name for metric in METRICS), 1.0)),
)


def result(chunks=((), (), ()), **changes) -> Result:
    fields = dict(
        request_id="r1", traffic_class="long", speakers=3, script_words=9, frames=2, start_frame=0, chunk_frames=1,
        loop="open", due_ns=1, sent_ns=2, ended_ns=9, outcome=Outcome.DONE,
    )  # fmt: skip
    return Result(**{**fields, **changes}, chunks=Chunks(*(np.array(column, np.int64) for column in chunks)))


def same(left: Result, right: Result) -> bool:
    return result_to_plain(left) == result_to_plain(right)


@given(columns, st.sampled_from(Outcome), st.text(max_size=20), int64s, st.booleans())
def test_a_result_comes_back_as_it_went(chunks, outcome, error, due_ns, emulated):
    sent = result(chunks, outcome=outcome, error=error, due_ns=due_ns, emulated=emulated)
    back = result_from_plain(msgpack.unpackb(msgpack.packb(result_to_plain(sent))))
    assert same(sent, back) and back.outcome is outcome and back.emulated is emulated
    assert back.chunks.received_ns.tolist() == list(chunks[0]) and back.chunks.samples.dtype == np.int64


def test_a_record_from_before_emulation_reads_as_computed():
    plain = result_to_plain(result())
    del plain["emulated"]
    assert result_from_plain(plain).emulated is False


def test_emulated_and_computed_answers_make_no_figure_together():
    chunks = ((5,), (4,), (3200,))
    computed, emulated, unanswered = result(chunks), result(chunks, emulated=True), result(outcome=Outcome.ERROR)
    assert mixture([computed, unanswered]) == mixture([emulated, emulated, unanswered]) == mixture([]) == ()
    assert mixture([emulated, computed, computed]) == ("1 of 3 responses were emulated and the others computed",)


@given(
    st.text(max_size=50),
    st.lists(int64s, max_size=4).map(tuple),
    int64s,
    st.lists(st.integers(0, 3), max_size=4).map(tuple),
    st.binary(max_size=30),
)
def test_a_request_comes_back_as_it_went(script, speaker_ids, due_ns, say, carry):
    sent = Request("r", "short", script, speaker_ids, 7, due_ns=due_ns, say=say, carry=carry, keep=True)
    assert request_from_plain(msgpack.unpackb(msgpack.packb(request_to_plain(sent)))) == sent


def test_a_file_is_read_back_in_order(tmp_path):
    writer = RecordsWriter(tmp_path / "new" / "folder", RUN)
    writer.result(result(request_id="a"))
    writer.rung(HeldRung(users=1, start_ns=5, end_ns=8))
    writer.result(result(request_id="b"))
    writer.end(END)
    records = read_records(tmp_path / "new" / "folder")
    assert records.run == RUN
    assert [each.request_id for each in records.results] == ["a", "b"]
    assert records.rungs == [HeldRung(users=1, start_ns=5, end_ns=8)]
    assert records.end == END


def test_a_kill_at_any_byte_loses_at_most_the_last_pair(tmp_path):
    writer = RecordsWriter(tmp_path, RUN)
    writer.result(result(request_id="a"))
    whole = writer.path.stat().st_size
    writer.result(result(request_id="b"))
    data = writer.path.read_bytes()
    for size in range(whole, len(data)):
        writer.path.write_bytes(data[:size])
        records = read_records(tmp_path)
        assert [each.request_id for each in records.results] == ["a"] and records.end is None


def test_earlier_records_are_never_overwritten(tmp_path):
    RecordsWriter(tmp_path, RUN)
    with pytest.raises(StoreError, match="new folder"):
        RecordsWriter(tmp_path, RUN)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    check_folder(tmp_path)
    (tmp_path / "manifest.json").touch()  # of a run of a plan, perhaps
    with pytest.raises(StoreError, match="holds other files: give --records a new folder"):
        check_folder(tmp_path)


def test_no_folder_can_be_made_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write"):
        RecordsWriter(tmp_path / "file" / "records", RUN)


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no records"),
        (b"", "empty"),
        (msgpack.packb(["run", {"schema": 2}]), "newer"),
        (b"\x93\x01\x02\x03", "damaged"),
        (b"\xc1", "damaged"),
        (msgpack.packb(["run", {"schema": 1}]) + msgpack.packb(["result", {"request_id": "a"}]), "damaged"),
    ],
)
def test_what_is_no_records_file(tmp_path, content, words):
    if content is not None:
        (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(StoreError, match=words):
        read_records(tmp_path)


SAMPLE = Path(__file__).resolve().parents[2] / "results" / "sample-load"
NEWER = {"users": {}, "verdict": ""}  # fields that the sample is older than


def test_the_stored_sample_is_read_whole_and_would_be_written_as_it_is():
    records = read_records(SAMPLE)
    stored = dict(
        pair
        for pair in msgpack.Unpacker((SAMPLE / FILE_NAME).open("rb"), max_buffer_size=0)
        if pair[0] in ("run", "end")
    )
    for record, kind in ((records.run, "run"), (records.end, "end")):
        content = {"schema": 1, **record.to_dict()}
        figures, before = content.pop("summary", {}), stored[kind].pop("summary", {})
        known = {name: value for name, value in before.items() if value == value}
        assert {name: figures[name] for name in known} == known
        expected = {name: NEWER[name] for name in NEWER if name in content} | {"schema": 1} | stored[kind]
        assert repr(sorted(content.items())) == repr(sorted(expected.items()))
    assert records.end.valid and records.run.asked.trace.arrivals == 19366


def test_the_stored_manifest_is_read_whole_and_would_be_written_as_it_is():
    content, manifest = json.loads((SAMPLE / "manifest.json").read_text()), read_load_test(SAMPLE / "manifest.json")
    written = json.loads(json.dumps({"schema": 1, **manifest.to_dict()}).replace("NaN", "null"))
    summary, stored = written["measured"].pop("summary"), content["measured"].pop("summary")
    assert {name: summary[name] for name in stored if stored[name] is not None} == {
        name: value for name, value in stored.items() if value is not None
    }
    assert (written["load"].pop("users"), written["certificate"].pop("verdict")) == ({}, "")  # newer than the sample
    assert written == content and list(written) == list(content)
    assert replace(manifest, end=None, requests=None).to_dict()["finished_at"] == content["finished_at"]


@pytest.mark.parametrize("end", [{"valid": True}, {**END.to_dict(), "submitted": "many"}])
def test_a_damaged_end_is_named(tmp_path, end):
    writer = RecordsWriter(tmp_path, RUN)
    with writer.path.open("ab") as file:
        file.write(msgpack.packb(["end", end]))
    with pytest.raises(StoreError, match="(?s)damaged at byte.*submitted"):
        read_records(tmp_path)
