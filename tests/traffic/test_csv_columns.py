"""CSV files of many programs: read as they were meant, or refused by line; never silently as something else."""

import csv
import io
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError
from harness.traffic.csv_columns import read_column

FILE = Path("trace.csv")
INPUTS = Path(__file__).parents[3] / "shared" / "data" / "inputs"


def times(content, name="TIMESTAMP"):
    content = content if isinstance(content, bytes) else content.encode()
    seconds, form = read_column(FILE, name, content).times()
    return seconds.tolist(), form


@pytest.mark.parametrize(
    ("content", "seconds", "form"),
    [
        ("TIMESTAMP\n0,5\n1,25\n2,75\n", [0, 0.75, 2.25], "seconds"),
        ("timestamp;n\n0,5;1\n1,25;1\n", [0, 0.75], "seconds"),
        ("n\tTime Stamp\n1\t3\n1\t5\n", [0, 2], "seconds"),
        ("sep=;\nTIMESTAMP;n\n1;x,y\n4;z\n", [0, 3], "seconds"),
        ("\ufeffTIMESTAMP,n\n1,2\n3,4\n", [0, 2], "seconds"),
        ("TIMESTAMP,n\r1,2\r3,4\r", [0, 2], "seconds"),
        ('"a;b",TIMESTAMP\n"x;y",1\n"z",2\n', [0, 1], "seconds"),
        ("TIMESTAMP,n\n\n 1 ,2\n\n3,4\n,\n,\n", [0, 2], "seconds"),
        ("TIMESTAMP,text\n1,\"two\nlines\"\n2,x\n", [0, 1], "seconds"),
        ("TIMESTAMP\n2023-11-16 18:15:46,680\n2023-11-16 18:15:46,995\n2023-11-16 18:15:47,250\n", [0, 0.315, 0.57],
         "dates"),
        ('TIMESTAMP,level\n"2023-11-16 18:15:46,680",INFO\n"2023-11-16 18:15:47,000",INFO\n', [0, 0.32], "dates"),
        ("TIMESTAMP\n2023-11-16\n2023-11-17T00:00Z\n".replace("Z", ""), [0, 86400], "dates"),
        ("TIMESTAMP\n2023-11-16 18:15:46 +0100\n2023-11-16 17:15:47 UTC\n", [0, 1], "dates"),
        ("timestamp,n\n1700000000000,1\n1700000000500,1\n1700000001000,1\n", [0, 0.5, 1], "epoch milliseconds"),
        ("timestamp\n1700000000\n1700000000.5\n", [0, 0.5], "epoch seconds"),
        ("timestamp\n1700000000000000\n1700000000250000\n", [0, 0.25], "epoch microseconds"),
        ("timestamp\n1700000000000000001\n1700000000000000003\n", [0, 2e-9], "epoch nanoseconds"),
    ],
)  # fmt: skip
def test_a_column_is_read_as_it_was_meant(content, seconds, form):
    read, said = times(content)
    assert read == pytest.approx(seconds, abs=1e-12) and said == form


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "trace.csv: the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"TIMESTAMP\n", "a header and no rows"),
        (b'TIMESTAMP,a\n1,"x\n2,y\n3,z\n', "line 2: a quote that begins here is not closed"),
        (b'TIMESTAMP,a\n1,"x\n2,y\n3,"\n4,z\n', "line 2: a quote that begins here goes on to line 4"),
        (b'TIMESTAMP,a\n1,"x"y\n', "line 2: a quote"),
        (b"TIMESTAMP,n\n1,2\n0,5,1\n", "line 3: 3 fields, where the first row has 2, separated by commas: '0,5,1'"),
        (b"TIMESTAMP,n\n1\n", "line 2: 1 fields, where the first row has 2"),
        (b"TIMESTAMP,n\n,1\n2,2\n", "line 2: an empty field is no time"),
        (b"a,b\n1,2\n", "line 1: none of 2 columns is named TIMESTAMP; the first row is 'a, b'"),
        (b"0,5\n1,25\n", "line 1: none of 2 columns .* there is no header; .*decimal points"),
        (b"timestamp,TIMESTAMP\n1,2\n", "line 1: 2 columns are named TIMESTAMP"),
        (b"# a comment\n1\n", "line 1: '# a comment' is no time"),
        (b"TIMESTAMP\n1,234\n2,345\n", "line 2: '1,234' may be 1234 or 1.234: write it without a comma"),
        (b"TIMESTAMP\n1,5\n1.5\n", "line 3: '1.5' has a point where line 2 has a comma"),
        (b"TIMESTAMP\n1.234,5\n", "line 2: '1.234,5' is no time"),
        (b"TIMESTAMP\n1_000\n", "line 2"),
        (b"TIMESTAMP\n1e999\n", "line 2: '1e999' is too large"),
        (b"TIMESTAMP\n16/11/2023 18:15\n", "line 2: .* is no time .write seconds, or dates"),
        (b"TIMESTAMP\n2023-02-30 18:15\n", "line 2: '2023-02-30 18:15' is not a date and time"),
        (b"TIMESTAMP\n2023-11-16T18:15Z\n2023-11-16T18:16\n", "line 3: .* some times name an offset"),
        (b"TIMESTAMP\n20231116\n20231117\n", "which unit are they in"),
        (b"TIMESTAMP\n0\n1700000000000\n", "which unit are they in"),
        (b"uptime_ms\n0\n500\n", "line 1: the column 'uptime_ms' seems to hold ms"),
        (b"TIMESTAMP\n1\n\xff\n", "line 3: is not UTF-8"),
        ("TIMESTAMP\n1\n".encode("utf-16-le"), "line 1: holds a zero byte"),
        (b"PK\x03\x04\x00\x00", "holds a zero byte"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_by_its_line(content, message):
    with pytest.raises(InputError, match=message):
        times(content)


def test_a_field_of_any_size_is_a_field():
    """The csv module ends at 131,072 characters, by an error of its own."""
    before = csv.field_size_limit()
    assert times(f"TIMESTAMP,prompt\n1,{'x' * 131_073}\n3,y\n")[0] == [0, 2]
    assert csv.field_size_limit() == before


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: cannot be read: it is a folder"):
        read_column(tmp_path, "TIMESTAMP")
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        read_column(tmp_path / "none.csv", "TIMESTAMP")


def number_forms():
    """(what is written, what it means), with decimal points or commas."""
    cents = st.integers(0, 10**8)
    places = st.integers(0, 3)
    mark = st.sampled_from(".,")

    def write(cents, places, mark):
        whole, rest = divmod(cents, 10**places)
        return (f"{whole}{mark}{rest:0{places}}" if places else f"{whole}"), whole + rest / 10**places

    return mark.flatmap(lambda mark: st.lists(st.builds(write, cents, places, st.just(mark)), min_size=1, max_size=6))


def moment_forms():
    def write(milliseconds, mark, between):
        moment = datetime(2023, 10, 29) + timedelta(milliseconds=milliseconds)
        text = f"{moment:%Y-%m-%d}{between}{moment:%H:%M:%S}{mark}{milliseconds % 1000:03}"
        return text, milliseconds / 1000

    one = st.builds(write, st.integers(0, 10**8), st.sampled_from(".,"), st.sampled_from("T "))
    return st.lists(one, min_size=1, max_size=6)


TEXT = st.text(st.sampled_from("ab \"',;\t|.\n0123é"), max_size=8)


@given(
    values=number_forms() | moment_forms(),
    others=st.lists(TEXT, min_size=6, max_size=6),
    place=st.sampled_from(["alone", "before", "after"]),
    header=st.sampled_from(["TIMESTAMP", " timestamp ", "Time Stamp", '"TIMESTAMP"']),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, None]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_a_program_wrote_is_read_back_or_refused(
    values, others, place, header, delimiter, end, quoting, encoding
):  # fmt: skip
    """``quoting`` None: a program that joins fields and knows nothing of quotes."""
    header = header.strip('"') if quoting is not None else header
    texts, meant = zip(*values, strict=True)
    rows = [[header], *([text] for text in texts)]
    for row, other in zip(rows, ["words", *others], strict=False):
        if place != "alone":
            row.insert(0 if place == "before" else 1, other if quoting is not None else str(len(other)))
    file = io.StringIO()
    if quoting is None:
        file.write("".join(delimiter.join(row) + end for row in rows))
    else:
        csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    try:
        seconds, _ = times(file.getvalue().encode(encoding))
    except InputError as error:
        assert "trace.csv: line " in str(error) or "which unit" in str(error)
        plain = all("," not in text for text in texts) and place == "alone" and max(meant) < 10**7
        assert not plain, error
        return
    assert seconds == pytest.approx(np.array(meant) - min(meant), abs=1e-6)


@given(st.text(st.sampled_from('TIMESTAMP,;\t"\n\r0123456789.-: Ze+é'), max_size=60) | st.text())
def test_any_text_is_a_column_or_an_input_error(text):
    try:
        seconds, _ = times(text.encode("utf-8", "surrogatepass"))
    except InputError:
        return
    assert np.all(np.isfinite(seconds)) and min(seconds) == 0


@given(st.binary(max_size=80))
def test_any_bytes_are_a_column_or_an_input_error(content):
    try:
        read_column(FILE, "seconds", content).numbers("length")
    except InputError as error:
        assert str(error).startswith("trace.csv: ")


@pytest.mark.skipif(not INPUTS.is_dir(), reason="no ../shared/data beside the repository")
def test_the_inputs_that_once_came_out_wrong():
    assert times((INPUTS / "trace_decimal_comma.csv").read_bytes())[0] == [0, 0.75, 2.25]
    assert times((INPUTS / "trace_logging_comma.csv").read_bytes())[0] == pytest.approx([0, 0.315, 0.57])
    assert times((INPUTS / "trace_epoch_ms.csv").read_bytes()) == ([0, 0.5, 1], "epoch milliseconds")
    assert read_column(INPUTS / "lengths_other_case.csv", "seconds").numbers("length") == [10, 20, 30]
    with pytest.raises(InputError, match="line 2: a quote"):
        times((INPUTS / "trace_open_quote.csv").read_bytes())
