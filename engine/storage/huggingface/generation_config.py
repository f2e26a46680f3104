"""Reads and writes the recommended sampling in a generation_config.json: its values, unchecked, by SamplingParams' names."""

from collections.abc import Mapping
from typing import Any

NAMES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def read_sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recommended sampling: greedy where `do_sample` is false, whatever stands beside it."""
    greedy = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None} if values.get("do_sample") is False else {}
    return {name: value for name in NAMES if (value := {**values, **greedy}.get(name)) is not None}


def write_sampling(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields from which `read_sampling` reads the same, and transformers too."""
    return {"do_sample": sampling.get("temperature") != 0, **sampling} if sampling else {}
