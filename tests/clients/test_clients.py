"""The first examples of clients and frameworks, in which only the address is another.

Those of the extra `dev` run by day. The others run at night, where `requirements.txt` is installed.
"""

import asyncio
import json
from typing import Any, Literal

import anthropic
import httpx
import ollama
import openai
import pydantic
import pytest

GPT, CLAUDE, GEMMA = "gpt-4o-mini", "claude-opus-5", "gemma3"
ASKED = "I want to see Rome for two days."
HELLO: Any = [{"role": "user", "content": ASKED}]
CITIES = ("Rome", "Oslo")


class Visit(pydantic.BaseModel, extra="forbid"):
    """A visit to a city."""

    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 30]


def get_weather(city: Literal["Rome", "Oslo"]) -> str:
    """Tells the weather in a city."""
    return f"It is sunny in {city}."


def is_visit(answer: Any) -> bool:
    return isinstance(answer, Visit)


@pytest.fixture(autouse=True)
def keys(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
    monkeypatch.setenv("OLLAMA_HOST", server.url)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "LITELLM_LOCAL_MODEL_COST_MAP"):
        monkeypatch.setenv(name, "True")


def install(name: str) -> Any:
    return pytest.importorskip(name, reason="tests/clients/requirements.txt is not installed")


def test_openai():
    with openai.OpenAI() as client:
        assert client.responses.create(model=GPT, input=ASKED, max_output_tokens=5).output_text
        answer = client.chat.completions.parse(model=GPT, messages=HELLO, response_format=Visit)
        assert is_visit(answer.choices[0].message.parsed)
        assert client.embeddings.create(model=GPT, input=ASKED).data[0].embedding
        assert GPT in [model.id for model in client.models.list()]


def test_anthropic():
    with anthropic.Anthropic() as client:
        assert client.messages.create(model=CLAUDE, max_tokens=5, messages=HELLO).content[0].text
        parsed = client.messages.parse(model=CLAUDE, max_tokens=200, messages=HELLO, output_format=Visit)
        assert is_visit(parsed.parsed_output)
        with client.messages.stream(model=CLAUDE, max_tokens=200, messages=HELLO, output_format=Visit) as stream:
            assert is_visit(stream.get_final_message().parsed_output)
        runner: Any = client.beta.messages.tool_runner(
            model=CLAUDE,
            max_tokens=100,
            messages=HELLO,
            tools=[anthropic.beta_tool(get_weather)],
            tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
            thread=False,
            max_iterations=2,
        )
        assert [message.content[0].input["city"] in CITIES for message in runner] == [True, True]
        with pytest.raises(anthropic.BadRequestError, match=r"thread: .*remembers nothing"):
            client.beta.messages.create(model=CLAUDE, max_tokens=5, messages=HELLO, extra_body={"thread": {"type": "create"}})
        bad: Any = {"format": {"type": "json_schema", "schema": {"not": {}}}, "effort": "low"}
        with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format\.schema"):
            client.messages.create(model=CLAUDE, max_tokens=5, messages=HELLO, output_config=bad)


def test_ollama(server):
    client = ollama.Client(host=server.url)
    assert client.chat(GEMMA, HELLO, options={"num_predict": 5}).message.content
    answer = client.chat(GEMMA, HELLO, format=Visit.model_json_schema()).message.content
    assert is_visit(Visit.model_validate_json(answer))
    client.chat(GEMMA, HELLO, tools=[get_weather], options={"num_predict": 5})
    shown = client.show(GEMMA)
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["llama.context_length"] == server.engine.capacity
    assert [model.model for model in client.ps().models] == [model.model for model in client.list().models]
    with pytest.raises(ollama.ResponseError, match="There is no model"):
        client.show("none")
    assert httpx.get(f"{server.url}/api/version").json()["version"].count(".") == 2
    for name, status in ((GEMMA, 200), ("none", 404)):
        assert httpx.post(f"{server.url}/api/show", json={"name": name}).status_code == status
    untyped = {"content": b'{"prompt": "a", "options": {"num_predict": 1}}', "timeout": 300}
    for headers, status in (({}, 200), ({"Content-Type": "text/plain"}, 415), ({"Origin": "http://evil.example"}, 403)):
        assert httpx.post(f"{server.url}/api/generate", headers=headers, **untyped).status_code == status
    assert httpx.post(f"{server.url}/v1/completions", **untyped).status_code == 415


def test_a_model_that_must_call_ends(server):
    """A call is required and several are allowed: one without sense would call until the context is full."""
    tools: Any = [openai.pydantic_function_tool(Visit)]
    with openai.OpenAI() as client:
        answer = client.chat.completions.create(
            model=GPT,
            messages=HELLO,
            tools=tools,
            tool_choice="required",
            temperature=0,
            logit_bias={server.model.tokenizer.eos_id: -100},
        )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert 1 <= len(answer.choices[0].message.tool_calls) <= 8


@pytest.mark.night
def test_langchain():
    model = install("langchain_openai").ChatOpenAI(model=GPT)
    assert model.invoke(ASKED, max_tokens=5).content
    for choice in ("get_weather", "any"):
        tools = model.bind_tools([get_weather], tool_choice=choice)
        assert {call["args"]["city"] in CITIES for call in tools.invoke(ASKED).tool_calls} == {True}
    model.bind_tools([get_weather]).invoke(ASKED, max_tokens=5)
    for method in ("json_schema", "function_calling"):
        assert is_visit(model.with_structured_output(Visit, method=method).invoke(ASKED))


@pytest.mark.night
def test_instructor():
    library = install("instructor")
    for mode in (library.Mode.TOOLS, library.Mode.TOOLS_STRICT, library.Mode.JSON_SCHEMA):
        client = library.from_openai(openai.OpenAI(), mode=mode)
        assert is_visit(client.create(model=GPT, response_model=Visit, messages=HELLO, max_retries=0))
    client = library.from_anthropic(anthropic.Anthropic())
    assert is_visit(client.create(model=CLAUDE, max_tokens=200, response_model=Visit, messages=HELLO, max_retries=0))


@pytest.mark.night
def test_pydantic_ai():
    library = install("pydantic_ai")
    for name in (f"openai-chat:{GPT}", f"openai-responses:{GPT}"):
        for output in (Visit, library.NativeOutput(Visit)):
            assert is_visit(library.Agent(name, output_type=output, retries=0).run_sync(ASKED).output)


@pytest.mark.night
def test_openai_agents():
    library = install("agents")
    library.set_tracing_disabled(True)
    called = list[str]()

    @library.function_tool
    def weather(city: Literal["Rome", "Oslo"]) -> str:
        """Tells the weather in a city."""
        called.append(city)
        return get_weather(city)

    settings = library.ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=100)
    for kind in (library.OpenAIResponsesModel, library.OpenAIChatCompletionsModel):
        model = kind(model=GPT, openai_client=openai.AsyncOpenAI())
        agent = library.Agent(name="Hello", instructions="Be brief.", tools=[weather], model_settings=settings, model=model)
        assert library.Runner.run_sync(agent, ASKED).final_output is not None
        assert called.pop() in CITIES
        agent = library.Agent(name="Hello", output_type=Visit, model=model)

        async def stream(agent: Any = agent) -> Any:
            result = library.Runner.run_streamed(agent, ASKED)
            assert [event async for event in result.stream_events()]
            return result.final_output

        assert is_visit(asyncio.run(stream()))


@pytest.mark.night
def test_dspy(server):
    library = install("dspy")
    model = library.LM(f"openai/{GPT}", api_base=f"{server.url}/v1", api_key="any", cache=False, max_tokens=300)
    with library.context(lm=model):
        predict = library.Predict("question -> city: Literal['Rome', 'Oslo']")
        assert predict(question=ASKED).city in CITIES


@pytest.mark.night
def test_litellm(server):
    library = install("litellm")
    for name in (f"openai/{GPT}", f"anthropic/{CLAUDE}", f"ollama/{GEMMA}", f"ollama_chat/{GEMMA}"):
        address = f"{server.url}/v1" if "openai" in name else server.url
        asked: Any = {"model": name, "api_base": address, "api_key": "any", "messages": HELLO}
        assert library.completion(**asked, max_tokens=5).choices[0].message.content, name
        parts = library.completion(**asked, max_tokens=5, stream=True)
        assert "".join(part.choices[0].delta.content or "" for part in parts), name
        answer = library.completion(**asked, max_tokens=200, response_format=Visit).choices[0].message.content
        assert is_visit(Visit.model_validate_json(answer)), name


@pytest.mark.night
def test_llama_index(server):
    library = install("llama_index.llms.openai_like")
    options: Any = {"model": GPT, "api_base": f"{server.url}/v1", "api_key": "any"}
    model = library.OpenAILike(**options, is_chat_model=True, is_function_calling_model=True, max_tokens=5)
    assert model.complete(ASKED).text
    assert "".join(part.delta for part in model.stream_complete(ASKED))
    assert library.OpenAILike(**options, max_tokens=5).complete(ASKED).text
    for kind in ({"is_function_calling_model": True}, {"should_use_structured_outputs": True}):
        model = library.OpenAILike(**options, is_chat_model=True, max_tokens=300, **kind)
        assert is_visit(model.as_structured_llm(Visit).complete(ASKED).raw)


@pytest.mark.night
def test_lm_eval(server, tmp_path):
    """Its multiple choice and its generation, on a task of two questions."""
    library = install("lm_eval")
    rows = [{"question": f"Where is {place}?", "choices": ["Rome", "Oslo"], "answer": n} for n, place in enumerate("ab")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    written = {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"max_gen_toks": 5, "until": ["\n"]},
    }
    evaluate = lambda kind, path, task, **more: library.simple_evaluate(
        kind, model_args={"model": GPT, "base_url": f"{server.url}/v1/{path}"}, tasks=[task], bootstrap_iters=0, **more
    )["samples"][task["task"]]
    samples = evaluate("local-completions", "completions", task | choice)
    assert all(value < 0 for sample in samples for value, _ in sample["filtered_resps"])
    assert len(samples) == 2
    assert len(evaluate("local-chat-completions", "chat/completions", task | written, apply_chat_template=True)) == 2
