"""The laws that tests hold, by name, and the tests that are marked with each: read from the sources, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
# What `@pytest.mark.law` may name, and the law in a sentence.
LAWS = {
    "forward only": "Inference computes no gradient and keeps nothing for one.",
    "immutable weights": "Inference changes no weight, and donates none.",
    "isolation": "No request leaves anything that another could read: no leak between slots, caches or answers.",
    "batch invariance": "A request has the same bits alone and in any company, at any time, in any slot.",
    "causality": "A token depends on the tokens before it in its own text, and on nothing else.",
    "cache equivalence": "Reading with a KV cache or a prefix cache, whole or in pieces, is reading the text anew.",
    "speculation": "Draft tokens change how soon a token comes, never which.",
    "gradients": "Gradients by `jax.grad`, by hand in NumPy and by the papers' formulas are the same.",
    "factor of three": "A training step costs three forward passes; what is frozen is spared by formula and by program.",
    "frozen": "A frozen parameter keeps every bit, whatever the optimizer does.",
    "adapter identity": "An adapter begins as the identity, and folds into its base as what it computes.",
    "finite steps": "A step whose loss, gradient or update is not finite changes nothing.",
    "donation": "A training step gives away its own state and nothing else.",
    "determinism": "A seed gives the same weights, order of data, samples and run again, and another seed others.",
    "resume": "A run that was killed or stopped goes on to the same bits, and never loads half a checkpoint.",
    "sharding equivalence": "Several devices or processes compute what one does.",
    "layout equivalence": "However a program is laid out, in scans, parts or kernels, it computes the same.",
    "quantisation": "Rounded weights are as near as their bits allow, and are multiplied as what they are.",
    "round trip": "What is written to a file comes back, and other libraries read the same.",
    "constrained decoding": "An answer under a grammar, schema or tool is valid, or says that it was cut.",
    "fairness": "Nobody is passed over who came first or who waits as told, whatever the size of the request.",
    "backpressure": "What is too much is refused at once, with the time after which to come again.",
    "no compiles": "No request makes a server compile once it is ready.",
    "hostile files": "A bad file ends in a sentence: it runs no code, and neither crashes nor fills the memory.",
    "lowering": "Every program lowers for CUDA, ROCm and TPU, and none holds a product that XLA gets wrong.",
}


class MarkedTest(NamedTuple):
    """A test that holds a law."""

    law: str
    # Relative to the folder of tests.
    path: Path
    name: str
    # "default", "whole" or "night": the run that has it, or its first cases.
    run: str


def marked_tests() -> list[MarkedTest]:
    """Returns the tests with a law, by file and by place in it."""
    return [test for path in sorted(TESTS.rglob("test_*.py")) for test in _marked_in(path)]


def _marked_in(path: Path) -> Iterator[MarkedTest]:
    module = ast.parse(path.read_text("utf-8"))
    of_module = [
        mark
        for statement in module.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark"
        for mark in ast.walk(statement.value)
    ]
    for function in module.body:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        marks = [ast.unparse(mark) for mark in [*function.decorator_list, *of_module] if _is_mark(mark)]
        run = "default"
        if any(mark.startswith(("pytest.mark.night", "pytest.mark.promises")) for mark in marks):
            run = "night"
        elif any(mark.startswith("pytest.mark.whole") for mark in marks):
            run = "whole"
        for mark in function.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.law":
                for law in mark.args:
                    yield MarkedTest(ast.literal_eval(law), path.relative_to(TESTS), function.name, run)


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.Call) and ast.unparse(node).startswith("pytest.mark.")
