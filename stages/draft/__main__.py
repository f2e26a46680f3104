"""Train a draft on a model's own answers: a lone stream of it is then decoded faster, to the same tokens.

    python -m stages.draft --model smollm2-135m-instruct
    python -m stages.draft --model smollm2-135m-instruct --adapter runs/smollm2-135m-instruct-voice --max-time 5m

The model asks itself questions and answers them until the time is up. Which token follows the last one to three is counted and
saved beside the model or the adapter, where `serve`, `chat` and `generate` find it.
"""

from collections.abc import Sequence

from engine.device import start_jax
from stages.cli import signals
from stages.cli.command import run_command
from stages.cli.process import leave
from stages.draft.flags import DraftFlags


def draft(flags: DraftFlags) -> None:
    signals.set_phase("before the draft was saved.")
    device = start_jax(flags.device, one_arena=False)
    from stages.draft.run import run  # imports JAX: only once the device is chosen

    run(flags, device)


def main(args: Sequence[str] | None = None) -> int:
    return run_command("draft", __doc__, DraftFlags, draft, args, one_arena=False)


if __name__ == "__main__":
    leave(main())
