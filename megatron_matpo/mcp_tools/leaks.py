"""Places that show benchmark questions with their answers, and hosts that hide where they lead.

An agent that finds the answer sheet learns to look for it, and its evaluation means nothing. The
list is about the data sets of this field (GAIA, FRAMES, WebWalkerQA, MuSiQue); add your own in
`tools.urls.block`. Patterns are those of `policy.UrlPolicy`.
"""

from __future__ import annotations

LEAKS = (
    # All four data sets, their copies and results, are data sets and demo spaces here. The original
    # blocks these two, in result lists only and in this letter case only.
    "huggingface.co/datasets",
    "huggingface.co/spaces",
    # The same pages and rows through the API, and the rows through the data-set viewer.
    "huggingface.co/api/datasets",
    "huggingface.co/api/spaces",
    "datasets-server.huggingface.co",
    # Where the files of data sets are downloaded from after a redirect.
    "cdn-lfs*.huggingface.co",
    "*.xethub.hf.co",
    # Each demo space has a host of its own.
    "*.hf.space",
    # Full copies of the hub's data sets.
    "modelscope.cn/datasets",
    "modelscope.cn/api/v1/datasets",
    "modelscope.ai/datasets",
    "ai.gitee.com/datasets",
    "ai.gitee.com/hf-datasets",
    "opendatalab.com",
    "opendatalab.org.cn",
    # Uploaded copies; the names of these four sets are specific enough for their addresses.
    "kaggle.com/datasets/*gaia*benchmark*",
    "kaggle.com/datasets/*musique*",
    "kaggle.com/datasets/*frames-benchmark*",
    "kaggle.com/datasets/*webwalker*",
    # MuSiQue: the questions with answers and decompositions, and IRCoT's processed copy of them.
    "github.com/stonybrooknlp/musique",
    "github.com/stonybrooknlp/ircot",
    # WebWalkerQA: its repository, under the names that it has had.
    "github.com/alibaba-nlp/webwalker",
    "github.com/alibaba-nlp/webagent",
    "github.com/alibaba-nlp/deepresearch",
    # GAIA and FRAMES: copies in the repositories of agents, validation answers included.
    "github.com/*gaia*benchmark*",
    "github.com/*gaia*validation*",
    "github.com/*gaia*metadata.jsonl*",
    "github.com/*frames-benchmark*",
    "github.com/*frames_benchmark*",
    "github.com/*webwalkerqa*",
    # MATPO itself: evaluation files and recorded rollouts with graded answers.
    "github.com/mzf666/matpo",
)

_HUB = (("", "huggingface.co"),)
_GITHUB = (("", "github.com"),)
ALIASES: dict[str, tuple[tuple[str, str], ...]] = {
    "hf.co": _HUB,
    "huggingface.com": _HUB,
    "hf-mirror.com": _HUB,
    # The same files, as /OWNER/REPOSITORY/...
    "raw.githubusercontent.com": _GITHUB,
    "codeload.github.com": _GITHUB,
    "raw.githack.com": _GITHUB,
    "github1s.com": _GITHUB,
    "github.dev": _GITHUB,
    "deepwiki.com": _GITHUB,
    "media.githubusercontent.com": (("/media", "github.com"),),
    "api.github.com": (("/repos", "github.com"),),
    "cdn.jsdelivr.net": (("/gh", "github.com"),),
}
"""Host, or its subdomains -> what its paths begin with, and the host that the rest belongs to."""

_SHORTENERS_TEXT = (
    "adf.ly bit.ly bitly.com bl.ink buff.ly clck.ru cutt.ly db.tt dlvr.it dub.sh fb.me git.io"
    " goo.gl ift.tt is.gd j.mp kutt.it lnkd.in ow.ly qr.ae rb.gy rebrand.ly s.id short.gy short.io"
    " shorturl.at shorte.st smarturl.it snip.ly soo.gd surl.li t.cn t.co t.ly tiny.cc tiny.one"
    " tinyurl.com tr.im trib.al u.to url.cn urlz.fr v.gd"
)
SHORTENERS = frozenset(_SHORTENERS_TEXT.split())
"""Where these lead is known to their owners alone, so that no list could be held."""

_REBINDERS_TEXT = "nip.io sslip.io xip.io localtest.me lvh.me vcap.me lacolhost.com"
REBINDERS = frozenset(_REBINDERS_TEXT.split())
"""Public names that resolve to the private address that is written in them, or to 127.0.0.1."""
