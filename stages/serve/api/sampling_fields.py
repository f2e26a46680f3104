"""SamplingFields: the fields of a body that say how completions are sampled, and where they end."""

from functools import partial
from typing import Annotated

from msgspec import Meta

from engine.inference.request import SamplingParams
from stages.serve.api.fields import (
    MAX_STOPS,
    JsonObject,
    MinP,
    Penalty,
    Seed,
    Stops,
    Temperature,
    TokenId,
    TopK,
    TopP,
    in_range,
    stop_texts,
)
from stages.serve.api.jobs import ChatPrompt, Job, TextPrompts, only_grammar, sampling_of
from stages.serve.api.structured_outputs import GRAMMARS, AllowedTexts, StructuredOutputs
from stages.serve.api.unsupported import UsualFields
from stages.serve.grammar import Grammar

BiasedToken = Annotated[str, Meta(pattern=r"^(0|[1-9][0-9]{0,8})$(?!\n)")]  # one spelling of each token


class SamplingFields(UsualFields):
    """How completions are sampled and where they end: OpenAI's fields, and those that vLLM and SGLang add.

    Null means the default.

    `include_stop_str_in_output`, SGLang's `no_stop_trim`: the text ends with the stop string.
    `cache_salt`: only requests with the same one share the prefix cache.
    """

    min_tokens: Annotated[int, in_range("min_tokens")] | None = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    repetition_penalty: Annotated[float, in_range("repetition_penalty")] | None = None
    logit_bias: (
        Annotated[dict[BiasedToken, Annotated[float, in_range("logit_bias")]], Meta(max_length=1024)] | None
    ) = None
    seed: Seed = None
    stop: Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=1024)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonObject = None
    guided_regex: str | None = None
    guided_choice: AllowedTexts | None = None
    guided_grammar: str | None = None
    grammar: str | None = None

    @property
    def grammars(self) -> list[Grammar]:
        """The grammars that the request asks for. Raises InvalidField."""
        grammars = []
        if self.structured_outputs:
            grammars.append(self.structured_outputs.own_grammar)
        values = {
            "guided_json": self.guided_json,
            "guided_regex": self.guided_regex,
            "guided_choice": self.guided_choice,
            "guided_grammar": self.guided_grammar,
            "grammar": self.grammar,
        }
        for name, value in values.items():
            if value is not None:
                grammars.append(Grammar(name, partial(GRAMMARS[name], value)))
        return grammars

    def sampling(
        self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """Returns the defaults with what the request gives. Raises InvalidField."""
        return sampling_of(
            defaults,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): value for token, value in (self.logit_bias or {}).items() if value},
            logprobs=logprobs,
            stop_token_ids=self.stop_token_ids,
            seed=self.seed,
        )

    def make_job(self, prompt: ChatPrompt | TextPrompts, sampling: SamplingParams, n: int = 1) -> Job:
        """Returns the job for `n` completions of each prompt. Raises InvalidField."""
        return Job(
            prompt=prompt,
            sampling=sampling,
            n=n,
            stops=stop_texts(self.stop),
            keeps_stop=bool(self.include_stop_str_in_output or self.no_stop_trim),
            ignores_eos=bool(self.ignore_eos),
            grammar=only_grammar(self.grammars),
            cache_salt=self.cache_salt or "",
            streams=bool(self.stream),
            ignored=self.ignored,
        )
