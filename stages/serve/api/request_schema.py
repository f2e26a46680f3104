"""What a client may ask: every field with its type and bounds, from which bodies are checked and the OpenAPI is written.

A field that is not here is refused by name, and so is one whose wish cannot be granted: an answer that silently lacks
what was asked for is worse than none. Fields that change nothing in an answer (`user`, `metadata`, ...) are taken.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_MESSAGES = 4096
MOST_BIASES = 1024
MOST_IDS = 2**18  # more than any context holds; what does not fit is said by the route

Share = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Some = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Ids = Annotated[list[TokenId], Meta(max_length=MOST_IDS)]
StopText = Annotated[str, Meta(min_length=1, max_length=LONGEST_STOP)]
Stops = StopText | Annotated[list[StopText], Meta(max_length=MOST_STOPS)]
BiasedToken = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})$(?!\n)")]  # one spelling of each token
Bias = Annotated[dict[BiasedToken, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MOST_BIASES)]
Labels = Annotated[dict[str, str], Meta(max_length=64)]
Nothing = Annotated[list[None], Meta(max_length=0)]  # a list that may be given as long as it is empty

# What is said of fields whose wishes this server does not grant.
UNABLE = {
    "tools": "The model is given no tools here", "tool_choice": "The model is given no tools here",
    "tool_calls": "The model is given no tools here", "functions": "The model is given no tools here",
    "function_call": "The model is given no tools here",
    "parallel_tool_calls": "The model is given no tools here",
    "response_format": "Answers are text; their format is not enforced here",
    "modalities": "Answers are text", "audio": "Answers are text",
    "reasoning_effort": "This setting does nothing for the models served here",
    "verbosity": "This setting does nothing for the models served here",
    "echo": "The prompt is not repeated in the completion here",
    "suffix": "Text is only continued at its end here", "best_of": "Every completion made is returned here; use n",
    "name": "The names of speakers are not given to the model",
    "include_obfuscation": "Nothing is added to chunks to hide how long their texts are",
    "prediction": "Predicted output is not used here", "web_search_options": "There is no search here",
}  # fmt: skip


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """`include_usage`: a last chunk tells what the answer took."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both kinds of completion can be asked for. Null means the default."""

    model: str = "default"
    max_tokens: Some | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: Bias | None = None
    seed: Seed | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions. `prompt`: a text, several, a list of token ids, or several such lists."""

    prompt: str | Annotated[list[str | TokenId | Ids], Meta(min_length=1, max_length=MOST_IDS)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class Said(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A message of a conversation. What clients send back of an earlier answer besides its text is taken when empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1, max_length=256)]
    name: Literal[""] | None = None
    refusal: Literal[""] | None = None
    annotations: Nothing | None = None
    tool_calls: Nothing | None = None
    tool_call_id: str | None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    """The one format there is."""

    type: Literal["text"]


class ChatRequest(Sampling, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Said], Meta(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Some | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Meta(max_length=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: Labels | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /tokenize: either a text as /v1/completions reads it, or messages as /v1/chat/completions does.

    `add_special_tokens`, true by default, is about a text; what is special in a conversation is its template's.
    """

    model: str = "default"
    prompt: str | UnsetType = UNSET
    messages: Annotated[list[Said], Meta(min_length=1, max_length=MOST_MESSAGES)] | UnsetType = UNSET
    add_special_tokens: bool | UnsetType = UNSET


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """POST /detokenize."""

    model: str = "default"
    tokens: Ids
