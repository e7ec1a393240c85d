"""A conversation with a model."""

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from math import inf

from leanlm.common.errors import UserError
from leanlm.data.decoding import stream
from leanlm.data.documents import Render, plain, renderer, stops
from leanlm.data.tokenizer import Subwords, Tokenizer
from leanlm.inference.continuation import Check, Generate, Source
from leanlm.models.contract import stable_hash
from leanlm.models.generation import LogitsAfter, generate, newer_half

Message = dict[str, str]  # role, content
EXIT = "/exit"  # what the user says in the end


class Template:
    """How a tokenizer writes a conversation: by its own template, else as training on `messages` does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def own(self) -> Render | None:
        return renderer(self.tokenizer)

    def tokens(self, messages: list[Message]) -> list[int]:
        """Tokens with which an answer is asked for. Raises ValueError: the template refuses the messages."""
        numbers = map(int, self.tokenizer.encode((self.own or plain)(messages, True).encode()))
        return [*numbers] if self.own else [self.tokenizer.start, *numbers]

    @cached_property
    def ends(self) -> tuple[set[int], list[str]]:
        """Marks and texts that end an answer: those of any text, and what the template writes behind an answer: its mark or, if
        there is none, all up to what the user says next."""
        question, answer, more = ("user", "~1~"), ("assistant", "~2~"), ("user", "~3~")
        messages = [{"role": role, "content": content} for role, content in (question, answer, more)]
        whole = (self.own or plain)(messages, False)
        behind = whole.partition(answer[1])[2].partition(more[1])[0].rstrip()
        marks = stops(self.tokenizer)
        if isinstance(self.tokenizer, Subwords):
            model = self.tokenizer.model
            for first in model.encode(behind.lstrip(), add_special_tokens=False).ids[:1]:
                if first in model.get_added_tokens_decoder():
                    return {*marks, first}, []
        return marks, [behind] if behind else []


class Conversation:
    """Messages so far, and a model that answers.

    Attributes:
        messages: all that the model is shown. If they and an answer (up to half of the context) do not fit in the context, the
            oldest questions and answers leave; the system's message stays.
    """

    def __init__(self, asked: Generate, check_memory: Check | None = None) -> None:
        """Raises UserError: the run, the first message or what is asked for cannot be used, or there is not enough memory."""
        source = Source(asked, [])
        self.asked, self.template, self.answered = asked, Template(source.tokenizer), 0
        self.messages = [] if asked.system is None else [{"role": "system", "content": asked.system}]
        self._tokens([*self.messages, {"role": "user", "content": asked.prompt}])
        net = source.net(check_memory, source.config.sequence)
        self.logits_after = LogitsAfter(net)
        self.room = inf if net.carries_state else net.sequence - min(asked.tokens, newer_half(net))

    def answer(self, message: str) -> Iterator[str]:
        """Pieces of the answer to what the user says; with the last of them both are in the conversation.

        Raises:
            UserError: the tokenizer or the template cannot write it; the conversation is as it was.
        """
        messages = [*self.messages, {"role": "user", "content": message}]
        system = [each for each in messages[:1] if each["role"] == "system"]
        kept = messages[len(system) :]
        while len(prompt := self._tokens([*system, *kept])) > self.room and len(kept) > 1:
            kept = kept[2:]
        if left := len(messages) - len(system) - len(kept):
            print(f"(the context is full: the oldest {left} messages are left out from here on)", file=sys.stderr, flush=True)
        marks, texts = self.template.ends
        numbers = generate(self.logits_after, prompt, *self.asked.drawing, stable_hash(self.asked.seed, self.answered))
        text = ""
        for piece in stream(self.template.tokenizer, numbers, marks, [*self.asked.stop, *texts]):
            piece = piece if text else piece.lstrip()
            text += piece
            yield piece
        self.answered += 1
        self.messages = [*system, *kept, {"role": "assistant", "content": text.strip()}]

    def _tokens(self, messages: list[Message]) -> list[int]:
        try:
            return self.template.tokens(messages)
        except ValueError as error:
            raise UserError(str(error)) from None


def said(first: str) -> Iterator[str]:
    """What the user says, line by line, up to the end of the input or EXIT; lines without text are no messages."""
    yield from [first] if first else []
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sign = "> " if sys.stdin and sys.stdin.isatty() and sys.stdout.isatty() else ""
    with suppress(EOFError):
        while sys.stdin and (line := input(sign)).strip() != EXIT:
            yield from [line] if line.strip() else []
