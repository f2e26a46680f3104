"""Measures the frames a second of the page of lives while it plays, in headless Chromium at 1280 x 800.

    uv run python -m bench.lives --out page
    uv run python -m bench.docs.frames page/lives.html

Work is the CPU time of the page's main thread for a frame, of which 60 frames a second leave 16.7
ms. A busy machine changes it little. The frames themselves say little where others use the cores.
The exit code is 1 below BAR.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path

from bench.docs.chromium import chromium

LIVES = {
    "train": "1",
    "half frozen": "2",
    "LoRA": "2",
    "all weights": "2",
    "answer": "3",
}  # the key that chooses each
SECONDS = 6
BAR = 59.5  # frames a second, in each life
COUNT = """const [seconds, done] = arguments, at = [];
const tick = (now) => (at.push(now), now - at[0] < 1000 * seconds ? requestAnimationFrame(tick) : done(at));
requestAnimationFrame(tick);"""
PARTS = {
    "TaskDuration": "work",
    "ScriptDuration": "script",
    "RecalcStyleDuration": "style",
    "LayoutDuration": "layout",
}


def main(page: Path) -> int:
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    slowest = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        browser = chromium(Path(folder) / "profile")
        chrome = next(browser)
        screen = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        chrome.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        read = lambda: {
            each["name"]: each["value"]
            for each in chrome.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
        }
        chrome.get(page.resolve().as_uri())
        body = chrome.find_element("tag name", "body")
        body.send_keys(" ")
        for life, key in LIVES.items():
            body.send_keys(key)
            before = read()
            at = chrome.execute_async_script(COUNT, SECONDS)
            after, frames = read(), len(at) - 1
            rate, longest = (
                1000 * frames / (at[-1] - at[0]),
                max(later - earlier for earlier, later in itertools.pairwise(at)),
            )
            parts = (
                f"{name} {1000 * (after[part] - before[part]) / frames:.1f}" for part, name in PARTS.items()
            )
            print(
                f"{life:12} {rate:.1f} frames/s, the longest {longest:.0f} ms; ms of a frame: "
                f"{', '.join(parts)}"
            )
            slowest = min(slowest, rate)
            assert chrome.execute_script("return state.playing"), "a life ended before it was measured"
        next(browser, None)
    return int(slowest < BAR)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
