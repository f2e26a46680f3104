"""The engine: pure functions and plain data. It prints nothing, parses nothing and owns no loop.

The argument of the project, as folders:

    model/       the one function both paths share: (params, tokens) -> logits
    training/    forward and backward: the only code with an optimizer or a gradient
    inference/   forward only: may not import training/, changes no weight, remembers no request
    text/        bytes to batches
    storage/     what lies on disk
    counting/    what work costs, by formula and by measurement

Axis letters, used in every einsum, shape comment and docstring:

    B  batch, or slots              D  model width            N  query heads
    T  tokens of this call          F  feed-forward width     K  key/value heads
    S  cache length                 V  vocabulary             G  N / K, query heads a key head
    L  layers                       R  LoRA rank              H  head width

Nouns: params, tokens, targets, mask (True: counts, or may attend), positions, segments, logits, cache, prefill, decode,
step, batch, microbatch, path (of a parameter), rule (about paths), trainable, frozen, adapter, slot, request, prompt,
completion, key (PRNG), schedule, digest (of weights), TTFT, MFU, MBU. Verbs: init, make, load, save, add, merge, quantize,
measure.
"""
