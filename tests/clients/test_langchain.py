"""LangChain's ChatOpenAI, as an application or an agent calls it."""

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

SUM = "What is 12 + 7?"


class Person(BaseModel):
    """Somebody."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


def file_ticket(votes: int) -> str:
    """Files a ticket."""
    return f"filed with {votes} votes"


@pytest.fixture(scope="module")
def options(server):
    return dict(base_url=server.url + "/v1", api_key="none", model="demo", temperature=0, max_retries=0)


@pytest.fixture(scope="module")
def chat(options):
    return ChatOpenAI(**options)


def test_invoke_says_what_was_used_and_why_it_ended(chat):
    answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(SUM)])
    assert isinstance(answer, AIMessage) and answer.content
    usage = answer.usage_metadata
    assert usage["input_tokens"] > 0 and usage["output_tokens"] > 0
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert answer.response_metadata["finish_reason"] == "stop"
    assert "19" in chat.invoke(SUM).content


def test_a_stream_adds_up_to_the_answer(chat):
    whole = chat.invoke(SUM)
    chunks = list(chat.stream(SUM, stream_usage=True))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert len(chunks) > 2 and total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert total.response_metadata["finish_reason"] == "stop"


@pytest.mark.asyncio
async def test_batches_and_async_streams_agree(options):
    chat = ChatOpenAI(**options)
    questions = [f"What is {a} + 7?" for a in (11, 23, 35)]
    batch = [answer.content for answer in await chat.abatch(questions)]
    assert all(str(a + 7) in text for a, text in zip((11, 23, 35), batch))
    assert "".join([chunk.content async for chunk in chat.astream(questions[0])]) == batch[0]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object(chat, method):
    structured = chat.with_structured_output(Person, method=method, include_raw=True)
    result = structured.invoke("Ada is 36 years old. Answer in JSON.")
    assert result["parsing_error"] is None and isinstance(result["parsed"], Person), result
    if method == "json_schema":
        assert result["parsed"] == Person(name="Ada", age=36)


def test_json_mode_is_json(chat):
    structured = chat.with_structured_output(Person, method="json_mode")
    assert structured.invoke("Ada is 36 years old. Answer in JSON.") == Person(name="Ada", age=36)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_tool_is_called_and_its_result_is_taken(options, is_streamed):
    chat = ChatOpenAI(**options, max_tokens=200, streaming=is_streamed)
    bound = chat.bind_tools([file_ticket], tool_choice="file_ticket")
    call = bound.invoke(SUM)
    assert call.tool_calls[0]["name"] == "file_ticket" and call.invalid_tool_calls == []
    assert isinstance(call.tool_calls[0]["args"]["votes"], int)
    result = ToolMessage("filed", tool_call_id=call.tool_calls[0]["id"])
    answer = chat.bind_tools([file_ticket]).invoke([HumanMessage(SUM), call, result])
    assert answer.content or answer.tool_calls


def test_logprobs_come_with_an_answer(chat):
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(SUM)
    content = answer.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content if entry["token"] != "<end_of_turn>") == answer.content
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) >= 2 for entry in content)


def test_the_responses_api_gives_the_same_answer(options, chat):
    responses = ChatOpenAI(**options, use_responses_api=True)
    answer = responses.invoke(SUM)
    assert answer.text == chat.invoke(SUM).content
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in responses.stream(SUM)) == answer.text


def test_completions_take_stop_strings(options):
    text = OpenAI(**options, max_tokens=30).invoke("1, 2, 3,", stop=["9"])
    assert text and "9" not in text
