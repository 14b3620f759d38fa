"""The metrics of a real server appear on its Prometheus page and add up after a request."""

import time
import urllib.request

import pytest
from conftest import make_request
from prometheus_client.parser import text_string_to_metric_families

from harness import wire
from harness.records.schema import Outcome
from harness.server_metrics import FIRST_AUDIO, FUSED_ONLY, SERVER_METRICS, series

pytestmark = pytest.mark.server


def page(server) -> dict:
    """The samples of the server's page by name and labels."""
    with urllib.request.urlopen(server.metrics_url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(one.name, *sorted(one.labels.items())): one.value for each in families for one in each.samples}


def total(samples: dict, name: str, **labels) -> float:
    return sum(
        value for (each, *have), value in samples.items() if each == name and labels.items() <= dict(have).items()
    )


def test_the_metrics_of_a_server_add_up_after_one_request(triton, speak):
    before = page(triton)
    wanted = {name for metric in SERVER_METRICS if metric not in FUSED_ONLY for name in series(metric)}
    assert wanted <= {name for name, *_ in before}
    done, refused = speak(make_request(frames=6), make_request("unknown voice", speakers=(99,)))
    assert done.outcome is Outcome.DONE and refused.error.startswith(wire.REFUSED)
    grown = {
        ("vibevoice_frames_total", ""): 6,
        ("vibevoice_requests_total", "done"): 1,
        ("vibevoice_requests_total", "refused"): 1,
        ("vibevoice_requests_total", "failed"): 0,
        (f"{FIRST_AUDIO.name}_count", ""): 1,
    }

    def growth(after):
        by = {key: {"outcome": key[1]} if key[1] else {} for key in grown}
        return {key: total(after, key[0], **by[key]) - total(before, key[0], **by[key]) for key in grown}

    deadline = time.monotonic() + 60
    while growth(after := page(triton)) != grown or total(after, "vibevoice_stage_sessions"):
        assert time.monotonic() < deadline, (growth(after), total(after, "vibevoice_stage_sessions"))
        time.sleep(0.2)
    waited_s = total(after, f"{FIRST_AUDIO.name}_sum") - total(before, f"{FIRST_AUDIO.name}_sum")
    assert 0 < waited_s < (done.chunks.received_ns[0] - done.sent_ns) / 1e9
    assert total(after, "vibevoice_sessions") == total(after, "vibevoice_queue_length") == 0
    assert total(after, "vibevoice_kv_promised_bytes") == total(after, "vibevoice_kv_used_bytes") == 0
    assert total(after, "vibevoice_kv_limit_bytes", model=wire.LLM) > 1 << 20
    assert total(after, "vibevoice_sessions_limit", model=wire.ENTRY) == 250
