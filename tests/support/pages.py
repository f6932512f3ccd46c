"""A report in a headless Chromium, with everything that it logged and asked for."""

from __future__ import annotations

import shutil
import time
from contextlib import contextmanager

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def chromium():
    """A headless Chromium of this machine, offline; a skip that says why there is none."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'"
    )
    with playwright.sync_playwright() as library:
        started = library.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page. said: what it logged or threw. requested: every address that it asked for."""

    def __init__(self, browser, path, *, scheme="light", width=1280):
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
        self.page = self.context.new_page()
        self.said, self.requested = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready=yes]")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.context.close()

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
        places = self.page.eval_on_selector_all(".plot", "all => all.map(each => each.id)")
        full = ".plot:has(.main-svg .trace, .main-svg .point, .main-svg .bars)"
        drawn = self.page.eval_on_selector_all(full, "all => all.map(each => each.id)")
        assert drawn == places
        return {name.removeprefix("plot-") for name in drawn}
