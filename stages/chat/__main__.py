r"""Chat with a model in the terminal, turn by turn.

    python -m stages.chat --model smollm2-135m-instruct
    python -m stages.chat --model smollm2-135m-instruct --adapter runs/smollm2-135m-instruct-voice --system "Answer briefly."
    printf 'Hello\nWhat is a tide?\n' | python -m stages.chat --model smollm2-135m-instruct

A model remembers nothing between turns: each time it reads the whole conversation again, and /stats shows what that costs.
Without a terminal, every line that comes in is a turn. The conversation, each question above its answer, goes to standard
output, everything else to standard error.
"""

from collections.abc import Sequence

from engine.device import start_jax
from stages.chat.flags import ChatFlags
from stages.cli import signals
from stages.cli.command import run_command
from stages.cli.process import leave


def chat(flags: ChatFlags) -> int:
    signals.set_phase("before a turn was begun.")
    device = start_jax(flags.device, one_arena=False)
    from stages.chat.run import run  # imports JAX: only once the device is chosen

    return run(flags, device)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("chat", __doc__, ChatFlags, chat, args, one_arena=False)


if __name__ == "__main__":
    leave(main())
