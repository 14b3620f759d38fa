"""The manifest of a run on a CPU; tests replace what theirs differ in."""

from harness.identity import HostFacts
from harness.records.schema import RunManifest

MANIFEST = RunManifest(
    run_id="new",
    created_at="2026-01-01T00:00:00",
    plan_path="plan.yaml",
    plan_sha256="",
    plan={},
    commit="",
    versions={},
    host=HostFacts(cpu="EPYC", cores=2, memory_gib=24.0, gpu="none"),
    preset="tiny",
    device="cpu",
    seed=1,
)
