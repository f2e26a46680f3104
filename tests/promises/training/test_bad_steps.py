"""T6: a step whose loss, gradient, update or data is not finite changes nothing, and never does later."""

import itertools

import pytest
from figures import exactly
from tiny_training import bits

from engine.storage import checkpoint
from stages.runs.loop import REFUSED_IN_A_ROW

STEPS, FIRST = 20, 3
# Runs before the command: the batches of steps BAD begin with a negative token, by which the loss or the gradient is corrupted;
# after each step a line has the digests of weights and optimizer.
PATCH = """
import jax, jax.numpy as jnp, optax
from engine.storage.digest import digest
from engine.text.batch import TextBatches
from engine.training import step
from stages.runs import stage as training_steps
at, loss, make = TextBatches.at, step.NEXT_TOKEN.summed_loss, training_steps.make_optimizer
run = training_steps.TrainingSteps.run
def noted(self, state, loop_state):
    state, refused = run(self, state, loop_state)
    with open("{file}", "a") as file:
        print(digest(state.trainable), digest(state.opt_state), file=file)
    return state, refused
training_steps.TrainingSteps.run = noted
def marked(self, number, *rows):
    batch = at(self, number, *rows)
    tokens = batch.tokens.copy()
    tokens[0, 0] = -1 if number in {bad} and "{place}" != "update" else tokens[0, 0]
    return batch._replace(tokens=tokens)
def corrupted_loss(cfg, params, batch):
    bad = jnp.where(batch.tokens[0, 0] < 0, 1.0, 0.0)
    batch = batch._replace(tokens=jnp.maximum(batch.tokens, 0))
    value, embed = {value}, params["embed"]
    if "{place}" == "data":
        params = params | dict(embed=embed.at[batch.tokens[0, 1]].set(jnp.where(bad, value, embed[batch.tokens[0, 1]])))
    whole = loss(cfg, params, batch)
    if "{place}" == "loss":
        whole = jnp.where(bad, value, whole)
    if "{place}" == "gradient":
        x = embed.sum()
        slope = jnp.sqrt(jnp.where(bad, 0.0, 1.0) * x**2) if value != value else x * value
        whole += bad * (slope - jax.lax.stop_gradient(slope))
    return whole
def make_faulty_optimizer(config):
    tx = make(config)
    def update(gradient, state, params=None, *, progress, dtype):
        updates, state = tx.update(gradient, state, params, progress=progress, dtype=dtype)
        bad = sum(jnp.abs(progress * {steps} - number) < 0.1 for number in {bad}) > 0
        return jax.tree.map(lambda x: jnp.where(bad, {value}, x), updates), state
    return optax.GradientTransformationExtraArgs(tx.init, update)
TextBatches.at = marked
object.__setattr__(step.NEXT_TOKEN, "summed_loss", corrupted_loss)
if "{place}" == "update":
    training_steps.make_optimizer = make_faulty_optimizer
"""
KINDS = [("loss", "jnp.nan"), ("gradient", "jnp.nan"), ("gradient", "1e30"), ("update", "jnp.inf"), ("data", "jnp.nan")]


@pytest.mark.promises(
    "T6", "a step that is not finite changes no weight and no moment, then or later; many in a row end the run"
)
def test_steps_that_are_not_finite(make_run, side_by_side, quick, expect):
    """Two bad steps in a run, and so many in a row that it ends; by AdamW and Muon."""
    length = ("--steps", STEPS, "--save-every", STEPS, "--log-every", 1, "--eval-every", STEPS)
    cases = list(itertools.product(KINDS, ("muon", "adamw"), (2, 99)))
    cases = cases[::7] if quick else cases

    def inject_faults(half: int) -> list[str]:
        wrong = []
        for (place, value), optimizer, count in cases[half::2]:
            bad = tuple(range(FIRST, FIRST + count))
            run = make_run("--optimizer", optimizer, server=half, length=length)
            file = run.work.with_suffix(".states")
            code = run.live(patch=PATCH.format(place=place, value=value, bad=bad, steps=STEPS, file=file))
            text, states = run.output.read_text(), [line.split() for line in file.read_text().splitlines()]
            refused = 2 if count == 2 else REFUSED_IN_A_ROW
            after = states[FIRST : FIRST + refused]  # as many as are refused
            different = [state for state in states if state != states[FIRST - 1]]
            ok = after == refused * [states[FIRST - 1]] and "Traceback" not in text
            ok = ok and bits(run.folder)["params"] == states[-1][0] and len({*map(tuple, different)}) == len(different)
            if count == 2:
                ok = ok and code == 0 and run.rows()[-1]["refused"] == 2 and len(different) == STEPS - 3
            else:
                ok = ok and code == 2 and f"{REFUSED_IN_A_ROW} steps in a row had a loss or gradient" in text
                ok = ok and checkpoint.steps(run.folder) == [FIRST]
            if not ok:
                wrong.append(f"{place} {value} {optimizer} {count}: {code}, {len(different)} other states, {text[-400:]}")
        return wrong

    wrong = [*itertools.chain(*side_by_side(inject_faults, (0, 1)))]
    print(*wrong, sep="\n")
    kinds = ", ".join(dict.fromkeys(place for (place, _), _, _ in cases))
    expect(exactly("runs in which one changed something or passed", len(wrong), 0), over=f"{len(cases)} runs; {kinds}")
