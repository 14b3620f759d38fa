"""The README's picture of the report, from results/sample-quick: ``python docs/picture.py`` (needs a Chromium)."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from harness.report import paper

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Path(__file__).resolve().parent / "images" / "signoff.png"
WIDTH, HEIGHT, COLOURS = 1280, 845, 48

if __name__ == "__main__":
    page = ROOT / "results" / "sample-quick" / "signoff.html"
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run(
            [paper.browser_path(), "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}",
             "--virtual-time-budget=8000", f"--screenshot={shot}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        Image.open(shot).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1000} kB")
