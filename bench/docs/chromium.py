"""Headless Chromium, to take pictures of pages, measure and test them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError


def chromium(folder: Path) -> Iterator[Any]:
    """Yields a browser that fetches nothing of its own, and keeps what it keeps in `folder`. Raises
    UserError where there is none.
    """
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        raise UserError(
            "This needs Chromium and its driver (on Debian: apt-get install chromium chromium-driver)."
        )
    options = ChromeOptions()
    options.binary_location = program
    flags = "headless no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking disable-component-update"
    for flag in (*flags.split(), "no-first-run", "window-size=1200,800", f"user-data-dir={folder}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options, Service(driver))
    yield chrome
    chrome.quit()
