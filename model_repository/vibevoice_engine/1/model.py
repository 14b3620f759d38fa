"""Triton adapter of the fused engine: the public entry, and all stages of the frame path, in one process."""

from harness.vibevoice.engine.model import engine_of
from harness.vibevoice.entry.endpoint import Entry


class TritonPythonModel:
    def initialize(self, args):
        self.entry = Entry(args, engine_of)

    async def execute(self, requests):
        await self.entry.serve(requests)

    def finalize(self):
        self.entry.close()
