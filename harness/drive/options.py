"""The options of a load test: what Locust's command line, page, files and environment take, and what it comes to."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from harness.client.target import OPTIONS
from harness.drive.generator import LoadSettings
from harness.drive.load import REQUEST_KNOBS, Load
from harness.errors import InputError
from harness.planfile import load_mix, load_plan
from harness.records.load_log import FILE_NAME
from harness.traffic import arrivals
from harness.traffic.mix import MIXES, Mix, ScriptSource

EVERY_USER = "every user"  # what --steady without a number means
EXIT_CODES = (
    "0 all is well, 1 requests failed (Locust's own), 2 an option or the server cannot be used, "
    "3 the measurement is INVALID, for the reasons printed"
)
ARGUMENTS = {
    "--help-speech": {"action": "help", "help": "show all options, these included (--help knows no locustfile)"},
    "--rate": {
        "dest": "rate_per_s",
        "metavar": "R",
        "help": "open loop: R requests per second, whatever the answers; else a closed loop",
        "on_page": True,
    },
    "--arrivals": {
        "choices": ("", *arrivals.KINDS),
        "metavar": "PROCESS",
        "help": f"{', '.join(arrivals.KINDS)}; left out: as the other options imply, else poisson",
        "on_page": True,
    },
    "--burstiness": {
        "metavar": "B",
        "help": "gamma arrivals: squared coefficient of variation of their gaps; 1 is Poisson, 4 comes in bursts",
        "on_page": True,
    },
    "--trace": {
        "metavar": "FILE.csv",
        "help": "replay the arrivals of a file (column TIMESTAMP), at their own times or stretched to --rate",
        "on_page": True,
    },
    "--trace-repeat": {
        "action": "store_true",
        "help": "begin a trace again where it ends; without this nothing is sent after its end",
        "on_page": True,
    },
    "--stages": {
        "metavar": "60s@0.5,2m@0.5..3,30s@0",
        "help": "Poisson arrivals in stages, DURATION@RATE, DURATION@FROM..TO for a ramp, @0 for a pause",
        "on_page": True,
    },
    "--mix": {"metavar": "MIX", "help": f"traffic mix: {', '.join(MIXES)}, or a file MIX.yaml", "on_page": True},
    "--plan": {"metavar": "PLAN.yaml", "help": "take traffic mix, promises and scripts from a plan"},
    "--scripts": {
        "metavar": "DIR",
        "help": "speak the .txt scripts of a folder, cut or repeated to the length that the mix draws; a class of "
        "length from_script speaks them whole",
    },
    "--seed": {"default": "1", "metavar": "N", "help": "seed of lengths, scripts and arrivals", "on_page": True},
    "--steady": {
        "nargs": "?",
        "const": EVERY_USER,
        "metavar": "SESSIONS",
        "help": "begin in mid-session: each user's first request, or in an open loop this many sessions",
        "on_page": True,
    },
    "--chunk-frames": {"metavar": "N", "help": "frames of 133 ms in one response", "on_page": True},
    "--diffusion-steps": {"metavar": "N", "help": "denoising steps of every frame"},
    "--iterations": {"flags": ("-i",), "metavar": "N", "help": "end after N requests", "on_page": True},
    "--readers": {"default": "1", "metavar": "N", "help": "stream-reader processes"},
    "--records": {
        "metavar": "DIR",
        "help": f"write manifest.json (what was asked, and the certificate), requests.csv and {FILE_NAME} (every "
        "chunk) to DIR, which must be new",
    },
    "--every": {
        "dest": "every_s",
        "metavar": "S",
        "help": "say how it goes every S seconds, and at the end how step time and memory drifted",
        "on_page": True,
    },
    "--url": {
        "action": "append",
        "metavar": "URL",
        "help": "as --host, for several servers: repeated or with commas; grpcs://HOST:PORT is TLS",
    },
    **OPTIONS,
    "--ladder": {"metavar": "1,2,4", "help": "closed loop: hold each of these numbers of users in turn"},
    "--rung-seconds": {"dest": "rung_s", "default": "10", "metavar": "S", "help": "how long each rung is held"},
    "--precision": {
        "metavar": "SHARE",
        "help": "a rung ends before that when its audio rate is known to this share (95% interval) and steady",
    },
    "--until-saturated": {
        "action": "store_true",
        "help": "end the ladder where it is over-saturated (two rungs in a row slower than promised), or broken",
    },
}
"""Each also as ``LOCUST_NAME`` in the environment and as ``name = value`` in Locust's configuration file."""

_TIME_LIMIT = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_NUMBERS = {
    "seed": int,
    "rate_per_s": float,
    "burstiness": float,
    "steady": int,
    "readers": int,
    "chunk_frames": int,
    "diffusion_steps": int,
    "iterations": int,
    "rung_s": float,
    "every_s": float,
    "precision": float,
}
_OF_A_RATE, _INSTEAD_OF_A_RATE = ("rate_per_s", "arrivals", "burstiness"), ("trace", "stages", "ladder")
_BARE_NAMES = [name.removeprefix("--") for name in ARGUMENTS]


class Own(str):
    """A scenario's own value of an option, to be told from the same that was given."""


def _dest(option: str) -> str:
    return ARGUMENTS[option].get("dest", option.removeprefix("--").replace("-", "_"))


def add_arguments(parser) -> None:
    """Add ARGUMENTS to Locust's parser."""
    group = parser.add_argument_group("Speech", f"Exit codes: {EXIT_CODES}.")
    for name, about in ARGUMENTS.items():
        keywords = {key: value for key, value in about.items() if key not in ("on_page", "flags")}
        keywords["help"] = keywords["help"].replace("%", "%%")  # argparse would fill in values
        if about.get("action") != "help":
            keywords["env_var"] = "LOCUST_" + name.strip("-").replace("-", "_").upper()
        action = group.add_argument(*about.get("flags", ()), name, **keywords)
        action.include_in_web_ui = about.get("on_page", False)
        action.is_secret = action.is_required = action.is_multiple = False


def defaults_of(options: Mapping[str, object]) -> dict[str, str | list[str]]:
    """A scenario's own values of options, by their names without dashes in front, as the parser takes defaults."""
    for name in options:
        if f"--{name}" not in ARGUMENTS:
            raise InputError(f"a scenario's options: no option is named {name!r}; {_hint(name, _BARE_NAMES)}")
    return {_dest(f"--{name}"): _default(name, value) for name, value in options.items()}


def give_way(values: dict) -> None:
    """Unset a scenario's own rate where another kind of load is given, which cannot have one, or another."""
    given = {name for name in _INSTEAD_OF_A_RATE if values.get(name) and not isinstance(values[name], Own)}
    for name in _OF_A_RATE:
        if given and isinstance(values.get(name), Own):
            values[name] = None


def _default(name: str, value: object) -> str | list[str]:
    several = ARGUMENTS[f"--{name}"].get("action") == "append"
    if not several:
        return Own(value)
    return [value] if isinstance(value, str) else [str(each) for each in value]


def settings_of(values: Mapping, mix: Mix | str) -> LoadSettings:
    """Settings from options as they come from a command line or a form; ``mix`` where they name none.

    Raises InputError naming the option.
    """
    traffic, scripts = _traffic(values, mix)
    load = load_of(values, traffic)
    given = {name: value for name in ("readers", "every_s") if (value := _number(values, name)) is not None}
    return LoadSettings(
        mix=replace(traffic, **load.asks),
        load=load,
        scripts=scripts,
        records=Path(values["records"]) if values.get("records") else None,
        **given,
    )


def load_of(values: Mapping, mix: Mix | None = None) -> Load:
    """The load that options ask for; ``mix`` lets a message say how many sessions an open loop would hold.

    Raises InputError naming the option.
    """
    process = arrivals.chosen(
        values.get("arrivals"),
        rate_per_s=_number(values, "rate_per_s"),
        burstiness=_number(values, "burstiness"),
        trace=values.get("trace"),
        repeat=_is_on(values, "trace_repeat"),
        stages=values.get("stages"),
    )
    sessions, rung_s, seed = _ladder(values.get("ladder") or ""), _rung_s(values), _number(values, "seed")
    return Load(
        seconds=rung_s if sessions else _time_limit_s(values),
        seed=1 if seed is None else seed,
        sessions=sessions,
        arrivals=process,
        steady=_steady(values, process, mix),
        asks=_asks(values),
        precision=_number(values, "precision"),
        until_saturated=_is_on(values, "until_saturated"),
        iterations=_number(values, "iterations"),
    )


def _traffic(values: Mapping, mix: Mix | str) -> tuple[Mix, ScriptSource]:
    """The mix and the scripts that options name; a plan brings its own of both."""
    source = ScriptSource()
    if values.get("plan"):
        if values.get("mix"):
            raise InputError("--plan brings its own mix: leave out --mix")
        spec = load_plan(values["plan"])
        mix, source = spec.traffic_mix(), spec.script_source()
    else:
        mix = _mix(values.get("mix") or mix)
    if values.get("scripts"):
        source = ScriptSource.from_folder(values["scripts"])
    mix = mix.of_scripts(source)
    return _tagged(mix, values.get("speech_tags"), values.get("speech_exclude_tags")), source


def _mix(mix: Mix | str) -> Mix:
    if isinstance(mix, Mix):
        return mix
    if mix in MIXES:
        return MIXES[mix]
    if mix.endswith((".yaml", ".yml")):
        return load_mix(mix)
    raise InputError(f"no mix is named {mix!r}; {_hint(mix, MIXES)}; or give a file MIX.yaml")


def _tagged(mix: Mix, tags: Iterable[str] | None, exclude_tags: Iterable[str] | None) -> Mix:
    """The classes of the mix that Locust's --tags and --exclude-tags leave: a class has its name as its tag."""
    names = [each.name for each in mix.classes]
    for option, given in (("--tags", tags), ("--exclude-tags", exclude_tags)):
        for tag in given or ():
            if tag not in names:
                raise InputError(f"{option} {tag}: mix {mix.name} has no such class; {_hint(tag, names)}")
    wanted = [name for name in names if (not tags or name in tags) and name not in (exclude_tags or ())]
    if not wanted:
        raise InputError(f"--tags and --exclude-tags leave no class of mix {mix.name}: {', '.join(names)}")
    return mix if wanted == names else mix.only(wanted.__contains__)


def _steady(values: Mapping, process: arrivals.Arrivals | None, mix: Mix | None) -> int | None:
    if values.get("steady") != EVERY_USER:
        return _number(values, "steady")
    if process is None:
        return 0
    known = mix is not None and process.rate_per_s is not None
    hint = f" (at a real-time factor of 0.5: {_in_progress(process, mix, 0.5):.0f})" if known else ""
    raise InputError(
        f"--steady in an open loop needs the number of sessions it starts with: rate x mean audio x rtf{hint}"
    )


def _in_progress(process: arrivals.Arrivals, mix: Mix, rtf: float) -> float:
    """Little's law: N = X R, with the residence R = audio x real-time factor."""
    return process.rate_per_s * mix.mean_audio_s() * rtf


def _is_on(values: Mapping, name: str) -> bool:
    return values.get(name) in (True, "true", "on")


def _number(values: Mapping, name: str) -> float | int | None:
    text, kind = values.get(name), _NUMBERS[name]
    if text is None or text == "":
        return None
    try:
        return kind(text)
    except ValueError:
        option = next(option for option in ARGUMENTS if _dest(option) == name)
        raise InputError(f"{option} {text!r} is not {'a whole' if kind is int else 'a'} number") from None


def _rung_s(values: Mapping) -> float | None:
    seconds = _number(values, "rung_s")
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError(f"--rung-seconds {seconds:g} must be above 0")
    return seconds


def _time_limit_s(values: Mapping) -> float | None:
    """Locust's own -t: a text such as 1h20m30s, or seconds where Locust has read it already."""
    given = values.get("run_time")
    if given is None or given == "":
        return None
    if isinstance(given, int | float):
        return float(given)
    found = _TIME_LIMIT.fullmatch(str(given).strip())
    if not found or not any(found.groups()):
        raise InputError(f"-t {given!r} is not a time: write 90s, 20m or 1h20m30s")
    return float(sum(int(number or 0) * unit for number, unit in zip(found.groups(), (3600, 60, 1), strict=True)))


def _ladder(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(users) for users in str(text).split(",") if text)
    except ValueError:
        raise InputError(f"--ladder {text!r} must be numbers of users with commas between, such as 1,2,4,8") from None


def _hint(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
