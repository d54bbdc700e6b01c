"""Which addresses agents may see and open: `UrlPolicy` decides, `PolicedToolBox` applies it.

In replies that are JSON (searches, scrapes) whatever names a refused address is dropped: a result,
a knowledge graph, an answer box, a question that people also ask. A call whose argument is a
refused address is not made; the model reads why.

The client cannot see what a name resolves to, nor where a page leads a scraper that somebody else
runs; `docs/tools.md` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from megatron_matpo.agents.tools import ToolBox, ToolReply, ToolSpec
from megatron_matpo.config.tools import UrlPolicyConfig
from megatron_matpo.mcp_tools.leaks import ALIASES, LEAKS, REBINDERS, SHORTENERS
from megatron_matpo.mcp_tools.urls import Address, BadAddressError, inner, ip_of, parse

_PRIVATE_DOMAINS = REBINDERS | {
    *("localhost", "local", "internal", "intranet", "lan", "home.arpa", "corp"),
}
# The bundled document server gives this name to documents that have no address of their own.
_NOT_PRIVATE = "documents.local"
_URL_KEY = re.compile(r"(?:.*[_-])?(?:ur[il]|link|href|website)s?|.*(?:Ur[il]|Link|URL)s?")
_PICTURE_KEY = re.compile(r".*(?:image|thumbnail|icon|logo).*", re.IGNORECASE)
_IS_WEB = re.compile(r"\s*(?:https?:|[/\\]{2})", re.IGNORECASE)
# What libraries that fetch addresses open; the rest are names of something else.
_IS_OPENABLE = re.compile(
    r"\s*(?:https?|wss?|s?ftps?|file|gopher|dict|ldaps?|smb|data|javascript|blob|view-source|jar):",
    re.IGNORECASE,
)
_OWN_ADDRESS = frozenset({"url", "canonical", "og:url", "twitter:url", "al:web:url"})
"""Keys by which the metadata of a scraped page tell its own address."""
_DROPPED = object()
_JSON = json.JSONDecoder()
_NEXT = re.compile(r"\s*(?=\S)")
_MAX_REMEMBERED = 8192


class UrlPolicy:
    """Judges addresses, by patterns `host[/path]`.

    Letter case does not matter, `*` stands for any characters. A host stands for its subdomains
    too, a path for whatever is below it. Ports, user names and queries are not looked at, but
    addresses inside an address are.
    """

    def __init__(self, config: UrlPolicyConfig) -> None:
        """Compile the patterns; they are valid if the configuration is."""
        self._leaks = _compile(LEAKS) if config.block_leaks else None
        self._blocked = _compile(config.block)
        self._allowed = _compile(config.allow)
        self._private = config.block_private
        # The episodes of one question meet the same addresses.
        self._remembered = lru_cache(_MAX_REMEMBERED)(self._judge)

    def refusal(self, text: str) -> str:
        """Why the address may not be opened; empty if it may.

        Raises:
            BadAddressError: it is no address, or none that can be judged.
        """
        return self._remembered(text)

    def _judge(self, text: str) -> str:
        address = parse(text)
        if reason := self._blocks(address, is_sure=True):
            return reason
        if self._leads_to_blocked(address):
            return "it leads to an address that may not be opened here"
        is_name = "." not in address.host and not _IS_WEB.match(text) and not ip_of(address.host)
        if is_name and address.host != "localhost":
            return ""  # the name of a document, not an address
        if self._private and is_private(address.host):
            return "it is in a private network"
        if self._allowed is not None and not _matches(self._allowed, address):
            return "it is not among the addresses that may be opened here"
        return ""

    def _blocks(self, address: Address, is_sure: bool) -> str:
        """Why the place itself is refused; `is_sure`: the address was meant as one."""
        lists = (self._blocked, self._leaks)
        if any(item is not None and _matches(item, address) for item in lists):
            return "it is blocked here"
        if is_sure and self._leaks is not None and _belongs_to(address.host, SHORTENERS):
            return "it hides where it leads; open the address itself"
        return ""

    def _leads_to_blocked(self, address: Address) -> bool:
        for text, is_sure in inner(address):
            try:
                found = parse(text)
            except BadAddressError:
                continue
            if self._blocks(found, is_sure):
                return True
            if is_sure and self._private and is_private(found.host):
                return True
        return False


class PolicedToolBox:
    """A tool box whose calls and replies keep to a `UrlPolicy`."""

    def __init__(self, inner: ToolBox, config: UrlPolicyConfig) -> None:
        """Wrap `inner`, whose replies must be whole: cut JSON cannot be filtered."""
        self._inner = inner
        self._policy = UrlPolicy(config)
        self.num_blocked = 0
        """Addresses of arguments that were refused, and parts of replies that were dropped."""

    def specs(self) -> list[ToolSpec]:
        """As `ToolBox.specs`."""
        return self._inner.specs()

    async def call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolReply:
        """As `ToolBox.call`; a refused address gets an error reply of ours."""
        for text in _addresses_of(arguments, ""):
            if reason := self._refusal(text):
                self.num_blocked += 1
                return ToolReply(f"Error: {text[:200]!r} was not opened: {reason}.", True)
        reply = await self._inner.call(server, tool, arguments)
        is_page = any(_URL_KEY.fullmatch(name) for name in arguments)
        return reply if reply.is_error else self._filter(reply, is_page)

    def _refusal(self, text: str) -> str:
        if _IS_OPENABLE.match(text) and "\\" in text:
            return "an address has no backslashes"  # programs differ in what they make of them
        try:
            return self._policy.refusal(text)
        except BadAddressError as error:
            return f"it is no address of the web: {error}" if _IS_OPENABLE.match(text) else ""

    def _filter(self, reply: ToolReply, is_page: bool) -> ToolReply:
        if reply.text.lstrip()[:1] not in ("{", "["):
            return reply
        before = self.num_blocked
        try:
            values = list(_json_values(reply.text))
            own = (text for value in values for text in _own_addresses(value))
            is_elsewhere = is_page and any(map(self._leads_away, own))
            sifted = [] if is_elsewhere else [self._sift(value, is_page) for value in values]
        except ValueError:
            return reply  # text that begins like JSON
        except RecursionError:
            sifted = []
        kept = [value for value in sifted if value is not _DROPPED]
        if not kept:
            self.num_blocked = before + 1
            return ToolReply("Error: not shown: it comes from an address that is blocked.", True)
        self.num_blocked += len(sifted) - len(kept)
        if self.num_blocked == before:
            return reply
        shown = (json.dumps(value, indent=2, ensure_ascii=False) for value in kept)
        return ToolReply("\n".join(shown), False)

    def _sift(self, value: Any, is_page: bool) -> Any:
        """`value` without what names a refused address; `_DROPPED` if it is such a thing itself.

        Search results: an object that holds a refused address goes as a whole, because its title
        and its text come from there (pictures do not count). Pages: only the address goes, for
        pages link to anything.
        """
        if isinstance(value, str):
            return _DROPPED if _IS_WEB.match(value) and self._is_dropped(value) else value
        if isinstance(value, list):
            sifted = [self._sift(item, is_page) for item in value]
            kept = [item for item in sifted if item is not _DROPPED]
            self.num_blocked += len(sifted) - len(kept)
            return kept
        if not isinstance(value, dict):
            return value
        direct = {
            key: self._is_dropped(item)
            for key, item in value.items()
            if isinstance(item, str) and (_IS_WEB.match(item) or _URL_KEY.fullmatch(key))
        }
        if not is_page and any(direct[key] and not _PICTURE_KEY.match(key) for key in direct):
            return _DROPPED
        items = {
            key: _DROPPED if direct.get(key) else self._sift(item, is_page)
            for key, item in value.items()
        }
        kept = {key: item for key, item in items.items() if item is not _DROPPED}
        self.num_blocked += len(items) - len(kept)
        return kept

    def _leads_away(self, text: str) -> bool:
        """Whether a page that calls itself `text` is one that may not be opened."""
        try:
            is_local = is_private(parse(text).host)
        except BadAddressError:
            return False
        return not is_local and self._is_dropped(text)  # careless pages call themselves localhost

    def _is_dropped(self, text: str) -> bool:
        try:
            return bool(self._policy.refusal(text))
        except BadAddressError:
            return False  # nobody can open it, or it was no address


def is_private(host: str) -> bool:
    """Whether a normalised host is an address or a name of a private network, or of this machine.

    Names without a dot are: only a local resolver knows them.
    """
    address = ip_of(host)
    if address is not None:
        return not address.is_global or address.is_multicast
    if host == _NOT_PRIVATE:
        return False
    return "." not in host or _belongs_to(host, _PRIVATE_DOMAINS)


def _belongs_to(host: str, domains: frozenset[str]) -> bool:
    return any(domain in domains for domain in _domains_of(host))


def _domains_of(host: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `b.c`, `c`."""
    yield host
    dot = host.find(".")
    while dot >= 0:
        yield host[dot + 1 :]
        dot = host.find(".", dot + 1)


def _compile(patterns: tuple[str, ...] | list[str]) -> re.Pattern[str] | None:
    """One expression for `host/path` that matches what any of `patterns` stands for."""
    if not patterns:
        return None
    return re.compile("|".join(f"(?:{_expression(pattern)})" for pattern in patterns))


def _expression(pattern: str) -> str:
    host, slash, path = pattern.lower().partition("/")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    host_expression = re.escape(host.rstrip(".")).replace(r"\*", "[^/]*")
    path_expression = re.escape(slash + path.rstrip("/")).replace(r"\*", ".*") if path else ""
    return rf"(?:[^/]*\.)?{host_expression}{path_expression}(?:/.*)?"


def _matches(patterns: re.Pattern[str], address: Address) -> bool:
    return any(patterns.fullmatch(place) for place in _places(address))


def _places(address: Address) -> Iterator[str]:
    """`host/path` of the address, and of the host that it is another name of."""
    yield address.place
    for name in _domains_of(address.host):
        for prefix, host in ALIASES.get(name, ()):
            if not prefix or address.path.startswith(f"{prefix}/"):
                yield address.host.removesuffix(name) + host + address.path.removeprefix(prefix)


def _json_values(text: str) -> Iterator[Any]:
    """The JSON values of a reply: servers that send one content item per result have several.

    Raises:
        ValueError: something else stands among them.
        RecursionError: they are nested too deeply.
    """
    position = 0
    while found := _NEXT.match(text, position):
        value, position = _JSON.raw_decode(text, found.end())
        yield value


def _addresses_of(value: Any, key: str) -> Iterator[str]:
    """Texts in a call's arguments that are addresses, by form or by the name they go under."""
    if isinstance(value, str):
        is_form = _IS_OPENABLE.match(value) is not None and len(value.split()) == 1
        if value.strip() and (is_form or _URL_KEY.fullmatch(key)):
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _addresses_of(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _addresses_of(item, str(name))


def _own_addresses(content: Any) -> Iterator[str]:
    """Under which addresses a scraped page says that it is found."""
    metadata = content.get("metadata") if isinstance(content, dict) else None
    for holder in (content, metadata):
        if isinstance(holder, dict):
            for key, value in holder.items():
                if key in _OWN_ADDRESS and isinstance(value, str):
                    yield value
