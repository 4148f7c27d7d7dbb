"""Raw answers against the types of OpenAI's own description, from which its Python package is generated.

The package itself is lenient: it takes whatever comes. Here every field has to be there, of its very type, with one of the
values that are described; what OpenAI does not know has to be a known extension.
"""

import json

import httpx
import pydantic
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.shared import ErrorObject

# vLLM's, and `store`, which OpenAI's own responses have.
EXTENSIONS = {"stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs", "reasoning", "store"}
MODEL_EXTENSIONS = {"root", "parent", "max_model_len", "permission"}

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
ASK = [{"role": "user", "content": "17+25="}]
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["id"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "file", "parameters": SCHEMA, "strict": True}}]
FLAT_TOOLS = [{"type": "function", "name": "file", "parameters": SCHEMA, "strict": True}]


def validate(kind, value, extensions=frozenset(EXTENSIONS)):
    """`value` as `kind`, strictly."""
    checked = pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    unknown = set(extras(checked)) - extensions
    assert not unknown, f"{unknown} in {value}"
    return checked


def extras(value):
    """Names of all fields that their types do not have."""
    if isinstance(value, pydantic.BaseModel):
        yield from value.model_extra or {}
        value = [getattr(value, name) for name in type(value).model_fields]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from extras(item)


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


def post(http, path, body):
    answer = http.post(path, json={"model": "demo", "temperature": 0} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http, path, body):
    """Data of all events, with the end mark left out and checked."""
    text = http.post(path, json={"model": "demo", "temperature": 0, "stream": True} | body).text
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if path != RESPONSES:
        assert data.pop() == "[DONE]"
    assert data
    return [json.loads(event) for event in data]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"max_tokens": 2, "n": 2, "logprobs": True, "top_logprobs": 3},
        {"stop": "2"},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 300},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "file"}}, "parallel_tool_calls": False},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
        {"logprobs": True, "return_token_ids": True, "max_tokens": 3},
    ],
    ids=lambda body: " ".join(body) or "plain",
)
def test_chats(http, body):
    body = {"messages": ASK} | body
    whole = validate(ChatCompletion, post(http, CHAT, body))
    chunks = [validate(ChatCompletionChunk, event) for event in events(http, CHAT, body)]
    usage = {"stream_options": {"include_usage": True}}
    with_usage = [validate(ChatCompletionChunk, event) for event in events(http, CHAT, body | usage)]
    assert with_usage[-1].choices == [] and with_usage[-1].usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        own = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason
        assert "".join(part.delta.content or "" for part in own) == (choice.message.content or "")
        assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)


def fill_in(choices):
    """Where OpenAI says null, though its description does not: before a stream's end, and of what nothing predicted."""
    for choice in choices:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if choice["logprobs"] and choice["text"].startswith("17"):
            assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
            choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0] = 0.0, {}


@pytest.mark.parametrize(
    "body",
    [{}, {"n": 2, "logprobs": 2}, {"echo": True, "logprobs": 1, "max_tokens": 0}, {"prompt": ["a", "b"], "echo": True}],
    ids=lambda body: " ".join(body) or "plain",
)
def test_completions(http, body):
    body = {"prompt": "17+25="} | body
    answer = post(http, COMPLETIONS, body)
    fill_in(answer["choices"])
    whole = validate(Completion, answer)
    told = [""] * len(whole.choices)
    for event in events(http, COMPLETIONS, body):
        fill_in(event["choices"])
        for choice in validate(Completion, event).choices:
            told[choice.index] += choice.text
    assert told == [choice.text for choice in whole.choices]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"}, "user": "u"},
        {"max_output_tokens": 2, "instructions": "Be brief."},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}},
        {"text": {"format": {"type": "json_object"}}, "max_output_tokens": 20},
        {"tools": FLAT_TOOLS, "tool_choice": "required", "max_output_tokens": 300},
        {"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "file"}, "parallel_tool_calls": False},
        {"tools": [{"type": "function", "name": "file", "parameters": SCHEMA}], "tool_choice": "none"},
    ],
    ids=lambda body: " ".join(body) or "plain",
)
def test_responses(http, body):
    body = {"input": ASK} | body
    whole = validate(Response, post(http, RESPONSES, body))
    told = [validate(ResponseStreamEvent, event) for event in events(http, RESPONSES, body)]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    assert told[-1].response.output_text == whole.output_text
    assert [item.type for item in told[-1].response.output] == [item.type for item in whole.output]


def test_models(http):
    models = http.get("/v1/models").json()
    assert models.keys() == {"object", "data"} and models["object"] == "list"
    assert [validate(Model, model, MODEL_EXTENSIONS).id for model in models["data"]] == ["demo"]
    assert validate(Model, http.get("/v1/models/demo").json(), MODEL_EXTENSIONS).object == "model"


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", CHAT, {"messages": ASK, "temperature": 3}, 400),
        ("POST", CHAT, {"messages": ASK, "model": "nobody"}, 404),
        ("POST", COMPLETIONS, {}, 400),
        ("POST", RESPONSES, {"input": "a", "previous_response_id": "b"}, 400),
        ("GET", "/v1/models/nobody", None, 404),
        ("GET", "/nowhere", None, 404),
        ("GET", CHAT, None, 405),
    ],
)
def test_errors(http, method, path, body, status):
    answer = http.request(method, path, json=body)
    assert answer.status_code == status
    assert answer.json().keys() == {"error"}
    assert validate(ErrorObject, answer.json()["error"]).message
