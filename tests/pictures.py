"""Makes the README's pictures that need a browser: `python tests/pictures.py`. The others `python -m bench --out` makes."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from chromium import chromium
from selenium.webdriver.support.ui import WebDriverWait

PICTURES = Path(__file__).parent.parent / "bench" / "pictures"
QUESTION = "Why do sailors sing? Answer in two sentences."


def chat(chrome) -> None:
    """Asks the default model a question on the server's page, and takes its picture when the answer is there."""
    words = [sys.executable, "-m", "stages.serve", "--model", "smollm2-135m-instruct", "--port", "0", "--slots", "2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        output = ""
        while "Ctrl-C" not in output:
            output += server.stdout.readline()
        chrome.get(re.findall(r"page +(\S+)", output)[0])
        until = WebDriverWait(chrome, 120).until
        until(lambda _: chrome.find_element("id", "ask")).send_keys(QUESTION + "\n")
        until(lambda _: "tokens/s" in chrome.find_element("css selector", "main").text)
        chrome.save_screenshot(PICTURES / "chat.png")
        server.terminate()


def anatomy(chrome, folder: Path) -> None:
    """Takes a picture of the page of `bench.anatomy`."""
    subprocess.run([sys.executable, "-m", "bench.anatomy", "--preset", "tiny", "--out", folder], check=True)
    chrome.get(next(folder.glob("*.html")).as_uri())
    chrome.execute_script("document.documentElement.style.overflow = 'hidden'; window.scrollTo(0, 500)")
    chrome.save_screenshot(PICTURES / "anatomy.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        browser = chromium(Path(folder) / "profile")
        chrome = next(browser)
        chrome.set_window_size(1000, 700)
        anatomy(chrome, Path(folder) / "page")
        chat(chrome)
        next(browser, None)
