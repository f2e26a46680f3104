"""The model of a plan: a preset, a file, a run folder or a number of parameters; and what a method costs."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.counting.flops import train_flops
from engine.counting.params import count_params, count_trainable
from engine.errors import UserError, did_you_mean
from engine.format import in_words
from engine.model.config import PRESETS, LoraConfig, ModelConfig, preset
from engine.model.trainable import all_trainable, lora_only
from engine.training.freeze import select_trainable

METHODS = ("pretrain", "full", "freeze:K", "lora:R", "qlora:R", "preference", "rl")
PRETRAINING_STEP = 2**19  # tokens
TUNING_STEP = 2**15  # tokens


def read_model(model: str | None, params: float | None) -> tuple[str, ModelConfig]:
    """Returns a model's name and architecture. Raises UserError for a file that cannot be read, or
    a name that is unknown.
    """
    if params is not None:
        return f"a Llama of {in_words(params)} parameters", config_of_size(params)
    if model is None:
        raise UserError(
            "Say which model: --model NAME, config.json, FILE.gguf or a run folder; or --params 8e9."
        )
    if model.removesuffix("-instruct") in PRESETS:
        return model, preset(model.removesuffix("-instruct"))
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"There is no model {model!r}: neither a file, nor a folder with a config.json, "
            f"nor one of {', '.join(PRESETS)}.{did_you_mean(model, list(PRESETS))}"
        )
    if path.suffix == ".gguf":  # this and what follows imports NumPy
        from engine.storage.architectures import config_from_gguf
        from engine.storage.gguf_header import read_model_header
        from engine.storage.gguf_parts import without_part

        return without_part(path.name), config_from_gguf(read_model_header(path))
    from engine.storage.architectures import config_from_json
    from engine.untrusted import read_json_object

    fields = read_json_object(path)
    folder = path.resolve().parent.name
    if "vocab" in fields:  # a run's own config
        return folder, ModelConfig.from_json(fields)
    return folder, config_from_json(fields, path)


def config_of_size(params: float) -> ModelConfig:
    """Returns a Llama of about so many parameters: 128 times as wide as deep, heads of 128. Raises
    UserError out of range.
    """
    if not 1e7 <= params <= 1e14:
        raise UserError(f"--params must be from 1e7 to 1e14, such as 8e9, not {params:g}.")
    if params > 1e9:
        vocab = 128_256
    elif params > 2e8:
        vocab = 32_000
    else:
        vocab = 2048
    depth = max(1, math.floor((params / (12 * 128**2)) ** (1 / 3)))
    kv_heads = depth // 8 if depth % 8 == 0 else depth
    width = 128 * depth
    attention = 2 * 128 * depth * 128 * (depth + kv_heads)
    ff = max(width, round((params - 2 * vocab * width - depth * attention) / (3 * depth * width)))
    return ModelConfig(vocab, width, depth, depth, ff, 131_072, kv_heads, 128)


def job(cfg: ModelConfig, method: str, context: int, step_tokens: float = 0) -> Any:
    """Returns what the formulas take of a model and a method of training it on texts of `context`.

    Raises UserError for a method that is none of METHODS, a block or rank that cannot be, and a
    context beyond the model's.
    """
    if context > cfg.context:
        raise UserError(f"--context {context} is beyond the {cfg.context} tokens of the model.")
    name, _, number = method.partition(":")
    takes_number = name in ("freeze", "lora", "qlora")
    if name not in {known.partition(":")[0] for known in METHODS} or (
        number and not (takes_number and number.isdigit())
    ):
        raise UserError(
            f"--method is {', '.join(METHODS)}, with numbers for K and R, "
            f"not {method!r}.{did_you_mean(name, METHODS)}"
        )
    trainable = all_trainable(cfg)
    if name == "freeze":
        trainable, _ = select_trainable(cfg, freeze=[f"bottom:{number or cfg.layers // 2}"])
    elif takes_number:
        trainable = lora_only(cfg, LoraConfig(rank=int(number or 16)))
        least = min(map(min, cfg.matrices.values()))
        if trainable.rank > least:
            raise UserError(
                f"The rank of --method {method} must be at most {least}, "
                "the least side of this model's matrices."
            )
    count = count_params(cfg)
    trained_params = count_trainable(cfg, trainable)
    frozen_params = count.total
    if not trainable.adapted:
        frozen_params -= trained_params
    flops = train_flops(cfg, context, attention="causal", trainable=trainable).by_pass
    has_reference = name in ("preference", "rl")  # the model before training reads the same tokens
    query = cfg.heads * cfg.head_dim
    key = cfg.kv_heads * cfg.head_dim
    # Residuals of a token in a block, in 16 bits, with fused attention; the last part only a
    # weight's gradient reads.
    residual_bytes = 4 * (cfg.width + query + key + cfg.ff)
    if trained_params > frozen_params / 4:
        residual_bytes += 2 * (2 * cfg.width + cfg.ff)
    flops_per_token = flops.total
    if has_reference:
        flops_per_token += flops.forward
        frozen_params += count.total
    if not step_tokens and name == "pretrain":
        step_tokens = PRETRAINING_STEP
    elif not step_tokens:
        step_tokens = TUNING_STEP
    return SimpleNamespace(
        params=count.total,
        matmul=count.matmul,
        layers=cfg.layers,
        width=cfg.width,
        query_width=query,
        kv_width=key,
        vocab=cfg.vocab,
        context=context,
        kept=residual_bytes,
        flops=flops_per_token,
        trained=trained_params,
        frozen=frozen_params,
        frozen_bytes=0.5625 if name == "qlora" else 2,
        step_tokens=step_tokens,
    )
