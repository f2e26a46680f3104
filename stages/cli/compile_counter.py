"""Counts the programs that JAX compiles. The one file here that imports JAX: import it once JAX is started."""

import jax


class CompileCounter:
    """Counts in `count` the programs compiled or fetched from the compilation cache since `reset`."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"

    def reset(self) -> None:
        self.count = 0
