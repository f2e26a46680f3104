"""FLOPs of a request by formula: what its own tokens cost, whoever is served beside it.

A token costs its products with the weights, and attention to each key that it meets, its own
included. What a program computes beside that is no request's: idle rows, and places that a mask
hides.
"""

from collections.abc import Mapping
from typing import NamedTuple

from engine.counting.flops import PassFlops, forward_flops, train_flops
from engine.model.config import JOINED, ModelConfig

# The training step that a request is compared with.
STEP_ROWS = 8
STEP_CONTEXT = 256  # tokens a row


def training_step_flops(cfg: ModelConfig) -> int:
    """Returns the FLOPs of a step that trains all weights on STEP_ROWS rows of STEP_CONTEXT tokens, as
    `stages.train` counts them.
    """
    return train_flops(cfg, STEP_CONTEXT, attention="full").total * STEP_ROWS * STEP_CONTEXT


def prefilled_parts(cfg: ModelConfig, parts: Mapping[str, PassFlops]) -> dict[str, PassFlops]:
    """Returns what prefilling computes of a forward pass, by component: its last layer ends with keys
    and values, and no logits are wanted.

    `parts`: of the whole pass, each a sum over all layers.
    """
    prefilled = {}
    for name, part in parts.items():
        layers = cfg.layers
        if name not in JOINED["qkv"]:
            layers -= 1
        prefilled[name] = PassFlops(part.forward // cfg.layers * layers)
    return prefilled | {"head": PassFlops()}


class TokenFlops(NamedTuple):
    """FLOPs of a token: its products with the weights, and attention to one key."""

    products: int
    key: int

    @classmethod
    def of(cls, parts: Mapping[str, PassFlops]) -> "TokenFlops":
        """`parts`: of a forward pass of one token, which meets itself alone."""
        products = sum(part.forward for name, part in parts.items() if name != "attention")
        return cls(products, parts["attention"].forward)

    def at(self, start: int, stop: int) -> int:
        """Returns the FLOPs of the tokens at positions from `start` up to but not `stop`: the one at
        position p meets p + 1 keys.
        """
        keys = (stop * (stop + 1) - start * (start + 1)) // 2
        return (stop - start) * self.products + keys * self.key


class RequestFlops:
    """FLOPs of the tokens of one model's requests, by their positions in the text.

    `adapter_rank`: of the adapters that requests may name, as they are stacked.
    """

    def __init__(self, cfg: ModelConfig, adapter_rank: int = 0) -> None:
        base = forward_flops(cfg, 1, attention="full").parts
        adapted = dict(base)
        for name, (rows, columns) in cfg.matrices.items():
            pair = 2 * adapter_rank * (rows + columns) * cfg.layers
            adapted[name] += PassFlops(pair)
        self._decoded = {}
        self._prefilled = {}
        self._embedded = {}
        for is_adapted, parts in ((False, base), (True, adapted)):
            self._decoded[is_adapted] = TokenFlops.of(parts)
            self._prefilled[is_adapted] = TokenFlops.of(prefilled_parts(cfg, parts))
            self._embedded[is_adapted] = TokenFlops.of(parts | {"head": PassFlops()})

    def decoded(self, start: int, stop: int, is_adapted: bool = False) -> int:
        """Returns the FLOPs of decoding after each of the tokens at positions from `start` up to but
        not `stop`.
        """
        return self._decoded[is_adapted].at(start, stop)

    def prefilled(self, start: int, stop: int, is_adapted: bool = False) -> int:
        """Returns the FLOPs of prefilling the tokens at these positions."""
        return self._prefilled[is_adapted].at(start, stop)

    def embedded(self, start: int, stop: int, is_adapted: bool = False) -> int:
        """Returns the FLOPs of reading the tokens at these positions for their embedding: every layer
        is computed to its end.
        """
        return self._embedded[is_adapted].at(start, stop)

    def idle_decoded(self, rows: int) -> int:
        """Returns the FLOPs of rows that nobody uses: they attend to nothing."""
        return rows * self._decoded[False].products

    def idle_prefilled(self, rows: int, is_embedded: bool) -> int:
        """Returns the same of a prompt's padding."""
        tokens = self._embedded if is_embedded else self._prefilled
        return rows * tokens[False].products
