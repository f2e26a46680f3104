"""system_fingerprint, of OpenAI's API: one name for all that can change a completion, beside the request."""

import hashlib
import importlib.metadata
import json
import os
from typing import Any

from engine.counting.hardware import machine_identity
from engine.inference.slots import Slots

LIBRARIES = ("thrice", "jaxlib", "numpy", "tokenizers", "jinja2")  # `machine_identity` has JAX's version


def system_fingerprint(digest: str, slots: Slots, **text: Any) -> str:
    """Returns `fp_` and 16 digits of a SHA-256. `digest`: of the weights as served. `text`: how text becomes tokens, is
    sampled by default, and ends.

    The prefix cache and speculative decoding are not in it: they change no bit.
    """
    facts = {
        "weights": digest, "config": repr(slots.cfg), "shapes": [slots.slots, slots.capacity, slots.chunk, slots.tail],
        "kv": slots.kv_dtype, "devices": slots.devices, "machine": machine_identity(), "flags": os.environ.get("XLA_FLAGS"),
        "versions": [importlib.metadata.version(name) for name in LIBRARIES], **text,
    }  # fmt: skip
    return "fp_" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
