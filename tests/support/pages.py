"""A report in a headless Chromium, with everything that it logged and asked for."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager

import pytest

from batchverify.evaluation.report.browser import PROGRAMS

# Without these a GPU is emulated, which takes a fifth of the time.
NO_GPU = ("--disable-gpu", "--disable-software-rasterizer")
# One that `evaluate --pdf` would use.
BROWSER = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
NO_BROWSER = "no Chromium on this machine: apt-get install chromium"


@contextmanager
def chromium():
    """An empty page in a headless Chromium of this machine; a skip that says why there is none.

    Reports are opened in one page, one after the other: it compiles their Plotly once, which takes two seconds.
    """
    if BROWSER is None:
        pytest.skip(NO_BROWSER)
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'"
    )
    with playwright.sync_playwright() as library:
        started = library.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *NO_GPU])
        yield started.new_page()
        started.close()


class Opened:
    """A report in a page. said: what it logged or threw. requested: every address that it asked for."""

    def __init__(self, page, path, *, scheme="light", width=1280):
        self.page, self.said, self.requested = page, [], []
        self._listeners = {
            "console": lambda message: self.said.append(message.text),
            "pageerror": lambda error: self.said.append(str(error)),
            "request": lambda request: self.requested.append(request.url),
        }
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        for event, listener in self._listeners.items():
            page.on(event, listener)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)
        self.page.goto("about:blank")

    def until(self, script, wanted):
        """What a script says once it is what is wanted, or after 10 s; the page allows no waiting of its own."""
        deadline = time.monotonic() + 10
        while not wanted(found := self.page.evaluate(script)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def number(self, name):
        """A figure of the threshold explorer."""
        return self.page.locator(f"#explore-{name}").inner_text()

    def drawn(self):
        """The names of the plots that Plotly drew; every place of a plot must have one."""
        places = self.page.eval_on_selector_all("div.plot", "all => all.map(each => each.id)")
        full = "div.plot:has(.main-svg .trace, .main-svg .point, .main-svg .bars)"
        drawn = self.page.eval_on_selector_all(full, "all => all.map(each => each.id)")
        assert drawn == places
        return {name.removeprefix("plot-") for name in drawn}
