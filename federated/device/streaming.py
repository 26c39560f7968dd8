"""Tokens as text while they come: no half characters, and nothing of a stop text. No torch.

A character may need several tokens, and a stop text may span some: what is not certain yet is kept back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["Detokenizer", "StopTexts", "TextStream"]

_BROKEN = "\ufffd"


class Detokenizer:
    """The text that each further token makes certain; all together it is the text of all tokens.

    Args:
        decode: token ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # the tokens before are done: only these are decoded again, since spaces depend on neighbours
        self._given = 0  # characters of their text that were given out

    def add(self, token_id: int) -> str:
        """Take a token; characters that may still be incomplete are kept back."""
        self._ids.append(token_id)
        text = self._decode(self._ids[self._start :])
        whole = text.rstrip(_BROKEN)
        made = whole[self._given :]
        self._given = max(self._given, len(whole))
        if made and len(whole) == len(text):
            self._start, self._given = len(self._ids) - 1, len(self._decode(self._ids[-1:]))
        return made

    def rest(self) -> str:
        """What was kept back, as it is."""
        made = self._decode(self._ids[self._start :])[self._given :]
        self._given += len(made)
        return made


class StopTexts:
    """Ends a text at the first of some texts in it.

    Args:
        stops: the texts; none is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._kept = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Take more text; gives out what cannot be part of a stop text, and whether one was found."""
        self._kept += text
        found = [at for at in (self._kept.find(stop) for stop in self._stops) if at >= 0]
        if found:
            made, self._kept = self._kept[: min(found)], ""
            return made, True
        split = len(self._kept) - self._begun()
        made, self._kept = self._kept[:split], self._kept[split:]
        return made, False

    def _begun(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = min(len(self._kept), max((len(stop) for stop in self._stops), default=1) - 1)
        for size in range(longest, 0, -1):
            if any(stop.startswith(self._kept[-size:]) for stop in self._stops):
                return size
        return 0

    def rest(self) -> str:
        """What was kept back."""
        made, self._kept = self._kept, ""
        return made


class TextStream:
    """Both together.

    Args:
        decode: token ids to text.
        stops: texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> None:
        self._text = Detokenizer(decode)
        self._stops = StopTexts(stops)

    def add(self, token_id: int, *, last: bool = False) -> tuple[str, bool]:
        """Take a token.

        Args:
            token_id: of the answer.
            last: no token follows, so that nothing is kept back.

        Returns:
            Text that is certain now, and whether a stop text was found.
        """
        text = self._text.add(token_id) + (self._text.rest() if last else "")
        made, stopped = self._stops.add(text)
        return (made + self._stops.rest() if last and not stopped else made), stopped

    def end(self) -> str:
        """The rest of the answer, where the model ended it."""
        text, stopped = self._stops.add(self._text.rest())
        return text if stopped else text + self._stops.rest()
