"""Writes a folder of files whole: a reader sees all of them or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import InputError

RECORD = "export.json"  # in every exported folder: what it was made from


def write_folder(out: Path, files: Mapping[str, str], record: Mapping[str, Any], *, replace: bool = False) -> None:
    """Write ``files`` (text by relative path) and the record into ``out``, beside it first, then by a rename.

    The record lists the files with their hashes. Raises InputError where ``out`` is neither new nor empty, unless
    ``replace``, which replaces earlier exports that nobody changed since; and where it cannot be written.
    """
    must_be_free(out, replace=replace)
    beside = out.parent / f".{out.name}.{os.getpid()}"
    old = beside.with_name(f"{beside.name}.old")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        content = {**record, "files": {name: _hash(files[name].encode()) for name in sorted(files)}}
        for name, text in {**files, RECORD: json.dumps(content, indent=1) + "\n"}.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if out.exists():
            out.rename(old)
        beside.rename(out)
    except OSError as error:
        if old.exists() and not out.exists():
            old.rename(out)
        raise InputError(f"--out {out} cannot be written: {error.strerror}; give another folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def must_be_free(out: Path, *, replace: bool = False) -> None:
    """Raise InputError where ``out`` holds what must not be lost."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"--out {out} is no folder: give another one")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / RECORD).is_file():
        raise InputError(f"--out {out} is not empty, and no export: give a new folder")
    if not replace:
        raise InputError(f"--out {out} holds an export already: give a new folder, or --replace")
    if changed := _changed(out):
        more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
        raise InputError(
            f"--out {out} holds {changed[0]}{more}, which the earlier export did not write so: --replace would lose "
            "it; move it, or give a new folder"
        )


def _changed(out: Path) -> list[str]:
    """The files of an export that were added or edited since, by relative path. Raises InputError."""
    try:
        written = json.loads((out / RECORD).read_text()).get("files")
    except (OSError, ValueError, AttributeError):
        written = None
    if not isinstance(written, dict):
        raise InputError(f"--out {out} holds an export that does not say what it wrote: give a new folder")
    found = [path for path in sorted(out.rglob("*")) if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(out).as_posix(): path for path in found}
    return [
        name
        for name, path in names.items()
        if name != RECORD and (path.is_symlink() or not path.is_file() or written.get(name) != _hash(path.read_bytes()))
    ]


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
