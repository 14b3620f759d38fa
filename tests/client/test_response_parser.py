"""A chunk that is read by place says what it would say if it were parsed."""

import struct

from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.client.response_parser import FINAL, form_of, is_final, outputs_of

NAMES = (wire.AUDIO_OUTPUT, wire.FRAME_INDEX, wire.SENT_AT_NS)
times = st.integers(-(2**63), 2**63 - 1)
audios = st.binary(min_size=1, max_size=90).map(lambda few: few * 4)


def response(audio: bytes, index: int, sent_at_ns: int, order=NAMES, more=(), **parameters) -> pb.ModelInferResponse:
    contents = {
        wire.AUDIO_OUTPUT: ("FP32", audio, len(audio) // 4),
        wire.FRAME_INDEX: ("INT32", struct.pack("<i", index), 1),
        wire.SENT_AT_NS: ("INT64", struct.pack("<q", sent_at_ns), 1),
    }
    made = pb.ModelInferResponse(model_name=wire.ENTRY, model_version="1", id="r1")
    for name, value in parameters.items():
        made.parameters[name].bool_param = value
    for name, (datatype, raw, size) in [*((name, contents[name]) for name in order), *more]:
        made.outputs.add(name=name, datatype=datatype, shape=[size])
        made.raw_output_contents.append(raw)
    return made


def sent(infer: pb.ModelInferResponse) -> bytes:
    return pb.ModelStreamInferResponse(infer_response=infer).SerializeToString()


@given(audios, st.integers(0, 2**31 - 1), times, st.data())
def test_what_is_read_by_place_is_what_is_parsed(audio, index, sent_at_ns, data):
    first = response(audio, index, sent_at_ns, **{FINAL: False})
    form = form_of(sent(first), first)
    other = data.draw(st.binary(min_size=len(audio), max_size=len(audio)))
    message = sent(response(other, index + 1 if index < 2**31 - 1 else 0, sent_at_ns // 2, **{FINAL: False}))
    assert form.fits(message) and form.fits(sent(first))
    assert (form.audio(message), form.samples) == (other, len(audio) // 4)
    assert (form.sent_at_ns(message), form.sent_at_ns(sent(first))) == (sent_at_ns // 2, sent_at_ns)


@given(audios, times)
def test_whatever_says_more_or_less_than_a_chunk_is_parsed(audio, sent_at_ns):
    plain = response(audio, 7, sent_at_ns)
    form = form_of(sent(plain), plain)
    others = [
        response(audio, 7, sent_at_ns, **{FINAL: True}),
        response(audio + bytes(4), 7, sent_at_ns),
        response(b"", 7, sent_at_ns),
        response(audio, 7, sent_at_ns, order=NAMES[:2]),
        response(audio, 7, sent_at_ns, order=NAMES[::-1]),
        response(audio, 7, sent_at_ns, more=[(wire.EMULATED, ("BOOL", b"\1", 1))]),
        response(audio, 7, sent_at_ns, more=[(wire.CARRY, ("UINT8", b"kept", 4))]),
    ]
    for each in others:
        assert not form.fits(sent(each))
    assert not form.fits(pb.ModelStreamInferResponse(error_message="x" * form.size).SerializeToString())
    assert [form_of(sent(each), each) is None for each in others] == [True, False, *[True] * 5]
    assert is_final(others[0]) and not is_final(plain) and outputs_of(plain)[wire.AUDIO_OUTPUT] == audio
