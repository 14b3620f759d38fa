"""Triton adapter of the public entry: checks a request, then runs its frame loop over the ensemble."""

from harness.vibevoice.entry.endpoint import Entry


class TritonPythonModel:
    def initialize(self, args):
        self.entry = Entry(args)

    async def execute(self, requests):
        await self.entry.serve(requests)

    def finalize(self):
        self.entry.close()
