"""UNSUPPORTED: why this server does not grant a field or a value, as errors and the OpenAPI document say."""

from typing import Annotated, Literal, get_args, get_type_hints

from msgspec import Meta

from stages.serve.api.fields import EmptyList, GenerationRequest

# Types of tools that OpenAI and Anthropic describe or run themselves, without their dates; and fields of such.
OWN_TOOLS = (
    "bash",
    "code_execution",
    "code_interpreter",
    "computer",
    "container",
    "file_search",
    "image_generation",
    "mcp",
    "mcp_servers",
    "mcp_toolset",
    "memory",
    "text_editor",
    "tool_search_tool_bm25",
    "tool_search_tool_regex",
    "web_fetch",
    "web_search",
    "web_search_preview",
)

# Why this server does not grant a field, or a value.
UNSUPPORTED = {
    **dict.fromkeys(
        ("functions", "function_call"),
        "Functions are called tools now: send tools and tool_choice",
    ),
    **dict.fromkeys(("modalities", "audio"), "Answers are text"),
    "suffix": "Text is only continued at its end here: leave it out",
    "best_of": "Every completion made is returned here; use n",
    "include_obfuscation": "Nothing is added to chunks to hide how long their texts are",
    "web_search_options": "There is no search here",
    **dict.fromkeys(
        OWN_TOOLS,
        "This server runs no tools, and knows none: describe each as a function, which the client runs",
    ),
    **dict.fromkeys(
        ("store", "previous_response_id", "conversation", "background", "context", "thread"),
        "This server remembers nothing: send the whole conversation each time",
    ),
    **dict.fromkeys(
        ("images", "image", "image_url", "input_image", "base64", "url", "file"), "The model reads text alone"
    ),
    "citations": "An answer quotes no documents here",
    "inference_geo": "A request is answered on this server's own machine",
    "speed": "There is one speed here, the fastest",
    "input_examples": "Put examples of a tool's input into its description",
    "allowed_callers": "Tools are called by the model alone",
    "defer_loading": "The model is told of all tools at once",
    **dict.fromkeys(
        ("truncation", "context_management"), "Nothing is left out of a conversation here: shorten it"
    ),
    "enable_response_messages": "The reply has the answer alone: /tokenize tells the tokens of a conversation",
    "fallbacks": "Each request is answered by the model that it names, or by none",
    "search_result": "Send it as a document, with a source of type content",
    **dict.fromkeys(("think", "thinking"), "No thinking is asked of the model here: leave it out"),
    "prompt_logprobs": "Use echo with logprobs, or /v1/score",
    "truncate_prompt_tokens": "Nothing is left out of a prompt here: shorten it",
    "allowed_token_ids": "Use logit_bias, or structured_outputs",
    "logprob_token_ids": "The most probable tokens have log-probabilities, or given answers by /v1/score",
    **dict.fromkeys(
        ("whitespace_pattern", "guided_whitespace_pattern"),
        "JSON is written on one line here, without free white space",
    ),
    "disable_additional_properties": "Say additionalProperties: false in the schema",
    **dict.fromkeys(
        ("chat_template", "template"),
        "Conversations are written by the template that the server was started with",
    ),
    "lora_path": "Name the adapter as the model",
    "continuous_usage_stats": "Only the last chunk of a stream has token counts",
    **dict.fromkeys(
        ("kv_transfer_params", "ec_transfer_params"), "No server takes over another's cache here"
    ),
}


def explain(reason: str) -> Meta:
    """Has a field say why it takes no other value: in the OpenAPI document, and in the error for another."""
    return Meta(description=reason)


class UsualFields(GenerationRequest):
    """Fields of vLLM and SGLang that their routers and clients send at usual values, which are accepted.

    Another value is refused by name, with the reason. A `bool` is accepted either way, and changes
    no answer.
    """

    # vLLM's.
    skip_special_tokens: Annotated[Literal[True] | None, explain("No text shows control tokens here")] = None
    spaces_between_special_tokens: bool | None = None  # there are none in a text
    use_beam_search: Annotated[
        Literal[False] | None, explain("Completions are sampled here, not searched for: use n")
    ] = None
    length_penalty: Annotated[
        Literal[1] | None, explain("It belongs to beam search, which there is none of here")
    ] = None
    bad_words: Annotated[EmptyList | None, explain("Use logit_bias, or structured_outputs")] = None
    priority: Annotated[
        Literal[0] | None, explain("Requests have their turn in the order in which they came")
    ] = None
    include_reasoning: Annotated[Literal[True] | None, explain("Reasoning is part of the answer here")] = None
    thinking_token_budget: Annotated[
        Literal[-1] | None, explain("Use max_tokens: reasoning is part of the answer here")
    ] = None
    return_token_ids: Annotated[
        Literal[False] | None, explain("Send the text to /tokenize, or ask for logprobs")
    ] = None
    routed_experts_prompt_start: Annotated[
        Literal[0] | None, explain("No routing to experts is returned")
    ] = None
    return_token_offsets: bool | None = None  # read by vLLM's routes that render a prompt, and by no other
    return_mm_kwargs: bool | None = None  # likewise
    # SGLang's.
    # Reasoning stays in the answer, as in SGLang without a parser of it.
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None  # likewise
    return_hidden_states: Annotated[
        Literal[False] | None, explain("Hidden states are only returned as embeddings")
    ] = None
    return_routed_experts: Annotated[
        Literal[False] | None,
        explain("No routing to experts is returned"),
    ] = None
    routed_experts_start_len: Annotated[
        Literal[0] | None,
        explain("No routing to experts is returned"),
    ] = None
    return_cached_tokens_details: Annotated[
        Literal[False] | None, explain("There is one cache, counted in usage")
    ] = None
    return_prompt_token_ids: Annotated[Literal[False] | None, explain("Send the prompt to /tokenize")] = None
    return_meta_info: Annotated[Literal[False] | None, explain("Ask for logprobs, or read usage")] = None


def _explanations(kind: type) -> dict[str, str]:
    """Returns why fields of a type take no other value, by their names."""
    reasons = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        notes = [note for note in get_args(hint) if isinstance(note, Meta)]
        if notes:
            reasons[name] = str(notes[0].description)
    return reasons


UNSUPPORTED |= _explanations(UsualFields)
