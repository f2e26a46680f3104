"""The chat page in a real browser, talking to a real server: what a person sees and does there."""

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Iterator

import pytest
from selenium.common.exceptions import JavascriptException
from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.tiny_server import TinyServer

pytestmark = pytest.mark.whole

LONG = "Tell me everything."


@contextlib.contextmanager
def locked(tiny: TinyServer, key: str) -> Iterator[int]:
    """A second port of the tiny server, which needs a key."""
    http, port, serving = asyncio.run_coroutine_threadsafe(tiny.listen((key,)), tiny.loop).result(30)
    yield port
    http.should_exit = True
    asyncio.run_coroutine_threadsafe(asyncio.wait_for(serving, 300), tiny.loop).result(300)


def test_an_answer_streams_and_says_what_it_cost(visit):
    assert visit.text("#digest") != ""
    assert visit.text("#weights") == "✓ unchanged since start"
    visit.set("price", "3.6")
    visit.set("max_tokens", "40")
    part = visit.partly(LONG)
    assert visit.answering
    visit.line.let_through(events=2)
    visit.until(lambda: len(visit.text("article.assistant .text")) > len(part))
    assert visit.answering
    visit.line.release()
    visit.finished()
    assert "first after" in visit.text(".figures")
    used, context = (int(number.replace(",", "")) for number in visit.text("#context").split(" of "))
    assert 0 < used <= context
    worked = float(visit.text("#time").split()[0])
    assert float(visit.text("#cost").removeprefix("$")) == pytest.approx(worked * 3.6 / 3600, rel=0.1)
    visit.until(lambda: "2 times" in visit.text("#checked"))
    assert visit.text("#weights") == "✓ unchanged since start"
    assert "re-sent" not in visit.text(".figures")

    visit.ask("And then?")
    assert f"this turn re-sent {used:,} tokens" in visit.text(".figures")
    assert int(visit.text("#context").split(" of ")[0].replace(",", "")) > used
    assert float(visit.chrome.find_element("id", "meter").get_attribute("aria-valuenow") or 0) > 0

    assert [line for line in visit.chrome.get_log("browser") if line["level"] == "SEVERE"] == []
    loaded = visit.chrome.execute_script(
        "return performance.getEntriesByType('resource').map((each) => each.name)"
    )
    assert loaded
    assert [url for url in loaded if not url.startswith((visit.line.address, "data:"))] == []


def test_stop_keeps_what_had_come_and_the_conversation_goes_on(visit):
    visit.listen()
    part = visit.partly(LONG)
    visit.click("#stop")
    visit.line.release()
    visit.finished()
    text = visit.text("article.assistant .text")
    assert text.startswith(part.split("\n")[0])
    assert visit.text(".figures").startswith("stopped · ")
    assert int(visit.text("#context").split(" of ")[0].replace(",", "")) > 0

    visit.ask("Go on.")
    assert [message["role"] for message in visit.requests()[-1]["messages"]] == ["user", "assistant", "user"]
    # which a page does not show
    sent = visit.requests()[-1]["messages"][1]["content"].replace("\0", "")
    assert sent.startswith(part.split("\n")[0])


def test_an_answer_comes_though_its_tokens_cannot_be_counted(visit):
    visit.chrome.execute_script(
        "const real = window.fetch; window.fetch = async (url, how) => `${url}`.endsWith('/tokenize')"
        " ? {ok: true, json: () => Promise.reject(new DOMException('stopped meanwhile', "
        "'AbortError'))} : real(url, how)"
    )
    visit.ask("Hello.")
    assert "12 tokens" in visit.text(".figures")


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
    visit.until(lambda: len(visit.texts(".figures")) == 2)
    first, second = visit.requests()
    assert first == second
    visit.until(lambda: visit.text("#weights") == "✓ unchanged since start")
    assert visit.texts(".note") == ["Set aside: the model does not see the turn above."]


def test_a_refusal_shows_the_servers_sentence_once(visit, tiny_server, monkeypatch):
    visit.listen()
    monkeypatch.setattr(tiny_server.state.admission, "limit", 0)
    visit.ask("Hello.")
    assert "no more are taken in" in visit.text(".error")
    assert visit.text(".error").count("Try again in") == 1
    monkeypatch.undo()
    visit.set("max_tokens", "3")
    visit.ask("Another.")
    assert [message["content"] for message in visit.requests()[-1]["messages"]] == ["Another."]
    assert "ended by the limit of tokens" in visit.text(".figures")


def test_a_message_too_long_by_itself_is_refused_at_once_and_nothing_is_lost(visit):
    """Nothing is sent or set aside, and what was typed stays, over a reload too; so also where a
    question is edited.
    """
    visit.listen()
    visit.ask("Hello.")
    field, long = visit.chrome.find_element("id", "ask"), "word " * 4000
    refused = lambda: re.search(
        r"[\d,]+ tokens are too many for this model: at most 149 leave room", visit.text("#alert")
    )
    visit.paste(long)
    visit.type("!", Keys.ENTER)
    visit.until(refused)
    assert field.get_attribute("value") == f"{long}!"
    visit.reload()
    field = visit.chrome.find_element("id", "ask")
    assert field.get_attribute("value") == f"{long}!"
    visit.listen()
    field.clear()

    visit.click(".edit")
    edited = visit.chrome.switch_to.active_element
    visit.chrome.execute_script("arguments[0].value = arguments[1]", edited, long)
    edited.send_keys(Keys.ENTER)
    visit.until(refused)
    assert edited.get_attribute("value") == long
    edited.send_keys(Keys.ESCAPE)
    assert (len(visit.texts("article")), visit.texts(".note"), visit.requests()) == (2, [], [])
    visit.type("More.")
    assert visit.text("#alert") == ""
    visit.ask("")
    assert len(visit.requests()[0]["messages"]) == 3
    assert field.get_attribute("value") == ""


def test_conversations_stay_in_a_list_to_open_search_export_and_delete(visit, tmp_path):
    visit.chrome.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    titles = lambda: visit.texts("#list li button:first-child")
    visit.listen()
    visit.ask("Hello.")
    part = visit.partly(LONG)
    before = visit.texts("article.user .text")
    visit.click("#new")
    visit.line.release()
    assert (visit.texts("article"), visit.answering, titles()) == ([], False, ["Hello."])
    visit.ask("Another.")
    assert titles() == ["Another.", "Hello."]
    visit.set("search", "everything")
    assert titles() == ["Hello."]
    visit.click("#export")
    (rows,) = visit.until(lambda: [*tmp_path.glob("conversations.jsonl")])
    messages = json.loads(visit.until(rows.read_text))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"] == LONG

    visit.click("#list li button")  # the last one: deletes it
    assert titles() == []
    assert visit.focus == "Undo"
    visit.click("#undo button")
    assert visit.texts("article.user .text") == before
    assert visit.text("article.assistant .text").startswith(part.split("\n")[0])
    assert visit.text(".figures").startswith("stopped")
    assert visit.focus == "ask"
    visit.chrome.execute_script("document.getElementById('search').value = ''; drawList()")
    assert titles() == ["Another.", "Hello."]  # in the order in which something was sent
    visit.set("max_tokens", "3")
    visit.ask("And then?")
    assert titles() == ["Hello.", "Another."]
    assert len(visit.requests()[-1]["messages"]) == 5
    visit.click("#list li:first-child button")
    assert (visit.texts("article"), titles()) == ([], ["Another."])
    visit.reload()
    assert not visit.chrome.find_element("id", "undo").is_displayed()
    assert "everything" not in visit.chrome.execute_script(
        "return JSON.stringify([localStorage, sessionStorage])"
    )


def test_the_oldest_conversations_make_room(visit):
    """Of a bounded number, and where the browser holds no more."""
    visit.chrome.execute_script(
        "for (let at = 1; at < 211; at += 1) put({id: `${at}`, changed: at, spent: 0, turns: "
        "[{role: 'user', text: `t${at}`}]})"
    )
    kept = lambda: visit.chrome.execute_script("return conversations().map(({id}) => id)")
    assert kept() == [f"{at}" for at in range(210, 10, -1)]
    visit.chrome.execute_script(
        "const real = Storage.prototype.setItem; Storage.prototype.setItem = function (...pair) {"
        " if (localStorage.length > 150) throw new DOMException('full', 'QuotaExceededError'); "
        "real.apply(this, pair); };"
        "put({id: 'more', changed: 300, spent: 0, turns: [{role: 'user', text: 'more'}]})"
    )
    assert kept()[:2] == ["more", "210"]
    assert 140 < len(kept()) <= 151


def test_settings_are_sent_and_a_wrong_one_is_not(visit):
    visit.listen()
    for name, value in {
        "system": "Be brief.",
        "temperature": "0.5",
        "top_p": "0.25",
        "max_tokens": "4",
        "seed": "7",
    }.items():
        visit.set(name, value)
    visit.ask("Hello.")
    (request,) = visit.requests()
    assert request["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
    ]
    assert (
        request.items()
        >= {"temperature": 0.5, "top_p": 0.25, "max_tokens": 4, "seed": 7, "stream": True}.items()
    )
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
    visit.line.release()
    visit.finished()
    assert "stopped" in visit.text(".figures")
    visit.click("#new")
    assert visit.texts("article") == []
    assert visit.text("#context").startswith("0 of ")
    assert visit.chrome.switch_to.active_element.get_attribute("id") == "ask"


def test_the_page_asks_for_a_key_and_keeps_it_in_its_tab(browser, tiny_server):
    until = lambda true: WebDriverWait(browser, 300).until(lambda _: true())
    find = lambda id: browser.find_element("id", id)
    with locked(tiny_server, "secret") as port:
        browser.get(f"http://127.0.0.1:{port}/")
        until(lambda: find("lock").is_displayed())
        assert not find("send").is_enabled()
        browser.switch_to.active_element.send_keys("wrong", Keys.ENTER)
        until(lambda: find("refused").text == "The key is wrong.")
        browser.switch_to.active_element.send_keys("secret", Keys.ENTER)
        until(lambda: find("weights").text == "✓ unchanged since start")
        assert "secret" not in browser.execute_script("return JSON.stringify(localStorage)")
        browser.refresh()
        until(lambda: find("weights").text == "✓ unchanged since start")
        assert not find("lock").is_displayed()
        browser.execute_script("sessionStorage.clear()")


def test_no_key_locks_the_page(browser, tiny_server):
    """Whatever is typed or was stored: what no header can hold is refused in words, and any other
    key reaches the server.
    """
    until = lambda true: WebDriverWait(browser, 120).until(lambda _: true())
    find = lambda id: browser.find_element("id", id)
    stored = lambda: browser.execute_script("return sessionStorage.getItem('thrice key')")
    send = lambda key: browser.execute_script(
        "const form = document.getElementById('unlock'); form.elements.key.value = arguments[0]; "
        "form.requestSubmit()",
        key,
    )
    key = "ké…y 🔑"
    with locked(tiny_server, key) as port:
        browser.get(f"http://127.0.0.1:{port}/")
        until(lambda: find("lock").is_displayed())
        for bad in ("a\x01b", "a\x7fb", "a\x85b", "k" * 40_000):
            send(bad)
            until(lambda: find("refused").text.startswith("That is no key"))
            assert (stored(), find("lock").is_displayed()) == (None, True)
            browser.execute_script("document.getElementById('refused').textContent = ''")
        for wrong in ("Ā", "…", "é", "k" * 4000):
            send(wrong)
            until(lambda: find("lock").is_displayed() and find("refused").text == "The key is wrong.")
            browser.refresh()  # and the tab that has it stored asks again
            until(lambda: find("lock").is_displayed() and find("refused").text == "The key is wrong.")
        for bad in ("a\x01b", "a\nb", "k" * 40_000):
            browser.execute_script("sessionStorage.setItem('thrice key', arguments[0])", bad)
            browser.refresh()
            until(lambda: find("lock").is_displayed())
        send(key)
        until(lambda: find("weights").text == "✓ unchanged since start")
        browser.refresh()
        until(lambda: find("weights").text == "✓ unchanged since start")
        browser.execute_script("sessionStorage.clear()")


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


TEXT = """# Title

- one
  1. two **bold**
- [x] three

| a | b |
|---|--:|
| 1 | `2` |

---
A [link](https://example.org "title"), ~~not~~<br>*this* ![picture](https://example.org/x.png)

> said

```python
print("<b>")
```
"""
HTML = (
    '<h3 dir="auto">Title</h3><ul dir="auto"><li>one<ol><li>two '
    "<strong>bold</strong></li></ol></li><li>☑ three</li></ul>"
    '<div class="wide" tabindex="0" dir="auto"><table><thead><tr><th>a</th><th '
    'align="right">b</th></tr></thead>'
    '<tbody><tr><td>1</td><td align="right"><code>2</code></td></tr></tbody></table></div><hr dir="auto">'
    '<p dir="auto">A <a href="https://example.org" title="title" target="_blank" rel="noopener '
    'noreferrer">link</a>,'
    " <del>not</del><br><em>this</em>"
    ' <a href="https://example.org/x.png" target="_blank" rel="noopener noreferrer">picture</a></p>'
    '<blockquote dir="auto"><p>said</p></blockquote><figure dir="ltr"><figcaption>python<button '
    'type="button" class="copy">'
    'Copy</button></figcaption><pre tabindex="0"><code>print("&lt;b&gt;")</code></pre></figure>'
)
REPLACE = "const turn = turns.at(-1); turn.text = arguments[0]; show(turn)"
SHOW = "const body = document.createElement('div'); show({text: arguments[0], blocks: [], body});"


def test_markdown_becomes_elements(visit):
    html = visit.chrome.execute_script(f"{SHOW} return body.innerHTML", TEXT)
    assert re.sub(r">\n+<|\n+(?=<)", lambda match: match[0].replace("\n", ""), html) == HTML
    grown = visit.chrome.execute_script(  # piece by piece, as it streams, it becomes the same
        "const turn = {text: '', blocks: [], body: document.createElement('div')};"
        "for (const letter of arguments[0]) { turn.text += letter; show(turn); } return turn.body.innerHTML",
        TEXT,
    )
    assert grown == html


FORMULAS = r"""Inline \(x^2\), and $a_1 + b$, while $5 and $6 are prices.

\[\int_0^1 x\,dx = \frac{1}{2}\]

$$E = m c^2$$

\(\href{javascript:f()}{here}\) and \(\broken{\)

```python
def f():  # a comment
    return "text"
```

```unknown
plain
```
"""
SHOW_IN_PAGE = (
    "const turn = {role: 'assistant', text: arguments[0], blocks: [], body: document.createElement('div')};"
    "turn.finish = 'stop'; document.querySelector('main').append(turn.body); show(turn); window.shown = turn.body;"
)


def test_formulas_and_code_are_drawn_by_what_is_fetched_then(visit):
    run = visit.chrome.execute_script
    fetched = lambda: run(
        "return performance.getEntriesByType('resource').map((each) => each.name).filter((name) => name.includes('/page/'))"
    )
    run(SHOW, "Plain *text*, and `code` in it.")
    assert fetched() == []
    run(SHOW_IN_PAGE, FORMULAS)
    visit.until(lambda: len(run("return [...shown.querySelectorAll('math')]")) == 4)
    visit.until(lambda: run("return shown.querySelectorAll('.coloured').length"))
    assert {name.rpartition("/")[2] for name in fetched()} == {
        "drawing.js",
        "temml.min.js",
        "highlight.min.js",
    }
    assert run(
        "return [...shown.querySelectorAll('.tex.wide math')].map((each) => each.getAttribute('display'))"
    ) == [
        "block",
        "block",
    ]
    assert "while $5 and $6 are prices" in run("return shown.innerText")
    assert run("return [...shown.querySelectorAll('code.tex')].map((each) => each.textContent)") == [
        r"\href{javascript:f()}{here}",
        r"\broken{",
    ]
    assert run("return [...shown.querySelectorAll('a')].length") == 0
    assert run("return shown.querySelector('.hljs-keyword').textContent") == "def"
    assert run("return [...shown.querySelectorAll('pre')].map((each) => each.textContent)") == [
        'def f():  # a comment\n    return "text"',
        "plain",
    ]
    run("shown.remove()")


HOSTILE = [
    "<script>f()</script>",
    "<img src=x onerror=f()>",
    "[a](javascript:f())",
    "[a](JaVaScRiPt&colon;f())",
    "<b onclick=f()>",
    "![i](https://example.org/i.png)",
    "<iframe srcdoc='<script>f()</script>'>",
    "<svg/onload=f()>",
    "<style>*{}</style>",
    "[a](data:text/html,x)",
    "[r]\n\n[r]: vbscript:f()\n\n",
    "<javascript:f()>",
    '[a](https://e.org "\\" onclick=f()")',
    "```html\n<script>f()\n```\n",
    '```" onclick=f()\n',
    "\n|a|\n|-|\n|<img src=x onerror=f()>|\n",
    "- <math><mtext><style>",
    "<a href='javascript:f()'>",
    "<form action=//e.org><button>",
    "<base href=//e.org>",
    "&lt;script&gt;",
    "<!--",
    "-->",
    "]]>",
    "<template>",
    "<noscript><p title='</noscript><img src=x onerror=f()>'>",
    "\n# ",
    "\n> ",
    "**",
    "`",
    "\n\n",
    "\x00",
    r"\(\href{javascript:f()}{x}\)",
    r"\[\text{<img src=x onerror=f()>}\]",
]
ALLOWED = {
    "P",
    "H3",
    "H4",
    "H5",
    "H6",
    "UL",
    "OL",
    "LI",
    "BLOCKQUOTE",
    "PRE",
    "CODE",
    "STRONG",
    "EM",
    "DEL",
    "A",
    "BR",
    "HR",
    "TABLE",
    "THEAD",
    "TBODY",
    "TR",
    "TH",
    "TD",
    "DIV",
    "FIGURE",
    "FIGCAPTION",
    "BUTTON",
}


def test_no_markup_of_a_models_own_reaches_the_page(visit):
    """Neither elements nor attributes nor addresses of it, alone and put together at random; and
    its text is all there.
    """
    rng = random.Random(0)
    texts = HOSTILE + ["".join(rng.choices(HOSTILE, k=rng.randint(2, 6))) for _ in range(500)]
    elements = visit.chrome.execute_script(
        "return arguments[0].flatMap((text) => { const body = document.createElement('div'); "
        "show({text, blocks: [], body});"
        " return [...body.querySelectorAll('*')].map((each) =>"
        "  [each.tagName, Object.fromEntries([...each.attributes].map(({name, value}) => [name, "
        "value]))]); })",
        texts,
    )
    assert {tag for tag, _ in elements} - ALLOWED == set()
    names = {name for _, attributes in elements for name in attributes}
    assert names <= {"href", "title", "start", "align", "class", "dir", "target", "rel", "tabindex", "type"}
    assert {attributes["href"].split(":")[0] for _, attributes in elements if "href" in attributes} <= {
        "https"
    }
    for text in (*HOSTILE[:2], "> " * 5000):  # the last one is nested deeper than the parser goes
        assert visit.chrome.execute_script(f"{SHOW} return body.textContent", text) == text
    with pytest.raises(
        JavascriptException, match="TrustedHTML"
    ):  # even the page itself can write no HTML past the sanitizer
        visit.chrome.execute_script("document.body.innerHTML = '<b>'")


def test_each_block_has_the_direction_of_its_script(visit):
    visit.ask("שלום")
    visit.chrome.execute_script(
        "const turn = turns.at(-1); turn.text = arguments[0]; show(turn)", "Hello\n\n- سلام\n\n```\nx\n```"
    )
    directions = visit.chrome.execute_script(
        "return [...document.querySelectorAll('.text > *, .user .text, #ask')].map((each) => "
        "getComputedStyle(each).direction)"
    )
    assert directions == ["rtl", "ltr", "rtl", "ltr", "ltr"]


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_it_fits_its_screen(visit, width):
    size = {"width": width, "height": 760, "deviceScaleFactor": 1, "mobile": width < 500}
    visit.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    visit.ask("A" * 100)
    visit.chrome.execute_script(
        REPLACE, f"```\n{'wide ' * 100}\n```\n\n- {'B' * 200}\n\n|{'a|' * 40}\n|{'-|' * 40}" + "\n\nx" * 40
    )
    visit.chrome.execute_script("addTurn('user', 'x')")  # far down
    widths = visit.chrome.execute_script(
        "return ['html', '#scroll', 'header'].map((css) => document.querySelector(css)).map((each) "
        "=> each.scrollWidth)"
    )
    code = visit.chrome.execute_script(
        "const {x, width} = document.querySelector('pre').getBoundingClientRect(); return x + width"
    )
    assert max(*widths, code) <= width
    assert visit.chrome.execute_script("return document.documentElement.scrollHeight - innerHeight") <= 0
    visit.chrome.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
