"""The planner: its error figures on published runs, its answers beside the engine's own counts, and what it refuses."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cli import run_bench
from bench.plan.__main__ import PlanFlags, answer, plan, write_pages
from bench.plan.fits import device_numbers, predict_efficiency
from bench.plan.hardware import accelerators, find_hardware
from bench.plan.model import job
from bench.plan.page import to_javascript
from bench.plan.plans import LAW
from bench.plan.published_rows import clean_runs, finetunes, serving_runs, training_benchmarks, training_runs
from bench.plan.validate import (
    FLOPS_BOUND,
    figures,
    flops_errors,
    serving_errors,
    validation,
)
from engine.counting.flops import prefill_flops, train_flops
from engine.counting.params import count_params
from engine.errors import UserError
from engine.model.config import PRESETS
from engine.planning import formulas

CFG = PRESETS["llama-3.2-1b"]


def h100():
    return device_numbers(accelerators()["h100"])


def test_flops_of_every_clean_run_are_within_three_percent_of_what_was_reported():
    errors = [*flops_errors()]
    assert len(errors) == 8
    assert max(abs(each.error) for each in errors) <= FLOPS_BOUND


def test_device_hours_of_left_out_runs_lie_inside_their_intervals():
    table = validation()["table"]
    for name, most in (
        ("device-hours, each run left out", 0.15),
        ("device-hours, all runs of its makers left out", 0.16),
    ):
        assert table[name]["rows"] >= 33
        assert table[name]["median"] <= most
        assert table[name]["inside"] >= 0.80


def test_rates_of_serving_that_are_left_out_lie_inside_their_intervals():
    result = figures([*serving_errors()])
    assert result["median"] <= 0.15
    assert result["inside"] >= 0.80


def test_a_prediction_reads_nothing_of_the_run_itself():
    run = next(run for run in clean_runs() if run.name == "LLaMA-65B")
    others = [other for other in clean_runs() if other is not run]
    before = predict_efficiency(run.hardware, others, run.year)
    hours = run.device_hours
    try:
        run.device_hours = 3 * hours
        assert predict_efficiency(run.hardware, others, run.year) == before
    finally:
        run.device_hours = hours


def test_every_row_has_a_source_and_known_hardware():
    for table in (training_runs, training_benchmarks, serving_runs, finetunes):
        for row in table():
            assert row.source
            assert table is finetunes or row.hardware in accelerators()


def test_flops_are_the_engines_own():
    m = job(CFG, "pretrain", 512)
    assert m.flops == train_flops(CFG, 512, attention="causal").total
    assert m.params == count_params(CFG).total
    assert formulas.training(m, h100(), 7, 1, 0)["flops"] == 7 * m.flops
    result = formulas.serving(m, h100(), 16, 16, 1, 1, 512, 1, 0)
    without_head = prefill_flops(CFG, 512, attention="causal").total - 2 * CFG.width * CFG.vocab
    assert result["prefilling"] * 989e12 * h100().compute_use == pytest.approx(without_head, rel=1e-3)


def test_methods_cost_what_they_train():
    made = {
        method: job(CFG, method, 256)
        for method in ("pretrain", "freeze:8", "lora:8", "qlora:8", "preference", "rl")
    }
    full = made["pretrain"]
    assert full.frozen == 0
    assert full.trained == full.params
    assert made["freeze:8"].trained + made["freeze:8"].frozen == full.params
    assert made["freeze:8"].flops < made["lora:8"].flops < full.flops < made["preference"].flops
    assert made["qlora:8"].frozen_bytes < made["lora:8"].frozen_bytes
    memory = {method: formulas.bytes_a_device(m, 1, 0) for method, m in made.items()}
    assert memory["qlora:8"] < memory["lora:8"] < memory["freeze:8"] < memory["pretrain"] < memory["rl"]


@given(st.floats(1e18, 1e26))
def test_the_optimal_size_has_the_least_loss(flops):
    params = formulas.optimal(flops, **vars(LAW))
    loss = lambda size: LAW.a / size**LAW.alpha + LAW.b / (flops / 6 / size) ** LAW.beta
    assert loss(params) <= min(loss(0.97 * params), loss(1.03 * params))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"hardware": "h1000", "model": "nano", "tokens": "1M"}, "Did you mean 'h100'"),
        ({"hardware": "custom", "model": "nano", "tokens": "1M"}, "needs --peak"),
        ({"hardware": "here", "model": "nano", "tokens": "1M"}, "--calibrate"),
        ({"model": "llama-3.2-2b", "tokens": "1M"}, "Did you mean 'llama-3.2-"),
        ({"tokens": "1M"}, "Say which model"),
        ({"model": "nano"}, "--tokens is missing"),
        ({"model": "nano", "tokens": "-5"}, "--tokens must be a number above 0"),
        ({"model": "nano", "tokens": "1M", "price": -1.0}, "--price must be above 0"),
        ({"model": "nano", "tokens": "1M", "method": "freeze:99"}, "'bottom:99' names no blocks"),
        ({"model": "nano", "tokens": "1M", "method": "lorra"}, "Did you mean 'lora"),
        ({"model": "nano", "tokens": "1M", "method": "qlora:385"}, "must be at most 384"),
        ({"model": "nano", "tokens": "1M", "context": 9999}, "--context 9999 is beyond"),
        ({"model": "nano", "params": "1B", "tokens": "1M"}, "two models"),
        ({"params": "3", "tokens": "1M"}, "--params must be from"),
        ({"params": "70B", "requests": "3", "hardware": "l4"}, "does not fit"),
        ({"model": "nano", "requests": "1", "cached": 1.0}, "--cached"),
        ({"model": "nano", "requests": "1"}, "nano has a context of 256"),
        ({"model": "nano", "extra": "9", "method": "rl"}, "--method belongs to --tokens"),
        ({"model": "nano", "budget": "5"}, "choose the model"),
        ({"budget": "5", "hardware": "tpu-v5e"}, "No price"),
        ({"budget": "5", "days": 3.0}, "one at a time"),
        ({"validate": True, "out": Path("x")}, "--out writes the page of a question"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, words, monkeypatch, tmp_path):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        plan(PlanFlags(**flags))


def test_a_closed_pipe_ends_an_answer_in_silence():
    command = f"{sys.executable} -m bench.plan --model llama-3.2-1b --tokens 1M | true"
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stderr == ""


def test_an_answer_comes_without_jax_and_its_document_only_where_it_is_asked_for(tmp_path):
    answer = "run_bench('bench.plan', '', PlanFlags, plan, write_pages=write_pages)"
    code = f"import sys; from bench.plan.__main__ import *; {answer}; assert 'jax' not in sys.modules"
    command = [sys.executable, "-c", code, "--model", "llama-3.2-1b", "--tokens", "100B", "--devices", "8"]
    run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    done, plain = run("--json"), run("--out", str(tmp_path))
    document = json.loads(done.stdout)
    assert plain.stdout == done.stderr
    assert "{" not in plain.stdout
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["answer"] == document["answer"]
    assert written.keys() >= {"machine", "commit", "date", "versions", "load", "flags"}
    assert written["machine"].keys() == {
        "processor",
        "model_numbers",
        "instructions",
        "cores",
        "memory_bytes",
    }
    hours = document["answer"]["device-hours"]
    assert hours["low"] < hours["middle"] < hours["high"]
    assert all(line["origin"] or line["unit"] == "replicas" for line in document["answer"].values())


def test_a_calibrated_machine_is_planned_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("THRICE_CACHE", str(tmp_path))
    (tmp_path / "plan").mkdir()
    device = vars(accelerators()["l4"]) | {"name": "here", "watts": 0}
    (tmp_path / "plan" / "calibration.json").write_text(
        json.dumps({"device": device, "shares": [0.3, 0.4, 0.5]})
    )
    share = answer(PlanFlags(model="nano", tokens="1M", hardware="here", context=256))["answer"][
        "share of peak"
    ]
    assert share["middle"] == pytest.approx(0.4)
    assert "this machine" in share["origin"]
    (tmp_path / "plan" / "calibration.json").write_text(
        json.dumps({"device": device, "shares": [0.2, 0.7, 0.8]})
    )
    wide = answer(PlanFlags(model="nano", tokens="1M", hardware="here", context=256))["answer"]
    assert wide["share of peak"]["high"] == 1
    assert wide["device-hours"]["low"] * 3600 * 121e12 == pytest.approx(wide["FLOPs"]["low"], rel=0.01), (
        "at the peak"
    )
    (tmp_path / "plan" / "calibration.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        find_hardware("here", {})
    (tmp_path / "plan" / "calibration.json").unlink()
    os.mkfifo(tmp_path / "plan" / "calibration.json")
    with pytest.raises(UserError, match="damaged"):
        find_hardware("here", {})


STATES = [
    {"model": "llama-3.2-1b", "method": "pretrain", "hardware": "h100", "devices": 8, "tokens": 1e11},
    {"model": "llama-2-7b", "method": "lora:16", "hardware": "rtx-4090", "devices": 1, "tokens": 1e7},
    {"model": "qwen3-0.6b", "method": "rl", "hardware": "tpu-v5e", "devices": 16, "tokens": 3e8},
    {"model": "smollm2-135m", "method": "freeze", "hardware": "m4-max", "devices": 1, "tokens": 1e9},
]
SERVED = {
    "requests": 7,
    "prompt": 700,
    "answer": 300,
    "cached": 0.5,
    "precision": "int8",
    "replica": 1,
    "extra": 900,
    "tuning": 1e7,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory, browser):
    folder = tmp_path_factory.mktemp("plan")
    flags = ["--model", "llama-3.2-1b", "--tokens", "100B", "--devices", "8", "--out", str(folder)]
    assert run_bench("bench.plan", "", PlanFlags, plan, flags, write_pages) == 0
    browser.get((folder / "plan.html").as_uri())
    return browser


@pytest.mark.parametrize("state", STATES, ids=lambda state: state["model"])
def test_the_browser_computes_what_python_does(page, state, capsys):
    there = page.execute_script(
        "const all = plans(arguments[0]); return [all.trained.lines, all.served, all.even, all.each]",
        state | SERVED,
    )
    common = {"model": state["model"], "hardware": state["hardware"], "devices": state["devices"]}
    same = lambda line, bounds: [line["low"], line["middle"], line["high"]] == pytest.approx(bounds, rel=1e-9)
    trained = answer(PlanFlags(**common, method=state["method"], tokens=f"{state['tokens']:g}"))["answer"]
    assert trained.keys() == there[0].keys()
    assert all(same(trained[name], there[0][name]) for name in trained)
    lengths = {"prompt": "700", "answer": "300", "precision": "int8"}
    served = answer(PlanFlags(**common | {"devices": 1}, **lengths, requests="7", cached=0.5))["answer"]
    assert served.keys() == there[1].keys()
    assert all(same(served[name], there[1][name]) for name in served)
    even = answer(PlanFlags(**common, **lengths, extra="900"))["answer"]
    assert all(same(even[method], there[2][method]) for method in ("lora:16", "full", "pretrain"))
    for kind, words in (("computed", "without"), ("cached", "with")):
        assert even[f"the longer prompt of a request, {words} a prefix cache"]["middle"] == pytest.approx(
            there[3][kind]
        )


def test_the_sliders_change_the_answer_by_keyboard_and_say_where_it_comes_from(page):
    from selenium.webdriver import Keys

    page.refresh()
    read = lambda: page.find_element("css selector", "#trained").text
    before = read()
    assert "8.22e20" in before
    best = formulas.optimal(100e9 * job(CFG, "pretrain", 4096).flops, **vars(LAW))
    assert f"{best / 1e9:.2f} billion parameters" in page.find_element("id", "trained-best").text
    page.find_element("name", "devices").send_keys(Keys.ARROW_RIGHT)
    assert read() != before
    assert "33 published runs" in page.find_element("id", "trained-where").text
    page.find_element("name", "hardware").send_keys("tpu-v5p")
    assert "benchmarks on tpu-v5p" in page.find_element("id", "trained-where").text
    assert page.find_elements("css selector", "#plot .line")
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []
    fetched = page.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert fetched == []
    page.set_window_size(390, 900)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_the_page_refuses_what_the_terminal_does(page, capsys):
    """A prompt beyond the model's context, in one and the same sentence."""
    page.refresh()
    read = lambda name: page.find_element("id", name).text
    assert page.find_element("id", "plot").is_displayed()
    page.find_element("name", "model").send_keys("tinyllama-1.1b")
    page.execute_script(
        "const field = document.querySelector('[name=prompt]'); field.value = 3.6; "
        "field.dispatchEvent(new Event('input'))"
    )
    with pytest.raises(UserError) as refused:
        answer(PlanFlags(model="tinyllama-1.1b", requests="20", prompt="4000"))
    assert read("served-binds") == str(refused.value)
    assert read("served") == ""
    assert "has a context of 2,048" in read("manager")
    assert not page.find_element("id", "plot").is_displayed()


def translate(folder: Path, source: str) -> str:
    (folder / "written.py").write_text(source)
    spec = importlib.util.spec_from_file_location("written", folder / "written.py")
    return to_javascript(importlib.util.module_from_spec(spec))


def test_the_translator_writes_branches_in_braces(tmp_path):
    source = """
def f(x, y):
    'Doc.'
    if x > 1:
        z = x ** 2
        y = z
    elif y == 3:
        return x
    else:
        z = 0
    return y + z
"""
    written = """
function f(x, y) {
  let z;
  if (x > 1) {
    z = x ** 2;
    y = z;
  } else {
    if (y == 3) {
      return x;
    } else {
      z = 0;
    }
  }
  return y + z;
}"""
    assert translate(tmp_path, source).endswith(written)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("for y in x:\n        pass", "for y in x"),
        ("if x > 1:\n        pass", "pass"),
        ("if x is None:\n        return 1", "x is None"),
        ("return 1 if x else 2", "return 1 if x else 2"),
    ],
)
def test_the_translator_refuses_what_it_cannot_write(tmp_path, body, named):
    with pytest.raises(TypeError, match=f"no JavaScript for '{named}"):
        translate(tmp_path, f"def f(x):\n    'Doc.'\n    {body}\n")
