"""Accuracy of the bundled demo model, asked over HTTP as any client would.

Usage: demo_accuracy.py path/to/lapidary. Prints a table; fails if a task is below the promised share of right answers.
"""

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lapidary_process import Lapidary

EVAL = Path(__file__).parent.parent / "fixtures" / "demo" / "eval.json"
PROMISED = 0.95
CONCURRENCY = 16


def ask(url: str, messages: list[dict]) -> str:
    """The greedy answer."""
    body = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 128}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main() -> int:
    tasks: dict[str, list[dict]] = json.loads(EVAL.read_text(encoding="utf-8"))["tasks"]
    failed = False
    with Lapidary(sys.argv[1], "demo") as server, ThreadPoolExecutor(CONCURRENCY) as pool:
        for task, examples in tasks.items():
            answers = pool.map(lambda example: ask(server.url, example["messages"]), examples)
            right = sum(a.strip() == e["answer"].strip() for a, e in zip(answers, examples))
            failed |= right < PROMISED * len(examples)
            print(f"{task:24} {right:4} of {len(examples):4}  {right / len(examples):7.1%}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
