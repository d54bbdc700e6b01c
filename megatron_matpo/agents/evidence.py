"""What a context that is full still takes of the replies of a turn: as much of each as fits.

Used before a final summary only: the newest replies are what the summary must not miss, while
nothing that stands in the context already is ever taken out (MATPO's original does the opposite: it
drops whole messages from the newest backwards).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_matpo.agents.tools import cut_mark
from megatron_matpo.data.chat import Chat

# A reply of which less could be shown than this is not worth its place.
_LEAST_SHOWN_TOKENS = 32
# Tokens can merge or split where a text is cut, so the first cut may miss by a few.
_MAX_TRIES = 4


def fit_replies(
    replies: Sequence[str], room: int, num_tokens: Callable[[Sequence[str]], int], chat: Chat
) -> list[str]:
    """`replies`, cut so that they take at most `room` tokens together; empty if that is hopeless.

    Short replies stay whole; the others share what is left in equal parts, each with a visible mark
    of its cut.

    Args:
        replies: in call order.
        room: tokens for all that carries them.
        num_tokens: tokens of the turn that would carry these replies, wrapping included.
        chat: counts and cuts in the policy's tokens.
    """
    total = num_tokens(replies)
    if total <= room:
        return list(replies)
    replies = [chat.harmless(reply) for reply in replies]
    sizes = [chat.num_tokens(reply) for reply in replies]
    budget = sum(sizes) - (total - room)
    for _ in range(_MAX_TRIES):
        shares = fair_shares(sizes, budget)
        kept = [
            _cut(reply, size, share, chat)
            for reply, size, share in zip(replies, sizes, shares, strict=True)
        ]
        shown = [reply for reply in kept if reply is not None]
        if len(shown) < len(replies):
            return []
        excess = num_tokens(shown) - room
        if excess <= 0:
            return shown
        budget -= excess
    return []


def fair_shares(sizes: Sequence[int], budget: int) -> list[int]:
    """Parts of `budget`, none larger than its size, the largest as small as can be."""
    shares = [0] * len(sizes)
    left = max(budget, 0)
    for rank, index in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[index] = min(sizes[index], left // (len(sizes) - rank))
        left -= shares[index]
    return shares


def _cut(reply: str, size: int, share: int, chat: Chat) -> str | None:
    """The first part of `reply` and the mark, in about `share` tokens; None if too little."""
    if size <= share:
        return reply
    # The mark with the largest number that it can get is as long as any.
    shown = share - chat.num_tokens(cut_mark(len(reply), len(reply)))
    if shown < _LEAST_SHOWN_TOKENS:
        return None
    part = chat.cut(reply, shown)
    return part + cut_mark(len(part), len(reply))
