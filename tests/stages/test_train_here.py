"""*Train it here* in a real browser: it learns what engine/by_hand learns, and answers with the weights that it has."""

import hashlib
import json
import re

import numpy as np
import pytest
from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait

from engine import by_hand
from engine.by_hand import adamw
from engine.by_hand.model import generate, leaves, tree_map
from engine.model.config import ModelConfig
from stages.runs.watch.page import FOLDER, write_train_page


@pytest.fixture
def page(browser, tmp_path):
    browser.get(write_train_page(tmp_path / "train.html").as_uri())
    return Page(browser)


class Page:
    """What a person does on the page."""

    def __init__(self, chrome):
        self.chrome = chrome

    def get(self, expression):
        return self.chrome.execute_script(f"return {expression}")

    def text(self, name):
        return self.get(f"$('{name}').innerText")

    def press(self, name):
        self.chrome.find_element("id", name).send_keys(Keys.ENTER)

    def until(self, condition):
        WebDriverWait(self.chrome, 300, 0.05).until(lambda _: self.get(condition))

    def train(self, steps):
        """Returns the losses of at least so many steps."""
        self.press("train")
        self.until(f"run?.losses.length >= {steps} || $('progress').className")
        self.press("train")
        self.until("!$('ask').disabled")
        return self.get("run.losses")

    def ask(self, prompt):
        """Returns the answer, and how many weights changed."""
        field = self.chrome.find_element("id", "prompt")
        field.clear()
        field.send_keys(prompt, Keys.ENTER)
        self.until("!$('ask').disabled")
        return self.get("$('answer').textContent"), self.text("kept")


def weights_of(page, expression):
    """The browser's weights as engine/by_hand has them. As one string they come in a moment, as
    lists in half a minute.
    """
    weights = json.loads(page.get(f"JSON.stringify(jax.tree.map(w => w.ref.js(), {expression}))"))
    blocks = {str(i): block for i, block in enumerate(weights["blocks"])}
    return tree_map(lambda leaf: np.array(leaf, np.float32), weights | {"blocks": blocks})


def config(page):
    fields = page.get("MODEL")
    return ModelConfig(**fields, dtype="float32")


@pytest.mark.whole
@pytest.mark.parametrize("steps", [6, pytest.param(60, marks=pytest.mark.night)])
def test_it_learns_as_by_hand_and_answers_with_the_weights_that_it_has(page, steps):
    """The first losses are those of engine/by_hand; an answer changes no weight. In 60 steps it
    knows its text by heart.
    """
    assert page.ask("ab")[1] == "0"  # random weights answer too
    page.get("$('text').value = 'To be, or not to be, that is the question. '.repeat(4)")
    losses, beside = page.train(steps), min(steps, 20)
    cfg, options = config(page), page.get("ADAMW")
    warmup = options.pop("warmup")
    params = weights_of(page, "initialWeights()")
    zeros = tree_map(np.zeros_like, params)
    moments, expected = adamw.Moments(np.array(0), zeros, zeros), []
    text = page.get("$('text').value").encode()
    for step in range(beside):
        batch = page.get(f"batchOf(new TextEncoder().encode($('text').value), {step})")
        tokens, targets = map(np.array, batch)
        assert all(bytes(row) in text for row in np.hstack([tokens, targets[:, -1:]]).astype(np.uint8))
        loss, gradient = by_hand.loss_and_gradient(cfg, params, tokens, targets, np.ones(tokens.shape, bool))
        expected.append(loss)
        factor = min(1, (step + 1) / warmup)
        params, moments = adamw.step(adamw.AdamWConfig(**options), params, gradient, moments, factor)
    np.testing.assert_allclose(losses[:beside], expected, rtol=1e-4)
    assert losses[-1] < losses[0]
    assert 0 < int(page.text("changed").replace(",", "")) <= 202_176
    weights = weights_of(page, "run.weights")
    assert sum(leaf.size for leaf in leaves(weights)) == 202_176
    answer, changed = page.ask("To be,")
    assert changed == "0"
    if steps == 60:
        assert losses[-1] < 0.5 < 5 < losses[0]
        assert answer.startswith(" or not to be, that is the question.")
        assert answer.encode()[:58] == bytes(generate(cfg, weights, list(b"To be,"), max_tokens=58))
    assert page.ask("To be,") == (answer, changed)
    # The counter counts: an answer that moves one weight is found out.
    page.get("(run.answer = run.logits, run.move = jax.numpy.array([2, ...Array(63).fill(1)]), 0)")
    page.get(
        "(run.logits = (...given) => (run.weights.norm = run.weights.norm.mul(run.move), "
        "run.logits = run.answer)(...given), 0)"
    )
    assert page.ask("To be,")[1] == "1"


def test_what_cannot_be_is_a_sentence(page):
    page.get("$('text').value = 'é'")
    page.press("train")
    page.until("!$('ask').disabled")
    assert page.text("progress") == "The text has 2 bytes; at least 65 are needed."
    page.get("(WebAssembly = undefined, 0)")
    page.ask("ab")
    assert "needs WebGPU or WebAssembly with SIMD" in page.text("progress")
    assert not page.get("$('train').disabled")


def test_the_library_is_as_bundled_and_the_page_reaches_no_network(browser, tmp_path):
    folder = FOLDER / "train_here"
    digest, version = re.search(
        r"SHA-256 `(\w{64})`.*@jax-js/jax@([\d.]+)", (folder / "vendor/README.md").read_text(), re.DOTALL
    ).groups()
    library = (folder / "vendor/jax.js").read_text()
    assert hashlib.sha256(library.encode()).hexdigest() == digest
    assert f"@jax-js/jax {version}, MIT" in library[:100]
    assert not re.search("</script|<!--", library)
    html = write_train_page(tmp_path / "train.html").read_text()
    assert (folder / "vendor/LICENSE-jax").read_text() in html
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|<script src|<link rel=.stylesheet", html)
    assert "default-src 'none'" in html
    browser.get((tmp_path / "train.html").as_uri())
    assert browser.execute_script("return typeof jax") == "undefined"  # until a button is pressed
