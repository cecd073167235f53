"""The page in headless Chromium, by clicks: a run of 100,000 updates, one that grows, one that is deleted."""

import contextlib
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, OPTIONS
from PIL import Image

pytest.importorskip("starlette", reason="danceopd[watch] is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium"),
]

UPDATES = 100_000

PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def write_run(folder: Path, updates: int, most: int, samples: int) -> Path:
    """Writes a run whose loss falls, with a line in its log that is broken, and its samples."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"training: {{max_steps: {most}}}\n")
    chance = random.Random(0)
    with open(folder / "log.jsonl", "w") as log:
        for i in range(1, updates + 1):
            log.write(json.dumps(record(i, 0.004 + 0.02 * math.exp(-4 * i / most) * chance.uniform(0.8, 1.2))) + "\n")
        log.write('{"step": 7, "los\n' + json.dumps({"step": updates, "evaluation": {"overall": 0.75}}) + "\n")
        log.write(json.dumps({"step": updates, "warning": "the gradient norm is 9, 6 times its median"}) + "\n")
        log.write(json.dumps({"step": updates, "health": {"queries": {"1.000": 100, "0.500": 300}}}) + "\n")
    for i in range(1, samples + 1):
        step = updates * i // samples
        Image.new("RGB", (640, 320), (i * 5, 90, 160)).save(folder / "samples" / f"step-{step:08d}.png")
    return folder


def record(step: int, loss: float) -> dict:
    losses = {"t2i": loss, "edit": loss / 2}
    rest = {"gradient_norm": 0.1, "learning_rate": 5e-4, "network_evaluations": 256 * step, "seconds": 0.5 * step}
    return {"step": step, "loss": loss, "loss_by_capability": losses, **rest, "samples_per_second": 100.0}


@contextlib.contextmanager
def served(*folders):
    """Runs `danceopd watch` and yields the address that it prints."""
    command = [sys.executable, "-m", "danceopd", "watch", *map(str, folders), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser, address, width=1280, scheme="light"):
    """Opens the page; afterwards nothing may have gone wrong in it, nor have been asked of another address."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(90_000)
    wrong, asked = [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert not wrong
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    page.close()


def clock_of(page):
    """Returns a function that says how many processor seconds the page's main thread has computed since."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    return seconds


def test_a_long_run_is_seen_moved_through_and_read(browser, tmp_path):
    write_run(tmp_path / "long", UPDATES, UPDATES, 40)
    with served(tmp_path / "long") as address, page_of(browser, address) as page:
        began = time.monotonic()
        page.wait_for_selector("#chart-loss canvas")
        print(f"first paint after {page.evaluate(PAINT):.0f} ms, charts {time.monotonic() - began:.1f} s later")
        assert page.inner_text("#headline") == "long: finished, update 100,000 of 100,000."
        assert page.inner_text("#warnings li >> nth=0").startswith("update 100000: the gradient norm is 9")
        assert "cannot be read and are left out: 1" in page.inner_text("#warnings")
        label = page.get_attribute("#chart-closed [role=img]", "aria-label")
        assert re.search(r"the last values: edit 8\d\.\d %, t2i 8\d\.\d %", label), label
        assert "25.0 %" in page.inner_text("#chart-queries")
        page.focus("#step")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#step-shown") == "97,500"
        assert page.get_attribute("#step", "aria-valuetext") == "update 97500"
        clock = clock_of(page)
        before = clock()
        took = page.evaluate("""async () => {
            const slider = document.getElementById("step"), took = [];
            for (let i = 37; i > 20; i--) {
              const began = performance.now();
              slider.value = i;
              slider.dispatchEvent(new Event("input"));
              await document.querySelector("#grids img").decode();
              took.push(performance.now() - began);
            }
            return took.sort((a, b) => a - b);
        }""")
        each = (clock() - before) / len(took)
        assert each < 0.1  # seconds that the page computes: what else the machine does is not counted
        middle, most = took[len(took) // 2], took[-1]
        print(f"a move of the slider: {middle:.0f} ms, at most {most:.0f}, of which {1000 * each:.0f} ms computing")
        page.check("input[value=hours]")
        page.click("summary:has-text('config.yaml')")
        page.wait_for_selector("#files pre:has-text('max_steps: 100000')")
        page.click("summary:has-text('log.jsonl')")
        page.wait_for_selector("#files pre:has-text('\"step\": 100000')")


def test_a_run_grows_and_is_deleted(browser, tmp_path):
    write_run(tmp_path / "runs" / "one", 20, 40, 1)
    write_run(tmp_path / "runs" / "two", 20, 20, 1)
    with served(tmp_path / "runs") as address, page_of(browser, address) as page:
        page.wait_for_selector("#chart-loss canvas")
        assert page.inner_text("#headline") == "2 runs, 1 training: one."
        assert "two: t2i" in page.inner_text("#chart-loss .key")
        page.uncheck("label:has-text('two') input")
        assert "two" not in page.inner_text("#chart-loss")
        with open(tmp_path / "runs" / "one" / "log.jsonl", "a") as log:
            log.writelines(json.dumps(record(i, 0.5)) + "\n" for i in range(21, 31))
        Image.new("RGB", (64, 32)).save(tmp_path / "runs" / "one" / "samples" / "step-00000030.png")
        page.wait_for_selector("#chart-loss .last:has-text('t2i 0.5')")
        page.wait_for_selector("#step-shown:text-is('30')")
        shutil.rmtree(tmp_path / "runs" / "one")
        page.wait_for_selector("#runs:has-text('its folder is gone')")
        assert page.is_visible("#chart-loss canvas")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_fits_its_window(browser, tmp_path, width, scheme):
    write_run(tmp_path / "a-run-with-a-name-that-is-rather-long-for-a-telephone", 50, 50, 3)
    with served(tmp_path) as address, page_of(browser, address, width, scheme) as page:
        page.wait_for_selector("#chart-loss canvas")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        widths = page.evaluate(
            "[...document.querySelectorAll('canvas')].map((one) => one.getBoundingClientRect().right)"
        )
        assert max(widths) <= width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 23, 26)")
