"""The plan of a reinforcement learning: by flags, task and the model's architecture, what a round does and takes."""

import dataclasses
from typing import Any, NamedTuple

from engine.counting.flops import forward_flops, prefill_flops
from engine.counting.memory import inference_memory
from engine.errors import UserError
from engine.format import format_count, quantity
from engine.model.config import ModelConfig
from engine.training.optimizer import OptimizerConfig
from engine.training.reinforce import grpo
from engine.training.step import Objective
from stages.cli.console import Console
from stages.reinforce.flags import ReinforceFlags, RolloutFlags
from stages.reinforce.rollouts import Prompts, prompt_tokens, prompts_for
from stages.runs.estimate import memory_estimate, require_room
from stages.runs.model_stage import OpenedModel, Rows, choose_trainable, model_rows, open_model
from stages.runs.options import RunOptions
from stages.runs.plan import Recipe, RunPlan
from stages.runs.rewards import Rewards

SECONDS = 120.0  # of a run when nobody asks for a length
LEAST_ROUNDS = 20  # that such a run makes however long they take
TOKENS = 48  # of a completion, where the context has room for them
MULTIPLE = 32  # tokens that a row's length is rounded up to
MICROBATCH_TOKENS = 1024  # more hold more logits and are no faster
LEARNING_RATE = 2e-5
LORA_LEARNING_RATE = 5e-4


@dataclasses.dataclass(frozen=True)
class RoundConfig:
    """What a round does, beside what its RunPlan says."""

    prompts: int
    group: int  # completions of each prompt
    temperature: float
    longest: int  # tokens of the longest prompt
    max_tokens: int  # of a completion
    updates: int  # optimizer steps on the completions
    clip: float
    kl: float  # the weight of the divergence from the model before training
    fluency: float  # the weight of a second reward, the negative bits per byte by that model

    @property
    def capacity(self) -> int:
        """Tokens of a prompt with its completion, at most."""
        return self.longest + self.max_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinforcePlan:
    """What a reinforcement learning will do: the opened model, the task with its prompts, and a
    round."""

    plan: RunPlan
    opened: OpenedModel
    prompts: Prompts
    rewards: Rewards
    round: RoundConfig
    metadata: dict[str, Any]  # of run.json, but for what the weights tell
    matches: Rows  # what each rule of --train and --freeze matched
    memory: int  # bytes of a round
    objective: Objective

    def rows(self, console: Console) -> Rows:
        return reinforce_rows(self)

    def print_example(self, console: Console) -> None:
        """Prints nothing: the first completions are sampled later."""


def plan_reinforcement(flags: ReinforceFlags, options: RunOptions, console: Console) -> ReinforcePlan:
    """Plans a reinforcement learning, of which only this reads the flags. Raises UserError for what
    does not fit together."""
    rollout = flags.rollout
    update = flags.update
    rewards = Rewards(rollout.task, rollout.reward_timeout, "mend it, or give a longer --reward-timeout")
    prompts = prompts_for(rewards.names, rollout.data, flags.seed)
    opened = open_model(flags.model, flags.trainable, options.folder, console)
    cfg = opened.model.cfg
    longest = max(len(prompt_tokens(opened.chat, prompt)) for prompt in (*prompts.train, *prompts.held_out))
    config = RoundConfig(
        prompts=rollout.prompts,
        group=rollout.group,
        temperature=rollout.temperature,
        longest=longest,
        max_tokens=choose_max_tokens(rollout, cfg, longest),
        updates=update.updates,
        clip=update.clip,
        kl=update.kl,
        fluency=update.fluency,
    )
    paths, matches = choose_trainable(cfg, opened.lora, flags.trainable.train, flags.trainable.freeze)
    seconds = flags.length.max_time
    least_rounds = 0
    if not flags.length.max_time and not flags.length.rounds:
        seconds = SECONDS
        least_rounds = LEAST_ROUNDS
    default_rate = LEARNING_RATE
    if opened.lora:
        default_rate = LORA_LEARNING_RATE
    rate = update.learning_rate
    if rate is None:
        rate = default_rate
    plan = RunPlan(
        name=opened.model.name,
        cfg=cfg,
        recipe=round_recipe(config, rate),
        seed=flags.seed,
        steps=flags.length.rounds,
        seconds=seconds,
        trainable=paths,
        base=flags.trainable.base,
        step_name="round",
        least_steps=least_rounds,
        blocks=opened.blocks,
    )
    memory = round_memory(plan, config)
    remedy = "give fewer --prompts, a smaller --group, fewer --max-tokens, or a smaller model."
    require_room(plan, memory, "A round would need about", remedy)
    metadata = {
        "learns": flags.trainable.describe(opened.lora),
        "text": {"data": f"{rewards.name} on {prompts.name}", "digest": f"{rewards.name} {prompts.digest}"},
        "rollout": dataclasses.asdict(rollout) | {"data": str(rollout.data or "")},
        "update": dataclasses.asdict(update),
    }
    return ReinforcePlan(
        plan=plan,
        opened=opened,
        prompts=prompts,
        rewards=rewards,
        round=config,
        metadata=metadata,
        matches=matches,
        memory=memory,
        objective=grpo(config.clip, config.kl),
    )


def round_memory(plan: RunPlan, config: RoundConfig) -> int:
    """Returns the bytes of a step, beside the weights that sample and their cache."""
    inference = inference_memory(plan.cfg, plan.recipe.batch, config.capacity)
    return plan.memory.total + inference.params + inference.cache


def choose_max_tokens(rollout: RolloutFlags, cfg: ModelConfig, longest: int) -> int:
    """Returns the tokens of a completion, at most. Raises UserError where the longest prompt leaves
    no room for them."""
    room = cfg.context - longest
    if rollout.max_tokens is None and room > 0:
        return min(TOKENS, room)
    if rollout.max_tokens is not None and rollout.max_tokens <= room:
        return rollout.max_tokens
    advice = "shorter prompts"
    if room > 0:
        advice = "a lower --max-tokens or shorter prompts"
    raise UserError(
        f"The longest prompt has {longest:,} tokens, "
        f"which leaves {max(0, room):,} of the model's context of {cfg.context:,} for an answer; "
        f"give {advice}."
    )


def round_recipe(config: RoundConfig, learning_rate: float) -> Recipe:
    """Returns the recipe of a round's updates. The batch is read in the fewest equal parts of at
    most MICROBATCH_TOKENS, or of one row."""
    # The rate falls in the second half, without which the reward falls again: a round's gradient is
    # mostly noise.
    optimizer = OptimizerConfig(
        learning_rate=learning_rate, schedule="wsd", warmup=0, decay=0.5, beta2=0.99, weight_decay=0
    )
    rows = config.prompts * config.group
    seq = -(-(config.capacity - 1) // MULTIPLE) * MULTIPLE
    microbatches = 1
    while rows % microbatches or rows // microbatches * seq > max(MICROBATCH_TOKENS, seq):
        microbatches += 1
    return Recipe(
        tokenizer="the model's", context=seq, batch=rows, optimizer=optimizer, accumulate=microbatches
    )


def reinforce_rows(planned: ReinforcePlan, trained_numbers: int = 0) -> Rows:
    """Returns the banner's rows. `trained_numbers`: see `model_rows`."""
    plan = planned.plan
    config = planned.round
    prompts = planned.prompts
    rewards = planned.rewards
    flops = round_flops(plan, config)
    return [
        *model_rows(planned.opened, plan, trained_numbers),
        *planned.matches,
        ("task", f"{rewards.name} ({rewards.describe()})"),
        ("prompts", f"{len(prompts.train):,} of {prompts.name}; {len(prompts.held_out):,} held out"),
        ("template", planned.opened.chat.template_name),
        (
            "a round",
            f"{config.prompts} prompts, {config.group} completions each, "
            f"of at most {config.max_tokens} tokens, at temperature {config.temperature:g}",
        ),
        ("inference", f"samples them: up to {format_count(flops.inference)}FLOPs, forward only"),
        (
            "training",
            f"{quantity(config.updates, 'step')} on them: up to {format_count(flops.training)}FLOPs; "
            f"clip {config.clip:g}, KL {config.kl:g}, fluency {config.fluency:g}, "
            f"adamw {plan.recipe.optimizer.learning_rate:g}",
        ),
        ("memory", memory_estimate(plan, planned.memory)),
        ("length", plan.length()),
    ]


class RoundFlops(NamedTuple):
    """The most FLOPs of a round: those of the longest completions."""

    inference: int
    training: int


def round_flops(plan: RunPlan, config: RoundConfig) -> RoundFlops:
    cfg = plan.cfg
    rows = plan.recipe.batch
    prefill = prefill_flops(cfg, config.longest, attention="causal").total
    # The first token comes from the prefill; the others attend to half of them on average.
    decoded = config.max_tokens - 1
    mean_context = config.longest + config.max_tokens // 2
    decode = decoded * forward_flops(cfg, mean_context, attention="full").total
    # Passes that give log-probabilities: by the model before training, and before the first of
    # several updates by the model as it sampled.
    passes = 1
    if config.updates > 1:
        passes = 2
    scoring = passes * plan.step_tokens * forward_flops(cfg, plan.recipe.context, attention="full").total
    return RoundFlops(
        inference=rows * (prefill + decode), training=config.updates * plan.step_flops + scoring
    )
