"""The options of a load test, from Locust's command line, its page, files and the environment, and their parsing."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from harness import exit_codes
from harness.client.target import OPTIONS, Argument
from harness.drive.generator import LoadSettings, UserClass
from harness.drive.load import REQUEST_KNOBS, Load
from harness.errors import InputError
from harness.planfile.reading import load_mix, load_plan
from harness.planfile.sections import MAX_OTHERS
from harness.records.load_log import FILE_NAME
from harness.traffic import arrivals
from harness.traffic.mix import MIXES, Mix, ScriptSource

EVERY_USER = "every user"  # the value of --steady given without a number
EXIT_CODES = ", ".join(f"{code} {meaning}" for code, meaning in exit_codes.OF_LOAD_TESTS.items())
ARGUMENTS: dict[str, Argument] = {
    "--help-speech": {"action": "help", "help": "show all options, these included (--help omits locustfile options)"},
    "--rate": {
        "dest": "rate_per_s",
        "metavar": "R",
        "help": "open loop: R requests per second, independent of responses; without it a closed loop",
        "on_page": True,
    },
    "--arrivals": {
        "choices": ("", *arrivals.KINDS),
        "metavar": "PROCESS",
        "help": f"{', '.join(arrivals.KINDS)}; default: inferred from other options, else poisson",
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
        "help": "repeat the trace when it ends; without this nothing is sent after its end",
        "on_page": True,
    },
    "--stages": {
        "metavar": "60s@0.5,2m@0.5..3,30s@0",
        "help": "Poisson arrivals in stages, DURATION@RATE, DURATION@FROM..TO for a ramp, @0 for a pause",
        "on_page": True,
    },
    "--mix": {"metavar": "MIX", "help": f"traffic mix: {', '.join(MIXES)}, or a file MIX.yaml", "on_page": True},
    "--plan": {"metavar": "PLAN.yaml", "help": "take traffic mix, SLOs and scripts from a plan"},
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
        "help": "start in mid-session: each user's first request, or this many sessions of an open loop",
        "on_page": True,
    },
    "--chunk-frames": {"metavar": "N", "help": "frames of 133 ms in one response", "on_page": True},
    "--diffusion-steps": {"metavar": "N", "help": "denoising steps of every frame"},
    "--iterations": {"flags": ("-i",), "metavar": "N", "help": "end after N requests", "on_page": True},
    "--readers": {"default": "1", "metavar": "N", "help": "stream-reader processes"},
    "--records": {
        "metavar": "DIR",
        "help": f"write manifest.json (the options, and the certificate), requests.csv and {FILE_NAME} (every "
        "chunk) to DIR, which must be new",
    },
    "--every": {
        "dest": "every_s",
        "metavar": "S",
        "help": "print a progress line every S seconds, and at the end how step time and memory drifted",
        "on_page": True,
    },
    "--url": {
        "action": "append",
        "metavar": "URL",
        "help": "the servers, repeated or with commas between; grpcs://HOST:PORT uses TLS",
    },
    **OPTIONS,
    "--ladder": {"metavar": "1,2,4", "help": "closed loop: hold each of these numbers of users in turn"},
    "--rung-seconds": {
        "dest": "rung_s",
        "default": "10",
        "metavar": "S",
        "help": "seconds to hold each rung",
    },
    "--precision": {
        "metavar": "SHARE",
        "help": "end a rung early once its audio rate is steady and known to this share (95% interval)",
    },
    "--until-saturated": {
        "action": "store_true",
        "help": "end the ladder at over-saturation (two rungs in a row slower than the SLOs), or where a request fails",
    },
    "--max-others": {
        "metavar": "SHARE",
        "help": "CPU that other processes and the hypervisor may take, as a share of the cores that the test needs; "
        f"beyond it a rung is measured again, and another test is INVALID (default: the plan's, else {MAX_OTHERS:g})",
    },
}
"""Each is also read as ``LOCUST_NAME`` from the environment, and as ``name = value`` from a Locust config file."""

_TIME_LIMIT = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")
_OF_A_RATE, _INSTEAD_OF_A_RATE = ("rate_per_s", "arrivals", "burstiness"), ("trace", "stages", "ladder")
_BARE_NAMES = [name.removeprefix("--") for name in ARGUMENTS]
Number = TypeVar("Number", int, float)


class Own(str):
    """An option's value set by a scenario, distinguishable from the same value on the command line."""


class _OwnList(list):
    """The same for an option that may be repeated: values on the command line are added to it."""

    def __init__(self, values: Iterable[str]):
        super().__init__(values)
        self.own = len(self)


def dest(option: str) -> str:
    return ARGUMENTS[option].get("dest", option.removeprefix("--").replace("-", "_"))


DEFAULTS = {dest(option): about["default"] for option, about in ARGUMENTS.items() if "default" in about}


def add_arguments(parser) -> None:
    """Add ARGUMENTS to Locust's parser."""
    group = parser.add_argument_group("Speech", f"Exit codes: {EXIT_CODES}.")
    for name, about in ARGUMENTS.items():
        keywords: dict[str, Any] = {key: value for key, value in about.items() if key not in ("on_page", "flags")}
        keywords["help"] = about["help"].replace("%", "%%")  # argparse expands % in help texts
        if about.get("action") != "help":
            keywords["env_var"] = "LOCUST_" + name.strip("-").replace("-", "_").upper()
        action = group.add_argument(*about.get("flags", ()), name, **keywords)
        action.include_in_web_ui = about.get("on_page", False)
        action.is_secret = action.is_required = action.is_multiple = False


def defaults_of(options: Mapping[str, object]) -> dict[str, str | list[str]]:
    """A scenario's own option values as argparse defaults; names come without leading dashes."""
    for name in options:
        if f"--{name}" not in ARGUMENTS:
            raise InputError(f"a scenario's options: no option is named {name!r}; {_hint(name, _BARE_NAMES)}")
    return {dest(f"--{name}"): _default(name, value) for name, value in options.items()}


def give_way(values: dict) -> None:
    """Unset a scenario's own rate where another rate, or a kind of load that has no rate, is given."""
    given = {name for name in _INSTEAD_OF_A_RATE if values.get(name) and not is_own(values[name])}
    for name in _OF_A_RATE:
        if given and is_own(values.get(name)):
            values[name] = None


def is_own(value: object) -> bool:
    """Whether an option's value comes from a scenario and not from the command line."""
    return isinstance(value, Own) or (isinstance(value, _OwnList) and len(value) == value.own)


def merged(options: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Merge the options of several user classes, given by class name, into those of one test.

    Raises InputError where two classes give one option different values.
    """
    together: dict[str, tuple[str, object]] = {}
    for user, own in options.items():
        for name, value in own.items():
            other, before = together.setdefault(name, (user, value))
            if before != value:
                raise InputError(
                    f"option {name!r} is {before!r} in {other} and {value!r} in {user}, and a test has one: give "
                    f"--{name}, or name one of the classes on the command line"
                )
    return {name: value for name, (_, value) in together.items()}


def _default(name: str, value: object) -> str | list[str]:
    if ARGUMENTS[f"--{name}"].get("action") != "append":
        return Own(str(value).lower() if isinstance(value, bool) else value)
    if isinstance(value, str) or not isinstance(value, Iterable):
        return _OwnList([str(value)])
    return _OwnList(str(each) for each in value)


def settings_for(values: Mapping, users: Sequence[UserClass]) -> LoadSettings:
    """Settings of a test of these user classes. Raises InputError naming the option."""
    users, scripts = _traffic(values, users)
    users = [replace(user, mix=_asking(user.mix, _asks(values))) for user in users]
    mix = users[0].mix
    if len(users) > 1:
        mix = Mix.combined({user.name: (user.fixed_count or user.weight, user.mix) for user in users})
    load = load_of(values, mix)
    if load.loop == "open":
        _check_split(users)
    readers, max_others = _whole(values, "readers"), _number(values, "max_others")
    if max_others is None:
        max_others = load_plan(values["plan"]).max_others if values.get("plan") else MAX_OTHERS
    return LoadSettings(
        mix=mix,
        load=load,
        scripts=scripts,
        records=Path(values["records"]) if values.get("records") else None,
        users=tuple(users),
        readers=1 if readers is None else readers,
        every_s=_number(values, "every_s"),
        max_others=max_others,
    )


def _asking(mix: Mix, asks: Mapping[str, int]) -> Mix:
    """The mix with these values in every request, whatever its classes set."""
    return replace(mix, **asks, classes=tuple(replace(each, **dict.fromkeys(asks)) for each in mix.classes))


def _asks(values: Mapping) -> dict[str, int]:
    asks = {name: _whole(values, name) for name in REQUEST_KNOBS}
    return {name: value for name, value in asks.items() if value is not None}


def _check_split(users: Sequence[UserClass]) -> None:
    """Refuse a ``fixed_count`` beside other classes: an open loop splits its arrivals by weight."""
    for user in users:
        if user.fixed_count and len(users) > 1:
            raise InputError(
                f"{user.name} has fixed_count {user.fixed_count}: an open loop splits its arrivals between user "
                "classes by weight; give it a weight instead, or name the other classes on the command line"
            )


def load_of(values: Mapping, mix: Mix | None = None) -> Load:
    """The load that options describe; from ``mix`` a message suggests a number of sessions for --steady.

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
    sessions, rung_s, seed = _ladder(values.get("ladder") or ""), _rung_s(values), _whole(values, "seed")
    return Load(
        seconds=rung_s if sessions else _time_limit_s(values),
        seed=1 if seed is None else seed,
        sessions=sessions,
        arrivals=process,
        steady=_steady(values, process, mix),
        asks=_asks(values),
        precision=_number(values, "precision"),
        until_saturated=_is_on(values, "until_saturated"),
        iterations=_whole(values, "iterations"),
    )


def _traffic(values: Mapping, users: Sequence[UserClass]) -> tuple[list[UserClass], ScriptSource]:
    """The user classes with the traffic that options leave them, and the scripts; a plan replaces both."""
    source, option = ScriptSource(), "--plan" if values.get("plan") else "--mix"
    if values.get("plan") and values.get("mix"):
        raise InputError("--plan brings its own mix: leave out --mix")
    given = values.get("plan") or values.get("mix")
    if given and len(users) > 1:
        raise InputError(
            f"{option} {given} would replace the traffic of each of {', '.join(user.name for user in users)}: name one "
            "of them on the command line"
        )
    if values.get("plan"):
        spec = load_plan(values["plan"])
        users, source = [replace(user, mix=spec.traffic_mix()) for user in users], spec.script_source()
    else:
        users = [replace(user, mix=as_mix(values.get("mix") or user.mix)) for user in users]
    if values.get("scripts"):
        source = ScriptSource.from_folder(values["scripts"])
    users = [replace(user, mix=user.mix.of_scripts(source)) for user in users]
    return tagged(users, values.get("speech_tags"), values.get("speech_exclude_tags")), source


def as_mix(mix: Mix | str) -> Mix:
    """A mix, or the one of this name or file. Raises InputError where there is none."""
    if isinstance(mix, Mix):
        return mix
    if mix in MIXES:
        return MIXES[mix]
    if mix.endswith((".yaml", ".yml")):
        return load_mix(mix)
    raise InputError(f"no mix is named {mix!r}; {_hint(mix, MIXES)}; or give a file MIX.yaml")


def tagged(
    users: Sequence[UserClass], tags: Iterable[str] | None, exclude_tags: Iterable[str] | None
) -> list[UserClass]:
    """The user classes after Locust's --tags and --exclude-tags; classes left without traffic are dropped.

    A tag is the name of a traffic class, or one of Locust's own tags of a user class. Raises InputError for an unknown
    tag.
    """
    names = list(dict.fromkeys(each.name for user in users for each in user.mix.classes))
    known = [*names, *sorted(set().union(*(user.tags for user in users)))]
    mixes = " and ".join(dict.fromkeys(user.mix.name for user in users))
    for option, given in (("--tags", tags), ("--exclude-tags", exclude_tags)):
        for tag in given or ():
            if tag not in known:
                raise InputError(f"{option} {tag}: mix {mixes} has no such class; {_hint(tag, known)}")
    wanted, unwanted = set(tags or ()), set(exclude_tags or ())
    left = [(user, _names_left(user, wanted, unwanted)) for user in users]
    if not any(kept for _, kept in left):
        raise InputError(f"--tags and --exclude-tags leave no class of mix {mixes}: {', '.join(names)}")
    return [replace(user, mix=user.mix.only(kept.__contains__)) for user, kept in left if kept]


def _names_left(user: UserClass, wanted: set[str], unwanted: set[str]) -> list[str]:
    own = [each.name for each in user.mix.classes if not {each.name, *user.tags} & unwanted]
    return [name for name in own if not wanted or {name, *user.tags} & wanted]


def _steady(values: Mapping, process: arrivals.Arrivals | None, mix: Mix | None) -> int | None:
    if values.get("steady") != EVERY_USER:
        return _whole(values, "steady")
    if process is None:
        return 0
    hint = ""
    if mix is not None and process.rate_per_s is not None:
        hint = f" (at a real-time factor of 0.5: {_in_progress(process.rate_per_s, mix, 0.5):.0f})"
    raise InputError(
        f"--steady in an open loop needs the number of sessions it starts with: rate x mean audio x rtf{hint}"
    )


def _in_progress(rate_per_s: float, mix: Mix, rtf: float) -> float:
    """Expected sessions in progress, by Little's law: N = X R, with residence R = audio x real-time factor."""
    return rate_per_s * mix.mean_audio_s() * rtf


def _is_on(values: Mapping, name: str) -> bool:
    return values.get(name) in (True, "true", "on")


def _number(values: Mapping, name: str) -> float | None:
    return _parsed(values, name, float)


def _whole(values: Mapping, name: str) -> int | None:
    return _parsed(values, name, int)


def _parsed(values: Mapping, name: str, kind: Callable[[Any], Number]) -> Number | None:
    text = values.get(name)
    if text is None or text == "":
        return None
    try:
        return kind(text)
    except ValueError:
        option = next(option for option in ARGUMENTS if dest(option) == name)
        raise InputError(f"{option} {text!r} is not {'a whole' if kind is int else 'a'} number") from None


def _rung_s(values: Mapping) -> float | None:
    seconds = _number(values, "rung_s")
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError(f"--rung-seconds {seconds:g} must be above 0")
    return seconds


def _time_limit_s(values: Mapping) -> float | None:
    """Locust's own -t in seconds: a text such as 1h20m30s, or seconds if Locust has parsed it already."""
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
