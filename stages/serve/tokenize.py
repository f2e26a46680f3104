"""Texts and conversations to tokens and back, off the event loop: two lanes, so that a short one waits for no long one.

Each lane is a thread with a chat template's process of its own. The tokenizer works in native code without Python's
lock, and a template in its own process, so the event loop goes on meanwhile.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import UserError
from engine.text.chat import PLAIN, Chat
from engine.text.tokenizer import Tokenizer
from stages.serve.errors import Refused

SHORT = 16_384  # characters of what the quick lane takes
MOST_WAITING = 64  # jobs of a lane
WORTH_COUNTING = 4_000_000  # characters that a template would be given in all, above which the text alone is counted first

Messages = Sequence[dict[str, str]]


class Lane:
    """A thread that does one job after the other."""

    def __init__(self, name: str, chat: Callable[[], Chat]) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._make = chat
        self._made: Chat | None = None
        self._waiting = 0

    @property
    def chat(self) -> Chat:
        """To be used in the lane's thread."""
        if self._made is None:
            self._made = self._make()
        return self._made

    async def do[T](self, work: Callable[..., T], *arguments: Any) -> T:
        if self._waiting >= MOST_WAITING:
            said = "Too many texts wait to become tokens."
            raise Refused(429, said, code="rate_limit_exceeded", headers={"Retry-After": "1"})
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._made is not None:
            self._made.close()


class Prompts:
    """A model's tokenizer and chat template. `another` makes a chat for the second lane; `start`: ids
    before a plain text; `room`: tokens that a slot can hold."""

    def __init__(
        self, tokenizer: Tokenizer, chat: Chat, another: Callable[[], Chat], start: tuple[int, ...], room: int
    ) -> None:
        self.tokenizer, self.start, self.room = tokenizer, start, room
        self.answers_end = chat.end
        self.indented = chat.source == PLAIN  # an answer then begins behind a name, with a space
        self._quick, self._slow = Lane("quick", lambda: chat), Lane("slow", another)

    async def of_texts(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """The tokens of each text, as a model reads it when it is to be continued. Raises Refused."""
        start = self.start if special else ()
        encode = lambda: [[*start, *self.tokenizer.encode(text).tolist()] for text in texts]
        return await self._lane(sum(map(len, texts))).do(_mended, encode, "prompt")

    async def of_chat(self, messages: Messages) -> list[int]:
        """The tokens of a conversation up to where the assistant is to answer. Raises Refused."""
        size = sum(len(message["content"]) for message in messages)
        answers = sum(message["role"] == "assistant" for message in messages)
        # A template is run once and twice more for each answer in the conversation.
        lane = self._lane(size * (1 + answers))

        def encode() -> list[int]:
            if size * (1 + answers) > WORTH_COUNTING:
                self._check_size(messages)
            return lane.chat.prompt(messages).tolist()

        return await lane.do(_mended, encode, "messages")

    async def to_text(self, tokens: list[int]) -> str:
        return await self._lane(len(tokens)).do(self.tokenizer.decode, tokens)

    def close(self) -> None:
        self._quick.close()
        self._slow.close()

    def _lane(self, size: int) -> Lane:
        return self._quick if size <= SHORT else self._slow

    def _check_size(self, messages: Messages) -> None:
        """Raises Refused for a conversation whose text alone is too long, before a template is given it many times over."""
        count = sum(len(self.tokenizer.encode(message["content"])) for message in messages)
        if count >= self.room:
            raise overflow(count, None, self.room, "messages")


def overflow(count: int, asked: int | None, room: int, param: str) -> Refused:
    """What is said of a prompt of `count` tokens that leaves no room for the `asked` ones, or for any."""
    wanted = f"and {asked:,} more were asked for, {count + asked:,} in all" if asked else "which leaves none for an answer"
    return Refused(
        400, f"This model's context holds {room:,} tokens here. The prompt has {count:,}, {wanted}. Nothing was left out: "
        "shorten the prompt" + (", or ask for fewer tokens." if asked else "."), param=param, code="context_length_exceeded",
    )  # fmt: skip


def _mended[T](work: Callable[[], T], param: str) -> T:
    try:
        return work()
    except UserError as error:
        said = str(error)
        raise Refused(400, said[0].upper() + said[1:].rstrip(".") + ".", param=param) from None


def spoken(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token as it is shown by itself, and its bytes: a control token by its name, half a character by its bytes."""
    if token in tokenizer.controls:
        name = tokenizer.controls[token].content
        return name, name.encode()
    value = tokenizer.bytes_of(token)
    try:
        return value.decode(), value
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value), value


def batched_ids(prompt: object) -> list[list[int]] | None:
    """A prompt of token ids, or of several such lists; None for texts. Raises Refused for a mixture."""
    if not isinstance(prompt, list) or all(isinstance(part, str) for part in prompt):
        return None
    if all(isinstance(part, int) for part in prompt):
        return [prompt]
    if all(isinstance(part, list) for part in prompt):
        return prompt
    raise Refused(400, "prompt must hold only texts, only token ids, or only lists of token ids.", param="prompt")
