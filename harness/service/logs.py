"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from harness import exit_codes
from harness.errors import HarnessError, ServerError

_LOG = logging.getLogger("studio")


class JsonLines(logging.Formatter):
    """Time, part of the service, level and message; further fields as they were given."""

    def __init__(self, part: str):
        super().__init__()
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"at": at, "part": self._part, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(part: str) -> None:
    """Send this process's log to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(part))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def run_part(part: str, serve: Callable[[], None]) -> None:
    """Run a part of the service; what is wrong with its settings is one line of its log."""
    log_to_stderr(part)
    try:
        serve()
    except HarnessError as error:
        log(str(error), logging.ERROR)
        sys.exit(exit_codes.UNAVAILABLE if isinstance(error, ServerError) else exit_codes.USAGE)


def log(message: str, level: int = logging.INFO, **fields: Any) -> None:
    _LOG.log(level, message, extra={"fields": fields})
