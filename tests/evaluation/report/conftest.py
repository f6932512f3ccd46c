"""The browser that opens the reports."""

import pytest
from pages import chromium


@pytest.fixture(scope="module")
def browser():
    """A page of a headless Chromium; tests are skipped where there is none."""
    with chromium() as page:
        yield page
