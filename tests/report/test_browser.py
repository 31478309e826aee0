"""The report in a browser: every figure drawn, nothing asked for, tables sorted, names inert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from told import CLASSES, FIGURES, everything

from headstart.report import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver here (Debian: chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write(everything(tmp_path_factory.mktemp("told")))
    browser.get(path.absolute().as_uri())
    _drawn(browser)
    return browser


def _drawn(browser: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 120).until(
        lambda driver: driver.execute_script("return document.documentElement.dataset.drawn") == "yes"
    )


def test_every_figure_is_drawn_and_the_console_is_silent(page: Any) -> None:
    drawn = page.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => [p.id, p.dataset.drawn, "
        "p.querySelectorAll('svg.main-svg').length, p.getBoundingClientRect().height, "
        "p.querySelectorAll('.trace, .hm, .point').length])"
    )
    assert {each[0].removeprefix("plot-") for each in drawn} == FIGURES
    assert [each for each in drawn if each[1] != "yes" or not each[2] or each[3] < 150 or not each[4]] == []
    assert page.get_log("browser") == []


def test_nothing_is_asked_for(page: Any) -> None:
    asked = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [message["params"] for message in asked if message["method"] == "Network.requestWillBeSent"]
    # Those of the browser's own first tab are not the page's.
    addresses = [each["request"]["url"] for each in sent if each["documentURL"].startswith("file:")]
    assert [url for url in addresses if not url.startswith(("file:", "data:", "blob:"))] == []
    assert sum(url.startswith("file:") for url in addresses) == 1


def test_names_of_classes_do_nothing(page: Any) -> None:
    assert page.title.startswith("Take ")
    assert page.execute_script("return document.querySelectorAll('img[src=x], [onerror]').length") == 0
    shown = page.execute_script(
        "return [...document.querySelectorAll('#plot-confusion .ytick text')].map(t => t.textContent)"
    )
    assert any(name.startswith("<img src=x onerror=") for name in shown)
    cells = page.execute_script(
        "return [...document.querySelectorAll('#table-per-class tbody th')].map(t => t.textContent)"
    )
    assert sorted(cells) == sorted(CLASSES)


def test_a_heading_sorts_both_ways_and_says_so(page: Any) -> None:
    def column(name: str) -> list[float]:
        return page.execute_script(
            "const t = document.getElementById('table-methods');"
            "const heads = [...t.tHead.rows[0].cells];"
            "const i = heads.findIndex(c => c.innerText.trim().startsWith(arguments[0]));"
            "return [...t.tBodies[0].rows].map(r => Number(r.cells[i].dataset.value))",
            name,
        )

    def press(name: str) -> Any:
        return page.execute_script(
            "const b = [...document.querySelectorAll('#table-methods thead button')]"
            ".find(b => b.innerText.trim().startsWith(arguments[0])); b.focus(); b.click();"
            "return [b.parentElement.getAttribute('aria-sort'), document.getElementById('live').textContent]",
            name,
        )

    order, said = press("Test accuracy")
    assert (order, said) == ("descending", "Sorted by Test accuracy, descending.")
    assert column("Test accuracy") == sorted(column("Test accuracy"), reverse=True)
    assert press("Test accuracy")[0] == "ascending"
    assert column("Test accuracy") == sorted(column("Test accuracy"))
    assert press("Time")[0] == "ascending"
    assert column("Time") == sorted(column("Time"))


def test_the_table_is_sorted_by_the_keyboard_too(page: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    button = page.find_elements(By.CSS_SELECTOR, "#table-methods thead button")[0]
    button.send_keys(Keys.ENTER)
    names = page.execute_script(
        "return [...document.querySelectorAll('#table-methods tbody th')].map(t => t.dataset.value)"
    )
    assert names == sorted(names)


def test_another_cost_moves_the_points_and_the_front(page: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    def xs() -> list[Any]:
        return page.execute_script("return document.getElementById('plot-cost').data.map(t => t.x)")

    before = xs()
    choice = Select(page.find_element(By.ID, "choice-cost"))
    choice.select_by_visible_text("trained parameters, millions")
    after = xs()
    assert before != after
    assert after[0] == [0.001]
    assert len(after[-1]) >= 1  # the front


def test_dark_and_light_draw_anew(page: Any) -> None:
    from selenium.webdriver.common.by import By

    def paper() -> str:
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    before = paper()
    page.find_element(By.ID, "theme").click()
    _drawn(page)
    assert paper() != before
    page.find_element(By.ID, "theme").click()
    _drawn(page)
    assert paper() == before
    assert page.get_log("browser") == []


def test_figures_can_be_taken_away(page: Any) -> None:
    svg = page.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "Plotly.toImage(document.getElementById('plot-cost'), {format: 'svg'}).then(done)"
    )
    assert svg.startswith("data:image/svg+xml")
    buttons = page.execute_script("return document.querySelectorAll('button[data-do=svg]').length")
    assert buttons == page.execute_script("return document.querySelectorAll('.plot').length")


def test_a_screen_reader_finds_its_way(page: Any) -> None:
    found = page.execute_script(
        """
        const all = (what) => [...document.querySelectorAll(what)];
        const ids = all('[id]').map((e) => e.id).filter((id) => !/topdef|clip|^[a-z]?[0-9a-f]{6}/.test(id));
        return {
          lang: document.documentElement.lang,
          h1: all('h1').length,
          unnamed: all('.plot').filter((p) => !p.getAttribute('aria-label')).length,
          images: all('img').filter((i) => !i.alt).length,
          buttons: all('button').filter((b) => !b.innerText.trim() && !b.ariaLabel).length,
          ids: ids.filter((id, i) => ids.indexOf(id) !== i),
          labelled: all('[aria-labelledby]')
            .filter((e) => !document.getElementById(e.getAttribute('aria-labelledby'))).length,
        }"""
    )
    assert found == {"lang": "en", "h1": 1, "unnamed": 0, "images": 0, "buttons": 0, "ids": [], "labelled": 0}


def test_a_phone_shows_it_without_scrolling_sideways(page: Any) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        WebDriverWait(page, 20).until(  # the figures follow the window in a moment
            lambda driver: driver.execute_script("return document.documentElement.scrollWidth") <= 390
        )
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_prints_on_paper_in_light_colours(page: Any, tmp_path: Path) -> None:
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        hidden = page.execute_script("return getComputedStyle(document.querySelector('nav')).display")
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert paper == "rgb(255, 255, 255)"
    assert hidden == "none"
