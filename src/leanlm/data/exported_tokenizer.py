"""Tokenizers as models of the `tokenizers` library that give a text the same numbers, and what transformers asks of them."""

from typing import Any

from leanlm.data.tokenizer import MASK, Bytes, Characters, Subwords, Tokenizer, Words

SPACE = r"[\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+"  # where Python's `split` parts words


def portable(tokenizer: Tokenizer) -> Any:
    """A model of the `tokenizers` library. Characters that a character tokenizer refuses are left out."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Model

    if isinstance(tokenizer, Subwords):
        return tokenizer.model
    if isinstance(tokenizer, Bytes):
        model = Model(models.BPE(_byte_names(), []))
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.decoder = decoders.ByteLevel()
    elif isinstance(tokenizer, Characters):
        model = Model(models.BPE({character: i for i, character in enumerate(tokenizer.characters)}, []))
        model.decoder = decoders.Fuse()
    elif isinstance(tokenizer, Words):
        model = Model(models.WordLevel(tokenizer.index, unk_token="<unk>"))
        model.normalizer = normalizers.Replace(Regex(r"\r\n|\r|\n"), " <eos> ")
        model.pre_tokenizer = pre_tokenizers.Split(Regex(SPACE), "removed")
        between = [decoders.Replace(Regex("$"), " "), decoders.Replace("<eos> ", "\n"), decoders.Fuse()]
        model.decoder = decoders.Sequence(between)
        model.add_special_tokens([AddedToken("<eos>", single_word=True)])
    else:
        raise TypeError(f"{type(tokenizer).__name__} has no counterpart in the tokenizers library")
    if tokenizer.mask is not None:
        model.add_special_tokens([MASK])
    return model


def _byte_names() -> dict[str, int]:
    """The characters that stand for the 256 bytes in a byte-level BPE (GPT-2's code): those that can be seen for themselves."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


def marks(tokenizer: Tokenizer, model: Any) -> dict[str, str]:
    """`mask_token`, and `bos_token` and `eos_token` where they are marks: a line end or another part of a text must not be
    taken for one."""
    known = {number: token.content for number, token in model.get_added_tokens_decoder().items()}
    mask = {} if tokenizer.mask is None else {"mask_token": known[tokenizer.mask]}
    if tokenizer.start not in known:
        return mask
    told = tokenizer.beside.get("marks", []) if isinstance(tokenizer, Subwords) else []
    ends = [mark for mark in told if mark in known.values()] or [known[tokenizer.start]]
    return mask | {"bos_token": known[tokenizer.start], "eos_token": ends[-1]}


def stops(tokenizer: Tokenizer, model: Any) -> list[int]:
    """Tokens with which generation ends. Lines end, texts of words do not."""
    if not isinstance(tokenizer, Subwords):
        return []
    end = marks(tokenizer, model).get("eos_token")
    return tokenizer.beside.get("stop") or ([] if end is None else [model.token_to_id(end)])


def chat_template(tokenizer: Tokenizer) -> str | None:
    return tokenizer.beside.get("chat") if isinstance(tokenizer, Subwords) else None
