"""Bytes that a training step on a mesh exchanges, by formula: to compare with the collectives of the compiled program."""

from collections import Counter
from typing import Literal

from engine.counting.params import MATRICES, leaf_shapes
from engine.mesh_shape import MeshShape
from engine.model.config import LoraConfig, ModelConfig


def step_collectives(
    cfg: ModelConfig,
    mesh: MeshShape,
    batch: int,
    tokens: int,
    optimizer: Literal["adamw", "muon"] = "adamw",
    microbatches: int = 1,
    lora: LoraConfig | None = None,
    matrix_bytes: int = 4,
) -> Counter[str]:
    """Returns kind -> bytes of the arrays that collectives make (all-reduce: take) for each device, in float32.

    For a step on rows that divide all devices, which trains an untied model whole, or the pairs of `lora`, merged with their
    base; a number of the matrices has `matrix_bytes` where it is gathered: 1 in an int8 base. Each microbatch gathers a
    matrix along `fsdp` forward, backward and for remat of its block, and adds its gradient up over the rows; where a gradient
    is cut as well, an accelerator makes one reduce-scatter of its all-reduce, at half the cost, and sends 16 bits of a
    bfloat16 weight where a CPU sends 32.
    """
    data, fsdp, tensor = mesh
    shapes, devices = leaf_shapes(cfg), mesh.devices
    stream = batch * tokens // mesh.row_shards * cfg.width  # numbers of the residual stream on a device
    size = lambda name: shapes[f"blocks/0/{name}"][0] * shapes[f"blocks/0/{name}"][1]
    block, head = sum(map(size, MATRICES)), cfg.width * cfg.vocab
    again = cfg.remat == "block"  # all of a block but `down`, of which backward needs no result
    weights: Counter[str] = Counter()  # in each microbatch: weights and gradients
    numbers: Counter[str] = Counter()  # others, in a step
    matrices = 0  # gathered in each microbatch
    if fsdp > 1:
        passes = cfg.layers * (2 * block + again * (block - size("down")))
        matrices += (passes - (lora is not None) * size("qkv")) // tensor  # the lowest input has no gradient
        numbers["all-gather"] += batch // data * tokens  # the ids of all whose rows are looked up
        numbers["all-to-all"] += (1 if lora else 2) * stream // tensor  # of the embedding, and of its gradient
    if fsdp * tensor > 1:
        matrices += 2 * head
    if tensor > 1:
        numbers["all-gather"] += 2 * stream  # the embedding's result; the gradient of the head's input
        # Of out and down; backward of qkv, gate and up. With pairs gate and up are one, and the lowest qkv has none.
        sums = 4 * cfg.layers - 1 if lora else 5 * cfg.layers
        numbers["all-reduce"] += (sums + again * cfg.layers) * stream
    if lora:
        weights += _pair_numbers(cfg, mesh, lora)
        inner = sum(name in lora.adapted_parts for name in ("out", "down"))  # x a, for the gradient of b
        numbers["all-reduce"] += (tensor > 1) * inner * cfg.layers * lora.rank * stream // cfg.width
    else:
        weights["all-reduce"] += (mesh.row_shards > 1) * cfg.layers * block // tensor
        if data > 1 and fsdp * tensor > 1:  # first along the axes that cut a gradient, then its cuts along `data`
            weights["all-reduce"] += (cfg.layers * block + head) // (fsdp * tensor)
        if devices > 1:
            weights["all-reduce"] += head + (data > 1) * head // (fsdp * tensor)  # and the embedding's, which is cut
        if optimizer == "muon":
            for name in MATRICES:
                share = -(-cfg.layers // devices) * devices * size(name) // (fsdp * tensor)
                numbers["all-to-all"] += 2 * share * ((fsdp > 1) + (tensor > 1))
                numbers["all-gather"] += share * (data > 1)
    exchanged = {kind: 4 * (numbers[kind] + microbatches * weights[kind]) for kind in (numbers | weights)}
    return Counter(exchanged) + Counter({"all-gather": matrix_bytes * microbatches * matrices})


def _pair_numbers(cfg: ModelConfig, mesh: MeshShape, lora: LoraConfig) -> Counter[str]:
    """Returns kind -> numbers of all pairs, gathered, and of their gradients, added up over the rows."""
    numbers: Counter[str] = Counter()
    for name, parts in cfg.parts.items():
        widths = [stop - start for part, (start, stop) in parts.items() if part in lora.adapted_parts]
        a, b = leaf_shapes(cfg)[f"blocks/0/{name}"][0] * lora.rank * len(widths), lora.rank * sum(widths)
        by_columns = name in ("qkv", "gate_up")
        whole, cut = (a, b // mesh.tensor) if by_columns else (b, a // mesh.tensor)  # on a tensor axis
        numbers["all-gather"] += cfg.layers * ((mesh.fsdp * mesh.tensor > 1) * whole + (mesh.fsdp > 1) * cut)
        numbers["all-reduce"] += cfg.layers * (mesh.row_shards > 1) * (whole + cut)
        numbers["all-reduce"] += cfg.layers * (mesh.tensor > 1) * by_columns * whole  # over the columns, which devices share
    return numbers
