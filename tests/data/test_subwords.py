"""Models of the tokenizers library: what their files say, and texts that are given to them in pieces."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from leanlm.common.errors import UserError
from leanlm.data import corpus, tokenizer
from leanlm.data.decoding import stream
from leanlm.data.documents import end_of
from leanlm.data.tokenizer import Subwords, given
from leanlm.data.tokens import prepare

CODE = "".join(
    f"class Number{i}:\n\n\n    def méthode_{i % 7}(self, value):\n        if value > {i * 37}:\n\t\treturn 'ß—{i}'  \n\n"
    f"    x = [{i}]\n"
    for i in range(80)
)


def byte_level(prefix: bool) -> Tokenizer:
    """As GPT-2's, with tokens that span lines."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([CODE], trainer)
    model.post_processor = processors.ByteLevel(trim_offsets=True)
    return model


def sentencepiece() -> Tokenizer:
    """As Llama's: no pre-tokenizer, so that a whole text is one word, and a mark before its first one."""
    model = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    words = [pre_tokenizers.Metaspace(), pre_tokenizers.Split("\n", "isolated")]
    model.pre_tokenizer = pre_tokenizers.Sequence(words)
    model.train_from_iterator([CODE], trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"], show_progress=False))
    model.pre_tokenizer = None
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return model


def unigram() -> Tokenizer:
    """As T5's."""
    model = Tokenizer(models.Unigram())
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    model.train_from_iterator([CODE], trainer)
    return model


def word_piece() -> Tokenizer:
    """As BERT's: white space is lost."""
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    model.train_from_iterator([CODE], trainer)
    model.decoder = decoders.WordPiece()
    model.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return model


@pytest.mark.parametrize(
    "make", [lambda: byte_level(False), lambda: byte_level(True), sentencepiece, unigram, word_piece],
    ids=["GPT-2", "with a space before", "Llama", "T5", "BERT"],
)  # fmt: skip
def test_a_text_in_pieces_has_the_tokens_of_the_whole(make: Callable[[], Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 700)
    monkeypatch.setattr(tokenizer, "OVERLAP", 300)
    model = make()
    whole = model.encode(CODE, add_special_tokens=False).ids
    assert len(CODE) > 10 * 700
    raw = CODE.encode()
    lines = raw.splitlines(keepends=True)
    for chunks in ([raw], lines, [line + b"\n" for line in raw.split(b"\n")][:-1] + [raw.split(b"\n")[-1]]):
        made = np.concatenate([*Subwords(model.to_str()).encode_all(chunks)])
        assert made.tolist() == whole


def test_a_run_of_one_character_is_cut_and_nothing_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 701)
    monkeypatch.setattr(tokenizer, "OVERLAP", 300)
    model = Subwords(byte_level(False).to_str())
    text = CODE[:5000] + "=" * 5000 + " " * 5000 + CODE[:5000]
    assert model.decode(np.concatenate([*model.encode_all([text.encode()])]).tolist()) == text


def test_what_a_file_says_of_sequences_is_left_out(tmp_path: Path) -> None:
    """A model saved with truncation, padding and a template, and with a hole in the numbers of its tokens."""
    model = word_piece()
    plain = model.encode("class Number7: return x", add_special_tokens=False).ids
    model.enable_truncation(3)
    model.enable_padding(length=64)
    saved = json.loads(model.to_str())
    saved["model"]["vocab"]["mark"] = 999
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "a.txt").write_text("class Number7: return x" + "\nself mark" * 20)
    tokens = prepare(corpus.text(str(tmp_path / "a.txt")), str(tmp_path / "tokenizer.json"), 0)
    assert tokens.splits["train"][: len(plain)].tolist() == plain
    numbers = [token for split in tokens.splits.values() for token in split.tolist()]
    assert numbers.count(999) == 20
    assert tokens.tokenizer.vocabulary == 1000


def test_a_text_for_bert_stands_between_its_marks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_piece().to_str())
    for told in ({}, {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}, "bos_token": None}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
        model = given(str(tmp_path))
        assert (model.start, end_of(model)) == (1, 2)
        assert model.numbers("[CLS]") == [1]
        tokens = model.encode(b"Class number7: RETURN x").tolist()
        assert "".join(stream(model, iter(tokens), {2})) == model.decode(tokens) == "class number7 : return x"


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    for content in ('{"model_type": "gpt2"}', "not json", "[1]"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=r"^data.tokenizer=.*tokenizer.json: not a tokenizer.json[^\n]*$"):
            given(str(tmp_path / "tokenizer.json"))
