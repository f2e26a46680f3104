"""The same transformer in NumPy, with the backward pass written out: no autograd, no compiler.

Read in this order:

    layers.py    each layer forward and backward, with the derivation of its gradient
    block.py     a block forward, forward with residuals, and backward; what each residual is for
    model.py     tokens to logits, loss, and gradient; text from the forward pass alone
    adamw.py     from a gradient to new weights

`dx` is the derivative of the loss by x: it has x's shape, and says of each number in x how much the
loss rises with it. A backward function takes the derivative by its layer's result, and the
residuals that the forward pass keeps for it; it returns the derivatives by the layer's inputs and
weights. The residuals are why training needs more memory than inference, and its two products for
each one of the forward pass are why it costs three times as much.

Params, ModelConfig and every number are those of `engine/model`: tests compare the two. All is
computed in the weights' own dtype, float32 or float64. Axis letters are those of
`engine/__init__.py`.
"""

from engine.by_hand.model import forward, loss, loss_and_gradient

__all__ = ["forward", "loss", "loss_and_gradient"]
