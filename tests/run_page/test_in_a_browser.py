"""A run's page in a real Chromium: everything clickable works, without console errors and without requests."""

from __future__ import annotations

from pathlib import Path

from browser import DESKTOP, PHONE, Browser

from retina_jax.reports.run_page import run_page


def test_the_page_can_be_clicked_through_and_requests_nothing(tiny_run: Path) -> None:
    page = tiny_run / "report.html"
    page.write_text(run_page(tiny_run)[0])
    with Browser() as browser:
        for size in (DESKTOP, PHONE):
            browser.open(page, size)
            assert browser.overflow() <= 0, size
            assert "AP" in browser.all(".headline")[0].text
            links = browser.all("nav a")
            assert [link.text for link in links] == ["run", "learning", "evaluations", "classes", "errors", "images"]
            for link in links:
                browser.value("window.scrollTo(0, 0)")
                link.click()
                assert browser.value("location.hash") == f"#{link.text}"
                top = browser.value("document.querySelector(location.hash).getBoundingClientRect().top")
                assert top < size[1], f"{link.text} is not in sight"
            for summary in browser.all("summary"):
                details = summary.find_element("xpath", "..")
                before = details.get_attribute("open")
                summary.click()
                assert details.get_attribute("open") != before, summary.text
                if before:
                    summary.click()
            sort_every_column(browser)
            images = browser.all(".pair img")
            assert len(images) >= 4 and all(browser.value("arguments[0].naturalWidth > 0", i) for i in images[:2])
            images[1].click()
            assert "zoomed" in images[1].find_element("xpath", "..").get_attribute("class")
            assert browser.overflow() <= 0, f"{size}, all opened and a picture enlarged"
            images[1].click()
            assert "zoomed" not in images[1].find_element("xpath", "..").get_attribute("class")
        assert browser.complaints() == []
        assert set(browser.requests()) == {page.resolve().as_uri()}


def sort_every_column(browser: Browser) -> None:
    """Checks that names first rise, then fall, and numbers the other way round."""
    tables = browser.all(".sortable table")
    assert len(tables) == 2
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


def test_a_page_with_a_request_or_an_error_is_detected(tmp_path: Path) -> None:
    """The test above can fail: here by a picture from another host, an error in a script, and a line that is too
    wide."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta name='viewport' content='width=device-width'><img src='http://example.org/x.png'>"
        "<p style='width:3000px'>wide<script>missing()</script>"
    )
    with Browser() as browser:
        browser.open(page, PHONE)
        assert browser.overflow() > 0
        assert "http://example.org/x.png" in browser.requests()
        assert any("missing is not defined" in line for line in browser.complaints())


def test_the_page_reads_without_scripts(tiny_run: Path) -> None:
    page = tiny_run / "report.html"
    page.write_text(run_page(tiny_run)[0])
    with Browser() as browser:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.open(page, PHONE)
        assert len(browser.all("svg")) >= 6 and len(browser.all("table tbody tr")) >= 10
        assert browser.all("th button") == []
