"""Copies the folder of a run to object storage: any URL that fsspec knows."""

from __future__ import annotations

from pathlib import Path

import fsspec

from harness.errors import InputError, ServerError
from harness.report.facts import SEAL_NAME, SIGNATURE_NAME

_LAST = (SEAL_NAME, SIGNATURE_NAME)  # whoever finds a seal finds all that it seals


def must_be_usable(url: str) -> None:
    """Raise InputError for a URL whose scheme or package is unknown, before anything is measured."""
    _opened(url)


def copy_run(folder: Path, url: str) -> str:
    """Copy a run's files to ``url``/<run>, the seal last; returns where. Raises InputError or ServerError."""
    files, root = _opened(url)
    target = f"{root.rstrip('/')}/{folder.name}"
    try:
        for path in _in_order(folder):
            name = f"{target}/{path.relative_to(folder).as_posix()}"
            files.makedirs(name.rpartition("/")[0], exist_ok=True)
            files.put_file(str(path), name)
    except Exception as error:  # a storage's own
        raise ServerError(
            f"{url} does not take the run ({type(error).__name__}: {error}): it is whole in {folder}: copy it"
        ) from error
    return f"{url.rstrip('/')}/{folder.name}"


def _in_order(folder: Path) -> list[Path]:
    """The files of a run but for locks and drafts; those that others wait for come last."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return sorted(found, key=lambda path: _LAST.index(path.name) + 1 if path.name in _LAST else 0)


def _opened(url: str):
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(
            f"--store {url} cannot be used ({error}): give a folder, or a URL of fsspec whose package is installed "
            "(for s3:// it is s3fs)"
        ) from None
