"""Closes the unary call of the installed server, with which one client could end it."""

from __future__ import annotations

import secrets
import shutil
import string
from pathlib import Path

_SERVICE = b"/inference.GRPCInferenceService/"
_METHOD = b"ModelInfer"
_NAME = _SERVICE + _METHOD + b"\0"  # as the server registers it with gRPC, once


def without_unary_call(server: Path, copy: Path) -> bool:
    """Copy a tritonserver so that it answers ModelInfer with UNIMPLEMENTED; returns whether it does.

    Triton 2.51 frees the state of a unary call twice if its client leaves it, or its deadline passes, at the wrong
    moment: a few thousand such calls end the server. Nothing needs the call: the entry answers in streams only, and the
    stages answer the entry alone, which does not call them over gRPC. No flag closes it, so the copy registers it under
    a name of ten random letters instead. The file is copied as it is where the name does not occur exactly once.
    """
    shutil.copy2(server, copy)
    content = server.read_bytes()
    if content.count(_NAME) != 1:
        return False
    other = "".join(secrets.choice(string.ascii_letters) for _ in _METHOD).encode()
    copy.write_bytes(content.replace(_NAME, _SERVICE + other + b"\0"))
    return True
