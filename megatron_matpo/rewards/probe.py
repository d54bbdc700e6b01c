"""Whether a judge's endpoint can be used, asked for nothing: its list of models."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import aiohttp

from megatron_matpo.config.reward import JudgeConfig
from megatron_matpo.rewards.judge import proxy_for

_MAX_BYTES = 1 << 22
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Probe:
    """What the endpoint said."""

    url: str
    is_proxied: bool
    status: int = 0
    models: tuple[str, ...] = ()
    problem: str = ""
    """Why there is no status."""


async def probe_judge(config: JudgeConfig, timeout_s: float) -> Probe:
    """`GET BASE_URL/models` with the judge's key and proxy, as its requests have them."""
    url = f"{config.base_url.rstrip('/')}/models"
    proxy = proxy_for(url)
    key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limit = aiohttp.ClientTimeout(total=min(timeout_s, config.timeout_s))
    try:
        async with (
            aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session,
            session.get(
                url, headers=headers, proxy=proxy, timeout=limit, allow_redirects=False
            ) as response,
        ):
            body = bytearray()
            while len(body) < _MAX_BYTES and (chunk := await response.content.read(_CHUNK_BYTES)):
                body += chunk
            models = _models(bytes(body)) if response.status == 200 else ()
            return Probe(url, proxy is not None, response.status, models)
    except TimeoutError:
        return Probe(url, proxy is not None, problem=f"no answer in {limit.total:g} s")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        text = f"{type(error).__name__}: {error}"
        text = text.replace(key, "[key]") if key else text
        return Probe(url, proxy is not None, problem=" ".join(text.split())[:200])


def _models(body: bytes) -> tuple[str, ...]:
    """Names of an OpenAI-style list; empty if it is none."""
    try:
        return tuple(str(item["id"]) for item in json.loads(body)["data"])
    except (ValueError, LookupError, TypeError):
        return ()
