"""What is kept of Triton's Prometheus page: what its statistics do not say."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

from harness.triton.statistics import prometheus

PAGE = """# HELP nv_inference_count Number of inferences performed
nv_inference_count{model="vocoder",version="1"} 12
nv_inference_pending_request_count{model="vocoder",version="1"} 3
nv_inference_request_failure{model="vocoder",reason="BACKEND",version="1"} 0
nv_inference_request_failure{model="vocoder",reason="OTHER",version="1"} 2
nv_cpu_utilization 0.25
nv_gpu_memory_used_bytes{gpu_uuid="GPU-1"} 1.5e+09
nv_gpu_utilization{gpu_uuid="GPU-1"} nan
"""


class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(PAGE.encode())

    def log_message(self, *_):
        pass


def test_the_page_is_read_without_what_the_statistics_hold():
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/metrics"
        assert prometheus(url) == {
            "nv_inference_pending_request_count{vocoder}": 3,
            "nv_inference_request_failure{vocoder,OTHER}": 2,
            "nv_cpu_utilization": 0.25,
            "nv_gpu_memory_used_bytes{GPU-1}": 1.5e9,
        }
        server.shutdown()
    assert prometheus(url) == prometheus("no page") == {}
