"""Turns texts and conversations into tokens and back, off the event loop; short ones wait for no long one.

Two workers tokenize, one for short texts and one for long ones. Each is a thread with a process of
its own for the chat template. A third thread compiles grammars. The tokenizer and the compiler are
native code that releases Python's lock, so the event loop goes on meanwhile.
"""

import asyncio
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import InvalidField, UserError
from engine.inference.constraints import Constraint, GrammarCompiler
from engine.text.chat_tokenizer import PLAIN, ChatTokenizer
from engine.text.documents import Documents, Passage, prompt_with
from engine.text.tokenizer import Tokenizer
from stages.serve.errors import ApiError
from stages.serve.grammar import Grammar
from stages.serve.tool_format import describe_tools, tool_format
from stages.serve.tools import Function, Turn

# Texts of more go to the worker for long texts. Admission bounds the bytes that wait for both.
SHORT_CHARACTERS = 16_384
COUNT_FIRST_CHARACTERS = 4_000_000  # above which tokens are counted before rendering
CACHED_GRAMMARS = 32  # the last ones, for agents ask again and again


class TokenizerPool:
    """The tokenizer and chat template of a model of `vocab` ids, on workers.

    `capacity`: tokens of a slot. `eos_ids`: tokens that end a text, as do those of the template.
    `documents`: as of `prompt_with`.
    """

    def __init__(
        self,
        chat: ChatTokenizer,
        capacity: int,
        vocab: int,
        eos_ids: Collection[int],
        documents: Documents | None = None,
    ) -> None:
        self.tokenizer = chat.tokenizer
        self.template = chat.source
        self.eot_ids = frozenset(chat.eot_ids)
        self.strips_space = chat.source == PLAIN  # replies then follow a name, and begin with a space
        self.tool_format, self._knows_tools = tool_format(chat.source)
        self._chat = chat
        self._capacity = capacity
        self._vocab = vocab
        self._end_ids = self.eot_ids.union(eos_ids)
        self._documents = documents
        self._short = ThreadPoolExecutor(1, "tokenize")
        self._long = ThreadPoolExecutor(1, "tokenize")
        self._grammars = ThreadPoolExecutor(1, "grammar")

    @functools.cached_property
    def _long_chat(self) -> ChatTokenizer:
        """The tokenizer for long texts, with a process of its own."""
        return ChatTokenizer(self.tokenizer, self._chat.source, self._chat.now)

    async def encode(
        self, texts: Sequence[str], special: bool = True, continued: bool = False
    ) -> list[list[int]]:
        """Returns the tokens of each text: after the model's start tokens if `special`, or `continued`.

        Raises InvalidField.
        """
        start: Sequence[int] = ()
        if special and not continued:
            start = self.tokenizer.bos_ids

        def encode(_: ChatTokenizer) -> list[list[int]]:
            return [[*start, *self.tokenizer.encode(text, continued).tolist()] for text in texts]

        return await self._run(sum(map(len, texts)), "prompt", encode)

    async def encode_chat(
        self,
        messages: Sequence[Turn],
        answer: str = "",
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Function] = (),
    ) -> tuple[list[int], list[Passage]]:
        """Returns the tokens of a conversation up to the assistant's next turn, of which `answer` is there.

        Passages of the documents are in them, and returned. `variables`: what else the template
        reads. Raises ApiError.
        """
        definitions = [tool.definition for tool in tools]
        template_variables = {**(variables or {}), "tools": definitions or None}
        if answer and self.strips_space:
            answer = f" {answer}"
        size = _rendered_characters(messages, template_variables) + len(answer)

        def encode(chat: ChatTokenizer) -> tuple[list[int], list[Passage]]:
            if size > COUNT_FIRST_CHARACTERS:  # refuse a long text before rendering it
                count = sum(len(self.tokenizer.encode(message["content"])) for message in messages)
                if count >= self._capacity:
                    raise context_overflow(count, self._capacity, "messages")

            def tokenize(turns: Sequence[Any]) -> list[int]:
                if not self._knows_tools:
                    turns = describe_tools(turns, tools)
                return chat.prompt(turns, answer, template_variables).tolist()

            return prompt_with(self._documents, messages, self.tokenizer, self._capacity, tokenize)

        return await self._run(size, "messages", encode)

    async def decode(self, tokens: list[int]) -> str:
        def decode(_: ChatTokenizer) -> str:
            return self.tokenizer.decode(tokens)

        return await self._run(len(tokens), "tokens", decode)

    async def compile(self, grammar: Grammar) -> Constraint:
        """Returns a grammar as a constraint. Raises InvalidField for one that cannot be followed."""

        def make() -> Constraint:
            return self._compile(grammar.make())

        try:
            return await asyncio.get_running_loop().run_in_executor(self._grammars, make)
        except UserError as error:
            raise InvalidField(grammar.field, f"{grammar.field}: {error}.") from None

    @functools.cached_property
    def _compile(self) -> Callable[[str], Constraint]:
        """Compiles a grammar, or returns it from the cache.

        The tokens are sorted for the compiler when the first grammar comes.
        """
        compiler = GrammarCompiler(self.tokenizer, self._vocab, self._end_ids)
        return functools.lru_cache(CACHED_GRAMMARS)(compiler.compile)

    def close(self) -> None:
        for thread in (self._short, self._long, self._grammars):
            thread.shutdown(wait=False, cancel_futures=True)
        self._chat.close()
        # A cached property is in the object's dictionary once it was read: when a long text came.
        if "_long_chat" in vars(self):
            self._long_chat.close()

    async def _run[T](self, size: int, param: str, work: Callable[[ChatTokenizer], T]) -> T:
        """Returns the result of `work` on a text of that size.

        A UserError becomes an InvalidField of `param`.
        """
        run = asyncio.get_running_loop().run_in_executor

        def work_long() -> T:
            return work(self._long_chat)  # which is made when the first long text comes

        try:
            if size <= SHORT_CHARACTERS:
                return await run(self._short, work, self._chat)
            return await run(self._long, work_long)
        except UserError as error:
            message = str(error)
            raise InvalidField(param, message[0].upper() + message[1:].rstrip(".") + ".") from None


def _rendered_characters(messages: Sequence[Turn], variables: Mapping[str, Any]) -> int:
    """Returns about how many characters the chat template writes for a conversation.

    It runs on the whole conversation, and twice for each answer in it on what comes before, on
    average half of it: as much text as so many renderings of the whole.
    """
    renderings = 1 + sum(message["role"] == "assistant" for message in messages)
    contents = sum(len(message["content"]) for message in messages)
    tool_calls = [message.get("tool_calls") for message in messages]
    others = len(json.dumps([variables, tool_calls]))
    return renderings * (contents + others)


def context_overflow(count: int, capacity: int, param: str, what: str = "the prompt has") -> ApiError:
    """Returns the error for `count` tokens, too many, in the field `param`; `what`: of what they are."""
    holds = f"This model's context holds {capacity:,} tokens here, those of an answer too"
    message = f"{holds}, and {what} {count:,}. Nothing was left out: shorten the text."
    return ApiError(400, message, param=param, code="context_length_exceeded")


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """Returns a token as text, and its bytes: a control token by name, half a character as `bytes:\\xe2`."""
    if token in tokenizer.controls:
        name = tokenizer.controls[token].content
        return name, name.encode()
    value = tokenizer.bytes_of(token)
    try:
        return value.decode(), value
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value), value
