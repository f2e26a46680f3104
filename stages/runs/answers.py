"""Answers to questions: a few before and after training, with a note on each fault, and many, for metrics."""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence

from engine.errors import UserError
from engine.inference.decode import prepare_params
from engine.inference.engine import Completion, complete
from engine.inference.request import SamplingParams
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.chat_tokenizer import ChatTokenizer
from engine.text.template import Message
from stages.cli.console import ReportProgress
from stages.runs import general_questions
from stages.runs.rewards import Rewards

MAX_TOKENS = 120  # of an answer
# Share of an answer's four-word sequences: at most 0.05 in the house voice, 0.01 in human texts.
MAX_REPEATED = 0.2
METRIC_SECONDS = 60.0  # that a function of the user's own has for all answers
ANSWERED_TOGETHER = 8
WIDTH = 96  # characters of a printed line


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a question."""

    question: str
    text: str
    tokens: int
    stops: bool  # whether it ends by itself
    repeats: bool  # whether it repeats itself

    @property
    def faults(self) -> str:
        faults = []
        if not self.stops:
            faults.append(f"does not stop within {self.tokens} tokens")
        if self.repeats:
            faults.append("repeats itself")
        return " and ".join(faults)


def ask(
    cfg: ModelConfig,
    params: Params,
    chat: ChatTokenizer,
    questions: Sequence[Sequence[Message]],
    stop_token_ids: Collection[int],
    report: ReportProgress = lambda *_: None,
) -> tuple[JudgedAnswer, ...]:
    """Returns the greedy answers to conversations that end with a question; leaves out one that
    fills the model's context."""
    completions = _complete(cfg, params, chat, questions, MAX_TOKENS, stop_token_ids, report)
    answers = []
    for question, end in zip(questions, completions):
        if end:
            text = chat.tokenizer.decode(end.tokens).strip()
            stops = end.finish_reason == "stop"
            answers.append(
                JudgedAnswer(question[-1]["content"], text, len(end.tokens), stops, repeats_itself(text))
            )
    return tuple(answers)


def known_questions(
    cfg: ModelConfig,
    params: Params,
    chat: ChatTokenizer,
    stop_token_ids: Collection[int],
    report: ReportProgress,
) -> tuple[str, ...]:
    """Returns those of the general questions that a model answers right, greedily."""
    questions = general_questions.QUESTIONS
    conversations = [[{"role": "user", "content": question}] for question, _ in questions]
    completions = _complete(
        cfg, params, chat, conversations, general_questions.MAX_TOKENS, stop_token_ids, report
    )
    known = []
    for (question, expected), end in zip(questions, completions, strict=True):
        if end and general_questions.is_right(chat.tokenizer.decode(end.tokens), expected):
            known.append(question)
    return tuple(known)


def _complete(
    cfg: ModelConfig,
    params: Params,
    chat: ChatTokenizer,
    conversations: Sequence[Sequence[Message]],
    max_tokens: int,
    stop_token_ids: Collection[int],
    report: ReportProgress = lambda *_: None,
) -> list[Completion | None]:
    """Completes conversations greedily, ANSWERED_TOGETHER at once; None where one fills the model's
    context."""
    params = prepare_params(cfg, params)
    completions: list[Completion | None] = []
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop_token_ids)
    for batch in itertools.batched(conversations, ANSWERED_TOGETHER):
        prompts = [chat.prompt(messages).tolist() for messages in batch]
        fitting = [prompt for prompt in prompts if len(prompt) < cfg.context]
        capacity = min(cfg.context, max(map(len, fitting), default=0) + max_tokens)
        before = len(completions)

        def report_batch(done: int, _: int, before: int = before) -> None:
            report(before + done, len(conversations))

        ends = (
            complete(cfg, params, fitting, [sampling] * len(fitting), capacity, report_batch)
            if fitting
            else []
        )
        waiting = iter(ends)
        for prompt in prompts:
            completions.append(next(waiting) if len(prompt) < cfg.context else None)
        report(len(completions), len(conversations))
    return completions


class AnswerMetrics:
    """Scores greedy answers by tasks as of Rewards, each a metric of its own: exact, regex:PATTERN,
    FILE.py:FUNCTION.

    Raises UserError as Rewards, and for `sum`, whose answers are numbers.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._rewards = {task: Rewards([task], METRIC_SECONDS) for task in tasks}
        if any("sum" in rewards.names for rewards in self._rewards.values()):
            raise UserError(
                "A metric is exact, regex:PATTERN, or FILE.py:FUNCTION; the task sum is for reinforce alone."
            )

    def check(self, references: Sequence[Sequence[Message]]) -> None:
        """Raises UserError when there are metrics and no references."""
        if self._rewards and not references:
            raise UserError(
                "--metric compares with the answers of conversations, and there are none in this data."
            )

    def score(
        self,
        cfg: ModelConfig,
        params: Params,
        chat: ChatTokenizer,
        references: Sequence[Sequence[Message]],
        stop_token_ids: Collection[int],
        report: ReportProgress = lambda *_: None,
    ) -> dict[str, float]:
        """Returns the mean of each metric over the answers to conversations, each up to the
        reference that it ends with.

        An answer has at most the longest reference's tokens and 16.

        A conversation that fills the context counts as answered by nothing. Raises UserError
        without references.
        """
        self.check(references)
        if not self._rewards:
            return {}
        prompts = [messages[:-1] for messages in references]
        answers = [messages[-1]["content"] for messages in references]
        room = 16 + max(len(chat.tokenizer.encode(answer)) for answer in answers)
        completions = _complete(cfg, params, chat, prompts, room, stop_token_ids, report)
        texts = []
        for end in completions:
            texts.append(chat.tokenizer.decode(end.tokens).strip() if end else "")
        questions = [prompt[-1]["content"] for prompt in prompts]
        scores = {}
        for task, rewards in self._rewards.items():
            scores[task] = sum(rewards(questions, texts, answers)) / len(texts)
        return scores


def repeats_itself(text: str) -> bool:
    """Whether more than MAX_REPEATED of a text's four-word sequences occur earlier in it.

    The share is seq-rep-4 of Welleck et al. 2020 (1908.04319), without case, punctuation and the
    numbers of a list. An ideograph or a kana counts as a word.
    """
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w+", re.sub(r"(?m)^\s*\d+[.)]", "", text.lower()))
    sequences = [*zip(words, words[1:], words[2:], words[3:])]
    return len(sequences) - len({*sequences}) > MAX_REPEATED * len(sequences)


def compare(
    questions: Iterable[str], before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Returns each question, and its answers before and after, a text and a note ('' for none),
    below one another."""
    compared = []
    for question, earlier, later in zip(questions, before, after):
        lines = [*_titled("before", *earlier), *_titled("after", *later)]
        compared.append((question, "\n".join(lines)))
    return compared


def _titled(title: str, text: str, note: str) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()) or "(nothing)", WIDTH)
    if note:
        lines.append(f"[{note}]")
    first, *others = lines
    return [f"{title:<6}  {first}", *(f"{'':<6}  {line}" for line in others)]


def describe_faults(answers: Sequence[JudgedAnswer]) -> str:
    endless = sum(not answer.stops for answer in answers)
    repeating = sum(answer.repeats for answer in answers)
    if not endless + repeating:
        return f"all {len(answers)} stop and none repeats itself"
    return f"{endless} of {len(answers)} do not stop, {repeating} repeat themselves"
