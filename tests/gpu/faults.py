"""Breaks a GPU under a serving process (break_device.cc) and checks that it ends as promised: the stream ends with an error,
the process with exit code 3 and the cause on standard error, in time. A start without room is refused with the plan.

    python3 tests/gpu/faults.py LAPIDARY BREAK_DEVICE_SO

Standard library only.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

STEP_TIMEOUT_S = 3
END_TIMEOUT_S = 30
DEVICE_LOST, REFUSED = 3, 1
# How to break it, and what must be said.
FAULTS = {
    "address": ["CUDA_ERROR_ILLEGAL_ADDRESS"],
    "trap": ["CUDA_ERROR_LAUNCH_FAILED"],
    "hang": ["step timeout"],
}


@contextlib.contextmanager
def serve(binary: str, *args: str, **environment: str):
    """A server that ends with the block, or when all should long be over: then what waits for it goes on."""
    command = [binary, "serve", "demo", "--device", "cuda", "--port", "0", *args]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    too_long = threading.Timer(3 * END_TIMEOUT_S, process.kill)
    too_long.start()
    try:
        yield process
    finally:
        too_long.cancel()
        process.kill()
        process.wait()


def address(process: subprocess.Popen) -> str:
    for line in process.stderr:
        if match := re.search(r"http://[\w.\[\]:]+:\d+", line):
            return match[0]
    raise RuntimeError("the server ended before it listened")


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + END_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url + "/ready", timeout=END_TIMEOUT_S).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)  # polls an observable state; the deadline above bounds it


def stream(url: str, on_first):
    """Data of the events of a long answer; `on_first` is called with the first."""
    body = {"model": "demo", "prompt": "Count from 1 to 9.", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=END_TIMEOUT_S) as response:
        events = []
        for line in response:
            if line.startswith(b"data: "):
                if not events:
                    on_first()
                events.append(line[6:].decode().strip())
        return events


def check_fault(binary: str, library: str, how: str, said: list[str]) -> None:
    arguments = ("--step-timeout", str(STEP_TIMEOUT_S))
    with tempfile.TemporaryDirectory() as folder:
        when = Path(folder) / "now"
        environment = {"CUDA_INJECTION64_PATH": os.path.abspath(library), "BREAK_WHEN": str(when), "BREAK_HOW": how}
        with serve(binary, *arguments, **environment) as process:
            url = address(process)
            wait_until_ready(url)
            began = 0.0

            def break_it() -> None:
                nonlocal began
                began = time.monotonic()
                when.touch()

            events = stream(url, break_it)
            told_s = time.monotonic() - began
            log = process.communicate(timeout=END_TIMEOUT_S)[1]
            ended_s = time.monotonic() - began
    assert any('{"error":{' in event for event in events[-2:]), f"{how}: the stream ended with {events[-2:]}\n{log}"
    assert process.returncode == DEVICE_LOST, f"{how}: exit code {process.returncode}\n{log}"
    assert all(word in log for word in said), f"{how}: {said} not in\n{log}"
    print(f"{how:8} told after {told_s:.2f} s, process gone after {ended_s:.2f} s: {log.strip().splitlines()[-1]}")


def check_no_room(binary: str) -> None:
    with serve(binary, "--kv-cache-memory-bytes", "1TiB") as process:
        log = process.communicate(timeout=END_TIMEOUT_S)[1]
    assert process.returncode == REFUSED, f"no room: exit code {process.returncode}\n{log}"
    assert "weights" in log and "KV cache" in log, f"no plan in\n{log}"
    print(f"no room  exit code {process.returncode}: {log.strip().splitlines()[-1]}")


def main() -> None:
    binary, library = sys.argv[1:]
    for how, said in FAULTS.items():
        check_fault(binary, library, how, said)
    check_no_room(binary)


if __name__ == "__main__":
    main()
