"""What the official OpenAI client is to do against the server, one case a function."""

import asyncio
from collections.abc import Callable
from typing import Any

ASKED = [{"role": "user", "content": "Name three colours."}]
LEAST: dict[str, Any] = {"model": "default", "messages": ASKED, "max_completion_tokens": 8, "temperature": 0}


def cases(port: int) -> tuple[int, list[str]]:
    """Runs every case -> how many worked, and of the others the name and what went wrong."""
    import openai

    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0, timeout=60)
    worked, failed = 0, []
    for case in CASES:
        try:
            case(client)
            worked += 1
        except Exception as error:  # whatever a client trips over is what is looked for
            failed.append(f"{case.__name__.strip('_')} ({type(error).__name__}: {str(error)[:200]})")
    client.close()
    return worked, failed


def _expect(held: bool, what: Any = "") -> None:
    if not held:
        raise ValueError(f"unexpected {what!r}")


def _chat(client: Any) -> None:
    answer = client.chat.completions.create(**LEAST)
    _expect(bool(answer.choices[0].message.content) and answer.usage.completion_tokens <= 8, answer)
    _expect(answer.object == "chat.completion" and answer.choices[0].message.role == "assistant", answer)


def _chat_stream(client: Any) -> None:
    whole = client.chat.completions.create(**LEAST).choices[0].message.content
    pieces = list(client.chat.completions.create(**LEAST, stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    _expect(text == whole, (text, whole))
    _expect(pieces[-1].usage is not None and not pieces[-1].choices, pieces[-1])
    _expect(len({piece.id for piece in pieces}) == 1, "ids")


def _stream_helper(client: Any) -> None:
    with client.chat.completions.stream(**LEAST, stop=["e", "a"]) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        _expect(stream.get_final_completion().choices[0].message.content == text, text)


def _async_at_once(client: Any) -> None:
    import openai

    async def several() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="any", max_retries=0) as other:
            return await asyncio.gather(*(other.chat.completions.create(**LEAST) for _ in range(4)))

    texts = {answer.choices[0].message.content for answer in asyncio.run(several())}
    _expect(len(texts) == 1, texts)


def _async_stream(client: Any) -> None:
    import openai

    async def streamed() -> str:
        async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="any", max_retries=0) as other:
            stream = await other.chat.completions.create(**LEAST, stream=True)
            return "".join([piece.choices[0].delta.content or "" async for piece in stream if piece.choices])

    _expect(asyncio.run(streamed()) == client.chat.completions.create(**LEAST).choices[0].message.content)


def _completion(client: Any) -> None:
    answer = client.completions.create(model="default", prompt="Once upon a time", max_tokens=5, logprobs=2, temperature=0)
    found = answer.choices[0].logprobs
    _expect(len(found.token_logprobs) == len(found.tokens) == answer.usage.completion_tokens, answer)
    _expect(all(len(top) >= 2 for top in found.top_logprobs), found)


def _completion_stream(client: Any) -> None:
    pieces = client.completions.create(model="default", prompt="One, two,", max_tokens=5, stream=True, temperature=0)
    _expect(bool("".join(piece.choices[0].text for piece in pieces if piece.choices)))


def _several_prompts(client: Any) -> None:
    answer = client.completions.create(model="default", prompt=["One, two,", "A, B,"], max_tokens=3, temperature=0)
    _expect([choice.index for choice in answer.choices] == [0, 1], answer)


def _log_probabilities(client: Any) -> None:
    content = client.chat.completions.create(**LEAST, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    _expect(all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content), content)


def _choices(client: Any) -> None:
    answer = client.chat.completions.create(**LEAST | {"temperature": 1}, n=3, seed=5)
    _expect([choice.index for choice in answer.choices] == [0, 1, 2], answer)
    _expect(len({choice.message.content for choice in answer.choices}) > 1, answer)


def _seed(client: Any) -> None:
    drawn = [client.chat.completions.create(**LEAST | {"temperature": 1}, seed=9).choices[0].message.content for _ in range(3)]
    _expect(len(set(drawn)) == 1, drawn)


def _stop(client: Any) -> None:
    answer = client.completions.create(model="default", prompt="1, 2, 3, 4, 5,", max_tokens=20, stop=[","], temperature=0)
    _expect(answer.choices[0].finish_reason == "stop" and "," not in answer.choices[0].text, answer)


def _penalties_and_bias(client: Any) -> None:
    answer = client.chat.completions.create(
        **LEAST, frequency_penalty=1, presence_penalty=0.5, logit_bias={"100": -100}, user="me"
    )
    _expect(bool(answer.choices[0].message.content), answer)


def _system_message_and_parts(client: Any) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    _expect(bool(client.chat.completions.create(**LEAST | {"messages": messages}).choices[0].message.content))


def _models(client: Any) -> None:
    names = [model.id for model in client.models.list()]
    _expect(bool(names) and client.models.retrieve(names[0]).id == names[0], names)


def _wrong_model(client: Any) -> None:
    import openai

    error = _raised(lambda: client.chat.completions.create(**LEAST | {"model": "gpt-none"}), openai.NotFoundError)
    _expect(any(model.id in str(error) for model in client.models.list()), error)


def _wrong_field(client: Any) -> None:
    import openai

    error = _raised(lambda: client.chat.completions.create(**LEAST | {"temperature": 9}), openai.BadRequestError)
    _expect(getattr(error, "param", None) == "temperature", error)


def _too_long(client: Any) -> None:
    import openai

    asked = lambda: client.completions.create(model="default", prompt=[5] * 200_000, max_tokens=5)
    _expect("200000" in str(_raised(asked, openai.BadRequestError)).replace(",", ""))


def _unsupported_field(client: Any) -> None:
    import openai

    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    _raised(lambda: client.chat.completions.create(**LEAST, tools=[tool]), openai.BadRequestError)


def _headers(client: Any) -> None:
    _expect(bool(client.chat.completions.with_raw_response.create(**LEAST).headers.get("x-request-id")), "no x-request-id")


def _raised(asked: Callable[[], Any], kind: type[Exception]) -> Exception:
    try:
        asked()
    except kind as error:
        return error
    raise ValueError(f"no {kind.__name__}")


CASES = (
    _chat, _chat_stream, _stream_helper, _async_at_once, _async_stream, _completion, _completion_stream, _several_prompts,
    _log_probabilities, _choices, _seed, _stop, _penalties_and_bias, _system_message_and_parts, _models, _wrong_model,
    _wrong_field, _too_long, _unsupported_field, _headers,
)  # fmt: skip
