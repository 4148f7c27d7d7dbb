"""LiteLLM, through both providers that people name such a server by."""

import json

import litellm
import pytest

SUM = [{"role": "user", "content": "What is 12 + 7?"}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "file_ticket",
            "description": "Files a ticket.",
            "parameters": {
                "type": "object",
                "properties": {"votes": {"type": "integer", "minimum": 0, "maximum": 99}},
                "required": ["votes"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module", params=["openai/demo", "hosted_vllm/demo"])
def options(request, server):
    return dict(model=request.param, api_base=server.url + "/v1", api_key="none", num_retries=0, temperature=0)


def test_a_chat_answers_and_says_what_it_used(options):
    answer = litellm.completion(**options, messages=SUM)
    assert "19" in answer.choices[0].message.content and answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_a_stream_can_be_put_together(options):
    whole = litellm.completion(**options, messages=SUM)
    stream = litellm.completion(**options, messages=SUM, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    built = litellm.stream_chunk_builder(chunks, messages=SUM)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == "stop"
    assert built.usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.asyncio
async def test_async_calls_and_streams_agree(options):
    whole = await litellm.acompletion(**options, messages=SUM)
    stream = await litellm.acompletion(**options, messages=SUM, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


def test_conversations_as_agents_leave_them_are_taken(options):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "user", "content": "What is 12 + 7?"},
    ]
    answer = litellm.completion(**options, messages=messages, max_tokens=20, seed=1, top_p=0.9, presence_penalty=0.1)
    assert answer.choices[0].message.content


def test_a_forced_call_has_arguments_that_parse(options):
    ask = dict(options, messages=SUM, tools=TOOLS, max_tokens=200)
    answer = litellm.completion(**ask, tool_choice={"type": "function", "function": {"name": "file_ticket"}})
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "file_ticket" and 0 <= json.loads(call.function.arguments)["votes"] <= 99
    history = SUM + [
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "filed"},
    ]
    assert litellm.completion(**ask | {"messages": history}).choices[0].finish_reason in ("stop", "tool_calls", "length")


def test_a_schema_shapes_the_answer(options):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = litellm.completion(
        **options,
        messages=[{"role": "user", "content": "Ada is 36 years old. Answer in JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content) == {"name": "Ada", "age": 36}


def test_logprobs_come_with_an_answer(options):
    answer = litellm.completion(**options, messages=SUM, logprobs=True, top_logprobs=2, max_tokens=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 3 and all(entry.logprob <= 0 and len(entry.top_logprobs) >= 2 for entry in content)


def test_errors_become_their_exceptions(options):
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**options, messages=[{"role": "user", "content": "x " * 100_000}])
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**options | {"temperature": 3}, messages=SUM)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**options | {"model": options["model"].replace("demo", "nope")}, messages=SUM)


def test_text_completions_stream(server):
    ask = dict(
        model="text-completion-openai/demo",
        api_base=server.url + "/v1", api_key="none", prompt="1, 2, 3,", temperature=0, max_tokens=12,
    )  # fmt: skip
    whole = litellm.text_completion(**ask).choices[0].text
    streamed = "".join(chunk.choices[0].text or "" for chunk in litellm.text_completion(**ask, stream=True))
    assert whole and streamed == whole
