"""Trains a draft: lets the model answer, counts its answers, and saves a draft that gains."""

import time
from pathlib import Path
from typing import Any

from engine.device import Device
from engine.errors import UserError
from engine.format import duration
from engine.inference.decode import prepare_params
from engine.inference.sampling_params import SamplingParams
from engine.inference.scheduler import DRAFT_ROWS
from engine.inference.slots import Slots
from engine.inference.speculation import tokens_per_step
from engine.model.config import ModelConfig
from engine.model.weights.int8 import quantize
from engine.model.weights.lora import merge_lora
from engine.ngrams import Answers, count_ngrams
from engine.storage.digest import digest
from engine.storage.draft import draft_path, save_draft
from engine.storage.model_loader import load_model, with_adapters
from engine.text.chat_tokenizer import ChatTokenizer
from stages.cli.console import Console
from stages.cli.sampling import choose_sampling
from stages.draft.answers import SelfChat
from stages.draft.flags import DraftFlags

SLOTS, CAPACITY = 32, 512  # answers at once, and tokens of each with its question
LEFT_OUT = 10  # the last of so many answers measure the draft
USUAL = {"temperature": 0.7, "top_p": 0.9}  # as `chat` samples where the model recommends nothing


def run(flags: DraftFlags, device: Device) -> None:
    """Answers, counts, measures, saves. Raises UserError when there were too few answers."""
    with Console() as console:
        with console.task(f"loading {flags.model or 'the newest finished run'}") as report:
            model = load_model(flags.model, report=report)
        console.print_notes(model.notes)
        params = with_adapters(model.cfg, model.params, [flags.adapter] if flags.adapter else [])
        before = digest(params)
        fields, source = choose_sampling(model.sampling, {}, USUAL, console)
        console.print_rows([
            ("model", f"{model}" + f" with {flags.adapter}" * bool(flags.adapter)),
            ("device", str(device)),
            ("answers", f"for {duration(flags.max_time)}, half of them greedy, half with {source}"),
        ])  # fmt: skip
        with console.task("compiling"):
            slots = _make_slots(model.cfg, params, int8=device.backend == "cpu")
        chat = ChatTokenizer(model.tokenizer)
        conversation = SelfChat(slots, chat, model.eos_ids, SamplingParams(**fields))
        with console.task("answering", always=True) as report:
            begin = time.perf_counter()

            def is_over() -> bool:
                report(round(time.perf_counter() - begin), round(flags.max_time))
                return time.perf_counter() - begin >= flags.max_time

            answers = conversation.run(is_over)
        chat.close()
        if len(answers) < 2 * LEFT_OUT:
            raise UserError(
                f"In {duration(flags.max_time)} there were {len(answers)} answers, too few to count: give more --max-time."
            )
        path = draft_path(flags.adapter or model.run or model.checkpoint)
        _count(answers, time.perf_counter() - begin, model.cfg.vocab, path, before, console)
        if digest(params) != before:
            raise RuntimeError("Training the draft changed the weights.")


def _make_slots(cfg: ModelConfig, params: Any, int8: bool) -> Slots:
    served = prepare_params(cfg, quantize(merge_lora(params, cfg.dtype)) if int8 else params)
    slots = Slots(cfg, served, slots=SLOTS, capacity=min(CAPACITY, cfg.context), prefix_cache_bytes=64 * 10**6, speculate=False)
    slots.warm()
    return slots


def _count(answers: Answers, answer_seconds: float, vocab: int, path: Path, base: str, console: Console) -> None:
    """Counts answers that took so many seconds, measures the draft on those left out, and saves one of all.

    `base`: the digest of the model's params.
    """
    begin = time.perf_counter()
    first = len(answers) // LEFT_OUT * (LEFT_OUT - 1)
    counted = count_ngrams(answers[:first], vocab)
    lookup, trained = (tokens_per_step(answers[first:], ngrams, DRAFT_ROWS) for ngrams in (None, counted))
    rows = [
        ("answered", f"{sum(len(text) - start for text, start in answers):,} tokens in {len(answers):,} answers"),
        ("gain", f"{trained:.2f} tokens a step of a lone stream on a tenth left out, {lookup:.2f} by prompt lookup alone"),
    ]
    if trained > lookup:
        ngrams = count_ngrams(answers, vocab)._replace(answer_seconds=answer_seconds)
        save_draft(path, ngrams, base)
        seconds = duration(time.perf_counter() - begin)
        rows += [
            ("saved", f"{path}: {len(ngrams.keys):,} entries, counted in {seconds}; `serve`, `chat` and `generate` take it")
        ]
    else:
        rows += [("saved", "nothing, for the draft would gain nothing: give more --max-time")]
    console.print_rows(rows)
