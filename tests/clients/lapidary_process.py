"""Starts and stops a real `lapidary` process. Standard library only."""

import re
import subprocess
import threading
import time
import urllib.error
import urllib.request

START_TIMEOUT_S = 120
# Above what the server itself allows a drain by default: 2 s of grace and 30 s for what is under way.
STOP_TIMEOUT_S = 60
SETTLE_TIMEOUT_S = 60
# For one answer to a question that is asked again where none comes.
PROBE_TIMEOUT_S = 10


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of `name` that carry `labels`."""
    total = 0.0
    for line in text.splitlines():
        match = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? ([^ ]+)$", line)
        if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
            total += float(match[2])
    return total


def num_aborted(text: str) -> float:
    """Requests whose client left before the end."""
    return metric(text, "lapidary_requests_finished_total", outcome="client_abort")


class Lapidary:
    """A running server: `with Lapidary(binary, "demo") as server: ... server.url`."""

    def __init__(self, binary: str, *args: str):
        self.process = subprocess.Popen(
            [binary, "serve", *args, "--port", "0"], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.model = args[0]
        """The name it is served by."""
        self.log: list[str] = []
        self.url = self._wait_for_address()
        # Keeps the pipe empty, so that the server never blocks on its log.
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()
        self._wait_until_ready()

    def _wait_for_address(self) -> str:
        for line in self.process.stderr:
            self.log.append(line)
            if match := re.search(r"http://[\w.\[\]:]+:\d+", line):
                return match[0]
        raise RuntimeError("the server ended before it listened:\n" + "".join(self.log))

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError("the server ended while loading:\n" + "".join(self.log))
            try:
                self._ask("/ready")
                return
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            except TimeoutError:
                pass  # a busy machine
            time.sleep(0.05)  # polls an observable state; the deadline above bounds it
        raise RuntimeError("the server is not ready in time:\n" + "".join(self.log))

    def _ask(self, path: str) -> str:
        """Body of a GET; a `TimeoutError`, whichever part of it takes too long."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=PROBE_TIMEOUT_S) as response:
                return response.read().decode()
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise error.reason from error
            raise

    def get(self, path: str) -> str:
        """Body of a GET, which is asked again where a busy machine is slow to answer."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            try:
                return self._ask(path)
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise

    def settled_metrics(self) -> str:
        """What `/metrics` says once every request has its outcome and nothing runs or waits. Requests that others have
        left are counted as their connections end, and what they held comes back a step later."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            text = self.get("/metrics")
            is_over = metric(text, "lapidary_requests_received_total") == metric(text, "lapidary_requests_finished_total")
            held = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            if is_over and all(metric(text, name) == 0 for name in held):
                return text
            if time.monotonic() > deadline:
                raise AssertionError("the metrics do not settle:\n" + text)
            time.sleep(0.05)  # polls an observable state; the deadline above bounds it

    def __enter__(self) -> "Lapidary":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            status = self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        if status != 0:
            raise RuntimeError(f"the server exited with {status} on SIGTERM:\n" + "".join(self.log))
