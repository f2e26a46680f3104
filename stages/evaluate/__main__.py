"""Evaluate a model: bits per byte on a whole text by a sliding window, or nats per token on conversations.

    python -m stages.evaluate                               the newest finished run, on what it was validated on
    python -m stages.evaluate --model runs/demo-shakespeare --data book.txt
    python -m stages.evaluate --model smollm2-135m-instruct --data voice-held-out
    python -m stages.evaluate --mesh fsdp=4                 a model that one device cannot hold

Of a text, every token but the first is scored once, after at least half a window of it. Of conversations, only what the
assistant says is scored. Of a fine-tuned run, its held-out set, and the general text that measures forgetting, are set
beside what was measured before fine-tuning.
"""

from collections.abc import Sequence

from engine.device import start_jax
from stages.cli import signals
from stages.cli.command import run_command
from stages.cli.process import leave
from stages.evaluate.flags import EvaluateFlags


def evaluate(flags: EvaluateFlags) -> None:
    signals.set_phase("before the evaluation was done.")
    device = start_jax(flags.device, connect=flags.mesh.connect)
    from stages.evaluate.run import run  # imports JAX: only once the device is chosen

    run(flags, device)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("evaluate", __doc__, EvaluateFlags, evaluate, args)


if __name__ == "__main__":
    leave(main())
