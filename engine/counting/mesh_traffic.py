"""Bytes that a training step on a mesh exchanges, by formula: to compare with the collectives of the compiled program."""

from collections import Counter
from typing import Literal

from engine.counting.params import MATRICES, leaf_shapes
from engine.model.config import ModelConfig
from engine.sharding import MeshShape


def step_collectives(
    cfg: ModelConfig, mesh: MeshShape, batch: int, tokens: int, optimizer: Literal["adamw", "muon"] = "adamw"
) -> Counter[str]:
    """Returns kind -> bytes of the arrays that collectives make (all-reduce: take) for each device, in float32.

    For a step that trains an untied model whole, on rows that divide all devices. A matrix is gathered along `fsdp` forward
    and backward, and its gradient added up over the rows; where a gradient is cut as well, an accelerator makes one
    reduce-scatter of its all-reduce, at half the cost, and sends 16 bits of a bfloat16 weight where a CPU sends 32.
    """
    data, fsdp, tensor = mesh
    shapes, devices = leaf_shapes(cfg), mesh.devices
    stream = batch * tokens // mesh.row_shards * cfg.width  # numbers of the residual stream on a device
    size = lambda name: shapes[f"blocks/0/{name}"][0] * shapes[f"blocks/0/{name}"][1]
    block, head = sum(map(size, MATRICES)), cfg.width * cfg.vocab
    numbers: Counter[str] = Counter()
    if fsdp > 1:
        numbers["all-gather"] += (
            2 * cfg.layers * block // tensor + batch // data * tokens
        )  # the ids of all whose rows are looked up
        numbers["all-to-all"] += 2 * stream // tensor  # of the embedding, and of its gradient
    if fsdp * tensor > 1:
        numbers["all-gather"] += 2 * head
    if tensor > 1:
        numbers["all-gather"] += 2 * stream  # the embedding's result; the gradient of the head's input
        numbers["all-reduce"] += 5 * cfg.layers * stream  # out and down; backward qkv, gate and up
    if mesh.row_shards > 1:
        numbers["all-reduce"] += cfg.layers * block // tensor
    if data > 1 and fsdp * tensor > 1:  # first along the axes that cut a gradient, then its cuts along `data`
        numbers["all-reduce"] += (cfg.layers * block + head) // (fsdp * tensor)
    if devices > 1:
        numbers["all-reduce"] += head + (data > 1) * head // (fsdp * tensor)  # and the embedding's, which is cut
    if optimizer == "muon":
        for name in MATRICES:
            share = -(-cfg.layers // devices) * devices * size(name) // (fsdp * tensor)
            numbers["all-to-all"] += 2 * share * ((fsdp > 1) + (tensor > 1))
            numbers["all-gather"] += share * (data > 1)
    return Counter({kind: 4 * count for kind, count in numbers.items()})
