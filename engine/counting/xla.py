"""XLA's own analysis of a program: operations and peak memory.

Its known faults:

- The body of a loop counts once, however often it runs: a scan over 8 layers reports an eighth of their work. Ask about
  a program without loops (no `cfg.scan`, one microbatch, one decoding step).
- A call into a library counts as -1 operation. On the CPU of JAX 0.12 products given to YNNPACK are fusions, which are
  counted.
- After compiling, elementwise work that fusion repeats, and conversions to and from a type the chip lacks (bfloat16 on a
  CPU), count.
- The compiler may undo remat where it sees that two computations are one.
"""

import jax


def xla_flops(program: jax.stages.Lowered | jax.stages.Compiled) -> int:
    """Returns XLA's operations of a call of a lowered program (as traced) or a compiled one (as it runs): products and
    elementwise arithmetic, without transcendental functions."""
    return round((program.cost_analysis() or {}).get("flops", 0))


def xla_peak(program: jax.stages.Compiled) -> int:
    """Returns a compiled program's peak bytes. Raises RuntimeError on a backend that does not know them."""
    memory = program.memory_analysis()
    if memory is None:
        raise RuntimeError(f"The {jax.default_backend()} backend does not say what memory a program takes.")
    total = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return total - memory.alias_size_in_bytes  # outputs that reuse donated arguments


class CompileCounter:
    """Counts in `count` the programs compiled or fetched from the compilation cache since `reset`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def reset(self) -> None:
        self.count = 0
