"""Writes the planner's page, whose sliders compute in the browser by the formulas of `engine.planning`.

The formulas are written out as JavaScript, so that page and terminal compute by one source.
"""

import ast
import inspect
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.cli import LOG_CHARTS, Json, write_page
from bench.plan.fits import SLOTS, fit_serving
from bench.plan.model import METHODS, job
from bench.plan.plans import ADAPTER_BOUND, LAW, MEMORY, POWER, PRECISIONS
from engine.model.config import ModelConfig
from engine.planning import formulas

HERE = Path(__file__).parent
# What Python and JavaScript write alike, but for a condition.
_ALIKE: tuple[type[ast.AST], ...] = (
    *(
        ast.Assign,
        ast.Return,
        ast.Name,
        ast.Attribute,
        ast.Constant,
        ast.Call,
        ast.Dict,
        ast.BinOp,
        ast.Compare,
        ast.IfExp,
    ),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.Gt, ast.GtE, ast.LtE, ast.Eq, ast.expr_context),
)


def sliders(models: dict[str, ModelConfig], devices: dict[str, Any], state: Json) -> Json:
    """Returns the numbers that the page computes with. `devices`: of `hardware.numbers`; the
    sliders begin at `state`.
    """
    methods = [method.replace(":K", "").replace(":R", ":16") for method in METHODS]
    return {
        "models": {
            name: {method: vars(job(cfg, method, min(4096, cfg.context))) for method in methods}
            for name, cfg in models.items()
        },
        "contexts": {name: cfg.context for name, cfg in models.items()},
        "hardware": {name: vars(device) for name, device in devices.items()},
        "serving": fit_serving()._asdict(),
        "precisions": PRECISIONS,
        "slots": SLOTS,
        "power": POWER,
        "memory": MEMORY,
        "adapter": ADAPTER_BOUND,
        "state": state,
        "law": vars(LAW),
    }


def write_plan(source: Path, _: Json) -> Path:
    """Writes plan.html beside its document, with the formulas as a script, and returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "formulas.js"
        script.write_text(javascript(formulas), encoding="utf-8")
        return write_page(
            source, "plan.html", HERE / "plan.html", HERE / "plan.css", *LOG_CHARTS, script, HERE / "plan.js"
        )


def javascript(module: ModuleType) -> str:
    """Returns a module's constants and functions. Raises TypeError for syntax that has no
    translation here.
    """
    lines = [
        "const {exp, floor, log10, min, max} = Math;",
        "const either = (test, yes, no) => test ? yes : no;",
    ]
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef):
            names = ", ".join(argument.arg for argument in node.args.args)
            body = "".join(f"  {_write(line)}\n" for line in node.body[1:])  # without the docstring
            lines.append(f"function {node.name}({names}) {{\n{body}}}")
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            lines.append(_write(node))
    return "\n".join(lines)


def _write(statement: ast.stmt) -> str:
    if not all(isinstance(node, _ALIKE) for node in ast.walk(statement)):
        raise TypeError(f"There is no JavaScript for {ast.unparse(statement)!r}.")
    return "const " * isinstance(statement, ast.Assign) + ast.unparse(_Conditions().visit(statement)) + ";"


class _Conditions(ast.NodeTransformer):
    def visit_IfExp(self, node: ast.IfExp) -> ast.Call:
        self.generic_visit(node)
        return ast.Call(ast.Name("either"), [node.test, node.body, node.orelse], [])
