"""The parts of docs/reference that the code determines: ``python docs/generate.py`` writes them into the pages.

A page has them between ``<!-- generated: NAME -->`` and ``<!-- end -->``; the rest of it is written by hand. What a key
or a knob is for stands here in one line each; names, types, limits and defaults come from the code. Raises KeyError for
a key without its line. A test holds the committed pages equal to what this script writes.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import typer
from pydantic import BaseModel

from harness import exit_codes as codes
from harness import wire
from harness.cli import main as cli
from harness.client.target import OPTIONS
from harness.deploy.config import Deployment
from harness.drive import options as load_options
from harness.planfile.jobs import JobsSpec
from harness.planfile.plan import FEW_POINTS, PlanSpec
from harness.planfile.sections import DAY_S, LEAST_TRIALS
from harness.planfile.space import KNOBS, STAGE_KNOBS
from harness.records.slo import METRIC_OF_KEY
from harness.records.summary import METRICS
from harness.server_metrics import SERVER_METRICS
from harness.topology import has_knob
from harness.traffic.mix import MIXES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((Path(__file__).resolve().parent / "reference").glob("*.md"))
BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

PLAN_KEYS = {
    "name": "Name of the run's folder under `results/`",
    "preset": "Size of the model",
    "seed": "Seed of request lengths, scripts and arrivals",
    "mix": "Traffic mix: a name, or [classes written out](#mix)",
    "scripts": "Folder of `.txt` scripts, cut or repeated to the lengths of the mix; left out: generated scripts",
    "emulate": "Profile whose times the stages take instead of computing",
    "dilate": "How many times slower than the emulated GPUs everything runs, undilated in every figure; `auto`: the "
    "smallest factor that takes less than 60% of the host",
    "gpus": "GPUs of one server, real or emulated",
    "device": "What the stages run on; `auto` is a GPU where the server's host has one",
    "dtype": "Number type of the stages; `auto` is bfloat16 on a GPU and float32 on a CPU",
    "topology": "How the frame path is deployed, see [the two topologies](../how-to/fused-topology.md)",
    "parameters": "`<model>.<parameter>: value` of a `config.pbtxt`, see [parameters](knobs.md#parameters)",
    "slos": "The SLOs of each traffic class, see [SLOs](#slos)",
    "targets_qps": "Target rates, requests per second",
    "space": "Search space: knob to values, see [knobs](knobs.md); every combination is a point",
    "search": f"[How the space is searched](#search); left out: `grid` up to {FEW_POINTS} points",
    "ladder": "The [closed-loop concurrency ladder](#ladder) that measures a point",
    "confirm": "The [open-loop runs](#confirm) that confirm the best point",
    "budget_minutes": "Time for all measurements",
    "utilisation_cap": "Highest share of a device's "
    "[steady rate](../concepts/interval-of-a-count.md#three-rates-of-a-device) that is planned",
    "routing": "How sessions are given to devices; the answer has the counts for the other ways beside it",
    "confidence": "Confidence level of intervals and of SLO verdicts",
    "max_error": "Largest relative error of a prediction against its open-loop run",
    "max_others": "CPU that other processes and the hypervisor may take, as a share of the cores that a run needs: "
    "[VALID and INVALID](../concepts/validity.md#others-on-the-host)",
    "prices": "Price of a device hour by device type (part of the device's name is enough)",
    "currency": "Currency of the prices",
    "growth_per_month": "Growth of the target rates, 0 to 1; 0.1 is 10% a month",
    "fleet": "Devices that exist, for the forecast",
    "demand": "[The demand over a day](#demand), for static and elastic fleets",
    "jobs": "File of [tasks](#jobs) that run beside the streams: the answer then has the devices for both on one fleet",
    "profiles": "[Profiles of other device types](#profiles), to compare device counts",
    "valid_days": "Days until the answer expires",
}
MIX_KEYS = {
    "name": f"Name of a built-in mix ({', '.join(MIXES)}), or of the one written out",
    "classes": "[Traffic classes](#classes) by name",
    "chunk_frames": "Frames of 133 ms in one response",
    "diffusion_steps": "Denoising steps of every frame",
    "voices": "Voice ids that each speaker draws from",
}
CLASS_KEYS = {
    "weight": "Share of the requests, relative to the other classes",
    "length": "Seconds of audio: `{fixed: 10}`, `{uniform: [4, 16]}`, `{lognormal: {median: 90, sigma: 0.5, "
    "max: 300}}`, `{empirical: lengths.csv}` (column `seconds`), or `from_script` to speak each script whole",
    "speakers": f"Lowest and highest number of speakers, 1 to {wire.MAX_SPEAKERS}",
}
LADDER_KEYS = {
    "sessions": "Concurrent sessions of each step (rung), ascending",
    "seconds": f"Longest time that a rung is held, 2 to {DAY_S}",
    "precision": "A rung ends early when its rate is steady and known to this share",
}
CONFIRM_KEYS = {
    "load_share": "Shares of the predicted highest rate",
    "seconds": f"Whole seconds of each run, 5 to {DAY_S}; a run that would be too short to judge is longer",
}
SEARCH_KEYS = {
    "kind": "`grid`: every point. `model`: Bayesian optimisation over a physical model of the stages. "
    "`tpe`, `random`: Optuna's samplers",
    "margin": "Tolerance: the search ends when no untried point is likely to be better by more than this share",
    "sure": "Confidence with which it ends so",
    "share": f"Point budget: it also ends after this share of the points (at least {LEAST_TRIALS})",
    "trials": "Point budget as a number; the smaller one of the two applies",
    "objective": "[Another goal](#objective) than the highest rate that meets every SLO",
}
OBJECTIVE_KEYS = {
    "maximise": "A [metric](metrics.md) to maximise; `<class>.<metric>` for one of a class",
    "minimise": "A metric to minimise; give either this or maximise",
    "at_most": "Upper limits of other metrics",
    "at_least": "Lower limits of other metrics",
}
PROFILE_KEYS = {
    "profile": "File that `harness profile` wrote; alone it may be given as text",
    "bandwidth_gb_s": "Memory bandwidth of another GPU, GB/s: scales the profile to it",
    "tflop_s": "Matrix throughput of the other GPU, TFLOP/s; goes with `bandwidth_gb_s`",
    "kv_room_gb": "Room for KV caches beside the weights; left out: as on the GPU of the profile",
}
DEMAND_KEYS = {
    "diurnal": "Rates that swing every 24 hours: [its keys](#diurnal)",
    "trace": "A file of arrivals: [its keys](#trace), or its path alone; give either this or diurnal",
    "start_seconds": "From the wish for a device until it serves",
    "poll_seconds": "Time between two looks of the autoscaler",
    "stabilisation_seconds": "The fleet shrinks to the most devices wished for in this time",
    "minimum": "Fewest devices",
    "maximum": "Most devices; left out: twice those that the peak needs",
    "target_sessions": "Sessions per device that the autoscaler holds; left out: the most with which every SLO is met",
}
DIURNAL_KEYS = {
    "peak_qps": "Highest rate, requests per second",
    "trough_qps": "Lowest rate, twelve hours from the highest",
    "peak_hour": "Hour of the highest rate, 0 to 24",
}
TRACE_KEYS = {
    "file": "CSV file of arrivals, as for `locust --trace`; relative to the plan",
    "hours": "Stretch its time to so many hours; left out: its own",
    "mean_qps": "Multiply its rates to this mean; left out: its own",
}
JOBS_KEYS = {
    "per_hour": "Tasks that are submitted in an hour, by chance (Poisson), at any time of the day",
    "length": "Seconds of audio of a task, in the form of a [class's](#classes) length",
    "slos": "SLOs on turnaround, from submission to the end: `{turnaround_p95: 2x}` of the audio's length, or "
    "`{turnaround_p95: 14400}` in seconds",
    "segment_seconds": "Seconds of audio of a segment: the studio's `--segment-seconds`",
    "at_once": "Tasks that all workers together run at once; left out: as many as there is room for",
    "resume_seconds": "Seconds that a task takes to go on with its next segment; left out: as long as to first audio, "
    "as fitted",
    "resume_seconds_per_minute": "Further seconds there, for each minute of audio spoken before",
    "streams_swing": "Swing of the streams' rate over a day, as a cosine: 0 is constant, 1 is none at night",
}
KNOB_MEANING = {
    "entry.instances": "Processes of the public entry",
    "engine.max_batch": "Sessions in one step of the engine; on a GPU at most its parameter `graphs`",
    "engine.instances": "Engines; on GPUs, on each GPU",
    "delay_us": "Batching delay: the longest time that Triton waits to fill a batch, microseconds",
    "max_batch": "Largest batch",
    "preferred_batch": "Batch size at which Triton stops waiting; 0 is none",
    "instances": "Model instances; on GPUs, on each GPU",
    "chunk_frames": "Frames of 133 ms in one response",
    "diffusion_steps": "Denoising steps of every frame",
}
PARAMETER_MEANING = {
    "preset": "Size of the model: tiny, 1.5b, 7b, or a `.json` file of sizes",
    "checkpoint": "Folder of a released checkpoint; empty: random weights",
    "weights_seed": "Seed of random weights",
    "voices": "Folder of voice samples; empty: four built-in voices",
    "device": "`cpu` or `gpu`: the stage refuses to run elsewhere; `auto` follows `instance_group`",
    "dtype": "Number type; `auto` is float32 on a CPU and bfloat16 on a GPU",
    "gpus": "GPUs that the instances share",
    "emulate": "Profile whose times are used instead of computing: set by `emulate` of a plan or of `harness serve`",
    "dilation": "How many times slower than the emulated GPU it runs: set by `dilate` of a plan or of `harness serve`",
    "graphs": "Largest batch that a GPU runs as one CUDA graph; 0 is none, `auto` is 128",
    "kv_limit_bytes": "KV cache bytes of all sessions; `auto`: see "
    "[room for KV caches](../how-to/gpu-host.md#room-for-kv-caches)",
    "sessions_at_once": "Concurrent sessions of the server",
    "waiting_limit": "Requests in the admission queue; further ones are rejected as busy",
    "waiting_seconds": "Longest time in the admission queue; then the request is rejected as busy",
    "prefill_tokens": "Tokens of a prompt that are read at once, between frame steps",
    "prefills_at_once": "Prompt parts of one entry instance in progress",
    "beat_seconds": "Longest silence of a stream; a client takes a longer one for a server failure",
    "carry_key_file": "File with the secret that seals saved sessions; empty: this user's key on this host",
    "max_batch": "Sessions in one step of the engine",
    "in_hand_seconds": "Prompts take at most half a step while a listener has fewer seconds of audio buffered",
}
BENCHMARKS = {
    "Model": ("model/oracle", "model/precision", "model/stage_speed", "model/kernels", "model/ninety_minutes",
              "model/hops", "model/sessions", "model/fairness", "model/topologies", "model/exported", "model/fuzz",
              "model/storm", "model/server_faults"),
    "Load": ("load/arrivals", "load/instrument", "load/faults", "load/gates", "load/dilation"),
    "Sweep": ("sweep/search", "sweep/sweep_cost", "sweep/sweep_faults", "sweep/first_run", "sweep/disturbed"),
    "Capacity": ("capacity/simulator", "capacity/coverage", "capacity/truths", "capacity/heldout", "capacity/compare",
                 "capacity/autoscale", "capacity/fleet_mix"),
    "Service": ("service/job_faults", "service/jobs", "service/api_fuzz", "service/turnaround"),
    "Operations": ("ops/check",),
    "GPU": ("gpu/environment", "gpu/device", "gpu/fused", "gpu/rows", "gpu/towers", "gpu/streams",
            "gpu/estimates", "gpu/kit"),
}  # fmt: skip


VERDICTS = {
    "met": "every target has a count, and open-loop runs confirm it",
    "missed": "no deployment meets the SLOs at any rate",
    "planning estimate": "as met, but over times that nobody measured, or dilated ones; 0 with `--accept-estimates`",
    "inconclusive": "the data do not decide, and it says what would; with `--check`: changed, forged or expired",
}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(map(_cell, row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Outside of code, nothing is to be taken for markup."""
    parts = " ".join(str(text).split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))


def keys(name: str, meanings: dict[str, str], of: type[BaseModel] = PlanSpec) -> str:
    """The keys of a file's model, or of one inside it: type, limits and default of each."""
    schema = of.model_json_schema()
    model = schema if name == of.__name__ else schema["$defs"][name]
    properties, required = model["properties"], model.get("required", ())
    if extra := meanings.keys() - properties.keys():
        raise KeyError(f"docs/generate.py explains {', '.join(extra)}, which {name} does not have")
    rows = (
        (f"`{key}`", _type(about), "required" if key in required else _default(about), meanings[key])
        for key, about in properties.items()
    )
    return table(("key", "value", "default", "meaning"), rows)


def _type(about: dict) -> str:
    if "anyOf" in about:
        return next(_type(each) for each in about["anyOf"] if each.get("type") != "null")
    if "enum" in about:
        return ", ".join(f"`{each}`" for each in about["enum"])
    if "$ref" in about or about.get("type") == "object":
        return "mapping"
    if "prefixItems" in about:
        return f"[{', '.join(_type(each) for each in about['prefixItems'])}]"
    if about.get("type") == "array":
        return f"list of: {_type(about['items'])}"
    names = {"integer": "whole number", "number": "number", "string": "text"}
    return " ".join(filter(None, [names.get(about.get("type"), "see meaning"), _limits(about)]))


def _limits(about: dict) -> str:
    named = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    return ", ".join(f"{sign} {about[name]:,.9g}" for name, sign in named if name in about)


def _default(about: dict) -> str:
    value = about.get("default")
    if value is None:
        return ""
    return "see below" if isinstance(value, dict) else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def slo_keys() -> str:
    """How the SLOs of a plan are named, and the metric that each limits."""
    shapes = {key: key.removesuffix("_s") + "_pNN" + ("_s" if key.endswith("_s") else "") for key in METRIC_OF_KEY}
    rows = ((f"`{shapes[key]}`", f"`{metric}`") for key, metric in METRIC_OF_KEY.items())
    return table(("key (NN from 1 to 99.9)", "metric of a request"), rows)


def knobs() -> str:
    """Every knob of a search space with its limits, default and topologies."""
    defaults = {"chunk_frames": 1, "diffusion_steps": wire.DEFAULT_DIFFUSION_STEPS, "entry.instances": 1}
    for topology in wire.TOPOLOGIES:
        defaults |= Deployment(device="cpu", topology=topology).defaults()
    rows = []
    for knob, (low, high) in KNOBS.items():
        owner, _, name = knob.rpartition(".")
        if owner in wire.STAGES:  # as the bare knob
            continue
        one = f"{wire.LLM}.{knob}" if knob in STAGE_KNOBS else knob
        topologies = ", ".join(topology for topology in wire.TOPOLOGIES if has_knob(topology, one))
        meaning = KNOB_MEANING.get(knob) or KNOB_MEANING[name]
        rows.append((f"`{knob}`", f"{low} to {high:,}", str(defaults[one]), topologies, meaning))
    return table(("knob", "values", "default", "topology", "meaning"), rows)


def parameters() -> str:
    """Every parameter of a model's config.pbtxt."""
    found: dict[str, dict[str, str]] = {}
    for topology in wire.TOPOLOGIES:
        for model, config in Deployment(topology=topology).configs().items():
            name = wire.ENGINE if topology == wire.FUSED and model == wire.ENTRY else model
            for parameter, value in config.parameters.items():
                found.setdefault(parameter, {})[name] = value.string_value
    rows = ((f"`{name}`", *_models(found[name]), PARAMETER_MEANING[name]) for name in PARAMETER_MEANING | found)
    return table(("parameter", "models", "default", "meaning"), rows)


def _models(defaults: dict[str, str]) -> tuple[str, str]:
    """The models that have a parameter, and its defaults."""
    models = "all but vibevoice_frame" if len(defaults) == len(wire.MODELS) else ", ".join(sorted(defaults))
    values = set(defaults.values())
    return models, values.pop() if len(values) == 1 else ", ".join(f"{defaults[each]} ({each})" for each in defaults)


def metrics() -> str:
    """Every metric of a summary."""
    rows = [(f"`{m.name}`", m.formula, m.unit, "yes" if m.per_class else "", m.note) for m in METRICS]
    return table(("metric", "formula", "unit", "per class", "note"), rows)


def server_metrics() -> str:
    """Every metric that a server adds to its Prometheus page."""
    rows = (
        (f"`{m.name}`", m.kind, m.unit, ", ".join(f"`{label}`" for label in m.labels), m.about) for m in SERVER_METRICS
    )
    return table(("metric", "kind", "unit", "labels", "meaning"), rows)


def commands() -> str:
    """Every command of ``harness`` with its arguments, options and example."""
    found = typer.main.get_command(cli.app).commands
    return "\n".join(_command(name, command) for name, command in found.items())


def _command(name: str, command) -> str:
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and each.name != "help"]
    of_servers = [each for each in options if each.opts[0] in OPTIONS]
    usage = " ".join([f"harness {name}", "[OPTIONS]", *map(_argument, arguments)])
    rows = [(f"`{_argument(each)}`", _shown_default(each), each.help or "") for each in arguments]
    own = [each for each in options if each not in of_servers]
    rows += [(f"`{_option(each)}`", _shown_default(each), each.help or "") for each in own]
    parts = [f"## harness {name}", f"```text\n{usage}\n```", command.help.replace("\\[", "["), command.epilog]
    parts += [table(("argument or option", "default", "meaning"), rows).rstrip()] if rows else []
    parts += [f"and the [server options](#server-options){_but(of_servers)}."] if of_servers else []
    return "\n\n".join(parts) + "\n"


def _but(options: list) -> str:
    left_out = [f"`{name}`" for name in OPTIONS if name not in {each.opts[0] for each in options}]
    return f", but {' and '.join(left_out)}" if left_out else ""


def _argument(parameter) -> str:
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter) -> str:
    value = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
    return f"{', '.join(parameter.opts)}{value}"


def _shown_default(parameter) -> str:
    value = parameter.default
    given = isinstance(value, str | int | float | Path) and value not in ("", -1) and value is not False
    return "required" if parameter.required else f"`{value}`" if given else ""


def server_options() -> str:
    """The options of servers, which several commands have."""
    return table(("option", "meaning"), ((_load_option(name, about), about["help"]) for name, about in OPTIONS.items()))


def locust_options() -> str:
    """The options of a load test, without those of servers."""
    rows = (
        (_load_option(option, about), f"`{about['default']}`" if about.get("default") else "", about["help"])
        for option, about in load_options.ARGUMENTS.items()
        if option not in OPTIONS
    )
    return table(("option", "default", "meaning"), rows)


def _load_option(option: str, about: dict) -> str:
    value = f" {about['metavar']}" if "metavar" in about else ""
    return f"`{', '.join([option, *about.get('flags', ())])}{value}`"


def exit_codes() -> str:
    """Exit codes of ``harness``."""
    rows = [(str(code), f"{verdict}: {VERDICTS[verdict]}") for verdict, code in codes.OF_VERDICT.items()]
    rows += [(str(code), meaning) for code, meaning in codes.OF_COMMANDS.items()]
    return table(("code", "meaning"), rows)


def comparison_exit_codes() -> str:
    """Exit codes of ``harness compare``, beside those of every command."""
    return table(("code", "meaning"), [(str(code), meaning) for code, meaning in codes.OF_COMPARISONS.items()])


def locust_exit_codes() -> str:
    """Exit codes of a load test."""
    return table(("code", "meaning"), [(str(code), meaning) for code, meaning in codes.OF_LOAD_TESTS.items()])


def benchmarks() -> str:
    """One line from each benchmark's docstring, by group."""
    files = {str(path.relative_to(ROOT / "benchmarks").with_suffix("")): path for path in _benchmark_files()}
    scripts = {name: path for name, path in files.items() if "__main__" in path.read_text()}
    grouped = [name for names in BENCHMARKS.values() for name in names]
    if set(grouped) != scripts.keys():
        raise KeyError(f"docs/generate.py: give these a group: {sorted(set(grouped) ^ scripts.keys())}")
    text = ""
    for group, names in BENCHMARKS.items():
        rows = ((f"`benchmarks/{name}.py`", _first_paragraph(scripts[name])) for name in names)
        text += f"## {group}\n\n" + table(("script", "what it measures"), rows) + "\n"
    shared = ", ".join(f"`{name}.py`" for name in files if name not in scripts)
    return text + f"Modules that they share: {shared}.\n"


def _benchmark_files() -> Iterator[Path]:
    return iter(sorted((ROOT / "benchmarks").rglob("*.py")))


def _first_paragraph(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].replace("``", "`")


BLOCKS: dict[str, Callable[[], str]] = {
    "plan-keys": lambda: keys("PlanSpec", PLAN_KEYS),
    "mix-keys": lambda: keys("MixSpec", MIX_KEYS),
    "class-keys": lambda: keys("ClassSpec", CLASS_KEYS),
    "slo-keys": slo_keys,
    "ladder-keys": lambda: keys("LadderSpec", LADDER_KEYS),
    "confirm-keys": lambda: keys("ConfirmSpec", CONFIRM_KEYS),
    "search-keys": lambda: keys("SearchSpec", SEARCH_KEYS),
    "objective-keys": lambda: keys("ObjectiveSpec", OBJECTIVE_KEYS),
    "profile-keys": lambda: keys("ProfileSpec", PROFILE_KEYS),
    "demand-keys": lambda: keys("DemandSpec", DEMAND_KEYS),
    "diurnal-keys": lambda: keys("DiurnalSpec", DIURNAL_KEYS),
    "trace-keys": lambda: keys("TraceSpec", TRACE_KEYS),
    "jobs-keys": lambda: keys("JobsSpec", JOBS_KEYS, JobsSpec),
    "knobs": knobs,
    "parameters": parameters,
    "metrics": metrics,
    "server-metrics": server_metrics,
    "commands": commands,
    "server-options": server_options,
    "locust-options": locust_options,
    "exit-codes": exit_codes,
    "comparison-exit-codes": comparison_exit_codes,
    "locust-exit-codes": locust_exit_codes,
    "benchmarks": benchmarks,
}


def filled(page: str) -> str:
    """The text of a page with its generated parts as the code has them now."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]().rstrip()}\n\n{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text()))
        print(path.relative_to(ROOT))
