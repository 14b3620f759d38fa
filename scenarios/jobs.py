"""Authors who submit a script as a task of the studio, follow it to its end, and download its audio.

    locust -f scenarios/jobs.py --headless -u 4 -t 10m --host http://127.0.0.1:8080
    locust -f scenarios/jobs.py --headless -u 4 -t 10m --host https://a.example --key-file key.txt --job-seconds 90

The row "turnaround" has the time from submission to the end of a task, "turnaround per audio second" that time by the
seconds of its audio, in milliseconds. With --turnaround-p95 (2x of the audio's length, or seconds) the exit code is 1
where the SLO is violated. A task that failed violates it, and so does one that goes on past its deadline when the test
ends; one that goes on within it does not count.
"""

import json
import math
import random
import time
import uuid
from pathlib import Path

from locust import HttpUser, between, events, task

from harness.errors import InputError
from harness.records.turnaround import SubmittedTask, TurnaroundSlo

WORDS_PER_S = 3  # as scripts are spoken
TEXT = "It is early, and the market has not opened yet, so we talk about what is new since yesterday. ".split()


@events.init_command_line_parser.add_listener
def _(parser):
    parser.add_argument("--job-seconds", type=float, default=60, help="mean seconds of audio of a task")
    parser.add_argument("--speakers", type=int, default=2, choices=(1, 2, 3, 4), help="speakers of a task")
    parser.add_argument("--turnaround-p95", default="", help="SLO on tasks: 2x of the audio's length, or seconds")
    parser.add_argument("--key-file", default="", help="file with the key of a studio that asks for one")


@events.init.add_listener
def _(environment, **_more):
    environment.submitted = []
    try:
        if slo_of(environment.parsed_options):
            must_be_one_process(environment, "--turnaround-p95")
    except InputError as error:
        raise SystemExit(f"--turnaround-p95: {error}") from None


@events.quitting.add_listener
def _(environment, **_more):
    if slo := slo_of(environment.parsed_options):
        value = slo.of(environment.submitted, time.monotonic())
        judged(environment, slo, value <= slo.limit, "nothing was measured" if math.isnan(value) else slo.shown(value))


def must_be_one_process(environment, option):
    """End Locust where others measure what this process would judge."""
    given = environment.parsed_options
    if given.master or given.worker or given.processes:
        raise SystemExit(f"{option} is judged in one process: leave it out, or --master, --worker and --processes")


def slo_of(given):
    """The SLO on turnaround; None where there is none."""
    text = given.turnaround_p95.strip()
    return TurnaroundSlo.parse("turnaround_p95", float(text) if text.isdecimal() else text) if text else None


def judged(environment, slo, is_met, shown):
    """Say whether an SLO is met, and make the exit code 1 where it is not."""
    print(f"SLO {slo}: {'met' if is_met else 'violated'} ({shown})", flush=True)
    if not is_met:
        environment.process_exit_code = 1


class StudioUser(HttpUser):
    """A user with the key of the studio."""

    abstract = True

    def on_start(self):
        given = self.environment.parsed_options
        if given.key_file:
            self.client.headers["Authorization"] = f"Bearer {Path(given.key_file).read_text().strip()}"

    def tell(self, kind, name, seconds, wrong=None):
        self.environment.events.request.fire(
            request_type=kind, name=name, response_time=1000 * seconds, response_length=0, exception=wrong, context={}
        )


class Author(StudioUser):
    """One author: writes, waits for the audio, writes again."""

    wait_time = between(0.1, 2)

    @task
    def podcast(self):
        began_s, script = time.monotonic(), self._script()
        made = self.client.post("/v1/tasks", json={"script": script}, headers={"Idempotency-Key": uuid.uuid4().hex})
        if made.status_code == 429:
            time.sleep(float(made.headers.get("Retry-After", 5)))
        if made.status_code != 202:
            return
        submitted = SubmittedTask(began_s, len(script.split()) / WORDS_PER_S)
        self.environment.submitted.append(submitted)
        ended = self._followed(made.json()["links"]["events"])
        self._tell("turnaround", began_s, ended, 1.0)
        submitted.turnaround_s = math.inf
        if ended and ended["status"] == "done":
            submitted.turnaround_s, submitted.audio_s = time.monotonic() - began_s, ended["seconds_of_audio"]
            self._tell("turnaround per audio second", began_s, ended, ended["seconds_of_audio"])
            self.client.get(ended["links"]["audio"], name="/v1/tasks/ID/audio")

    def _script(self):
        given = self.environment.parsed_options
        words = max(given.speakers, round(random.expovariate(1 / (given.job_seconds * WORDS_PER_S))))
        turns = max(given.speakers, words // 30)
        share = max(1, words // turns)
        lines = (" ".join(TEXT[number % len(TEXT)] for number in range(share)) for _ in range(turns))
        return "\n".join(f"Speaker {1 + turn % given.speakers}: {line}" for turn, line in enumerate(lines))

    def _followed(self, address):
        """The last state of a task that its events tell; None where they break off."""
        with self.client.get(address, stream=True, name="/v1/tasks/ID/events", catch_response=True) as answer:
            if answer.status_code != 200:
                return None
            answer.success()
            state = None
            for line in answer.iter_lines():
                if line.startswith(b"data: "):
                    state = json.loads(line[6:])
            return state

    def _tell(self, name, began_s, ended, by):
        wrong = None
        if ended is None or ended["status"] not in ("done", "failed", "cancelled"):
            wrong = RuntimeError("the events broke off")
        elif ended["status"] != "done":
            wrong = RuntimeError(f"the task is {ended['status']}: {ended['error']}")
        self.tell("TASK", name, (time.monotonic() - began_s) / by, wrong)
