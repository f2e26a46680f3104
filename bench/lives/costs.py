"""Measures a step of each life and a forward pass, interleaved: operations, seconds, peak memory, and memory over time."""

from pathlib import Path

from bench.cli import Json
from bench.models import BenchModel, next_token_batch, tokens_for
from bench.stages.checks import SLOTS
from bench.stages.memory import memory_over_time
from bench.stages.rows import ADAPTER, Row, decode_row, evaluation_row, training_kinds, training_row
from bench.timing import MIN_ROUNDS, measure, ratio
from engine.counting.flops import muon_flops
from engine.inference.decode import prepare_params
from engine.storage.model_loader import LoadedModel
from engine.storage.run_folder import read_json
from engine.training.optimizer import OptimizerConfig

ROUNDS = 20
ROWS = {  # of the stage table: the one that computes as a life does, and its passes
    "train": ("pre-training step", "forward and backward"),
    "frozen": ("bottom half frozen", "forward, and backward to the middle"),
    "lora": (f"LoRA rank {ADAPTER.rank} on q and v", "forward, and backward to the adapters"),
    "all": ("full fine-tuning", "forward and backward"),
}


def measure_costs(model: LoadedModel, folder: Path, quick: bool) -> tuple[list[Json], dict[str, Json]]:
    """Returns the costs of each life and of `answer`, per token, and the memory of one step of each over time.

    All steps are of one batch, as the training run's; each has the optimizer of its own run, in `folder`. The cost of `answer`
    is that of the forward pass over the batch, to which all ratios are; its memory is that of decoding.
    """
    recipes = {life: read_json(folder / life / "run.json")["recipe"] for life in ROWS}
    cfg, B, T = model.cfg, recipes["train"]["batch"], recipes["train"]["context"]
    batch = next_token_batch(tokens_for(BenchModel(model.name, cfg, model.params, model.tokenizer), B, T + 1))
    kinds = {kind.name: kind for kind in training_kinds(cfg)}
    rows: dict[str, Row] = {
        life: training_row(cfg, model.params, kinds[name], batch, OptimizerConfig(**recipes[life]["optimizer"]))
        for life, (name, _) in ROWS.items()
    }
    programs = {life: row.program for life, row in rows.items()}
    served = prepare_params(cfg, model.params)
    programs["answer"] = decode_row(cfg, served, SLOTS, T, name="answer", weights=None).program
    rows["answer"] = forward = evaluation_row(cfg, served, batch)
    passes = {life: words for life, (_, words) in ROWS.items()} | {"answer": "forward"}
    if recipes["train"]["optimizer"]["kind"] == "muon":
        passes["train"] += f"; the update of Muon takes {muon_flops(cfg) / forward.formula.total:.1f} forward passes more"
    timings = measure({life: row.run for life, row in rows.items()}, rounds=MIN_ROUNDS if quick else ROUNDS)
    costs = []
    for life, row in rows.items():
        times, flops = ratio(timings[life], timings["answer"]), row.formula.total
        costs.append(
            {
                "stage": life,
                "passes": passes[life],
                "flops_per_token": flops / row.tokens,
                "counted_ratio": flops / forward.formula.total,
                "seconds_per_token": timings[life].median / row.tokens,
                "time_ratio": times.ratio,
                "time_ratio_interval": [times.low, times.high],
                "bytes": row.peak_bytes,
            }
        )
    return costs, {life: memory_over_time(program).document() for life, program in programs.items()}
