"""What PromQL expressions name: their metrics, found in the parsed expression."""

from collections.abc import Iterator

import promql_parser

from harness.server_metrics import SERVER_METRICS, series

# Of Triton and of Prometheus; the ones of GPUs only where there are some.
TRITONS = {
    "nv_inference_count", "nv_inference_exec_count", "nv_inference_request_success", "nv_inference_request_failure",
    "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_infer_duration_us",
    "nv_inference_pending_request_count", "nv_cpu_utilization", "nv_gpu_utilization", "nv_gpu_memory_used_bytes",
    "nv_gpu_power_usage", "nv_energy_consumption",
}  # fmt: skip
KNOWN = TRITONS | {"up"} | {name for metric in SERVER_METRICS for name in series(metric)}


def metrics_of(expression: str) -> set[str]:
    """The names of the metrics in an expression. Raises ValueError where it is no PromQL."""
    return set(_names(promql_parser.parse(expression)))


def _names(node) -> Iterator[str]:
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    elif isinstance(node, promql_parser.MatrixSelector):
        yield node.vector_selector.name
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from _names(node.lhs)
        yield from _names(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for each in node.args:
            yield from _names(each)
    elif not isinstance(node, promql_parser.NumberLiteral | promql_parser.StringLiteral):
        yield from _names(node.expr)
