"""Points of a search space in words."""

from harness.runs import points


def test_points_are_described_in_few_words():
    same = {f"{stage}.delay_us": 5 for stage in ("vibevoice_llm_encoder", "diffusion_decoder", "neural_vocoder")}
    assert (
        points.describe_point(same | {"diffusion_decoder.instances": 2}) == "delay_us 5, diffusion_decoder.instances 2"
    )
    assert points.describe_point({"chunk_frames": 3}) == "chunk_frames 3"
    assert points.describe_point({}) == "as the repository has it"
