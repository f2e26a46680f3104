"""Train a model by reinforcement: it samples completions, a rule rewards them, GRPO updates weights.

    python -m stages.reinforce                                    SmolLM2-135M-Instruct answers in 12 words
    python -m stages.reinforce --task yes-no --max-tokens 16      to begin with Yes or No
    python -m stages.reinforce --task 'regex:^(A|An|The) ' --max-tokens 24  to begin as a pattern says
    python -m stages.reinforce --task sum --max-tokens 24         to add
    python -m stages.reinforce --task my_rewards.py:score '0.2*length:12'  a function of your own, and a rule
    python -m stages.reinforce --model runs/tiny-python --train all --task length:4
    python -m stages.reinforce --dry-run                          what a round would take, and stop

Each round has two halves, and the screen shows both: in the first, inference samples several
completions of each prompt and changes no weight; in the second, training makes those rewarded above the
others more probable (GRPO). A KL penalty and a second reward, both by the model before training, keep
answers sane. The same command run again resumes where it stopped.
"""

from stages.cli.start import start_command

if __name__ == "__main__":
    start_command()

import functools

from engine.device import start_jax
from engine.mesh.processes import refuse_cluster
from stages.cli import signals
from stages.cli.command import leave, run_command
from stages.reinforce.flags import ReinforceFlags


def reinforce(flags: ReinforceFlags) -> int:
    signals.set_phase("before anything was trained.")
    device = start_jax(flags.device, connect=lambda: refuse_cluster("Reinforcement learning"))
    from stages.reinforce.run import run  # imports JAX, which must be started first

    return run(flags, device)


main = functools.partial(run_command, "reinforce", __doc__, ReinforceFlags, reinforce)


if __name__ == "__main__":
    leave(main())
