"""Fine-tune a model: change only what you mean to, on conversations or texts of your own.

    python -m stages.finetune                                LoRA of SmolLM2-135M-Instruct on the house voice
    python -m stages.finetune --data chats.jsonl --lora rank=16,alpha=32,targets=q,v
    python -m stages.finetune --freeze bottom:20             trains the top third, and an untied head
    python -m stages.finetune --train 'blocks/(28|29)/.*'    trains two blocks
    python -m stages.finetune --base int8                    LoRA over a base in int8 (QLoRA)
    python -m stages.finetune --weights q4                   trains weights as serve --weights q4 rounds them
    python -m stages.finetune --objective preference --data voice-preferences
    python -m stages.finetune --model runs/demo-shakespeare  the same on a model of your own
    python -m stages.finetune --dry-run                      what matches, what it would cost, and stop

Frozen parameters are never differentiated and stay as they are, to the bit. The same command run again
resumes where it stopped. Without --max-time and --steps it reads the data three times. Much data it
reads for three minutes, and on a slow machine for as long as 100 steps take: fewer hardly change a
tone. It ends with up to three held-out questions, answered before and after, and says when an answer
does not stop or repeats itself. It says how many of 40 general questions that the model answered right
before it still answers right.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import functools

from engine.device import start_jax
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.finetune.flags import FinetuneFlags


def finetune(flags: FinetuneFlags) -> int:
    signals.set_phase("before anything was trained.")
    device = start_jax(flags.device, connect=flags.mesh.connect)
    from stages.finetune.run import run  # imports JAX, which must be started first

    return run(flags, device)


main = functools.partial(run_command, "finetune", __doc__, FinetuneFlags, finetune)


if __name__ == "__main__":
    leave(main())
