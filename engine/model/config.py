"""ModelConfig, LoraConfig and presets of known architectures. Configs are frozen, hashable, and check themselves."""

import dataclasses
import math
import re
from typing import TYPE_CHECKING, Any, Literal

from engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# of a block, in the order of the forward pass
MATRICES = ("q", "k", "v", "out", "gate", "up", "down")
# those that read the same input, and their name side by side
JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling of RoPE frequencies (The Llama 3 Herd of Models, 2407.21783, section 3.4.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN's scaling of RoPE frequencies and of attention (Peng et al. 2023, 2309.00071, section 3.4).

    Pairs that turn `fast_turns` times or more within the original context stay as they are, those
    that turn `slow_turns` times or less turn `factor` times slower.
    """

    factor: float
    original_context: int
    attention_factor: float  # cos and sin are multiplied by it
    fast_turns: float = 32.0
    slow_turns: float = 1.0

    @property
    def context(self) -> int:
        """Tokens that the model can attend to by this scaling."""
        return int(self.original_context * self.factor)

    def blended_pairs(self, head_dim: int, theta: float) -> tuple[float, float]:
        """Returns the last pair that stays as it is and the first that is slowed in full.

        Between the two the blend is linear in the pair's index, as in the authors' program; the
        paper has it linear in the pair's turns.
        """
        first = math.floor(self._pair_of(self.fast_turns, head_dim, theta))
        last = math.ceil(self._pair_of(self.slow_turns, head_dim, theta))
        first = max(first, 0)
        last = min(last, head_dim - 1)
        return first, max(last, first + 0.001)  # a step where the two are one

    def _pair_of(self, turns: float, head_dim: int, theta: float) -> float:
        """Returns the index of the pair that turns so often within the original context: pair i turns
        by theta ** (-2 i / H) a position.
        """
        return head_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


RopeScaling = Llama3Scaling | YarnScaling


def yarn_attention_factor(factor: float) -> float:
    """Returns by how much YaRN multiplies cos and sin where a model does not say it (2309.00071,
    equation 22).
    """
    return 0.1 * math.log(factor) + 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    With `qkv_bias` it is Qwen2's block, with `qk_norm` Qwen3's. Products are computed in `dtype`;
    weights in training are float32. `scan` compiles one block and loops over it (compile time);
    `remat='block'`, gradient checkpointing, saves each block's input and recomputes the rest in the
    backward pass (memory). Neither changes what is computed. Raises UserError when the numbers do
    not describe a model.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    ff: int
    context: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width / heads
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    eps: float = 1e-5
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    scan: bool = False
    remat: Literal["none", "block"] = "none"

    def __post_init__(self) -> None:
        for name in ("vocab", "width", "layers", "heads", "ff", "context", "kv_heads", "head_dim"):
            value = getattr(self, name)
            least = 0 if name in ("kv_heads", "head_dim") else 1
            if type(value) is not int or value < least:
                raise UserError(f"ModelConfig: {name} must be an integer of at least {least}, not {value!r}.")
        for name in ("rope_theta", "eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"ModelConfig: {name} must be above 0, not {getattr(self, name)!r}.")
        if self.kv_heads == 0:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.head_dim == 0:
            if self.width % self.heads:
                raise UserError(
                    f"ModelConfig: width {self.width} is not a multiple of heads {self.heads}; "
                    "give head_dim, or another width."
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.heads % self.kv_heads:
            raise UserError(
                f"ModelConfig: {self.heads} query heads cannot share {self.kv_heads} key heads evenly."
            )
        if self.head_dim % 2:
            raise UserError(
                f"ModelConfig: head_dim {self.head_dim} is odd; RoPE turns pairs, so it must be even."
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise UserError(f"ModelConfig: dtype must be 'bfloat16' or 'float32', not {self.dtype!r}.")
        if self.remat not in ("none", "block"):
            raise UserError(f"ModelConfig: remat must be 'none' or 'block', not {self.remat!r}.")

    @property
    def groups(self) -> int:
        """G: query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def qkv_width(self) -> int:
        """Columns of a token's queries, keys and values: (N + 2K) H."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def head_path(self) -> str:
        """The path of the matrix that makes logits: (D, V), or the embedding (V, D) where the two
        are tied.
        """
        return "embed" if self.tied else "head"

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The shape (in, out) of each matrix of a block, in the order of the forward pass."""
        D = self.width
        F = self.ff
        queries = self.heads * self.head_dim
        keys = self.kv_heads * self.head_dim
        return {
            "q": (D, queries),
            "k": (D, keys),
            "v": (D, keys),
            "out": (queries, D),
            "gate": (D, F),
            "up": (D, F),
            "down": (F, D),
        }

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelConfig":
        """Returns the config of a `to_json` dict. Raises UserError naming a field that is unknown
        or missing.
        """
        scaling = fields.get("rope_scaling")
        if scaling:
            kind = YarnScaling if "attention_factor" in scaling else Llama3Scaling
            fields = fields | {"rope_scaling": _from_fields(kind, scaling)}
        return _from_fields(cls, fields)

    def architecture_differences(self, other: "ModelConfig") -> list[str]:
        """Returns the fields in which two configs describe different weights."""
        of_computation = {"dtype", "scan", "remat", "context"}
        names = [field.name for field in dataclasses.fields(self) if field.name not in of_computation]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter: a LoRA pair of `rank` on the targets in every block, added with the factor alpha
    / rank.

    Targets are q, k, v, out (or o), gate, up, down, or all. Raises UserError for a target, rank or
    alpha that cannot be.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("all",)

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"A LoRA rank must be at least 1, not {self.rank!r}.")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"A LoRA alpha must be above 0 and finite, not {self.alpha!r}.")
        known = ", ".join(MATRICES)
        for name in self.targets:
            if name not in (*MATRICES, "o", "all"):
                raise UserError(
                    f"LoRA adapts {known}, or all; there is no target {name!r}.{did_you_mean(name, MATRICES)}"
                )
        if not self.targets:
            raise UserError(f"LoRA needs at least one target: {known}, or all.")

    @property
    def adapted_matrices(self) -> tuple[str, ...]:
        """The names of MATRICES that are adapted, in that order; `all` is every one, `o` is `out`."""
        names = set(self.targets)
        if "o" in names:
            names.add("out")
        if "all" in names:
            return MATRICES
        return tuple(name for name in MATRICES if name in names)

    def __str__(self) -> str:
        alpha = repr(self.alpha).removesuffix(".0")
        return f"rank={self.rank},alpha={alpha},targets={','.join(self.targets)}"

    @classmethod
    def from_text(cls, text: str) -> "LoraConfig":
        """Reads a str of one, in which each of the three may be left out; alpha is then twice the
        rank. Raises ValueError.
        """

        def wrong() -> ValueError:
            known = f"each once (targets: {', '.join(MATRICES)}, or all)"
            return ValueError(f"wanted rank=8,alpha=16,targets=q,v, {known}, got {text!r}")

        fields: dict[str, str] = {}
        # at the commas before a name and =, for those between targets are part of a value
        for pair in re.split(r",(?=\w*=)", text.replace(" ", "").strip(",")):
            if not pair:
                continue
            name, _, value = pair.partition("=")
            if name in fields:
                raise wrong()
            fields[name] = value
        try:
            rank = int(fields.pop("rank", "8"))
            targets = fields.pop("targets", "all").split(",")
            alpha = float(fields.pop("alpha", 2 * rank))
        except ValueError:
            raise wrong() from None
        if fields:
            raise wrong()
        return cls(rank, alpha, tuple(targets))


def _from_fields[T: DataclassInstance](kind: type[T], fields: dict[str, Any]) -> T:
    """Returns kind(**fields). Raises UserError naming a field that `kind` does not know or that it needs."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise UserError(f"{kind.__name__} has no field {name!r}.{did_you_mean(name, list(known))}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise UserError(f"{kind.__name__} needs the field {name!r}, and it is not there.")
    return kind(**fields)


_LLAMA3 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)

# Those of published models are from their own config.json.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab=256, width=32, layers=2, heads=4, ff=88, context=64, kv_heads=2, qk_norm=True, tied=True
    ),
    "demo": ModelConfig(vocab=2048, width=192, layers=3, heads=3, ff=512, context=256, qk_norm=True),
    "nano": ModelConfig(vocab=4096, width=384, layers=6, heads=6, ff=1024, context=256, qk_norm=True),
    "gpt2-124m": ModelConfig(
        vocab=50304, width=768, layers=12, heads=12, ff=2048, context=1024, qk_norm=True, tied=True
    ),
    "smollm2-135m": ModelConfig(
        vocab=49152,
        width=576,
        layers=30,
        heads=9,
        ff=1536,
        context=8192,
        kv_heads=3,
        rope_theta=1e5,
        tied=True,
    ),
    "smollm2-360m": ModelConfig(
        vocab=49152,
        width=960,
        layers=32,
        heads=15,
        ff=2560,
        context=8192,
        kv_heads=5,
        rope_theta=1e5,
        tied=True,
    ),
    "smollm2-1.7b": ModelConfig(
        vocab=49152, width=2048, layers=24, heads=32, ff=8192, context=8192, rope_theta=1.3e5, tied=True
    ),
    "tinyllama-1.1b": ModelConfig(
        vocab=32000, width=2048, layers=22, heads=32, ff=5632, context=2048, kv_heads=4
    ),
    "llama-2-7b": ModelConfig(vocab=32000, width=4096, layers=32, heads=32, ff=11008, context=4096),
    "llama-3.2-1b": ModelConfig(
        vocab=128256,
        width=2048,
        layers=16,
        heads=32,
        ff=8192,
        context=131072,
        kv_heads=8,
        head_dim=64,
        rope_theta=5e5,
        rope_scaling=_LLAMA3,
        tied=True,
    ),
    "llama-3.2-3b": ModelConfig(
        vocab=128256,
        width=3072,
        layers=28,
        heads=24,
        ff=8192,
        context=131072,
        kv_heads=8,
        head_dim=128,
        rope_theta=5e5,
        rope_scaling=_LLAMA3,
        tied=True,
    ),
    "mistral-7b-v0.3": ModelConfig(
        vocab=32768,
        width=4096,
        layers=32,
        heads=32,
        ff=14336,
        context=32768,
        kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
    ),
    "qwen2.5-0.5b": ModelConfig(
        vocab=151936,
        width=896,
        layers=24,
        heads=14,
        ff=4864,
        context=32768,
        kv_heads=2,
        rope_theta=1e6,
        eps=1e-6,
        tied=True,
        qkv_bias=True,
    ),
    "qwen3-0.6b": ModelConfig(
        vocab=151936,
        width=1024,
        layers=28,
        heads=16,
        ff=3072,
        context=40960,
        kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        eps=1e-6,
        tied=True,
        qk_norm=True,
    ),
}


def preset(name: str) -> ModelConfig:
    if name not in PRESETS:
        raise UserError(
            f"There is no preset {name!r}.{did_you_mean(name, list(PRESETS))} Known: {', '.join(PRESETS)}."
        )
    return PRESETS[name]
