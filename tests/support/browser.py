"""A browser for the tests of pages, or the reason why they are skipped."""

from __future__ import annotations

import shutil

import pytest

HOSTILE = "<img src=//elsewhere.example/x onerror=alert(1)><script>alert(2)</script> & "


WATCH_POLICY = "addEventListener('securitypolicyviolation', (e) => console.error(`refused by ${e.violatedDirective}`))"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:  # without one of the system, playwright looks for its own
            browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"], headless=True)
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium here that starts ({found or str(error).strip().splitlines()[0]})")
        yield browser
        browser.close()


WIDE = {"viewport": {"width": 1280, "height": 800}}


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


def ready(page, after=""):
    """Wait on the page of votes for a pair that can be answered, another than `after`; returns its ticket."""
    changed = "(old) => (document.querySelector('#images').dataset.ready ?? old) !== old"
    page.wait_for_function(changed, arg=after)
    return page.locator("#images").get_attribute("data-ready")


def press(page, *keys):
    """Press each key when a pair is there, and wait for what comes next."""
    for key in keys:
        ticket = ready(page)
        page.keyboard.press(key)
        changed = "(old) => ![old, undefined].includes(document.querySelector('#images').dataset.ready) || !end.hidden"
        page.wait_for_function(changed, arg=ticket)
