"""What is taken from nvidia-smi, whatever it says."""

import pytest

from harness import probe


@pytest.mark.parametrize(
    ("says", "percent", "used_mib"),
    [
        ("echo '12, 345'", 12.0, 345),
        ("echo '1, 2'; echo '90, 4'", 1.0, 2),  # the first GPU of two
        ("echo '[N/A], 345'", None, 345),  # a GPU in parts
        ("echo '12, [N/A]'", 12.0, None),  # one that shares the host's memory
        ("echo 'No devices were found'", None, None),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", None, None),
    ],
)
def test_a_gpu_that_does_not_tell_all_is_no_error(tmp_path, monkeypatch, says, percent, used_mib):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{says}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(probe, "_HAS_GPU", True)
    assert probe.gpu_load() == (percent, None if used_mib is None else used_mib * 2**20)
    assert "Failed" not in probe.host_facts()["gpu"]
