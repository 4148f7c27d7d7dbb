"""Peers that are not Python: openai-node, async-openai and promtool; and the server's own accounts after both."""

import os
import re
import subprocess


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of `name` that carry `labels`."""
    total = 0.0
    for line in text.splitlines():
        match = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? ([^ ]+)$", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


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
    before = [metric(server.get("/metrics"), name) for name in names]
    usages = [client.completions.create(model="demo", prompt=p, max_tokens=7).usage for p in ("a b", "c", "d e f")]
    after = [metric(server.get("/metrics"), name) for name in names]
    grown = [b - a for a, b in zip(before, after)]
    assert grown == [sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)]


def test_a_stream_left_by_its_client_gives_everything_back(server, client):
    aborted = metric(server.get("/metrics"), "lapidary_requests_finished_total", outcome="client_abort")
    stream = client.completions.create(
        model="demo", prompt="One", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.wait_for_metrics(
        lambda text: metric(text, "vllm:num_requests_running") == 0
        and metric(text, "lapidary_requests_finished_total", outcome="client_abort") == aborted + 1
    )
