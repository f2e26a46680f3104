"""What a person asks of the page after "hello": documents, JSON, a tool, an adapter, many turns, a full context (S15)."""

import json
import re

import pytest

from engine.text.documents import Documents
from tests.serve.browser import Visit
from tests.serve.line import Line
from tests.serve.started import Started
from tests.serve.test_adapters import save
from tests.serve.tiny_server import TinyServer, good
from tests.text.chat_models import save_chat_model

pytestmark = pytest.mark.whole

TIDE = "The tide turns at noon in Port Isla."
CLOCK = {
    "name": "clock",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["Isla"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}
# A tiny model calls no tool by itself.
REQUIRE = (
    "const real = window.fetch; const required = (body) => JSON.stringify({...JSON.parse(body), "
    "tool_choice: 'required'});"
    "window.fetch = (url, how) => real(url, `${url}`.endsWith('/chat/completions') ? {...how, "
    "body: required(how.body)} : how)"
)


@pytest.fixture(
    scope="module",
    params=["in process", pytest.param("the command", marks=[pytest.mark.journeys, pytest.mark.night])],
)
def served(request, tmp_path_factory):
    """The port of a server with documents and room, and how many turns are to be had with it."""
    documents = tmp_path_factory.mktemp("documents")
    (documents / "tide.md").write_text(TIDE)
    if request.param == "in process":
        with TinyServer(context=1536, documents=Documents(documents)) as server:
            yield server.port, 3
        return
    model = tmp_path_factory.mktemp("model")
    save_chat_model(model, context=1536)
    flags = "--documents", documents, "--adapter", f"sea={save(model.parent / 'sea', 1)}"
    with Started(model, *flags, program=("-m", "stages.serve")) as server:
        yield int(server.url.rpartition(":")[2]), 40


@pytest.fixture
def adapters(tmp_path):
    save(tmp_path / "sea", 1)
    with TinyServer(keys=("one",), adapter_folder=tmp_path) as server:
        yield server


@pytest.fixture
def roomy_visit(browser, served):
    with Line(served[0]) as line:
        visit = Visit(browser, line)
        yield visit
        visit.leave()


def choose_model(visit, name):
    visit.listen()
    if (field := visit.chrome.find_element("name", "model")).is_displayed():
        field.send_keys(name)
    visit.ask("Hello.")
    assert visit.requests()[-1]["model"] == name


def test_an_adapter_is_chosen_by_its_name(adapters, browser):
    with adapters.client(headers={"Authorization": "Bearer one"}) as client:
        good(client.post("/v1/adapters", json={"name": "wave", "folder": "sea"}))
    with Line(adapters.port) as line:
        browser.get(line.address)
        browser.execute_script("sessionStorage.setItem('thrice key', 'one')")
        visit = Visit(browser, line)
        assert visit.texts("option") == ["tiny", "wave"]
        choose_model(visit, "wave")
        choose_model(visit, "tiny")
        # of another model than that which is asked now
        assert visit.texts(".who:not(.unseen)") == ["wave"]
        assert visit.texts(".error") == []
        visit.leave()


def test_a_document_a_json_answer_and_a_tool(roomy_visit):
    roomy_visit.chrome.get_log("browser")
    visit, answer = roomy_visit, lambda: visit.text("article.assistant:last-of-type .text")
    code = lambda: json.loads(visit.text("article.assistant:last-of-type pre"))
    fill = lambda name, value: visit.chrome.execute_script(
        "settings[arguments[0]].value = arguments[1]", name, value
    )
    visit.ask("When does the tide turn?")
    assert re.match(r"1 passage of documents: \d+ tokens, about [\d.]+ s", visit.text("summary"))
    visit.click("summary")
    assert TIDE in visit.text("details")

    fill("max_tokens", 80)
    fill("schema", '{"const": {"place": [1, 2]}}')
    visit.ask("As JSON, please.")
    assert code() == {"place": [1, 2]}
    assert visit.text(".figures").startswith("valid JSON · ")
    fill("schema", "{")
    visit.type("Hello.\n")
    assert visit.chrome.switch_to.active_element.get_attribute("name") == "schema"
    visit.chrome.find_element("id", "ask").clear()
    fill("schema", "")

    fill("tools", json.dumps([CLOCK]))
    visit.chrome.execute_script(REQUIRE)
    visit.ask("What time is it?")
    assert answer().startswith("Calls clock:")
    assert code() == {"zone": "Isla"}
    assert visit.chrome.find_element("id", "ask").get_attribute("placeholder") == "What clock returned"
    visit.reload()  # which keeps the call
    assert code() == {"zone": "Isla"}
    visit.listen()
    fill("max_tokens", 8)
    visit.ask("12:00")
    assert visit.text("article.tool").split() == ["clock", "returned", "12:00"]
    call, result = visit.requests()[-1]["messages"][-2:]
    assert result == {"role": "tool", "content": "12:00", "tool_call_id": call["tool_calls"][0]["id"]}
    assert call["tool_calls"][0]["function"] == {"name": "clock", "arguments": '{"zone": "Isla"}'}
    row = visit.chrome.execute_script(
        "return library('export.js').then(() => asRow([...turns, {role: 'user', text: 'unanswered'}]))"
    )
    assert [message["role"] for message in row] == ["user", "assistant"] * 2, (
        "no call, and no question without an answer"
    )
    assert visit.texts(".error") == []
    assert [line for line in visit.chrome.get_log("browser") if line["level"] == "SEVERE"] == []


def test_many_turns_and_a_full_context(roomy_visit, served):
    visit, turns = roomy_visit, served[1]
    visit.chrome.execute_script("settings.max_tokens.value = 8")
    choose_model(visit, visit.chrome.execute_script("return settings.model.lastChild.value"))
    for _ in range(turns):
        visit.ask("Hello there, how are you? I am well.")
    assert len(visit.texts("article.user")) == turns + 1
    long = "Hello there, how are you? I am well. " * 40  # about 500 tokens
    while not visit.texts("article.aside"):
        visit.chrome.execute_script("setDraft(arguments[0])", long)
        visit.ask("")
    assert "the context was full" in visit.text(".figures")
    assert visit.texts(".error") == []
