"""Answers to a few questions before and after training, with a note on one that does not stop or repeats itself."""

import dataclasses
import re
import textwrap
from collections.abc import Collection, Sequence

from engine.inference.decode import prepare_params
from engine.inference.engine import complete
from engine.inference.request import SamplingParams
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.template import Message

MAX_TOKENS = 120  # of an answer
MAX_REPEATED = 0.2  # share of an answer's four-word sequences: at most 0.05 in the house voice, 0.01 in human texts
WIDTH = 96  # characters of a printed line


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a question: its length in tokens, whether it ends by itself, and whether it repeats itself."""

    question: str
    text: str
    tokens: int
    stops: bool
    repeats: bool

    @property
    def faults(self) -> str:
        faults = [] if self.stops else [f"does not stop within {self.tokens} tokens"]
        return " and ".join([*faults, *["repeats itself"] * self.repeats])


def ask(
    cfg: ModelConfig,
    params: Params,
    chat: ChatTokenizer,
    questions: Sequence[Sequence[Message]],
    stop_token_ids: Collection[int],
) -> tuple[Answer, ...]:
    """Returns the greedy answers to conversations that end with a question, of at most MAX_TOKENS tokens.

    Leaves out a conversation that fills the model's context.
    """
    pairs = [(question[-1]["content"], chat.prompt(question).tolist()) for question in questions]
    pairs = [(question, prompt) for question, prompt in pairs if len(prompt) < cfg.context]
    if not pairs:
        return ()
    prompts = [prompt for _, prompt in pairs]
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=stop_token_ids)
    capacity = min(cfg.context, max(map(len, prompts)) + MAX_TOKENS)
    completions = complete(cfg, prepare_params(cfg, params), prompts, [sampling] * len(prompts), capacity)
    texts = [chat.tokenizer.decode(tokens).strip() for tokens, *_ in completions]
    return tuple(
        Answer(question, text, len(tokens), reason == "stop", repeats_itself(text))
        for (question, _), text, (tokens, reason, _) in zip(pairs, texts, completions)
    )


def repeats_itself(text: str) -> bool:
    """Whether more than MAX_REPEATED of a text's four-word sequences occur earlier in it.

    The share is seq-rep-4 of Welleck et al. 2020 (1908.04319), without case, punctuation and the numbers of a list.
    An ideograph or a kana counts as a word.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w+", re.sub(r"(?m)^\s*\d+[.)]", "", text.lower()))
    sequences = [*zip(words, words[1:], words[2:], words[3:])]
    return len(sequences) - len({*sequences}) > MAX_REPEATED * len(sequences)


def compare(before: Sequence[Answer], after: Sequence[Answer]) -> list[tuple[str, str]]:
    """Returns for each question (question, both answers below one another), with a note below an answer that has faults."""
    return [
        (old.question, before_and_after((old.text, old.faults), (new.text, new.faults)))
        for old, new in zip(before, after, strict=True)
    ]


def before_and_after(*answers: tuple[str, str]) -> str:
    """Returns two answers, each a text and a note ('' for none), below one another."""
    shown = []
    for title, (text, note) in zip(("before", "after"), answers, strict=True):
        lines = textwrap.wrap(" ".join(text.split()) or "(nothing)", WIDTH) + [f"[{note}]"] * bool(note)
        shown += [f"{name:<6}  {line}" for name, line in zip([title, *[""] * len(lines)], lines)]
    return "\n".join(shown)


def describe_faults(answers: Sequence[Answer]) -> str:
    """Returns, in words, how many answers do not stop or repeat themselves."""
    endless, repeating = sum(not answer.stops for answer in answers), sum(answer.repeats for answer in answers)
    if not endless + repeating:
        return f"all {len(answers)} stop and none repeats itself"
    return f"{endless} of {len(answers)} do not stop, {repeating} repeat themselves"
