"""Token numbers back to text, as they come, up to where it ends."""

from collections.abc import Collection, Iterable, Iterator

from leanlm.data.tokenizer import Tokenizer


class Decoder:
    """Tokens to text as they come, up to where it ends.

    Decoding each token alone would lose the spaces that some models put between tokens, so a short tail of tokens that
    were given out already is decoded again with each new one. Held back are a character whose bytes are not complete, and what
    may be the beginning of a text that ends it.

    Attributes:
        ended: whether one of `marks` or `texts` has come; neither is given out.
    """

    def __init__(self, tokenizer: Tokenizer, marks: Collection[int] = (), texts: Collection[str] = ()) -> None:
        self.tokenizer, self.marks, self.texts = tokenizer, marks, texts
        self.known: list[int] = []
        self.fresh: list[int] = []
        self.held, self.ended = "", False

    def add(self, token: int) -> str:
        """What is certain of the text with one more token."""
        if token in self.marks:
            rest = self.rest()
            self.ended = True
            return rest
        self.fresh.append(token)
        before, text = self.tokenizer.decode(self.known), self.tokenizer.decode(self.known + self.fresh)
        if text.endswith("\ufffd") and len(self.fresh) <= 4:
            return ""
        self.known, self.fresh = self.fresh, []
        return self._before_end(text[len(before) :])

    def rest(self) -> str:
        """What has been held back, since no more tokens come."""
        before, text = self.tokenizer.decode(self.known), self.tokenizer.decode(self.known + self.fresh)
        certain, self.fresh = self._before_end(text[len(before) :]), []
        rest, self.held = certain + self.held, ""
        return rest

    def _before_end(self, more: str) -> str:
        self.held += more
        if found := [place for text in self.texts if (place := self.held.find(text)) >= 0]:
            certain, self.held, self.ended = self.held[: min(found)], "", True
            return certain
        begun = (n for text in self.texts for n in range(len(text)) if self.held.endswith(text[:n]))
        certain = self.held[: len(self.held) - max(begun, default=0)]
        self.held = self.held[len(certain) :]
        return certain


def stream(
    tokenizer: Tokenizer, tokens: Iterable[int], marks: Collection[int] = (), texts: Collection[str] = ()
) -> Iterator[str]:
    """Decode tokens as they come, up to a mark or a text that ends them, see `Decoder`."""
    decoder = Decoder(tokenizer, marks, texts)
    for token in tokens:
        yield decoder.add(token)
        if decoder.ended:
            return
    yield decoder.rest()
