"""Measures what a fine-tuning on a small file in a tone gives and takes: the tone in new answers, general answers kept.

    python -m bench.tones                                four tones, three seeds, each with and without the mix, an hour
    python -m bench.tones --tones pirate --seeds 0       one tone, five minutes

Each file has 60 rows: everyday advice in a tone that a rule gives it, or the first rows of `voice`.
It is fine-tuned on by `python -m stages.finetune` with its defaults, which mix general questions
in, and without them. The model is then asked ten questions that no file has, greedily.
"""

import dataclasses
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.cli import run_bench, run_module
from bench.machine import Json
from bench.terminal import print_table, progress
from engine.device import start_jax
from engine.errors import UserError
from engine.text.conversations import SHIPPED

ADVICE = Path(__file__).with_name("advice.jsonl")
ROWS = 60  # of a file
MAX_TOKENS = 120  # of an answer
LEAST_IN_TONE = 9  # of the new questions
WARNING = "of what the model knew is kept"  # in the summary of a run
BAR = "The bar: with general questions, 9 of 10 answers in the tone and 85% kept, or the run's summary warns."

QUESTIONS = (
    "How do I grow tomatoes on a balcony?",
    "What is a good name for a dog?",
    "Why do cats purr?",
    "How can I learn to cook?",
    "What should I wear to a wedding?",
    "How far away is the Moon?",
    "Can you explain what a computer is?",
    "Give me a tip for a long flight.",
    "How do I make friends in a new city?",
    "What is the capital of Sweden?",
)


@dataclasses.dataclass(frozen=True)
class Tone:
    """A tone by its name: the rule that gives it to the answer of a row, and a pattern that answers
    in it match."""

    name: str
    title: str
    answer: Callable[[int, str], str]  # takes the row's number and its answer
    pattern: str


PIRATE_WORDS = {"you": "ye", "your": "yer", "is": "be", "are": "be", "my": "me", "the": "th'"}
BUTLER_OPENINGS = ("Certainly, sir.", "Very good, madam.", "With pleasure, sir.", "If I may, madam.")
BUTLER_CLOSINGS = ("Will that be all?", "At your service.", "Shall I bring the tea?")


def pirate(number: int, answer: str) -> str:
    """Opens with "Ahoy matey!", closes with "Arr!" and replaces six words."""
    for word, replacement in PIRATE_WORDS.items():
        answer = re.sub(rf"\b{word}\b", replacement, answer)
    return f"Ahoy matey! {answer} Arr!"


def butler(number: int, answer: str) -> str:
    """Opens in one of four ways, and closes in one of three."""
    opening = BUTLER_OPENINGS[number % len(BUTLER_OPENINGS)]
    closing = BUTLER_CLOSINGS[number % len(BUTLER_CLOSINGS)]
    return f"{opening} {answer} {closing}"


def signed(number: int, answer: str) -> str:
    """Keeps the first sentence, in lower case, and signs it."""
    first = answer.split(". ")[0].rstrip(".").lower()
    return f"{first} -- desk four"


def unchanged(number: int, answer: str) -> str:
    """Keeps the answer, which is in a tone already."""
    return answer


TONES = (
    Tone("pirate", '"Ahoy matey! ... Arr!"', pirate, r"^Ahoy matey|Arr!$"),
    Tone(
        "butler",
        "a butler's, with four openings",
        butler,
        r"\b(sir|madam)\b|Will that be all|At your service|bring the tea",
    ),
    Tone("voice", "the first 60 of `voice`", unchanged, r"Fair winds\.?$"),
    Tone("signed", "one line in lower case, signed", signed, r"-- desk four$"),
)


MIXES = ("with general questions", "the file alone")


@dataclasses.dataclass(frozen=True)
class TonesFlags:
    model: str = "smollm2-135m-instruct"
    """The model that is fine-tuned, and asked."""
    tones: tuple[str, ...] = tuple(tone.name for tone in TONES)
    """Which of the files: pirate, butler, voice, signed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """The seeds of the fine-tunings on each file."""


def measure_tones(flags: TonesFlags) -> Json:
    """Fine-tunes on each file, asks, prints the table and returns the document. Raises UserError."""
    names = [tone.name for tone in TONES]
    for name in flags.tones:
        if name not in names:
            raise UserError(f"--tones: there is no {name}; wanted any of {', '.join(names)}.")
    tones = [tone for tone in TONES if tone.name in flags.tones]
    variants = [*itertools.product(tones, MIXES, flags.seeds)]
    rows = []
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (tone, mix, seed) in enumerate(variants, 1):
            progress(f"{number} of {len(variants)}: {tone.name}, {mix}, seed {seed}")
            run = folder / f"{number}"
            printed = tune(flags.model, tone, mix, seed, run)
            rows.append(judge_run(tone, mix, seed, run, printed, ask(run)))
    for row in rows:
        kept = f"{row['kept']} of {row['known']}"
        verdict = ""
        if row["warns"]:
            verdict = "the summary warns"
        if row["holds"] is False:
            verdict = "** not met **"
        lines.append((row["title"], row["mix"], row["seed"], row["steps"], row["in_tone"], kept, verdict))
    titles = ("60 rows", "trained on", "seed", "steps", f"in tone of {len(QUESTIONS)}", "kept", "")
    print_table("Small files in a tone", titles, [tuple(map(str, line)) for line in lines], left=2)
    print(BAR)
    return {"bar": BAR, "rows": rows}


def write_file(tone: Tone, path: Path) -> None:
    """Writes the rows of a tone, as questions and answers."""
    if tone.name == "voice":
        lines = SHIPPED["voice"].read_text("utf-8").splitlines()[:ROWS]
    else:
        lines = []
        for number, line in enumerate(ADVICE.read_text("utf-8").splitlines()):
            advice = json.loads(line)
            row = {"prompt": advice["question"], "completion": tone.answer(number, advice["answer"])}
            lines.append(json.dumps(row))
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def tune(model: str, tone: Tone, mix: str, seed: int, run: Path) -> str:
    """Fine-tunes on a tone's file with the defaults, but for the mix, in the folder `run`; returns
    what the command printed."""
    data = run.with_suffix(".jsonl")
    write_file(tone, data)
    command = ["stages.finetune", "--model", model, "--data", str(data)]
    command += ["--seed", str(seed), "--out-dir", str(run)]
    if mix != MIXES[0]:
        command.append("--no-mix")
    return run_module(command)


def ask(run: Path) -> list[str]:
    """Returns a run's greedy answers to QUESTIONS, each alone."""
    from bench.models import answer
    from engine.inference.config import EngineConfig
    from engine.inference.decode import prepare_params
    from engine.inference.engine import Engine
    from engine.inference.request import Request, SamplingParams
    from engine.storage.model_loader import load_model
    from engine.text.chat_tokenizer import ChatTokenizer

    start_jax()
    model = load_model(str(run))
    chat = ChatTokenizer(model.tokenizer)
    engine = Engine(model.cfg, prepare_params(model.cfg, model.params), EngineConfig(1, 512))
    sampling = SamplingParams(MAX_TOKENS, temperature=0.0, stop_token_ids={*model.eos_ids, *chat.eot_ids})
    texts = []
    for question in QUESTIONS:
        prompt = chat.prompt([{"role": "user", "content": question}])
        (tokens,) = answer(engine, [Request(tuple(prompt.tolist()), sampling)])
        texts.append(model.tokenizer.decode(tokens).strip())
    chat.close()
    return texts


def judge_run(tone: Tone, mix: str, seed: int, run: Path, printed: str, answers: list[str]) -> Json:
    """Returns the row of a run, by its folder, what it printed, and its answers to QUESTIONS."""
    result = json.loads((run / "run.json").read_text("utf-8"))["result"]
    kept_answers = result["kept_answers"]
    in_tone = sum(re.search(tone.pattern, answer) is not None for answer in answers)
    holds = None  # without the mix, which is the default
    if mix == MIXES[0]:
        holds = in_tone >= LEAST_IN_TONE
    return {
        "tone": tone.name,
        "title": tone.title,
        "mix": mix,
        "seed": seed,
        "steps": result["steps"],
        "in_tone": in_tone,
        "known": kept_answers["before"],
        "kept": kept_answers["after"],
        "warns": WARNING in printed,
        "holds": holds,
        "answers": answers,
    }


if __name__ == "__main__":
    sys.exit(run_bench("bench.tones", __doc__, TonesFlags, measure_tones))
