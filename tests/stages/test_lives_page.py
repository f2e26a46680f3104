"""The page of a model's three lives, in a real browser: every counter is the recording's, and all of it goes by keyboard."""

import json
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from selenium.webdriver import Keys
from selenium.webdriver.support.ui import WebDriverWait

from engine.model.config import ModelConfig
from engine.model.paths import unflatten
from stages.runs.watch import __main__ as watch
from stages.runs.watch.page import LAW, page_html
from stages.runs.watch.recorder import Recorder
from stages.runs.watch.server import Watch

pytestmark = pytest.mark.whole

LAYERS, WIDTH, VOCAB, FRAMES = 2, 6, 20, 4
KINDS = ("parameters", "optimizer state", "KV cache", "gradients", "residuals", "temporaries")
MODEL = [("embed", (VOCAB, WIDTH), None)]
for block in range(LAYERS):
    shapes = {"attn_norm": (WIDTH,), "q": (WIDTH, WIDTH), "down": (16, WIDTH)}
    MODEL += [(f"blocks/{block}/{name}", shape, block) for name, shape in shapes.items()]
MODEL += [("norm", (WIDTH,), None), ("head", (WIDTH, VOCAB), None)]


def life(way: str, model=MODEL, recorded: Sequence[int] = (13, 26, 39)) -> dict:
    """A life as the recorder writes it, of weights of which more are drawn anew at each frame."""
    rng, events = np.random.default_rng(len(way)), []
    draw = lambda shapes: unflatten(
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    )
    trained, still = {}, {}
    for path, shape, layer in model:
        trains = way in ("train", "all") or (way == "frozen" and (bool(layer) or path in ("norm", "head")))
        (trained if trains else still)[path] = shape
        if way == "lora" and path.endswith("/q"):
            trained |= {f"{path}/a": (WIDTH, 2), f"{path}/b": (2, WIDTH)}
    recorder, trainable, step = Recorder([events.append], print), draw(trained), 0
    recorder.sample = lambda _: f"<i>{way}</i> {step}"
    recorder.digest_of = lambda _: f"{step}{way}".encode().hex() * 8
    recorder.gradient_norms = lambda weights, _: jax.tree.map(lambda _: np.float32(step / 130), weights)
    cfg = ModelConfig(VOCAB, WIDTH, sum(path.endswith("/q") for path, *_ in model), 1, 16, 8)
    plan = SimpleNamespace(cfg=cfg, name="tiny", steps=40, seconds=None)
    run = SimpleNamespace(plan=plan, frozen=draw(still), prompt=lambda: ("The sea ", []))
    recorder.begin(
        run, trainable, 0, stage="train" if way == "train" else "finetune", command=f"python -m stages.{way}"
    )
    recorder.frame(trainable, 0, 0.0)
    for step in recorded:
        recorder.before_step(trainable, step, step / 40)
        moved = lambda new, old, share=step / 50: np.where(rng.random(new.shape) < share, new, old)
        trainable = jax.tree.map(moved, draw(trained), trainable)
        recorder.frame(
            trainable, step, step / 9, None if step == recorded[-1] else "a batch"
        )  # a run by the clock may not know its last
    begin, *frames = events
    return {
        "begin": begin,
        "frames": frames,
        "end": {"event": "end", "step": 40, "digest": frames[-1]["digest"], "result": {}},
        "steps": [
            {"event": "step", "step": step, "seconds": step, "loss": 9 - step / 10}
            for step in range(1, 40, 4)
        ],
        "validation": [{"event": "validation", "step": 20, "seconds": 1, "quick_val_bits_per_byte": 3.25}],
        "memory": memory(2, 4),
        "command": begin["command"],
    }


def memory(backward: int | None, update: int | None) -> dict:
    return {
        "bytes": {kind: [1000, 3000, 5000, 4000, 2000] for kind in KINDS},
        "backward": backward,
        "update": update,
    }


@pytest.fixture(scope="module")
def document():
    lives = {way: life(way) for way in ("train", "frozen", "lora", "all")}
    sha = lives["all"]["end"]["digest"]
    request = {"prompt": "Who am I?", "text": "</script><b>I do not know.</b>"}
    cost = {
        "passes": "forward",
        "flops_per_token": 2e6,
        "counted_ratio": 3.0,
        "seconds_per_token": 0.036,
        "time_ratio": 2.5,
        "bytes": 7000,
    }
    return {
        "preset": "tiny",
        "params": 500,
        "layers": LAYERS,
        "flags": {"price": 0.5, "watts": None},
        "lives": lives,
        "predicted": [3, 2, 1],
        "answer": {
            "asked": 100,
            "before": sha,
            "after": sha,
            "changed": 0,
            "of": 500,
            "seconds": 2.0,
            "tokens": 900,
            "token_seconds": {"alone": 0.002, "together": 0.0005},
            "answers": [{"prompt": f"Question {index}", "text": f"Answer {index}"} for index in range(3)],
            "independent": [
                request,
                request | {"prompt": "Me?"},
                {"prompt": "I am Ida.", "text": "Ida.", "edited": True},
            ],
            "same_alone": True,
            "memory": memory(None, None),
            "cache_bytes": [10, 20, 30],
        },
        "cost": [{"stage": stage, **cost} for stage in ("train", "frozen", "lora", "all", "answer")],
        "machine": "a test",
    }


@pytest.fixture(scope="module")
def open_page(browser, tmp_path_factory):
    """Opens the page of a document, and returns what finds the text of an element as it can be
    seen.
    """

    def open_page(document):
        path = tmp_path_factory.mktemp("page") / "lives.html"
        path.write_text(page_html(document), encoding="utf-8")
        browser.get(path.as_uri())
        return lambda css: " ".join(each.text for each in browser.find_elements("css selector", css))

    yield open_page
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    assert (
        browser.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
        == []
    )


def press(browser, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def texts(browser, css: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
    return browser.execute_script(script, css)


def count(number: int) -> str:
    return f"{number:,}"


def test_every_counter_is_the_recordings_in_all_lives_by_keyboard(browser, open_page, document):
    see = open_page(document)
    # 2 chooses fine-tuning, and the next way of it when pressed again.
    for key, way in (("1", "train"), ("2", "frozen"), ("2", "lora"), ("2", "all")):
        press(browser, key, *[Keys.ARROW_LEFT] * FRAMES)
        recorded = document["lives"][way]
        begin = recorded["begin"]
        frozen, norms = begin["params"] - begin["trainable"], {}
        for frame in recorded["frames"]:
            assert see("#changed") == count(frame["changed"])
            assert see("#changed-of").startswith(f"of {count(begin['trainable'])} ")
            assert frame["digest"][:16] in see("#changed-more")
            assert (f"0 of {count(frozen)} frozen weights changed" in see("#changed-more")) == bool(frozen)
            assert f"step {frame['step']} of 40" in see("#when")
            assert see(".sample").replace("\n", "") == begin["prompt"] + frame["sample"]
            norms = frame.get("gradient_norms", norms)  # as last measured
            columns = [[path for path, _, layer in MODEL if layer == block] for block in range(LAYERS)]
            shown = texts(browser, "#columns b")
            for number, paths in zip(shown[1:-1], columns, strict=True):
                squares = [norm**2 for path, norm in norms.items() if path.startswith(tuple(paths))]
                assert number == (f"{math.sqrt(sum(squares)):.2g}" if squares else "")
            press(browser, Keys.ARROW_RIGHT)
    press(browser, "3")
    answer = document["answer"]
    for index, each in enumerate(answer["answers"]):
        press(browser, *[Keys.ARROW_LEFT] * FRAMES, *[Keys.ARROW_RIGHT] * index)
        assert (see("#changed"), see("#changed-of")) == ("0", "of 500 weights changed in 100 answers")
        assert (see("#before"), see("#after")) == (answer["before"], answer["after"])
        assert see(".sample") == f"{each['prompt']}\n{each['text']}"
    assert "nothing comes back" in see("#backward")


def pixels(browser, canvas: str) -> int:
    """Counts the colours of a picture of the model; an empty one has 2: the ground of tensors, and
    none between them.
    """
    return browser.execute_script(
        "const it = document.getElementById(arguments[0]);"
        "return new Set(new Uint32Array(it.getContext('2d').getImageData(0, 0, it.width, "
        "it.height).data.buffer)).size",
        canvas,
    )


def test_change_is_where_weights_trained_and_nowhere_in_answering(browser, open_page, document):
    open_page(document)
    colours = {}
    for key, way in (("1", "train"), ("2", "frozen"), ("2", "lora"), ("2", "all"), ("3", "answer")):
        press(browser, key)
        colours[way] = pixels(browser, "model-change")
        assert pixels(browser, "model-weights") > 50
    assert colours["answer"] == 2
    assert 2 < colours["lora"] < colours["frozen"] <= colours["train"]


def test_space_plays_to_the_end_and_pauses(browser, open_page, document):
    see = open_page(document)
    browser.execute_script(
        "window.draws = requestAnimationFrame; window.requestAnimationFrame = () => 0"
    )  # time stands still
    press(browser, "1", Keys.ARROW_LEFT, " ")
    assert see("#play") == "Pause"
    press(browser, " ")
    assert see("#play") == "Play"
    browser.execute_script("window.requestAnimationFrame = window.draws")
    press(browser, " ")
    WebDriverWait(browser, 300, 0.05).until(lambda _: see("#play") == "Play")
    assert f"step {document['lives']['train']['frames'][-1]['step']} of" in see("#when")


def test_every_law_that_the_page_names_is_there():
    laws = {*LAW.findall(page_html({}))}
    assert len(laws) > 5
    shown = json.loads(re.search(r'id="recording">(.*?)</script>', page_html({}))[1])["laws"]
    assert shown.keys() == laws
    assert all(code.startswith(f"def {name.partition('::')[2]}(") for name, code in shown.items())


def test_a_law_opens_below_its_picture(browser, open_page, document):
    see = open_page(document)
    for summary in browser.find_elements("css selector", "#cost .law summary"):
        summary.send_keys(Keys.ENTER)
    assert "3 * work.by_pass.forward == work.total" in see("#cost .law pre")


def test_without_motion_frames_follow_each_other_and_nothing_moves(browser, open_page, document):
    see = open_page(document)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    try:
        press(browser, "1", *[Keys.ARROW_LEFT] * FRAMES)
        moving, first = "return document.querySelectorAll('.moving').length", see("#when")
        press(browser, " ")
        WebDriverWait(browser, 300, 0.05).until(
            lambda _: browser.execute_script(moving) or see("#when") != first
        )
        assert browser.execute_script(moving) == 0
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_prices_and_requests_answer_to_the_reader(browser, open_page, document):
    see = open_page(document)
    watts = browser.find_element("id", "watts")
    watts.send_keys("100")
    row = see("#cost tbody tr:first-child")
    assert row.split()[-2:] == [
        "5",
        "1,000",
    ]  # 0.036 s a token, a million of them, at 0.5 dollars an hour and 100 W
    card = "#requests .card:first-child p"
    assert see(card) == "Who am I?\n</script><b>I do not know.</b>"
    assert "Asked alone, the first got the same answer." in see("#requests")
    assert "a token took 2 ms alone, 500 µs with several requests at once" in see("#questions")
    for name, text in (("Edit its context", "Ida."), ("Close it", "gone"), ("Close it", "do not know")):
        browser.find_element("xpath", f"//button[text()='{name}']").send_keys(" ")
        assert text in see(card)


def test_pictures_are_tables_too_and_fit_a_narrow_screen(browser, open_page, document):
    see = open_page(document)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        for key in "123":
            press(browser, key)
            for summary in browser.find_elements("css selector", "details:not([open]) summary"):
                if summary.is_displayed():
                    summary.send_keys(Keys.ENTER)
            assert browser.execute_script("return document.documentElement.scrollWidth") == 360
            assert "blocks/1/q" in see("#weights table")
            assert "forward" in see("#cost table")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_focus_stays_in_a_table_which_arrow_keys_scroll(browser, open_page, document):
    see = open_page(document)
    browser.set_window_size(500, 700)
    try:
        browser.find_element("css selector", "#weights > details summary").send_keys(
            Keys.ENTER, Keys.ARROW_LEFT
        )
        assert f"step {13 * (FRAMES - 2)} of" in see("#when")
        focused = "document.activeElement === document.querySelector('#weights > details {}')"
        assert browser.execute_script(f"return {focused.format('summary')}")
        press(browser, Keys.TAB, Keys.ARROW_LEFT)
        assert f"step {13 * (FRAMES - 2)} of" in see("#when")
        browser.execute_script("show(1)")
        assert browser.execute_script(f"return {focused.format('.scroll')}")
    finally:
        browser.set_window_size(1200, 800)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda _: {}, "holds no recording"),
        (lambda _: {"rows": [1]}, "of another format"),
        (lambda _: {"lives": {}}, "empty"),
        (lambda whole: {"lives": {"train": whole["lives"]["train"] | {"frames": []}}}, "empty"),
        (
            lambda whole: {"lives": {"train": whole["lives"]["train"] | {"begin": {"event": "begin"}}}},
            "of another format",
        ),
        (lambda whole: {"lives": {"lora": whole["lives"]["lora"]}}, "LoRA moves thin strips"),
        (lambda whole: {"lives": {"train": whole["lives"]["train"]}}, "Training moves every weight"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(browser, open_page, document, change, sentence):
    see = open_page(change(document))
    assert sentence in see("body")
    if see("#bar"):
        press(browser, "3")
        assert "Nothing was asked in this recording." in see("#changed-of")
        press(browser, "2", "2")
        assert "The cost of a token was not measured in this recording." in see("#cost")
        assert re.search(
            r"no frame of this life: (Half frozen|LoRA|All weights)|numbers in the strips", see("#changed-of")
        )


def test_events_one_by_one_make_the_same_page(browser, open_page, document):
    open_page({"lives": {"train": document["lives"]["train"]}})
    see = lambda: [
        texts(browser, part)
        for part in ("#changed", "#changed-of", "#when", ".sample", "#columns", "#curves")
    ]
    whole = see()
    recorded = document["lives"]["train"]
    with Watch(0) as served:
        browser.get(served.url)
        seen = lambda: browser.find_element("tag name", "body").text
        WebDriverWait(browser, 300, 0.05).until(lambda _: "It is seen here when it begins." in seen())
        shown = browser.find_elements("css selector", "#bar, main")
        assert [part.is_displayed() for part in shown] == [False, False]
        served(recorded["begin"])
        WebDriverWait(browser, 300, 0.05).until(
            lambda _: [part.is_displayed() for part in shown] == [True, True]
        )
        assert texts(browser, "#changed-of") == ["The first frame is on its way."]
        assert "How all figures were recorded" not in seen()
        for event in (*recorded["steps"], *recorded["validation"], *recorded["frames"], recorded["end"]):
            served(event)
        WebDriverWait(browser, 300, 0.05).until(lambda _: see() == whole)
        assert "Nothing was asked" not in browser.find_element("tag name", "body").text


def test_a_page_that_is_opened_after_the_last_step_waits_for_no_frame(browser, document):
    """Nobody watched, and so no frame was made; the last measurement goes on."""
    recorded, body = document["lives"]["train"], lambda: browser.find_element("tag name", "body").text
    with Watch(0) as served:
        for event in (
            recorded["begin"],
            *recorded["steps"],
            {"event": "measure", "step": 12, "seconds": 1.5},
        ):
            served(event)
        browser.get(served.url)
        WebDriverWait(browser, 300, 0.05).until(
            lambda _: "Step 12 was the last. The run now measures" in body()
        )
        assert "No frame was made: that is done while somebody watches" in body()
        assert "on its way" not in body()
        served(recorded["end"])
        WebDriverWait(browser, 300, 0.05).until(lambda _: "and no longer serves this page" in body())
        assert "on its way" not in body()


def test_a_page_of_reinforcement_speaks_of_no_fine_tuning(browser, document):
    recorded, body = document["lives"]["all"], lambda: browser.find_element("tag name", "body").text
    with Watch(0) as served:
        browser.get(served.url)
        for event in (recorded["begin"] | {"stage": "reinforce"}, *recorded["steps"], *recorded["frames"]):
            served(event)
        WebDriverWait(browser, 300, 0.05).until(
            lambda _: f"step {recorded['frames'][-1]['step']} of" in body()
        )
        assert "Reinforcement moves what trains" in body()
        assert "ine-tun" not in body()
        browser.get(
            "about:blank"
        )  # while there is a server: a page without one logs an error, and that fails the last test


def test_a_long_life_makes_no_large_page(browser, open_page, document):
    """As of a fast machine: of its lines some are left out, and the first and the last are not."""
    train = document["lives"]["train"]
    steps = [
        train["steps"][0] | {"step": step, "loss": 9 - step / 3e5, "grad_norm": step / 7}
        for step in range(1, 20_001)
    ]
    open_page({"lives": {"train": train | {"steps": steps}}})
    assert len(browser.page_source) < len(page_html({"lives": {"train": train}})) + 60_000
    shown = browser.execute_script("return life().steps")
    assert [step["step"] for step in shown] == sorted({step["step"] for step in shown})
    assert (shown[0]["step"], shown[-1]["step"]) == (1, 20_000)
    assert shown[-1]["loss"] == pytest.approx(steps[-1]["loss"], rel=1e-4)


def test_a_deep_model_makes_no_large_page(document):
    """Thirty layers, as many frames as a real recording has, and its long lines."""
    model = [
        (f"blocks/{layer}/{name}", (40, 120), layer)
        for layer in range(30)
        for name in ("q", "k", "v", "out", "gate", "down")
    ]
    model += [
        (f"blocks/{layer}/{name}", (40,), layer) for layer in range(30) for name in ("attn_norm", "mlp_norm")
    ]
    lives = {way: life(way, model, range(1, 21)) for way in document["lives"]}
    steps = [
        {"event": "step", "step": step, "loss": step / 7, "grad_norm": step / 9, "seconds": step / 11}
        for step in range(300)
    ]
    html = page_html(document | {"lives": {way: each | {"steps": steps} for way, each in lives.items()}})
    assert len(lives["lora"]["begin"]["tensors"]) == 30 * 10
    assert len(html) < 1_400_000


def test_a_command_writes_the_page_or_says_why_not(tmp_path, document, browser, capsys):
    source, target = tmp_path / "lives.json", tmp_path / "site" / "lives.html"
    source.write_text(json.dumps(document))
    assert watch.main([str(source), str(target)]) == 0
    html = target.read_text(encoding="utf-8")
    assert html.count("</script>") == html.count("<script")
    kept = json.loads(
        re.search(r'id="recording">(.*?)</script>', html)[1]
    )  # a tensor that did not move is there once
    lora, *later = kept["lives"]["lora"]["frames"]
    paths = [tensor["path"] for tensor in kept["lives"]["lora"]["begin"]["tensors"]]
    moved = [path for path in paths if path.endswith(("/a", "/b"))]
    assert None not in lora["mosaic"]
    assert [[path for path, each in zip(paths, frame["mosaic"]) if each] for frame in later] == [moved] * (
        FRAMES - 1
    )
    browser.get(target.as_uri())
    browser.find_element("link text", "Train it here").click()
    assert browser.title == "Train it here"
    for content in ('{"price": NaN}', "[]", "{"):
        source.write_text(content)
        assert watch.main([str(source), str(tmp_path / "no.html")]) == 2
        assert capsys.readouterr().err.count("\n") <= 2
        assert not (tmp_path / "no.html").exists()
    (metrics := tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert watch.main([str(metrics), str(tmp_path / "no.html")]) == 2
    assert (
        f"{metrics} is no recording of a run: a run with --record FILE writes one." in capsys.readouterr().err
    )
