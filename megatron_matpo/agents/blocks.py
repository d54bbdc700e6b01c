"""Call blocks between tags, as both call formats have them: found, paired, and put in order.

    OPEN ... one JSON value ... CLOSE

Invariants:

* one pass over the tags of a turn; every opening tag outside thoughts gives exactly one call, and
  so does every closing tag that closes nothing;
* a tag inside a JSON string of a good call is text;
* time is linear in the length of the turn.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from megatron_matpo.agents.arguments import decode_json
from megatron_matpo.agents.grammar import CallOutcome, ParsedCall

# Call tags inside one JSON string that the scanner looks past.
_MAX_TAGS_TRIED = 8


@dataclass(frozen=True, slots=True)
class Tags:
    """The tags of one format."""

    open: str
    close: str
    foreign: str
    """Opening tag of the other format."""

    @property
    def pattern(self) -> re.Pattern[str]:
        """Every tag that the scanner stops at."""
        return re.compile(f"{self.open}|{self.close}|{self.foreign}|</?think>")


@dataclass(frozen=True, slots=True)
class Broken:
    """A block that cannot be read; what it is if it is closed and holds no other block."""

    outcome: CallOutcome
    detail: str
    server: str = ""
    tool: str = ""


class BlockScanner(ABC):
    """One pass over the tags of a turn; the format says how the inside of a block is read."""

    def __init__(self, text: str, tags: Tags) -> None:
        """Find and pair all tags."""
        self._text = text
        self._tags = tags
        self._found = [(match.start(), match[0]) for match in tags.pattern.finditer(text)]
        self._marks = [item for item in self._found if item[1] in (tags.open, tags.close)]
        self._ends = self._match_blocks()

    @abstractmethod
    def _read(self, body: int) -> tuple[ParsedCall, int] | Broken:
        """The call whose inside starts at `body` and where its block ends."""

    def scan(self, starts_in_thinking: bool) -> list[ParsedCall]:
        """All calls, in order."""
        calls: list[ParsedCall] = []
        position, thinking = 0, starts_in_thinking
        for start, tag in self._found:
            if start < position:
                continue  # inside a block that was dealt with
            if tag == "</think>":
                if not thinking:
                    calls.clear()  # its opening tag is missing: all before it was a thought
                thinking = False
            elif thinking:
                continue
            elif tag == "<think>":
                thinking = True
            elif tag == self._tags.open:
                call, position = self._block(start)
                calls.append(call)
            elif tag == self._tags.close:
                detail = f"{tag} closes nothing"
                calls.append(ParsedCall(CallOutcome.MALFORMED, detail=detail))
            else:
                detail = f"{tag} is not the call format"
                calls.append(ParsedCall(CallOutcome.FOREIGN_SYNTAX, detail=detail))
        return calls

    def without_blocks(self) -> str:
        """The text without its complete blocks; a tag inside a JSON string ends none."""
        kept: list[str] = []
        position = 0
        for start, tag in self._marks:
            if tag != self._tags.open or start < position:
                continue
            body = start + len(tag)
            read = self._read(body)
            end = self._end_of_next_close(body) if isinstance(read, Broken) else read[1]
            if end < 0:
                break
            kept.append(self._text[position:start])
            position = end
        kept.append(self._text[position:])
        return "".join(kept).strip()

    def _end_of_next_close(self, position: int) -> int:
        """Where the first closing tag from `position` on ends; -1 if there is none."""
        start = self._text.find(self._tags.close, position)
        return start + len(self._tags.close) if start >= 0 else -1

    def _match_blocks(self) -> dict[int, tuple[int, bool]]:
        """Start of each closed block -> (its end, whether it holds another closed block)."""
        ends: dict[int, tuple[int, bool]] = {}
        stack: list[tuple[int, bool]] = []
        for start, tag in self._marks:
            if tag == self._tags.open:
                stack.append((start, False))
            elif stack:
                opened, holds_block = stack.pop()
                ends[opened] = (start + len(tag), holds_block)
                if stack:
                    stack[-1] = (stack[-1][0], True)
        return ends

    def _block(self, start: int) -> tuple[ParsedCall, int]:
        """The call that opens at `start`, and where to go on."""
        body = start + len(self._tags.open)
        read = self._read(body)
        if not isinstance(read, Broken):
            return read
        if start not in self._ends:
            # The rest of the text is looked at again: a good block may follow.
            outcome, detail, end = CallOutcome.UNCLOSED, self._unclosed, body
        else:
            outcome, detail = read.outcome, read.detail
            end, holds_block = self._ends[start]
            if holds_block:
                outcome, detail = CallOutcome.NESTED, "a call must not stand inside another call"
        return ParsedCall(outcome, read.server, read.tool, detail=detail), end

    @property
    def _unclosed(self) -> str:
        return f"the call is not closed by {self._tags.close}"

    def _json_value(
        self, start: int, what: str, tail: re.Pattern[str], tail_error: str
    ) -> tuple[Any, int] | str:
        """(value, end of the block), or why the JSON that starts at `start` cannot be read.

        Only the text up to a closing tag is handed to the JSON decoder: its errors count the lines
        of all they were given, which would make many broken blocks quadratic. A closing tag may
        stand inside a string, hence a few of them are tried.
        """
        reason, close = self._unclosed, self._tags.close
        first = bisect_left(self._marks, (start, ""))
        for position, tag in self._marks[first : first + _MAX_TAGS_TRIED]:
            if tag != close:
                continue
            part = self._text[start : position + len(close)]
            try:
                value, end = decode_json(part)
            except (ValueError, RecursionError) as error:
                reason = f"{what} not valid JSON: {getattr(error, 'msg', error)}"
                if "Unterminated string" in reason:
                    continue
                return reason
            found = tail.match(part, end)
            return tail_error if found is None else (value, start + found.end())
        return reason
