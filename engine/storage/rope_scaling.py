"""The RoPE scalings known here, Llama 3's and YaRN's: read from a config.json or a GGUF file, and written to both."""

from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import UserError
from engine.model.config import Llama3Scaling, RopeScaling, YarnScaling, yarn_attention_factor
from engine.untrusted import Fields, known_name, quote, read_at

if TYPE_CHECKING:
    from engine.storage.gguf_header import Header

ORIGINAL_CONTEXT = "original_max_position_embeddings"

# config.json

LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT)
YARN_FIELDS = ("factor", ORIGINAL_CONTEXT, "attention_factor", "beta_fast", "beta_slow")
ROPE_FIELDS: dict[str, tuple[str, ...]] = {"default": (), "llama3": LLAMA3_FIELDS, "yarn": YARN_FIELDS}
# Fields of any kind, at the value that changes nothing; `truncate` is of YaRN's blended pairs.
ROPE_HARMLESS = {"partial_rotary_factor": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}


def rope_from_json(fields: Fields, context: int) -> tuple[float, RopeScaling | None]:
    """Returns theta and scaling; since transformers 5 they are both in `rope_parameters`.

    `context`: the model's, where the scaling names no original one. Raises UserError for a kind or
    a field that is not known here.
    """
    path = fields.path
    values = {"rope_theta": fields.values["rope_theta"]}
    for name in ("rope_scaling", "rope_parameters"):
        value = fields.values.get(name)
        if not isinstance(value, dict | None):
            raise UserError(f"{path}: {name} should be an object or null, not {quote(value)}.")
        values |= value or {}
    rope = Fields(values, path)
    theta = rope.number("rope_theta", float)
    stated_kind = values.get("rope_type", values.get("type", "default"))
    kind = known_name(stated_kind, ROPE_FIELDS, "rope_type", path)
    known = ("rope_type", "type", "rope_theta", *ROPE_FIELDS[kind])
    for name, value in values.items():
        is_harmless = name in ROPE_HARMLESS and value == ROPE_HARMLESS[name]
        if name not in known and not is_harmless:
            raise UserError(
                f"{path}: the rope scaling {kind!r} has a field {quote(name)} that is not known here."
            )
    if kind == "llama3":
        return theta, _llama3(rope, context)
    if kind == "yarn":
        factor = rope.number("factor", float)
        original = rope.number(ORIGINAL_CONTEXT, int, context)
        stated = rope.values.get("attention_factor")
        if stated is not None:
            stated = rope.number("attention_factor", float)
        fast_turns = rope.number("beta_fast", float, 32.0)
        slow_turns = rope.number("beta_slow", float, 1.0)
        return theta, _yarn(rope, factor, original, stated, fast_turns, slow_turns, theta)
    return theta, None


def _llama3(rope: Fields, context: int) -> Llama3Scaling:
    factor = rope.number("factor", float)
    low = rope.number("low_freq_factor", float)
    high = rope.number("high_freq_factor", float)
    original = rope.number(ORIGINAL_CONTEXT, int, context)
    if not (low < high and factor > 0 and original > 0):
        raise UserError(
            f"{rope.path}: the rope scaling needs low_freq_factor below high_freq_factor, and sizes above 0."
        )
    return Llama3Scaling(factor, low, high, original)


def _yarn(
    fields: Fields,
    factor: float,
    original: int,
    attention_factor: float | None,
    fast_turns: float,
    slow_turns: float,
    theta: float,
) -> YarnScaling:
    """`attention_factor`: None where the file leaves it to the factor."""
    if not (factor >= 1 and original > 0 and fast_turns > slow_turns > 0 and theta > 1):
        raise UserError(
            f"{fields.path}: YaRN's rope scaling needs a factor of at least 1, an original context, "
            "beta_fast above beta_slow, both above 0, and a theta above 1."
        )
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor)
    if attention_factor == 0:
        raise UserError(f"{fields.path}: YaRN's attention factor should be above 0.")
    return YarnScaling(factor, original, attention_factor, fast_turns, slow_turns)


def rope_to_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Returns the field rope_scaling of a config.json."""
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            ORIGINAL_CONTEXT: scaling.original_context,
        }
    if isinstance(scaling, YarnScaling):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            ORIGINAL_CONTEXT: scaling.original_context,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.fast_turns,
            "beta_slow": scaling.slow_turns,
        }
    return None


# GGUF: YaRN's numbers are keys, and of Llama 3's scaling there is the row of factors that it makes.

TYPE = "rope.scaling.type"
FACTOR = "rope.scaling.factor"
ORIGINAL = "rope.scaling.original_context_length"
# Beside what YaRN makes of its factor, by which llama.cpp multiplies it.
ATTENTION_FACTOR = "rope.scaling.attn_factor"
FAST_TURNS = "rope.scaling.yarn_beta_fast"
SLOW_TURNS = "rope.scaling.yarn_beta_slow"
GGUF_YARN = {TYPE, FACTOR, ORIGINAL, ATTENTION_FACTOR, FAST_TURNS, SLOW_TURNS}
# llama.cpp reads neither of a model of these families: other numbers would mean another model there.
TURNS = {FAST_TURNS: (32.0,), SLOW_TURNS: (1.0,)}
FREQUENCIES = "rope_freqs.weight"
# What these keys may hold where there is no YaRN.
GGUF_WITHOUT_YARN: dict[str, tuple[Any, ...]] = {
    TYPE: ("none",),
    FACTOR: (1.0, 0.0),
    ATTENTION_FACTOR: (1.0,),
}

# Llama 3.1's and 3.2's; a file holds only what they make of each frequency.
KNOWN_SCALINGS = [Llama3Scaling(factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0)]


def rope_from_gguf(header: "Header", fields: Fields, theta: float, context: int) -> RopeScaling | None:
    """Returns the scaling of a file. `fields`: the keys of its architecture. Raises UserError for one
    that is not known here.
    """
    if fields.values.get(TYPE) != "yarn":
        fields.check(GGUF_WITHOUT_YARN)
        return _llama3_from_factors(header, theta)
    if FREQUENCIES in header.tensors:
        raise UserError(
            f"{header.path} has both YaRN's rope scaling and {FREQUENCIES}, which is not built here."
        )
    fields.check(TURNS)
    factor = fields.number(FACTOR, float)
    attention_factor = None
    if factor >= 1:
        attention_factor = fields.number(ATTENTION_FACTOR, float, 1.0) * yarn_attention_factor(factor)
    original = fields.number(ORIGINAL, int, context)
    return _yarn(fields, factor, original, attention_factor, 32.0, 1.0, theta)


def rope_to_gguf(scaling: RopeScaling | None) -> dict[str, Any]:
    """Returns the keys of a scaling, without the architecture's prefix; Llama 3's has none."""
    if not isinstance(scaling, YarnScaling):
        return {}
    return {
        TYPE: "yarn",
        FACTOR: scaling.factor,
        ORIGINAL: scaling.original_context,
        ATTENTION_FACTOR: scaling.attention_factor / yarn_attention_factor(scaling.factor),
        FAST_TURNS: scaling.fast_turns,
        SLOW_TURNS: scaling.slow_turns,
    }


def rope_factors(scaling: Llama3Scaling, theta: float, head_dim: int) -> np.ndarray:
    """Returns the divisor of each RoPE frequency (H / 2,) float32 in Llama 3's scaling (The Llama 3
    Herd of Models, 3.4.1).
    """
    frequencies = theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    turns = scaling.original_context * frequencies / (2 * np.pi)
    blend = np.clip(
        (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0, 1.0
    )
    return (1 / (blend + (1 - blend) / scaling.factor)).astype(np.float32)


def _llama3_from_factors(header: "Header", theta: float) -> Llama3Scaling | None:
    tensor = header.tensors.get(FREQUENCIES)
    if tensor is None:
        return None
    if tensor.kind.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise UserError(f"{header.path}: {FREQUENCIES} should be a short row of float32.")
    factors = read_at(tensor.path, tensor.offset, tensor.size).view("<f4")
    if (factors == 1).all():
        return None
    for scaling in KNOWN_SCALINGS:
        if np.allclose(rope_factors(scaling, theta, 2 * len(factors)), factors, rtol=1e-3):
            return scaling
    raise UserError(
        f"{header.path}: {FREQUENCIES} is none of the RoPE scalings "
        "that Llama 3.1 and 3.2 were published with. "
        "A GGUF file does not say how it was made; the model's Hugging Face folder does, in config.json."
    )
