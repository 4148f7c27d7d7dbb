"""The page at `/` in a real browser (Debian's Chromium, headless)."""

import json
import os

import pytest
from lapidary_process import Lapidary, num_aborted
from playwright.sync_api import Page, expect, sync_playwright

KEY = "sk-browser"
# Chromium says so of every answer that is no success.
REFUSED = "Failed to load resource: the server responded with a status of "
# Far above what anything here takes.
expect.set_options(timeout=30_000)
# A browser that is slow to press a key may find the answer complete.
STOP_ATTEMPTS = 5


class Visit:
    """A page and what it did behind the scenes."""

    def __init__(self, page: Page):
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text) if message.type != "debug" else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def send(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def last_answer(self):
        return self.page.locator(".assistant").last

    def check_manners(self, url: str, refusals: int = 0) -> None:
        """It asked this server alone, and nothing went wrong but what was refused."""
        assert [url_ for url_ in self.asked if not url_.startswith((url + "/", "data:"))] == []
        assert [text for text in self.said if not text.startswith(REFUSED)] == []
        assert len(self.said) == refusals, self.said


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=os.environ["CHROMIUM"], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture()
def visit(browser, request):
    context = browser.new_context(**getattr(request, "param", {}))
    context.set_default_timeout(30_000)
    yield Visit(context.new_page())
    context.close()


def test_a_conversation_is_streamed_and_goes_on(server, visit):
    visit.page.goto(server.url + "/")
    expect(visit.page.locator("#model-line")).to_contain_text("demo · 4,096 tokens")
    visit.page.get_by_label("Temperature").fill("0")
    visit.send("What is 12 + 7?")
    expect(visit.last_answer().locator(".text")).to_have_text("12 + 7 = 19")
    expect(visit.last_answer().locator(".facts")).to_contain_text("tokens/s")
    with visit.page.expect_request("**/v1/chat/completions") as sent:
        visit.send("Count from 1 to 5.")
    assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    assert sent.value.post_data_json["stream"] is True
    expect(visit.last_answer().locator(".text")).to_have_text("1, 2, 3, 4, 5")
    expect(visit.page.locator("#running")).to_have_text("0")
    expect(visit.page.locator("#kv")).to_contain_text("%")
    expect(visit.page.get_by_label("Message", exact=True)).to_be_focused()
    visit.check_manners(server.url)


def test_stop_aborts_the_request(server, visit):
    def endless(route):
        body = {**route.request.post_data_json, "ignore_eos": True, "max_tokens": 4000}
        route.continue_(post_data=json.dumps(body))

    # What other pages have left is counted before.
    aborted = num_aborted(server.settled_metrics())
    visit.page.route("**/v1/chat/completions", endless)
    for _ in range(STOP_ATTEMPTS):
        visit.page.goto(server.url + "/")
        visit.send("Count from 1 to 5.")
        expect(visit.last_answer().locator(".text")).to_contain_text("1, 2")
        visit.page.keyboard.press("Escape")
        expect(visit.page.get_by_role("button", name="Send")).to_be_visible()
        facts = visit.last_answer().locator(".facts").inner_text()
        if num_aborted(server.settled_metrics()) == aborted + 1:
            assert "stopped" in facts
            return
    raise AssertionError(f"no answer was stopped; of the last one the page says: {facts}")


def test_errors_are_shown_in_full_and_can_be_mended(server, visit):
    visit.page.goto(server.url + "/")
    visit.page.get_by_label("Temperature").fill("3")
    visit.send("What is 1 + 1?")
    error = visit.page.get_by_role("alert")
    expect(error).to_contain_text("400")
    expect(error).to_contain_text("temperature must be in [0, 2], got 3.0.")
    expect(error).to_contain_text("Parameter: temperature")
    visit.page.get_by_label("Temperature").fill("0")
    visit.page.get_by_role("button", name="Try again").click()
    expect(visit.last_answer().locator(".text")).to_have_text("1 + 1 = 2")
    expect(error).to_have_count(0)
    visit.check_manners(server.url, refusals=1)


def test_text_is_never_html(server, visit):
    visit.page.goto(server.url + "/")
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    visit.send(text)
    expect(visit.page.locator(".user .text")).to_have_text(text)
    expect(visit.last_answer().get_by_role("button", name="Try again")).to_be_visible()
    assert visit.page.locator("#turns img, #turns script").count() == 0
    visit.check_manners(server.url)


def test_with_keys_and_behind_a_prefix(browser):
    with Lapidary(os.environ["LAPIDARY"], "demo", "--api-key", KEY, "--root-path", "/gem") as server:
        context = browser.new_context()
        visit = Visit(context.new_page())
        visit.page.goto(server.url + "/gem")
        expect(visit.page.locator("#model-line")).to_have_text("This server needs an API key.")
        expect(visit.page.get_by_label("API key")).to_be_focused()
        visit.page.get_by_label("API key").fill(KEY)
        visit.page.keyboard.press("Tab")
        expect(visit.page.locator("#model-line")).to_contain_text("demo")
        visit.send("What is 2 + 2?")
        expect(visit.last_answer().locator(".text")).to_contain_text("4")
        visit.page.reload()
        expect(visit.page.locator("#model-line")).to_contain_text("demo")
        assert all("/gem" in url for url in visit.asked if url.startswith("http"))
        visit.check_manners(server.url, refusals=1)
        # Kept for this tab alone.
        other = context.new_page()
        other.goto(server.url + "/gem/")
        expect(other.locator("#model-line")).to_have_text("This server needs an API key.")
        assert context.storage_state()["origins"] == [], "nothing is in localStorage"
        context.close()


def test_it_waits_for_a_server_that_loads(server, visit):
    refusal = {"error": {"message": "The model is not loaded yet.", "code": "model_loading"}}
    progress = {"status": "loading_weights", "progress": 0.63}
    visit.page.route("**/v1/models", lambda route: route.fulfill(status=503, json=refusal))
    visit.page.route("**/ready", lambda route: route.fulfill(status=503, json=progress))
    visit.page.goto(server.url + "/")
    expect(visit.page.locator("#model-line")).to_have_text("The server is loading weights (63 %) …")
    visit.page.unroute("**/v1/models")
    expect(visit.page.locator("#model-line")).to_contain_text("demo")


@pytest.mark.parametrize(
    ("visit", "is_dark"),
    [({"color_scheme": "dark"}, True), ({"color_scheme": "light"}, False)],
    indirect=["visit"],
)
def test_it_follows_the_systems_colours(server, visit, is_dark):
    visit.page.goto(server.url + "/")
    brightness = visit.page.locator("body").evaluate(
        "body => ['backgroundColor', 'color'].map(of => getComputedStyle(body)[of].match(/\\d+/g).map(Number).reduce((a, b) => a + b))"
    )
    assert (brightness[0] < brightness[1]) is is_dark
    visit.check_manners(server.url)


@pytest.mark.parametrize("visit", [{"viewport": {"width": 360, "height": 640}}], indirect=True)
def test_it_fits_a_phone(server, visit):
    visit.page.goto(server.url + "/")
    visit.send("Say " + "a-very-long-word" * 12)
    expect(visit.last_answer().get_by_role("button", name="Try again")).to_be_visible()
    wide = visit.page.locator("html").evaluate("html => html.scrollWidth - html.clientWidth")
    assert wide == 0, "nothing has to be scrolled sideways"
    expect(visit.page.get_by_label("Temperature")).to_be_hidden()
    visit.page.get_by_text("Settings").click()
    expect(visit.page.get_by_label("Temperature")).to_be_visible()
    visit.check_manners(server.url)
