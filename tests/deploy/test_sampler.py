"""Samples of a server: what is not whole is not kept."""

from harness.deploy import sampler
from harness.deploy.sampler import Probe
from harness.records.schema import StageStatistics

PAGE = {"vibevoice_engine_steps{4}": 10.0, "vibevoice_engine_step_seconds{4}": 0.5}


class Reader:
    def __init__(self, *_):
        pass

    def snapshot(self):
        return (StageStatistics("vibevoice_full_pipeline", 1, 1, 0, 1),)

    def close(self):
        pass


def test_a_sample_without_the_counts_of_an_engine_that_has_some_is_missed(monkeypatch):
    """A window that began with it would count all steps since the engine"s start."""
    pages = iter([{}, PAGE, {}, PAGE])
    monkeypatch.setattr(sampler, "StatisticsReader", Reader)
    monkeypatch.setattr(sampler, "prometheus", lambda url: next(pages))
    looking = Probe("here:1", metrics_url="http://here:2/metrics")
    for _ in range(4):
        looking._look()
    assert looking.missed == 1
    assert [len(sample.stages) for sample in looking.samples] == [1, 2, 2]
