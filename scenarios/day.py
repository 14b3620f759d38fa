"""A day of the studio in minutes: listeners come and go with the hours, and authors have tasks made beside them.

    locust -f scenarios/day.py --headless --host http://127.0.0.1:8080 --day-minutes 20 --listeners 12 --authors 3
    locust -f scenarios/day.py --headless --host https://a.example --key-file key.txt --ttfa-p95 2 --turnaround-p95 4x

Listeners follow a cosine, from a tenth of --listeners at night, when the day begins, to all of them at its peak. The
row "first audio" has the time from a request to its first samples; rows of tasks are as in scenarios/jobs.py.
"""

import math
import random
import time

from jobs import TEXT, WORDS_PER_S, Author, StudioUser, judged, must_be_one_process
from locust import LoadTestShape, constant, events, task

NIGHT = 0.1  # of the listeners at the peak
__all__ = ["Author"]  # Locust runs what stands here


@events.init_command_line_parser.add_listener
def _(parser):
    parser.add_argument("--day-minutes", type=float, default=20, help="minutes in which a day passes")
    parser.add_argument("--listeners", type=int, default=8, help="listeners at the peak of the day")
    parser.add_argument("--authors", type=int, default=2, help="authors, all day long")
    parser.add_argument("--stream-seconds", type=float, default=10, help="mean seconds of audio of a stream")
    parser.add_argument("--ttfa-p95", type=float, default=0, help="SLO on the first audio of streams, seconds; 0: none")


@events.init.add_listener
def _(environment, **_more):
    environment.first_audio = []
    if environment.parsed_options.ttfa_p95:
        must_be_one_process(environment, "--ttfa-p95")
    if (authors := environment.parsed_options.authors) > 0:
        Author.fixed_count = authors
    else:  # Locust takes a fixed count of 0 as none
        environment.user_classes = [each for each in environment.user_classes if each is not Author]


@events.quitting.add_listener
def _(environment, **_more):
    if limit_s := environment.parsed_options.ttfa_p95:
        found = sorted(environment.first_audio)
        value_s = found[math.ceil(0.95 * len(found)) - 1] if found else math.inf
        shown = f"{value_s:.3g} s" if found else "nothing was measured"
        judged(environment, f"first audio p95 <= {limit_s:g} s", value_s <= limit_s, shown)


class Day(LoadTestShape):
    """Users over a day that begins at night."""

    def tick(self):
        given = self.runner.environment.parsed_options
        passed = self.get_run_time() / (60 * given.day_minutes)
        if passed >= 1:
            return None
        share = NIGHT + (1 - NIGHT) * (1 - math.cos(2 * math.pi * passed)) / 2
        return given.authors + max(1, round(share * given.listeners)), 10


class Listener(StudioUser):
    """Asks for speech and hears it to its end, which is over once it has been spoken."""

    wait_time = constant(0.5)

    @task
    def listen(self):
        given = self.environment.parsed_options
        words = max(3, round(random.expovariate(1 / (given.stream_seconds * WORDS_PER_S))))
        script = "Speaker 1: " + " ".join(TEXT[number % len(TEXT)] for number in range(words))
        began_s = time.monotonic()
        with self.client.post("/v1/audio/speech", json={"input": script}, stream=True, catch_response=True) as answer:
            if answer.status_code != 200:
                self.environment.first_audio.append(math.inf)
                return answer.failure(f"status {answer.status_code}")
            pieces = answer.iter_content(None)
            next(pieces, b"")
            self.environment.first_audio.append(time.monotonic() - began_s)
            self.tell("STREAM", "first audio", self.environment.first_audio[-1])
            for _piece in pieces:
                pass
            answer.success()
