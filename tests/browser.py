"""A real headless Chromium in which tests open pages; their requests and console messages are recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)
# Ratio of contrast (WCAG 2) of every element with text of its own that is shown; backgrounds are blended over the page's.
CONTRASTS = """
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
const context = canvas.getContext("2d", {willReadFrequently: true});
const drawn = colours => {
  colours.forEach(colour => { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); });
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = rgb => rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const found = {};
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!own || !element.checkVisibility() || element.closest("script, style")) continue;
  const below = [];
  for (let up = element; up; up = up.parentElement) below.unshift(getComputedStyle(up).backgroundColor);
  const style = getComputedStyle(element), ink = element.closest("svg") ? style.fill : style.color;
  const [a, b] = [light(drawn(["white", ...below])), light(drawn(["white", ...below, ink]))].sort((a, b) => b - a);
  found[element.tagName + " " + element.textContent.trim().slice(0, 30)] = (a + 0.05) / (b + 0.05);
}
return found;
"""


class Browser:
    """Debian's chromium, driven by its chromedriver; a new profile each. Leaving the `with` block ends it."""

    def __init__(self) -> None:
        """Skips the test where there is no Chromium."""
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.skip("no chromium or no chromedriver here (apt-get install chromium chromium-driver)")
        from selenium.webdriver import Chrome, ChromeOptions
        from selenium.webdriver.chrome.service import Service

        options = ChromeOptions()
        options.binary_location = chromium
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = Chrome(options=options, service=Service(driver))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self.driver.quit()

    def open(self, page: Path, size: tuple[int, int], scheme: str = "light") -> None:
        """Opens the page in a window of (width, height), light or dark; narrow windows act as phones."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(page.resolve().as_uri())

    def all(self, selector: str) -> list:
        """Returns the elements of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def value(self, script: str, *arguments: object) -> object:
        """Returns the value of a JavaScript expression."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def overflow(self) -> int:
        """Returns by how many pixels the page is wider than the window."""
        return self.value("document.documentElement.scrollWidth - window.innerWidth")

    def cut(self) -> list[str]:
        """Returns the beginning of the text of every table that is wider than the room for it."""
        wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
        return [text.strip()[:40] for text in self.value(f"{wide}.map(e => e.textContent)")]

    def faint(self) -> dict[str, float]:
        """Returns the texts whose contrast is below 4.5."""
        return {text: ratio for text, ratio in self.driver.execute_script(CONTRASTS).items() if ratio < 4.5}

    def complaints(self) -> list[str]:
        """Returns the console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Returns every address requested since the last call, except images embedded in the page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            event["params"]["request"]["url"] for event in messages if event["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]
