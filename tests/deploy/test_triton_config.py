"""Deployments as Triton configurations: what is written is what was asked for, and valid by itself."""

import json

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from harness import wire
from harness.deploy.config import REPOSITORY, Deployment, as_json, read_config, write_repository
from harness.deploy.statistics import difference
from harness.device_profile import ModelSizes, Profile
from harness.errors import InputError, ServerError
from harness.host import nvml
from harness.records import store
from harness.records.schema import BatchStatistics, StageStatistics
from harness.topology import instances_of
from harness.vibevoice.process.parameters import number


def test_the_repository_holds_the_models_of_the_contract():
    folders = {path.name for path in REPOSITORY.iterdir() if path.is_dir()}
    assert folders == {*wire.MODELS, wire.ENGINE}
    configs = Deployment().configs()
    assert configs[wire.FRAME].platform == "ensemble"
    assert [step.model_name for step in configs[wire.FRAME].ensemble_scheduling.step] == list(wire.STAGES)
    assert configs[wire.ENTRY].model_transaction_policy.decoupled
    assert all(configs[m].HasField("sequence_batching") for m in (wire.LLM, wire.VOCODER))
    assert all(configs[m].HasField("dynamic_batching") for m in (wire.DIFFUSION, wire.VOICE))


def test_the_default_deployment_is_the_repository_as_it_is():
    for model, config in Deployment().configs().items():
        assert config == read_config(REPOSITORY / model / "config.pbtxt")


@given(
    delays=st.fixed_dictionaries({stage: st.integers(0, 10**6) for stage in wire.STAGES}),
    instances=st.integers(1, 8),
    batch=st.integers(1, 256),
)
def test_knobs_end_up_where_triton_reads_them(delays, instances, batch):
    knobs = {f"{stage}.delay_us": delay for stage, delay in delays.items()}
    knobs |= {f"{wire.DIFFUSION}.instances": instances, f"{wire.DIFFUSION}.max_batch": batch, "entry.instances": 2}
    configs = Deployment(knobs=knobs).configs()
    llm, diffusion = configs[wire.LLM], configs[wire.DIFFUSION]
    assert llm.sequence_batching.oldest.max_queue_delay_microseconds == delays[wire.LLM]
    assert diffusion.dynamic_batching.max_queue_delay_microseconds == delays[wire.DIFFUSION]
    assert (diffusion.instance_group[0].count, diffusion.max_batch_size) == (instances, batch)
    assert configs[wire.ENTRY].instance_group[0].count == 2
    assert configs[wire.FRAME].max_batch_size == min(batch, llm.max_batch_size)


def test_the_model_to_serve_reaches_every_stage(tmp_path):
    configs = Deployment(preset="1.5b", checkpoint="/models/x", weights_seed=3).configs()
    for model in (wire.LLM, wire.DIFFUSION, wire.VOCODER, wire.VOICE):
        values = {name: p.string_value for name, p in configs[model].parameters.items()}
        assert (values["preset"], values["checkpoint"], values["weights_seed"]) == ("1.5b", "/models/x", "3")


def test_a_written_repository_reads_back_and_loads_the_same_code(tmp_path):
    deployment = Deployment(knobs={"neural_vocoder.instances": 3})
    write_repository(tmp_path, deployment)
    for model, config in deployment.configs().items():
        assert read_config(tmp_path / model / "config.pbtxt") == config
        assert (tmp_path / model / "1").resolve() == (REPOSITORY / model / "1").resolve()


def test_a_fused_deployment_is_the_engine_under_the_name_of_the_entry(tmp_path):
    knobs = {"engine.max_batch": 8, "engine.instances": 2, f"{wire.ENGINE}:parameters.prefill_tokens": 64}
    deployment = Deployment(topology=wire.FUSED, knobs=knobs, parameters={f"{wire.ENGINE}.sessions_at_once": "7"})
    assert set(deployment.configs()) == set(deployment.models) == {wire.ENTRY, wire.VOICE}
    write_repository(tmp_path, deployment)
    engine = read_config(tmp_path / wire.ENTRY / "config.pbtxt")
    given = {name: parameter.string_value for name, parameter in engine.parameters.items()}
    assert engine.name == wire.ENTRY and engine.instance_group[0].count == 2
    assert (given["max_batch"], given["prefill_tokens"], given["sessions_at_once"]) == ("8", "64", "7")
    assert (tmp_path / wire.ENTRY / "1").resolve() == (REPOSITORY / wire.ENGINE / "1").resolve()


@pytest.mark.parametrize(
    ("topology", "knob", "message"),
    [
        (wire.FUSED, "neural_vocoder.delay_us", "fused topology has no such knob.*engine.<max_batch.*staged topology"),
        (wire.FUSED, "entry.instances", "the fused topology has no such knob"),
        (wire.FUSED, f"{wire.LLM}:max_batch_size", "the fused topology has no such knob"),
        (wire.STAGED, "engine.max_batch", "staged topology has no such knob.*<stage>.<knob>.*the fused topology"),
        (wire.STAGED, f"{wire.ENGINE}:parameters.max_batch", "the staged topology has no such knob"),
        (wire.FUSED, "engine.delay_us", "the fused engine has engine.max_batch, engine.instances"),
        (wire.FUSED, "vocoder:max_batch_size", "unknown model 'vocoder'"),
    ],
)
def test_a_knob_of_another_topology_is_refused_with_what_to_do(topology, knob, message):
    with pytest.raises(InputError, match=message):
        Deployment(topology=topology, knobs={knob: 1})


def test_the_json_of_a_configuration_says_the_same():
    config = Deployment(knobs={"diffusion_decoder.delay_us": 700}).configs()[wire.DIFFUSION]
    text = as_json(config)
    assert "max_queue_delay_microseconds" in json.loads(text)["dynamic_batching"]
    assert json_format.Parse(text, model_config_pb2.ModelConfig()) == config


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"diffusion.delay_us": 1}, "diffusion_decoder"),
        ({"diffusion_decoder.delay": 1}, "delay_us"),
        ({"diffusion_decoder.delay_us": -1}, "from 0 to"),
        ({"diffusion_decoder.instances": 0}, "from 1 to"),
        ({"diffusion_decoder.max_batch": 1 << 31}, "to 2147483647"),
    ],
)
def test_impossible_knobs_are_refused(knobs, message):
    with pytest.raises(InputError, match=message):
        Deployment(knobs=knobs)


def test_the_entry_has_no_delay_to_turn():
    with pytest.raises(InputError, match="does not batch"):
        Deployment(knobs={"entry.delay_us": 5}).configs()


def values(config):
    return {name: each.string_value for name, each in config.parameters.items()}


def write_profile(path, preset="tiny"):
    sizes = ModelSizes(hidden_size=8, kv_bytes_per_token=8, state_values=8)
    store.write_profile(path, Profile(device="H200", preset=preset, model=sizes, stages={}))
    return str(path)


def test_a_parameter_of_a_model_is_set_there_alone():
    before = Deployment().configs()
    after = Deployment(parameters={f"{wire.ENTRY}.waiting_limit": "3"}).configs()
    assert values(after[wire.ENTRY]) == {**values(before[wire.ENTRY]), "waiting_limit": "3"}
    assert all(after[model] == before[model] for model in wire.MODELS if model != wire.ENTRY)


@pytest.mark.parametrize(
    "name", ["waiting_limit", "entry.waiting_limit", f"{wire.LLM}.waiting_limit", f"{wire.ENTRY}."]
)
def test_a_parameter_that_no_model_has_is_refused_with_those_known(name):
    with pytest.raises(InputError, match=rf"{wire.LLM}\.kv_limit_bytes") as refused:
        Deployment(parameters={name: "3"})
    assert repr(name) in str(refused.value)


@given(gpus=st.integers(1, 64), llm=st.none() | st.integers(1, 8))
def test_each_emulated_gpu_gets_the_instances_of_every_stage(tmp_path_factory, gpus, llm):
    profile = write_profile(tmp_path_factory.getbasetemp() / "tiny.json")
    knobs = {f"{wire.LLM}.instances": llm} if llm else {}
    deployment = Deployment(emulate=profile, gpus=gpus, knobs=knobs)
    configs = deployment.configs()
    counts = {model: configs[model].instance_group[0].count for model in (*wire.STAGES, wire.ENTRY, wire.VOICE)}
    assert counts == {
        wire.LLM: gpus * (llm or 1), wire.DIFFUSION: gpus, wire.VOCODER: gpus, wire.ENTRY: 1, wire.VOICE: 1
    }  # fmt: skip
    for model in (wire.LLM, wire.DIFFUSION, wire.VOCODER, wire.VOICE):
        assert (values(configs[model])["emulate"], values(configs[model])["gpus"]) == (profile, str(gpus))
    assert values(configs[wire.ENTRY])["emulate"] == profile
    assert {f"{stage}.instances": 1 for stage in wire.STAGES} | knobs | deployment.defaults() == deployment.defaults()
    assert deployment.turn(configs) == deployment.configs()  # also on what a server has, as an external one is turned


def host_with(monkeypatch, gpus):
    found = tuple(nvml.Gpu(i, "NVIDIA H100", f"GPU-{i}", 80 << 30, 79 << 30, "580") for i in range(gpus))
    monkeypatch.setattr(nvml, "visible", lambda: found)


def test_on_a_host_with_gpus_every_stage_has_an_instance_on_each_that_is_asked_for(monkeypatch):
    host_with(monkeypatch, 4)
    kinds = model_config_pb2.ModelInstanceGroup
    for gpus in (1, 3):
        deployment = Deployment("1.5b", gpus=gpus)
        deployment.check_host()
        configs = deployment.configs()
        for stage in wire.STAGES:
            (group,) = configs[stage].instance_group
            assert (group.kind, list(group.gpus), group.count) == (kinds.KIND_GPU, list(range(gpus)), 1)
            assert values(configs[stage])["device"] == "gpu" and configs[stage].max_batch_size == 128
        assert list(configs[wire.VOICE].instance_group[0].gpus) == [0]
        assert configs[wire.ENTRY].instance_group[0].kind == kinds.KIND_CPU
        assert configs[wire.FRAME].max_batch_size == 128
        sessions = int(values(configs[wire.ENTRY])["sessions_at_once"])
        assert sessions == 512 and configs[wire.LLM].sequence_batching.oldest.max_candidate_sequences == 2 * sessions
    turned = {f"{wire.LLM}.max_batch": 16, f"{wire.LLM}.instances": 2}
    knobs = Deployment("1.5b", knobs=turned, dtype="float16").configs()
    assert knobs[wire.FRAME].max_batch_size == 16 and knobs[wire.LLM].instance_group[0].count == 2
    assert values(knobs[wire.VOCODER])["dtype"] == "float16"


def started(configs, stage):
    """Instances of a stage that Triton starts: the count, on each GPU of the group."""
    (group,) = configs[stage].instance_group
    return group.count * max(len(group.gpus), 1)


@pytest.mark.parametrize("knobs", [{}, {f"{wire.LLM}.instances": 2, f"{wire.VOCODER}.instances": 3}])
@pytest.mark.parametrize("gpus", [1, 4])
def test_what_won_on_emulated_gpus_starts_as_many_instances_on_real_ones(monkeypatch, tmp_path, gpus, knobs):
    profile = write_profile(tmp_path / "tiny.json")
    emulated = Deployment(emulate=profile, gpus=gpus, knobs=knobs)
    host_with(monkeypatch, gpus)
    real = Deployment(device="gpu", gpus=gpus, knobs=knobs)
    for stage in wire.STAGES:
        expected = gpus * knobs.get(f"{stage}.instances", 1)
        assert [started(each.configs(), stage) for each in (emulated, real)] == [expected] * 2
        assert instances_of(knobs, stage, gpus) == expected
        assert [each.defaults()[f"{stage}.instances"] for each in (emulated, real)] == [expected // gpus] * 2
    raw = {f"{wire.LLM}:instance_group.0.count": 2}
    assert started(Deployment(device="gpu", gpus=gpus, knobs=raw).configs(), wire.LLM) == 2 * gpus
    if gpus > 1:
        with pytest.raises(InputError, match=rf"use {wire.LLM}\.instances"):
            Deployment(emulate=profile, gpus=gpus, knobs=raw)


def test_a_cpu_that_is_asked_for_and_emulated_gpus_are_no_gpu_of_the_host(monkeypatch, tmp_path):
    host_with(monkeypatch, 2)
    for deployment in (Deployment(device="cpu"), Deployment(emulate=write_profile(tmp_path / "tiny.json"))):
        deployment.check_host()
        for model, config in deployment.configs().items():
            assert model == wire.FRAME or config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
        assert deployment.kind in ("cpu", "emulated")


@pytest.mark.parametrize(
    ("have", "asked", "says"),
    [
        (0, {"device": "gpu"}, "1 GPUs are requested, but this host shows none: check `harness doctor`"),
        (2, {"gpus": 3}, "3 GPUs are requested, but this host shows 2"),
        (0, {"gpus": 2}, "gpus is 2, but this host has no GPU"),
    ],
)
def test_gpus_that_a_host_has_not_are_refused_before_triton_starts(monkeypatch, have, asked, says):
    host_with(monkeypatch, have)
    with pytest.raises(InputError, match=says):
        Deployment(**asked).check_host()


def test_paths_are_absolute_whatever_the_server_runs_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.json").write_text("{}")
    write_profile(tmp_path / "profile.json", preset="own")
    deployed = Deployment(preset="own.json", emulate="profile.json")
    assert (deployed.preset, deployed.emulate) == (str(tmp_path / "own.json"), str(tmp_path / "profile.json"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"preset": "3b"}, "tiny, 1.5b or 7b"),
        ({"preset": "none.json"}, "no such file"),
        ({"emulate": "none.json"}, "cannot read"),
        ({"emulate": __file__}, "harness profile"),
        ({"gpus": 2, "device": "cpu"}, "the device is the CPU"),
        ({"device": "tpu"}, "unknown device 'tpu': use one of auto, cpu, gpu"),
        ({"dtype": "int8"}, "unknown dtype 'int8': use one of auto, float32, bfloat16, float16"),
        ({"device": "gpu", "emulate": "tiny.json"}, "emulated stages compute nothing"),
        ({"gpus": 0, "emulate": "tiny.json"}, "1 to 64"),
        ({"preset": "7b", "emulate": "tiny.json"}, "measured at preset tiny, not 7b"),
    ],
)
def test_what_cannot_be_deployed_is_refused(tmp_path, monkeypatch, asked, message):
    monkeypatch.chdir(tmp_path)
    write_profile(tmp_path / "tiny.json")
    with pytest.raises(InputError, match=message):
        Deployment(**asked)


def test_what_is_no_repository_is_named(tmp_path):
    with pytest.raises(ServerError, match="config.pbtxt"):
        Deployment().configs(tmp_path)
    (tmp_path / "config.pbtxt").write_text("name: [")
    with pytest.raises(ServerError, match="not a valid Triton configuration"):
        read_config(tmp_path / "config.pbtxt")


def stage(requests, executions, batches, name="s"):
    return StageStatistics(name, requests, executions, 10 * requests, 100 * requests, batches)


def test_a_window_of_statistics_is_a_difference_per_batch_size():
    before = [stage(5, 3, (BatchStatistics(1, 1, 100), BatchStatistics(2, 2, 300)))]
    after = [stage(15, 7, (BatchStatistics(1, 1, 100), BatchStatistics(2, 4, 640), BatchStatistics(3, 2, 400)))]
    (window,) = difference(after, before)
    assert (window.requests, window.executions, window.queue_ns) == (10, 4, 100)
    assert window.batches == (BatchStatistics(2, 2, 340), BatchStatistics(3, 2, 400))


def test_a_stage_reloaded_within_a_window_counts_from_its_reload():
    fresh = stage(2, 2, (BatchStatistics(1, 2, 50),))
    assert difference([fresh], [stage(50, 40, ())]) == (fresh,)


@pytest.mark.parametrize(
    "knob, value, line",
    [
        (f"{wire.DIFFUSION}.preferred_batch", 8, "preferred_batch_size: 8"),
        (f"{wire.LLM}.preferred_batch", 4, "preferred_batch_size: 4"),
        (f"{wire.DIFFUSION}:dynamic_batching.preferred_batch_size", [4, 8], "preferred_batch_size: 4"),
        (f"{wire.DIFFUSION}:dynamic_batching.preserve_ordering", True, "preserve_ordering: true"),
        (f"{wire.VOCODER}:sequence_batching.max_sequence_idle_microseconds", 7_000_000, "microseconds: 7000000"),
        (f"{wire.VOCODER}:instance_group.0.count", 2, "count: 2"),
        (f"{wire.ENTRY}:parameters.prefill_tokens", 65, 'string_value: "65"'),
    ],
)
def test_any_key_of_a_configuration_can_be_turned(knob, value, line):
    model = knob.split(":")[0].split(".")[0]
    assert line not in str(Deployment().configs()[model])
    assert line in str(Deployment(knobs={knob: value}).configs()[model])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({f"{wire.DIFFUSION}.preferred_batch": 64}, "diffusion_decoder: preferred_batch 64 .* max_batch, which is 32"),
        ({f"{wire.LLM}.preferred_batch": 8, f"{wire.LLM}.max_batch": 4}, "preferred_batch 8 .* which is 4"),
        ({f"{wire.DIFFUSION}:dynamic_batching.preferred_batch_size": [4, 64]}, "preferred_batch 64"),
        ({f"{wire.DIFFUSION}:dynamic_batching.preferred_batch_size": [0]}, "preferred_batch 0"),
        ({f"{wire.VOCODER}:max_batch_size": 0}, "neural_vocoder: max_batch is 0"),
        ({f"{wire.VOCODER}:instance_group.0.count": 0}, "neural_vocoder: instances is 0"),
        ({"entry.max_batch": 8}, "does not batch: it has no max_batch"),
    ],
)
def test_batches_and_instances_that_no_server_starts_with_are_refused_before_it_does(tmp_path, knobs, message):
    with pytest.raises(InputError, match=message):
        write_repository(tmp_path / "models", Deployment(knobs=knobs))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        (f"{wire.LLM}:dynamic_batching.max_queue_delay_microseconds", 5, "uses sequence_batching"),
        (f"{wire.DIFFUSION}:sequence_batching.max_sequence_idle_microseconds", 5, "uses dynamic_batching"),
        (f"{wire.VOCODER}:sequence_batching.direct.max_queue_delay_microseconds", 5, "uses oldest"),
        (f"{wire.ENTRY}:dynamic_batching.max_queue_delay_microseconds", 5, "scheduling_choice it uses none"),
        (f"{wire.FRAME}:dynamic_batching.preserve_ordering", True, "uses ensemble_scheduling"),
    ],
)
def test_a_key_of_a_scheduler_that_the_model_does_not_use_is_refused(knob, value, message):
    """Setting it would swap the schedulers without a word."""
    with pytest.raises(InputError, match=f"this model does not use .*{message}"):
        Deployment(knobs={knob: value})


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        (f"{wire.LLM}.kv_limit_bytes", "1.5e9", "1500000000"),
        (f"{wire.LLM}.kv_limit_bytes", 2.0, "2"),
        (f"{wire.ENTRY}.waiting_seconds", "0.5", "0.5"),
        (f"{wire.LLM}.kv_limit_bytes", "8GiB", None),
        (f"{wire.LLM}.kv_limit_bytes", "1.5", None),
        (f"{wire.LLM}.kv_limit_bytes", "0", None),
        (f"{wire.LLM}.kv_limit_bytes", "1e400", None),
        (f"{wire.ENTRY}.waiting_limit", "-1", None),
        (f"{wire.ENTRY}.waiting_limit", True, None),
        (f"{wire.ENTRY}.beat_seconds", "nan", None),
        (f"{wire.ENTRY}.beat_seconds", "0.01", None),
        (f"{wire.ENTRY}.sessions_at_once", "", None),
    ],
)
def test_a_parameter_that_is_a_number_is_written_as_its_model_reads_it_or_refused(name, value, written):
    model, _, parameter = name.partition(".")
    for asked in ({"parameters": {name: value}}, {"knobs": {f"{model}:parameters.{parameter}": value}}):
        if written:
            assert values(Deployment(**asked).configs()[model])[parameter] == written
        else:
            with pytest.raises(InputError, match=f"{parameter} is .*: it must be a .*number of at least"):
                Deployment(**asked)


def test_every_number_of_the_repository_is_known_with_its_limits():
    """What is known is what the processes behind it read as numbers."""
    found = {}
    configs = [config for topology in wire.TOPOLOGIES for config in Deployment(topology=topology).configs().values()]
    for config in configs:
        found |= {name: text for name, text in values(config).items() if text.replace(".", "").isdigit()}
        found |= {name: text for name, text in values(config).items() if name in wire.NUMBERS and text == wire.AUTO}
    assert found.keys() == wire.NUMBERS.keys()
    assert {name for name, text in found.items() if text == wire.AUTO} <= set(wire.AUTO_PARAMETERS)
    for name, text in found.items():
        assert text == wire.AUTO or number({name: text}, name) >= wire.NUMBERS[name][1]


def test_folders_that_are_not_there_are_refused_before_a_server_starts(tmp_path):
    (tmp_path / "empty").mkdir()
    for asked, message in (
        ({"checkpoint": str(tmp_path / "none")}, "checkpoint .*none: no such folder"),
        ({"checkpoint": str(tmp_path / "empty")}, "empty is not a checkpoint folder: it holds no config.json"),
        ({"voices": str(tmp_path / "none")}, "voices folder .*none: no such folder"),
        ({"voices": str(tmp_path / "empty")}, "empty holds no voice"),
        ({"parameters": {f"{wire.ENTRY}.voices": str(tmp_path / "none")}}, "voices folder .*none"),
    ):
        with pytest.raises(InputError, match=message):
            Deployment(**asked).check()
    assert Deployment().voice_count() == 4


def test_no_preferred_batch_is_none():
    knobs = {f"{wire.DIFFUSION}.preferred_batch": 0}
    assert list(Deployment(knobs=knobs).configs()[wire.DIFFUSION].dynamic_batching.preferred_batch_size) == []


@pytest.mark.parametrize(
    "knob, value, said",
    [
        ("vocoder:max_batch_size", 4, "unknown model 'vocoder'; use one of"),
        (
            f"{wire.VOCODER}:sequence_batching.max_sequence_idle",
            4,
            "no key 'max_sequence_idle' here; there are direct, oldest",
        ),
        (f"{wire.VOCODER}:instance_group.3.count", 4, "no key '3' here"),
        (f"{wire.VOCODER}:parameters.colour", 4, "no key 'colour' here; there are"),
        (f"{wire.VOCODER}:max_batch_size", "many", "does not accept 'many'"),
        (f"{wire.VOCODER}:max_batch_size", -(2**40), "does not accept"),
        (f"{wire.DIFFUSION}:dynamic_batching.preferred_batch_size", 4, "does not accept 4"),
        (f"{wire.DIFFUSION}.delay_us", True, "must be a whole number"),
    ],
)
def test_a_key_that_is_not_there_is_named_with_those_that_are(knob, value, said):
    with pytest.raises(InputError, match=said):
        Deployment(knobs={knob: value})
