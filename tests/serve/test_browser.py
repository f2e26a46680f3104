"""The chat page in a real browser, talking to a real server: what a person sees and does there."""

import asyncio
import contextlib
import re
import shutil
from collections.abc import Iterator

import pytest
from browser import Visit, make_browser
from line import Line
from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait
from tiny_server import TinyServer

LONG = "Tell me everything."


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and its driver (on Debian: apt-get install chromium chromium-driver)")
    chrome = make_browser(chromium, driver, tmp_path_factory.mktemp("browser"))
    yield chrome
    chrome.quit()


@contextlib.contextmanager
def locked(tiny: TinyServer, key: str) -> Iterator[int]:
    """A second port of the tiny server, which needs a key."""
    http, port, serving = asyncio.run_coroutine_threadsafe(tiny.listen((key,)), tiny.loop).result(30)
    yield port
    http.should_exit = True
    asyncio.run_coroutine_threadsafe(asyncio.wait_for(serving, 30), tiny.loop).result(30)


@pytest.fixture(scope="module")
def line(tiny_server):
    with Line(tiny_server.port) as line:
        yield line


@pytest.fixture
def visit(browser, line):
    browser.get_log("browser")
    return Visit(browser, line)


def test_an_answer_streams_and_says_what_it_cost(visit):
    assert visit.text("#digest") != ""
    assert visit.text("#weights") == "✓ unchanged since start"
    visit.set("price", "3.6")
    part = visit.partly(LONG)
    more = visit.until(lambda: len(visit.text("article.assistant .text")) > len(part))
    assert more
    assert visit.answering
    visit.line.pace = 0
    visit.finished()
    assert "first after" in visit.text(".summary")
    used, context = (int(number.replace(",", "")) for number in visit.text("#context").split(" of "))
    assert 0 < used <= context
    worked = float(visit.text("#time").split()[0])
    assert float(visit.text("#cost").removeprefix("$")) == pytest.approx(worked * 3.6 / 3600, rel=0.1)
    visit.until(lambda: "2 times" in visit.text("#checked"))
    assert visit.text("#weights") == "✓ unchanged since start"
    assert "re-sent" not in visit.text(".summary")

    visit.ask("And then?")
    assert f"this turn re-sent {used:,} tokens" in visit.text(".summary")
    assert int(visit.text("#context").split(" of ")[0].replace(",", "")) > used
    assert float(visit.chrome.find_element("id", "meter").get_attribute("aria-valuenow") or 0) > 0

    assert [line for line in visit.chrome.get_log("browser") if line["level"] == "SEVERE"] == []
    loaded = visit.chrome.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert loaded
    assert [url for url in loaded if not url.startswith((visit.line.address, "data:"))] == []


def test_stop_keeps_what_had_come_and_the_conversation_goes_on(visit):
    visit.listen()
    part = visit.partly(LONG)
    visit.click("#stop")
    visit.line.pace = 0
    visit.finished()
    text = visit.text("article.assistant .text")
    assert text.startswith(part.split("\n")[0])
    assert visit.text(".summary p").startswith("stopped · ")
    assert int(visit.text("#context").split(" of ")[0].replace(",", "")) > 0

    visit.ask("Go on.")
    assert [message["role"] for message in visit.requests()[-1]["messages"]] == ["user", "assistant", "user"]
    assert visit.requests()[-1]["messages"][1]["content"].startswith(part.split("\n")[0])


def test_an_error_keeps_what_had_come_and_can_be_tried_again(visit):
    visit.listen()
    part = visit.partly(LONG)
    visit.line.cut()
    visit.until(lambda: visit.text(".error"))
    assert visit.text(".error").startswith("The connection ")
    assert visit.text(".error").endswith(" What had come is kept.")
    assert visit.text("article.assistant .text").startswith(part.split("\n")[0])
    visit.until(lambda: visit.text("#weights") == "could not be checked")

    visit.line.mend()
    visit.click(".again")
    visit.until(lambda: len(visit.texts(".summary")) == 2)
    first, second = visit.requests()
    assert first == second
    visit.until(lambda: visit.text("#weights") == "✓ unchanged since start")
    assert [author.endswith("set aside") for author in visit.texts(".who")] == [True, False]


def test_a_refusal_shows_the_servers_sentence(visit):
    visit.listen()
    visit.paste("word " * 4000)
    visit.ask("")
    counts = [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", visit.text(".error"))]
    assert int(visit.text("#context").split(" of ")[1].replace(",", "")) in counts
    visit.set("max_tokens", "3")
    visit.ask("Another.")
    assert [message["content"] for message in visit.requests()[-1]["messages"]] == ["Another."]
    assert "ended by the limit of tokens" in visit.text(".summary")


def test_settings_are_sent_and_a_wrong_one_is_not(visit):
    visit.listen()
    for name, value in {"system": "Be brief.", "temperature": "0.5", "top_p": "0.25", "max_tokens": "4", "seed": "7"}.items():
        visit.set(name, value)
    visit.ask("Hello.")
    (request,) = visit.requests()
    assert request["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    assert request.items() >= {"temperature": 0.5, "top_p": 0.25, "max_tokens": 4, "seed": 7, "stream": True}.items()
    visit.set("top_p", "2")
    visit.type("Hello again.", Keys.ENTER)
    assert len(visit.requests()) == 1
    assert visit.chrome.switch_to.active_element.get_attribute("name") == "top_p"


def test_the_keyboard_is_enough(visit):
    assert visit.chrome.switch_to.active_element.get_attribute("id") == "ask"
    visit.type("one", Keys.SHIFT + Keys.ENTER, Keys.NULL, "two")
    assert visit.chrome.find_element("id", "ask").get_attribute("value") == "one\ntwo"
    visit.partly("")
    assert visit.text("article.user .text") == "one\ntwo"
    visit.type(Keys.ESCAPE)
    visit.finished()
    assert "stopped" in visit.text(".summary")
    visit.line.pace = 0
    visit.click("#new")
    assert visit.texts("article") == []
    assert visit.text("#context").startswith("0 of ")
    assert visit.chrome.switch_to.active_element.get_attribute("id") == "ask"


def test_a_key_is_asked_for_once_by_the_browser_itself(browser, tiny_server):
    with locked(tiny_server, "secret") as port:
        browser.get(f"http://127.0.0.1:{port}/")
        assert browser.find_elements("id", "ask") == []
        browser.get(f"http://me:secret@127.0.0.1:{port}/")
        WebDriverWait(browser, 30).until(lambda _: browser.find_element("id", "weights").text == "✓ unchanged since start")


def test_changed_weights_are_loud(visit):
    visit.chrome.execute_script(
        "const real = window.fetch; window.fetch = async (url, how) => `${url}`.endsWith('/attestation')"
        " ? Response.json({...await (await real(url, how)).json(), digest: 'f'.repeat(64)}) : real(url, how)"
    )
    visit.set("max_tokens", "2")
    visit.ask("Hello.")
    visit.until(lambda: visit.text("#alert"))
    assert "The weights have changed" in visit.text("#alert")
    assert visit.text("#weights") == "✗ CHANGED since start"


def test_markdown_is_rendered_as_text(visit):
    text = "<img src=x onerror=f()> **bold** `a<b>` [link](javascript:f())\n\n- one\n- two\n\n```html\n<script>\n```\nend"
    html = visit.chrome.execute_script(
        "const body = document.createElement('div'); show({text: arguments[0], blocks: [], body}); return body.innerHTML", text
    )
    assert "&lt;img src=x onerror=f()&gt; <strong>bold</strong> <code>a&lt;b&gt;</code> [link](javascript:f())" in html
    assert "<ul><li>one</li><li>two</li></ul>" in html
    assert "<code>&lt;script&gt;</code></pre>" in html
    assert html.endswith("<p>end</p>")
    assert "<img" not in html
    assert "<a" not in html


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_it_fits_its_screen(visit, width):
    size = {"width": width, "height": 760, "deviceScaleFactor": 1, "mobile": width < 500}
    visit.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    visit.ask("A" * 200)
    visit.chrome.execute_script(
        "const turn = turns.at(-1); turn.text = arguments[0]; show(turn)", f"```\n{'wide ' * 100}\n```\n\n- {'B' * 200}"
    )
    widths = visit.chrome.execute_script(
        "return ['html', '#scroll', 'header'].map((css) => document.querySelector(css)).map((each) => each.scrollWidth)"
    )
    code = visit.chrome.execute_script(
        "const {x, width} = document.querySelector('pre').getBoundingClientRect(); return x + width"
    )
    assert max(*widths, code) <= width
    assert visit.chrome.find_element("id", "open").is_displayed() == (width < 992)
    visit.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
