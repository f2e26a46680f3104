"""The first examples of clients and frameworks, in which only the address is another.

They run at night, where `requirements.txt` is installed. By day: `test_kinds.py`, and Anthropic's
and Ollama's in tests/serve.
"""

import asyncio
import json
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

GPT, CLAUDE, GEMMA = "gpt-4o-mini", "claude-opus-5", "gemma3"
ASKED = "I want to see Rome for two days."
HELLO: Any = [{"role": "user", "content": ASKED}]
CITIES = ("Rome", "Oslo")
pytestmark = pytest.mark.night


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


def test_anthropics_tool_runner():
    with anthropic.Anthropic() as client:
        runner: Any = client.beta.messages.tool_runner(
            model=CLAUDE,
            max_tokens=100,
            messages=HELLO,
            tools=[anthropic.beta_tool(get_weather)],
            tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
            max_iterations=2,
        )
        assert [message.content[0].input["city"] in CITIES for message in runner] == [True, True]


def test_langchain():
    model = install("langchain_openai").ChatOpenAI(
        model=GPT, seed=1
    )  # a model without sense may be cut off in a call
    assert model.invoke(ASKED, max_tokens=5).content
    for choice in ("get_weather", "any"):
        tools = model.bind_tools([get_weather], tool_choice=choice)
        assert {call["args"]["city"] in CITIES for call in tools.invoke(ASKED).tool_calls} == {True}
    model.bind_tools([get_weather]).invoke(ASKED, max_tokens=5)
    for method in ("json_schema", "function_calling"):
        assert is_visit(model.with_structured_output(Visit, method=method).invoke(ASKED))


def test_langchain_over_ollamas_routes():
    library = install("langchain_ollama")
    options: Any = {"model": GEMMA, "num_predict": 5, "seed": 1}
    model = library.ChatOllama(
        **options, validate_model_on_init=True, reasoning=False, mirostat=0, tfs_z=1.0, keep_alive="5m"
    )
    assert model.invoke(ASKED).content
    assert "".join(part.content for part in model.stream(ASKED))
    model.bind_tools([get_weather]).invoke(ASKED)
    assert is_visit(library.ChatOllama(model=GEMMA).with_structured_output(Visit).invoke(ASKED))
    assert library.OllamaLLM(**options).invoke(ASKED)
    assert len(library.OllamaEmbeddings(model=GEMMA).embed_documents(["Rome", "Oslo"])) == 2


def test_instructor():
    library = install("instructor")
    for mode in (library.Mode.TOOLS, library.Mode.TOOLS_STRICT, library.Mode.JSON_SCHEMA):
        client = library.from_openai(openai.OpenAI(), mode=mode)
        assert is_visit(client.create(model=GPT, response_model=Visit, messages=HELLO, max_retries=0))
    client = library.from_anthropic(anthropic.Anthropic())
    assert is_visit(
        client.create(model=CLAUDE, max_tokens=200, response_model=Visit, messages=HELLO, max_retries=0)
    )


def test_pydantic_ai():
    library = install("pydantic_ai")
    for name in (f"openai-chat:{GPT}", f"openai-responses:{GPT}"):
        for output in (Visit, library.NativeOutput(Visit)):
            assert is_visit(library.Agent(name, output_type=output, retries=0).run_sync(ASKED).output)


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
        agent = library.Agent(
            name="Hello", instructions="Be brief.", tools=[weather], model_settings=settings, model=model
        )
        assert library.Runner.run_sync(agent, ASKED).final_output is not None
        assert called.pop() in CITIES
        agent = library.Agent(name="Hello", output_type=Visit, model=model)

        async def stream(agent: Any = agent) -> Any:
            result = library.Runner.run_streamed(agent, ASKED)
            assert [event async for event in result.stream_events()]
            return result.final_output

        assert is_visit(asyncio.run(stream()))


def test_dspy(server):
    library = install("dspy")
    model = library.LM(
        f"openai/{GPT}", api_base=f"{server.url}/v1", api_key="any", cache=False, max_tokens=300
    )
    with library.context(lm=model):
        predict = library.Predict("question -> city: Literal['Rome', 'Oslo']")
        assert predict(question=ASKED).city in CITIES


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


def test_lm_eval(server, tmp_path):
    """Its multiple choice and its generation, on a task of two questions."""
    library = install("lm_eval")
    rows = [
        {"question": f"Where is {place}?", "choices": ["Rome", "Oslo"], "answer": n}
        for n, place in enumerate("ab")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }
    choice = {
        "task": "choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    written = {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"max_gen_toks": 5, "until": ["\n"]},
    }
    evaluate = lambda kind, path, task, **more: library.simple_evaluate(
        kind,
        model_args={"model": GPT, "base_url": f"{server.url}/v1/{path}"},
        tasks=[task],
        bootstrap_iters=0,
        **more,
    )["samples"][task["task"]]
    samples = evaluate("local-completions", "completions", task | choice)
    assert all(value < 0 for sample in samples for value, _ in sample["filtered_resps"])
    assert len(samples) == 2
    assert (
        len(evaluate("local-chat-completions", "chat/completions", task | written, apply_chat_template=True))
        == 2
    )
