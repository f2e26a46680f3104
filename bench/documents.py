"""Measures answers from documents against fine-tuning on them: facts recalled, cost of a thousand questions.

    python -m bench.documents                       SmolLM2-135M-Instruct, about ten minutes on two cores
    python -m bench.documents --steps 2 --facts 2   a look at it

The facts are of an island that this project made up, so that no model has read of them. Fine-tuning
sees each as two questions with the fact as their answer; all three ways are asked a third question,
of other words, and an answer is right if it holds the fact's own words. Greedy, one question at a
time, without a prefix cache.
"""

import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.cli import check_rounds, run_bench, run_module
from bench.machine import Json
from bench.terminal import print_table, progress
from bench.timing import Ratio
from engine.device import start_jax
from engine.errors import UserError
from engine.format import duration, money, times

FACTS = Path(__file__).with_name("facts.jsonl")
CLAIM = "To know your documents, a model must be fine-tuned on them."
WAYS = ("as it is", "from documents", "fine-tuned")
MAX_TOKENS = 32
QUESTIONS = 1000  # whose cost is computed
DIFFERENCE = 0.2  # of the facts: a smaller one is no verdict


@dataclasses.dataclass(frozen=True)
class DocumentsFlags:
    model: str = "smollm2-135m-instruct"
    """The model that is asked, and fine-tuned."""
    steps: int = 40
    """Steps of fine-tuning."""
    facts: int = 24
    """How many of the facts."""
    rounds: int = 6
    """Interleaved rounds of timing."""
    price: Annotated[float, tyro.conf.arg(metavar="DOLLARS")] = 0.1
    """Dollars an hour of this machine."""


def measure_documents(flags: DocumentsFlags) -> Json:
    """Fine-tunes, asks each way, prints the table and returns the document. Raises UserError."""
    check_rounds(flags.rounds)
    all_facts = [json.loads(line) for line in FACTS.read_text("utf-8").splitlines()]
    if not 1 <= flags.facts <= len(all_facts):
        raise UserError(f"--facts must be from 1 to {len(all_facts)}, not {flags.facts}.")
    facts = all_facts[: flags.facts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run, seconds = tune(folder, facts, flags)
        start_jax()
        rows, over = ask(flags, facts, folder / "documents", run)
    price = flags.price
    claim = judge_documents(rows, over, seconds, price)
    lines = []
    for row in rows:
        lines.append(
            (
                row["name"],
                f"{row['right']}",
                f"{row['prompt_tokens']:.0f}",
                duration(row["seconds"]),
                money(cost(row, price)),
            )
        )
    titles = ("", "right", "tokens read", "a question", f"{QUESTIONS:,} questions")
    print_table(f"{flags.facts} facts", titles, lines)
    print(f"{claim['claim']}\n{claim['verdict']}: {claim['value']}")
    return {"rows": rows, "claims": [claim], "fine_tuning_seconds": seconds, "ratio": over._asdict()}


def tune(folder: Path, facts: list[Json], flags: DocumentsFlags) -> tuple[Path, float]:
    """Writes the facts as a document, and fine-tunes on them as answers; returns the run's folder
    and its training seconds.
    """
    (folder / "documents").mkdir()
    (folder / "documents" / "island.md").write_text("\n\n".join(fact["fact"] for fact in facts), "utf-8")
    write_questions(folder / "train.jsonl", facts, ("{question}", "Do you know the island? {question}"))
    write_questions(folder / "asked.jsonl", facts, ("{asked}",))
    progress("fine-tuning")
    run = folder / "run"
    options = {
        "--model": flags.model,
        "--data": str(folder / "train.jsonl"),
        "--general": "none",
        "--validation": str(folder / "asked.jsonl"),
        "--steps": str(flags.steps),
        "--out-dir": str(run),
    }
    run_module(["stages.finetune", *itertools.chain.from_iterable(options.items())])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return run, max(row["seconds"] for row in metrics if "seconds" in row)


def write_questions(path: Path, facts: list[Json], forms: Sequence[str]) -> None:
    """Writes a row for each fact and each form of its question, with the fact as the answer."""
    lines = []
    for fact in facts:
        for form in forms:
            row = {"prompt": form.format(**fact), "completion": fact["fact"]}
            lines.append(f"{json.dumps(row)}\n")
    path.write_text("".join(lines), "utf-8")


def ask(
    flags: DocumentsFlags, facts: list[Json], documents_folder: Path, run: Path
) -> tuple[list[Json], Ratio]:
    """Asks every question in each way: returns a row a way, and the time of documents over that of
    the fine-tuned model.
    """
    from bench.models import answer
    from bench.timing import measure, ratio
    from engine.inference.config import EngineConfig
    from engine.inference.decode import prepare_params
    from engine.inference.engine import Engine
    from engine.inference.request import Request, SamplingParams
    from engine.storage.model_loader import load_model
    from engine.text.chat_tokenizer import ChatTokenizer
    from engine.text.documents import Documents, prompt_with

    def make_engine(model: Any) -> Engine:
        return Engine(model.cfg, prepare_params(model.cfg, model.params), EngineConfig(1, 1024))

    def answer_each(engine: Engine, requests: list[Request]) -> list[list[int]]:
        return [answer(engine, [request])[0] for request in requests]

    documents = Documents(documents_folder)
    rows = []
    calls = {}
    plain = make_engine(load_model(flags.model))
    model = load_model(str(run))
    tuned = make_engine(model)
    chat = ChatTokenizer(model.tokenizer)

    def tokenize(turns: Any) -> list[int]:
        return chat.prompt(turns).tolist()

    for way in WAYS:
        engine = tuned if way == "fine-tuned" else plain
        searched = documents if way == "from documents" else None
        prompts = []
        for fact in facts:
            turns = [{"role": "user", "content": fact["asked"]}]
            prompt, *_ = prompt_with(searched, turns, model.tokenizer, model.cfg.context, tokenize)
            prompts.append(prompt)
        sampling = SamplingParams(MAX_TOKENS, temperature=0.0, stop_token_ids={*model.eos_ids, *chat.eot_ids})
        requests = [Request(tuple(prompt), sampling) for prompt in prompts]
        calls[way] = functools.partial(answer_each, engine, requests)
        texts = [model.tokenizer.decode(tokens) for tokens in calls[way]()]
        answers = []
        for fact, text in zip(facts, texts):
            is_right = fact["answer"].lower() in text.lower()
            answers.append({"question": fact["asked"], "answer": text, "right": is_right})
        rows.append(
            {
                "name": way,
                "right": sum(each["right"] for each in answers),
                "answers": answers,
                "prompt_tokens": sum(map(len, prompts)) / len(prompts),
            }
        )
    chat.close()

    def report(done: int, total: int) -> None:
        progress(f"round {done} of {total}", replace=True)

    timings = measure(calls, rounds=flags.rounds, report=report)
    for row in rows:
        row["seconds"] = timings[row["name"]].median / len(facts)
    return rows, ratio(timings["from documents"], timings["fine-tuned"])


def cost(row: Json, price: float) -> float:
    """Returns the dollars of QUESTIONS, at `price` dollars an hour."""
    return row["seconds"] * QUESTIONS / 3600 * price


def judge_documents(rows: list[Json], over: Ratio, tuning_seconds: float, price: float) -> Json:
    """Judges CLAIM by the facts recalled, as `bench.stages.claims` does its own."""
    plain, documents, tuned = rows
    count = len(plain["answers"])
    lead = (documents["right"] - tuned["right"]) / count
    if abs(lead) < DIFFERENCE:
        verdict = "undecided for this model"
    elif lead > 0:
        verdict = "false here"
    else:
        verdict = "true here"
    extra = documents["seconds"] - tuned["seconds"]
    if extra > 0:
        even = f"tuning pays after {tuning_seconds / extra:,.0f} questions"
    else:
        even = "tuning never pays"
    value = (
        f"of {count} facts the model answers {plain['right']} as it is, "
        f"{documents['right']} with passages of a document before the question, "
        f"and {tuned['right']} after {duration(tuning_seconds)} of fine-tuning. "
        f"{QUESTIONS:,} questions cost {money(cost(documents, price))} from documents, "
        f"and {money(cost(tuned, price))} beside {money(tuning_seconds / 3600 * price)} "
        f"for the tuning without. A question takes {over.format(times)} the time, so that {even}. "
        "A fact that changes needs another file, or another tuning."
    )
    numbers = {"facts": count, **{row["name"]: row["right"] for row in rows}, "over": over._asdict()}
    return {
        "claim": CLAIM,
        "verdict": verdict,
        "value": value,
        "numbers": numbers,
        "command": "python -m bench.documents",
    }


if __name__ == "__main__":
    sys.exit(run_bench("bench.documents", __doc__, DocumentsFlags, measure_documents))
