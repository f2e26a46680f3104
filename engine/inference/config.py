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
from engine.model.weights.block_layout import KINDS
from engine.model.weights.convert import matrices_to_blocks
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import merge_lora

WeightType = Literal["file", "q4", "int8", "bfloat16", "float32"]
BYTES_OF_8_BITS = 17 / 16  # of a weight, with its share of its block's scale
# At most, of a weight of each type.
BYTES: dict[str, float] = {
    "file": BYTES_OF_8_BITS,
    "q4": BYTES_OF_8_BITS,
    "int8": BYTES_OF_8_BITS,
    "bfloat16": 2,
    "float32": 4,
}
CHUNK = 128  # prompt tokens a call
TAIL = 32  # prompt tokens a call of a short rest
# Prompt tokens a call where an engine completes a few prompts and is gone: one program reads any prompt.
SMALL_CHUNK = 64
SMALL_SEGMENT = 256  # tokens of a segment of such an engine's KV cache
SMALL_CAPACITY = 2048  # tokens that its slots have by default even where they take more than the SHARE
SMALL_PREFIX_CACHE = 64 * 10**6  # bytes of its prefix cache
SHARE = 0.5  # of free memory that an engine takes at most by default


def largest_power_of_two_below(number: int) -> int:
    """Returns the largest power of two that is less than a number of at least 2: 4 for 5, and 4 for 8."""
    power = 1
    while 2 * power < number:
        power = 2 * power
    return power


def default_weights(backend: str) -> WeightType:
    return "file" if backend == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The options of an engine. A completion depends on its request, the model and these, to the
    bit, but not on `speculate`, `prefix_cache_bytes` and `embeds`. Make it on the mesh of its
    engine. Raises UserError.
    """

    # Requests at once.
    slots: int = 8
    # Tokens of a slot, prompt and completion; None for the model's context.
    capacity: int | None = None
    # The type of the matrices, None for the model's. "file" leaves Blocks as they are and makes the
    # others int8, which the kernels in C have in Blocks too; "q4" makes them Blocks of 4 bits.
    weights: WeightType | None = None
    # The type of the KV cache.
    kv_dtype: KVDtype = "bfloat16"
    # 0 for no prefix cache, None for what `with_capacity` chooses.
    prefix_cache_bytes: int | None = 0
    # Whether idle rows check draft tokens.
    speculate: bool = True
    # Prompt tokens a call.
    chunk: int = CHUNK
    # Prompt tokens a call of a short rest.
    tail: int = TAIL
    # Positions of the KV cache's first segment, a multiple of `chunk`; None for one chunk. The
    # kernels in C have one segment.
    segment: int | None = None
    # Whether embeddings are asked for.
    embeds: bool = False
    # Adapters at once, at most.
    adapters: int = 0
    # The largest rank of an adapter.
    adapter_rank: int = 8
    # Where the engine computes: by default as this device and mesh can.
    backend: Backend = dataclasses.field(default_factory=choose_backend)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise UserError(f"There must be at least one slot, not {self.slots}.")
        if not 0 < self.tail <= self.chunk:
            raise UserError(f"The tail must lie between 1 and the chunk of {self.chunk}, not {self.tail}.")
        if (self.segment or 0) % self.chunk:
            raise UserError(
                f"The first segment must be a multiple of the chunk of {self.chunk}, not {self.segment}."
            )
        if (self.prefix_cache_bytes or 0) < 0:
            raise UserError(
                f"prefix_cache_bytes must be 0 (no prefix cache) or more, not {self.prefix_cache_bytes}."
            )
        if self.weights not in (None, *get_args(WeightType)):
            raise UserError(
                f"weights must be one of {', '.join(get_args(WeightType))}, not {self.weights!r}."
            )
        if self.kv_dtype not in get_args(KVDtype):
            raise UserError(f"kv_dtype must be one of {', '.join(get_args(KVDtype))}, not {self.kv_dtype!r}.")

    @classmethod
    def for_prompts(
        cls, cfg: ModelConfig, prompts: Collection[tuple[int, ...]], capacity: int | None = None
    ) -> "EngineConfig":
        """Returns the options of an engine that completes these prompts at once: few programs, and
        no slot more.

        The prefix cache holds a prompt that occurs several times. The KV cache is in the compute
        dtype.
        """
        if capacity is None:
            capacity = cfg.context
        different = len(set(prompts))
        config = cls(
            slots=len(prompts),
            capacity=capacity,
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
        """Rows of the decoding program. In one slot they share it: a single sequence checks draft
        tokens without a copy.
        """
        return max(self.slots, MIN_ROWS)

    @property
    def edges(self) -> tuple[int, ...]:
        """Returns where the segments of the KV cache start, and where the last ends."""
        assert self.capacity
        return self.backend.edges(self.capacity, self.segment or self.chunk, self.chunk)

    @property
    def kept_kinds(self) -> Collection[str]:
        """The kinds of blocks of a GGUF file that stay as they are: none without a kernel, for int8 is faster."""
        if self.weights == "q4" or (self.weights in ("file", None) and self.backend.in_c):
            return KINDS
        return ()

    @property
    def dtype_of_file(self) -> str | None:
        """The dtype in which a file's matrices are read, None for the model's compute dtype: float32
        holds exactly what widening a block gives.
        """
        if self.weights == "float32":
            return "float32"
        return None

    def model_config(self, cfg: ModelConfig) -> ModelConfig:
        """Returns cfg with `weights` as the compute dtype; float32 where the kernel multiplies
        blocks: it rounds x to int8.
        """
        if self.weights in ("bfloat16", "float32"):
            return dataclasses.replace(cfg, dtype=self.weights)
        if self.weights and self.backend.in_c:
            return dataclasses.replace(cfg, dtype="float32")
        return cfg

    def prepare_params(self, cfg: ModelConfig, params: Any, whole: bool = True) -> Any:
        """Returns params as the programs use them, `whole` on one device: adapters merged, and
        rounded for file, int8 and q4.

        Weights of 8 bits become blocks where the kernel multiplies, else Int8, because XLA is slow
        to unpack blocks.
        """
        if self.weights == "q4":
            params = matrices_to_blocks(params, "Q4_0")
        elif self.weights in ("int8", "file") and whole and self.backend.in_c:
            params = matrices_to_blocks(params, "Q8_0")
        if self.weights in ("int8", "file", "q4"):
            params = quantize(merge_lora(params, cfg.dtype))
        return prepare_params(cfg, params, whole)

    def with_capacity(self, cfg: ModelConfig, free: int) -> "EngineConfig":
        """Returns this config with a capacity: its own, else the model's context.

        Where `bytes` of that are more than a SHARE of the `free` ones, it is the largest power of two
        below for which they are not, but at least SMALL_CAPACITY.

        A prefix cache of the default size holds a slot's text, and at least SMALL_PREFIX_CACHE.
        """
        capacity = self.capacity
        if not capacity:
            capacity = cfg.context
            while capacity > SMALL_CAPACITY and self.bytes(cfg, capacity) > SHARE * free:
                capacity = largest_power_of_two_below(capacity)
        prefix = self.prefix_cache_bytes
        if prefix is None:
            prefix = max(SMALL_PREFIX_CACHE, self.slot_bytes(cfg, capacity))
        return dataclasses.replace(self, capacity=capacity, prefix_cache_bytes=prefix)

    def bytes(self, cfg: ModelConfig, capacity: int) -> int:
        """Returns the bytes of weights, adapters, slots of so many tokens, and prefix cache, by
        default one slot more.
        """
        slot = self.slot_bytes(cfg, capacity)
        prefix = self.prefix_cache_bytes
        if prefix is None:
            prefix = slot
        parameters = count_params(cfg).total
        if self.adapters:
            stacked = self.adapters + 1  # the first for rows without an adapter
            rows_and_columns = cfg.layers * sum(map(sum, cfg.matrices.values()))
            parameters += stacked * self.adapter_rank * rows_and_columns
        return self.slots * slot + prefix + int(parameters * BYTES[self.weights or cfg.dtype])

    def slot_bytes(self, cfg: ModelConfig, capacity: int) -> int:
        ends = segment_edges(capacity, capacity, self.chunk)
        segments = jax.eval_shape(lambda: make_kv_segments(cfg, 1, ends, self.kv_dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(segments))
