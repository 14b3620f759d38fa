"""A real Triton whose one model writes down what its stub imports: run it as a script, with the folder to work in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from timetable_server import TimetableServer

from harness import wire

MODEL = """
import json, sys
import numpy
import harness.vibevoice

class TritonPythonModel:
    def initialize(self, args):
        facts = {"harness": harness.__file__, "numpy": numpy.__version__, "path": sys.path, "prefix": sys.prefix}
        open(%r, "w").write(json.dumps(facts))
    def execute(self, requests):
        return []
"""


class WhereServer(TimetableServer):
    """After ``start``, ``facts()`` says where the stub's packages come from."""

    def _lay_out(self, found) -> None:
        super()._lay_out(found)
        self.answer = self.folder / "facts.json"
        version = self.folder / "models" / wire.ENTRY / "1"
        version.unlink()
        version.mkdir()
        (version / "model.py").write_text(MODEL % str(self.answer))

    def facts(self) -> dict:
        return json.loads(self.answer.read_text())


if __name__ == "__main__":
    with WhereServer(root=Path(sys.argv[1])) as server:
        print(json.dumps(server.facts()))
