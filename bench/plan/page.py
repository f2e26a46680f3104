"""Writes the planner's page, whose sliders compute in the browser by the formulas of `engine.planning`.

The formulas are written out as JavaScript, so that page and terminal compute by one source.
"""

import ast
import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from bench.machine import Json
from bench.pages import LOG_CHARTS, write_page
from bench.plan.fits import SLOTS, PlannedDevice, fit_serving
from bench.plan.model import METHODS, job
from bench.plan.plans import ADAPTER_BOUND, LAW, MEMORY, POWER, PRECISIONS
from engine.model.config import ModelConfig
from engine.planning import formulas

HERE = Path(__file__).parent
# The syntax that is the same in Python and in JavaScript.
_STATEMENTS = (ast.Assign, ast.Return)
_EXPRESSIONS = (ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.Dict, ast.BinOp, ast.Compare)
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.Gt, ast.GtE, ast.LtE, ast.Eq)
_SAME_SYNTAX = (*_STATEMENTS, *_EXPRESSIONS, *_OPERATORS, ast.expr_context)


def sliders(models: dict[str, ModelConfig], devices: dict[str, PlannedDevice], state: Json) -> Json:
    """Returns the numbers that the page computes with. `devices`: of `fits.device_numbers`; the
    sliders begin at `state`.
    """
    fit = fit_serving()
    # The page asks for no numbers: half of the blocks are frozen, and adapters have rank 16.
    methods = [method.replace(":K", "").replace(":R", ":16") for method in METHODS]
    return {
        "models": {
            name: {method: vars(job(cfg, method, min(4096, cfg.context))) for method in methods}
            for name, cfg in models.items()
        },
        "contexts": {name: cfg.context for name, cfg in models.items()},
        "hardware": {name: vars(device) for name, device in devices.items()},
        "serving": {"uses": fit.uses._asdict(), "spread": fit.spread, "origin": fit.origin},
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
        script.write_text(to_javascript(formulas), encoding="utf-8")
        parts = [HERE / "plan.html", HERE / "plan.css", *LOG_CHARTS, script, HERE / "plan.js"]
        return write_page(source, "plan.html", *parts)


def to_javascript(module: ModuleType) -> str:
    """Returns a module's constants and functions as JavaScript. Raises TypeError for syntax that has
    no translation here.
    """
    lines = ["const {exp, floor, log10, min, max} = Math;"]
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef):
            lines += _write_function(node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            lines.append(f"const {_write_unchanged(node)};")
    return "\n".join(lines)


def _write_function(function: ast.FunctionDef) -> list[str]:
    """Returns the lines of a function, whose variables are declared at its top."""
    parameters = [argument.arg for argument in function.args.args]
    lines = [f"function {function.name}({', '.join(parameters)}) {{"]
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    assigned = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    own = sorted(assigned.difference(parameters))
    if own:
        lines.append(f"  let {', '.join(own)};")
    lines += _write_block(function.body[1:], "  ")  # without the docstring
    return [*lines, "}"]


def _write_block(statements: Sequence[ast.stmt], indent: str) -> list[str]:
    lines = []
    for statement in statements:
        if isinstance(statement, ast.If):
            lines.append(f"{indent}if ({_write_unchanged(statement.test)}) {{")
            lines += _write_block(statement.body, indent + "  ")
            if statement.orelse:
                lines.append(f"{indent}}} else {{")
                lines += _write_block(statement.orelse, indent + "  ")
            lines.append(f"{indent}}}")
        else:
            lines.append(f"{indent}{_write_unchanged(statement)};")
    return lines


def _write_unchanged(node: ast.AST) -> str:
    """Returns a statement or expression that is written the same in both languages."""
    if not all(isinstance(part, _SAME_SYNTAX) for part in ast.walk(node)):
        raise TypeError(f"There is no JavaScript for {ast.unparse(node)!r}.")
    return ast.unparse(node)
