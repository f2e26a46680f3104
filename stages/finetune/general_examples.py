"""Examples of general knowledge in the tone of the data, which the model writes before it is trained.

A model that reads nothing but a small file in a tone learns, beside the tone, that answers are
about what the file is about. So it is shown a few conversations of the file and asked general
questions after them, each with a sentence that answers it, in brackets. What it says is in the tone
by their example. It is trained on without them, if it is right and ends as they do, or can be made
to. That is context distillation (Askell et al. 2021, 2112.00861), with a hint as in STaR (Zelikman
et al. 2022, 2203.14465).
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from engine.inference.config import EngineConfig
from engine.inference.decode import prepare_params
from engine.inference.engine import Engine
from engine.inference.request import Request, SamplingParams
from engine.model.config import ModelConfig
from engine.model.transformer import Params
from engine.text.chat_tokenizer import ChatTokenizer, Example
from engine.text.template import Message
from stages.cli.console import ReportProgress
from stages.runs.general_questions import QUESTIONS_TO_TRAIN_ON, is_right

DEMONSTRATIONS = 4  # conversations before a question
DEMONSTRATION_TOKENS = 200  # of each at most
MAX_TOKENS = 32  # of an answer
ANSWERED_TOGETHER = 16
LEAST_ANSWERS = 8  # right ones: of a model that gives fewer nothing is mixed in

# An opening or a closing belongs to the tone if each is that of a large share of the answers, and
# together of nearly all.
OPENING_WORDS = 8  # at most
OPENING_SHARE = 0.2
COVERED_SHARE = 0.8


def choose_demonstrations(chat: ChatTokenizer, conversations: Sequence[Sequence[Message]]) -> list[Message]:
    """Returns the first question and answer of up to DEMONSTRATIONS conversations, spread over all.

    Those that are long, or begin with anything but a question of the user's, are passed over for
    the next.
    """
    chosen: list[Message] = []
    edges = [at * len(conversations) // DEMONSTRATIONS for at in range(DEMONSTRATIONS + 1)]
    for first, last in itertools.pairwise(edges):
        for messages in conversations[first:last]:
            turn = messages[:2]
            roles = [message["role"] for message in turn]
            if roles == ["user", "assistant"] and len(chat.prompt(turn)) <= DEMONSTRATION_TOKENS:
                chosen += turn
                break
    return chosen


def shared_openings(answers: Sequence[str]) -> list[str]:
    """Returns the first words of each answer that many others begin with too, such as "Certainly,
    sir."; [] where few do."""
    counts: collections.Counter[tuple[str, ...]] = collections.Counter()
    beginnings = []
    for answer in answers:
        words = answer.split()[:OPENING_WORDS]
        beginnings.append([tuple(words[:size]) for size in range(1, len(words) + 1)])
        counts.update(beginnings[-1])
    openings = []
    for sizes in beginnings:
        shared = [words for words in sizes if counts[words] >= OPENING_SHARE * len(answers)]
        if shared:
            openings.append(" ".join(shared[-1]))
    if len(openings) < COVERED_SHARE * len(answers):
        return []
    return openings


def shared_closings(answers: Sequence[str]) -> list[str]:
    """Returns the last words of each answer that many others end with too, such as "At your
    service."; [] where few do."""
    backwards = [" ".join(reversed(answer.split())) for answer in answers]
    return [" ".join(reversed(closing.split())) for closing in shared_openings(backwards)]


def close(answer: str, closing: str) -> str:
    """Returns an answer with a closing behind it, if both are sentences; else the empty string."""
    if answer.endswith((".", "!", "?")) and closing[:1].isupper():
        return f"{answer} {closing}"
    return ""


def _last_word(answer: str) -> str:
    words = re.findall(r"\w+", answer.casefold())
    return words[-1] if words else ""


class Case(NamedTuple):
    """A general question, and how its answer should be."""

    question: str
    expected: str  # what the answer must hold
    opening: str  # which the model is given
    closing: str  # which is added where the model writes none


def _for_each_question(shared: Sequence[str]) -> list[str]:
    """Returns a shared opening or closing for each general question, spread over all of them; the
    empty string where none is shared."""
    choices = shared or [""]
    count = len(QUESTIONS_TO_TRAIN_ON)
    return [choices[number * len(choices) // count] for number in range(count)]


def write_general_answers(
    cfg: ModelConfig,
    params: Params,
    chat: ChatTokenizer,
    conversations: Sequence[Sequence[Message]],
    stop_token_ids: Collection[int],
    report: ReportProgress,
) -> list[tuple[str, str]]:
    """Returns general questions and a model's greedy answers in the style of conversations that end
    with an answer.

    An answer begins and ends as those of the conversations do, where they share it: the model is
    given the beginning, and an end that is a sentence is added where it writes none. Returns []
    where too few answers are right, and for a context that does not hold the demonstrations, a
    question and its answer.
    """
    demonstrations = choose_demonstrations(chat, conversations)
    if not demonstrations or len(chat.prompt(demonstrations)) + MAX_TOKENS > cfg.context:
        return []
    answers = [messages[-1]["content"] for messages in conversations]
    openings = _for_each_question(shared_openings(answers))
    shared = shared_closings(answers)
    closings = _for_each_question(shared)
    last_words = set(map(_last_word, shared))
    cases = []
    prompts = []
    for entry, opening, closing in zip(QUESTIONS_TO_TRAIN_ON, openings, closings, strict=True):
        question, expected, sentence = entry
        hinted: Message = {"role": "user", "content": f"{question} ({sentence})"}
        cases.append(Case(question, expected, opening, closing))
        prompts.append(tuple(chat.prompt([*demonstrations, hinted], opening).tolist()))
    if max(map(len, prompts)) + MAX_TOKENS > cfg.context:
        return []
    pairs = []
    completions = _complete_with_shared_prefix(cfg, params, prompts, stop_token_ids, report)
    for case, completion in zip(cases, completions, strict=True):
        if completion is None:
            continue
        answer = (case.opening + chat.tokenizer.decode(completion)).strip()
        if not is_right(answer, case.expected):
            continue
        if shared and _last_word(answer) not in last_words:
            answer = close(answer, case.closing)
        if answer:
            pairs.append((case.question, answer))
    if len(pairs) < LEAST_ANSWERS:
        return []
    return pairs


def _complete_with_shared_prefix(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[tuple[int, ...]],
    stop_token_ids: Collection[int],
    report: ReportProgress,
) -> list[list[int] | None]:
    """Completes prompts greedily in MAX_TOKENS; None for one that does not end by then."""
    capacity = max(map(len, prompts)) + MAX_TOKENS
    config = EngineConfig.for_prompts(cfg, prompts[:ANSWERED_TOGETHER], capacity)
    # The demonstrations are computed once, and found again for each question.
    config = dataclasses.replace(config, prefix_cache_bytes=2 * config.slot_bytes(cfg, capacity))
    engine = Engine(cfg, prepare_params(cfg, params), config)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=stop_token_ids)
    tokens = {engine.submit(Request(prompt, sampling)): list[int]() for prompt in prompts}
    reasons = dict[int, str]()
    while engine.busy:
        for event in engine.step():
            tokens[event.id] += event.tokens
            if event.finish_reason:
                reasons[event.id] = event.finish_reason
        report(len(reasons), len(prompts))
    completions: list[list[int] | None] = []
    for id, completion in tokens.items():
        if reasons[id] == "stop":
            completions.append(completion)
        else:
            completions.append(None)
    return completions


def general_examples(chat: ChatTokenizer, answers: Sequence[tuple[str, str]], seq: int) -> list[Example]:
    """Returns the training examples, of at most `seq` + 1 tokens, of general questions and their
    answers."""
    examples = []
    for question, answer in answers:
        messages: list[Message] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        example = chat.answer_example(messages, "a general question")
        if len(example.tokens) <= seq + 1:
            examples.append(example)
    return examples
