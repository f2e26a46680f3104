"""Turns texts and conversations into tokens and back, off the event loop, on two workers: short texts wait for no long one.

Each worker is a thread with its own chat template process. The tokenizer is native code that releases Python's lock, so the
event loop goes on meanwhile.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.errors import UserError
from engine.text.chat_tokenizer import PLAIN, ChatTokenizer
from engine.text.tokenizer import Tokenizer
from stages.serve.errors import ApiError

SHORT_CHARACTERS = 16_384  # more go to the worker for long texts
MAX_WAITING = 64  # texts for each worker
COUNT_FIRST_CHARACTERS = 4_000_000  # above which tokens are counted before rendering


class _Worker:
    """A thread that tokenizes one text after the other, with a copy of `original` that is made on first use."""

    def __init__(self, original: ChatTokenizer) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._original, self._waiting = original, 0

    @functools.cached_property
    def chat(self) -> ChatTokenizer:
        return ChatTokenizer(self._original.tokenizer, self._original.source, self._original.now)

    async def run[T](self, param: str, work: Callable[[], T]) -> T:
        """Returns the result of `work`, run in the thread. A UserError becomes an ApiError about the field `param`."""
        if self._waiting >= MAX_WAITING:
            message = "Too many texts wait to become tokens."
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except UserError as error:
            message = str(error)
            raise ApiError(400, message[0].upper() + message[1:].rstrip(".") + ".", param=param) from None
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if "chat" in vars(self):
            self.chat.close()


class TokenizerPool:
    """A model's tokenizer and chat template on two workers. `capacity`: tokens of a slot."""

    def __init__(self, chat: ChatTokenizer, capacity: int) -> None:
        self.tokenizer, self._capacity = chat.tokenizer, capacity
        self.eot_ids = frozenset(chat.eot_ids)
        self.strips_space = chat.source == PLAIN  # replies then follow a name, and begin with a space
        self._short, self._long = _Worker(chat), _Worker(chat)
        self._short.chat = chat

    async def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Returns the tokens of each text, with the model's start tokens if `special`. Raises ApiError."""
        start = self.tokenizer.bos_ids if special else ()
        encode = lambda: [[*start, *self.tokenizer.encode(text).tolist()] for text in texts]
        return await self._worker(sum(map(len, texts))).run("prompt", encode)

    async def encode_chat(self, messages: Sequence[dict[str, str]], answer: str = "") -> list[int]:
        """Returns the tokens of a conversation up to the assistant's next turn, of which `answer` is there. Raises ApiError."""
        if answer and self.strips_space:
            answer = f" {answer}"
        # The template runs once, and twice more for each answer in the conversation.
        turns = 1 + sum(message["role"] == "assistant" for message in messages)
        size = turns * sum(len(message["content"]) for message in messages) + len(answer)
        worker = self._worker(size)

        def encode() -> list[int]:
            if size > COUNT_FIRST_CHARACTERS:  # refuse a long text before rendering it
                count = sum(len(self.tokenizer.encode(message["content"])) for message in messages)
                if count >= self._capacity:
                    raise context_overflow(count, self._capacity, "messages")
            return worker.chat.prompt(messages, answer).tolist()

        return await worker.run("messages", encode)

    async def decode(self, tokens: list[int]) -> str:
        return await self._worker(len(tokens)).run("tokens", lambda: self.tokenizer.decode(tokens))

    def close(self) -> None:
        self._short.close()
        self._long.close()

    def _worker(self, size: int) -> _Worker:
        return self._short if size <= SHORT_CHARACTERS else self._long


def context_overflow(count: int, capacity: int, param: str) -> ApiError:
    """Returns the error for a prompt of `count` tokens that leaves no room for one more."""
    message = (
        f"This model's context holds {capacity:,} tokens here. The prompt has {count:,}, which leaves none for an answer. "
    )
    return ApiError(400, f"{message}Nothing was left out: shorten the prompt.", param=param, code="context_length_exceeded")


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """Returns a token as text, and its bytes: a control token by its name, half a character as `bytes:\\xe2`."""
    if token in tokenizer.controls:
        name = tokenizer.controls[token].content
        return name, name.encode()
    value = tokenizer.bytes_of(token)
    try:
        return value.decode(), value
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value), value
