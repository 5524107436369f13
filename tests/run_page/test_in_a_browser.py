"""A run's page in a real Chromium: everything clickable works, without console errors and without requests."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import DESKTOP, PHONE, Browser

from retina_jax.reports import render
from retina_jax.reports.run_page import run_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def test_the_page_can_be_clicked_through_and_requests_nothing(tiny_run: Path, browser: Browser) -> None:
    page = tiny_run / "report.html"
    page.write_text(run_page(tiny_run)[0])
    browser.complaints(), browser.requests()
    for size, scheme in ((DESKTOP, "light"), (PHONE, "dark")):
        browser.open(page, size, scheme)
        assert browser.overflow() <= 0 and browser.cut() == [], size
        assert [tile.text for tile in browser.all(".tiles dt")] == ["AP", "AP50", "best step", "images/s", "device"]
        links = browser.all("nav a")
        assert [link.text for link in links] == ["curves", "confusion", "classes", "images", "errors", "scores", "run"]
        for link in links:
            browser.value("window.scrollTo(0, 0)")
            link.click()
            assert browser.value("location.hash") == f"#{link.text}"
            top = browser.value("document.querySelector(location.hash).getBoundingClientRect().top")
            assert top < size[1], f"{link.text} is not in sight"
        image = browser.all(".pair .zoom img")[1]
        assert browser.value("arguments[0].naturalWidth > 0", image) and image.get_attribute("alt").startswith("0000")
        width = image.rect["width"]
        image.find_element("xpath", "..").send_keys("\n")  # the keyboard enlarges
        assert image.rect["width"] > 1.5 * width and browser.overflow() <= 0
        image.click()
        assert image.rect["width"] == width
        for summary in browser.all("section > details > summary"):
            summary.click()
            assert summary.find_element("xpath", "..").get_attribute("open"), summary.text
        assert browser.overflow() <= 0 and browser.cut() == [] and browser.faint() == {}, f"{size}, all opened"
        sort_every_column(browser)
    assert browser.complaints() == []
    assert set(browser.requests()) == {page.resolve().as_uri()}
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.open(page, PHONE)
    assert len(browser.all("svg")) >= 6 and len(browser.all("table tbody tr")) >= 10
    assert browser.all("th button") == [], "it is read without scripts"
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def sort_every_column(browser: Browser) -> None:
    """Checks that names first rise, then fall, and numbers the other way round. On a phone a table of cards has no heads."""
    tables = [table for table in browser.all(".sortable table") if table.find_element("tag name", "th").is_displayed()]
    assert len(tables) in (1, 2)
    for table in tables:
        for column, head in enumerate(table.find_elements("css selector", "th")):
            button = head.find_element("css selector", "button")
            for falls in (True, False) if column else (False, True):
                browser.value("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
                button.click()
                cells = table.find_elements("css selector", f"td:nth-child({column + 1})")
                values = [cell.get_attribute("textContent") for cell in cells]
                values = [float(v) for v in values] if column else values
                assert len(values) == 3 and values == sorted(values, reverse=falls), (column, falls)
                assert head.get_attribute("aria-sort") == ("descending" if falls else "ascending")


def test_a_page_with_a_fault_is_detected(tmp_path: Path, browser: Browser) -> None:
    """The test above can fail: here by a picture from another host, an error in a script, a line and a table that are too
    wide, and a text that is too faint."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta name='viewport' content='width=device-width'><img src='http://example.org/x.png'>"
        "<p style='width:3000px'>wide</p><p style='color:#999'>faint</p><script>missing()</script>"
        "<div class='scroll' style='overflow:auto;width:50px'><table><td>atablethatistoowide</table></div>"
    )
    browser.open(page, PHONE)
    assert browser.overflow() > 0 and browser.cut() == ["atablethatistoowide"] and list(browser.faint()) == ["P faint"]
    assert "http://example.org/x.png" in browser.requests()
    assert any("missing is not defined" in line for line in browser.complaints())


def test_a_followed_page_reloads_itself_and_keeps_its_place(tmp_path: Path, browser: Browser) -> None:
    """Also the last page, which no longer reloads itself."""
    page = tmp_path / "report.html"

    def write(word: str, seconds: int) -> None:
        reload = render("follow.html", seconds=seconds)
        text = f"<p style='height:3000px'>{word}</p><details><summary>more</summary></details>"
        page.write_text(f"<!doctype html><head>{reload}</head><body>{text}</body>")

    write("old", 1)
    browser.open(page, DESKTOP)
    # The page is already being reloaded when the list is opened, so its state must be saved last of all.
    action = "(location.reload(), window.scrollTo(0, 1234), document.querySelector('details').open = true)"
    while not browser.value(f"document.readyState === 'complete' && {action}"):  # the page may be reloading itself
        time.sleep(0.1)
    write("new", 0)
    for _ in range(100):
        kept = browser.value(
            "[document.querySelector('p')?.innerText, scrollY, document.querySelector('details')?.open]"
        )
        if kept == ["new", 1234, True]:
            break
        time.sleep(0.1)
    assert kept == ["new", 1234, True] and browser.complaints() == []
