"""Traces against OpenTelemetry's own schema, as a collector reads them."""

import base64
import http.server
import json
import os
import threading
import time

import openai
import pytest
from google.protobuf import json_format
from lapidary_process import Lapidary
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
EXPORT_TIMEOUT_S = 60


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps the bodies it gets."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, self.headers["content-type"], json.loads(body)))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture()
def collector():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.received = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def bytes_for_protobuf(span: dict) -> dict:
    """OTLP's JSON has ids in hexadecimal where protobuf's has base64; all else is the same."""
    ids = ("traceId", "spanId", "parentSpanId")
    return {k: base64.b64encode(bytes.fromhex(v)).decode() if k in ids else v for k, v in span.items()}


def all_spans(received: list) -> list:
    """The spans of all requests to the collector, as JSON."""
    resources = [resource for _, _, body in received for resource in body["resourceSpans"]]
    return [span for resource in resources for scope in resource["scopeSpans"] for span in scope["spans"]]


def wait_for_spans(received: list, count: int) -> None:
    """They are exported about a second after the first of them ended."""
    deadline = time.monotonic() + EXPORT_TIMEOUT_S
    while len(all_spans(received)) < count:
        assert time.monotonic() < deadline, received
        time.sleep(0.05)  # polls an observable state; the deadline above bounds it


def test_spans_are_what_opentelemetry_defines(collector):
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    with Lapidary(os.environ["LAPIDARY"], "demo", "--otlp-traces-endpoint", endpoint) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            usage = client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "What is 1 + 1?"}],
                extra_headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "tracestate": "vendor=1"},
            ).usage
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="demo", prompt="One", temperature=3)
        # A process that ends does not wait for a busy machine's collector for long.
        wait_for_spans(collector.received, 2)
    spans = []
    for path, content_type, body in collector.received:
        assert (path, content_type) == ("/v1/traces", "application/json")
        for scope in body["resourceSpans"][0]["scopeSpans"]:
            scope["spans"] = [bytes_for_protobuf(span) for span in scope["spans"]]
        # Refuses unknown fields and wrong types.
        request = json_format.ParseDict(body, ExportTraceServiceRequest())
        (resource,) = request.resource_spans
        names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
        assert names["service.name"] == "lapidary"
        spans += resource.scope_spans[0].spans
    answered, refused = sorted(spans, key=lambda span: span.trace_id.hex() != TRACE_ID)
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)
    assert answered.trace_state == "vendor=1"
    assert refused.trace_id.hex() != TRACE_ID and refused.parent_span_id == b""
    assert answered.end_time_unix_nano > answered.start_time_unix_nano
    attributes = {attribute.key: attribute.value for attribute in answered.attributes}
    assert attributes["gen_ai.request.model"].string_value == "demo"
    assert attributes["gen_ai.usage.prompt_tokens"].int_value == usage.prompt_tokens
    assert attributes["gen_ai.usage.completion_tokens"].int_value == usage.completion_tokens
    assert 0 < attributes["gen_ai.latency.time_to_first_token"].double_value < 60
