"""What is kept of Triton's Prometheus page: what its statistics do not say."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fake_triton import FakeTriton, Timetable, serving
from tritonclient.grpc import service_pb2 as pb

from harness import wire
from harness.deploy.statistics import StatisticsReader, engine_stage, prometheus
from harness.records.schema import BatchStatistics, StageStatistics

PAGE = """# HELP nv_inference_count Number of inferences performed
nv_inference_count{model="vocoder",version="1"} 12
nv_inference_pending_request_count{model="vocoder",version="1"} 3
nv_inference_request_failure{model="vocoder",reason="BACKEND",version="1"} 0
nv_inference_request_failure{model="vocoder",reason="OTHER",version="1"} 2
nv_cpu_utilization 0.25
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 1.5e+09
nv_gpu_utilization{gpu_uuid="GPU-1"} nan
"""


VERSIONS = """nv_inference_pending_request_count{model="vocoder",version="1"} 3
nv_inference_pending_request_count{model="vocoder",version="2"} 4
nv_inference_request_failure{version="2",model="vocoder",reason="OTHER"} 2
nv_inference_request_failure{version="1",model="vocoder",reason="OTHER"} 1
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 1
nv_gpu_memory_used_bytes{gpu_uuid="GPU-2"} 2
python_gc_objects_total 9
"""


class Page(BaseHTTPRequestHandler):
    page = PAGE

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def read():
    """What is read of a page."""
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/metrics"

        def of(page):
            Page.page = page
            return prometheus(url)

        yield of
        server.shutdown()
    assert prometheus(url) == prometheus("no page") == {}


@pytest.mark.parametrize(
    "spoil", [str, lambda page: page.replace("\n", "\r\n"), lambda page: page.replace("\n", " 1700000000000\n")]
)
def test_the_page_is_read_without_what_the_statistics_hold(read, spoil):
    """With the line ends of a proxy, or with the timestamps that an exporter may add."""
    assert read("".join(spoil(line) if line[0] != "#" else line for line in PAGE.splitlines(keepends=True))) == {
        "nv_inference_pending_request_count{vocoder}": 3,
        "nv_inference_request_failure{vocoder,OTHER}": 2,
        "nv_cpu_utilization": 0.25,
        "nv_gpu_memory_used_bytes{GPU-1}": 1.5e9,
    }


def test_the_versions_of_a_model_are_summed_and_nothing_else_is(read):
    assert read(VERSIONS) == {
        "nv_inference_pending_request_count{vocoder}": 7,
        "nv_inference_request_failure{vocoder,OTHER}": 3,
        "nv_gpu_memory_used_bytes{GPU-1}": 1,
        "nv_gpu_memory_used_bytes{GPU-2}": 2,
    }


ENGINE_PAGE = """# TYPE nv_inference_request_failure counter
nv_inference_request_failure{model="vocoder",reason="OTHER",version="1"} 2
# TYPE vibevoice_engine_steps counter
vibevoice_engine_steps{batch="16"} 3
vibevoice_engine_steps{batch="2"} 10
# TYPE vibevoice_engine_step_seconds counter
vibevoice_engine_step_seconds{batch="2"} 0.05
vibevoice_engine_step_seconds{batch="16"} 0.03
# TYPE vibevoice_engine_prompt_tokens counter
vibevoice_engine_prompt_tokens 484
"""


def test_the_steps_of_the_engine_are_counted_as_those_of_a_stage(read):
    rest, stage = engine_stage(read(ENGINE_PAGE))
    assert rest == {"nv_inference_request_failure{vocoder,OTHER}": 2, wire.ENGINE_PROMPT_TOKENS: 484}
    batches = BatchStatistics(2, 10, 50_000_000), BatchStatistics(16, 3, 30_000_000)
    assert stage == StageStatistics(wire.ENGINE, 68, 13, 0, 2 * 50_000_000 + 16 * 30_000_000, batches)
    assert engine_stage(read(PAGE)) == (read(PAGE), None)


def test_a_page_of_something_else_says_nothing(read):
    assert read("<html>busy</html>") == read("") == {}


def test_the_statistics_of_the_versions_of_a_model_are_summed(monkeypatch):
    async def two_versions(self, request, context):
        answer = pb.ModelStatisticsResponse()
        for version, executions in (("1", 3), ("2", 4)):
            stage = answer.model_stats.add(name=wire.VOCODER, version=version, execution_count=executions)
            stage.inference_stats.success.count = 2 * executions
        return answer

    monkeypatch.setattr(FakeTriton, "ModelStatistics", two_versions)
    with serving(Timetable()) as fake:
        reader = StatisticsReader(fake.url)
        (stage,) = reader.snapshot()
        reader.close()
    assert (stage.stage, stage.executions, stage.requests) == (wire.VOCODER, 7, 14)
