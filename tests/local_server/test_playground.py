"""The playground's page in a real browser, at the widths of a phone and of a desk, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from browser_pages import DESK, IN_A_BROWSER, PHONE, chromium, opened
from playwright.sync_api import Browser, Page, expect

from speculators import assets
from speculators.decoding import Engine
from speculators.local_server.app import LocalServer
from speculators.local_server.protocol import ServeConfig
from speculators.verifier import load_verifier

pytestmark = IN_A_BROWSER
QUESTION = "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 1, 2,"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def asked(page: Page) -> None:
    page.get_by_label("longest answer").fill("24")
    page.get_by_label("question").fill(QUESTION)
    page.get_by_label("question").press("Enter")
    page.get_by_role("button", name="Send").wait_for()


@pytest.mark.parametrize(("width", "scheme", "num_columns"), [(PHONE, "dark", 1), (DESK, "light", 2)])
def test_an_answer_is_coloured_by_origin_beside_plain_decoding(browser, server, plain, width, scheme, num_columns):
    page, wrong = opened(browser, server.url, width, scheme)
    expect(page.locator("#method option")).to_have_text(["ngram", "suffix", "none (plain decoding)"], timeout=60_000)
    asked(page)
    texts = page.locator(".text").all_text_contents()
    assert texts == [plain.chat(QUESTION, max_tokens=24).text] * 2
    first, second = page.locator(".answer").all()
    expect(first).to_contain_text(re.compile(r"ngram, K = 6.*24 tokens · [\d.]+ tokens/s · [\d.]+ tokens per round"))
    expect(first).to_contain_text("plain decoding's speed; the same text")
    expect(second).to_contain_text("1.00 tokens per round")
    assert {span.get_attribute("title") for span in second.locator(".text span").all()} == {"verifier"}
    origins = [span.get_attribute("title") for span in first.locator(".text span").all()]
    assert set(origins) <= {"verifier", "recovered", "bonus", *(f"draft {i}" for i in range(1, 7))}
    assert "draft 1" in origins
    of_drafts = first.locator(".text span.d1").first.evaluate("e => getComputedStyle(e).backgroundColor")
    assert of_drafts == {"light": "rgb(200, 236, 208)", "dark": "rgb(29, 74, 44)"}[scheme]
    left, right = (box.bounding_box()["x"] for box in (first, second))
    assert (left < right) == (num_columns == 2)
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing sticks out
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 44  # of a thumb
    assert wrong == []
    page.close()


def test_method_and_number_are_switched_and_a_conversation_goes_on(browser, server):
    page, wrong = opened(browser, server.url)
    page.get_by_label("method").select_option("suffix")
    page.get_by_label("drafts per round").fill("2")
    page.get_by_label("then plain decoding").uncheck()
    asked(page)
    expect(page.locator(".answer h2")).to_have_text(["suffix, K = 2"])
    page.get_by_label("method").select_option("none")
    assert page.get_by_label("drafts per round").is_disabled()
    with page.expect_request("**/v1/chat/completions") as sent:
        asked(page)
    messages = sent.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"] == page.locator(".text").first.text_content()
    expect(page.locator(".answer h2")).to_have_text(["suffix, K = 2", "plain decoding"])
    page.get_by_role("button", name="New").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert wrong == []
    page.close()


def test_a_conversation_that_is_left_while_it_is_answered_is_forgotten(browser, server):
    page, wrong = opened(browser, server.url)
    expect(page.locator("#method option")).to_have_count(3, timeout=60_000)
    page.get_by_label("longest answer").fill("400")
    page.get_by_label("question").fill("Write all numbers.")
    page.get_by_role("button", name="Send").click()
    page.locator(".turn .text span").first.wait_for()
    page.get_by_role("button", name="New").click()
    page.get_by_role("button", name="Send").wait_for()
    with page.expect_request("**/v1/chat/completions") as sent:
        asked(page)
    assert [message["content"] for message in sent.value.post_data_json["messages"]] == [QUESTION]
    assert wrong == []
    page.close()


def test_an_error_is_shown_and_a_long_answer_can_be_stopped(browser, server):
    page, _ = opened(browser, server.url)
    page.get_by_label("temperature").fill("-1")
    page.locator("#ask").evaluate("form => form.noValidate = true")
    asked(page)
    expect(page.locator(".wrong")).to_contain_text("temperature=-1.0 must be 0 (greedy) or more")
    page.get_by_label("temperature").fill("0")
    page.get_by_label("longest answer").fill("400")
    page.get_by_label("question").fill("Write all numbers.")
    page.get_by_role("button", name="Send").click()
    page.locator(".turn").nth(1).locator(".text span").first.wait_for()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn").nth(1)).to_contain_text("stopped")
    page.close()


def test_another_machine_needs_the_token_of_the_link(browser, plain):
    engine = Engine(load_verifier(str(assets.tiny_verifier_path())), tokenizer=plain.tokenizer, max_length=512)
    with LocalServer(engine, ServeConfig(port=0, api_key="s3cret", playground=True)) as guarded:
        page, _ = opened(browser, guarded.url)
        expect(page.locator("#model")).to_contain_text("this address asks for its token", timeout=60_000)
        page.close()
        page, _ = opened(browser, f"{guarded.url}/#token=s3cret")
        expect(page.locator("#model")).to_contain_text("at most 512 tokens", timeout=60_000)
        expect(page.locator("#method option")).to_have_text(["none (plain decoding)"])
        page.close()
