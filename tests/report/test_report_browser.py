"""The page in a real browser: it draws, it asks for nothing, its keys work, and hostile text is shown, not run."""

import shutil
import time

import pytest
from test_report_page import HOSTILE, hostile_rows

from polarity.report import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    BROWSER is None or shutil.which("chromedriver") is None, reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def wait_for(browser, script):
    for _ in range(100):
        if found := browser.execute_script(f"return {script}"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"never true: {script}")


def open_page(browser, path):
    browser.get(path.as_uri())
    wait_for(browser, "document.querySelector('.card') !== null")


def press(browser, key):
    browser.execute_script("document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0]}))", key)


def test_figures_themes_filters_and_samples_work(browser, tmp_path, make_run):
    for method in ("dapo", "psr"):
        make_run(tmp_path / method / "seed_0", method, 0)
    browser.get_log("browser")
    open_page(browser, write_report([tmp_path], tmp_path / "report.html"))
    browser.execute_script("document.getElementById('learning').scrollIntoView()")
    wait_for(browser, "views.length > 2")
    assert wait_for(browser, "document.querySelector('#learning .plot').children.length") == 1

    browser.execute_script("document.querySelector('.method[data-method=psr]').click()")
    shown = "views[0].model.renderers.filter((r) => r.visible).map((r) => r.name)"
    assert set(browser.execute_script(f"return {shown}")) == {"dapo"}

    colour = "getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(f"return {colour}")
    browser.execute_script("document.getElementById('theme').click()")
    assert browser.execute_script(f"return {colour}") != before

    step = "document.getElementById('sample-step').selectedIndex"
    last = browser.execute_script(f"return {step}")
    press(browser, "[")
    assert browser.execute_script(f"return {step}") == last - 1
    press(browser, "j")
    assert browser.execute_script("return document.getElementById('sample-problem').selectedIndex") == 1
    press(browser, "c")
    assert browser.execute_script("return colourMode()") == "e"
    assert browser.execute_script("return document.querySelectorAll('#rows-positive .card').length") == 2
    browser.execute_script(
        "const t = document.querySelector('.tokens'); t.focus();"
        "t.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
    )
    assert "probability" in browser.execute_script("return document.getElementById('tip').textContent")
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_hostile_text_is_shown_as_text(browser, tmp_path, make_run):
    run = make_run(tmp_path / "run", method="<img src=x onerror=window.hacked=1>", rows=hostile_rows())
    open_page(browser, write_report([run], tmp_path / "report.html"))
    tokens = browser.execute_script("return [...document.querySelector('.tokens').children].map((s) => s.textContent)")
    assert tokens[:4] == [HOSTILE[0], HOSTILE[1], "⟨202E⟩evil", "⟨2028⟩"]
    assert len(tokens[4]) == 1_000_000
    assert browser.execute_script("return window.hacked === undefined")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
