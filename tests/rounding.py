"""How far two right computations may be apart, because they add in another order: tolerances that no processor decides."""

import math
from collections.abc import Sequence

FLOAT32 = 2.0**-24  # the unit roundoff: a rounded number is off by at most so much of itself


def sums_apart(*lengths: int, unit: float = FLOAT32) -> float:
    """Returns how far a number that comes out of sums of these lengths, one after another, may be
    off in another order.

    It is a share of a typical such number. n terms of size t and either sign have partial sums of
    about t sqrt(i), and a sum of about t sqrt(n). Each of the n additions rounds by up to `unit` of
    its partial sum, up as often as down, so the errors add up by their squares: unit t sqrt(1 + 2 +
    ... + n), which is less than unit t n, or unit sqrt(n) of the sum. (n unit is the bound where
    all round in one direction: Higham, Accuracy and Stability of Numerical Algorithms, section
    4.2.) Sums whose results are the terms of the next add their errors by the squares too: unit
    sqrt(n + m + ...). Both orders round, hence twice.

    Blocks and wide registers, by which processors differ, make shorter partial sums: a sum in order
    is the worst.
    """
    return 2 * unit * math.sqrt(sum(lengths))


def norm_gain(vectors: int, size: int) -> float:
    """Returns by how much normalizing may enlarge a share of error: for the smallest of so many
    vectors of `size` numbers.

    A vector that happens to be r times as long as a typical one keeps its absolute error and is
    scaled by 1 / r, and so is its gradient. Of normal numbers a share of about r ** size of the
    vectors is as short, so the shortest has r = vectors ** (-1 / size): 1 / 8 for 4,608 heads of 4
    numbers, 1 / 1.4 for 768 rows of 20.
    """
    return vectors ** (1 / size)


def losses_apart(losses: Sequence[float], share: float) -> float:
    """Returns how far the losses of a run with AdamW may be apart, in nats.

    `share`: `sums_apart` of a loss and of the gradients. A loss is off by that share of itself, and
    by what the weights are off (`adam_apart`): an update that is off by share s / |g| of the
    learning rate changes the loss by |g| times that, so share s of it, whatever g is. A right step
    lowers the loss by about |g| times the rate for each weight; so all steps together are off by
    about that share of what the run has gained.
    """
    return share * (losses[0] + losses[0] - min(losses))


def adam_apart(rate: float, steps: int, share: float) -> float:
    """Returns how far the weights of a matrix may be apart on average, after steps of AdamW at
    learning rates up to `rate`.

    `share`: `sums_apart` of its gradient. Adam divides a gradient by its own size. Where a gradient
    g happens to be small beside those of its neighbours, of size s, an error of share s turns the
    update by share s / |g| of `rate`, at most by 2. The density of |g| near 0 is below 1 / s, so
    the average over a matrix is below the integral of min(2, share s / g) / s from 0 to s, which is
    share (1 + ln(2 / share)). The steps add up at worst.

    The largest difference has no such bound: a gradient of 0 but for rounding moves its weight by
    `rate` in either direction.
    """
    return rate * steps * share * (1 + math.log(2 / share))
