"""Peers that are not Python: openai-node, async-openai and promtool; and the server's own accounts after both."""

import os
import subprocess

from lapidary_process import metric, num_aborted

# A client that is slow to leave may find its answer complete.
LEAVE_ATTEMPTS = 5


def test_openai_node_passes(server):
    command = ["node", "openai_node.mjs", server.url]
    subprocess.run(command, cwd=os.environ["NODE_CLIENTS"], check=True, timeout=120)


def test_async_openai_passes(server):
    subprocess.run([os.environ["ASYNC_OPENAI"], server.url], check=True, timeout=120)


def test_promtool_finds_nothing_but_vllm_names(server, client):
    client.completions.create(model="demo", prompt="One", max_tokens=3)
    result = subprocess.run(
        [os.environ["PROMTOOL"], "check", "metrics"], input=server.get("/metrics"), text=True, capture_output=True
    )
    remarks = (result.stdout + result.stderr).splitlines()
    # vLLM's names, which dashboards and gateways look for, break two naming conventions; nothing else may.
    ours = [
        remark
        for remark in remarks
        if not (remark.startswith("vllm:") and remark.endswith("metric names should not contain ':'"))
        and remark != 'vllm:iteration_tokens_total non-counter metrics should not have "_total" suffix'
    ]
    assert ours == []
    assert result.returncode in (0, 3), "0: clean, 3: remarks; anything else: not parsed"


def test_counters_equal_the_sum_of_usage(server, client):
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
    # A stream that somebody left may still be counting.
    text = server.settled_metrics()
    before = [metric(text, name) for name in names]
    usages = [client.completions.create(model="demo", prompt=p, max_tokens=7).usage for p in ("a b", "c", "d e f")]
    text = server.settled_metrics()
    after = [metric(text, name) for name in names]
    grown = [b - a for a, b in zip(before, after)]
    assert grown == [sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)]


def test_a_stream_left_by_its_client_gives_everything_back(server, client):
    aborted = num_aborted(server.settled_metrics())
    for _ in range(LEAVE_ATTEMPTS):
        stream = client.completions.create(
            model="demo", prompt="One", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        text = server.settled_metrics()
        if num_aborted(text) == aborted + 1:
            return
    raise AssertionError("no stream was seen to be left:\n" + text)
