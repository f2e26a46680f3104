"""The policy gradient: nothing to learn where all are rewarded alike, the formula elsewhere, and reward that rises; rewards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import UserError
from engine.model.transformer import forward, init_params
from engine.text.batch import Batch
from engine.training.optimizer import OptimizerConfig, make_optimizer
from engine.training.reinforce import (
    LONGEST,
    PolicyBatch,
    group_advantages,
    grpo,
    log_probabilities,
    make_reward,
    sum_reward,
)
from engine.training.step import init_state, loss_and_gradient, train_step
from tests.tiny import assert_near, text_batch, tiny_config

B, T = 4, 7
differentiate = jax.jit(loss_and_gradient, static_argnums=(0, 4, 5))
ADVANTAGE = np.array([1.0, -0.5, 2.0, -1.5], np.float32)


def random_batch(seed: int) -> Batch:
    return text_batch(
        seed, B, T, np.arange(T) >= np.array([[2], [3], [2], [5]])
    )  # prompts of different lengths


def formula(cfg, params, rollouts: PolicyBatch, clip: float, pull: float) -> jax.Array:
    """Token by token, as it is written."""
    batch = rollouts.batch
    table = jax.nn.log_softmax(forward(cfg, params, batch.tokens, batch.positions)[0])
    new = jnp.take_along_axis(table, batch.targets[..., None], -1)[..., 0]
    ratio, advantage = jnp.exp(new - rollouts.old_logprobs), rollouts.advantage[:, None]
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)
    q = jnp.exp(rollouts.reference_logprobs - new)
    each = ((gain - pull * (q - jnp.log(q) - 1)) * batch.mask).sum(1) / batch.mask.sum(1)
    return -each.mean()


rewards = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 1.0, -3.0, 1e6]), min_size=3, max_size=3), min_size=1, max_size=4
)


@given(rewards)
def test_advantages_are_standard_scores_within_a_group(rewards):
    advantages = np.asarray(group_advantages(np.array(rewards, np.float32)))
    for row, given_ in zip(advantages, rewards):
        if len(set(given_)) == 1:
            assert (row == 0).all()
        else:
            assert abs(row.mean()) < 1e-3
            assert abs(row.std() - 1) < 1e-3
            assert (np.argsort(row, kind="stable") == np.argsort(given_, kind="stable")).all()


def test_a_second_reward_counts_only_where_the_first_differs():
    """Alone it would come to full size: completions that a rule rewards alike would be trained for
    the second.
    """
    rewards, second = (
        np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]]),
        np.array([[-0.3, 0.0, -0.1], [-0.3, 0.0, -0.1]]),
    )
    advantages = np.asarray(group_advantages(rewards, second))
    assert (advantages[0] == 0).all()
    np.testing.assert_allclose(advantages[1], np.asarray(group_advantages(rewards + second))[1], rtol=1e-5)
    assert advantages[1, 0] < advantages[1, 2] < 0 < advantages[1, 1]


def test_without_an_advantage_there_is_no_gradient(cfg, params):
    advantage = group_advantages(np.ones((1, B), np.float32))[0]
    _, gradient = differentiate(cfg, params, {}, PolicyBatch(random_batch(0), advantage), 1, grpo())
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))
    _, gradient = differentiate(cfg, params, {}, PolicyBatch(random_batch(0), ADVANTAGE), 1, grpo())
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.law("gradients")
def test_loss_and_gradient_are_the_papers(cfg, params):
    """With old probabilities on both sides of the clip, and a reference to be pulled towards."""
    batch = random_batch(0)
    own = np.asarray(log_probabilities(cfg, params, batch))
    assert (own[~batch.mask] == 0).all()
    rng = np.random.default_rng(1)
    noise = lambda size: (size * rng.standard_normal((B, T))).astype(np.float32)
    rollouts = PolicyBatch(batch, ADVANTAGE, own + noise(0.3), own + noise(0.5))
    ratio = np.exp(own - rollouts.old_logprobs)[batch.mask]
    assert (ratio < 0.8).any()
    assert (ratio > 1.2).any()
    expected, reference = jax.jit(jax.value_and_grad(lambda p: formula(cfg, p, rollouts, 0.2, 0.3)))(params)
    for microbatches in (1, 2):
        loss, gradient = differentiate(cfg, params, {}, rollouts, microbatches, grpo(0.2, 0.3))
        np.testing.assert_allclose(loss, expected, rtol=1e-4)
        assert_near(gradient, reference, 1e-4)


def test_on_its_own_samples_the_first_step_is_the_plain_policy_gradient(cfg, params):
    batch = random_batch(0)
    old = log_probabilities(cfg, params, batch)
    gradient = differentiate(cfg, params, {}, PolicyBatch(batch, ADVANTAGE), 1, grpo())[1]
    other = differentiate(cfg, params, {}, PolicyBatch(batch, ADVANTAGE, old), 1, grpo())[1]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1 + np.abs(b).max())), gradient, other
    )


def test_rewarded_tokens_are_sampled_more_often():
    """Tokens below 10 are rewarded; sampled uniformly at first, mostly them after some steps."""
    cfg = tiny_config()
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    tx = make_optimizer(OptimizerConfig(learning_rate=0.02, weight_decay=0.0, warmup=0.0))
    state = init_state(tx, params)
    batch, draw = (
        random_batch(0),
        jax.jit(
            lambda params, key: jax.random.categorical(
                key, forward(cfg, params, batch.tokens, batch.positions)[0]
            )
        ),
    )
    shares = []
    for step in range(40):
        targets = np.asarray(draw(state.trainable, jax.random.key(step)))
        rewarded = (targets < 10) & batch.mask
        shares.append(rewarded.sum() / batch.mask.sum())
        rewards = rewarded.sum(1) / batch.mask.sum(1)
        rollouts = PolicyBatch(batch._replace(targets=targets), group_advantages(rewards[None])[0])
        state, metrics = train_step(cfg, tx, state, {}, rollouts, jnp.float32(0.2), 1, grpo())
    assert int(metrics.tokens) == B
    assert np.mean(shares[:5]) < 0.45
    assert np.mean(shares[-5:]) > np.mean(shares[:5]) + 0.3


def test_a_token_gains_nothing_beyond_the_clip(cfg, params):
    batch = random_batch(0)
    new = log_probabilities(cfg, params, batch)
    rollouts = PolicyBatch(batch, np.abs(ADVANTAGE), np.asarray(new) - np.log(1.25).astype(np.float32))
    loss = lambda clip: float(loss_and_gradient(cfg, params, {}, rollouts, 1, grpo(clip))[0])
    advantage = np.abs(ADVANTAGE).mean()
    assert loss(0.2) == pytest.approx(-1.2 * advantage, rel=1e-5)
    assert loss(0.28) == pytest.approx(-1.25 * advantage, rel=1e-5)


# Rewards: from 0 to 1, 1 exactly where the task is done, and never anything for what was not asked.


@given(st.integers(1, 30), st.lists(st.sampled_from(["sea", "a", "Iron,", "\u00e9t\u00e9"]), max_size=40))
def test_length_is_the_ratio_of_the_two_counts(words, completion):
    reward = make_reward(f"length:{words}")
    value = reward("  ".join(completion) + "\n", None)
    assert 0 <= value <= 1
    assert (value == 1) == (len(completion) == words)
    assert value == pytest.approx(min(len(completion), words) / max(len(completion), words))
    assert reward(" ".join([*completion, "more"]), None) >= value if len(completion) < words else True


def test_a_pattern_is_found_or_not():
    assert make_reward(r"regex:^(Yes|No)\b")("Yes, it is.", None) == 1
    assert make_reward(r"regex:^(Yes|No)\b")("Yesterday", None) == 0
    assert [make_reward("yes-no")(text, None) for text in ("No.", "Yes, it is", "Nothing", "Oh, yes")] == [
        1,
        1,
        0,
        0,
    ]
    assert make_reward("regex:a:b")("see a:b there", None) == 1  # colons in a pattern are its own
    late = "x" * LONGEST + "here"
    assert make_reward("regex:here")(late, None) == 0
    assert make_reward("regex:here")(late[4:], None) == 1


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("3 + 4 = 7.", 7, 1),
        ("7", 7, 1),
        ("It is 7, not 8.", 7, 0),
        ("seven", 7, 0),
        ("", 7, 0),
        ("007", 7, 1),
        ("-3", 3, 0),
        ("-3", -3, 1),
        ("10-3", 3, 1),
        ("1,234", 1234, 1),
        ("1, 234", 234, 1),
        ("0", 0, 1),
        ("7", None, 0),
        ("9" * (2 * LONGEST), 9, 0),
    ],
)
def test_the_last_integer_is_the_answer(answer, right, value):
    assert sum_reward(answer, right) == value
    assert make_reward("sum") is sum_reward


def test_an_answer_is_the_rows_own():
    assert [make_reward("exact")(text, "Yes.") for text in (" Yes.\n", "yes.", "Yes. ", "")] == [1, 0, 1, 0]
    assert make_reward("exact")("7", None) == 0


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("length", "should be length:N"),
        ("length:0", "from 1 to 1000"),
        ("length:x", "should be length:N"),
        ("length:-1", "should be length:N"),
        ("regex:", "should be regex:PATTERN"),
        ("regex:(", "not a regular expression"),
        ("regex:a{99999999999}", "not a regular expression"),
        ("sum:3", "should be sum"),
        ("lenght:3", "Did you mean 'length'"),
        ("", "There is no task ''"),
    ],
)
def test_what_is_no_task_is_said(task, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_reward(task)
