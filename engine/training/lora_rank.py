"""Chooses the rank of a LoRA adapter by how much its data has to teach."""

import dataclasses

from engine.counting.params import count_trainable
from engine.model.config import LoraConfig, ModelConfig
from engine.model.trainable import lora_only

LORA_RANKS = (8, 16, 32, 64)  # of an adapter whose rank nobody chose


def lora_bits(cfg: ModelConfig, lora: LoraConfig) -> int:
    """Returns how much an adapter can hold: two bits for each of its parameters (Allen-Zhu & Li
    2024, 2404.05405)."""
    return 2 * count_trainable(cfg, lora_only(cfg, lora))


def choose_rank(cfg: ModelConfig, lora: LoraConfig, bits: int) -> LoraConfig:
    """Returns `lora` with the least of LORA_RANKS whose adapter can hold so many bits, else with
    the largest.

    An adapter that can hold less than its data has to teach, about a bit for each token trained on,
    falls behind full tuning (Schulman et al. 2025, "LoRA Without Regret"). The scale alpha / rank
    stays. A rank is below each adapted matrix's own.
    """
    most = min(min(cfg.matrices[name]) for name in lora.adapted_matrices) - 1
    ranks = [rank for rank in LORA_RANKS if rank <= most] or [min(lora.rank, most)]
    configs = [dataclasses.replace(lora, rank=rank, alpha=lora.alpha / lora.rank * rank) for rank in ranks]
    return next((config for config in configs if lora_bits(cfg, config) >= bits), configs[-1])
