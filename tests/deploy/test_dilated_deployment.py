"""Time dilation of a deployment: what its server is given, and what stays as it is."""

import pytest
from made_up_profile import write
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.cards.card import card_of
from harness.cards.costs import costs_of
from harness.cards.estimate import assumptions_for, estimated_profile, file_name
from harness.clock import Clock
from harness.deploy.config import Deployment, read_config, write_repository
from harness.deploy.statistics import _stage
from harness.errors import InputError
from harness.host.places import SCENARIOS
from harness.planfile.reading import load_plan
from harness.records.store import read_profile
from harness.runs import points

KNOBS = {"vibevoice_llm_encoder.delay_us": 1000, "diffusion_decoder.delay_us": 2000}


@pytest.fixture
def deployment(tmp_path):
    def make(dilation):
        return Deployment("1.5b", emulate=str(write(tmp_path / "gpu.json")), knobs=KNOBS, dilation=dilation)

    return make


def test_a_server_gets_its_times_as_they_are_on_the_host(deployment, tmp_path):
    write_repository(tmp_path / "models", deployment(20.0))
    served = {model: read_config(tmp_path / "models" / model / "config.pbtxt") for model in wire.MODELS}
    assert served[wire.LLM].sequence_batching.oldest.max_queue_delay_microseconds == 20_000
    assert served[wire.LLM].sequence_batching.max_sequence_idle_microseconds == 20 * 120_000_000
    assert served[wire.DIFFUSION].dynamic_batching.max_queue_delay_microseconds == 40_000
    parameters = served[wire.ENTRY].parameters
    assert parameters["waiting_seconds"].string_value == "600"
    assert parameters["beat_seconds"].string_value == "2"  # of the processes of the host
    for model in (wire.ENTRY, *wire.STAGES, wire.VOICE):
        assert Clock.of(served[model].parameters[wire.DILATION].string_value) == Clock(20.0)


def test_knobs_and_defaults_stay_those_of_the_gpu(deployment):
    assert deployment(20.0).defaults() == deployment(1.0).defaults()
    assert deployment(1.0).served() == deployment(1.0).configs()


def test_only_emulated_time_can_be_dilated():
    with pytest.raises(InputError, match="only emulated GPUs can run slower"):
        Deployment(dilation=2.0)
    with pytest.raises(InputError, match="must lie in 1 to 1000"):
        Deployment(dilation=0.5)


def test_statistics_are_in_the_times_of_the_clock():
    model = pb.ModelStatistics(name=wire.LLM, execution_count=5)
    model.inference_stats.queue.ns, model.inference_stats.compute_infer.ns = 8000, 4000
    batch = model.batch_stats.add(batch_size=2)
    batch.compute_infer.ns, batch.compute_infer.count = 4000, 5
    stage = _stage(model, Clock(4.0))
    assert (stage.queue_ns, stage.compute_ns, stage.batches[0].compute_ns) == (2000, 1000, 1000)
    assert (stage.executions, stage.batches[0].executions) == (5, 5)


@pytest.mark.parametrize("name", ["h100", "h200", "l40s"])
def test_the_profiles_of_the_scenarios_are_what_is_estimated_now(name):
    """`harness profile --estimate CARD --preset 1.5b --out scenarios/profiles` writes them again."""
    spec = load_plan(SCENARIOS / f"{name}.yaml")
    stored, card, costs = read_profile(spec.profile_path()), card_of(name), costs_of(spec.preset)
    anew = estimated_profile(card, costs, wire.STAGED, assumptions_for(card, costs, wire.STAGED))
    assert spec.profile_path().name == file_name(card, anew) and stored.known_as == "estimated"
    assert (stored.device, stored.model, stored.stages) == (anew.device, anew.model, anew.stages)
    assert spec.dilate == "auto" and points.deployment_of(spec, None).emulate
