"""The document server: loading, ranking, snippets, tool replies, and its command line.

The tools run in this process and the command line in real ones. The protocol against the SDK's
client is proven in test_pool.py.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_matpo.errors import DataError
from megatron_matpo.mcp_tools import corpus_server as server
from megatron_matpo.mcp_tools.corpus import Corpus, best_snippet, normalise_url, query_terms
from megatron_matpo.mcp_tools.documents import Document, html_to_text, load_documents

PAGES = [
    Document("b", "https://x.org/bridge", "Bridge", "It was built in 1901. A keeper lives there."),
    Document("a", "https://x.org/bell", "Bell", "The bell was cast by Odd Lund.\nIt is loud."),
    Document("c", "https://x.org/lund", "Odd Lund", "Odd Lund casts bells. He was born in Vik."),
]


def tools(pages: list[Document] | None = None, **limits: int) -> server.CorpusTools:
    caps = {"max_results": 10, "snippet_chars": 300, "text_chars": 20_000} | limits
    return server.CorpusTools(Corpus(pages or PAGES), server.Limits(**caps))


def search(box: server.CorpusTools, q: str, **more: object) -> dict[str, object]:
    text, is_error = box.call("google_search", {"q": q, "gl": "us", "hl": "en", **more})
    assert not is_error, text
    return json.loads(text)


def links(reply: dict[str, object]) -> list[str]:
    return [item["link"].rsplit("/", 1)[1] for item in reply["organic"]]  # type: ignore[index]


def test_search_reply_has_serpers_shape() -> None:
    text, is_error = tools().call(
        "google_search", {"q": "who cast the bell", "gl": "us", "hl": "en"}
    )
    assert not is_error
    assert ": " not in text.split('"snippet"')[0], "compact JSON"
    reply = json.loads(text)
    assert reply["searchParameters"]["q"] == "who cast the bell"
    assert reply["organic"][0] == {
        "title": "Bell",
        "link": "https://x.org/bell",
        "snippet": "The bell was cast by Odd Lund.",
        "position": 1,
    }


def test_words_are_stemmed_ranked_and_folded() -> None:
    box = tools([*PAGES, Document("d", "https://x.org/oslo", "Ås", "Åsa målte huset.")])
    assert links(search(box, "casting bells"))[0] in ("bell", "lund")
    assert links(search(box, "ODD LUND")) == ["lund", "bell"]
    assert links(search(box, "asa malte")) == ["oslo"]
    assert links(search(box, "zebra")) == []


@pytest.mark.parametrize(
    "q",
    [
        '"unclosed',
        "a AND OR NOT NEAR(",
        "bell* ^title: {x} col:y",
        "'; DROP TABLE documents; --",
        "-",
        "()",
        "\x00 \ud800 bell",
        "日本語 🎉",
        "bell " * 5000,
        "site:example.com bell -loudest",
        "_bell_",
    ],
)
def test_any_text_is_a_legal_query(q: str) -> None:
    reply = search(tools(), q)
    if "bell" in q:
        assert "bell" in links(reply)


def test_operators_and_stop_words_are_ignored() -> None:
    assert query_terms("site:x.org What is the Bell -loud filetype:pdf bell") == ["bell"]
    assert query_terms("who is it") == ["who", "is", "it"], "stop words alone still search"
    assert query_terms("  ") == []


def test_pages_and_num_and_positions() -> None:
    pages = [Document(f"{i:02d}", f"https://x.org/{i:02d}", "t", "same words") for i in range(25)]
    random.Random(1).shuffle(pages)
    box = tools(pages, max_results=10)
    first, third = search(box, "same"), search(box, "same", page=3)
    assert links(first) == [f"{i:02d}" for i in range(10)], "ties are in the order of ids"
    assert links(third) == [f"{i:02d}" for i in range(20, 25)]
    assert [item["position"] for item in third["organic"]] == [21, 22, 23, 24, 25]  # type: ignore
    assert links(search(box, "same", num=3, page=2)) == ["03", "04", "05"]
    assert len(links(search(box, "same", num=100))) == 10
    assert links(search(box, "same", num="2")) == ["00", "01"]
    assert links(search(box, "same", page=10**6)) == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("google_search", {"gl": "us", "hl": "en"}, "argument 'q' is required"),
        ("google_search", {"q": "x", "gl": "us"}, "argument 'hl' is required"),
        ("google_search", {"q": 3, "gl": "us", "hl": "en"}, "argument 'q' is required"),
        ("google_search", {"q": "x", "gl": "us", "hl": "en", "num": "many"}, "positive number"),
        ("google_search", {"q": "x", "gl": "us", "hl": "en", "page": 0}, "positive number"),
        ("scrape", {}, "argument 'url' is required"),
        ("scrape", {"url": "https://nowhere.org"}, "Use a link from the results of google_search"),
        ("scrape", {"url": "http://[::bad \ud800"}, "no page has the url"),
    ],
)
def test_bad_arguments_are_replies_for_the_model(
    name: str, arguments: dict[str, object], message: str
) -> None:
    text, is_error = tools().call(name, arguments)
    assert is_error
    assert message in text


def test_scrape() -> None:
    text, is_error = tools().call("scrape", {"url": "http://www.X.org/bell/#top"})
    assert not is_error
    reply = json.loads(text)
    assert reply["text"] == PAGES[1].text
    assert reply["metadata"] == {"title": "Bell", "url": "https://x.org/bell"}
    text, _ = tools().call("scrape", {"url": "https://x.org/bell", "includeMarkdown": True})
    assert json.loads(text)["markdown"].startswith("# Bell\n\nThe bell")
    text, _ = tools(text_chars=8).call("scrape", {"url": "https://x.org/bell"})
    assert json.loads(text)["text"] == "The bell\n[... cut: 8 of 42 characters shown]"


def test_passages_that_share_a_url_are_one_page() -> None:
    pages = [
        Document("2", "https://x.org/p", "P", "two"),
        Document("1", "https://x.org/p", "P", "one"),
    ]
    text, _ = tools(pages).call("scrape", {"url": "https://x.org/p"})
    assert json.loads(text)["text"] == "one\n\ntwo"


def test_snippets() -> None:
    text = "First line about nothing.\nThe red fox ran. A red fox met a dog! The end"
    assert best_snippet(text, ["fox", "dog"], 100) == "A red fox met a dog!"
    assert best_snippet(text, ["first"], 100) == "First line about nothing."
    assert best_snippet(text, ["end"], 100) == "The end"
    assert best_snippet("\n\n  Lead. More", ["zebra"], 100) == "Lead."
    long = "word " * 100 + "needle " + "word " * 100
    cut = best_snippet(long, ["needle"], 60)
    assert "needle" in cut and cut.startswith("... ") and cut.endswith(" ...") and len(cut) <= 68
    assert best_snippet("", ["x"], 10) == ""


def test_urls_are_compared_without_what_does_not_matter() -> None:
    assert normalise_url(" HTTPS://www.X.org/A%20b/#c ") == normalise_url("http://x.org/A b")
    assert normalise_url("x.org/?q=1") == "x.org?q=1"
    assert normalise_url("https://x.org/A") != normalise_url("https://x.org/a")


def test_a_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a note.txt").write_text("plain text")
    (tmp_path / "b.md").write_text("intro\n\n## The Heading ##\nbody")
    (tmp_path / "c.html").write_text(
        "<html><head><title>A &amp; B</title><script>var x='no'</script></head>"
        "<body><h1>Big</h1><p>one <b>two</b></p><p>three</body>"
    )
    (tmp_path / "d.jsonl").write_text('{"text": "first\\nmore"}\n\n{"id": 7, "text": "second"}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    found = {item.id: item for item in load_documents(tmp_path)}
    assert list(found) == ["b.md", "c.html", "d.jsonl:1", "7", "sub/a note.txt"]
    assert found["sub/a note.txt"].url == "https://documents.local/sub/a%20note.txt"
    assert found["b.md"].title == "The Heading"
    assert (found["c.html"].title, found["c.html"].text) == ("A & B", "Big\none two\nthree")
    assert found["d.jsonl:1"].title == "first"


def test_html_that_is_broken_still_gives_text() -> None:
    assert html_to_text("<p>a<p>b</style></div><script>x") == ("", "a\nb")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ok"}\n{oops\n', "docs.jsonl, line 2: not JSON"),
        ("[1]\n", "line 1: expected an object"),
        ('{"title": "t"}\n', "line 1: field 'text' is missing or empty"),
        ('{"text": "x", "url": 3}\n', "line 1: field 'url' must be a string, got int"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', "two documents have the id 'a'"),
        ("\n", "holds no documents"),
    ],
)
def test_bad_collections_are_named_with_file_and_line(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "docs.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"docs\.jsonl") as caught:
        load_documents(path)
    assert message in str(caught.value)


def test_the_cache_is_reused_until_a_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "docs.jsonl", tmp_path / "sub/index.db"
    path.write_text('{"text": "old words"}\n')
    Corpus.open(path, cache).close()
    built = cache.stat().st_mtime_ns
    again = Corpus.open(path, cache)
    assert cache.stat().st_mtime_ns == built
    assert len(again.search("old", 5, 0, 100)) == 1
    again.close()
    path.write_text('{"text": "new and longer words"}\n')
    fresh = Corpus.open(path, cache)
    assert len(fresh.search("longer", 5, 0, 100)) == 1
    fresh.close()
    cache.write_bytes(b"not a database, but long enough to be looked at as one" * 40)
    assert Corpus.open(path, cache).num_documents == 1
    assert [item.name for item in cache.parent.iterdir()] == ["index.db"]


def test_protocol_errors() -> None:
    box = tools()
    requests = [
        b"{oops\n",
        b"[]\n",
        b"\n",
        b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"nope"}\n',
        b'{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"nope"}}\n',
        b'{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"scrape","arguments":[1]}}\n',
        b'{"jsonrpc":"2.0","id":4,"method":"tools/call","params":7}\n',
        b'{"jsonrpc":"2.0","id":"five","method":"ping"}\n',
        b'{"jsonrpc":"2.0","id":6,"method":"initialize","params":{"protocolVersion":"1999"}}\n',
    ]
    sink = io.BytesIO()
    server.serve(box, io.BytesIO(b"".join(requests)), sink)
    replies = [json.loads(line) for line in sink.getvalue().splitlines()]
    codes = [(item["id"], item.get("error", {}).get("code")) for item in replies]
    assert codes == [
        (None, -32700),
        (None, -32600),
        (1, -32601),
        (2, -32602),
        (3, -32602),
        (4, -32600),
        ("five", None),
        (6, None),
    ]
    assert replies[-1]["result"]["protocolVersion"] == server.PROTOCOL_VERSIONS[0]


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_matpo.mcp_tools.corpus_server", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=30)


def test_command_line_reports_bad_input_in_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{\n')
    done = run_cli("--documents", str(bad))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"{bad}, line 2: not JSON" in done.stderr
    done = run_cli("--documents", str(tmp_path / "none"))
    assert (done.returncode, "no such file or folder" in done.stderr) == (2, True)


def test_ten_thousand_documents_start_quickly(tmp_path: Path) -> None:
    path = tmp_path / "docs.jsonl"
    chosen = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    with path.open("w") as file:
        for i in range(10_000):
            text = " ".join(chosen.choices(words, k=60))
            file.write(json.dumps({"id": str(i), "title": f"t{i}", "text": text}) + "\n")
    begin = time.perf_counter()
    done = run_cli("--documents", str(path), stdin='{"jsonrpc":"2.0","id":1,"method":"ping"}\n')
    took_s = time.perf_counter() - begin
    assert json.loads(done.stdout) == {"jsonrpc": "2.0", "id": 1, "result": {}}
    assert took_s < 5.0, "takes 0.6 s on a quiet core; the margin is for a busy machine"
