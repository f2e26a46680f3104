"""Bill: what a request has cost the machine, in FLOPs, seconds, dollars and training steps."""

import msgspec


class Cost(msgspec.Struct):
    """`flop`: of its own tokens, the same in any company. `seconds`: its share of the engine's time."""

    flop: int
    seconds: float


class Bill(msgspec.Struct):
    """What a request has cost: prompt and completion together, and each alone.

    `dollars`: at the price of the machine, null where the server does not know it.
    `training_steps`: as many steps of training this model on 2,048 tokens take as many FLOPs.
    """

    flop: int
    seconds: float
    dollars: float | None
    training_steps: float
    prompt: Cost
    completion: Cost


def make_bill(prompt: Cost, completion: Cost, price: float | None, step_flops: int) -> Bill:
    """Returns the bill of a request. `price`: of the machine, dollars an hour. `step_flops`: as of
    `training_step_flops`.
    """
    flop = prompt.flop + completion.flop
    seconds = prompt.seconds + completion.seconds
    dollars = None
    if price is not None:
        dollars = price * seconds / 3600
    return Bill(flop, seconds, dollars, flop / step_flops, prompt, completion)
