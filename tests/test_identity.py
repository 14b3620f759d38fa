"""What stages say of themselves is held against what was requested; every difference is named with its fix."""

from dataclasses import replace

import pytest
from report_sample import manifest

from harness import wire
from harness.errors import InputError, ServerError
from harness.identity import CPU, EMULATED, GPU, Requested, StageIdentity, must_be_as_requested
from harness.records.store import Run
from harness.runs import analysis, opening
from harness.runs.stages import kv_room, record_stages, stages_by_server

MODELS = (*wire.STAGES, wire.VOICE)
H100 = {"kind": GPU, "device": "cuda:0", "gpu": "NVIDIA H100", "gpu_uuid": "GPU-1", "dtype": "bfloat16"}
ON_CPU = {"kind": CPU, "device": "cpu", "dtype": "float32"}


def server(on=ON_CPU, preset="tiny", code="/here", gpus=1, kv=1 << 33, **changed):
    """What a server's processes say; ``changed``: fields of a model by its first word, such as neural={...}."""
    said = [StageIdentity(wire.ENTRY, "entry@0", CPU, "cpu", code=code)]
    for model in MODELS:
        for gpu in range(gpus if model in wire.STAGES else 1):
            one = {**on, **({"gpu_uuid": f"GPU-{gpu}", "device": f"cuda:{gpu}"} if on["kind"] == GPU else {})}
            room = {"kv_limit_bytes": kv, "kv_bytes_per_token": 512} if model == wire.LLM else {}
            about = {"preset": preset, "weights": "random, seed 0", "code": code, "code_digest": "1", **one, **room}
            about |= changed.get(model.split("_")[0], {})
            said.append(StageIdentity(model, f"{model}@{gpu}", **about))
    return [replace(each, code_digest="1") if each.code_digest in ("", "1") else each for each in said]


@pytest.mark.parametrize(
    ("stages", "requested"),
    [
        (server(), Requested("tiny", CPU, "float32", "/here")),
        (server(), Requested("tiny")),
        (server(H100, "1.5b"), Requested("1.5b", GPU, gpus=1)),
        (server(H100, "1.5b", gpus=4), Requested("1.5b", GPU, "bfloat16", gpus=4)),
        (server({"kind": EMULATED, "device": "emulated H200", "dtype": "bfloat16"}), Requested("tiny", EMULATED)),
    ],
)
def test_a_server_as_requested_is_taken(stages, requested):
    assert must_be_as_requested(stages, requested, "here:1") is None  # it raises where they differ


@pytest.mark.parametrize(
    ("stages", "requested", "says"),
    [
        (server(), Requested("1.5b"), "preset 1.5b was requested, but diffusion_decoder says tiny"),
        (server(), Requested("tiny", GPU), "kind gpu was requested, but .* says cpu"),
        (server(H100, neural=ON_CPU), Requested("tiny", GPU), "kind gpu was requested, but neural_vocoder says cpu"),
        (server(H100, neural=ON_CPU), Requested("tiny"), "the stages differ in kind: .*neural_vocoder cpu"),
        (server(), Requested("tiny", CPU, "bfloat16"), "dtype bfloat16 was requested"),
        (
            server(diffusion={"dtype": "float16"}),
            Requested("tiny"),
            "the stages differ in dtype: diffusion_decoder float16",
        ),
        (server(code="/other"), Requested("tiny", code="/here"), "code /here was requested, but .* says /other"),
        (server(voice={"code": "/old"}), Requested("tiny"), "the stages differ in code: .*voice_encoder /old"),
        (server(neural={"code_digest": "2"}), Requested("tiny"), "the stages differ in code_digest"),
        (server(H100, gpus=2), Requested("tiny", GPU, gpus=4), "neural_vocoder runs on 2 of 4 GPUs"),
    ],
)
def test_every_difference_is_named_with_what_to_do(stages, requested, says):
    with pytest.raises(ServerError, match=f"nothing is measured on it: .*{says}.*\\("):
        must_be_as_requested(stages, requested, "here:1")


def test_one_of_several_instances_that_fell_back_is_found_wherever_it_stands():
    stages = server(H100, gpus=4)
    for place, stage in enumerate(stages):
        if stage.model in wire.STAGES:
            fallen = [*stages[:place], replace(stage, **ON_CPU, gpu="", gpu_uuid=""), *stages[place + 1 :]]
            for requested in (Requested("tiny", GPU, gpus=4), Requested("tiny")):
                with pytest.raises(ServerError, match=f"kind.*{stage.model} (says )?cpu"):
                    must_be_as_requested(fallen, requested, "here:1")


def test_what_another_version_says_more_is_left_out():
    content = server()[1].content() | {"colour": "green"}
    assert StageIdentity.of(content) == server()[1]


def run_with(tmp_path, device, **changes):
    return Run.create(tmp_path, manifest(device=device, finished_at="", **changes))


@pytest.mark.parametrize(
    ("device", "stages", "named", "unit"),
    [
        ("cpu", server(), "cpu", "this host (2 CPU cores)"),
        ("NVIDIA L4", server(), "cpu", "this host (2 CPU cores)"),  # the driver shows a GPU, the plan says cpu
        ("cpu", server(H100), "NVIDIA H100", "one NVIDIA H100"),
        ("cpu", server(H100, gpus=4), "4 NVIDIA H100", "4 NVIDIA H100"),
        ("the Triton at a:1", server(), "the Triton at a:1", "the Triton at a:1"),
        ("the Triton at a:1", server(H100), "the Triton at a:1 (NVIDIA H100)", "the Triton at a:1 (NVIDIA H100)"),
    ],
)
def test_a_run_is_named_after_what_its_stages_ran_on(tmp_path, device, stages, named, unit):
    run = run_with(tmp_path, device)
    for _ in range(2):  # a second start of the same run, on the same device
        record_stages(run, {"a:1": stages})
    again = Run.open(run.path)
    assert again.manifest.device == named and opening.unit_of(again.manifest) == f"{unit} at preset tiny"
    assert stages_by_server(again.manifest) == {"a:1": stages}


def test_trials_of_different_devices_are_never_one_run(tmp_path):
    run = run_with(tmp_path, "cpu")
    record_stages(run, {"a:1": server(H100)})
    others = server({**H100, "gpu": "NVIDIA A10"}), server(H100, voice={"code_digest": "2"}), server(H100, gpus=2)
    for other in (server(), *others):
        with pytest.raises(InputError, match="mix different devices .*--fresh"):
            record_stages(run, {"a:1": other})
    with pytest.raises(InputError, match="NVIDIA H100.*cpu, float32|cpu, float32.*NVIDIA H100"):
        record_stages(run_with(tmp_path / "two", "cpu"), {"a:1": server(H100), "b:1": server()})


def test_what_was_signed_keeps_what_its_stages_said(tmp_path):
    run = run_with(tmp_path, "cpu")
    record_stages(run, {"a:1": server(H100)})
    run.update_manifest(finished_at="2025-01-31T09:19:12+00:00")
    before = (run.path / "manifest.json").read_bytes()
    record_stages(run, {"b:2": server(H100)})
    assert (run.path / "manifest.json").read_bytes() == before
    with pytest.raises(InputError, match="mix different devices"):
        record_stages(run, {"b:2": server()})


def test_room_for_kv_caches_is_what_the_stages_say_of_every_gpu(tmp_path):
    run = run_with(tmp_path, "the Triton at a:1")
    spec = opening.spec_of(run)
    assert kv_room(run.manifest, spec) is None  # an older run: nobody said
    record_stages(run, {"a:1": server(H100, gpus=4, kv=60 << 30)})
    room = kv_room(run.manifest, spec)
    assert (room.limit_bytes, room.instances, room.bytes_per_token) == (60 << 30, 4, 512)


@pytest.mark.parametrize(("stages", "gpus"), [(server(), 1), (server(H100), 1), (server(H100, gpus=4), 4)])
def test_a_device_of_the_answer_has_the_gpus_that_its_stages_run_on(tmp_path, stages, gpus):
    run = run_with(tmp_path, "the Triton at a:1")
    record_stages(run, {"a:1": stages, "b:1": stages})
    assert analysis.terms_of(run.manifest, opening.spec_of(run)).gpus == gpus
