"""A page of the report as a PDF, printed by an installed Chromium."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from harness.errors import HarnessError, InputError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 120.0
_DRAWING_MS = 20_000  # virtual time for the page to draw its plots
_OPTIONS = (
    "--headless", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer", "--disable-extensions",
    "--no-sandbox",  # Chromium as root does not start with a sandbox; we wrote the page ourselves
)  # fmt: skip


def write_pdf(html_path: Path, timeout_s: float = TIMEOUT_S) -> Path:
    """Print a page to the PDF of the same name, and return its path.

    Raises InputError where no browser is found or the page is missing, HarnessError where printing fails or takes
    longer than ``timeout_s``; an earlier PDF is then left unchanged, and no process or file is left behind.
    """
    html_path = Path(html_path).resolve()
    if not html_path.is_file():
        raise InputError(f"cannot print {html_path}: no such page")
    browser, pdf_path = browser_path(), html_path.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(prefix="harness-pdf-", ignore_cleanup_errors=True) as folder:
        printed = Path(folder, "page.pdf")
        _print(browser, html_path, printed, Path(folder, "profile"), timeout_s)
        fresh = pdf_path.with_name(f".{pdf_path.name}.tmp")
        try:
            shutil.copyfile(printed, fresh)
            fresh.replace(pdf_path)
        except OSError as error:
            raise HarnessError(f"cannot write {pdf_path}: {error.strerror}") from None
        finally:
            fresh.unlink(missing_ok=True)
    return pdf_path


def browser_path() -> str:
    """The first browser on PATH that can print. Raises InputError where there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise InputError(
            f"no browser to print with: none of {', '.join(BROWSERS)} is on the PATH; install one (on Debian: apt-get "
            "install chromium), or open the page in any browser and print it there"
        )
    return found


def _print(browser: str, html_path: Path, pdf_path: Path, profile: Path, timeout_s: float) -> None:
    command = [browser, *_OPTIONS, f"--user-data-dir={profile}", f"--virtual-time-budget={_DRAWING_MS}"]
    command += [f"--print-to-pdf={pdf_path}", html_path.as_uri()]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        said = process.communicate(timeout=timeout_s)[1].decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise HarnessError(
            f"{browser} did not print {html_path} within {timeout_s:g} s: try again, or print it from a browser"
        ) from None
    finally:
        _end(process)
    if process.returncode or not pdf_path.is_file() or not pdf_path.stat().st_size:
        last = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise HarnessError(f"{browser} could not print {html_path}: {last}; try again, or print it from a browser")


def _end(process: subprocess.Popen) -> None:
    """End the browser with all processes of its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    if process.stderr:
        process.stderr.close()
