"""An LLM judge at any OpenAI-compatible endpoint: `POST BASE_URL/chat/completions`.

Invariants:

* a verdict comes from a reply inside the verdict grammar, or there is none (`JudgeError`);
* every wait ends: one request by `timeout_s`, one verdict by `deadline_s`, a queue by both;
* the key is in the request's header and nowhere else: not in errors, logs or the cache.

Plain aiohttp, which the manager has anyway, not the `openai` client: that one reads replies of any
size, bounds the gap between two bytes but not the whole reply (a slow drip holds it for ever), and
retries by rules of its own below ours.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import aiohttp

from megatron_matpo.cache import ReplyCache
from megatron_matpo.config.reward import JudgeConfig
from megatron_matpo.errors import JudgeError, JudgeRefusedError, ToolError
from megatron_matpo.obs.spans import place, span
from megatron_matpo.rewards.verdict import (
    PROMPT_VERSION,
    Verdict,
    judge_prompt,
    parse_verdict,
    reminder,
)

MAX_REPLY_BYTES = 1 << 20
"""A verdict takes some hundred bytes; of a longer reply the rest is not read."""
_CHUNK_BYTES = 1 << 16
_SHOWN_CHARS = 200
# 402: no credit; 404: no such model or path.
_REFUSALS = frozenset({401, 402, 403, 404})
_TRANSIENT = frozenset({408, 409, 425, 429})
_NO_MODEL = ("model not exist", "model not found", "unknown model", "invalid model")


@dataclass(slots=True)
class JudgeCounts:
    """What the judge did for one step."""

    num_requests: int = 0
    num_answered: int = 0
    """Requests with a complete reply, whatever it said."""
    num_failures: int = 0
    """Verdicts that did not come."""
    num_cache_hits: int = 0
    latency_s: float = 0.0
    """Sum over answered requests."""

    def restart(self) -> None:
        """Set all to 0."""
        self.num_requests = self.num_answered = self.num_failures = self.num_cache_hits = 0
        self.latency_s = 0.0

    def metrics(self) -> dict[str, float]:
        """`judge/*`."""
        mean = self.latency_s / self.num_answered if self.num_answered else 0.0
        return {
            "judge/calls": float(self.num_requests),
            "judge/failures": float(self.num_failures),
            "judge/cache_hits": float(self.num_cache_hits),
            "judge/latency_s_mean": mean,
        }


class _Again(Exception):
    """This attempt failed in a way that another one may not; says why and when."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        """How long the server asks everybody to wait."""


class Judge:
    """Asks for verdicts; an async context manager, used inside one event loop."""

    def __init__(self, config: JudgeConfig, cache: ReplyCache | None = None) -> None:
        """The key is read when the first request needs it: a full cache needs none."""
        self._config = config
        self._cache = cache
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        self._proxy = proxy_for(self._url)
        self._gate = asyncio.Semaphore(config.max_concurrency)
        self._session: aiohttp.ClientSession | None = None
        self._resume_at = 0.0

    async def __aenter__(self) -> Self:
        """Open the connection pool."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._config.max_concurrency),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        if self._session is not None:
            await self._session.close()

    async def verdict(self, question: str, truth: str, answer: str, counts: JudgeCounts) -> Verdict:
        """The verdict on `answer`, from the cache if it was given before.

        Raises:
            JudgeRefusedError: no request can succeed: key, model or address are wrong.
            JudgeError: none came in `max_attempts` attempts or inside `deadline_s`.
        """
        question, truth, answer = _encodable(question), _encodable(truth), _encodable(answer)
        request = {
            "model": self._config.model,
            "prompt_version": PROMPT_VERSION,
            "question": question,
            "truth": truth,
            "answer": answer,
        }
        problems: list[str] = []
        has_asked = False

        async def ask() -> tuple[str, bool]:
            nonlocal has_asked
            has_asked = True
            prompt = judge_prompt(question, truth, answer)
            return (await self._ask(prompt, counts, problems)).value, True

        limit = asyncio.timeout(self._config.deadline_s)
        try:
            async with limit:
                if self._cache is None:
                    text, _ = await ask()
                else:
                    text = await self._cache.fetch("judge", request, ask)
        except TimeoutError as error:
            if not limit.expired():
                raise
            counts.num_failures += 1
            raise JudgeError(
                f"no verdict after {self._config.deadline_s:g} s (reward.judge.deadline_s); "
                f"last problem: {problems[-1] if problems else 'none, it waited for its turn'}"
            ) from error
        except JudgeError:
            counts.num_failures += 1
            raise
        except ToolError as error:  # offline replay without this verdict
            counts.num_failures += 1
            raise JudgeError(str(error)) from error
        counts.num_cache_hits += not has_asked
        return Verdict(text)

    async def _ask(self, prompt: str, counts: JudgeCounts, problems: list[str]) -> Verdict:
        """Attempts until a reply is a verdict; what went wrong is appended to `problems`."""
        config = self._config
        for attempt in range(config.max_attempts):
            if attempt:
                # Jitter: what failed together is not asked again together.
                pause = config.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                await asyncio.sleep(pause)
            try:
                async with place(self._gate, "wait for a place at the judge"):
                    await asyncio.sleep(max(0.0, self._resume_at - time.monotonic()))
                    reply = await self._request(prompt, counts)
            except _Again as error:
                problems.append(str(error))
                pause = min(error.pause_s, config.deadline_s)
                self._resume_at = max(self._resume_at, time.monotonic() + pause)
                continue
            verdict = parse_verdict(reply)
            if verdict is not None:
                return verdict
            problems.append(f"not a verdict: {self._shown(reply)!r}")
            if not prompt.endswith(reminder()):
                prompt += reminder()
        raise JudgeError(
            f"no verdict in {config.max_attempts} attempts (reward.judge.max_attempts) from "
            f"{self._url}; last problem: {problems[-1]}"
        )

    async def _request(self, prompt: str, counts: JudgeCounts) -> str:
        """The text of one reply.

        Raises:
            _Again: another attempt may succeed.
            JudgeRefusedError, JudgeError: none can; all requests are refused, or this one is.
        """
        assert self._session is not None, "the judge was entered"
        config = self._config
        body: dict[str, Any] = {
            "model": config.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": config.temperature,
            config.max_tokens_field: config.max_tokens,
        }
        counts.num_requests += 1
        asking = span("judge")
        try:
            with asking:
                async with self._session.post(
                    self._url,
                    json=body,
                    headers=self._headers(),
                    proxy=self._proxy,
                    timeout=aiohttp.ClientTimeout(total=config.timeout_s),
                    allow_redirects=False,
                ) as response:
                    data = await _read(response.content)
        except TimeoutError as error:
            reason = f"no reply after {config.timeout_s:g} s (reward.judge.timeout_s)"
            raise _Again(reason) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            shown = self._shown(str(error))
            raise _Again(f"{self._url}: {type(error).__name__}: {shown}") from error
        counts.num_answered += 1
        counts.latency_s += asking.seconds
        if response.status != 200:
            raise self._refusal(response.status, response.headers, data)
        return _content(data)

    def _headers(self) -> dict[str, str]:
        name = self._config.api_key_env
        if name and not self._key():
            raise JudgeRefusedError(
                f"reward.judge.api_key_env={name}: the environment variable is not set; export it, "
                "or leave api_key_env empty if the endpoint asks for no key"
            )
        return {"Authorization": f"Bearer {self._key()}"} if name else {}

    def _key(self) -> str:
        return os.environ.get(self._config.api_key_env, "").strip()

    def _refusal(self, status: int, headers: Mapping[str, str], data: bytes) -> Exception:
        """What an HTTP status other than 200 means."""
        config, said = self._config, data.decode("utf-8", "replace")
        shown = f"HTTP {status}: {self._shown(_error_message(said))}"
        where = f"the judge at {self._url} (reward.judge.base_url)"
        if status == 401:  # its text may quote the key
            return JudgeRefusedError(
                f"{where} refuses the key (HTTP 401); check the environment variable "
                f"{config.api_key_env or '(none is named)'} (reward.judge.api_key_env)"
            )
        no_model = status == 400 and any(words in said.lower() for words in _NO_MODEL)
        no_credit = status == 429 and "insufficient_quota" in said
        if status in _REFUSALS or 300 <= status < 400 or no_model or no_credit:
            return JudgeRefusedError(
                f"{where} refuses requests for reward.judge.model={config.model}: {shown}"
            )
        if status in _TRANSIENT or status >= 500:
            return _Again(shown, _retry_after_s(headers))
        return JudgeError(f"{where} refuses this request: {shown}")

    def _shown(self, text: str) -> str:
        """The beginning of a foreign text, in one line and without the key."""
        key = self._key()
        text = text.replace(key, "[key]") if key else text
        return " ".join(text.split())[:_SHOWN_CHARS]


def proxy_for(url: str) -> str | None:
    """The environment's proxy (HTTPS_PROXY, NO_PROXY).

    aiohttp's own reading of it (`trust_env`) also takes passwords from ~/.netrc, which clash with
    the key.
    """
    parts = urlsplit(url)
    if not parts.hostname or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


async def _read(content: aiohttp.StreamReader) -> bytes:
    data = bytearray()
    while chunk := await content.read(_CHUNK_BYTES):
        data += chunk
        if len(data) > MAX_REPLY_BYTES:
            raise _Again(f"a reply of more than {MAX_REPLY_BYTES} bytes")
    return bytes(data)


def _content(data: bytes) -> str:
    """The reply's text; raises `_Again` if `data` is no chat completion."""
    try:
        choice = json.loads(data)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = data[:_SHOWN_CHARS].decode("utf-8", "replace")
        raise _Again(f"not a chat completion: {shown!r}") from error
    if not isinstance(text, str) or not text.strip():
        hint = "; raise reward.judge.max_tokens" if reason == "length" else ""
        raise _Again(f"a reply without text (finish_reason {reason}){hint}")
    return text


def _error_message(text: str) -> str:
    """The message of an OpenAI-style error; all of `text` if it is none."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return text


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait; 0 if it does not, or names a date."""
    try:
        value = float(headers.get("Retry-After", "0"))
    except ValueError:
        return 0.0
    return value if 0.0 <= value < float("inf") else 0.0


def _encodable(text: str) -> str:
    """`text` without lone halves of surrogate pairs, which have no UTF-8 form."""
    return text.encode("utf-8", "replace").decode()
