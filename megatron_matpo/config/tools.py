"""Section `tools`: servers, cache, URL policy."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class McpServerConfig:
    """One MCP server, started (stdio) or connected to (streamable HTTP) once per run and kept."""

    command: str = ""
    """Program for stdio; `python` means the trainer environment's own."""
    args: list[str] = field(default_factory=list[str])
    env: dict[str, str] = field(default_factory=dict[str, str])
    """Plain values only; secrets are named in `env_from`."""
    env_from: list[str] = field(default_factory=list[str])
    """Environment variables handed through, e.g. SERPER_API_KEY; never written anywhere."""
    url: str = ""
    """Streamable-HTTP endpoint, in place of `command`."""
    headers_from: dict[str, str] = field(default_factory=dict[str, str])
    """HTTP header -> environment variable that holds its whole value; never written anywhere."""
    num_processes: int = 1
    """Processes, or sessions with `url`; calls go to the one with the fewest in flight."""
    max_concurrency: int = 32
    """Calls in flight over all processes or sessions of this server."""
    start_timeout_s: float = 30.0
    call_timeout_s: float = 180.0
    """Deadline of one call, its retries included."""
    max_attempts: int = 3
    """Per call, after transport errors only."""
    backoff_s: float = 0.5
    """Before the second attempt; grows with each further one, with jitter."""
    outage_pattern: str = ""
    """Regular expression: errors of this server that match it are outages of the service behind it
    (retried, then no reward), also those marked as a tool's own. Network errors need none."""
    breaker_failures: int = 20
    """Failed calls in a row after which calls fail at once, until a trial call succeeds; 0: off."""
    breaker_reset_s: float = 30.0
    """Time after which the open breaker lets one trial call through."""


@dataclass(frozen=True)
class CacheConfig:
    """Replies of paid services (search, scrape, judge) on disk, in one SQLite file."""

    mode: str = "off"
    """`off | read_write | replay`; `replay` never calls a service: a miss is a tool failure."""
    path: str = ""
    """Empty: `RUN/cache.sqlite`. Several runs may share a file."""
    tools: list[str] = field(default_factory=lambda: ["google_search", "scrape"])
    """Names of the tools whose replies are kept; error replies are not."""
    judge: bool = True
    """Keep the judge's verdicts too."""
    max_age_days: float = 0.0
    """Older entries count as misses (not in `replay`); 0: entries do not age."""


@dataclass(frozen=True)
class UrlPolicyConfig:
    """Which addresses agents may see in results and open; on by default against leaked answers."""

    block_leaks: bool = True
    """Refuse the built-in list of places that host benchmark questions with their answers."""
    block: list[str] = field(default_factory=list[str])
    """Further patterns: `example.org` (with its subdomains), `example.org/path*`, `*.example.*`."""
    allow: list[str] = field(default_factory=list[str])
    """If not empty, only these (and nothing that is blocked)."""
    block_private: bool = True
    """Refuse loopback, private and link-local addresses and names that are written as such."""


@dataclass(frozen=True)
class ToolsConfig:
    """Tool servers and what is done with their replies."""

    servers: dict[str, McpServerConfig] = field(default_factory=dict[str, McpServerConfig])
    result_max_chars: int = 20000
    """Longer replies are cut, with a visible mark."""
    cache: CacheConfig = field(default_factory=CacheConfig)
    urls: UrlPolicyConfig = field(default_factory=UrlPolicyConfig)
