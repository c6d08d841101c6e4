"""The page in a real browser: it draws, asks for nothing, mouse and keys work, and hostile text is shown, not run."""

import json
import shutil
import time

import pytest
from test_report_page import HOSTILE, hostile_rows
from test_report_sections import converted_run, report_benchmark, without

from polarity.report import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytestmark = pytest.mark.skipif(
    BROWSER is None or shutil.which("chromedriver") is None, reason="chromium and chromedriver are not installed"
)

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402


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


@pytest.fixture(scope="module")
def grid_page(tmp_path_factory):
    """Two methods x two seeds x 20 steps, every metric but for psr's mismatch."""
    folder = tmp_path_factory.mktemp("grid")
    for method in ("dapo", "psr"):
        for seed in (0, 1):
            report_benchmark.make_run(folder / method / f"seed_{seed}", method, seed, 20)
    without(folder / "psr/seed_1", "mismatch")
    return write_report([folder], folder / "report.html")


def js(browser, script, *arguments):
    return browser.execute_script(f"return {script}", *arguments)


def wait_for(browser, script):
    for _ in range(800):
        if found := js(browser, script):
            return found
        time.sleep(0.05)
    raise AssertionError(f"never true: {script}")


def open_page(browser, path):
    browser.get_log("browser")
    browser.get(path.as_uri())
    wait_for(browser, "document.querySelector('.card') !== null && packed !== null")


def quiet(browser):
    """No error and no warning on the console, and nothing was asked of any network."""
    loud = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    return loud == [] and js(browser, "performance.getEntriesByType('resource').length") == 0


def press(browser, *keys):
    """Keys as a reader presses them, wherever the focus is."""
    ActionChains(browser).send_keys(*keys).perform()


def choose(browser, select, value):
    js(browser, f"(byId('{select}').value = arguments[0], byId('{select}').dispatchEvent(new Event('change')))", value)


def cards(browser):
    return browser.find_elements(By.CSS_SELECTOR, ".card")


def test_every_figure_is_drawn_in_both_themes_without_a_word_on_the_console(browser, grid_page):
    open_page(browser, grid_page)
    plots = "[...document.querySelectorAll('.plot')].filter((node) => !node.closest('details:not([open])'))"
    total = js(browser, f"{plots}.length")
    assert total > 60
    for i in range(0, total, 6):
        browser.execute_script(f"{plots}[arguments[0]].scrollIntoView()", i)
        wait_for(browser, f"{plots}[{i}].children.length > 0")
    wait_for(browser, f"drawn.length >= {total}")
    assert js(browser, "drawn.every(({ node }) => node.getAttribute('aria-label').length > 20)")
    label = js(browser, "drawn[0].node.getAttribute('aria-label')")
    assert label.startswith("Train accuracy. dapo: 0.")
    assert "at step 20" in label

    background = "getComputedStyle(document.body).backgroundColor"
    before, ink = js(browser, background), js(browser, "css('--ink')")
    browser.find_element(By.ID, "theme").click()
    assert js(browser, background) != before
    lines = (
        "drawn.find(({ data }) => data.template === 'attribution').plot.renderers.filter((r) => r.tags[0] === 'ink')"
    )
    assert js(browser, f"{lines}.map((r) => r.glyph.line_color.value)") == [js(browser, "css('--ink')")] * 2
    press(browser, "t")
    assert js(browser, background) == before
    assert js(browser, f"{lines}[0].glyph.line_color.value") == ink
    assert quiet(browser)


def test_methods_are_hidden_in_all_figures_by_mouse_and_by_key(browser, grid_page):
    open_page(browser, grid_page)
    browser.execute_script("byId('patterns').scrollIntoView()")
    wait_for(browser, "drawn.some(({ data }) => data.template === 'flow')")
    browser.find_element(By.CSS_SELECTOR, ".method[data-method=psr]").click()
    shown = "drawn.find(({ data }) => data.lines).plot.renderers.filter((r) => r.visible).map((r) => r.name)"
    assert set(js(browser, shown)) == {"dapo"}
    flows = "[...document.querySelectorAll('#patterns figure')].filter((f) => f.offsetParent).map((f) => f.dataset.of)"
    assert js(browser, flows) == ["dapo"]
    press(browser, "2")
    assert set(js(browser, shown)) == {"dapo", "psr"}
    assert js(browser, flows) == ["dapo", "psr"]
    press(browser, "1")
    assert js(browser, flows) == ["psr"]
    assert js(browser, "document.querySelector('.method[data-method=dapo]').getAttribute('aria-pressed')") == "false"
    assert quiet(browser)


def test_the_pattern_flow_is_drawn_and_told_as_a_table(browser, grid_page):
    open_page(browser, grid_page)
    browser.execute_script("byId('patterns').scrollIntoView()")
    flow = "drawn.find(({ data, node }) => data.template === 'flow')"
    wait_for(browser, f"{flow} !== undefined")
    nodes = f"{flow}.plot.renderers.find((r) => r.name === 'nodes').data_source.data"
    ribbons = nodes.replace("nodes", "ribbons")
    heights = js(browser, f"{nodes}.top.map((t, i) => t - {nodes}.bottom[i])")
    assert sum(heights) == 3 * 5 * 32 * 2  # evaluations x splits x problems x seeds
    assert js(browser, f"{ribbons}.xs.length") > 10
    caption = "document.querySelector('#patterns figure figcaption').textContent"
    assert "320 problems, 2 seeds pooled" in js(browser, caption)
    choose(browser, "flow-split", "long")
    assert sum(js(browser, f"{nodes}.top.map((t, i) => t - {nodes}.bottom[i])")) == 3 * 32 * 2
    assert "64 problems, 2 seeds pooled" in js(browser, caption)
    browser.find_element(By.CSS_SELECTOR, "#flow-tables summary").click()
    tables = browser.find_elements(By.CSS_SELECTOR, "#flow-rows table")
    assert [t.find_element(By.TAG_NAME, "caption").text for t in tables] == [
        "dapo: 64 problems, long", "psr: 64 problems, long"
    ]  # fmt: skip
    for row in tables[0].find_elements(By.CSS_SELECTOR, "tbody tr"):
        assert sum(int(cell.text) for cell in row.find_elements(By.TAG_NAME, "td")[:5]) == 64
    assert quiet(browser)


def test_zooming_and_going_back(browser, grid_page):
    open_page(browser, grid_page)
    plot = browser.find_element(By.CSS_SELECTOR, "#learning .plot")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", plot)
    wait_for(browser, "drawn.length > 2")
    span = "drawn[0].plot.x_range.end - drawn[0].plot.x_range.start"
    whole = wait_for(browser, span)
    drag = ActionChains(browser).move_to_element_with_offset(plot, -60, -30)
    drag.click_and_hold().move_by_offset(100, 50).release().perform()
    wait_for(browser, f"{span} < {whole / 2}")
    ActionChains(browser).double_click(plot).perform()
    wait_for(browser, f"Math.abs({span} - {whole}) < 1e-6")
    assert quiet(browser)


def test_the_rollouts_by_keys(browser, grid_page):
    open_page(browser, grid_page)
    last = js(browser, "stepSelect.selectedIndex")
    press(browser, "[")
    assert js(browser, "stepSelect.selectedIndex") == last - 1
    press(browser, "]", "j")
    assert js(browser, "[stepSelect.selectedIndex, problemSelect.selectedIndex]") == [last, 1]
    press(browser, "k", "c")
    assert js(browser, "[problemSelect.selectedIndex, colourMode()]") == [0, "e"]
    press(browser, "c")
    assert js(browser, "byId('sample-scale').textContent") == "weight below 1, 1, above 1"

    first = browser.find_element(By.CSS_SELECTOR, ".tokens")
    browser.execute_script("arguments[0].focus()", first)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    tip = browser.find_element(By.ID, "tip").text
    assert tip.startswith("token 1: ")
    assert "probability" in tip
    assert "nats" in tip
    press(browser, Keys.END)
    assert browser.find_element(By.ID, "tip").text.startswith(f"token {js(browser, 'cards[0].row.length')}: ")
    press(browser, Keys.HOME, "n")
    at = js(browser, "cards[0].at")
    assert js(browser, "cards[0].row.w.findIndex((w, i) => i > 0 && w !== 1000)") == at
    assert "weight 1.8" in browser.find_element(By.ID, "tip").text
    press(browser, "]", "[")  # the step changes under the reader, who stays in the responses
    assert js(browser, "document.activeElement.classList.contains('tokens')")

    press(browser, "?")
    assert js(browser, "byId('help').open")
    press(browser, "]")
    assert js(browser, "stepSelect.selectedIndex") == last - 1  # while the keys are shown, they do nothing
    press(browser, Keys.ESCAPE)
    assert not js(browser, "byId('help').open")
    assert quiet(browser)


def test_the_rollouts_by_mouse_and_their_filters(browser, grid_page):
    open_page(browser, grid_page)
    choose(browser, "sample-step", 0)
    everything = len(cards(browser))
    token = browser.find_element(By.CSS_SELECTOR, ".tokens span.shaped")
    ActionChains(browser).move_to_element(token).perform()
    wait_for(browser, "!tip.hidden && tip.textContent.includes('weight 1.8')")

    statuses = js(browser, "cards.map(({ row }) => row.status)")
    choose(browser, "filter-status", "correct")
    assert len(cards(browser)) == statuses.count("correct")
    assert js(browser, "byId('count-negative').textContent").startswith("− 0 of ")
    assert js(browser, "byId('sides').classList.contains('one')")  # the empty side leaves its place to the other
    choose(browser, "filter-status", "")
    choose(browser, "filter-strategy", "backward")
    assert js(browser, "cards.every(({ row }) => row.strategy === 'backward')")
    browser.find_element(By.ID, "filter-clear").click()
    wait_for(browser, f"document.querySelectorAll('.card').length === {everything}")

    browser.find_element(By.ID, "filter-kept").click()
    assert "24 of 32" in browser.find_element(By.ID, "filter-count").text  # one of four groups was not trained on
    browser.find_element(By.ID, "filter-kept").click()
    browser.find_element(By.ID, "filter-shaped").click()
    assert js(browser, "cards.every(({ row }) => row.w) && document.querySelector('.tokens.only-shaped') !== null")
    browser.find_element(By.ID, "filter-shaped").click()

    words = js(browser, "rowText(current.steps[0].groups[2].rows[5]).slice(40, 60)")
    press(browser, "/", words)
    wait_for(browser, "byId('filter-count').textContent.startsWith('1 of 32')")
    assert js(browser, "problemSelect.selectedIndex") == 2  # the problem with the match is shown
    marked = js(browser, "[...document.querySelectorAll('.tokens .found')].map((s) => s.textContent).join('')")
    assert words in marked.replace("↵", "").lower()
    press(browser, Keys.ENTER, "j")
    assert js(browser, "problemSelect.selectedIndex") == 3
    assert js(browser, "byId('count-positive').textContent").startswith("+ 0 of ")
    press(browser, "/", Keys.ESCAPE)
    wait_for(browser, "byId('filter-count').textContent === ''")
    assert quiet(browser)


def test_a_run_that_is_chosen_keeps_the_step(browser, grid_page):
    open_page(browser, grid_page)
    choose(browser, "sample-step", 1)
    step = js(browser, "stepSelect.selectedOptions[0].textContent")
    choose(browser, "sample-run", 3)
    wait_for(browser, "current.name === 'psr seed 1'")
    assert js(browser, "stepSelect.selectedOptions[0].textContent") == step
    assert quiet(browser)


def test_hostile_text_is_shown_as_text(browser, tmp_path, make_run):
    run = make_run(tmp_path / "run", method="<img src=x onerror=window.hacked=1>\u202e", rows=hostile_rows())
    record = json.loads((run / "evaluations" / "step_000020.json").read_text())
    for file in (run / "evaluations").iterdir():
        record["samples"] = {f"{HOSTILE[1]}{split}": rows for split, rows in record["samples"].items()}
        file.write_text(json.dumps(record))
    text = (run / "metrics.jsonl").read_text().replace("eval/id", f"eval/{HOSTILE[1]}id")
    (run / "metrics.jsonl").write_text(text.replace('"time/step"', '"<img src=x onerror=window.hacked=1>"'))
    started = time.monotonic()
    open_page(browser, write_report([run], tmp_path / "report.html"))
    assert time.monotonic() - started < 60
    tokens = js(browser, "[...document.querySelector('.tokens').children].map((s) => s.textContent)")
    assert tokens[:5] == [HOSTILE[0], HOSTILE[1], "⟨202E⟩evil", "⟨2028⟩", "⟨0000⟩⟨200B⟩"]
    assert tokens[5].startswith("aaaa")
    assert "characters left out" in tokens[5]
    for i in range(js(browser, "document.querySelectorAll('.plot').length")):
        plot = browser.find_elements(By.CSS_SELECTOR, ".plot")[i]
        browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", plot)
        if i < 3:
            wait_for(browser, f"document.querySelectorAll('.plot')[{i}].children.length > 0")
            for dx in range(-140, 180, 40):  # over the line: its hover names the method
                ActionChains(browser).move_to_element_with_offset(plot, dx, 0).perform()
    token = browser.find_element(By.CSS_SELECTOR, ".tokens span")
    ActionChains(browser).move_to_element(token).perform()
    wait_for(browser, "!tip.hidden")
    press(browser, "/", "<script>")
    wait_for(browser, "byId('filter-count').textContent.startsWith('2 of 2')")
    assert js(browser, "window.hacked === undefined")
    assert js(browser, "document.querySelectorAll('img').length") == 0
    assert js(browser, "document.title").endswith("⟨202E⟩")
    assert quiet(browser)


def test_long_responses_are_laid_out_as_they_are_read(browser, tmp_path, make_run):
    tokens = [f"word{i} " for i in range(9000)]
    n = len(tokens)
    common = {"group": 0, "problem_id": "p", "prompt": "b" * 1_000_000, "gold": "1", "reward": 0.0, "advantage": 0.9}
    common |= {"response": "".join(tokens), "tokens": tokens, "logp_old": [-0.1] * n, "entropy": [0.1] * n}
    common |= {"weight": [1.0] * n, "truncated": True}
    rows = [common | {"correct": i % 2 == 0, "status": "correct" if i % 2 == 0 else "wrong"} for i in range(16)]
    open_page(browser, write_report([make_run(tmp_path / "run", rows=rows)], tmp_path / "report.html"))
    assert js(browser, "cards.length") == 16
    assert js(browser, "document.querySelectorAll('.tokens span').length") < 16 * 1100
    first = browser.find_element(By.CSS_SELECTOR, ".tokens")
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", first)
    for _ in range(12):
        browser.execute_script("arguments[0].scrollTop = arguments[0].scrollHeight", first)
        time.sleep(0.05)
    wait_for(browser, "cards[0].spans.length === cards[0].row.t.length")
    assert "6,000 tokens left out" in first.text
    browser.execute_script("arguments[0].focus()", browser.find_elements(By.CSS_SELECTOR, ".tokens")[1])
    press(browser, Keys.END)
    assert browser.find_element(By.ID, "tip").text.startswith('token 9000: "word8999 "')
    press(browser, "/", "word8500")
    wait_for(browser, "document.querySelectorAll('.tokens .found').length === 16")
    assert quiet(browser)


def test_a_converted_run_is_shown_with_what_it_has(browser, tmp_path):
    run = converted_run(tmp_path / "run")
    line = json.loads((run / "rollouts" / "step_000001.jsonl").read_text().splitlines()[0])
    more = [line | {"response": "z" * 1_000_000, "correct": False}, line | {"response": "", "correct": False}]
    with (run / "rollouts" / "step_000001.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in more))
    open_page(browser, write_report([run], tmp_path / "report.html"))
    texts = [card.find_element(By.CSS_SELECTOR, ".tokens").text for card in cards(browser)]
    assert texts[:3] == ["answer 0", "answer 1", "answer 2"]
    assert "tokens not logged: no colours" in cards(browser)[0].text
    assert js(browser, "byId('sample-scale').textContent") == "no token probabilities were logged"
    assert "no reference answer logged" in js(browser, "byId('sample-problem-text').textContent")
    visible = "[...document.querySelectorAll('#filters label')].filter((l) => l.offsetParent).length"
    assert js(browser, visible) == 2  # nothing to filter by but words and status
    last = browser.find_elements(By.CSS_SELECTOR, ".tokens")[3]
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", last)
    for _ in range(12):
        browser.execute_script("arguments[0].scrollTop = arguments[0].scrollHeight", last)
        time.sleep(0.05)
    assert "940,000 characters left out" in last.text
    assert quiet(browser)


def test_a_narrow_window_scrolls_down_only(browser, grid_page):
    try:
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        open_page(browser, grid_page)
        browser.execute_script("document.querySelectorAll('section details').forEach((d) => { d.open = true; })")
        inside = ".scroll, .tokens, pre, .skip, .hidden, dialog"
        wide = f"[...document.querySelectorAll('body *')].filter((n) => !n.closest('{inside}')"
        wide += " && n.getBoundingClientRect().right > innerWidth + 1).map((n) => n.outerHTML.slice(0, 90))"
        for anchor in js(browser, "[...document.querySelectorAll('main > section')].map((s) => s.id)"):
            browser.execute_script("byId(arguments[0]).scrollIntoView()", anchor)
            time.sleep(0.1)
            assert js(browser, "document.documentElement.scrollWidth <= innerWidth"), js(browser, wide)
        assert js(browser, wide) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_can_be_reached_and_has_a_name(browser, grid_page):
    open_page(browser, grid_page)
    nameless = browser.execute_script(
        "const label = (n) => (n.labels?.[0]?.textContent ?? '') + (n.getAttribute('aria-label') ?? '');"
        "const named = (n) => n.textContent + label(n);"
        "return [...document.querySelectorAll('button, select, input, summary, a, [tabindex]')]"
        ".filter((n) => n.offsetParent && !named(n).trim()).map((n) => n.outerHTML.slice(0, 90))"
    )
    assert nameless == []
    assert js(browser, "[...document.querySelectorAll('.scroll')].every((node) => node.tabIndex === 0)")
    assert js(browser, "document.querySelectorAll('main h1').length") == 1
    assert quiet(browser)
