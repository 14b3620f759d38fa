"""A real Prometheus with the rules of ops/prometheus, which scrapes servers every second."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from harness.deploy.ports import free_ports
from harness.errors import HarnessError

FOLDER = Path(__file__).resolve().parents[2] / "ops" / "prometheus"
READY_S, SCRAPE_S, PROMTOOL_S = 120.0, "1s", 300
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def tool(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``. Raises HarnessError where it is not installed."""
    if found := shutil.which(name):
        return found
    raise HarnessError(
        f"{name} is not on the PATH, and the operations check needs it: on Debian, apt-get install prometheus (which "
        "has promtool too), elsewhere https://prometheus.io/download"
    )


def promtool(*arguments: str) -> tuple[bool, str]:
    """Whether promtool finds nothing wrong, and what it says; it runs in ops/prometheus."""
    command = [tool("promtool"), *arguments]
    try:
        ran = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=PROMTOOL_S)
    except subprocess.TimeoutExpired:
        return False, f"promtool {' '.join(arguments)} has not ended after {PROMTOOL_S} s: try again on an idle host"
    return ran.returncode == 0, (ran.stdout + ran.stderr).strip()


class PrometheusServer:
    """A running Prometheus; ``ask`` and ``ask_range`` evaluate PromQL now and over a time."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, expression: str) -> list[dict]:
        """The series that an expression has now, with a finite or infinite value; NaN counts as none."""
        found = self._get("query", query=expression)["result"]
        return [one for one in found if one["value"][1] != "NaN"]

    def ask_range(self, expression: str, start_s: float, end_s: float) -> list[dict]:
        asked = {"query": expression, "start": start_s, "end": end_s, "step": 1}
        return self._get("query_range", **asked)["result"]

    def rules(self) -> list[dict]:
        """Every rule as it was last evaluated, with its group's name as ``group``."""
        groups = self._get("rules")["groups"]
        return [{**rule, "group": group["name"]} for group in groups for rule in group["rules"]]

    def targets_up(self) -> int:
        return sum(one["health"] == "up" for one in self._get("targets")["activeTargets"])

    def _get(self, what: str, **parameters) -> dict:
        address = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with _DIRECT.open(address, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise HarnessError(f"Prometheus refuses {parameters or what}: {error.read().decode()[:500]}") from None


@contextlib.contextmanager
def prometheus(targets: Sequence[str]) -> Iterator[PrometheusServer]:
    """Prometheus with our configuration, but for the intervals and the targets (host:port)."""
    program = tool("prometheus")
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="ops-check-") as folder:
        config = _written(Path(folder), targets)
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        with open(Path(folder, "log"), "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                server = PrometheusServer(f"http://127.0.0.1:{port}")
                _wait_ready(server, process, len(targets), Path(folder, "log"))
                yield server
            finally:
                process.terminate()
                process.wait(10)


def _written(folder: Path, targets: Sequence[str]) -> Path:
    """A copy of the configuration in ``folder``."""
    shutil.copytree(FOLDER / "rules", folder / "rules")
    (folder / "targets").mkdir()
    (folder / "targets" / "triton.yml").write_text(yaml.safe_dump([{"targets": list(targets)}]))
    content = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    content["global"] |= {"scrape_interval": SCRAPE_S, "evaluation_interval": SCRAPE_S}
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump(content))
    return config


def _wait_ready(server: PrometheusServer, process: subprocess.Popen, targets: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, HarnessError):
            if server.targets_up() == targets:
                return
        time.sleep(0.2)
    raise HarnessError(f"Prometheus did not scrape {targets} servers within {READY_S:g} s: {log.read_text()[-500:]}")
