"""The page, as somebody uses it: in headless Chromium, against a server over a real socket."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from serving import Brightest, Client, picture, running

import headstart.ship
from headstart.ship.limits import MIB, Limits

PAGE = Path(headstart.ship.__file__).parent / "page"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (Debian: chromium-driver)"
)
CARD = {
    "model": "efficientnet-lite0",
    "method": "lp-ft",
    "licence": "apache-2.0",
    "counts": {"train": 600},
    "test": {"n": 290, "accuracy": 0.883},
}
README = """---
license: mit
---
# title

A `card`, **plain**.

- one
- <img src=x onerror=alert(1)>

| split | n |
|---|---|
| test | 290 |

## Use

```
headstart predict
```
"""


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "README.md").write_text(README, encoding="utf-8")
    with running(Brightest(folder, card=CARD), limits=Limits(request_bytes=MIB)) as here:
        yield here


def options() -> Any:
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = CHROMIUM
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        "--disable-background-networking",
        "--force-prefers-reduced-motion",  # a page that is still scrolling cannot be clicked on
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        chosen.add_argument(word)
    chosen.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    return chosen


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = webdriver.Chrome(options=options(), service=Service(DRIVER))
    driver.set_script_timeout(10)
    try:
        yield driver
    finally:
        driver.quit()


def until(what: Callable[[], Any], seconds: float = 15) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "the page did not get there"
        time.sleep(0.05)
    return found


class Page:
    """The page in the browser."""

    def __init__(self, browser: Any, client: Client) -> None:
        self.browser = browser
        browser.get(f"{client.url}/")
        browser.execute_script("sessionStorage.clear()")
        browser.refresh()

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.find(selector).text)

    def choose(self, *paths: Path) -> None:
        self.find("#files").send_keys("\n".join(str(path) for path in paths))

    def cards(self, many: int) -> list[Any]:
        """That many cards, when all of them are settled."""

        def settled() -> Any:
            found = self.browser.find_elements(By.CSS_SELECTOR, ".card")
            waiting = self.browser.find_elements(By.CSS_SELECTOR, ".card[data-state=waiting]")
            return found if len(found) == many and not waiting else None

        return list(until(settled))

    def drop(self, name: str, content: bytes, kind: str) -> None:
        """What a mouse does with a file."""
        self.browser.execute_script(
            """
            const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], arguments[0], { type: arguments[2] }));
            for (const name of ["dragenter", "dragover", "drop"]) {
              const event = new DragEvent(name, { dataTransfer: carried, bubbles: true, cancelable: true });
              document.getElementById("drop").dispatchEvent(event);
            }
            """,
            name,
            base64.b64encode(content).decode(),
            kind,
        )


@pytest.fixture
def page(browser: Any, client: Client) -> Page:
    return Page(browser, client)


@needs_chromium
def test_drop_a_picture_and_see_its_label(page: Page) -> None:
    page.drop("grass.png", picture((0, 250, 0)), "image/png")
    (card,) = page.cards(1)
    assert card.get_attribute("data-state") == "sure"
    assert "grass.png" in card.text and "green" in card.text and "%" in card.text
    width = card.find_element(By.CSS_SELECTOR, ".fill").size["width"]
    assert width > 0.9 * card.find_element(By.CSS_SELECTOR, ".track").size["width"]
    canvas = card.find_element(By.CSS_SELECTOR, "canvas")
    pixel = "return [...arguments[0].getContext('2d').getImageData(5, 5, 1, 1).data]"
    assert page.browser.execute_script(pixel, canvas) == [0, 250, 0, 255], "the thumbnail is the picture"
    assert "drop over" not in page.find("#drop").get_attribute("class")


@needs_chromium
def test_a_bad_file_shows_its_message_and_the_others_go_on(page: Page, tmp_path: Path) -> None:
    given = [tmp_path / name for name in ("r.png", "notes.png", "dim.png", "long.png", "<b>x.png")]
    given[0].write_bytes(picture((250, 0, 0)))
    given[1].write_text("hello")
    given[2].write_bytes(picture((120, 125, 120)))
    given[3].write_bytes(bytes(MIB + 1))
    given[4].write_bytes(picture((0, 0, 250)))
    page.choose(*given)
    cards = page.cards(5)
    assert [card.get_attribute("data-state") for card in cards] == [
        "sure",
        "error",
        "unsure",
        "error",
        "sure",
    ]
    assert "Is a text file, not a picture." in cards[1].text and "No preview" in cards[1].text
    assert "unsure: ask a human" in cards[2].text
    assert "at most 1 MB" in cards[3].text
    assert "<b>x.png" in cards[4].text, "a name is text, not HTML"
    counts = [button.text for button in page.browser.find_elements(By.CSS_SELECTOR, "#filters button")]
    assert counts == ["All 5", "Sure 2", "Unsure 1", "Not read 2"]
    until(lambda: "Done: 2 sure, 1 unsure, 2 not read." in page.find("#said").get_attribute("textContent"))
    page.find("[data-show=unsure]").click()
    assert [card.is_displayed() for card in cards] == [False, False, True, False, False]
    page.find("#clear").click()
    assert not page.find("#results").is_displayed() and not page.browser.find_elements(
        By.CSS_SELECTOR, ".card"
    )


@needs_chromium
def test_the_camera(page: Page) -> None:
    page.find("#camera").click()
    until(lambda: page.find("#shoot").is_enabled())
    page.find("#shoot").click()
    (card,) = page.cards(1)
    assert "camera " in card.text and card.get_attribute("data-state") in ("sure", "unsure")
    assert page.browser.execute_script("return document.getElementById('viewer').open") is False


@needs_chromium
def test_the_model_card(page: Page) -> None:
    until(lambda: page.text("#facts"))
    facts = page.text("#facts")
    for said in (
        "88.3%",
        "of 290 pictures",
        "Sure from",
        "60%",
        "95%",
        "96.1%",
        "87%",
        "efficientnet-lite0",
        "apache-2.0",
    ):
        assert said in facts, facts
    assert [each.text for each in page.browser.find_elements(By.CSS_SELECTOR, "#classes li")] == [
        "red",
        "green",
        "blue",
    ]
    page.find("#whole summary").click()
    said = page.text("#readme")
    assert "license" not in said and "<img src=x" in said and "headstart predict" in said
    assert page.text("#readme td") == "test" and page.text("#readme code") == "card"
    assert not page.browser.find_elements(By.CSS_SELECTOR, "#readme img")


@needs_chromium
def test_nothing_is_asked_of_anybody_else_and_nothing_is_blocked(
    page: Page, client: Client, tmp_path: Path
) -> None:
    page.browser.get_log("performance")
    page.browser.get_log("browser")
    page.browser.refresh()
    (tmp_path / "a.png").write_bytes(picture())
    page.choose(tmp_path / "a.png")
    page.cards(1)
    asked = []
    for entry in page.browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    assert f"{client.url}/page/page.js" in asked and any("/predict" in url for url in asked)
    strangers = [url for url in asked if not url.startswith((client.url, "blob:", "data:", "chrome"))]
    assert strangers == []
    said = [entry["message"] for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert said == [], "no error, and nothing against the content security policy"


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_a_phone(width: int, page: Page, tmp_path: Path) -> None:
    (tmp_path / f"{'long-name-' * 12}.png").write_bytes(picture())
    page.browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    try:
        page.choose(*tmp_path.iterdir())
        page.cards(1)
        page.find("#whole summary").click()
        wide = page.browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        small = page.browser.execute_script(
            "return [...document.querySelectorAll('button, label.button')].filter((b) => b.offsetParent)"
            ".filter((b) => b.getBoundingClientRect().height < 32).map((b) => b.textContent)"
        )
        assert small == [], "large enough for a finger"
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


CONTRAST = """
const level = (c) => { const s = c / 255; return s <= .04045 ? s / 12.92 : ((s + .055) / 1.055) ** 2.4; };
const bright = ([r, g, b]) => .2126 * level(r) + .7152 * level(g) + .0722 * level(b);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = numbers(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] === 1) return found;
  }
  return [255, 255, 255];
};
const low = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.textContent.trim());
  if (!own || !node.offsetParent || node.closest(".card[data-state=waiting], :disabled")) continue;
  const [a, b] = [bright(numbers(getComputedStyle(node).color)), bright(behind(node))];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) low.push(`${node.className || node.tagName}: ${ratio.toFixed(2)}`);
}
return low;
"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(scheme: str, page: Page, tmp_path: Path) -> None:
    page.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    for name, content in (("a.png", picture()), ("b.png", picture((120, 125, 120))), ("c.png", b"no")):
        (tmp_path / name).write_bytes(content)
    page.choose(*sorted(tmp_path.iterdir()))
    page.cards(3)
    ground = page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) > 128) == (scheme == "light")
    assert page.browser.execute_script(CONTRAST) == [], "WCAG AA: 4.5 to 1"


@needs_chromium
def test_everything_has_a_name_and_a_place_in_the_order(page: Page) -> None:
    nameless = page.browser.execute_script(
        "return [...document.querySelectorAll('button, input, a, dialog, section, img, nav')]"
        ".filter((node) => !(node.textContent.trim() || node.getAttribute('aria-label') ||"
        " node.hasAttribute('alt') || node.labels?.length || node.getAttribute('aria-hidden')))"
        ".map((node) => node.outerHTML)"
    )
    assert nameless == []
    assert page.browser.execute_script("return document.querySelectorAll('h1').length") == 1
    assert page.find("html").get_attribute("lang") == "en"


@needs_chromium
def test_it_asks_for_the_key(browser: Any, tmp_path: Path) -> None:
    with running(Brightest(tmp_path), key="sesame-street") as client:
        page = Page(browser, client)
        for key, note in (("wrong-key", "has given you one"), ("sesame-street", "not the right one")):
            until(lambda note=note: page.find("#asking").is_displayed() and note in page.text("#key-note"))
            page.find("#key").send_keys(key)
            page.find("#asking button").click()
        until(lambda: "red" in page.text("#classes"))
        page.drop("a.png", picture(), "image/png")
        (card,) = page.cards(1)
        assert "green" in card.text


# ------------------------------------------------------------------------------------- without a browser


def test_the_page_is_delivered(client: Client) -> None:
    reply = client.get("/")
    assert reply.status == 200 and reply.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', reply.body.decode())
    assert len(named) >= 3
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for file in PAGE.iterdir():
        asset = client.get(f"/page/{file.name}")
        assert asset.status == 200
        if file.suffix in kinds:
            assert asset.headers["content-type"].startswith(kinds[file.suffix])
    policy = reply.headers["content-security-policy"]
    assert "unsafe" not in policy and "http" not in policy and "script-src 'self'" in policy


def test_the_page_names_no_other_place_and_runs_nothing_inline() -> None:
    for file in PAGE.iterdir():
        source = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", source), file.name
        assert "innerHTML" not in source and "eval(" not in source
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=", page)
