"""Answers to questions: a few before and after training, with a note on each fault, and many, for metrics."""

import dataclasses
import functools
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
SPARE_TOKENS = 16  # that an answer may have beyond the longest reference
WIDTH = 96  # characters of a printed line


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a question, with what is to be seen of it without a reference. In run.json too."""

    question: str
    text: str
    tokens: int
    stops: bool  # by itself, before MAX_TOKENS
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
    for question, completion in zip(questions, completions):
        if completion:
            text = chat.tokenizer.decode(completion.tokens).strip()
            answer = JudgedAnswer(
                question=question[-1]["content"],
                text=text,
                tokens=len(completion.tokens),
                stops=completion.finish_reason == "stop",
                repeats=repeats_itself(text),
            )
            answers.append(answer)
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
    for (question, expected), completion in zip(questions, completions, strict=True):
        if completion:
            text = chat.tokenizer.decode(completion.tokens)
            if general_questions.is_right(text, expected):
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
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stop_token_ids)
    prompts = [chat.prompt(messages).tolist() for messages in conversations]
    completions: list[Completion | None] = [None] * len(prompts)

    def report_after(before: int, done: int, _: int) -> None:
        report(before + done, len(prompts))

    for batch in itertools.batched(range(len(prompts)), ANSWERED_TOGETHER):
        places = [place for place in batch if len(prompts[place]) < cfg.context]
        if places:
            fitting = [prompts[place] for place in places]
            capacity = min(cfg.context, max(map(len, fitting)) + max_tokens)
            report_batch = functools.partial(report_after, batch[0])
            batch_completions = complete(
                cfg, params, fitting, [sampling] * len(fitting), capacity, report_batch
            )
            for place, completion in zip(places, batch_completions, strict=True):
                completions[place] = completion
        report(batch[-1] + 1, len(prompts))
    return completions


class AnswerMetrics:
    """Scores greedy answers, by one metric for each task: exact, regex:PATTERN or FILE.py:FUNCTION
    (as in Rewards).

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
        """Returns the mean of each metric, by its task, over the answers to `references`:
        conversations, each of which ends with the answer that is wanted.

        An answer has at most SPARE_TOKENS more than the longest of those. A conversation that fills
        the context counts as answered by nothing. Raises UserError without references.
        """
        self.check(references)
        if not self._rewards:
            return {}
        prompts = [messages[:-1] for messages in references]
        answers = [messages[-1]["content"] for messages in references]
        max_tokens = SPARE_TOKENS + max(len(chat.tokenizer.encode(answer)) for answer in answers)
        completions = _complete(cfg, params, chat, prompts, max_tokens, stop_token_ids, report)
        texts = []
        for completion in completions:
            text = ""
            if completion:
                text = chat.tokenizer.decode(completion.tokens).strip()
            texts.append(text)
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
    without_numbers = re.sub(r"(?m)^\s*\d+[.)]", "", text.lower())
    words = re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|\w+", without_numbers)
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
