"""ModelRunner: the weights, KV cache and token counts of `engine.Engine` on the device, and the programs that work on them.

The programs' shapes depend on the model, the slots and their capacity, never on a request, so all
can be compiled before the first one. They donate the KV cache and the token counts, and no
parameter.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from engine.inference.backend import Cache, clear_slot, copy_slot
from engine.inference.config import EngineConfig
from engine.inference.request import MAX_LOGPROBS, SamplingParams
from engine.inference.sampling import (
    SamplingArrays,
    TokenCounts,
    TokenMasks,
    adjust_logits,
    count_prompt,
    make_token_counts,
    make_token_masks,
    mask_logits,
    sample,
    sampling_arrays,
    set_token_counts,
)
from engine.inference.scheduler import DRAFT_ROWS, STEPS
from engine.mesh import layout
from engine.model.cache import segmented
from engine.model.cache.segmented import CacheRows, KVSegments, segmented_cache
from engine.model.config import ModelConfig
from engine.model.transformer import Params, forward, hidden_states
from engine.model.weights.stacked_lora import make_stacks, put_adapter, with_stacks
from engine.program_cache import stored

EMBEDS = np.int32(1)  # given at all, it selects the program for embeddings
COMPILED_AT_ONCE = 2  # tracing holds Python's lock


@jax.jit(static_argnames="length")
def read_chunk(segments: KVSegments, slot: Array, start: Array, length: int) -> Any:
    return layout.pin_cache(segmented.read_chunk(segments, slot, start, length))


@jax.jit(donate_argnames="segments")
def write_chunk(segments: KVSegments, chunk: Any, slot: Array, start: Array, count: Array) -> KVSegments:
    return layout.pin_cache(segmented.write_chunk(segments, chunk, slot, start, count))


class RowAdapters(NamedTuple):
    """The adapters of R rows: stacks, None where there are none, and each row's index in them, (R,)
    int32, 0 for none.
    """

    stacks: Params | None = None
    indices: Any = None


NO_ADAPTERS = RowAdapters()


class SampledTokens(NamedTuple):
    """The samples of each step and row, zeros behind the last step; X is MAX_LOGPROBS, or a smaller
    vocabulary.

    Log-probabilities are in nats, before penalties and masks.
    """

    token: Array  # (STEPS, R) int32
    finite: Array  # (STEPS, R) bool: whether the largest of its logits was
    logprob: Array  # (STEPS, R) float32
    top_tokens: Array  # (STEPS, R, X) int32: the most probable ones
    top_logprobs: Array  # (STEPS, R, X) float32


def _like_prefilled(
    params: Params, segments: KVSegments, tokens: Array, embeds: Array | None, *_: Any
) -> Any:
    return embeds, segments


@jax.jit(static_argnames="cfg", donate_argnames="segments")
@stored(_like_prefilled)
def prefill_chunk(
    cfg: ModelConfig,
    params: Params,
    segments: KVSegments,
    tokens: Array,
    embeds: Array | None,
    slot: Array,
    start: Array,
    adapters: RowAdapters = NO_ADAPTERS,
) -> tuple[Array | None, KVSegments]:
    """Writes the keys and values of tokens (1, T) int32, -1 after the last, into a slot, from
    position `start` on.

    With `embeds`, which is EMBEDS, it sums the head's input over the tokens, for an embedding: (1,
    D) float32.
    """
    is_token = tokens >= 0
    T = tokens.shape[1]
    rows = CacheRows(start[None], slot[None], jnp.zeros((1,), jnp.int32), slot[None], is_token)
    params = with_stacks(cfg, params, *adapters)
    hidden, cache = hidden_states(
        cfg, params, tokens, (start + jnp.arange(T))[None], segmented_cache(segments, rows)
    )
    summed = None
    if embeds is not None:
        summed = jnp.where(is_token[..., None], hidden.astype(jnp.float32), 0).sum(1)
    return summed, layout.pin_cache(cache.segments)


def _like_decoded(params: Params, segments: KVSegments, counts: TokenCounts, *_: Any) -> Any:
    leaf: Any = 0  # in place of an array: only the structure of the tree counts
    return SampledTokens(leaf, leaf, leaf, leaf, leaf), segments, counts


@jax.jit(static_argnames="cfg", donate_argnames=("segments", "counts"))
@stored(_like_decoded)
def decode_slots(
    cfg: ModelConfig,
    params: Params,
    segments: KVSegments,
    counts: TokenCounts,
    token: Array,
    rows: CacheRows,
    sampling: SamplingArrays,
    masks: TokenMasks,
    steps: Array,
    logprobs: Array,
    adapters: RowAdapters = NO_ADAPTERS,
) -> tuple[SampledTokens, KVSegments, TokenCounts]:
    """token (R,) int32 at its row's position -> the `steps` tokens that follow, at most STEPS.

    One program does one step or several: a row's numbers are the same to the bit, whatever others
    do. `masks` hold for as many steps as they say. Without `logprobs` () bool log-probabilities are
    0.
    """
    R = len(token)
    X = min(MAX_LOGPROBS, cfg.vocab)
    params = with_stacks(cfg, params, *adapters)

    def step(i: Array, carry: Any) -> Any:
        token, segments, counts, sampled = carry
        position = jnp.where(rows.position < 0, -1, rows.position + i)
        cache = segmented_cache(segments, rows._replace(position=position))
        logits, cache = forward(cfg, params, token[:, None], jnp.maximum(position, 0)[:, None], cache)
        logits = logits[:, 0]
        with jax.named_scope("sample"):
            is_any_adjusted = sampling.adjusts_logits.any()
            adjusted = jax.lax.cond(
                is_any_adjusted, adjust_logits, _unchanged, logits, counts, rows.slot, sampling
            )
            masked = masks.steps > i
            allowed = jax.lax.cond(masked.any(), mask_logits, _unchanged, adjusted, masked, masks.allowed)
            token = sample(allowed, position + 1, sampling)
            finite = jnp.isfinite(logits.max(-1))
            new = SampledTokens(token, finite, *_log_probabilities(logits, token, X, logprobs))
            sampled = SampledTokens(*(array.at[i].set(row) for array, row in zip(sampled, new)))
            counts = counts._replace(counts=counts.counts.at[rows.slot, token].add(position >= 0))
        return token, cache.segments, counts, sampled

    sampled = SampledTokens(
        token=jnp.zeros((STEPS, R), jnp.int32),
        finite=jnp.zeros((STEPS, R), bool),
        logprob=jnp.zeros((STEPS, R)),
        top_tokens=jnp.zeros((STEPS, R, X), jnp.int32),
        top_logprobs=jnp.zeros((STEPS, R, X)),
    )
    _, segments, counts, sampled = jax.lax.fori_loop(0, steps, step, (token, segments, counts, sampled))
    return sampled, *layout.pin_cache((segments, counts))


def _unchanged(logits: Array, *_: Any) -> Array:
    return logits


def _log_probabilities(logits: Array, token: Array, X: int, wanted: Array) -> tuple[Array, Array, Array]:
    """Returns each token's log-probability (R,), the X most probable tokens (R, X), and theirs."""
    R = len(token)

    def computed():
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        best, tokens = jax.lax.top_k(logits, X)
        return (jnp.take_along_axis(logits, token[:, None], axis=-1) - total)[:, 0], tokens, best - total

    def zeros():
        return jnp.zeros(R), jnp.zeros((R, X), jnp.int32), jnp.zeros((R, X))

    return jax.lax.cond(wanted, computed, zeros)


class Program(NamedTuple):
    """A jitted program with its arguments, and how a runner takes its results."""

    function: Any
    arguments: tuple[Any, ...]
    keep: Callable[["ModelRunner", Any], None]


def _keep_decoded(runner: "ModelRunner", results: Any) -> None:
    _, runner.segments, runner.counts = results


def _keep_prefilled(runner: "ModelRunner", results: Any) -> None:
    _, runner.segments = results


def _keep_segments(runner: "ModelRunner", results: Any) -> None:
    runner.segments = results


def _keep_counts(runner: "ModelRunner", results: Any) -> None:
    runner.counts = results


def _keep_nothing(runner: "ModelRunner", results: Any) -> None:
    """Of a program that donates nothing."""


def idle_programs(
    cfg: ModelConfig,
    config: EngineConfig,
    params: Params,
    segments: KVSegments,
    counts: TokenCounts,
    stacks: Params | None,
) -> dict[str, Program]:
    """Returns each program of an engine with arguments in which no row and no slot is in use.

    From shapes in place of arrays, they can be lowered, not run.
    """
    sizes = {"chunk": config.chunk}
    if config.tail < config.chunk:
        sizes["tail"] = config.tail
    programs = {"decode": _idle_decode(cfg, config.rows, params, segments, counts, stacks)}
    few_rows = config.backend.few_rows(config.rows, params)
    if few_rows:
        programs["decode_few"] = _idle_decode(cfg, few_rows, params, segments, counts, stacks)
    start = np.int32(0)
    one = np.int32(1)
    nowhere = np.int32(segments.slots)  # a slot that there is not: what is written there is dropped
    embeds = EMBEDS if config.embeds else None
    for name, size in sizes.items():
        tokens = np.zeros((1, size), np.int32)
        adapters = row_adapters(stacks, [0])
        to_prefill = (cfg, params, segments, tokens, embeds, nowhere, start, adapters)
        programs[f"prefill_{name}"] = Program(prefill_chunk, to_prefill, _keep_prefilled)
    for name, (function, arguments) in config.backend.slot_programs(segments, DRAFT_ROWS).items():
        programs[name] = Program(function, arguments, _keep_segments)
    bias, prompt_counts = count_prompt((), {}, cfg.vocab)
    to_count = (counts, nowhere, bias, prompt_counts)
    programs["set_token_counts"] = Program(set_token_counts, to_count, _keep_counts)
    if config.prefix_cache_bytes:
        for name, size in sizes.items():
            to_read = (segments, start, start, size)
            to_write = (segments, _empty_chunk(cfg, segments, size), nowhere, start, one)
            programs[f"read_{name}"] = Program(read_chunk, to_read, _keep_nothing)
            programs[f"write_{name}"] = Program(write_chunk, to_write, _keep_segments)
    return programs


def _idle_decode(
    cfg: ModelConfig,
    rows: int,
    params: Params,
    segments: KVSegments,
    counts: TokenCounts,
    stacks: Params | None,
) -> Program:
    """Returns the program that decodes in so many rows, of which none is in use."""
    nobody: Any = np.full(rows, -1, np.int32)
    arguments = (
        cfg,
        params,
        segments,
        counts,
        np.zeros(rows, np.int32),
        make_rows(nobody, np.zeros_like(nobody), segments.slots),
        sampling_arrays([SamplingParams()] * rows),
        make_token_masks(rows, cfg.vocab),
        np.int32(1),
        np.bool_(False),
        row_adapters(stacks, [0] * rows),
    )
    return Program(decode_slots, arguments, _keep_decoded)


def _empty_chunk(cfg: ModelConfig, segments: KVSegments, size: int) -> Any:
    """Returns a chunk of `size` positions, as `read_chunk` does: zeros, or shapes if `segments` are."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2 * cfg.layers, leaf.shape[1], size, *leaf.shape[3:]), leaf.dtype)

    _, chunk = layout.inference_shapes((), jax.tree.map(shape, segments.k[0][0]))
    if isinstance(jax.tree.leaves(segments)[0], jax.ShapeDtypeStruct):
        return chunk
    return jax.tree.map(_zeros_like, chunk)


def _zeros_like(shape: jax.ShapeDtypeStruct) -> Array:
    return jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding)


def row_adapters(stacks: Params | None, index: Any) -> RowAdapters:
    if stacks is None:
        return NO_ADAPTERS
    return RowAdapters(stacks, np.asarray(index, np.int32))


def compile_programs(programs: Mapping[str, Program]) -> Generator[tuple[str, int]]:
    """Compiles `idle_programs`, or reads them from the compilation cache; yields each name as it is
    ready, and the total.
    """
    pool = ThreadPoolExecutor(COMPILED_AT_ONCE, initializer=jax.set_mesh, initargs=(layout.current_mesh(),))

    def compile_program(program: Program) -> None:
        program.function.lower(*program.arguments).compile()

    try:
        futures = {pool.submit(compile_program, program): name for name, program in programs.items()}
        for future in as_completed(futures):
            future.result()
            yield futures[future], len(programs)
    finally:  # a caller that wants no more waits only for the programs under way
        pool.shutdown(cancel_futures=True)


def compile_ahead(cfg: ModelConfig, params: Any, config: EngineConfig) -> Iterator[tuple[str, int]]:
    """Compiles the programs of an engine, as it is iterated, from the shapes of `params` alone."""

    def empty_state() -> Any:
        return *empty_cache(cfg, config), empty_stacks(params, config)

    state = jax.eval_shape(empty_state)
    params, state_shapes = layout.inference_shapes(params, state)
    return compile_programs(idle_programs(cfg, config, params, *state_shapes))


def empty_cache(cfg: ModelConfig, config: EngineConfig) -> Cache:
    backend = config.backend

    def make() -> Cache:
        segments = backend.make_segments(cfg, config.slots, config.edges, config.kv_dtype)
        return segments, make_token_counts(cfg, config.rows)

    return backend.make_cache(make)


def empty_stacks(params: Params, config: EngineConfig) -> Params | None:
    if not config.adapters:
        return None
    return make_stacks(params, config.adapters, config.adapter_rank)


def make_rows(
    position: Any, slot: Any, slots: int, draft_writes: Iterable[tuple[int, int]] = ()
) -> CacheRows:
    """Makes the CacheRows of R rows at position (R,) int32 of slot (R,) int32.

    Row r is written to its slot, and each (row, slot) of `draft_writes` too: there is room for a
    single sequence's rows in the slots of all its copies.
    """
    R = len(position)
    target: Any = np.full(R + (1 + DRAFT_ROWS) * DRAFT_ROWS, slots, np.int32)
    source: Any = np.arange(len(target), dtype=np.int32) % R
    target[:R] = slot
    for write, (row, draft_slot) in enumerate(draft_writes, R):
        source[write] = row
        target[write] = draft_slot
    return CacheRows(position, slot, source, target)


class ModelRunner:
    """The weights, KV cache and token counts on the device, or on the mesh of the thread that makes
    them.

    `stacks`: of adapters, as `make_stacks` returns them, or None. `prefill` and `decode` take
    indices in them.
    """

    def __init__(self, cfg: ModelConfig, params: Params, config: EngineConfig) -> None:
        self.cfg = cfg
        self.config = config
        self.mesh = layout.current_mesh()
        self.params = self._device_put(params)
        self.stacks = self._device_put(empty_stacks(params, config))
        cache = layout.make_sharded_cache(lambda: empty_cache(cfg, config))
        self.segments, self.counts = self._device_put(cache)
        self.compiling: Future[Any] | None = None  # of the decoding program

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, in use or not."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.segments))

    def begin_compiling(self) -> None:
        """Traces the decoding program, and has a thread compile it, or read it from the cache,
        while a prompt is prefilled.
        """
        program = self._idle_programs()["decode"]
        lowered = program.function.lower(*program.arguments)
        self.compiling = ThreadPoolExecutor(1).submit(lowered.compile)

    def put_adapter(self, index: int, adapter: Params) -> None:
        """Puts an adapter into new stacks, at an index that no request uses. In any thread, one at a time."""
        assert self.stacks is not None
        self.stacks = self._device_put(put_adapter(self.cfg, self.stacks, index, adapter))

    def prefill(self, tokens: Any, slot: int, start: int, adapter: int) -> Array | None:
        """Writes the keys and values of tokens (1, T) int32, -1 after the last, into a slot, from
        position `start` on.

        Where the engine embeds it returns the sum of the head's input over the tokens, (1, D)
        float32.
        """
        summed, self.segments = prefill_chunk(
            self.cfg,
            self.params,
            self.segments,
            tokens,
            EMBEDS if self.config.embeds else None,
            np.int32(slot),
            np.int32(start),
            row_adapters(self.stacks, [adapter]),
        )
        return summed

    def write(self, chunk: Any, slot: int, start: int, count: int) -> None:
        """Writes a chunk of `read` into a slot, from position `start` on, with zeros after its
        first `count` positions.
        """
        self.segments = write_chunk(self.segments, chunk, np.int32(slot), np.int32(start), np.int32(count))

    def read(self, slot: int, start: int, size: int) -> Any:
        return read_chunk(self.segments, np.int32(slot), np.int32(start), size)

    def clear(self, slot: int, max_positions: int) -> None:
        """Clears a slot's segments that begin below `max_positions`."""
        self.segments = clear_slot(self.segments, np.int32(slot), np.int32(max_positions))

    def copy(self, slot: int, targets: Sequence[int], max_positions: int) -> None:
        """Copies the segments that begin below `max_positions` from a slot to at most DRAFT_ROWS others."""
        padded = np.full(DRAFT_ROWS, self.segments.slots, np.int32)  # a slot that there is not
        padded[: len(targets)] = targets
        self.segments = copy_slot(self.segments, np.int32(slot), padded, np.int32(max_positions))

    def set_counts(self, slot: int, prompt: Sequence[int], logit_bias: Mapping[int, float]) -> None:
        self.counts = set_token_counts(
            self.counts, np.int32(slot), *count_prompt(prompt, logit_bias, self.cfg.vocab)
        )

    def decode(
        self,
        token: Any,
        rows: CacheRows,
        sampling: Sequence[SamplingParams],
        masks: TokenMasks,
        steps: int,
        logprobs: bool,
        adapters: Any,
    ) -> SampledTokens:
        """Samples the `steps` tokens that follow token (R,) int32 in each row, as NumPy arrays.

        `adapters` (R,) int32. Without `logprobs` the log-probabilities stay on the device.
        """
        if self.compiling:
            self.compiling.result()
        sampled, self.segments, self.counts = decode_slots(
            self.cfg,
            self.params,
            self.segments,
            self.counts,
            token,
            rows,
            sampling_arrays(sampling),
            masks,
            np.int32(steps),
            np.bool_(logprobs),
            row_adapters(self.stacks, adapters),
        )
        # As NumPy arrays: indexing a JAX array would compile a program. `device_get` takes four
        # times as long here.
        names = ["token", "finite"]
        if logprobs:
            names += ["logprob", "top_tokens", "top_logprobs"]
        return sampled._replace(**{name: np.asarray(getattr(sampled, name)) for name in names})

    def warm(
        self,
        report: Callable[[int, int], None] | None,
        ahead: Iterable[tuple[str, int]],
        to_run_later: Collection[str],
    ) -> None:
        """Compiles every program and runs each once with no row in use, but for those
        `to_run_later`.

        A program that `ahead`, of `compile_ahead`, has compiled runs while the next is compiled.
        `report(ready, total)` counts programs.
        """
        with jax.set_mesh(self.mesh):
            # Compiled from shapes: a program that runs donates arrays while others are being
            # compiled.
            params, state = layout.inference_shapes(self.params, (self.segments, self.counts, self.stacks))
            programs = idle_programs(self.cfg, self.config, params, *state)
            pending = {*programs}
            with contextlib.closing(compile_programs(programs)) as compiled:
                for name, count in itertools.chain(ahead, compiled):
                    if name not in pending:
                        continue
                    pending.remove(name)
                    if name not in to_run_later:
                        self._run_idle(name)
                    if report:
                        report(count - len(pending), count)
                    if not pending:
                        break

    def _device_put(self, tree: Any) -> Any:
        """Puts arrays on a named device: for an unnamed one a program would be compiled once more."""
        if self.mesh:
            return tree
        return jax.device_put(tree, layout.own_device())

    def _idle_programs(self) -> dict[str, Program]:
        state = self.params, self.segments, self.counts, self.stacks
        return idle_programs(self.cfg, self.config, *state)

    def _run_idle(self, name: str) -> None:
        program = self._idle_programs()[name]
        results = program.function(*program.arguments)
        program.keep(self, results)
        jax.block_until_ready((results, self.segments))
