"""Trains a model by the losses of TRL's own trainers, the peer in objectives; model and tokens are ours."""

import json
import tempfile
from typing import Any

from protocol import Run, serve_jobs


def make(spec: dict[str, Any]) -> Run:
    """Returns a run of all steps, whose result is their losses.

    `spec`: objective, model (a Hugging Face folder), file (JSON: rows of each step), beta, threads,
    learning_rate, beta2, clip.
    """
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    torch.set_num_threads(spec["threads"])

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)

    # A trainer wants a tokenizer and a data set. It has these, and its collator then gets our
    # tokens.
    words = models.WordLevel({"a": 0, "b": 1, "<pad>": 2, "</s>": 3, "<unk>": 4}, unk_token="<unk>")
    inner = Tokenizer(words)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    pair = {"prompt": "a", "chosen": "b", "rejected": "a"}
    answer = {"prompt": "a", "completion": "b"}
    beta = {"beta": spec["beta"]}
    simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5 * (spec["beta"] or 0)}
    trainer_type, config_type, row, options = {
        "answers": (SFTTrainer, SFTConfig, answer, {}),
        "dpo": (DPOTrainer, DPOConfig, pair, beta),
        "kto": (KTOTrainer, KTOConfig, {**answer, "label": True}, beta),
        "orpo": (ORPOTrainer, ORPOConfig, pair, beta),
        "simpo": (CPOTrainer, CPOConfig, pair, beta | simpo),
    }[spec["objective"]]
    if spec["objective"] == "kto":
        options = options | {"train_sampling_strategy": "sequential"}
    folder = tempfile.TemporaryDirectory()
    config = config_type(
        output_dir=folder.name,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    reference = {"ref_model": load()} if spec["objective"] in ("dpo", "kto") else {}
    data = Dataset.from_list([row] * 4)
    trainer = trainer_type(load(), args=config, train_dataset=data, processing_class=tokenizer, **reference)
    model = trainer.model.train()
    with open(spec["file"], encoding="utf-8") as file:
        steps = json.load(file)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec["learning_rate"], betas=(0.9, spec["beta2"]), eps=1e-8, weight_decay=0.0
    )

    def run() -> dict[str, Any]:
        losses = []
        for rows in steps:
            loss = trainer.compute_loss(model, trainer.data_collator(rows))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec["clip"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        folder.cleanup()
        return {"losses": losses}

    return run


def describe_build() -> str:
    """Returns how torch was built."""
    import torch

    return torch.__config__.show()


if __name__ == "__main__":
    serve_jobs(["torch", "transformers", "datasets", "trl"], make, describe_build)
