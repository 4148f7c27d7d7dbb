"""What can be made of the server's own description: requests that fit it and requests that do not."""

import json
import os
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from schemathesis import GenerationMode, checks

# The same requests every time, half a minute of them. `SEED=2 EXAMPLES=1000` looks further.
SEED = int(os.environ.get("SEED", "1"))
EXAMPLES = int(os.environ.get("EXAMPLES", "30"))
# Above the deadlines that `tame` leaves: schemathesis itself gives up after ten seconds, which a busy machine may take.
ANSWER_TIMEOUT_S = 60

PATHS = json.loads((Path(__file__).parents[2] / "crates/server/src/openapi/base.json").read_text())["paths"]
OPERATIONS = [
    pytest.param(path, method, mode, stream, id=" ".join([method, path, mode.value] + ["streamed"] * stream))
    for path, methods in PATHS.items()
    for method, operation in methods.items()
    # Only a body can be wrong.
    for mode in (GenerationMode if "requestBody" in operation else [GenerationMode.POSITIVE])
    for stream in (False, True)
    if not stream or mode is GenerationMode.POSITIVE and "event-stream" in str(operation["responses"])
]

MEANT = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]


@pytest.fixture(scope="session")
def description(server):
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def tame(case) -> None:
    """Leaves every kind of request, but of those that say the same only the quick ones, in words that the model knows."""
    for timeout in ("X-Request-Timeout", "X-Queue-Timeout"):
        if case.headers and timeout in case.headers:
            case.headers[timeout] = "30"
    if not isinstance(case.body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        case.body[name] = 3
    for name, value in (("n", 2), ("best_of", 2), ("timeout", 30), ("queue_timeout", 30)):
        if isinstance(case.body.get(name), (int, float)):
            case.body[name] = value
    if case.body.get("best_of"):
        case.body["n"] = 2
    for name in ("prompt", "tokens", "allowed_token_ids", "stop_token_ids"):
        if name in case.body:
            case.body[name] = known_tokens(case.body[name])


def known_tokens(value):
    if isinstance(value, list):
        return [known_tokens(item) for item in value]
    return int(value) % 256 if isinstance(value, (int, float)) else value


@pytest.mark.parametrize(("path", "method", "mode", "stream"), OPERATIONS)
def test_any_request_is_answered_as_described(description, path, method, mode, stream):
    operation = description[path][method.upper()]

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        tame(case)
        if stream:
            case.body |= {"stream": True, "prompt_logprobs": None}
        case.call_and_validate(checks=MEANT, timeout=ANSWER_TIMEOUT_S)

    ask()
