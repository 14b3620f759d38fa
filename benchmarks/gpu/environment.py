"""Facts of a GPU host, its packages, GPUs and the doctor's findings, as OUT/environment.json."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from harness.cli.doctor import examine  # noqa: E402
from harness.host import nvml, provenance  # noqa: E402
from harness.host.places import ROOT  # noqa: E402


def main(arguments: list[str]) -> int:
    example = "Example:\n  python benchmarks/gpu/environment.py --out results/gpu/here"
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder; it is made")
    folder = parser.parse_args(arguments).out
    folder.mkdir(parents=True, exist_ok=True)
    checks = examine(ROOT)
    content = {
        "host": provenance.host_facts().to_dict(),
        "gpus": [asdict(gpu) for gpu in nvml.present()],
        "commit": provenance.commit(),
        "versions": provenance.versions(),
        "doctor": [asdict(check) for check in checks],
    }
    (folder / "environment.json").write_text(json.dumps(content, indent=1))
    failed = [check for check in checks if check.fine is False]
    for check in failed:
        print(f"{check.what}: {check.found}; {check.fix}")
    print(json.dumps({"gpus": len(content["gpus"]), "failed_checks": len(failed)}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
