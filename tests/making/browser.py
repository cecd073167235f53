"""Looks at a page in headless Chromium: what sticks out of a narrow screen."""

import shutil
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

# What ends beyond the right edge, and does not lie in a box that scrolls by itself.
WIDE = """() => {
  const edge = document.documentElement.clientWidth, scrolls = (e) => getComputedStyle(e).overflowX !== "visible"
  const boxed = (e) => { for (e = e.parentElement; e; e = e.parentElement) if (scrolls(e)) return true; return false }
  const found = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > edge + 1)
  const wide = document.documentElement.scrollWidth > edge ? ["the page"] : []
  return wide.concat(found.filter((e) => !boxed(e)).map((e) => `${e.tagName} ${e.textContent.slice(0, 40)}`))
}"""


def sticking_out(page: Path, width: int) -> list[str]:
    """Lists what of a page sticks out of a screen of this width, in pixels; skips the test where no browser is here."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        try:
            opened = browser.new_page(viewport={"width": width, "height": 900})
            opened.goto(page.resolve().as_uri())
            return opened.evaluate(WIDE)
        finally:
            browser.close()
