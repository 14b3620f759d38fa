"""Triton adapter of the fused engine: the public entry, and all stages of the frame path, in one process."""

from harness.vibevoice.entry import Entry
from harness.vibevoice.fused import engine_of


class TritonPythonModel:
    def initialize(self, args):
        self.entry = Entry(args, engine_of)

    async def execute(self, requests):
        await self.entry.serve(requests)

    def finalize(self):
        self.entry.engine.close()
