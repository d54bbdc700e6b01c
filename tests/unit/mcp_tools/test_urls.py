"""Proves that an address is read as those read it who open it, and which addresses are refused.

Not proven, because the client cannot know it: what a name resolves to, where a page redirects to.
"""

from __future__ import annotations

import base64

import pytest

from megatron_matpo.config.tools import UrlPolicyConfig
from megatron_matpo.mcp_tools.leaks import ALIASES, LEAKS, REBINDERS, SHORTENERS
from megatron_matpo.mcp_tools.policy import UrlPolicy, is_private
from megatron_matpo.mcp_tools.urls import BadAddressError, parse

DEFAULT = UrlPolicy(UrlPolicyConfig())
SET = "huggingface.co/datasets/gaia-benchmark/GAIA"
BING = base64.urlsafe_b64encode(f"https://{SET}".encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("https://Example.ORG", "example.org/"),
        ("http://example.org:8080/A//b/../c/./d/", "example.org/a/c/d"),
        ("example.org/x?y=1#z", "example.org/x"),
        ("  https://example.org./x\n", "example.org/x"),
        ("ht\ntps://exa\tmple.org/x", "example.org/x"),
        ("https:\\\\example.org\\x", "example.org/x"),
        ("https:example.org", "example.org/"),
        ("//example.org/x", "example.org/x"),
        ("https://user:pass@word@example.org/x", "example.org/x"),
        ("https://example.org%2Fx", None),
        ("https://ex%61mple.org/%2564ata", "example.org/data"),
        (
            "https://\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45\u3002\uff4f\uff52\uff47/x",
            "example.org/x",
        ),
        ("https://exam\u00adple.org/", "example.org/"),
        ("https://exam\u200bple.org/", "example.org/"),
        ("https://bücher.example/", "xn--bcher-kva.example/"),
        ("https://xn--BCHER-kva.example/", "xn--bcher-kva.example/"),
        ("example.org:443/x", "example.org/x"),
        ("https://2130706433/", "127.0.0.1/"),
        ("https://0x7f.1/", "127.0.0.1/"),
        ("https://0177.0.0.01/", "127.0.0.1/"),
        ("https://127.1./", "127.0.0.1/"),
        ("https://[::FFFF:7f00:1]:80/", "::ffff:7f00:1/"),
        ("https://[fe80::1%25eth0]/", "fe80::1/"),
        ("https://256.1.1.1/", None),
        ("https://1.2.3.4.5/", None),
        ("https://0x/", "0.0.0.0/"),
        ("https://", None),
        ("https://a..b/", None),
        ("https://exa mple.org/", None),
        ("https://[::1/", None),
        ("https://" + "a" * 64 + "é.org/", None),
        ("ftp://example.org/", None),
        ("javascript:alert(1)", None),
        ("", None),
        ("https://example.org/" + "x" * 9000, None),
    ],
)
def test_addresses_are_read_as_browsers_read_them(text: str, place: str | None) -> None:
    if place is None:
        with pytest.raises(BadAddressError):
            parse(text)
    else:
        assert parse(text).place == place


@pytest.mark.parametrize(
    "text",
    [
        f"https://{SET}",
        f"http://WWW.{SET.upper()}/tree/main",
        "huggingface.co/datasets",
        "https://huggingface.co/%64atasets/x",
        "https://huggingface.co//datasets/x",
        "https://huggingface.co/models/../datasets/x",
        "https://huggingface.co:443/datasets/x",
        "https://huggingface.co./datasets/x",
        "https://me@huggingface.co/datasets/x",
        "https://huggingface.co/spaces/gaia-benchmark/leaderboard",
        "https://huggingface.co/api/datasets/google/frames-benchmark",
        "https://datasets-server.huggingface.co/rows?dataset=google/frames-benchmark",
        "https://cdn-lfs-us-1.hf.co/repos/x",
        "https://cas-bridge.xethub.hf.co/x",
        "https://gaia-benchmark-leaderboard.hf.space/",
        "https://hf.co/datasets/callanwu/WebWalkerQA",
        "https://hf-mirror.com/datasets/dgslibisey/MuSiQue",
        "https://raw.githubusercontent.com/StonyBrookNLP/musique/main/README.md",
        "https://cdn.jsdelivr.net/gh/stonybrooknlp/musique/data.json",
        "https://api.github.com/repos/StonyBrookNLP/musique/contents",
        "https://github.com/Alibaba-NLP/WebWalker",
        "https://github.com/mzf666/MATPO/blob/main/x",
        "https://github.com/someone/agent/blob/main/gaia_validation.jsonl",
        f"https://www.google.com/url?q=https://{SET}&sa=U",
        "https://www.google.com/url?sa=t&url=https%3A%2F%2Fhuggingface.co%2Fdatasets%2Fx",
        "https://google.com/url?q=https://huggingface.co/datasets&sa=U",
        f"https://google.com/amp/s/{SET}",
        "https://duckduckgo.com/l/?uddg=https%253A%252F%252Fhuggingface.co%252Fdatasets%252Fx",
        f"https://r.jina.ai/https://{SET}",
        f"https://r.jina.ai/{SET}",
        f"https://web.archive.org/web/20240101000000/https://{SET}",
        f"https://web.archive.org/web/2024id_/{SET}",
        f"https://webcache.googleusercontent.com/search?q=cache:abc:{SET}",
        "https://huggingface-co.translate.goog/datasets/x?_x_tr_sl=en",
        "https://hf--mirror-com.translate.goog/datasets/x",
        "https://huggingface-co.cdn.ampproject.org/c/s/huggingface.co/datasets/x",
        f"https://www.bing.com/ck/a?!&&p=1&u=a1{BING}&ntb=1",
        f"https://web.archive.org/web/2024/https://r.jina.ai/https://{SET}",
        f"https://other.example/#https://{SET}",
        f"https://other.example\\@{SET}",
        "https://bit.ly/3xyz",
        "https://www.tinyurl.com/abc",
        "https://www.google.com/url?q=https://t.co/abc",
    ],
)
def test_places_with_answers_are_refused_by_default_however_they_are_written(text: str) -> None:
    assert DEFAULT.refusal(text)
    assert UrlPolicy(UrlPolicyConfig(block_leaks=False)).refusal(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "https://smallworld.example/people/ada",
        "https://documents.local/notes/a.txt",
        "doc-17",
        "https://huggingface.co/Qwen/Qwen3-4B",
        "https://huggingface.co/papers/2510.04678",
        "https://huggingface.co/datasetsearch",
        "https://nothuggingface.co/datasets",
        "https://huggingface.co.example.org/datasets",
        "https://github.com/huggingface/datasets",
        "https://github.com/stonybrooknlp/musique-player",
        "https://en.wikipedia.org/wiki/Gaia_(spacecraft)",
        "https://en.wikipedia.org/wiki/Hugging_Face?ref=t.co",
        "https://www.google.com/url?q=https://en.wikipedia.org/wiki/Gaia",
        "https://web.archive.org/web/2020/https://example.org/index.html",
        "https://bitly.example/x",
        "https://8.8.8.8/",
        "https://[2606:4700::1111]/",
    ],
)
def test_other_places_are_not(text: str) -> None:
    assert DEFAULT.refusal(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "http://localhost:8000/",
        "localhost:8000",
        "http://LOCALHOST./",
        "http://foo.localhost",
        "http://127.0.0.1",
        "http://127.1",
        "http://2130706433",
        "http://0x7f000001",
        "http://017700000001",
        "http://\uff11\uff12\uff17.0.0.1",
        "http://0/",
        "http://10.1.2.3",
        "http://172.16.0.1",
        "http://192.168.1.1/admin",
        "http://100.64.0.1",
        "http://169.254.169.254/latest/meta-data",
        "http://224.0.0.1",
        "http://[::1]",
        "http://[::]",
        "http://[fe80::1%25eth0]",
        "http://[fd00::1]",
        "http://[::ffff:127.0.0.1]",
        "http://[::ffff:a00:1]",
        "http://[64:ff9b::7f00:1]",
        "http://[2002:7f00:1::]",
        "http://[::7f00:1]",
        "http://metadata.google.internal/",
        "http://printer.local",
        "http://wiki.corp/",
        "http://intranet/",
        "//intranet/",
        "http://127.0.0.1.nip.io/",
        "http://localtest.me/",
        "https://r.jina.ai/http://localhost:8000/",
        "https://www.google.com/url?q=http%3A%2F%2F169.254.169.254%2F",
    ],
)
def test_private_networks_are_refused_by_default(text: str) -> None:
    assert DEFAULT.refusal(text)
    assert UrlPolicy(UrlPolicyConfig(block_private=False)).refusal(text) == ""


@pytest.mark.parametrize(
    ("pattern", "refused", "passed"),
    [
        ("example.org", ["example.org", "https://a.b.example.org/x"], ["anexample.org"]),
        ("Example.org/Path", ["example.org/path", "example.org/PATH/x"], ["example.org/pathology"]),
        ("example.org/path*", ["example.org/pathology"], ["example.org/a/path"]),
        ("example.org/*/files", ["example.org/a/b/files/c"], ["example.org/files"]),
        ("*.example.*", ["www.example.com", "a.example.co.uk"], ["example.com"]),
        ("bücher.example", ["xn--bcher-kva.example/x"], ["bucher.example"]),
        ("example.org/", ["example.org/x"], ["example.com"]),
    ],
)
def test_patterns(pattern: str, refused: list[str], passed: list[str]) -> None:
    policy = UrlPolicy(UrlPolicyConfig(block=[pattern]))
    assert [text for text in refused if not policy.refusal(text)] == []
    assert [text for text in passed if policy.refusal(text)] == []


def test_an_allow_list_admits_nothing_else_and_nothing_blocked() -> None:
    config = UrlPolicyConfig(allow=["wikipedia.org", "huggingface.co"], block=["de.wikipedia.org"])
    policy = UrlPolicy(config)
    assert policy.refusal("https://en.wikipedia.org/wiki/X") == ""
    for text in ("https://de.wikipedia.org/", "https://example.org/", f"https://{SET}"):
        assert policy.refusal(text)


def test_what_is_very_long_or_very_nested_is_judged_quickly_and_without_error() -> None:
    many = "https://x.example/?" + "u=https://y.example/" * 400
    for text in (
        "a.b/" * 2000,
        many,
        "https://github.com/" + "gaia" * 2000,
        "https://x.org/" + "%25" * 700,
    ):
        assert DEFAULT.refusal(text) == ""
    assert DEFAULT.refusal("https://x.example/" + "a.b/" * 1000 + SET)


def test_the_lists_are_written_as_they_are_matched() -> None:
    names = [*LEAKS, *ALIASES, *SHORTENERS, *REBINDERS]
    assert len(set(names)) == len(names)
    for name in names:
        assert name == name.lower() and "://" not in name and not name.endswith("/")
    for prefix, host in (pair for pairs in ALIASES.values() for pair in pairs):
        assert (not prefix or prefix.startswith("/")) and "/" not in host
    assert not any(is_private(name.partition("/")[0]) for name in names if name not in REBINDERS)
