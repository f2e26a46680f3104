"""Makes the README's pictures that need a browser, light and dark: `uv run --with pillow python -m bench.docs.pictures`.

With names of pictures behind it, such as `chat memory`, only those. `python -m
bench.docs.readmes` makes the others.
"""

import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium.webdriver.support.ui import WebDriverWait

from bench.cli import ROOT
from bench.docs.chromium import chromium
from bench.docs.readmes import PICTURED, shown
from bench.pages import LOG_CHARTS, write_page

PICTURES = ROOT / "bench" / "pictures"
SCHEMES = ("light", "dark")
QUESTION = "Why is the sea salty? Answer in one short sentence."


def set_scheme(chrome, scheme: str) -> None:
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def save(chrome, name: str) -> None:
    """Saves what the browser shows in both schemes."""
    for scheme in SCHEMES:
        set_scheme(chrome, scheme)
        chrome.save_screenshot(PICTURES / f"{name}-{scheme}.png")


def chat(chrome, _: Path) -> None:
    """Asks the default model a question on the server's page, and takes its picture when the answer
    is there.
    """
    chrome.set_window_size(1000, 700)
    words = [
        sys.executable,
        "-m",
        "stages.serve",
        "--model",
        "smollm2-135m-instruct",
        "--port",
        "0",
        "--slots",
        "2",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        output = ""
        assert server.stdout
        while "Ctrl-C" not in output:
            output += server.stdout.readline()
        chrome.get(re.findall(r"page +(\S+)", output)[0])
        until = WebDriverWait(chrome, 300).until
        until(lambda _: chrome.find_element("id", "ask")).send_keys(QUESTION + "\n")
        until(lambda _: "tokens/s" in chrome.find_element("css selector", "main").text)
        save(chrome, "chat")
        server.terminate()


def memory(chrome, folder: Path) -> None:
    """Takes a picture of the first chapter of the report: the memory of a step over time, of the document
    from which READMEs have the stage table.
    """
    folder.mkdir()
    source = Path(shutil.copy(shown() / PICTURED, folder))
    page = ROOT / "bench" / "stages" / "page"
    write_page(
        source, "report.html", page / "report.html", page / "report.css", *LOG_CHARTS, page / "report.js"
    )
    chrome.set_window_size(1000, 1186)
    chrome.get((folder / "report.html").as_uri())
    chrome.execute_script("document.documentElement.style.overflow = 'hidden'")
    chrome.execute_script("document.querySelector('figure').scrollIntoView(); scrollBy(0, -12)")
    save(chrome, "memory")


LIVES = (
    ("1", "", 16),
    ("2", "Half frozen", 8),
    ("2", "LoRA", 8),
    ("3", "", 8),
)  # key, way to fine-tune, frames

SCRUB = """const scrub = document.getElementById('scrub');
scrub.value = scrub.max * arguments[0];
scrub.dispatchEvent(new Event('input', {bubbles: true}));
scrollTo(0, document.getElementById("bar").offsetTop);"""


def lives(chrome, folder: Path) -> None:
    """Takes a moving picture of the page of `bench.lives`, 20 seconds long, light and dark."""
    from PIL import Image  # of Pillow, which nothing else here needs

    subprocess.run([sys.executable, "-m", "bench.lives", "--out", folder], check=True)
    chrome.set_window_size(1280, 900)
    chrome.get((folder / "lives.html").as_uri())
    chrome.execute_script("document.documentElement.style.overflow = 'hidden'")
    for scheme in SCHEMES:
        set_scheme(chrome, scheme)
        images = []
        for key, way, count in LIVES:
            chrome.find_element("tag name", "body").send_keys(key)
            if way:
                chrome.find_element("xpath", f"//button[contains(., '{way}')]").click()
            for number in range(count):
                chrome.execute_script(SCRUB, number / (count - 1))
                shot = chrome.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
                images.append(
                    Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB").resize((800, 470))
                )
        path = PICTURES / f"lives-{scheme}.webp"
        images[0].save(
            path,
            save_all=True,
            append_images=images[1:],
            duration=20_000 // len(images),
            loop=0,
            quality=60,
            method=6,
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        browser = chromium(Path(folder) / "profile")
        chrome = next(browser)
        for make in (memory, chat, lives):
            if len(sys.argv) == 1 or make.__name__ in sys.argv:
                make(chrome, Path(folder) / make.__name__)
        next(browser, None)
