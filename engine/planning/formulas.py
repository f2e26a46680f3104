"""Plans training and serving on devices that need not be here: seconds, memory and device-hours, by formula.

Arguments m are a model and a method of training it, made by `bench.plan.model.job`. Arguments d are
a device, made by `bench.plan.fits.device_numbers`. All others are numbers in FLOP, bytes, seconds,
tokens and dollars. `bench.plan.page` writes this file out as JavaScript, so that a browser computes
the same. So it holds only what can be translated word for word: assignments, arithmetic, ifs and
calls.
"""

from math import exp, floor, log10
from typing import Any

Numbers = dict[str, float]

SHARE = 0.9  # of a device's memory that a program gets
# a trained parameter: weight and gradient in 16 bits, master weight and two moments in 32
# (1910.02054)
STATE_BYTES = 16
UPDATE_BYTES = 28  # that AdamW moves for a parameter: four numbers of 32 bits read, three written
LOSS_ROWS = 1024  # of logits that exist at once


def efficiency(d: Any, params: float, devices: float, recompute: float) -> float:
    """Returns the share of the peak that a run uses over all its device-hours, by the regression of
    `fits.py`.
    """
    on_one_node = 0
    if devices <= 8:
        on_one_node = d.node
    return min(0.9, exp(d.base + on_one_node + d.size * log10(params / 1e10) + d.repeated * recompute))


def bytes_a_device(m: Any, devices: float, recompute: float) -> float:
    """Returns the bytes on each of the devices. Each holds an equal share of the training state, and
    trains on one text at a time.
    """
    state = (m.frozen * m.frozen_bytes + m.trained * STATE_BYTES) / devices
    gathered = 0
    if devices > 1:
        # The whole weights of two layers, 2 bytes a number: those of the layer that computes, and those
        # of the next one, which are fetched meanwhile.
        gathered = 4 * (m.frozen + m.trained) / m.layers
    if recompute:
        # The activations of one layer, and the input of each, 2 bytes a number.
        kept = m.kept + 2 * m.width * m.layers
    else:
        kept = m.kept * m.layers
    # Each logit is 4 bytes, and its gradient 2.
    return state + gathered + m.context * kept + min(m.context, LOSS_ROWS) * m.vocab * 6


def training(m: Any, d: Any, tokens: float, devices: float, sampling: float) -> Numbers:
    """Returns the estimates for a training run, each without its interval. The run computes
    activations again where the devices cannot hold them.

    `sampling`: device-seconds to generate a token that is then trained on.
    """
    recompute = 0
    if bytes_a_device(m, devices, 0) > SHARE * d.memory:
        recompute = 1
    share = efficiency(d, m.params, devices, recompute)
    products = tokens * m.flops / (devices * d.peak * share)
    updates = tokens / m.step_tokens * m.trained * UPDATE_BYTES / (devices * d.bandwidth)
    generated = tokens * sampling / devices
    # Weights come twice for each text of a device, and gradients go once, 2 bytes a number.
    sent = tokens / (devices * m.context) * (4 * m.frozen + 6 * m.trained) * (devices - 1) / devices
    if devices <= d.together:
        network = d.near
    else:
        network = d.far
    exchanges = 0
    if network > 0:
        exchanges = sent / network
    seconds = products + updates + generated
    return {
        "flops": tokens * m.flops,
        "recompute": recompute,
        "needed": bytes_a_device(m, devices, recompute),
        "least": bytes_a_device(m, devices, 1),
        "efficiency": share,
        "products": products,
        "updates": updates,
        "generated": generated,
        "exchanges": exchanges,
        "seconds": seconds,
        "device_hours": seconds * devices / 3600,
    }


def flop_rate(d: Any, bits: float) -> float:
    """Returns the FLOPs a second of a device's peak, for weights of so many bits."""
    if bits == 8:
        return d.eight
    return d.peak


def serving(
    m: Any,
    d: Any,
    bits: float,
    kv_bits: float,
    devices: float,
    slots: float,
    prompt: float,
    answer: float,
    cached: float,
) -> Numbers:
    """Returns the estimates for one replica of a served model, which uses all the devices; each
    without its interval. It runs as many requests at once as fit into memory, at most `slots`.

    A step reads the weights once and each request's keys and values, multiplies, and starts each
    layer's kernels: the times add up. Prefill needs no head: the first token's logits are a step's.
    Requests are half through their answers, in a cache of pages. `cached`: the share of a prompt
    that the prefix cache holds.
    """
    weights = m.params * bits / 8
    cache = 2 * m.layers * m.kv_width * kv_bits / 8
    length = prompt + answer / 2
    room = SHARE * d.memory * devices - weights
    fitting = floor(room / (length * cache))
    batch = max(1, min(slots, fitting))
    flow = devices * d.bandwidth * d.bandwidth_use
    speed = devices * flop_rate(d, bits) * d.compute_use
    computed = prompt * (1 - cached)
    blocks = m.matmul - m.vocab * m.width
    prefill = computed * (2 * blocks + 4 * m.layers * m.query_width * (prompt - computed / 2)) / speed
    reading = weights / flow
    attending = batch * length * cache / flow
    multiplying = batch * (2 * m.matmul + 4 * m.layers * m.query_width * length) / speed
    launching = m.layers * d.layer_seconds
    step = reading + attending + multiplying + launching
    period = batch * prefill + answer * step
    fits = 0
    if room >= (prompt + answer) * cache:
        fits = 1
    return {
        "fits": fits,
        "batch": batch,
        "needed": (weights + batch * length * cache) / devices,
        "first_token": prefill + step,
        "token_seconds": period / answer,
        "requests": batch / period,
        "tokens": batch * answer / period,
        "prefilling": batch * prefill / answer,
        "reading": reading,
        "attending": attending,
        "multiplying": multiplying,
        "launching": launching,
    }


def longer_prompt(
    m: Any, d: Any, bits: float, kv_bits: float, extra: float, prompt: float, answer: float
) -> Numbers:
    """Returns the device-seconds that `extra` tokens before a prompt add to a request, computed
    each time or found cached.

    Either way each generated token attends to them.
    """
    speed = flop_rate(d, bits) * d.compute_use
    reading = 2 * m.layers * m.kv_width * kv_bits / 8 / (d.bandwidth * d.bandwidth_use)
    attending = answer * extra * (reading + 4 * m.layers * m.query_width / speed)
    blocks = m.matmul - m.vocab * m.width
    computing = extra * (2 * blocks + 2 * m.layers * m.query_width * (extra + 2 * prompt)) / speed
    return {"cached": attending, "computed": computing + attending}


def optimal(flops: float, a: float, b: float, alpha: float, beta: float) -> float:
    """Returns the parameters of least loss a / N^alpha + b / D^beta with 6 N D = flops (2203.15556,
    equation 4).
    """
    return (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
