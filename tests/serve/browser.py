"""What a person does in a browser on the chat page."""

import json
from collections.abc import Callable
from typing import Any

from selenium.webdriver import Chrome, Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.line import Line


class Visit:
    """One visit to the page: what a person does on it, by the names that they see."""

    def __init__(self, chrome: Chrome, line: Line) -> None:
        self.chrome, self.line = chrome, line
        line.mend()
        chrome.get(line.address)
        self.ready()
        chrome.execute_script("settings.seed.value = 1; settings.max_tokens.value = 12")

    def ready(self) -> None:
        self.until(lambda: self.text("#weights") not in ("", "not checked yet"))

    def leave(self) -> None:
        """Leaves nothing behind in the browser."""
        self.chrome.execute_script("running = null; sessionStorage.clear(); localStorage.clear()")

    def reload(self) -> None:
        self.chrome.refresh()
        self.ready()

    @property
    def focus(self) -> str:
        """What has the focus and can be seen: its id, else its text; empty when nothing has."""
        return self.chrome.execute_script(
            "const it = document.activeElement; return it === document.body || "
            "!it.checkVisibility({visibilityProperty: true})"
            " ? '' : it.id || it.textContent"
        )

    def until(self, true: Callable[[], Any], seconds: float = 300) -> Any:
        return WebDriverWait(self.chrome, seconds, 0.02).until(lambda _: true())

    def text(self, css: str) -> str:
        """Of the last element of that kind, as it can be seen, which no NUL can; empty when there
        is none.
        """
        text = self.chrome.execute_script(
            "return [...document.querySelectorAll(arguments[0])].at(-1)?.innerText ?? ''", css
        )
        return text.replace("\0", "")

    def texts(self, css: str) -> list[str]:
        return [each.text for each in self.chrome.find_elements("css selector", css)]

    def type(self, *keys: str) -> None:
        self.chrome.find_element("id", "ask").send_keys(*keys)

    def paste(self, text: str) -> None:
        self.chrome.execute_script("document.getElementById('ask').value = arguments[0]", text)

    def set(self, name: str, value: str) -> None:
        field = self.chrome.find_element("name", name)
        field.clear()
        field.send_keys(value)

    def click(self, css: str) -> None:
        self.chrome.find_elements("css selector", css)[-1].click()

    @property
    def answering(self) -> bool:
        return self.chrome.find_element("id", "stop").is_displayed()

    def finished(self) -> None:
        self.until(lambda: not self.answering and self.texts(".figures"))

    def ask(self, text: str) -> None:
        """Asks, and waits until the answer has ended and its figures stand below it."""
        before = len(self.texts(".figures"))
        self.type(text, Keys.ENTER)
        self.until(lambda: len(self.texts(".figures")) > before)

    def partly(self, text: str) -> str:
        """Asks, and returns what can be read of the answer when its first two pieces have come.
        Then the line is held.
        """
        self.line.hold()
        self.type(text, Keys.ENTER)
        self.line.let_through(events=4)  # the first names the role, and of the last not all comes
        return self.until(lambda: self.text("article.assistant .text").strip())

    def requests(self) -> list[dict[str, Any]]:
        """The bodies of the requests for answers since `listen`."""
        return [json.loads(body) for body in self.chrome.execute_script("return window.asked")]

    def listen(self) -> None:
        self.chrome.execute_script(
            "window.asked = []; const real = window.fetch; window.fetch = (url, how) => {"
            " if (`${url}`.endsWith('/chat/completions')) window.asked.push(how.body); return "
            "real(url, how); }"
        )
