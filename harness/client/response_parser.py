"""Parser of Triton's stream responses: the first of each form is decoded in full, later ones by fixed offsets."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tritonclient.grpc import service_pb2 as pb

from harness import wire

FINAL = "triton_final_response"
PLAIN = {wire.AUDIO_OUTPUT, wire.FRAME_INDEX, wire.SENT_AT_NS}
_SENT_AT = struct.Struct("<q")
BYTES_PER_SAMPLE = 4


def outputs_of(response: pb.ModelInferResponse) -> dict[str, bytes]:
    """The raw contents of the outputs, by name."""
    names = (output.name for output in response.outputs)
    return dict(zip(names, response.raw_output_contents, strict=True))


def is_final(response: pb.ModelInferResponse) -> bool:
    return response.parameters[FINAL].bool_param


@dataclass(frozen=True, slots=True)
class ChunkForm:
    """Where audio and time are in messages of one form: those of ``size`` bytes that begin with ``head``.

    ``head`` is everything before the audio: names, types, shapes and parameters of the response. They fix the length of
    each content, so in a message of equal head and size the contents are at the same offsets.
    """

    head: bytes
    size: int
    sent_at: int
    samples: int

    def fits(self, message: bytes) -> bool:
        return len(message) == self.size and message.startswith(self.head)

    def sent_at_ns(self, message: bytes) -> int:
        return _SENT_AT.unpack_from(message, self.sent_at)[0]

    def audio(self, message: bytes) -> bytes:
        return message[len(self.head) : len(self.head) + BYTES_PER_SAMPLE * self.samples]


def form_of(message: bytes, response: pb.ModelInferResponse) -> ChunkForm | None:
    """The form of a message with a chunk of audio, its time and nothing else; None for any other message."""
    contents = outputs_of(response)
    if set(contents) != PLAIN or not contents[wire.AUDIO_OUTPUT] or is_final(response):
        return None
    places = dict(zip(contents, _places(message, list(contents.values())), strict=True))
    if any(message[place : place + len(contents[name])] != contents[name] for name, place in places.items()):
        return None  # unlike in Triton's messages, the contents are not at the end
    first = min(places.values())
    if places[wire.AUDIO_OUTPUT] != first:
        return None
    samples = len(contents[wire.AUDIO_OUTPUT]) // BYTES_PER_SAMPLE
    return ChunkForm(message[:first], len(message), places[wire.SENT_AT_NS], samples)


def _places(message: bytes, contents: Sequence[bytes]) -> list[int]:
    """Offset of each content if they end the message, each after its tag and its length (a varint)."""
    places, end = [], len(message)
    for content in reversed(contents):
        places.append(end - len(content))
        end -= len(content) + 1 + max(-(-len(content).bit_length() // 7), 1)
    return places[::-1]
