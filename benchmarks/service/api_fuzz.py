"""Attacks the studio's HTTP API: requests made from its OpenAPI document (schemathesis), and damaged voice uploads.

api      requests with right and wrong values for every operation of the document, against a real studio: no answer may
         be a server error, or differ from what the document says (no schema can say which scripts can be spoken)
uploads  WAV, FLAC and Ogg files with wrong fields, sizes, orders and contents as voices: each is taken, or refused with
         a reason, no file may leave its folder, and the front has to live on with the memory that it had

Needs the extra `bench` (schemathesis).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import sys
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import psutil
from http_calls import Answer, Caller
from hypothesis import HealthCheck, Phase, settings
from hypothesis import given as drawn
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from sound_mutations import SoundMutations, Upload

from harness.deploy.config import Deployment
from harness.errors import InputError
from harness.service.settings import StudioSettings
from harness.service.studio import Studio, StudioPlan
from harness.service.voices import MARK

try:
    import schemathesis
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi.checks import positive_data_acceptance
except ImportError:  # the API is then left alone, with a sentence
    schemathesis = None

EXAMPLE = "python benchmarks/service/api_fuzz.py --examples 200 --uploads 10000 --seed 1"
CALLERS, SHOWN = 4, 12
TAKEN, REFUSED = 201, (400, 409, 413, 422)
VOICE_FILE = re.compile(r"\d{4}\.[a-z0-9]+\.[\w -]+\.wav")
MOST_GROWTH_MIB = 48.0  # of the front after warm-up; allocators grow in steps
CALL_S = 60.0


@dataclass
class Attack:
    """What was sent, and what was wrong with the answers."""

    sent: int = 0
    statuses: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)

    def note(self, status: int, wrong: str = "") -> None:
        self.sent += 1
        self.statuses[status] += 1
        if wrong:
            self.failures[wrong] += 1


def main(arguments: Sequence[str]) -> int:
    parser = common.Parser(__doc__, EXAMPLE)
    parser.add_argument(
        "--examples", type=common.whole(1, 100_000), default=150, help="requests per operation and mode"
    )
    parser.add_argument("--uploads", type=common.whole(1, 10_000_000), default=10_000)
    parser.add_argument("--seed", type=common.whole(0, 2**31), default=1)
    given = parser.parse_args(arguments)
    examples, uploads = (5, 200) if given.quick else (given.examples, given.uploads)
    with tempfile.TemporaryDirectory(prefix="api-fuzz-") as folder:
        settings = StudioSettings(
            folder=folder, port=0, open_tasks=1_000_000, per_minute=1_000_000, speech_s=4.0, script_bytes=20_000
        )
        common.say("starting the studio at preset tiny …")
        with Studio(StudioPlan(settings, Deployment()), common.say) as studio:
            pid = studio.front.pid
            api = attack_api(studio.url, examples, given.seed)
            sounds, grown_mib = asyncio.run(attack_uploads(studio, uploads, given.seed))
            alive = studio.front.pid == pid and studio.front.alive() and is_ready(studio.url)
            escaped = strays(Path(studio.settings.voices))
    return show(api, sounds, grown_mib, alive, escaped)


def attack_api(url: str, examples: int, seed: int) -> Attack:
    """Send requests made from the document to every operation."""
    if schemathesis is None:
        raise InputError("schemathesis is not installed: pip install -e '.[bench]'")
    found = Attack()
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for result in document.get_all_operations():
        operation = result.ok()
        common.say(f"{operation.label} …")
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            _attack_operation(operation, mode, examples, seed, found)
    return found


def _attack_operation(operation, mode, examples: int, seed: int, found: Attack) -> None:
    quiet = settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @quiet
    @seeded(seed)
    @drawn(case=operation.as_strategy(generation_mode=mode))
    def attack(case) -> None:
        found.note(*_answer_of(case))

    with contextlib.suppress(Unsatisfiable):  # nothing wrong can be sent to an operation without parameters
        attack()


def _answer_of(case) -> tuple[int, str]:
    """The status of the answer to a case, and what is wrong with it, "" for nothing."""
    label = case.operation.label
    try:
        response = case.call(timeout=CALL_S)
    except Exception as error:  # a connection that was closed, for any reason, is a failure of the server
        return 0, f"{label}: {type(error).__name__}: {str(error)[:120]}"
    try:
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
    except FailureGroup as group:
        wrong = [f"{type(each).__name__}: {_brief(str(each))}" for each in group.exceptions]
        return response.status_code, f"{label}: {response.status_code}: {'; '.join(wrong)}"
    return response.status_code, ""


def _brief(text: str) -> str:
    lines = [line.strip("- ") for line in text.splitlines() if line.strip("- ")]
    return " | ".join(lines[:3])[:200]


async def attack_uploads(studio: Studio, uploads: int, seed: int) -> tuple[Attack, float]:
    """Send damaged sounds; returns also by how much the front's memory grew after the first tenth."""
    made, found = SoundMutations(np.random.default_rng(seed)), Attack()
    left = iter(range(uploads))
    samples: list[tuple[int, float]] = []

    async def attack() -> None:
        for number in left:
            found.note(*await _answer_to(studio.settings.port, made.next()))
            if number % max(1, uploads // 50) == 0:
                samples.append((number, _private_mib(studio.front.pid)))

    common.say(f"{uploads} uploads …")
    await asyncio.gather(*(attack() for _ in range(CALLERS)))
    warm = [mib for number, mib in samples if number <= uploads // 10]
    return found, samples[-1][1] - max(warm)


async def _answer_to(port: int, upload: Upload) -> tuple[int, str]:
    what = f"{upload.kind} as {upload.name[:20]!r}"
    try:
        async with asyncio.timeout(CALL_S), Caller(port) as caller:
            answer = await caller.send("POST", "/v1/voices", *_form(upload))
    except (OSError, EOFError, TimeoutError) as error:
        return 0, f"{what}: {type(error).__name__}"
    return answer.status, _wrong_with(answer, what)


def _wrong_with(answer: Answer, what: str) -> str:
    if answer.status == TAKEN or answer.status in REFUSED and answer.json()["detail"]:
        return ""
    return f"{what}: status {answer.status}"


def _form(upload: Upload) -> tuple[bytes, str]:
    """The body of a form with the file, and its content type."""
    boundary = secrets.token_hex(16)
    name = upload.name.replace("\r", "").replace("\n", "")
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    return (
        head.encode() + upload.content + f"\r\n--{boundary}--\r\n".encode(),
        f"multipart/form-data; boundary={boundary}",
    )


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=CALL_S) as answer:
            return answer.status == 200
    except OSError:
        return False


def strays(voices: Path) -> list[str]:
    """Files in the folder of voices, or beside it, that no upload may make."""
    inside = [path.name for path in voices.iterdir() if not VOICE_FILE.fullmatch(path.name) and path.name != MARK]
    beside = [path.name for path in voices.parent.iterdir() if path.suffix in (".wav", ".flac", ".ogg")]
    return inside + beside


def _private_mib(pid: int) -> float:
    memory = psutil.Process(pid).memory_info()
    return (memory.rss - memory.shared) / 2**20


def show(api: Attack, sounds: Attack, grown_mib: float, alive: bool, escaped: Sequence[str]) -> int:
    table = common.table("Attacks on the HTTP API", "attack", "sent", "by status", "failures")
    for name, one in (("api", api), ("uploads", sounds)):
        statuses = ", ".join(f"{status}: {count}" for status, count in sorted(one.statuses.items()))
        table.add_row(name, str(one.sent), statuses, str(one.failures.total()))
    for wrong, count in (api.failures + sounds.failures).most_common(SHOWN):
        common.say(f"{count} x {wrong}")
    figures = {
        "cases": api.sent,
        "failures": api.failures.total(),
        "uploads": sounds.sent,
        "upload_failures": sounds.failures.total(),
        "voices_taken": sounds.statuses[TAKEN],
        "files_outside": len(escaped),
        "front_grew_mib": grown_mib,
        "alive": int(alive),
    }
    common.finish(table, figures)
    wrong = figures["failures"] or figures["upload_failures"] or escaped or not alive
    return common.EXIT_FAILED if wrong or grown_mib > MOST_GROWTH_MIB else 0


if __name__ == "__main__":
    common.run(main)
