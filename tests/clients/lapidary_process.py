"""Starts and stops a real `lapidary` process. Standard library only."""

import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
SETTLE_TIMEOUT_S = 30


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
                urllib.request.urlopen(self.url + "/ready", timeout=5)
                return
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
            time.sleep(0.05)  # polls an observable state; the deadline above bounds it
        raise RuntimeError("the server is not ready in time:\n" + "".join(self.log))

    def get(self, path: str) -> str:
        """Body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def wait_for_metrics(self, holds: Callable[[str], bool]) -> None:
        """Until `holds` is true of what `/metrics` says. Other connections than the caller's are counted as they end, and
        what they held comes back a step later."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while not holds(text := self.get("/metrics")):
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
