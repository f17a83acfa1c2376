"""The page in a browser, headless Chromium: in light, in dark, and on a phone it draws, fits, and complains of nothing.

Screenshots go where DFLASH_SCREENSHOTS says, so that somebody can look at them.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import sample_runs

from dflash.measuring.result import read_file
from dflash.report.page import write_report

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
LOOKS = {"light": ("light", 1200), "dark": ("dark", 1200), "phone": ("light", 390), "phone-dark": ("dark", 360)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip(
        "selenium.webdriver", reason="the browser extra is not installed: pip install .[browser]"
    )
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything on it."""
    folder = tmp_path_factory.mktemp("report")
    runs = []
    for day, tilt in ((2, 1.0), (1, 0.8)):
        path = folder / f"{day}.json"
        told = {"gate": sample_runs.gate(), "audits": [sample_runs.audit()]}
        file = sample_runs.file_of(sample_runs.sweep(tilt), f"2026-01-0{day}T00:00:00+00:00", **told)
        path.write_text(json.dumps(file))
        runs.append(read_file(path))
    return write_report(folder, runs[0], runs[1:])


def look(browser, page, scheme, width):
    """Opens the page at this width, as high as it is."""
    size = {"width": width, "deviceScaleFactor": 1, "mobile": width < 500}
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": 900})
    browser.get(page.as_uri())
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"height": height})


@pytest.mark.parametrize("name", LOOKS)
def test_the_page_draws_and_complains_of_nothing(browser, page, tmp_path, name):
    scheme, width = LOOKS[name]
    look(browser, page, scheme, width)
    shots = Path(os.environ.get("DFLASH_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(shots / f"report-{name}.png"))
    assert (shots / f"report-{name}.png").stat().st_size > 20_000
    assert browser.get_log("browser") == []
    broken = "return [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    assert browser.execute_script(broken) == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(r => r.name)") == []


@pytest.mark.parametrize("name", LOOKS)
def test_the_page_fits_and_its_plots_have_a_size(browser, page, name):
    scheme, width = LOOKS[name]
    look(browser, page, scheme, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect())"
        ".map(b => [b.left, b.right, b.height])"
    )
    assert len(boxes) == 12
    assert all(0 <= left < right <= width and height > 60 for left, right, height in boxes)
    # Words of a plot that a reader of a phone can still read, in pixels as they are shown.
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => { const t = s.querySelector('text');"
        "return parseFloat(getComputedStyle(t).fontSize) * s.getBoundingClientRect().width / s.viewBox.baseVal.width })"
    )
    assert min(sizes) > 8


def test_dark_is_dark_and_can_be_read(browser, page):
    """Ink on page: the contrast that WCAG asks of text, in both schemes; a plot takes the page's ink."""

    def luminance(colour):
        parts = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    backs = []
    for scheme in ("light", "dark"):
        look(browser, page, scheme, 1200)
        ink, plot, back = browser.execute_script(
            "const c = (e, p) => getComputedStyle(document.querySelector(e))[p];"
            "return [c('body', 'color'), c('figure svg text', 'fill'), c('body', 'backgroundColor')]"
        )
        backs.append(luminance(back))
        for colour in (ink, plot):
            low, high = sorted((luminance(colour), luminance(back)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, colour, back)
    assert backs[0] > 0.8
    assert backs[1] < 0.05
