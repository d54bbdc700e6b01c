"""Append-only chat rendering: what is written around sampled turns, never the turns themselves.

Invariants:

* a sampled turn is never decoded, re-rendered and re-tokenized; its ids go back as they came;
* what stands between two sampled turns is the difference of two renderings, tokenized once, after
  the end-of-turn token (so that it gets the ids that it has inside a conversation);
* text from outside (questions, tool replies, workers' reports) cannot write special tokens, hence
  cannot forge a turn.

Source: MATPO original, `verl/workers/rollout/schemas.py`. Differs: there, each assistant turn is
re-rendered and re-tokenized, so that trained tokens are not the sampled ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from megatron_matpo.data.tokenizer import Message, TemplateRefused, Tokenizer
from megatron_matpo.errors import ConfigError

# Stands for a sampled turn in renderings; plain letters, so that no template changes it.
_SAMPLED = "SampledTurnGoesHere"
_HISTORY: tuple[Message, ...] = ({"role": "user", "content": "Hello"},)
_LONGER_HISTORY: tuple[Message, ...] = (
    *_HISTORY,
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Are you there?"},
)
_INITIAL_CACHE_SIZE = 256
# Beginnings of contexts up to the system message: one for each agent.
_HEAD_CACHE_SIZE = 32
_BREAK = "\u200b"  # zero-width space
# Part of what a turn says, even where a tokenizer counts them among its special tokens.
_MARKUP = frozenset(
    f"<{slash}{name}>" for name in ("think", "tool_call", "tool_response") for slash in ("", "/")
)


class Chat:
    """Token ids of everything in a conversation that the engine did not sample."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Study the template once.

        Raises:
            ConfigError: sampled turns cannot be followed by text that is known beforehand; the
                message says what the template does.
        """
        self._tokenizer = tokenizer
        controls = set(tokenizer.special_ids.values()) - _MARKUP
        specials = sorted(controls, key=len, reverse=True)
        pattern = "|".join(map(re.escape, specials))
        self._special = re.compile(pattern) if specials else None
        self._closing = re.compile(f"(?:{pattern})+\\Z") if specials else None
        borders = "|".join(re.escape(text) for text in specials if self._splits(text))
        self._border = re.compile(borders) if borders else None
        self._joins = False
        self._joins = self._refuses_consecutive_users()
        self.end_of_turn_id: int = self._find_end_of_turn()
        """The token that closes an assistant turn; the engine has to stop at it."""
        self._end_text = tokenizer.special_ids[self.end_of_turn_id]
        self._check_history_and_system()
        prompt = tokenizer.render(_HISTORY, add_generation_prompt=True)
        self.opens_thinking: bool = prompt.rstrip().endswith("<think>")
        """The generation prompt ends inside a thinking block."""
        self._head_ids = lru_cache(_HEAD_CACHE_SIZE)(tokenizer.encode)
        self._initial = lru_cache(_INITIAL_CACHE_SIZE)(self._render_initial)

    def initial_ids(self, system: str, user: str) -> tuple[tuple[int, ...], str]:
        """Ids and text of system message (left out if empty), user message, generation prompt.

        Raises:
            ConfigError: the template refuses a system message.
        """
        return self._initial(system, user)

    def environment_ids(
        self, replies: Sequence[str], sampled_ids: Sequence[int]
    ) -> tuple[tuple[int, ...], str]:
        """Ids and text between the end of a sampled turn and the next sample.

        They hold the end-of-turn token if the sampled turn lacks it (it was cut by length), what
        the template writes after it, each reply as a user message (one joined message where the
        template refuses two in a row), and the generation prompt.

        Args:
            replies: contents of the user messages to append, in order; at least one.
            sampled_ids: the turn that they follow; only its last token is looked at.
        """
        text = self._after_sampled([self.harmless(reply) for reply in replies])
        ids = self._tokenizer.encode(text)
        assert ids[0] == self.end_of_turn_id, "the text after a turn starts with its end"
        if sampled_ids and sampled_ids[-1] == self.end_of_turn_id:
            return tuple(ids[1:]), text[len(self._end_text) :]
        return tuple(ids), text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sampled turn, the closing token included."""
        return self._tokenizer.decode(ids)

    def harmless(self, text: str) -> str:
        """Text from outside, its special tokens broken with a zero-width space.

        Lone surrogates, which have no UTF-8 form and hence no tokens, become question marks. What
        is harmless already stays as it is.
        """
        text = text.encode("utf-8", "replace").decode()
        if self._special is None:
            return text
        return self._special.sub(lambda match: match[0][0] + _BREAK + match[0][1:], text)

    def num_tokens(self, text: str) -> int:
        """Length of a harmless text."""
        return len(self._tokenizer.encode(text))

    def cut(self, text: str, max_tokens: int) -> str:
        """The beginning of a harmless text, at most `max_tokens` tokens long."""
        return self._tokenizer.cut(text, max_tokens)

    def visible(self, text: str) -> str:
        """A decoded turn without the special tokens at its end.

        That is the end of turn, or another token at which the model's own settings stop it.
        """
        return text if self._closing is None else self._closing.sub("", text)

    def _render_initial(self, system: str, user: str) -> tuple[tuple[int, ...], str]:
        messages = [{"role": "user", "content": self.harmless(user)}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        text = self._tokenizer.render(messages, add_generation_prompt=True)
        head = self._head_length(system, text)
        return (*self._head_ids(text[:head]), *self._tokenizer.encode(text[head:])), text

    def _head_length(self, system: str, text: str) -> int:
        """Characters up to the special token behind the system message; 0: there is none.

        The system message is most of a worker's first context and the same for all workers of an
        agent, so it is tokenized once.
        """
        at = text.find(system) if system else -1
        after = self._border.search(text, at + len(system)) if self._border and at >= 0 else None
        return after.start() if after else 0

    def _splits(self, special: str) -> bool:
        """A text may be cut before this token and tokenized in two parts."""
        encode = self._tokenizer.encode
        return encode(f"a \n{special} b") == [*encode("a \n"), *encode(f"{special} b")]

    def _after_sampled(self, replies: Sequence[str], history: Sequence[Message] = _HISTORY) -> str:
        """What the template writes after a sampled turn that is followed by `replies`.

        The history has no system message: Mistral's template writes it into the last user message,
        while ours stands in the first one already.
        """
        contents = ["\n\n".join(replies)] if self._joins else replies
        messages = [
            *history,
            {"role": "assistant", "content": _SAMPLED},
            *({"role": "user", "content": content} for content in contents),
        ]
        text = self._tokenizer.render(messages, add_generation_prompt=True)
        # The first one: the history is ours, and replies may hold any word.
        _, found, after = text.partition(_SAMPLED)
        if not found or not after:
            raise self._refuse(
                "the template drops an earlier assistant message, or writes nothing after it"
            )
        return after

    def _refuse(self, why: str) -> ConfigError:
        return ConfigError(f"{self._tokenizer.where}: cannot be used for multi-turn agents: {why}")

    def _refuses_consecutive_users(self) -> bool:
        try:
            after = self._after_sampled(["One.", "Two."])
        except TemplateRefused:
            self._joins = True
            try:
                after = self._after_sampled(["One.", "Two."])
            except TemplateRefused as error:
                raise self._refuse(f"it refuses user, assistant, user ({error})") from error
        if "One." not in after or "Two." not in after:
            raise self._refuse("the template drops user messages")
        return self._joins

    def _find_end_of_turn(self) -> int:
        after = self._after_sampled(["Go on."])
        first = self._tokenizer.encode(after)[0]
        if first not in self._tokenizer.special_ids:
            raise self._refuse(
                f"a reply is not closed by a special token but by {after[:20]!r}, so the engine "
                "cannot know where a turn ends"
            )
        return first

    def _check_history_and_system(self) -> None:
        expected = self._after_sampled(["Go on."])
        got = self._after_sampled(["Go on."], _LONGER_HISTORY)
        if got != expected:
            raise self._refuse(
                "what the template writes after a turn depends on the turns before "
                f"({expected!r} or {got!r})"
            )
        messages = [{"role": "system", "content": "Be brief."}, *_HISTORY]
        try:
            text = self._tokenizer.render(messages, add_generation_prompt=True)
        except TemplateRefused as error:
            raise self._refuse(f"it refuses a system message ({error})") from error
        if "Be brief." not in text:
            raise self._refuse("the template drops the system message")
