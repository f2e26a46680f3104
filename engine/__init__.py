"""The engine: pure functions and plain data. It reads no command line, prints nothing and ends no process; what must be said it
raises as a UserError or warns of.

The argument of the project, as folders:

    model/       the one function both paths share: (params, tokens) -> logits
    training/    forward and backward: the only code with an optimizer or a gradient
    inference/   forward only: may not import training/, changes no weight, remembers no request
    text/        bytes to batches
    storage/     what lies on disk
    counting/    what work costs, by formula and by measurement
    planning/    what a step, a run or a served model will take, before it runs

Axis letters, used in every einsum, shape comment and docstring:

    B  batch, or slots              D  model width            N  query heads
    T  tokens of this call          F  feed-forward width     K  key/value heads
    S  cache length                 V  vocabulary             G  N / K, query heads a key head
    L  layers                       R  LoRA rank, or rows     H  head width

A mask is True where a token counts or may be attended to. A path names a parameter, a rule is a
pattern on paths, a digest is the SHA-256 of weights, a key is JAX's PRNG key.
"""
