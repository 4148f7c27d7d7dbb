"""Accuracy of the bundled demo model, asked over HTTP as any client would.

Prints a table, with a remark where a task is below the promised share of right answers; fails if one is below what is
recorded beside the questions. The questions and greedy decoding are fixed, so the counts are. Flags for `lapidary serve`
stand after `--`; what they change has a record of its own, by `--recorded`.
"""

import argparse
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lapidary_process import Lapidary

EVAL = Path(__file__).parent.parent / "fixtures" / "demo" / "eval.json"
PROMISED = 0.95
SLACK = 1  # answers: another CPU's order of additions may turn a close call
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
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("lapidary", help="path of the binary")
    arguments.add_argument("--recorded", default="accuracy.json", help="the record's file beside the questions")
    arguments.add_argument("--record", action="store_true", help="write the counts down as what later runs must reach")
    # Not by argparse, for which positional arguments end where options begin.
    ours, flags = sys.argv[1:], []
    if "--" in ours:
        ours, flags = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    arguments = arguments.parse_args(ours)
    tasks: dict[str, list[dict]] = json.loads(EVAL.read_text(encoding="utf-8"))["tasks"]
    record = EVAL.with_name(arguments.recorded)
    recorded = {} if arguments.record else json.loads(record.read_text(encoding="utf-8"))
    found, failed = {}, []
    with Lapidary(arguments.lapidary, "demo", *flags) as server, ThreadPoolExecutor(CONCURRENCY) as pool:
        for task, examples in tasks.items():
            answers = pool.map(lambda example: ask(server.url, example["messages"]), examples)
            right = found[task] = sum(a.strip() == e["answer"].strip() for a, e in zip(answers, examples))
            remark = "" if right >= PROMISED * len(examples) else "  below the promise"
            if right < recorded.get(task, 0) - SLACK:
                failed.append(task)
                remark += f"  FAILED: {recorded[task]} are recorded"
            print(f"{task:24} {right:4} of {len(examples):4}  {right / len(examples):7.1%}{remark}")
    if arguments.record:
        record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    elif missing := recorded.keys() - found.keys():
        failed += sorted(missing)
        print(f"recorded, but not asked: {sorted(missing)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
