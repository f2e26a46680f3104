"""Writes the planner's page: sliders that compute in the browser by the formulas of `formulas.py`, and the validation."""

import json
from pathlib import Path
from typing import Any

import jinja2

from bench.cli import Json
from bench.plan import formulas
from bench.plan.answer import POWER
from bench.plan.budget import LAW
from bench.plan.javascript import javascript
from bench.plan.model import job
from bench.plan.serving import PRECISIONS, fit_serving
from bench.plan.training import ADAPTER_BOUND, MEMORY, SLOTS
from bench.plan.validate import validation
from engine.files import atomic_file
from engine.model.config import ModelConfig

METHODS = ("pretrain", "full", "freeze", "lora:16", "qlora:16", "preference", "rl")


def write_page(folder: Path, document: Json, models: dict[str, ModelConfig], devices: dict[str, Any], state: Json) -> Path:
    """Writes `folder`/plan.html and returns its path. `devices`: of `hardware.numbers`; the sliders begin at `state`."""
    here = Path(__file__).parent
    loader = jinja2.FileSystemLoader([here, here.parent / "report"])
    data = {
        "models": {
            name: {method: vars(job(cfg, method, min(4096, cfg.context))) for method in METHODS} for name, cfg in models.items()
        },
        "contexts": {name: cfg.context for name, cfg in models.items()},
        "hardware": {name: vars(device) for name, device in devices.items()},
        "serving": fit_serving()._asdict(), "precisions": PRECISIONS, "slots": SLOTS, "power": POWER, "memory": MEMORY,
        "adapter": ADAPTER_BOUND, "state": state, "law": vars(LAW),
    }  # fmt: skip
    text = (
        jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .get_template("page.html.j2")
        .render(formulas=javascript(formulas), data=json.dumps(data), document=document, validation=validation())
    )
    with atomic_file(folder / "plan.html") as file:
        file.write(text.encode())
    return folder / "plan.html"
