"""A model for EleutherAI's lm-evaluation-harness, which does what that one's `hf` backend does with an export of it.

It needs the package lm_eval: import it only where that is there.
"""

from collections import defaultdict
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from leanlm.common.errors import UserError
from leanlm.data.documents import renderer
from leanlm.data.exported_tokenizer import marks, portable, stops
from leanlm.data.tokenizer import Tokenizer
from leanlm.models.contract import Model
from leanlm.models.generation import generate, needs_causal

ANSWER = 256  # tokens of an answer, where a task does not say
DRAWING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # what `generate` knows of a task's generation_kwargs

Request = tuple[Any, list[int], list[int]]  # (of the caller, context, continuation)


class HarnessModel(TemplateLM):
    """Args:
    net: in eval mode.
    tokenizer: its own.
    rows: texts in one forward pass.
    put_before: tokens before every text, but one that begins with the token for it.
    """

    def __init__(self, net: Model, tokenizer: Tokenizer, rows: int = 1, put_before: list[int] | None = None) -> None:
        super().__init__()
        needs_causal(net)
        self.net, self.rows, self.put_before = net, rows, put_before or []
        self.max_length, self._device = net.sequence, next(net.parameters()).device
        self.model, self.start = portable(tokenizer), tokenizer.start
        self.end, self.stops = marks(tokenizer, self.model).get("eos_token"), stops(tokenizer, self.model)
        self.render = renderer(tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.start if self.end is None else self.model.token_to_id(self.end)

    @property
    def prefix_token_id(self) -> int:
        return self.start

    @property
    def tokenizer_name(self) -> str:
        return type(self.net).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokens = self.model.encode(string, add_special_tokens=False).ids
        begun = add_special_tokens is None and string.startswith(self._text([self.start]))
        return tokens if begun or add_special_tokens is False else [*self.put_before, *tokens]

    def _text(self, tokens: list[int], without_marks: bool = False) -> str:
        return self.model.decode(tokens, skip_special_tokens=without_marks)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`add_generation_prompt=False`: the last message goes on, so that the text ends with its content."""
        assert self.render is not None
        try:
            text = self.render(chat_history, add_generation_prompt)
        except ValueError:  # templates that refuse a system's message
            text = self.render([each for each in chat_history if each["role"] != "system"], add_generation_prompt)
        last = chat_history[-1]["content"].strip()
        return text if add_generation_prompt else text[: text.rindex(last) + len(last)]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: list[Request], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether each of its tokens is the likeliest. A context that is too
        long loses its beginning.

        Raises:
            UserError: a continuation is longer than the context.
        """
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise UserError(
                f"an answer to score has {longest:,} tokens, sequence={self.max_length} has no room: leave out its task"
            )
        found = [(0.0, True)] * len(requests)
        readers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, continuation) in enumerate(requests):
            if continuation:  # others of the same row differ in its last token, which is not read
                readers[tuple((context + continuation)[-self.max_length - 1 : -1])].append(i)
        texts = sorted(readers, key=len, reverse=True)
        for first in tqdm(range(0, len(texts), self.rows), "scored", disable=disable_tqdm or None):
            batch = texts[first : first + self.rows]
            tokens = pad_sequence([torch.tensor(text) for text in batch], batch_first=True)  # what follows changes nothing
            hidden, _states = self.net.hidden(tokens.to(self.device))
            for row, text in zip(hidden, batch, strict=True):
                targets = {i: torch.tensor(requests[i][2], device=self.device) for i in readers[text]}
                logits = self.net.head(row[len(text) - max(map(len, targets.values())) : len(text)])  # [targets, v]
                nats = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))
                for i, target in targets.items():
                    own = nats[-len(target) :]
                    found[i] = float(own.gather(1, target[:, None]).sum()), bool((own.argmax(1) == target).all())
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each text, in windows as long as the context, each token once."""
        windows: list[Request] = []
        for i, request in enumerate(requests):
            rolling = get_rolling_token_windows(self.tok_encode(*request.args), self.prefix_token_id, self.max_length, 1)
            windows += [(i, *make_disjoint_window(window)) for window in rolling]
        found = [0.0] * len(requests)
        for (i, *_), (nats, _) in zip(windows, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            found[i] += nats
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text with which each context goes on, up to the first of the texts that are to end it."""
        asked = tqdm([request.args for request in requests], "answered", disable=disable_tqdm or None)
        return [self._answer(context, kwargs, seed) for seed, (context, kwargs) in enumerate(asked)]

    def _answer(self, context: str, kwargs: dict[str, Any], seed: int) -> str:
        given: dict[str, Any] = {**normalize_gen_kwargs(kwargs, ANSWER)}
        until = [term for term in handle_stop_sequences(given.pop("until"), self.end) if term]
        tokens, draws = given.pop("max_gen_toks"), given.pop("do_sample")
        if unknown := given.keys() - DRAWING:
            raise UserError(f"a task's generation_kwargs have {', '.join(sorted(unknown))}, unknown here: leave it out")
        if tokens >= self.max_length:
            raise UserError(f"a task asks for {tokens} tokens, but sequence={self.max_length} leaves no room for a question: "
                            "write a larger sequence, or max_gen_toks in the task's generation_kwargs")  # fmt: skip
        prompt = self.tok_encode(context)[tokens - self.max_length :] or [self.start]
        drawing = DRAWING | given if draws else {"temperature": 0.0}
        written: list[int] = []
        back = max((len(term.encode()) for term in until), default=0) + 4  # tokens that hold any of them after half a character
        for token in generate(self.net, prompt, tokens, **drawing, seed=seed):
            written.append(token)
            if token in self.stops or any(term in self._text(written[-back:]) for term in until):
                break
        return postprocess_generated_text(self._text(written, without_marks=True), until, None)
