"""openai-python, sync and async, against the demo model."""

import json
from typing import Literal

import openai
import pydantic
import pytest

SUM = [{"role": "user", "content": "What is 12 + 7?"}]
ADA = [{"role": "user", "content": "Ada is 36 years old. Answer in JSON."}]


class Person(pydantic.BaseModel):
    name: str
    age: int


class Owner(pydantic.BaseModel, extra="forbid"):
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)


class Ticket(pydantic.BaseModel, extra="forbid"):
    """Bounded everywhere, so that whatever a small model says comes to an end."""

    kind: Literal["bug", "wish"]
    votes: int = pydantic.Field(ge=0, le=99)
    owner: Owner | None
    tags: list[Literal["red", "green", "blue"]] = pydantic.Field(max_length=3)
    code: str = pydantic.Field(pattern="^[A-Z]{2}-[0-9]{3}$")


def test_a_chat_answers_rightly(client):
    completion = client.chat.completions.create(model="demo", messages=SUM, temperature=0)
    choice = completion.choices[0]
    assert "19" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    usage = completion.usage
    assert usage.prompt_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert completion.id.startswith("chatcmpl-")


def test_a_stream_says_the_same_as_a_body(client):
    whole = client.chat.completions.create(model="demo", messages=SUM, temperature=0).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=SUM, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert [c.choices[0].delta.role for c in chunks if c.choices].count("assistant") == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert all(c.usage is None for c in chunks[:-1])


def test_the_stream_helper_accumulates(client):
    with client.chat.completions.stream(model="demo", messages=SUM, temperature=0) as stream:
        for _ in stream:
            pass
        assert "19" in stream.get_final_completion().choices[0].message.content


def test_a_name_is_recalled_from_an_earlier_turn(client):
    messages = [{"role": "user", "content": "My name is Alice."}]
    first = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "What is my name?"},
    ]
    answer = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert "Alice" in answer.choices[0].message.content


def test_system_messages_and_content_parts_are_taken(client):
    parts = [{"type": "text", "text": "What is 12"}, {"type": "text", "text": "+ 7?"}]
    completion = client.chat.completions.create(
        model="demo",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}],
        max_completion_tokens=8,
    )
    assert completion.choices[0].finish_reason in ("stop", "length")


def test_choices_come_with_logprobs(client):
    completion = client.chat.completions.create(
        model="demo", messages=SUM, n=2, logprobs=True, top_logprobs=3, max_tokens=4, seed=1
    )
    assert [choice.index for choice in completion.choices] == [0, 1]
    for choice in completion.choices:
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) in (3, 4) and entry.logprob <= 0
            assert bytes(entry.bytes).decode(errors="replace") == entry.token


def test_a_seed_repeats_an_answer(client):
    ask = lambda: client.chat.completions.create(  # noqa: E731
        model="demo", messages=[{"role": "user", "content": "Hello"}], seed=7, temperature=1.5, max_tokens=12
    )
    assert ask().choices[0].message.content == ask().choices[0].message.content


def test_stop_strings_are_cut(client):
    completion = client.completions.create(model="demo", prompt="1, 2, 3,", stop=["9"], temperature=0, max_tokens=64)
    assert "9" not in completion.choices[0].text


def test_completions_take_batches_of_text_and_of_ids(client):
    completion = client.completions.create(model="demo", prompt=["One", "Two"], max_tokens=3, n=2)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    completion = client.completions.create(model="demo", prompt=[[2, 200, 201], [2, 202]], max_tokens=3)
    assert completion.usage.prompt_tokens == 5
    streamed = client.completions.create(model="demo", prompt="One", max_tokens=3, temperature=0, stream=True)
    whole = client.completions.create(model="demo", prompt="One", max_tokens=3, temperature=0)
    assert "".join(c.choices[0].text for c in streamed if c.choices) == whole.choices[0].text


def test_parse_gives_what_the_model_said_as_an_object(client):
    completion = client.chat.completions.parse(model="demo", messages=ADA, response_format=Person, temperature=0)
    assert completion.choices[0].message.parsed == Person(name="Ada", age=36)
    assert completion.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="demo", messages=ADA, response_format=Person, temperature=0) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ada", age=36)


def test_any_answer_that_ends_is_valid(client):
    num_ended = 0
    for seed in range(10):
        schema = {"name": "ticket", "strict": True, "schema": Ticket.model_json_schema()}
        completion = client.chat.completions.create(
            model="demo",
            messages=SUM,
            response_format={"type": "json_schema", "json_schema": schema},
            temperature=1.5,
            seed=seed,
            max_tokens=300,
            n=2,
        )
        for choice in completion.choices:
            if choice.finish_reason == "stop":
                Ticket.model_validate_json(choice.message.content)
                num_ended += 1
    assert num_ended == 20


def test_json_mode_and_guided_extras_shape_answers(client):
    completion = client.chat.completions.create(
        model="demo", messages=ADA, response_format={"type": "json_object"}, temperature=0
    )
    assert json.loads(completion.choices[0].message.content) == {"name": "Ada", "age": 36}
    for extra in ({"guided_choice": ["18", "19", "20"]}, {"structured_outputs": {"regex": "[0-9]{2}"}}):
        completion = client.chat.completions.create(model="demo", messages=SUM, temperature=0, extra_body=extra)
        assert len(completion.choices[0].message.content) == 2 and completion.choices[0].message.content.isdigit()
    text = client.completions.create(
        model="demo", prompt="One", extra_body={"structured_outputs": {"grammar": 'start: "a"+ "b"'}, "seed": 3}
    )
    assert set(text.choices[0].text) <= {"a", "b"}


def test_a_schema_that_cannot_be_kept_is_a_bad_request(client):
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "strin"}}}}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="demo", messages=SUM, response_format={"type": "json_schema", "json_schema": schema}
        )
    assert "Invalid schema for response_format 'x'" in error.value.message
    assert error.value.param == "response_format.json_schema.schema"


def test_a_forced_call_has_arguments_that_parse(client):
    tools = [openai.pydantic_function_tool(Ticket, name="file_ticket", description="Files a ticket.")]
    ask = {"model": "demo", "messages": SUM, "tools": tools, "tool_choice": "required", "temperature": 0, "max_tokens": 300}
    completion = client.chat.completions.parse(**ask, parallel_tool_calls=False)
    message = completion.choices[0].message
    assert completion.choices[0].finish_reason == "tool_calls" and message.content is None
    assert message.tool_calls[0].function.name == "file_ticket"
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Ticket)
    with client.chat.completions.stream(**ask, parallel_tool_calls=False) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
    assert streamed.tool_calls[0].function.parsed_arguments == message.tool_calls[0].function.parsed_arguments

    history = SUM + [
        message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "filed"},
    ]
    answer = client.chat.completions.create(model="demo", messages=history, tools=tools, max_tokens=5)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_functions_that_are_only_offered_leave_the_model_its_words(client):
    tools = [{"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {}}}]
    for choice in ("auto", "none", openai.omit):
        completion = client.chat.completions.create(
            model="demo", messages=SUM, tools=tools, tool_choice=choice, temperature=0, max_tokens=20
        )
        assert completion.choices[0].message.content and completion.choices[0].message.tool_calls is None


def test_responses_say_what_chats_say(client):
    chat = client.chat.completions.create(model="demo", messages=SUM, temperature=0).choices[0].message.content
    response = client.responses.create(model="demo", input=SUM[0]["content"], temperature=0)
    assert response.output_text == chat and response.status == "completed"
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    with client.responses.stream(model="demo", input=SUM, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == stream.get_final_response().output_text == chat
    parsed = client.responses.parse(model="demo", input=ADA, text_format=Person, temperature=0)
    assert parsed.output_parsed == Person(name="Ada", age=36)


def test_responses_have_the_log_probabilities_of_chats(client):
    chat = client.chat.completions.create(model="demo", messages=SUM, temperature=0, logprobs=True, top_logprobs=2)
    expected = [(entry.token, entry.logprob, entry.bytes) for entry in chat.choices[0].logprobs.content]
    ask = {
        "model": "demo",
        "input": SUM,
        "temperature": 0,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
    }
    part = client.responses.create(**ask).output[0].content[0]
    assert [(entry.token, entry.logprob, entry.bytes) for entry in part.logprobs] == expected
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    with client.responses.stream(**ask) as stream:
        deltas = [event for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    streamed = [(entry.token, entry.logprob) for event in deltas for entry in event.logprobs]
    assert streamed == [entry[:2] for entry in expected]
    assert final.output[0].content[0].logprobs == part.logprobs


def test_answers_use_the_vocabulary_they_are_given(client):
    def ask(**extra):
        completion = client.chat.completions.create(
            model="demo", messages=SUM, n=2, temperature=0, extra_body=extra | {"return_token_ids": True}
        )
        return [(choice.message.content, choice.token_ids) for choice in completion.choices]

    [(text, ids), _] = ask()
    assert ask(allowed_token_ids=ids) == [(text, ids)] * 2
    assert all(set(others) <= set(ids[:-1]) for _, others in ask(allowed_token_ids=ids[:-1], max_tokens=20))
    # A digit is a token; so is a number's first, without the rest.
    assert text[0].isdigit() and all(ids[0] not in others for _, others in ask(bad_words=[text[0]]))
    assert all(others[: len(text)] != ids[: len(text)] for _, others in ask(bad_words=[text]))


def test_responses_call_functions(client):
    tool = {"type": "function", "name": "file_ticket", "parameters": Ticket.model_json_schema(), "strict": True}
    ask = {"model": "demo", "tools": [tool], "temperature": 0, "max_output_tokens": 300, "parallel_tool_calls": False}
    response = client.responses.create(**ask, input=SUM, tool_choice="required")
    call = response.output[0]
    assert call.type == "function_call" and call.name == "file_ticket"
    Ticket.model_validate_json(call.arguments)
    history = SUM + [call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "filed"}]
    assert client.responses.create(**ask, input=history, tool_choice="none").output_text is not None
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model="demo", input="x", previous_response_id="resp_1")
    assert error.value.param == "previous_response_id"


def test_vllm_extras_are_taken(client):
    completion = client.chat.completions.create(
        model="demo",
        messages=SUM,
        max_tokens=5,
        extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 5, "ignore_eos": True},
    )
    assert completion.usage.completion_tokens == 5


def test_errors_become_their_exceptions(client):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="nope", messages=SUM)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="demo", messages=SUM, temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x " * 100_000}])
    assert error.value.code == "context_length_exceeded"
    assert "maximum context length is" in error.value.message


def test_models_are_listed(client):
    models = client.models.list().data
    assert models[0].id == "demo" and models[0].max_model_len >= 4096
    assert client.models.retrieve("demo").id == "demo"


@pytest.mark.asyncio
async def test_the_async_client_streams_many_at_once(server):
    import asyncio

    async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:

        async def add(a: int, b: int) -> str:
            stream = await client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": f"What is {a} + {b}?"}],
                temperature=0,
                stream=True,
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        pairs = [(a, b) for a in (11, 23, 35, 47) for b in (2, 14, 26, 38)]
        together = await asyncio.gather(*(add(a, b) for a, b in pairs))
        alone = [await add(a, b) for a, b in pairs]
        assert together == alone
        assert sum(str(a + b) in text for (a, b), text in zip(pairs, together)) >= len(pairs) - 1
