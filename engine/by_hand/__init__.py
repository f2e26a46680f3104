"""The same transformer in NumPy, with the backward pass written out: no autograd, no compiler, nothing hidden.

Read in this order:

    layers.py    each layer forward and, below it, backward, with the derivation of its gradient
    block.py     a block three times: forward alone, forward that keeps, backward; and what is kept for what
    model.py     tokens to logits, loss, and gradient
    adamw.py     from a gradient to new weights
    generate.py  text from the forward pass alone

In all of them `dx` is the derivative of the loss by x: it has x's shape, and says of each number in x how much the loss
rises as that number does. A backward function takes the derivative by its layer's result and gives those by its layer's
inputs and weights; what else it takes is what the forward pass had to keep for it. That list of arguments is why training
needs more memory than inference, and its two products where forward has one are why it costs three times as much.

Params and ModelConfig are those of `engine/model`, and so is every number: tests hold the two together. All is computed
in the weights' own dtype, float32 or float64. Axis letters are those of `engine/__init__.py`.
"""

from engine.by_hand.model import forward, loss, loss_and_gradient

__all__ = ["forward", "loss", "loss_and_gradient"]
