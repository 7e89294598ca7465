"""Prompts become tokens without holding up the event loop, whatever they are."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny_tokenizer import BOS_ID, byte_ids, write_tokenizer

from paceline.errors import InvalidRequestError, PacelineError, QueueFullError
from paceline.router.chat_template import ChatMessage
from paceline.router.prompt_encoder import LONG_TEXT_BYTES, SHORT_TEXT_BYTES, PromptEncoder
from paceline.router.settings import RouterSettings

TIMEOUT_S = 30.0
HELLO = [ChatMessage("user", "hello")]
ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}"
    "{% endfor %}{% endfor %}"
)


@asynccontextmanager
async def encoder(
    folder: Path, *, max_model_len: int = 1 << 20, template: str | None = None, **settings: Any
) -> AsyncIterator[PromptEncoder]:
    write_tokenizer(folder, **({} if template is None else {"template": template}))
    made = PromptEncoder(folder, RouterSettings(**settings), max_model_len)
    try:
        yield made
    finally:
        await made.close()


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "tokenizer_child" in " ".join(p.cmdline())]


async def until_children(count: int) -> list[psutil.Process]:
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(found := children()) != count:
        assert time.monotonic() < deadline_s, f"{len(found)} children, {count} were expected"
        await asyncio.sleep(0.01)
    return found


async def test_prompts_of_every_length_give_the_same_tokens_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    async with encoder(tmp_path) as made:
        texts = ["é" * (length // 2) for length in (2, SHORT_TEXT_BYTES + 2, LONG_TEXT_BYTES + 2)]
        found = await asyncio.gather(*map(made.encode_text, texts))
        assert [ids.tolist() for ids in found] == [byte_ids(text) for text in texts]
        chat = await made.encode_chat(HELLO)
        assert chat.tolist() == [BOS_ID, *byte_ids("[user]hello\n[assistant]")]
        with pytest.raises(InvalidRequestError, match="no such role: pirate"):
            await made.encode_chat([ChatMessage("pirate", "ahoy")])
        assert len(children()) == 2
    assert not children()


async def test_a_template_that_does_not_return_is_ended_and_others_are_served(
    tmp_path: Path,
) -> None:
    async with encoder(tmp_path, template=ENDLESS, tokenizer_timeout_s=0.5) as made:
        await made.start()
        endless = asyncio.create_task(made.encode_chat(HELLO))
        text = "a" * (LONG_TEXT_BYTES + 1)
        assert len(await made.encode_text(text)) == len(text)
        assert not endless.done()
        with pytest.raises(
            InvalidRequestError, match=r"more than router\.tokenizer_timeout_s, 0\.5"
        ):
            await endless
        await until_children(1)
        middle = "a" * (SHORT_TEXT_BYTES + 1)
        assert len(await made.encode_text(middle)) == len(middle)


async def test_a_process_that_dies_fails_one_prompt_and_is_replaced(tmp_path: Path) -> None:
    async with encoder(tmp_path, template=ENDLESS) as made:
        await made.start()
        endless = asyncio.create_task(made.encode_chat(HELLO))
        for child in await until_children(2):
            child.kill()
        with pytest.raises(PacelineError, match="ended with status -9"):
            await endless
        text = "a" * (SHORT_TEXT_BYTES + 1)
        assert len(await made.encode_text(text)) == len(text)


@pytest.mark.parametrize("change", [{"adds_bos": True}, {"template": "{{ messages[0].content }}"}])
async def test_a_process_that_reads_other_files_than_its_router_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Prompts would get other tokens once a process is replaced, and nobody would know."""
    text = "a" * (SHORT_TEXT_BYTES + 1)
    async with encoder(tmp_path) as made:
        await made.encode_text(text)
        write_tokenizer(tmp_path, **change)
        for child in children():
            child.kill()
            child.wait()
        with pytest.raises(PacelineError, match=r"ended with status|has changed since"):
            await made.encode_text(text)
        with pytest.raises(PacelineError, match="has changed since this router read it"):
            await made.encode_text(text)
        assert not children()
        write_tokenizer(tmp_path)
        assert (await made.encode_text(text)).tolist() == byte_ids(text)


async def test_a_client_that_goes_away_leaves_the_process_to_the_next(tmp_path: Path) -> None:
    text = "a" * (SHORT_TEXT_BYTES + 1)
    async with encoder(tmp_path) as made:
        await made.start()
        before = {child.pid for child in children()}
        for _ in range(3):
            call = asyncio.create_task(made.encode_text(text))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert len(await made.encode_text(text + "b")) == len(text) + 1
        assert {child.pid for child in children()} == before


async def test_prompts_beyond_those_that_may_wait_are_refused_with_a_retry_delay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.router.prompt_encoder.MAX_WAITING_PROMPTS", 1)
    async with encoder(tmp_path, template=ENDLESS) as made:
        calls = [asyncio.create_task(made.encode_chat(HELLO)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match=r"1 prompts wait .* router\.tokenizer_processes"):
            await made.encode_chat(HELLO)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_text_that_cannot_fit_the_model_is_refused_before_it_is_tokenized(
    tmp_path: Path,
) -> None:
    longest = len("<bos>")
    async with encoder(tmp_path, max_model_len=100) as made:
        with pytest.raises(InvalidRequestError, match=f"has 501 bytes .* at most {100 * longest}"):
            await made.encode_text("a" * 501)
        with pytest.raises(InvalidRequestError, match=r"model\.max_model_len is 100 tokens"):
            await made.encode_chat([ChatMessage("user", "a" * 501)])
    async with encoder(tmp_path, max_text_bytes=10) as made:
        with pytest.raises(InvalidRequestError, match=r"router\.max_text_bytes is 10"):
            await made.encode_text("a" * 11)
        assert not children()


async def test_the_longest_text_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """`tokenizers` holds the GIL: in a thread of this process the pause would be seconds."""
    async with encoder(tmp_path) as made:
        await made.start()
        encoding = asyncio.create_task(made.encode_text("a" * 300_000))
        longest_s, last_s = 0.0, time.monotonic()
        while not encoding.done():
            await asyncio.sleep(0.001)
            longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
        assert len(await encoding) == 300_000
        assert longest_s < 0.5
