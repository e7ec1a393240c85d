"""Conversations, files of prompts, and where a text ends, against transformers and plain loops."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import MODELS, build

from leanlm import generate as command
from leanlm.common.errors import UserError
from leanlm.data.decoding import Decoder, stream
from leanlm.data.tokenizer import Bytes, Subwords, given
from leanlm.inference.chat import Conversation, Template
from leanlm.inference.continuation import Generate, continuation
from leanlm.inference.prompts import completions
from leanlm.models.generation import LogitsAfter, generate, generate_rows

TEMPLATE = """{% for m in messages %}{{ '<|begin|>' + m.role + '\n' + m.content + '<|end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"""
MARKS, END = [0, 35], 281  # 35: a token that it draws
CPU: dict[str, Any] = {"accelerator": "cpu"}
ASKED = [{"role": "user", "content": "the of"}, {"role": "assistant", "content": "and a"}, {"role": "user", "content": "to in"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A random Llama whose files name other marks of an end than its chat template writes; it draws one or the other soon."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    model = json.loads(Subwords.train([text.read_bytes()], 280).state()["model"])
    model["added_tokens"] += [
        {"id": 280 + i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, name in enumerate(("<|begin|>", "<|end|>"))
    ]
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=282, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        llama.lm_head.weight[END] = 1.2 * llama.lm_head.weight[33]  # likelier than a token that is drawn
    llama.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": MARKS}))
    (folder / "tokenizer.json").write_text(json.dumps(model))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def theirs(folder: Path, prompt: list[int], tokens: int, stop: list[int]) -> list[int]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = torch.tensor([prompt])
    written = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=tokens, do_sample=False,
                             eos_token_id=stop, pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
    return written[:-1] if written[-1] in stop else written


def until(text: str, stops: list[str]) -> str:
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]


@pytest.mark.parametrize("stops", [["END"], ["aab"], ["\n\n", "a\n"], ["é", "ab"], ["zz"]])
def test_a_text_to_stop_at_is_found_over_tokens_and_never_given_out(stops: list[str]) -> None:
    whole = "aaab ENEND é\na\n\nb EN"
    drawn = list(whole.encode())
    pieces, taken = [], []
    for piece in stream(Bytes(), (taken.append(token) or token for token in drawn), (), stops):  # type: ignore[func-returns-value]
        pieces.append(piece)
        assert until(whole, stops).startswith("".join(pieces))
    assert "".join(pieces) == until(whole, stops)
    if any(stop in whole for stop in stops):
        first = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
        assert len(taken) == len(whole[:first].encode()), "it draws on after the end"


def test_a_mark_gives_out_what_was_held_back() -> None:
    decoder = Decoder(Bytes(), {0}, ["END"])
    assert [decoder.add(token) for token in b"aEN"] == ["a", "", ""]
    assert (decoder.add(0), decoder.ended) == ("EN", True)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_together_are_as_each_alone(model: str, temperature: float) -> None:
    """Of unequal lengths, one longer than the context; beyond the context; and some end before the others."""
    net = build(model, 16)
    prompts = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5], [*range(20)]]
    ended, found = {1}, [list[int]() for _ in prompts]
    for row, token in generate_rows(net, prompts, 40, temperature, 5, 0.9, [7, 8, 9, 10], ended):
        found[row].append(token)
        if row == 2 and len(found[row]) == 4:
            ended.add(row)
    alone = [list(generate(net, p, 40, temperature, 5, 0.9, seed)) for p, seed in zip(prompts, [7, 8, 9, 10], strict=True)]
    assert found == [alone[0], [], alone[2][:4], alone[3]]


@pytest.mark.parametrize("model", MODELS)
def test_a_history_that_does_not_go_on_is_read_anew(model: str) -> None:
    net = build(model, 16)
    cached, read = LogitsAfter(net), []
    net.embed.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    for history, fresh in (
        ([1, 2, 3], 3),
        ([1, 2, 3, 4, 5], 2),
        ([1, 2, 9, 4, 5, 6], 6),
        ([1, 2], 2),
        ([1, 2], 2),
        ([1, 2, 3], 1),
    ):
        found = cached(history)
        assert read.pop() == fresh
        torch.testing.assert_close(found, net(torch.tensor([history]))[0][0, -1], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_conversation_is_as_transformers_has_it(folder: Path) -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = Template(given(str(folder)))
    assert template.tokens(ASKED) == tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert template.ends == ({*MARKS, END}, [])
    conversation = Conversation(Generate(run=str(folder), chat=True, temperature=0, tokens=12, device=CPU))
    messages: list[dict[str, str]] = []
    lengths = []
    for message in ("the of", "to in"):
        messages.append({"role": "user", "content": message})
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        written = theirs(folder, asked, 12, [*MARKS, END])
        lengths.append(len(written))
        expected = tokenizer.decode(written, skip_special_tokens=False)
        assert "".join(conversation.answer(message)) == expected.lstrip()
        messages.append({"role": "assistant", "content": expected.strip()})
        assert conversation.messages == messages
    assert min(lengths) < 12, "no answer has come to a mark"


def test_the_oldest_turns_leave_a_full_context(folder: Path, capsys: pytest.CaptureFixture) -> None:
    conversation = Conversation(Generate(run=str(folder), chat=True, system="be at", tokens=9, stop=["\n"], device=CPU))
    for i in range(4):
        list(conversation.answer(f"the of and a to in {i}"))
    assert conversation.messages[0] == {"role": "system", "content": "be at"}
    assert [each["role"] for each in conversation.messages[1:]] == ["user", "assistant"] * (len(conversation.messages) // 2)
    assert 1 < len(conversation.messages) < 9
    assert conversation.messages[-2]["content"].endswith("3")
    assert len(conversation.template.tokens(conversation.messages[:-1])) <= 96 - 9
    assert "(the context is full: the oldest 2 messages are left out" in capsys.readouterr().err


def test_the_plain_template_ends_where_the_user_speaks() -> None:
    template = Template(Bytes())
    assert template.ends == (set(), ["\nuser:"])
    asked = bytes([10]) + b"user: the of\nassistant: and a\nuser: to in\nassistant:"
    assert bytes(template.tokens(ASKED)) == asked


@torch.no_grad()
def test_a_file_of_prompts_is_as_each_alone_and_as_transformers(folder: Path, tmp_path: Path) -> None:
    tokenizer, file = given(str(folder)), tmp_path / "asked.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": "the"},
        {"prompt": "the of and a", "id": 7},
        {"messages": ASKED},
        {"prompt": "of"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    asked = Generate(run=str(folder), prompts=str(file), tokens=20, temperature=0, rows=3, device=CPU)
    found = list(completions(asked))
    for line, written in zip(lines, found, strict=True):
        if "messages" in line:
            expected = tokenizer.decode(theirs(folder, Template(tokenizer).tokens(ASKED), 20, [*MARKS, END]))
            assert written == {"messages": [*ASKED, {"role": "assistant", "content": expected.strip()}]}
        else:
            begun = [tokenizer.start, *tokenizer.encode(line["prompt"].encode()).tolist()]
            expected = tokenizer.decode(theirs(folder, begun, 20, MARKS))
            assert written == {**line, "completion": expected}
            alone = Generate(run=str(folder), prompt=line["prompt"], tokens=20, temperature=0, device=CPU)
            assert "".join(continuation(alone)) == expected
    drawn = [list(completions(Generate(run=str(folder), prompts=str(file), tokens=9, rows=n, device=CPU))) for n in (1, 4)]
    assert drawn[0] == drawn[1] != found


def test_what_cannot_be_is_said_together(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"prompt": "the"}\n{"prompt": 3}\n[]\n{"messages": [{"role": "user"}]}\nno\n')
    asked = Generate(run=str(folder), prompts=str(file), chat=True, rows=0, stop=[""], to=str(file))
    with pytest.raises(UserError) as error:
        completions(asked)
    said = ["rows=0: at least 1 prompt is read at a time", "stop: an empty text",
            f"chat=true with prompts={file}: leave out one",
            f"to={file} is there already", f"{file}, line 2: the field prompt is not text", f"{file}, line 3: a JSON object is",
            f"{file}, line 4: it has no field content", f"{file}, line 5: no JSON"]  # fmt: skip
    assert len(error.value.problems) == len(said)
    assert all(problem.startswith(begun) for problem, begun in zip(error.value.problems, said, strict=True))
    (tmp_path / "empty").write_text("\n \n")
    for name, problem in (("empty", "it holds no prompts"), ("gone", "cannot be read: No such file")):
        with pytest.raises(UserError, match=f"{name}:? {problem}"):
            completions(Generate(run=str(folder), prompts=str(tmp_path / name)))
    assert Generate(to="x", system="y").problems() == [
        "to=x is for what prompts=FILE gives: add that, or leave it out",
        "system=...: it begins a conversation: add chat=true",
    ]


def test_the_command_answers_line_by_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = Generate(run=str(folder), chat=True, prompt="the of", temperature=0, tokens=6, device=CPU)
    conversation = Conversation(asked)
    expected = ["".join(conversation.answer(message)) for message in ("the of", "to in")]
    for given_lines, count in (("\nto in\n/exit\nand\n", 2), ("to in", 2), ("", 1)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given_lines))
        command.job(asked)
        assert capsys.readouterr().out == "".join(f"{text}\n" for text in expected[:count])
    monkeypatch.setattr(sys, "stdin", None)
    command.job(asked)
    assert capsys.readouterr().out == f"{expected[0]}\n"
    (tmp_path / "asked.txt").write_text("the of\nand\n")
    command.job(Generate(run=str(folder), prompts=str(tmp_path / "asked.txt"), to=str(tmp_path / "said"), tokens=3, device=CPU))
    written = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [line["prompt"] for line in written] == ["the of", "and"]
    assert all(line["completion"] for line in written)
