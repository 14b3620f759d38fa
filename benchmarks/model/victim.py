"""An honest client beside an attack: its gaps, and whether it gets the audio that it requested."""

from __future__ import annotations

import threading
import time
from collections import deque

import grpc
import numpy as np
from malformed import request
from tritonclient.grpc import service_pb2_grpc

from harness import wire
from harness.client.stream import infer_message

VICTIM_FRAMES = 150
HANGS_S = 60  # a stream that continues this long after the attack hangs
TICK_S, LATE_S = 0.01, 0.02


class OwnStalls:
    """When this process could not run, as its cores or its interpreter were taken: no gap of a server's."""

    def __init__(self) -> None:
        self._stalls: deque[tuple[float, float]] = deque(maxlen=10_000)  # from and until, in monotonic seconds
        self._woke_s = time.monotonic()
        threading.Thread(target=self._run, daemon=True, name="own stalls").start()

    def _run(self) -> None:
        while True:
            time.sleep(TICK_S)
            slept_s, self._woke_s = self._woke_s, time.monotonic()
            self.note(slept_s, self._woke_s)

    def note(self, slept_s: float, woke_s: float) -> None:
        if woke_s - slept_s > TICK_S + LATE_S:
            self._stalls.append((slept_s + TICK_S, woke_s))

    def seconds(self, since_s: float, until_s: float) -> float:
        """The part of an interval in which this process could not run."""
        running = (self._woke_s + TICK_S, until_s)  # one that is not over
        parts = (min(until_s, end) - max(since_s, start) for start, end in (*self._stalls, running))
        return sum(part for part in parts if part > 0)


class Victim:
    """One stream after another; its audio must be the same as before the attack."""

    def __init__(self, url: str, own: OwnStalls | None = None):
        self.url, self.gaps_ms, self.failures, self.streams = url, [], [], 0
        self.expected: np.ndarray | None = None
        self.own = own or OwnStalls()
        self._waits_since: float | None = None  # for the server's next message, while a stream is open
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Victim:
        self._speak()  # alone, for comparison
        self.gaps_ms.clear()
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join(HANGS_S)
        if self._thread.is_alive():
            self.failures.append(f"its stream has not ended {HANGS_S} s after the attack")

    def again(self) -> Victim:
        """The same client from here on, with its counts so far."""
        victim = Victim(self.url, self.own)
        victim.expected, victim.failures, victim.streams = self.expected, self.failures, self.streams
        return victim

    def largest_gap_ms(self, at_least: int = 0) -> float:
        """The longest wait for a chunk since the last call, including first chunks and a wait in progress.

        Waits for ``at_least`` gaps, 30 s at most. Time in which this process could not run does not count.
        """
        deadline = time.monotonic() + 30
        while len(self.gaps_ms) < at_least and time.monotonic() < deadline:
            time.sleep(0.05)
        gaps, self.gaps_ms, since = self.gaps_ms, [], self._waits_since
        return max([*gaps, 0.0 if since is None else self._gap_ms(since, time.monotonic())])

    def _gap_ms(self, since_s: float, until_s: float) -> float:
        return 1e3 * (until_s - since_s - self.own.seconds(since_s, until_s))

    def _run(self) -> None:
        while not self._over.is_set():
            self._speak()

    def _speak(self) -> None:
        pieces, error = [], "no final answer"
        with grpc.insecure_channel(self.url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = infer_message(request("victim", frames=VICTIM_FRAMES, seed=3))
            self._waits_since = time.monotonic()
            try:
                for answer in stub.ModelStreamInfer(iter([message]), timeout=120):
                    now = time.monotonic()
                    if answer.error_message:
                        error = answer.error_message
                        break
                    if answer.infer_response.parameters["triton_final_response"].bool_param:
                        error = ""
                        break
                    outputs = [output.name for output in answer.infer_response.outputs]
                    if wire.AUDIO_OUTPUT in outputs:
                        self.gaps_ms.append(self._gap_ms(self._waits_since, now))
                        self._waits_since = now
                        pieces.append(answer.infer_response.raw_output_contents[outputs.index(wire.AUDIO_OUTPUT)])
            except grpc.RpcError as failed:
                error = f"{failed.code().name}: {failed.details()}"
            finally:
                self._waits_since = None
        self._judge(np.frombuffer(b"".join(pieces), "<f4"), error)

    def _judge(self, audio: np.ndarray, error: str) -> None:
        self.streams += 1
        if self.expected is None and not error:
            self.expected = audio
        if error or audio.shape != self.expected.shape:
            self.failures.append(error or f"{len(audio)} samples where {len(self.expected)} were requested")
        elif not np.allclose(audio, self.expected, atol=1e-3):
            self.failures.append("not the audio that it requested")
