"""The public entry's contract with silence for audio, sent on a timetable that stands in the request's text.

Words of the text that are ``name=value``, in seconds or the index of a chunk; all others are ignored:

    first=0.2      when the first chunk leaves, counted from the request's arrival
    every=0.1333   from then on one chunk each so often
    stall=7:1.5    chunk 7 and those after it leave so much later; may stand several times
    error=5        a stage error in place of chunk 5
    end=5          the final response in place of chunk 5
    hang=5         nothing more from chunk 5 on

The config's parameter ``timetable`` holds words that apply to every request; its own words come after them. A chunk
that is behind leaves at once, and those after it keep their own times.
"""

from __future__ import annotations

import heapq
import itertools
import json
import re
import threading
import time

import numpy as np
import triton_python_backend_utils as pb

from harness import wire

WORD = re.compile(r"\b(first|every|stall|error|end|hang)=(\d+\.?\d*)(?::(\d+\.?\d*))?")
FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL
FAILURE = "the stage failed on its timetable"
CLOCKS = 4  # a send waits for Triton to take it: one thread alone would send no more than a few thousand a second
ASK_EVERY_S = 1.0  # whether the client has left costs as much as a chunk


class TritonPythonModel:
    def initialize(self, args):
        self.words = json.loads(args["model_config"])["parameters"]["timetable"]["string_value"]
        self.silence: dict[int, pb.Tensor] = {}
        self.clocks = [Clock() for _ in range(CLOCKS)]
        self.next_clock = itertools.cycle(self.clocks)

    def execute(self, requests):
        arrived_s = time.monotonic()
        for request in requests:
            speech = Speech(request, self.words, arrived_s, self.audio)
            next(self.next_clock).at(speech.due_s, speech)

    def finalize(self):
        for clock in self.clocks:
            clock.stop()
        self.silence.clear()  # tensors live in shared memory, which is gone before the interpreter is

    def audio(self, frames: int):
        if frames not in self.silence:
            samples = np.zeros(frames * wire.SAMPLES_PER_FRAME, np.float32)
            self.silence[frames] = pb.Tensor(wire.AUDIO_OUTPUT, samples)
        return self.silence[frames]


class Clock:
    """A thread that lets each of its speeches send when it is due."""

    def __init__(self):
        self.heap, self.count, self.stopped = [], itertools.count(), False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def at(self, due_s: float, speech: Speech) -> None:
        with self.changed:
            heapq.heappush(self.heap, (due_s, next(self.count), speech))
            self.changed.notify()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.thread.join()
        self.heap.clear()

    def run(self) -> None:
        while (speech := self.next_due()) is not None:
            if speech.send():
                self.at(speech.due_s, speech)

    def next_due(self) -> Speech | None:
        with self.changed:
            while not self.stopped:
                wait_s = self.heap[0][0] - time.monotonic() if self.heap else None
                if wait_s is not None and wait_s <= 0:
                    return heapq.heappop(self.heap)[2]
                self.changed.wait(wait_s)
        return None


class Speech:
    """One request, and how far its timetable has come."""

    def __init__(self, request, words: str, arrived_s: float, audio):
        self.sender, self.audio = request.get_response_sender(), audio
        self.frames = number(request, wire.FRAMES, 75)
        self.size = number(request, wire.CHUNK_FRAMES, 1)
        self.first_s = self.every_s = self.stalled_s = 0.0
        self.stalls, self.endings = {}, {}
        self.read(f"{words} {pb.get_input_tensor_by_name(request, wire.TEXT_INPUT).as_numpy().flat[0].decode()}")
        self.index, self.arrived_s, self.asked_s = 0, arrived_s, arrived_s
        self.due_s = self.chunk_due_s()

    def read(self, words: str) -> None:
        for name, value, seconds in WORD.findall(words):
            if name in ("first", "every"):
                setattr(self, f"{name}_s", float(value))
            elif name == "stall":
                self.stalls[int(value)] = float(seconds)
            else:
                self.endings[int(value)] = name

    def chunk_due_s(self) -> float:
        self.stalled_s += self.stalls.get(self.index, 0.0)
        return self.arrived_s + self.first_s + self.index * self.every_s + self.stalled_s

    def send(self) -> bool:
        """Send what is due; whether there is more to come, which is then due at ``due_s``."""
        first, ending = self.index * self.size, self.endings.get(self.index)
        if self.client_left() or ending == "end" or first >= self.frames:
            self.sender.send(flags=FINAL)
        elif ending == "error":
            self.sender.send(pb.InferenceResponse([], pb.TritonError(FAILURE)), flags=FINAL)
        elif ending == "hang":
            self.due_s += ASK_EVERY_S
            return True
        else:
            self.send_chunk(first, min(self.size, self.frames - first))
            return True
        return False

    def send_chunk(self, first: int, frames: int) -> None:
        audio, index = self.audio(frames), pb.Tensor(wire.FRAME_INDEX, np.array([first], np.int32))
        sent_at = pb.Tensor(wire.SENT_AT_NS, np.array([time.monotonic_ns()]))
        self.sender.send(pb.InferenceResponse([audio, index, sent_at]))
        self.index += 1
        self.due_s = self.chunk_due_s()

    def client_left(self) -> bool:
        if time.monotonic() < self.asked_s + ASK_EVERY_S:
            return False
        self.asked_s = time.monotonic()
        return self.sender.is_cancelled()


def number(request, name: str, default: int) -> int:
    tensor = pb.get_input_tensor_by_name(request, name)
    return default if tensor is None else int(tensor.as_numpy().flat[0])
