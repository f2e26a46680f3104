"""Stores in the user's cache what a function is lowered to, so that a later command need not trace it.

JAX's own cache is read once a program is lowered. Only a command on one CPU stores: tests change
the engine while it runs.
"""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax._src.core import Primitive  # jax.extend.core has it too, and takes 20 ms to import
from jax.core import ShapedArray
from jax.interpreters import mlir

from engine import sources
from engine.files import cache_folder, read_checked, write_checked
from engine.model.ops import computes_in_c, platform

MAX_BYTES = 2**28  # that are read of a program; it has some 50 thousand


def _lower(context: Any, *arguments: Any, program: bytes, results: tuple[ShapedArray, ...]) -> Any:
    """Puts a stored program into the module that is lowered, and a call of it."""
    here = context.module_context
    with here.context:
        module = mlir.ir.Module.parse(program)
    name = mlir.merge_mlir_modules(here.module, "stored_program", module, dst_symtab=here.symbol_table)
    types = [mlir.aval_to_ir_type(here, result) for result in results]
    callee: Any = {"callee": mlir.ir.FlatSymbolRefAttr.get(name)}
    return mlir.ir.Operation.create("func.call", types, arguments, callee).results


stored_program = Primitive("stored_program")
stored_program.multiple_results = True
stored_program.def_abstract_eval(lambda *_, results, **__: results)
mlir.register_lowering(stored_program, _lower)


@functools.cache
def _versions() -> str:
    """Returns a digest of all code that makes a program; empty if some of the engine's was edited
    since the command began.

    Modules are imported when they are first needed: after an edit one may be old and another new.
    """
    digests = []
    for path in sorted(sources.at_start):
        try:
            data = Path(path).read_bytes()
        except OSError:
            return ""
        name = os.path.relpath(path, os.path.dirname(__file__))
        digests.append((name, hashlib.sha256(data).hexdigest()))
    if sources.are_edited():
        return ""
    code = repr((jax.__version__, jaxlib.__version__, metadata.version("flax"), digests))
    return hashlib.sha256(code.encode()).hexdigest()


def stored(like: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of (cfg, *arrays), for jax.jit to trace, whose result is a tree as
    `like(*arrays)`.
    """

    def store(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.wraps(function)(functools.partial(_call, function, like))

    return store


def _call(function: Callable[..., Any], like: Callable[..., Any], cfg: Any, *args: Any) -> Any:
    """Returns function(cfg, *args): by a stored program if it may be stored, and traced if not."""
    stores = sources.at_start and platform() == "cpu" and jax.sharding.get_abstract_mesh().empty
    versions = ""
    if stores:
        versions = _versions()
    if not versions:
        return function(cfg, *args)
    leaves, tree = jax.tree.flatten(args)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    facts = repr((versions, jax.config.values, computes_in_c(), function.__name__, cfg, tree, shapes))
    path = cache_folder("programs") / hashlib.sha256(facts.encode()).hexdigest()
    data = read_checked(path, MAX_BYTES)
    if not data:

        def flat(*leaves: Any) -> list[Any]:
            return jax.tree.leaves(function(cfg, *jax.tree.unflatten(tree, leaves)))

        lowered: Any = jax.jit(flat, keep_unused=True).lower(*shapes)
        shapes_and_types = [[result.shape, str(result.dtype)] for result in lowered.out_info]
        header = json.dumps(shapes_and_types).encode()
        data = header + b"\n" + mlir.module_to_bytecode(lowered.compiler_ir())
        if not sources.are_edited():  # tracing imports modules, and may have imported an edited one
            with contextlib.suppress(OSError):
                write_checked(path, data)
    header, program = data.split(b"\n", 1)
    results = tuple(ShapedArray(tuple(shape), jnp.dtype(dtype)) for shape, dtype in json.loads(header))
    outputs = stored_program.bind(*leaves, program=program, results=results)
    return jax.tree.unflatten(jax.tree.structure(like(*args)), outputs)
