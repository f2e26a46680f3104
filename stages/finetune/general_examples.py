"""Examples of general knowledge in the style of the data, which the model itself writes before it is trained on both.

A model that reads nothing but a small file in a tone learns, beside the tone, that answers are about what the file is about. So
it is shown a few conversations of the file and asked general questions after them, each with its answer in brackets. What it
says is in the tone by their example, and is trained on without them, if it holds the answer and ends. That is context
distillation (Askell et al. 2021, 2112.00861), with the answer as a hint as in STaR (Zelikman et al. 2022, 2203.14465).
"""

import dataclasses
from collections.abc import Collection, Sequence

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


def choose_demonstrations(chat: ChatTokenizer, conversations: Sequence[Sequence[Message]]) -> list[Message]:
    """Returns the messages of up to DEMONSTRATIONS short conversations of one question and one answer, spread over all."""
    fitting = []
    for messages in conversations:
        roles = [message["role"] for message in messages]
        if roles == ["user", "assistant"] and len(chat.prompt(messages)) <= DEMONSTRATION_TOKENS:
            fitting.append(messages)
    chosen = dict.fromkeys(at * len(fitting) // DEMONSTRATIONS for at in range(DEMONSTRATIONS)) if fitting else ()
    return [message for at in chosen for message in fitting[at]]


def write_general_answers(
    cfg: ModelConfig,
    params: Params,
    chat: ChatTokenizer,
    demonstrations: Sequence[Message],
    stop_token_ids: Collection[int],
    report: ReportProgress,
) -> list[tuple[str, str]]:
    """Returns general questions and a model's answers in the style of `demonstrations`; [] where too few are right.

    The answers are greedy. [] too for a context that does not hold the demonstrations, a question and its answer.
    """
    prompts = []
    for question, expected in QUESTIONS_TO_TRAIN_ON:
        hinted = f"{question} ({expected.partition('|')[0]})"
        prompts.append(tuple(chat.prompt([*demonstrations, {"role": "user", "content": hinted}]).tolist()))
    capacity = max(map(len, prompts)) + MAX_TOKENS
    if not demonstrations or capacity > cfg.context:
        return []
    config = EngineConfig.for_prompts(cfg, prompts[:ANSWERED_TOGETHER], capacity)
    # The demonstrations are computed once, and found again for each question.
    config = dataclasses.replace(config, prefix_cache_bytes=2 * config.slot_bytes(cfg, capacity))
    engine = Engine(cfg, prepare_params(cfg, params), config)
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop_token_ids=stop_token_ids)
    numbers = {engine.submit(Request(prompt, sampling)): number for number, prompt in enumerate(prompts)}
    tokens = [list[int]() for _ in prompts]
    ends = ["" for _ in prompts]
    while engine.busy:
        for event in engine.step():
            number = numbers[event.id]
            tokens[number] += event.tokens
            ends[number] = event.finish_reason or ""
        report(sum(map(bool, ends)), len(prompts))
    pairs = []
    for (question, expected), answer, end in zip(QUESTIONS_TO_TRAIN_ON, tokens, ends, strict=True):
        text = chat.tokenizer.decode(answer).strip()
        if end == "stop" and is_right(text, expected):
            pairs.append((question, text))
    return pairs if len(pairs) >= LEAST_ANSWERS else []


def general_examples(chat: ChatTokenizer, answers: Sequence[tuple[str, str]], seq: int) -> list[Example]:
    """Returns the training examples, of at most `seq` + 1 tokens, of general questions and their answers."""
    examples = []
    for question, answer in answers:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        example = chat.answer_example(messages, "a general question")
        if len(example.tokens) <= seq + 1:
            examples.append(example)
    return examples
