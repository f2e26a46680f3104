"""The turns of a conversation on the chat page: set aside, kept over a reload, edited, copied, continued, waiting, in focus."""

import asyncio
import re
import threading
import time

import httpx
import pytest
from selenium.webdriver import Keys

from stages.serve.api import generation
from tests.serve.tiny_server import say

pytestmark = pytest.mark.whole

MORE = "Tell me more."


def contents(request):
    return [message["content"].strip() for message in request["messages"]]


def test_a_full_context_sets_the_oldest_turns_aside(visit):
    visit.listen()
    for _ in range(5):
        visit.ask(MORE)
    visit.ask(MORE)
    assert visit.texts(".error") == []
    aside, rest = visit.texts("article.aside .text"), visit.texts("article:not(.aside) .text")
    assert visit.text(".note") == f"Set aside: the model does not see the {len(aside)} turns above."
    assert len(aside) % 2 == 0
    as_shown = lambda text: re.sub(
        r"[\x00-\x20\x7f]+", " ", text
    ).strip()  # no browser shows control characters
    assert [*map(as_shown, contents(visit.requests()[-1]))] == [*map(as_shown, rest[:-1])]
    assert sum(
        int(n)
        for n in re.findall(r"context was full: (\d+) turns set aside", "".join(visit.texts(".figures")))
    ) == len(aside)
    used, context = map(int, visit.text("#context").split(" of "))
    assert used <= context


def test_a_conversation_survives_a_reload_in_this_browser_alone(visit):
    visit.ask("Hello.")
    visit.set("system", "Be brief.")
    visible = lambda: [
        visit.texts(css) for css in ("article .text", ".figures", "#context", "#resent", "#time")
    ]
    before = visible()
    visit.reload()
    assert visible() == before
    visit.listen()
    visit.ask("And then?")
    assert contents(visit.requests()[-1]) == ["Be brief.", "Hello.", before[0][1], "And then?"]
    assert visit.chrome.get_cookies() == []

    visit.chrome.switch_to.new_window(
        "tab"
    )  # begins with the newest conversation and does not disturb this tab's
    visit.chrome.get(visit.line.address)
    visit.ready()
    assert visit.texts("article .text")[0] == "Hello."
    visit.click("#new")
    visit.ask("Another.")
    visit.chrome.close()
    visit.chrome.switch_to.window(visit.chrome.window_handles[0])
    visit.reload()
    assert visit.texts("article .text")[0] == "Hello."

    visit.click("#new")
    visit.reload()
    assert visit.texts("article") == []
    assert visit.texts("#list li button:first-child") == ["Another.", "Hello."]


def test_two_tabs_that_go_on_with_one_conversation_keep_both(visit):
    visit.ask("Hello.")
    users = lambda: visit.texts("article.user .text")
    visit.chrome.switch_to.new_window("tab")
    visit.chrome.get(visit.line.address)
    visit.ready()
    visit.set("max_tokens", "12")
    visit.ask("In the second tab.")
    visit.chrome.switch_to.window(visit.chrome.window_handles[0])
    visit.chrome.execute_script("save()")  # nothing was sent here: the other tab's is the newer
    visit.click("#list li:first-child button:first-child")
    assert users() == ["Hello.", "In the second tab."]  # the list has what the other tab sent

    visit.ask("In the first tab.")
    visit.chrome.switch_to.window(visit.chrome.window_handles[1])
    visit.ask("Again in the second.")
    visit.chrome.close()
    visit.chrome.switch_to.window(visit.chrome.window_handles[0])
    assert visit.until(lambda: len(visit.texts("#list li")) == 2)
    visit.click("#list li:first-child button:first-child")
    assert users() == ["Hello.", "In the second tab.", "Again in the second."]
    visit.click("#list li:last-child button:first-child")
    assert users() == ["Hello.", "In the second tab.", "In the first tab."]


def test_an_answer_that_a_reload_cut_goes_on(visit, tiny_server, monkeypatch):
    step, written = tiny_server.engine.step, []

    def step_until_written():
        if len(written) == 3:  # of 15 times
            return time.sleep(0.01) or []
        written.extend(events := step())
        return events

    monkeypatch.setattr(tiny_server.engine, "step", step_until_written)
    visit.set("max_tokens", "60")
    visit.type(MORE, Keys.ENTER)
    part = visit.until(lambda: visit.text("article.assistant .text").strip())
    assert visit.answering
    visit.reload()
    monkeypatch.undo()
    assert visit.text("article.assistant .text").startswith(part.split("\n")[0])
    assert visit.text(".figures").startswith("stopped")
    visit.click(".again:not(:last-of-type)")
    visit.until(lambda: "token" in visit.text(".figures"))
    assert visit.text("article.assistant .text").startswith(part.split("\n")[0])


def test_what_cannot_be_kept_is_said(visit):
    visit.chrome.execute_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }"
    )
    visit.ask("Hello.")
    assert visit.text("#alert").startswith("This browser keeps no more of the conversation")


def test_a_turn_of_ones_own_is_edited_and_copied(visit):
    visit.listen()
    visit.ask("One")
    visit.ask("Two")
    first = lambda css: visit.chrome.find_elements("css selector", css)[0]
    visit.chrome.execute_script(
        "navigator.clipboard.writeText = async (text) => { window.copied = text; };"
        # "Copied" stays
        "const real = setTimeout; window.setTimeout = (act, after) => after === 1500 || real(act, after)"
    )
    first("article.user .copy").click()
    visit.until(lambda: first("article.user .copy").text == "Copied")
    assert visit.chrome.execute_script("return window.copied") == "One"
    visit.chrome.execute_script(
        "navigator.clipboard.writeText = () => Promise.reject()"
    )  # as over plain http from elsewhere
    visit.click("article.user .copy")
    visit.until(lambda: visit.text("article.user .copy") == "Copied")
    assert visit.focus == "Copied"

    first(".edit").click()
    visit.chrome.switch_to.active_element.send_keys("x", Keys.ESCAPE)
    assert visit.focus == "Edit"
    assert len(visit.texts("article")) == 4
    first(".edit").send_keys(Keys.ENTER)
    assert visit.chrome.switch_to.active_element.get_attribute("value") == "One"
    visit.chrome.switch_to.active_element.send_keys(" more", Keys.ENTER)
    visit.until(lambda: len(visit.texts(".figures")) == 3)
    assert contents(visit.requests()[-1]) == ["One more"]
    assert visit.texts(".note") == ["Set aside: the model does not see the 4 turns above."]
    assert len(visit.texts(".edit")) == 1

    visit.partly("Three")  # what is edited while it is being answered: that answer ends
    visit.click(".edit")
    visit.line.release()
    visit.chrome.switch_to.active_element.send_keys("!", Keys.ENTER)
    visit.until(lambda: contents(visit.requests()[-1])[-1] == "Three!" and not visit.answering)
    assert visit.texts("article.user .text")[-1] == "Three!"


def test_an_answer_goes_on_after_a_cut(visit):
    visit.listen()
    visit.set("max_tokens", "3")
    visit.ask(MORE)
    part = visit.text("article.assistant .text")
    assert visit.text(".figures").startswith("ended by the limit of tokens · 3 tokens")
    visit.click(".again:not(:last-of-type)")
    visit.until(lambda: "6 tokens" in visit.text(".figures"))
    (text,) = visit.texts("article.assistant .text")
    assert text.startswith(part)
    assert len(text) > len(part)
    request = visit.requests()[-1]
    assert (request["continue_final_message"], request["add_generation_prompt"]) == (True, False)
    assert [message["role"] for message in request["messages"]] == ["user", "assistant"]
    assert visit.focus == "ask"


def test_the_place_in_the_queue_is_told(visit, tiny_server, monkeypatch):
    monkeypatch.setattr(generation, "WAIT_SECONDS", 0.02)
    step, go = tiny_server.engine.step, threading.Event()
    monkeypatch.setattr(tiny_server.engine, "step", lambda: step() if go.is_set() else time.sleep(0.01) or [])

    async def others():
        async with httpx.AsyncClient(base_url=tiny_server.url, timeout=300) as client:
            await asyncio.gather(*(client.post("/v1/chat/completions", json=say()) for _ in range(3)))

    asking = threading.Thread(target=lambda: asyncio.run(others()))
    asking.start()
    visit.until(lambda: tiny_server.engine.waiting == 3)
    visit.type(MORE, Keys.ENTER)
    try:
        visit.until(lambda: visit.text(".wait") == "Number 4 in the queue")
        assert visit.text("#status") == visit.text(".wait")
    finally:
        go.set()
    visit.finished()
    asking.join()
    assert visit.texts(".wait") == []


def test_the_part_of_a_prompt_that_is_read_is_told(visit, tiny_server, monkeypatch):
    """Held after its first chunk; it is read aloud once."""
    monkeypatch.setattr(generation, "WAIT_SECONDS", 0.02)
    step, go = tiny_server.engine.step, threading.Event()

    def step_until_held():
        is_held = any(sequence.prefilled_tokens for sequence in tiny_server.engine.scheduler.prefilling)
        return step() if go.is_set() or not is_held else time.sleep(0.01) or []

    monkeypatch.setattr(tiny_server.engine, "step", step_until_held)
    visit.type(f"{MORE} " * 5, Keys.ENTER)
    try:
        wait = visit.until(lambda: re.fullmatch(r"Reading (\d+) of (\d+) tokens", visit.text(".wait")))
        assert 0 < int(wait[1]) < int(wait[2])
        assert visit.text("#status").startswith("Reading ")
        aloud = visit.text("#status")
        visit.chrome.execute_script("showWait(turns.at(-1), 'reading 12345 of 67890 tokens')")
        assert (visit.text(".wait"), visit.text("#status")) == ("Reading 12,345 of 67,890 tokens", aloud)
    finally:
        go.set()
    visit.finished()
    assert visit.texts(".wait") == []


def test_the_focus_is_never_lost(visit):
    press = lambda css: visit.chrome.find_elements("css selector", css)[-1].send_keys(Keys.ENTER)
    visit.line.hold()
    visit.type(MORE)
    press("#send")
    visit.until(lambda: visit.answering)
    assert visit.focus == "ask"
    press("#stop")
    visit.line.release()
    visit.finished()
    assert visit.focus == "ask"
    for action in (".again", "#new", "#tries button"):
        press(action)
        visit.until(lambda: not visit.answering)
        assert visit.focus == "ask", action
    visit.finished()
    press(".edit")
    press(".editing .go")
    visit.until(lambda: len(visit.texts(".figures")) == 2 and not visit.answering)
    assert visit.focus == "ask"
    press("#open")
    assert visit.focus == "open"


@pytest.fixture
def phone(visit):
    cdp = visit.chrome.execute_cdp_cmd
    cdp(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True},
    )
    cdp("Emulation.setTouchEmulationEnabled", {"enabled": True})
    visit.reload()
    yield visit
    cdp("Emulation.setTouchEmulationEnabled", {"enabled": False})
    cdp("Emulation.clearDeviceMetricsOverride", {})


def test_the_rail_folds_and_starts_folded_on_a_phone(visit, request):
    shown = lambda: visit.chrome.find_element("id", "rail").is_displayed()
    assert shown()
    assert not visit.chrome.find_element("id", "strip").is_displayed()
    visit.click("#open")
    assert not shown()
    assert visit.chrome.find_element("id", "strip").is_displayed()
    visit.reload()
    assert not shown()
    visit.click("#open")
    request.getfixturevalue("phone")
    assert not shown()
    visit.click("#open")
    visit.set("seed", "5")
    visit.chrome.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not shown()
    assert visit.focus == "open"
    visit.type("Hello.")
    visit.click("#send")
    visit.finished()
    assert visit.focus == "scroll"  # no keyboard opens over the answer
