"""One tiny model for all tests, whose sizes all differ: B 2, T 7, N 6, K 3, H 4, D 20, F 28, V 41, L 2.

No two axes that could be swapped have one size, so a transposed one cannot hide. JAX is imported
late: `conftest.py` first says where compiled programs go.
"""

from typing import Any

import numpy as np

from engine.model.config import Llama3Scaling, ModelConfig, YarnScaling

B, T = 2, 7
# Has a program measure this machine's ceilings on small matrices: not as true, and seconds sooner.
SMALL = {"_CPU_SIDE": 512, "_CPU_NUMBERS": 2**20, "_SECONDS": 0.0}
SMALL_MATRICES = f"import engine.counting.hardware as hardware\nvars(hardware).update({SMALL})\n"
QUICKLY_MEASURED = f"""{SMALL_MATRICES}
import runpy, sys
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def trainable_paths(cfg: Any, *, train: str = "all", freeze: str | None = None) -> Any:
    """The paths of what a rule trains, or leaves beside what it freezes."""
    from engine.training.freeze import select_trainable

    return select_trainable(cfg, [train], [freeze] if freeze else [])[0]


def tiny_config(**changes: Any) -> Any:
    """Returns the tiny model's config in float32, with `changes`."""
    sizes = {
        "vocab": 41,
        "width": 20,
        "layers": 2,
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 4,
        "ff": 28,
        "context": 150,
    }
    return ModelConfig(**{**sizes, "qk_norm": True, "dtype": "float32", **changes})


# The family's members, and all that is said about a block once so and once otherwise: Qwen3's,
# Llama 3's with its stretched rotation, Qwen2's with YaRN's and as many key heads as query heads, and one with
# a single key head and no option at all.
FAMILY = {
    "qwen3": tiny_config(),
    "llama3": tiny_config(
        qk_norm=False, tied=True, rope_theta=100.0, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 64)
    ),
    "qwen2": tiny_config(
        qk_norm=False,
        tied=True,
        qkv_bias=True,
        kv_heads=6,
        eps=1e-2,
        rope_theta=100.0,
        rope_scaling=YarnScaling(4.0, 40, 1.2, fast_turns=5.0, slow_turns=0.5),
    ),
    "plain": tiny_config(qk_norm=False, kv_heads=1, layers=3),
}


def lively_params(cfg: Any, seed: int = 0) -> dict[str, Any]:
    """Returns weights of which none is 0 or 1: as `init_params` makes it a block is the identity
    and would hide a fault.
    """
    import jax
    import jax.numpy as jnp

    from engine.model.paths import map_paths
    from engine.model.transformer import init_params

    rng = np.random.default_rng(seed)

    def random_leaf(path: str, leaf: Any) -> Any:
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path.endswith("norm"):
            return jnp.asarray(1 + 0.3 * noise)
        return jnp.asarray(noise * (0.3 if leaf.ndim == 1 else leaf.shape[0] ** -0.5))

    return map_paths(random_leaf, jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))


def tokens_of(seed: int, *shape: int, vocab: int = 41) -> Any:
    """Returns random tokens (shape) int32."""
    return np.random.default_rng(seed).integers(0, vocab, shape, np.int32)


def positions_of(*shape: int) -> Any:
    """Returns positions 0 .. T - 1 in each row, (shape) int32."""
    return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)


def text_batch(seed: int, rows: int, T: int, mask: Any = None, segments: Any = None) -> Any:
    """Returns a Batch of random texts, each with the token that follows it; all targets count
    unless `mask` says otherwise.
    """
    from engine.text.batch import Batch

    tokens = tokens_of(seed, rows, T + 1)
    mask = np.ones((rows, T), bool) if mask is None else mask
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, positions_of(rows, T), segments)


def normal(seed: int, *shape: int, dtype: Any = "float32") -> Any:
    """Returns random normal numbers (shape), a JAX array."""
    import jax.numpy as jnp

    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    """Each leaf is that of the other tree, within so much of the other's largest number."""
    import jax

    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(ours) == np.shape(theirs)
        np.testing.assert_allclose(
            np.asarray(ours, float), theirs, rtol=0, atol=tolerance * np.abs(theirs).max()
        )


def equations(jaxpr: Any) -> Any:
    """Yields the equations of a program, loops and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def sampling_of(rows: int, **fields: Any) -> Any:
    """Returns SamplingArrays of so many rows with these fields, and seeds seed, seed + 1, ..."""
    import jax

    from engine.inference.request import SamplingParams
    from engine.inference.sampling import sampling_arrays

    return jax.device_put(sampling_arrays(SamplingParams(**fields).per_row(rows)))


def request_of(
    prompt: Any, max_tokens: int, namespace: str = "", constraint: Any = None, **fields: Any
) -> Any:
    """Returns a Request with these sampling parameters."""
    from engine.inference.request import Request, SamplingParams

    return Request(prompt, SamplingParams(max_tokens=max_tokens, **fields), namespace, constraint)
