"""What of a model learns, from flags to two trees; what that matches, and what it costs beside training all of it."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax

from engine.counting.flops import train_flops
from engine.counting.memory import training_memory
from engine.counting.params import count_params
from engine.counting.trainable import TrainablePaths, all_trainable, lora_only
from engine.inference.quantize import every_product, quantize
from engine.model.config import ModelConfig
from engine.model.paths import merge
from engine.model.transformer import init_params
from engine.model.weights.matmul import cast_matrices
from engine.training.freeze import select_trainable, split
from engine.training.lora import add_lora, merge_lora
from engine.training.loss import loss_chunks
from engine.training.optimizer import OptimizerConfig
from stages.runs.estimate import Plan

if TYPE_CHECKING:
    from stages.finetune.flags import Finetune
    from stages.reinforce.flags import Reinforce


@dataclasses.dataclass(frozen=True)
class TuningPlan(Plan):
    """A plan in which `trainable_paths` learn."""

    trainable_paths: TrainablePaths
    base: Literal["float", "int8"] = "float"

    @property
    def step_flops(self) -> int:
        """FLOPs that a step needs: no products for the weights of what is frozen, none below all that learns."""
        flops = train_flops(self.cfg, self.recipe.context, attention="full", trainable=self.trainable_paths, remat="none")
        return flops.total * self.step_tokens

    @property
    def memory(self) -> int:
        """Predicted bytes at the fullest moment of a step."""
        part = self.recipe.batch // self.recipe.accumulate
        return training_memory(
            self.cfg, part, self.recipe.context, optimizer=self.recipe.optimizer.kind, trainable=self.trainable_paths,
            loss_chunks=loss_chunks(self.cfg, part * self.recipe.context, self.head_is_frozen),
            microbatches=self.recipe.accumulate, base=self.base,
        ).total  # fmt: skip

    @property
    def head_is_frozen(self) -> bool:
        """Whether the head is frozen, and so kept in the compute type or int8."""
        rests = ("embed" if self.cfg.tied else "head") not in self.trainable_paths.weights
        return rests and (self.base == "int8" or self.cfg.dtype != "float32")

    def beside_full(self) -> dict[str, float]:
        """FLOPs and memory as shares of those of a step in which everything learns, and the time if it follows FLOPs."""
        whole = dataclasses.replace(self, trainable_paths=all_trainable(self.cfg), base="float")
        flops = self.step_flops / whole.step_flops
        return {"FLOPs": flops, "memory": self.memory / whole.memory, "time": flops}


@dataclasses.dataclass(frozen=True)
class Learner:
    """The two trees a run begins with, and what learns as the counting rooms read it.

    `frozen` is what steps read, in the compute type; `rest` is the same as it was loaded, for that is what is saved.
    """

    trainable: Any
    frozen: Any
    rest: Any
    trainable_paths: TrainablePaths

    def kept(self, trainable: Any) -> Any:
        """What a checkpoint holds: an adapter on its own, or the whole model."""
        return trainable if self.trainable_paths.adapted else merge(trainable, self.rest)

    def of(self, kept: Any) -> Any:
        """The trainable tree of what a checkpoint held."""
        return kept if self.trainable_paths.adapted else split(kept, self.trainable_paths)[0]


def what_learns(given: "Finetune | Reinforce", cfg: ModelConfig) -> tuple[TrainablePaths, tuple[tuple[str, str], ...]]:
    """What learns and what each rule matched, in words. Raises UserError for a rule that matches nothing."""
    total = count_params(cfg).total
    adapter = given.adapter
    if adapter:
        key = jax.random.key(given.seed)
        # Shapes alone: nothing is drawn before it is known whether there is room for it.
        shapes = jax.eval_shape(lambda key: add_lora(cfg, init_params(cfg, key), key, adapter), key)
        learning = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        return lora_only(cfg, adapter), (
            ("adapts", f"{', '.join(adapter.adapted)} of {cfg.layers} layers, rank {adapter.rank}"),
            ("learns", f"{learning:,} new numbers beside {total:,} frozen ones ({learning / total:.1%})"),
        )
    chosen = select_trainable(cfg, [] if given.learns.train == ("all",) else given.learns.train, given.learns.freeze)
    rows = tuple(
        (match.rule, f"{match.leaves} {'leaf' if match.leaves == 1 else 'leaves'}, {match.numbers:,} numbers")
        for match in chosen.matches
    )
    return chosen.trainable_paths, (*rows, ("learns", f"{chosen.trainable_count:,} of {total:,} ({chosen.trainable_count / total:.1%})"))


def make_learner(given: "Finetune | Reinforce", cfg: ModelConfig, params: Any, trainable_paths: TrainablePaths) -> Learner:
    """The trees. What is frozen is kept in the compute type, or in int8 where the flags say so; params stay as they are."""
    adapter = given.adapter
    if adapter:
        return Learner(add_lora(cfg, params, jax.random.key(given.seed), adapter), in_memory(given, cfg, params), None, trainable_paths)
    trainable, rest = split(merge_lora(params), trainable_paths)
    return Learner(cast_matrices(trainable, "float32"), cast_matrices(rest, cfg.dtype), rest, trainable_paths)


def in_memory(given: "Finetune | Reinforce", cfg: ModelConfig, params: Any) -> Any:
    """The frozen base: its matrices in the compute type, or in int8 with a scale for each column."""
    if given.learns.base == "float":
        return cast_matrices(params, cfg.dtype)
    return cast_matrices(quantize(params, every_product(params, "full")), cfg.dtype)


def optimizer(given: "Finetune") -> OptimizerConfig:
    """AdamW with a warm-up and a cosine."""
    tuning = given.tuning
    usual = 2e-3 if given.adapter else 2e-5
    if given.tuning.objective == "preference":
        usual = usual / 10
    return OptimizerConfig(
        kind="adamw", learning_rate=tuning.learning_rate or usual, schedule="cosine", warmup=tuning.warmup,
        beta2=0.99, weight_decay=tuning.weight_decay, clip=tuning.clip,
    )  # fmt: skip


def shares(plan: TuningPlan) -> str:
    """What the predicted costs are beside training everything."""
    found = plan.beside_full()
    return (
        ", ".join(f"{name} {share:.0%}" for name, share in found.items()) + " of a step in which everything learns (predicted)"
    )
