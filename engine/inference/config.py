"""EngineConfig: the options of an inference engine."""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal, get_args

import jax

from engine.counting.params import count_params
from engine.errors import UserError
from engine.inference.backend import MIN_ROWS, Backend, choose_backend
from engine.inference.decode import prepare_params
from engine.model.cache.segmented import KVDtype, make_kv_segments, segment_edges
from engine.model.config import ModelConfig
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import merge_lora
from engine.model.weights.matmul import matrices_to_blocks

Weights = Literal["file", "q4", "int8", "bfloat16", "float32"]
# Of a weight at most, and a block's scale.
BYTES: dict[str, float] = {"file": 17 / 16, "q4": 17 / 16, "int8": 17 / 16, "bfloat16": 2, "float32": 4}
CHUNK, TAIL = 128, 32  # prompt tokens a call: of a whole chunk, and of a short rest
SMALL_CHUNK, SMALL_SEGMENT = 64, 256  # where an engine completes a few prompts and is gone: one program reads any prompt
SMALL_CAPACITY = 2048  # tokens that a slot has by default even where they take more than the SHARE
SMALL_PREFIX_CACHE = 64 * 10**6  # bytes
SHARE = 0.5  # of free memory that an engine takes at most by default


def default_weights(backend: str) -> Weights:
    return "file" if backend == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The options of an engine. A completion depends on its request, the model and these, to the bit, but not on `speculate`,
    `prefix_cache_bytes` and `embeds`.

    slots: requests at once. capacity: tokens of a slot, prompt and completion; None for the model's context. weights: the type
    of the matrices, None for the model's; "file" leaves Blocks as they are and makes the others int8, which the kernels in C
    have in Blocks too; "q4" makes them Blocks of 4 bits. kv_dtype: of the KV cache. prefix_cache_bytes: 0 for none, None for
    what `with_capacity` chooses. speculate: whether idle rows check draft tokens. chunk: prompt tokens a call; tail: of a short
    rest. segment: positions of the KV cache's first segment, a multiple of chunk; None for one chunk; the kernels in C have one
    segment. embeds: whether embeddings are asked for. adapters: the most at once, of at most adapter_rank. Raises UserError.
    """

    slots: int = 8
    capacity: int | None = None
    weights: Weights | None = None
    kv_dtype: KVDtype = "bfloat16"
    prefix_cache_bytes: int | None = 0
    speculate: bool = True
    chunk: int = CHUNK
    tail: int = TAIL
    segment: int | None = None
    embeds: bool = False
    adapters: int = 0
    adapter_rank: int = 8

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UserError(f"There must be at least one slot, not {self.slots}.")
        if not 0 < self.tail <= self.chunk:
            raise UserError(f"The tail must lie between 1 and the chunk of {self.chunk}, not {self.tail}.")
        if (self.segment or 0) % self.chunk:
            raise UserError(f"The first segment must be a multiple of the chunk of {self.chunk}, not {self.segment}.")
        if (self.prefix_cache_bytes or 0) < 0:
            raise UserError(f"prefix_cache_bytes must be 0 (no prefix cache) or more, not {self.prefix_cache_bytes}.")
        if self.kv_dtype not in get_args(KVDtype):
            raise UserError(f"kv_dtype must be one of {', '.join(get_args(KVDtype))}, not {self.kv_dtype!r}.")

    @classmethod
    def for_prompts(cls, cfg: ModelConfig, prompts: Collection[tuple[int, ...]], capacity: int | None = None) -> "EngineConfig":
        """Returns the options of an engine that completes these prompts at once: few programs, and no slot more.

        The prefix cache holds a prompt that occurs several times. The KV cache is in the compute dtype.
        """
        capacity, different = cfg.context if capacity is None else capacity, len(set(prompts))
        config = cls(
            len(prompts),
            capacity,
            kv_dtype=cfg.dtype,
            chunk=SMALL_CHUNK,
            tail=SMALL_CHUNK,
            segment=SMALL_SEGMENT,
            speculate=len(prompts) == 1,
        )
        if different == len(prompts):
            return config
        return dataclasses.replace(config, prefix_cache_bytes=different * config.slot_bytes(cfg, capacity))

    @property
    def rows(self) -> int:
        """Rows of the decoding program. In one slot they share it: a single sequence checks draft tokens without a copy."""
        return max(self.slots, MIN_ROWS)

    def edges(self, backend: Backend) -> tuple[int, ...]:
        """Returns where the segments of the KV cache start, and where the last ends."""
        assert self.capacity
        return backend.edges(self.capacity, self.segment or self.chunk, self.chunk)

    @property
    def keeps_blocks(self) -> bool:
        """Whether the blocks of a GGUF file stay as they are: without a kernel int8 is faster."""
        return self.weights == "q4" or (self.weights == "file" and choose_backend().in_c)

    def model_config(self, cfg: ModelConfig) -> ModelConfig:
        """Returns cfg with `weights` as the compute dtype; float32 where the kernel multiplies blocks: it rounds x to int8."""
        if self.weights in ("bfloat16", "float32"):
            return dataclasses.replace(cfg, dtype=self.weights)
        return dataclasses.replace(cfg, dtype="float32") if self.weights and choose_backend().in_c else cfg

    def prepare_params(self, cfg: ModelConfig, params: Any, whole: bool = True) -> Any:
        """Returns params as the programs use them, `whole` on one device: adapters merged, and rounded for file, int8 and q4.

        Weights of 8 bits become blocks where the kernel multiplies, else Int8, because XLA is slow to unpack blocks.
        """
        if self.weights in ("int8", "file", "q4"):
            if self.weights == "q4" or (whole and choose_backend().in_c):
                params = matrices_to_blocks(params, "Q4_0" if self.weights == "q4" else "Q8_0")
            params = quantize(merge_lora(params, cfg.dtype))
        return prepare_params(cfg, params, whole)

    def with_capacity(self, cfg: ModelConfig, free: int) -> "EngineConfig":
        """Returns this config with a capacity: its own, else the model's context, or, where `bytes` are more than a SHARE of
        the `free` ones, the largest power of two for which they are not, but at least SMALL_CAPACITY.

        A prefix cache of the default size holds a slot's text, and at least SMALL_PREFIX_CACHE.
        """
        capacity, prefix = self.capacity or cfg.context, self.prefix_cache_bytes
        while not self.capacity and capacity > SMALL_CAPACITY and self.bytes(cfg, capacity) > SHARE * free:
            capacity = 1 << (capacity - 1).bit_length() - 1
        if prefix is None:
            prefix = max(SMALL_PREFIX_CACHE, self.slot_bytes(cfg, capacity))
        return dataclasses.replace(self, capacity=capacity, prefix_cache_bytes=prefix)

    def bytes(self, cfg: ModelConfig, capacity: int) -> int:
        """Returns the bytes of weights, adapters, slots of so many tokens, and prefix cache, by default one slot more."""
        slot = self.slot_bytes(cfg, capacity)
        prefix = slot if self.prefix_cache_bytes is None else self.prefix_cache_bytes
        parameters = count_params(cfg).total
        if self.adapters:
            parameters += (self.adapters + 1) * self.adapter_rank * cfg.layers * sum(map(sum, cfg.matrices.values()))
        return self.slots * slot + prefix + int(parameters * BYTES[self.weights or cfg.dtype])

    def slot_bytes(self, cfg: ModelConfig, capacity: int) -> int:
        ends = segment_edges(capacity, capacity, self.chunk)
        segments = jax.eval_shape(lambda: make_kv_segments(cfg, 1, ends, self.kv_dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(segments))
