"""What XLA says about a program: its operations and bytes before or after compiling, and the memory it will take.

A third opinion beside the formulas and the walker, with faults that are its own:

- The body of a loop counts once, however often it runs: a scan over 8 layers reports an eighth of their work. Ask about
  a program without loops (`cfg.scan` false, one microbatch, one decoding step).
- A call into a library counts as -1 operation, whatever it does. On the CPU of JAX 0.12 products do not hide there: those
  given to YNNPACK are fusions whose inside is counted.
- Fusion repeats elementwise work where that is cheaper than keeping it, and a type the chip lacks (bfloat16 on a CPU) is
  converted to and fro; both count. After compiling, elementwise work is therefore the program's and not the model's.
- Remat may be undone where the compiler sees that two computations are one.
- Bytes are summed over the operations as if each read its operands from memory anew. A gather counts its whole table.
"""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class XlaCost:
    """Of one call of a program, as XLA prices it."""

    flops: int  # products and elementwise arithmetic
    transcendentals: int  # exp, rsqrt, ...: numbers made, not operations
    bytes_accessed: int


def xla_cost(program: jax.stages.Lowered | jax.stages.Compiled) -> XlaCost:
    """The cost analysis of a lowered program (what was asked for) or a compiled one (what will run)."""
    found = program.cost_analysis() or {}
    return XlaCost(*(round(found.get(name, 0)) for name in ("flops", "transcendentals", "bytes accessed")))


def xla_peak(program: jax.stages.Compiled) -> int:
    """The most bytes a compiled program takes while it runs. Raises RuntimeError on a backend that does not say."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError(f"The {jax.default_backend()} backend does not say what memory a program takes.")
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes  # of the output, what takes the place of a donated argument
