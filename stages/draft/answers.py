"""Lets a model ask itself questions and answer them, many at a time, until the time is up."""

import dataclasses
from collections.abc import Callable, Collection

from engine.inference.request import Request
from engine.inference.sampling_params import SamplingParams
from engine.inference.slots import Slots
from engine.ngrams import Answers
from engine.text.chat_tokenizer import ChatTokenizer

MAX_QUESTION, MAX_ANSWER = 64, 200  # tokens
QUESTIONS = SamplingParams(temperature=1.0, top_k=64)


class SelfChat:
    """The questions and answers of a model, each question answered greedily and once more as it is usually sampled.

    A user's turn is begun, and what the model writes there is the question (Xu et al. 2024, Magpie, 2406.08464). A model
    without control tokens for turns goes on from the beginning of a text instead, as it is sampled.
    """

    def __init__(self, slots: Slots, chat: ChatTokenizer, end_ids: Collection[int], answering: SamplingParams) -> None:
        self.slots, self.chat, self.answering, self.seed = slots, chat, answering, 0
        self.ends = frozenset({*end_ids, *chat.eot_ids})
        if chat.eot_ids:
            one, other = (chat.prompt([{"role": "user", "content": text}]).tolist() for text in ("apple", "Zebras?"))
            same = next(at for at, (a, b) in enumerate(zip(one, other)) if a != b)
            self.beginning = one[:same]
        else:
            self.beginning = [*chat.tokenizer.bos_ids, *chat.tokenizer.encode("\n").tolist()]
        # By request: its tokens so far, and how many of them are the prompt's.
        self.questions: dict[int, tuple[list[int], int]] = {}
        self.answers: dict[int, tuple[list[int], int]] = {}

    def run(self, until: Callable[[], bool]) -> Answers:
        """Returns the answers so far, complete or not, once `until()`."""
        while not until():
            while self.slots.waiting < 2:
                self._begin()
            for id, tokens, reason, *_ in self.slots.step():
                text, start = self.questions.get(id) or self.answers[id]
                text += tokens
                if reason and self.questions.pop(id, None):
                    self._answer(self.chat.tokenizer.decode(text[start:]).strip())
        for id in (*self.questions, *self.answers):
            self.slots.cancel(id)
        return [answer for answer in self.answers.values() if len(answer[0]) > answer[1]]

    def _begin(self) -> None:
        self.seed += 1
        if self.chat.eot_ids:
            self._submit(self.questions, self.beginning, QUESTIONS, min(MAX_QUESTION, self.slots.capacity // 4), ticket=1)
        else:
            self._submit(self.answers, self.beginning, self.answering, MAX_ANSWER)

    def _answer(self, question: str) -> None:
        prompt = self.chat.prompt([{"role": "user", "content": question}]).tolist()
        for sampling in (SamplingParams(temperature=0.0), self.answering):
            self._submit(self.answers, prompt, sampling, MAX_ANSWER)

    def _submit(
        self, to: dict[int, tuple[list[int], int]], prompt: list[int], sampling: SamplingParams, most: int, ticket: int = 0
    ) -> None:
        if (room := min(most, self.slots.capacity - len(prompt))) > 0:
            sampling = dataclasses.replace(sampling, max_tokens=room, seed=self.seed, stop_token_ids=self.ends)
            to[self.slots.submit(Request(tuple(prompt), sampling), ticket)] = list(prompt), len(prompt)
