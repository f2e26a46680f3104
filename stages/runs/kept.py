"""What a run that changes a given model keeps in its folder beside weights, and how it goes on from there."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from engine import format as words
from engine.storage import checkpoint
from engine.text.chat import Chat
from engine.training.optimizer import make_optimizer
from engine.training.step import TrainState, init_state
from engine.storage.loaded_model import LoadedModel
from engine.storage.run_folder import save_tokenizer
from stages.runs import state as resume
from stages.cli.console import Console
from stages.runs.trainable import Learner, TuningPlan
from stages.runs.loop import LoopState

if TYPE_CHECKING:
    from stages.finetune.flags import Finetune
    from stages.reinforce.flags import Reinforce


def restore(before: resume.PreviousRun | None, learner: Learner, plan: TuningPlan, console: Console) -> tuple[TrainState, LoopState]:
    """The state to learn on from, and what the run remembers: new, or from the newest sound checkpoint, said aloud."""
    # The step donates its state; what the run began with stays to be compared with.
    state = init_state(make_optimizer(plan.recipe.optimizer), jax.tree.map(jnp.copy, learner.trainable))
    if before is None:
        return state, LoopState()
    with console.task("loading the checkpoint"):
        like = jax.eval_shape(lambda: (learner.kept(state.trainable), state.opt_state))
        loaded = checkpoint.load(before.folder, None, *like)
    past = resume.loop_state_of(loaded.state)
    for line in loaded.damaged:
        console.print(f"damaged: {line}", style="yellow")
    if loaded.damaged:
        for path in checkpoint.set_aside(before.folder, past.step):
            console.print(f"set aside: {path}", style="yellow")
    console.print(f"resumed at step {past.step:,}, {words.duration(past.seconds)} into training")
    return TrainState(jnp.int32(past.step), learner.of(loaded.params), loaded.optimizer), past


def keep_words(folder: Path, model: LoadedModel, chat: Chat) -> None:
    """What makes the run read and end text as the model does."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.config = tokenizer.config | {"chat_template": chat.source}
    ends = model.ends if chat.end is None else tuple(dict.fromkeys((*model.ends, chat.end)))
    save_tokenizer(folder, tokenizer, ends)


def lasting(given: str) -> str:
    """The model's name, or its path from the root, so that the run finds it again from any folder."""
    place = Path(given).expanduser()
    return str(place.absolute()) if place.exists() else given


def learns(given: "Finetune | Reinforce") -> str:
    """What learns, in words that say whether a run may go on."""
    wanted = given.learns
    if given.adapter:
        return f"{given.adapter}{' over int8' if wanted.base == 'int8' else ''}"
    return str(f"train {' '.join(wanted.train) or 'all'} freeze {' '.join(wanted.freeze)}".strip())
