"""Audio from the served ensemble compared with transformers' ``generate``: same weights, prompts, voices and noise."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
import numpy as np
import torch
from reference import Reference, Spoken
from rich.table import Table

from harness import wire
from harness.client.stream import SpeechClient
from harness.deploy.server import TritonServer
from harness.deploy.statistics import StatisticsReader
from harness.records.schema import Outcome, Request
from harness.traffic.mix import ScriptSource
from harness.vibevoice.stages.configuration import preset_config
from harness.vibevoice.stages.presets import Weights

TOLERANCE = 1e-4  # float32
PLAIN, CANCELLED, SAY, NATURAL, KEPT = "plain", "cancelled", "say", "until end", "kept"
KINDS = (PLAIN, CANCELLED, SAY, PLAIN, NATURAL, KEPT, PLAIN, CANCELLED)  # in turn
CHUNK_FRAMES = (1, 1, 4, 7)  # in turn
F, B, E, X = wire.TOKEN_SPEECH_FRAME, wire.TOKEN_SPEECH_BEGIN, wire.TOKEN_SPEECH_END, wire.TOKEN_END_OF_TEXT
LETTERS = {F: "F", B: "B", E: "E", X: "X"}
NATURAL_TRIES = 6
NATURAL_TOKENS = 120
SIZES = {  # option -> key of a preset file, largest value
    "hidden": ("hidden_size", 8192),
    "layers": ("num_hidden_layers", 100),
    "heads": ("num_attention_heads", 128),
    "kv-heads": ("num_key_value_heads", 128),
    "ffn": ("intermediate_size", 65_536),
    "filters": ("num_filters", 64),
    "head-layers": ("head_layers", 32),
    "head-ffn": ("head_intermediate_size", 65_536),
}


@dataclass(frozen=True)
class Session:
    """One session to compare: its request, its special features, and the expected audio."""

    kind: str
    request: Request
    start_s: float  # after the first one
    cut: int = 0  # frames after which it is cancelled, or kept and resumed
    expected: Spoken | None = None
    rounding: float | None = None  # of generate in float32 against float64


@dataclass
class Heard:
    """What the server sent for a session."""

    audio: np.ndarray
    error: str = ""


def main(arguments: Sequence[str]) -> int:
    options = checked(parser(), arguments)
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        deployment = deployment_of(options, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        weights = Weights(deployment["preset"], deployment["weights_seed"], deployment["checkpoint"])
        sessions = with_expected(Reference(weights), list(plan(options)))
        sessions = with_rounding(Reference(weights, dtype=torch.float64), sessions) if options.rounding else sessions
        server = stack.enter_context(common.served(**deployment))
        common.say(f"{len(sessions)} sessions through Triton …")
        heard = asyncio.run(speak_all(server, sessions))
        batch = mean_batch(server)
    return report(sessions, heard, batch)


def parser() -> common.Parser:
    made = common.Parser(
        __doc__, "python benchmarks/model/oracle.py --hidden 96 --heads 6 --kv-heads 3 --guidance 1.0,2.5"
    )
    made.add_argument("--sessions", type=common.whole(1, 250), help="sessions to compare (default: 28)")
    made.add_argument("--frames-max", type=common.whole(1, 2000), help="longest session, in frames (default: 200)")
    made.add_argument("--seed", type=common.whole(0, 1 << 31), default=0, help="seed of scripts, lengths and noise")
    made.add_argument("--weights-seed", type=common.whole(0, 1 << 31), default=4, help="seed of random weights")
    made.add_argument(
        "--guidance",
        type=common.several(common.real(0, 100)),
        default=[1.3, 1.0, 2.0, 3.5],
        help="guidance scales, with commas, used in turn",
    )
    made.add_argument(
        "--steps",
        type=common.several(common.whole(1, wire.MAX_DIFFUSION_STEPS)),
        default=[10, 10, 5, 20],
        help="diffusion steps, with commas, used in turn",
    )
    made.add_argument("--rounding", action="store_true", help="show generate's own difference to itself in float64 too")
    made.add_argument("--instances", type=common.whole(1, 8), default=1, help="instances of every stage")
    made.add_argument("--topology", choices=tuple(wire.TOPOLOGIES), default=wire.STAGED, help="how it is deployed")
    model = made.add_argument_group("model")
    model.add_argument("--preset", default="tiny", help="tiny, 1.5b, 7b or a .json file of sizes")
    model.add_argument("--checkpoint", default="", help="a released checkpoint's folder instead of random weights")
    model.add_argument("--as-checkpoint", action="store_true", help="save the random model as a folder and serve that")
    for name, (key, most) in SIZES.items():
        model.add_argument(f"--{name}", type=common.whole(1, most), help=f"{key} of a model shape of your own")
    depths = common.several(common.whole(1, 32))
    model.add_argument("--depths", type=depths, help="blocks of the 7 stages of the convolution towers, with commas")
    return made


def checked(made: common.Parser, arguments: Sequence[str]):
    """The options; a usage error where they exclude each other."""
    options = made.parse_args(arguments)
    if options.checkpoint and (options.as_checkpoint or own_sizes(options)):
        made.error("--checkpoint has its own weights and sizes: leave --as-checkpoint and sizes out")
    return options


def own_sizes(options) -> dict:
    """The sizes that were given, as a preset file holds them."""
    given = {key: getattr(options, name.replace("-", "_")) for name, (key, _) in SIZES.items()}
    return {key: value for key, value in {**given, "depths": options.depths}.items() if value}


def deployment_of(options, folder: Path) -> dict:
    """What is served, as fields of ``Deployment``; required files are written to the folder."""
    preset, checkpoint = options.preset, options.checkpoint
    if own := own_sizes(options):
        (folder / "own.json").write_text(json.dumps({"base": preset, **own}))
        preset = str(folder / "own.json")
    elif preset.endswith(".json"):
        preset = str(Path(preset).resolve())
    preset_config(preset)  # refuses sizes that do not fit, before anything is built
    if options.as_checkpoint and not checkpoint:
        checkpoint = str(folder / "checkpoint")
        Reference(Weights(preset, options.weights_seed)).model.save_pretrained(checkpoint)
    knobs = {f"{stage}.instances": options.instances for stage in wire.STAGES}
    chosen = {"preset": preset, "checkpoint": checkpoint and str(Path(checkpoint).resolve())}
    own = {"weights_seed": options.weights_seed, "topology": options.topology}
    return {**chosen, **own, "knobs": knobs if options.instances > 1 else {}}


def plan(options) -> Iterator[Session]:
    """The sessions, mixed: lengths, speakers, voices, kinds, guidance, steps, chunks and start times."""
    rng = np.random.default_rng(options.seed)
    count = options.sessions or (8 if options.quick else 28)
    longest = options.frames_max or (12 if options.quick else 200)
    for i in range(count):
        frames = length(rng, i, longest)
        turn = i // len(KINDS)  # shifts the other lists against the kinds, so that all meet all
        speakers = (i + turn) % wire.MAX_SPEAKERS + 1
        script, speakers = ScriptSource().script(rng, min(frames, 40), speakers)
        with_voices = i % 3 != 2
        voices = rng.integers(0, 5, size=speakers) if with_voices else np.zeros(speakers)
        request = Request(
            request_id=f"{i}",
            traffic_class="oracle",
            script=script,
            speaker_ids=tuple(int(voice) for voice in voices),
            frames=frames,
            chunk_frames=CHUNK_FRAMES[(i + turn) % len(CHUNK_FRAMES)],
            seed=int(rng.integers(1 << 31)),
            guidance_scale=options.guidance[(i + turn) % len(options.guidance)],
            diffusion_steps=options.steps[(i // 2 + turn) % len(options.steps)],
        )
        yield special(rng, Session(KINDS[i % len(KINDS)], request, start_s=float(rng.uniform(0, 0.1 * count))))


def length(rng: np.random.Generator, i: int, longest: int) -> int:
    """One frame, the longest, and all sizes: alternately uniform in length and in its logarithm."""
    if i in (0, 3):  # plain ones
        return longest if i else 1
    return int(rng.integers(1, longest + 1)) if i % 2 else int(round(longest ** rng.random()))


def special(rng: np.random.Generator, session: Session) -> Session:
    """The same session with what its kind requires, and enough frames for it."""
    request, kind = session.request, session.kind
    fewest = {CANCELLED: 2 * request.chunk_frames + 8, SAY: 4, KEPT: 4}.get(kind, 1)
    request = replace(request, frames=max(fewest, request.frames))
    cut = request.frames // 2 if kind in (CANCELLED, KEPT) else 0
    if kind == SAY or (kind == KEPT and rng.random() < 0.5):
        request = replace(request, say=interrupted(rng, request.frames))
    if kind == NATURAL:
        request = replace(request, until_end=True, say=(F,) * int(rng.integers(0, min(request.frames, 9))))
    return replace(session, request=request, cut=cut)


def interrupted(rng: np.random.Generator, frames: int) -> tuple[int, ...]:
    """Forced tokens: speech that ends and begins again in the middle, twice, once with a repeated "begin"."""
    first, second = (int(rng.integers(0, frames // 3 + 1)) for _ in range(2))
    return (*[F] * first, E, B, *[F] * second, E, E, B, B)


def with_expected(reference: Reference, sessions: Sequence[Session]) -> list[Session]:
    """The sessions with the audio of ``generate`` for each."""
    done, began = [], time.monotonic()
    for number, session in enumerate(sessions, start=1):
        session = natural(reference, session) if session.kind == NATURAL else session
        done.append(replace(session, expected=session.expected or reference.speak(session.request)))
        if number % 4 == 0 or number == len(sessions):
            common.say(f"generate: {number} of {len(sessions)} sessions, {time.monotonic() - began:.0f} s")
    return done


def with_rounding(double: Reference, sessions: Sequence[Session]) -> list[Session]:
    """The sessions with ``generate``'s difference between float32 and float64; infinite where the tokens differ."""
    common.say("generate in float64 …")
    return [replace(session, rounding=rounding(double, session)) for session in sessions]


def rounding(double: Reference, session: Session) -> float:
    exact, expected = (
        double.speak(session.request, NATURAL_TOKENS if session.kind == NATURAL else None),
        session.expected,
    )
    return float(np.abs(exact.audio - expected.audio).max()) if exact.tokens == expected.tokens else float("inf")


def natural(reference: Reference, session: Session) -> Session:
    """The session with the seed, of some tries, with which the model speaks longest and then ends by itself.

    Random weights often generate "begin" for ever. If no try ends, "end of text" is forced as the last token.
    """
    request, found = replace(session.request, frames=NATURAL_TOKENS), []
    for seed in range(request.seed, request.seed + NATURAL_TRIES):
        spoken = reference.speak(replace(request, seed=seed), NATURAL_TOKENS)
        if spoken.tokens[-1] == X and len(spoken.audio):
            found.append((len(spoken.audio), seed, spoken))
    if not found:
        return replace(session, request=replace(request, say=(F, F, E, B, F, E, X)))
    _, seed, spoken = max(found, key=lambda one: one[:2])
    return replace(session, request=replace(request, seed=seed), expected=spoken)


async def speak_all(server: TritonServer, sessions: Sequence[Session]) -> list[Heard]:
    async with SpeechClient(server.url) as client:
        return await asyncio.gather(*(speak(client, session) for session in sessions))


async def speak(client: SpeechClient, session: Session) -> Heard:
    await asyncio.sleep(session.start_s)
    request = session.request
    if session.kind != KEPT:
        return await listen(client, request, session.cut)
    carry: list[bytes] = []
    first = await listen(client, replace(request, frames=session.cut, keep=True), on_carry=carry.append)
    if first.error or not carry:
        return Heard(first.audio, first.error or "no carry came")
    rest = replace(request, frames=request.frames - session.cut, say=(), carry=carry[0])
    second = await listen(client, rest)
    return Heard(np.concatenate([first.audio, second.audio]), second.error)


async def listen(client: SpeechClient, request: Request, leave_after: int = 0, on_carry=None) -> Heard:
    """The audio of one request; if told to, the client leaves after this many frames."""
    pieces: list[bytes] = []
    leaving = common.leave_after(leave_after)
    stream = client.open(request, "closed", on_audio=pieces.append, on_chunk=leaving, on_carry=on_carry)
    result = await stream.run()
    wanted = Outcome.CANCELLED if leave_after else Outcome.DONE
    error = "" if result.outcome is wanted else result.error or f"it ended as {result.outcome}"
    return Heard(np.frombuffer(b"".join(pieces), "<f4"), error)


def difference(session: Session, heard: Heard) -> float:
    """Largest absolute difference; infinite where audio is missing, too long, or was not sent."""
    expected = session.expected.audio
    if session.kind == CANCELLED:
        expected = expected[: len(heard.audio)]
    if heard.error or len(expected) != len(heard.audio) or not np.isfinite(heard.audio).all():
        return float("inf")
    return float(np.abs(expected - heard.audio).max(initial=0.0))


def mean_batch(server: TritonServer) -> float:
    """Frames that shared one execution of the diffusion stage, on average."""
    with contextlib.closing(StatisticsReader(server.url)) as reader:
        stage = next((stage for stage in reader.snapshot() if stage.stage == wire.DIFFUSION), None)
    return stage.requests / max(1, stage.executions) if stage else float("nan")


def report(sessions: Sequence[Session], heard: Sequence[Heard], batch: float) -> int:
    differences = [difference(*pair) for pair in zip(sessions, heard, strict=True)]
    worst = max(range(len(sessions)), key=differences.__getitem__)
    roundings = [session.rounding for session in sessions if session.rounding is not None]
    figures = {
        "max_abs_difference": differences[worst],
        "sessions": len(sessions),
        "frames": sum(frames_of(one) for one in heard),
        **({"max_rounding_of_generate": max(roundings)} if roundings else {}),
        "failed": sum(found > TOLERANCE for found in differences),
        "loudest_sample": max(float(np.abs(one.audio).max(initial=0)) for one in heard),
        "mean_batch": batch,
        **{kind.replace(" ", "_"): sum(s.kind == kind for s in sessions) for kind in dict.fromkeys(KINDS)},
    }
    fine = differences[worst] <= TOLERANCE
    if not fine:
        common.say(f"session {worst} ({sessions[worst].kind}) differs by {differences[worst]:.1e} > {TOLERANCE}")
    common.finish(sessions_table(sessions, heard, differences), figures)
    return 0 if fine else common.EXIT_FAILED


def frames_of(heard: Heard) -> int:
    return len(heard.audio) // wire.SAMPLES_PER_FRAME


def sessions_table(sessions: Sequence[Session], heard: Sequence[Heard], differences: Sequence[float]) -> Table:
    columns = "session", "frames", "said", "speakers", "voices", "guidance", "steps", "chunk", "ended", "max difference"
    with_rounding = any(session.rounding is not None for session in sessions)
    shown = common.table("Served audio against generate", *columns, *(["its own rounding"] if with_rounding else []))
    for session, one, found in zip(sessions, heard, differences, strict=True):
        request = session.request
        shown.add_row(
            f"{request.request_id} {session.kind}",
            str(frames_of(one)),
            said(session),
            str(len(request.speaker_ids)),
            ",".join(map(str, request.speaker_ids)),
            f"{request.guidance_scale:g}",
            str(request.diffusion_steps),
            str(request.chunk_frames),
            ending(session, one),
            f"{found:.1e}",
            *([f"{session.rounding:.1e}"] if with_rounding else []),
        )
    return shown


def said(session: Session) -> str:
    """The tokens in short: 3F E 2B F is three frames, end of speech, begin of speech twice, a frame; X ends all."""
    tokens = session.expected.tokens
    if tokens.count(F) == session.request.frames:  # the X with which generate was stopped
        tokens = tokens[:-1]
    runs = [(token, len(list(run))) for token, run in itertools.groupby(tokens)]
    return " ".join(f"{count if count > 1 else ''}{LETTERS[token]}" for token, count in runs)


def ending(session: Session, heard: Heard) -> str:
    if heard.error:
        return heard.error
    if session.kind == CANCELLED:
        return f"left after {session.cut}"
    if session.kind == KEPT:
        return f"kept after {session.cut}"
    return "end of text" if frames_of(heard) < session.request.frames else "all spoken"


if __name__ == "__main__":
    common.run(main)
