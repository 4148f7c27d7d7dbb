"""One server for the whole suite."""

import os

import openai
import pytest
from lapidary_process import Lapidary


@pytest.fixture(scope="session")
def server():
    with Lapidary(os.environ["LAPIDARY"], "demo") as server:
        yield server


@pytest.fixture()
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
