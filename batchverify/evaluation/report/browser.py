"""A browser of this machine, without a window: prints the report and draws its plots as files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from batchverify.errors import BatchverifyError, UsageError
from batchverify.storage.temporary import temporary_folder

# A program to use instead of those below.
VARIABLE = "BATCHVERIFY_BROWSER"
# All of one family, and so with the same switches.
PROGRAMS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    *("microsoft-edge", "microsoft-edge-stable", "msedge"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
SWITCHES = ("--headless", "--disable-gpu", "--no-first-run", "--no-pdf-header-footer", "--hide-scrollbars")
# What the page's scripts may take, in the page's own time, which runs as fast as the machine allows.
SCRIPT_MILLISECONDS = 60_000
# For one page, thousands of thumbnails in it.
SECONDS = 300
# Name of the temporary folder of pages and the browser's profile.
FOLDER = "batchverify-report"
# What report.js leaves in the page opened as `#images`.
_IMAGES = re.compile(r'<script type="application/json" id="images">(.*?)</script>', re.DOTALL)


@dataclass(frozen=True)
class Browser:
    """Chromium or a browser made from it. program: its path."""

    program: str

    def print(self, page: str) -> bytes:
        """A report as PDF. page: its HTML. Raises `BatchverifyError`."""
        with temporary_folder(FOLDER) as folder:
            target = folder / "report.pdf"
            output = self._open(page, "#print", folder, f"--print-to-pdf={target}")
            if not target.is_file():
                raise BatchverifyError(f"{self.program} printed no PDF: {output.decode(errors='replace')[-500:]}")
            return target.read_bytes()

    def draw(self, page: str) -> dict[str, bytes]:
        """The plots of a report, each as `plot-NAME.svg` and `plot-NAME.png`. Raises `BatchverifyError`."""
        with temporary_folder(FOLDER) as folder:
            document = self._open(page, "#images", folder, "--dump-dom").decode(errors="replace")
        found = _IMAGES.search(document)
        if found is None:
            raise BatchverifyError(f"{self.program} drew no plots")
        images: dict[str, str] = json.loads(found[1])
        return {f"plot-{name}": _content(address) for name, address in images.items()}

    def _open(self, page: str, part: str, folder: Path, switch: str) -> bytes:
        """Open a page at a part of it; what the browser wrote to its standard output."""
        path = folder / "report.html"
        path.write_bytes(page.encode(errors="replace"))
        # Chromium's own fence between processes does not work for root.
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [
            *(self.program, *SWITCHES, *root, switch),
            f"--user-data-dir={folder}/profile",
            f"--virtual-time-budget={SCRIPT_MILLISECONDS}",
            path.as_uri() + part,
        ]
        try:
            done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise BatchverifyError(f"{self.program} could not open the report: {exc}") from exc
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise BatchverifyError(f"{self.program} ended with {done.returncode}: {said[-500:]}")
        return done.stdout


def find_browser(option: str) -> Browser:
    """The browser that `option` needs: $BATCHVERIFY_BROWSER or the first of PROGRAMS. Raises `UsageError`."""
    given = os.environ.get(VARIABLE)
    for program in (given,) if given else PROGRAMS:
        if path := shutil.which(program):
            return Browser(path)
    if given:
        raise UsageError(f"{option}: no program {given!r}, which ${VARIABLE} names, can be run")
    raise UsageError(
        f"{option} needs Chromium, Chrome or Edge, and none is on this machine: install one, name its program in "
        f"${VARIABLE}, or print report.html from any browser"
    )


def _content(address: str) -> bytes:
    """The bytes of a `data:` URL."""
    about, _, content = address.partition(",")
    return b64decode(content) if about.endswith(";base64") else unquote_to_bytes(content)
