"""Long texts at the start of the real command: they wait for their programs, say so, and hold up no short text."""

import re
import signal
import socket
import threading
from typing import Any

import httpx
import openai
import pytest
from browser import Visit
from chat_models import save_chat_model
from line import Line
from selenium.webdriver import Keys
from started import Started
from tiny_server import until

WAITING = ": waiting for the programs for long texts"


class Streamed:
    """A completion that streams in a thread: its `comments` and its `text` so far."""

    def __init__(self, url: str, prompt: int, max_tokens: int) -> None:
        self.comments: list[str] = []
        self.text = ""
        self._url = f"{url}/v1/completions"
        ids = [n % 200 for n in range(prompt)]
        self._body = {"prompt": ids, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=300) as reply:
            for line in reply.iter_lines():
                if line.startswith(":"):
                    self.comments.append(line)
                elif line.startswith("data: {"):
                    self.text += re.findall(r'"text":"((?:\\.|[^"])*)"', line)[0]

    @property
    def waits(self) -> bool:
        return self.comments[-1:] == [WAITING]

    def ended(self) -> str:
        self.thread.join()
        return self.text


@pytest.mark.night  # the default run holds the law in process: test_engine_thread.py
@pytest.mark.journeys
def test_a_long_text_at_the_start_says_what_it_waits_for_and_a_short_one_is_answered_first(browser, tmp_path):
    """One slot: a long text waits for it, and one that grew long gives it up and goes on where it was."""
    save_chat_model(tmp_path / "sea", context=4096, layers=2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags, env = ("--slots", 1, "--port", port), {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    begun = Started(tmp_path / "sea", *flags, env=env, program=("-m", "stages.serve"), begun="template")
    with begun as server, Line(port) as line:
        assert until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 60)
        browser.get(line.address)
        visit = Visit.__new__(Visit)
        visit.chrome, visit.line = browser, line
        visit.until(lambda: visit.text("#alert") == "The server is not ready. Its state: warming. Trying again…", 60)
        server.read_to("Ctrl-C")

        grows, long = Streamed(server.url, 505, 40), Streamed(server.url, 600, 8)
        browser.execute_script("connect()")
        visit.until(lambda: browser.find_element("id", "send").is_enabled())
        visit.paste("A long text. " * 60)
        visit.type(Keys.ENTER)
        assert until(lambda: grows.waits and long.waits, 60), (grows.comments, long.comments)
        cut = grows.text
        assert cut
        assert not long.text
        visit.until(lambda: visit.text(".wait").startswith("Waiting for the programs for long texts"))

        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hi"}], max_tokens=3)
            health = httpx.get(f"{server.url}/health").json()
            assert (health["long_texts_ready"], health["running"], health["waiting"]) == (False, 0, 3)
            stream: Any = client.completions.create(model="default", prompt=[7] * 600, max_tokens=24, stream=True)
            assert len([chunk.choices[0].text for chunk in stream]) > 1  # the client passes over comments
        visit.until(lambda: not visit.answering and visit.texts(".figures"), 120)
        assert visit.texts(".wait") == visit.texts(".error") == []
        assert grows.ended().startswith(cut)
        assert [grows.text, long.ended()] == [Streamed(server.url, *each).ended() for each in ((505, 40), (600, 8))]
        server.read_to("programs for texts of more than 512 tokens are there")
        assert "A text of more than 512 tokens waits: its programs are still being compiled." in server.output

        browser.execute_script(
            "newConversation(); settings.max_tokens.value = 3; for (let n = 1; n < 40; n++)"
            " { addTurn('user', `${n}`); addTurn('assistant', 'Well.', {finish: 'stop'}) }"
        )
        visit.listen()
        visit.ask("40")
        assert visit.texts(".error") == visit.texts("article.aside") == []
        assert len(visit.requests()[0]["messages"]) == 79
        visit.leave()
        server.process.send_signal(signal.SIGTERM)
        server.read_to("Stopped.")
        assert "Weights unchanged" in server.output
        assert "0 programs compiled since all were there" in server.output
