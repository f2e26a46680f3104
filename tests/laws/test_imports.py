"""The project's argument, written as folders, cannot be broken unseen: who may import whom, and no circles.

Every import is read from the source with `ast`: those inside functions and under TYPE_CHECKING too.
"""

import ast
import functools

import pytest
from source_tree import PACKAGES, SOURCES, Trees, imported, imports, package_of, read

# The engine from the ground up. A room (a file or a folder) imports itself and rooms of higher lines, none beside it.
ENGINE = """
errors format
files allocator model.config model.paths
model.column_groups mesh_shape
sharding
placement
device distributed model.layers model.fused_attention model.cache.contiguous by_hand
coordinator model.native
model.ops
model.weights.int8
model.attention model.backward model.weights.lora model.cache.segmented
model.weights.lora_matmul
model.weights.matmul
model.transformer
model.cross_entropy
text counting
storage
training inference
"""
# Above it stages and bench, which do not know each other:
#   stages: cli <- runs <- STAGE/flags <- STAGE/pieces <- STAGE/run <- STAGE/__main__; no stage imports another, and
#           only run and __main__ import flags: pieces take plain values
#   bench:  cli, timing <- pieces <- __main__
GROUND = {"stages.cli": 0, "stages.runs": 1, "bench.cli": 0, "bench.timing": 0}
FLAGS, PIECE, RUN, MAIN = 20, 30, 40, 50

TIER = {f"engine.{room}": tier for tier, line in enumerate(ENGINE.split("\n")) for room in line.split()} | GROUND
EMPTY = {"engine", "engine.model", "engine.model.cache", "engine.model.weights", "stages", "bench"}  # packages of a docstring


def graph(trees: Trees) -> dict[str, set[str]]:
    """{module: the modules of this project that it imports}."""
    return {
        module: {target for target in imported(module, tree, trees) if package_of(target) in PACKAGES} - EMPTY
        for module, tree in trees.items()
    }


def room_of(module: str) -> str | None:
    """The longest prefix of a module's name that the tables hold; else its stage, or all of bench; None in the engine."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    other = {"stages": ".".join(parts[:2]), "bench": "bench"}.get(parts[0])
    return next((prefix for prefix in prefixes if prefix in TIER), other)


def rank_of(module: str) -> int:
    """How high a module stands inside its package."""
    step = {"flags": FLAGS, "run": RUN, "__main__": MAIN}.get(module.split(".")[-1], PIECE)
    return TIER.get(room_of(module) or "", step)


def is_right(module: str, target: str) -> bool:
    """Whether the law lets a module import another."""
    if package_of(module) != package_of(target):
        return package_of(target) == "engine"
    rank, below = rank_of(module), rank_of(target)
    if below == FLAGS:
        return rank >= RUN and room_of(module) == room_of(target)
    if room_of(module) == room_of(target):
        return below < rank or below == rank != MAIN
    return below < rank and (package_of(module) != "stages" or room_of(target) in GROUND)


def wrong_arrows(trees: Trees) -> set[str]:
    """Each import that points up or sideways, and each module that has no place in the tables."""
    arrows = {(module, target) for module, targets in graph(trees).items() for target in targets}
    homeless = {module for module in trees if room_of(module) is None and module not in EMPTY}
    filled = {module for module in EMPTY - {"stages"} if module in trees and any(imported(module, trees[module], trees))}
    return {
        *(f"{module} imports {target}" for module, target in arrows if not is_right(module, target)),
        *(f"{module} has no place in the law" for module in homeless | filled),
    }


def circles(trees: Trees) -> set[str]:
    """Each module that comes back to itself by imports."""
    arrows = graph(trees)

    def reached(module: str) -> set[str]:
        visited: set[str] = set()
        queue = list(arrows[module])
        while queue:
            if (target := queue.pop()) not in visited:
                visited.add(target)
                queue += arrows.get(target, ())
        return visited

    return {f"{module} is in a circle" for module in arrows if module in reached(module)}


def names_of(tree: ast.Module) -> set[str]:
    """Every name that a module binds."""
    nodes = list(ast.walk(tree))
    return {
        *(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)),
        *(node.asname or node.name for node in nodes if isinstance(node, ast.alias)),
        *(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)),
    }


def missing(trees: Trees, known: Trees) -> set[str]:
    """Each import of a module of ours, or of a name in one, that does not exist: a lazy one fails only when it is run."""
    bound = functools.cache(lambda module: names_of(known[module]))
    return {
        f"{module} imports {f'{base}.{name}'.rstrip('.')}, which is not there"
        for module, tree in trees.items()
        for base, name in imports(module, tree, known)
        if package_of(base) in PACKAGES and f"{base}.{name}" not in known
        if base not in known or (name and name not in bound(base))
    }


def test_no_import_breaks_the_law():
    faults = wrong_arrows(SOURCES) | circles(SOURCES) | missing(SOURCES | read("tests"), SOURCES)
    assert sorted(faults) == []
    assert set(TIER) - {room_of(module) for module in SOURCES} == set(), "the tables hold a room that is no more"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.inference.made_up", "import engine.training.step"),
        ("engine.inference.made_up", "from engine.training import step"),
        ("engine.inference.made_up", "from engine import training"),
        ("engine.inference.made_up", "from ..training.loss import summed_loss"),
        ("engine.inference.made_up", "def f():\n    from engine.training.loss import summed_loss"),
        ("engine.training.made_up", "from engine.inference.score import score"),
        ("engine.text.made_up", "from engine.storage.digest import digest"),
        ("engine.counting.made_up", "from engine.storage.model_loader import read_config"),
        ("engine.counting.made_up", "if TYPE_CHECKING:\n    from engine.text.batch import Batch"),
        ("engine.model.layers", "from engine.model import backward"),
        ("engine.model.cache.contiguous", "from engine.model.layers import attention"),
        ("engine.model.weights.matmul", "from engine.model.transformer import forward"),
        ("engine.model.config", "from engine.files import write_json"),
        ("engine.training.made_up", "from stages import train"),
        ("engine.made_up", ""),
        ("engine.model.made_up", ""),
        ("engine", "from engine.errors import UserError"),
        ("stages.made_up", "from bench.timing import measure"),
        ("stages.made_up", "from stages import generate"),
        ("stages.made_up.data", "if TYPE_CHECKING:\n    from stages.train import flags"),
        ("stages.made_up.flags", "from stages.made_up import data"),
        ("stages.made_up.data", "from stages.made_up.run import run"),
        ("stages.made_up.run", "from stages.made_up.__main__ import main"),
        ("stages.made_up.data", "from stages.made_up.flags import MadeUp"),
        ("stages.runs.made_up", "from stages.train.flags import Train"),
        ("stages.cli.made_up", "def f():\n    from stages.runs import folder"),
        ("bench.made_up", "import stages.cli"),
        ("bench.timing", "from bench.table import row"),
        ("bench.table.row", "from bench.__main__ import main"),
        ("bench.__main__", "from bench.peers.__main__ import main"),
    ],
)
def test_the_checker_sees_a_wrong_arrow(module, source):
    assert len(wrong_arrows(SOURCES | {module: ast.parse(source)}) - wrong_arrows(SOURCES)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.training.made_up", "from . import loss\nfrom .step import train_step\nfrom ..model import layers"),
        ("engine.text.made_up", "import jax\nfrom engine.errors import UserError\nfrom engine.text.batch import Batch"),
        ("stages.made_up", "import engine.training.step\nfrom engine import inference\nfrom stages.runs import folder"),
        ("stages.made_up.flags", "from stages.cli import flags\nfrom stages.runs import folder"),
        ("stages.made_up.run", "from stages.made_up import data, flags\nfrom stages.made_up.report import report"),
        ("bench.peers.made_up", "from bench import cli, timing\nfrom bench.table import row"),
    ],
)
def test_the_checker_lets_right_arrows_be(module, source):
    known = SOURCES | {"stages.made_up.data": ast.Module([], []), "stages.made_up.report": ast.Module([], [])}
    assert wrong_arrows(known | {module: ast.parse(source)}) <= wrong_arrows(SOURCES)


def test_the_checker_sees_circles_and_names_that_are_not_there():
    trees = {"bench.a": "def f():\n    import bench.b", "bench.b": "from bench import c", "bench.c": "from bench.a import f"}
    trees |= {"bench.d": "import bench.a"}
    parsed = {module: ast.parse(source) for module, source in trees.items()}
    assert circles(parsed) == {f"bench.{name} is in a circle" for name in "abc"}
    for source in ("from bench.a import g", "import bench.e", "def f():\n    from bench import e", "from bench.e import f"):
        assert len(missing({"tests.x": ast.parse(source)}, parsed)) == 1
    assert not missing(parsed, parsed)
