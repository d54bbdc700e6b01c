"""What an address really points at: pure functions on text, no network.

Addresses are read as browsers read them (WHATWG URL standard: backslashes, missing slashes, control
characters, user names, ports, octal and hexadecimal hosts, punycode), not as `urllib` does, because
whoever opens them later reads them so.

Addresses inside an address (`google.com/url?q=...`, `r.jina.ai/https://...`) count as well. What a
name resolves to is not known here.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

_MAX_DECODINGS = 4
_MAX_CHARS = 8192
_MAX_INNER_CHARS = 400
"""Of an address inside another; patterns look at its beginning."""
_DROPPED = re.compile(r"[\t\n\r]")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
_HOST_AND_PORT = re.compile(r"(?!https?:)[^/?#:]+:\d+(?:[/\\?#]|$)", re.IGNORECASE)
_INNER_URL = re.compile(r"https?:[/\\]+", re.IGNORECASE)
_DOTTED = re.compile(r"(?<=[/\\=:@?&,])(?:[a-z0-9_-]+\.)+[a-z][a-z0-9-]*", re.IGNORECASE)
_END_OF_INNER = re.compile(r"[&\s\"'<>]")
_BING_TARGET = re.compile(r"[?&]u=a1([A-Za-z0-9_-]+)")
_BAD_IN_HOST = re.compile(r"[\x00-\x20\x7f#/<>?@\\^|%\[\]:]")
# They hold the host they show in a label of their own name.
_FOLDING_HOSTS = ("translate.goog", "cdn.ampproject.org")

_IPv4 = ipaddress.IPv4Address
_IPv6 = ipaddress.IPv6Address


class BadAddressError(ValueError):
    """No address that could be opened, or none that can be judged."""


@dataclass(frozen=True, slots=True)
class Address:
    """A web address in one spelling."""

    host: str
    """Lower case, punycode, no trailing dot; an IP address in its usual spelling, IPv6 too."""
    path: str
    """Decoded, lower case, no dot segments, beginning with `/`."""
    query: str
    """As written, fragment included."""

    @property
    def place(self) -> str:
        """`host/path`, which patterns are matched with."""
        return self.host + self.path


def parse(text: str) -> Address:
    """Read an address; one without a scheme is taken for `https`.

    Raises:
        BadAddressError: no host, characters that no host has, or another scheme than http(s).
    """
    text = _DROPPED.sub("", text.strip("".join(map(chr, range(33)))))
    if len(text) > _MAX_CHARS:
        raise BadAddressError(f"longer than {_MAX_CHARS} characters")
    scheme = _SCHEME.match(text)
    if scheme and not _HOST_AND_PORT.match(text):
        if scheme[1].lower() not in ("http", "https"):
            raise BadAddressError(f"{scheme[1].lower()}: is not http or https")
        text = text[scheme.end() :]
    text = text.lstrip("/\\")
    end = re.search(r"[/\\?#]", text)
    authority, rest = (text[: end.start()], text[end.start() :]) if end else (text, "")
    host = _host(authority.rpartition("@")[2])
    cut = re.search(r"[?#]", rest)
    path, query = (rest[: cut.start()], rest[cut.start() :]) if cut else (rest, "")
    return Address(host, _path(path), query)


def ip_of(host: str) -> _IPv4 | _IPv6 | None:
    """The IP address that a normalised host is; an IPv4 address inside an IPv6 one is found."""
    if not host[-1:].isdigit() and ":" not in host:
        return None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, _IPv6):
        number = int(address)
        embedded = address.ipv4_mapped or address.sixtofour
        is_nat64 = number >> 32 == 0x64_FF9B << 64
        is_compatible = number >> 32 == 0 and number > 1
        if embedded is None and (is_nat64 or is_compatible):
            embedded = _IPv4(number & 0xFFFF_FFFF)
        return embedded or address
    return address


def inner(address: Address) -> Iterator[tuple[str, bool]]:
    """Addresses written inside `address`: (text, whether it was surely meant as an address).

    Sure are those with a scheme and those that a translator or a redirector has encoded; the others
    are dotted names in path and query, such as `proxy.example/www.host.org/page`. What is inside an
    inner address is found in the outer one, too.
    """
    if unfolded := _unfold_host(address):
        yield unfolded, True
    if address.host.endswith("bing.com") and (match := _BING_TARGET.search(address.query)):
        yield _from_base64(match[1]), True
    for text in _decodings(address.path + address.query):
        for match in _INNER_URL.finditer(text):
            yield _cut_inner(text, match.start()), True
        for match in _DOTTED.finditer(text):
            yield _cut_inner(text, match.start()), False


def _cut_inner(text: str, start: int) -> str:
    return _END_OF_INNER.split(text[start : start + _MAX_INNER_CHARS], maxsplit=1)[0]


def _host(text: str) -> str:
    if text.startswith("["):
        body, bracket, _ = text[1:].partition("]")
        try:
            return str(_IPv6(body.partition("%")[0])) if bracket else _bad(text)
        except ValueError:
            return _bad(text)
    name = unquote(re.sub(r":\d*$", "", text))
    try:
        # Nameprep (RFC 3491): other widths and dots become the usual ones, soft hyphens vanish.
        host = name.encode("idna").decode("ascii") if not name.isascii() else name
    except UnicodeError:
        return _bad(text)
    host = host.lower().rstrip(".")
    if not host or _BAD_IN_HOST.search(host) or ".." in host or host.startswith("."):
        return _bad(text)
    last = host.rpartition(".")[2]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        return _ipv4(host)
    return host


def _ipv4(host: str) -> str:
    """The WHATWG standard's reading: up to four numbers, the last one fills what is left."""
    numbers: list[int] = []
    for part in host.split("."):
        base, digits = (
            (16, part[2:])
            if part.startswith("0x")
            else (8, part[1:])
            if part.startswith("0") and len(part) > 1
            else (10, part)
        )
        try:
            numbers.append(int(digits or "0", base))
        except ValueError:
            return _bad(host)
    *leading, last = numbers
    if len(numbers) > 4 or any(n > 255 for n in leading) or last >= 256 ** (5 - len(numbers)):
        return _bad(host)
    total = last + sum(n * 256 ** (3 - i) for i, n in enumerate(leading))
    return str(_IPv4(total))


def _bad(host: str) -> str:
    raise BadAddressError(f"{host[:80]!r} is no host name")


def _decodings(text: str) -> list[str]:
    """`text`, and what percent-decoding makes of it until nothing changes."""
    texts = [text]
    for _ in range(_MAX_DECODINGS):
        decoded = unquote(texts[-1])
        if decoded == texts[-1]:
            break
        texts.append(decoded)
    return texts


def _path(text: str) -> str:
    segments: list[str] = []
    for segment in re.split(r"[/\\]+", _decodings(text)[-1].lower()):
        if segment == "..":
            del segments[-1:]
        elif segment not in ("", "."):
            segments.append(segment.strip())
    return "/" + "/".join(segments)


def _unfold_host(address: Address) -> str:
    """`huggingface-co.translate.goog/path` -> `huggingface.co/path`; the same of AMP's cache."""
    for suffix in _FOLDING_HOSTS:
        if address.host.endswith("." + suffix):
            name = address.host.removesuffix("." + suffix)
            dotted = name.replace("--", "\0").replace("-", ".").replace("\0", "-")
            path = re.sub(r"^/[a-z]/(s/)?[^/]+", "", address.path) if "amp" in suffix else ""
            return dotted + (path or address.path)
    return ""


def _from_base64(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("utf-8", "replace")
    except (ValueError, binascii.Error):
        return ""
