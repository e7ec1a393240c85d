"""Exports against transformers: it loads them, and gives the same logits, the same tokens and the same text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from safetensors import safe_open
from torch import Tensor

from leanlm import export as command
from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.tokenizer import Bytes, Characters, Subwords, Tokenizer, Words, given
from leanlm.inference import export as exporting
from leanlm.inference.export import Export, claimed, export
from leanlm.inference.restoring import restore
from leanlm.models.contract import Model
from leanlm.models.generation import generate
from leanlm.strategies.plan import Plan
from leanlm.training import build, checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("own_modules")

TEXT = "Où est l'été ?  Là-bas, à\tZoë:\n\nnaïve façade… 東京 \r\nthe end \n"
TOKENIZERS: dict[str, Tokenizer] = {
    "byte": Bytes(),
    "char": Characters("".join(sorted({*TEXT} - {"\r"}))),
    "word": Words.train([TEXT.encode()] * 2),
    "bpe": Subwords.train([TEXT.encode()] * 9, 290),
    "masked": Subwords.train([TEXT.encode()] * 9, 290).with_mask(),
}
SMALL = ["model.width=16", "model.depth=2", "model.init=0.3"]
HEADS = [*SMALL, "model.heads=4"]
MODELS = {
    "gpt2": ["model=gpt2", *HEADS],
    "gpt2 untied": ["model=gpt2", *HEADS, "model.tied=false", "model.mlp_width=24"],
    "llama": ["model=llama", *HEADS, "model.kv_heads=2", "model.mlp_width=24"],
    "llama tied": ["model=llama", *HEADS, "model.kv_heads=null", "model.tied=true", "model.head_size=6",
                   "model.rope_scaling={factor: 8, low_freq_factor: 1, high_freq_factor: 4, "
                   "original_max_position_embeddings: 16}"],
    "mistral": ["model=llama", *HEADS, "model.kv_heads=2", "model.window=5"],
    "qwen2": ["model=llama", *HEADS, "model.qkv_bias=true", "model.tied=true"],
    "qwen3": ["model=llama", *HEADS, "model.head_size=6", "model.qk_norm=true", "model.qk_norm_weight=true"],
    "modern": ["model=small", *HEADS, "model.zero_init=false", "model.dropout=0.1"],
    "lstm": ["model=lstm", *SMALL],
    "gru tied": ["model=gru", *SMALL, "model.tied=true", "model.embedding=8"],
    "adaptive": ["model=lstm", *SMALL, "model.cutoffs=[20,90]"],
}  # fmt: skip
CLASSES = {
    "gpt2": "GPT2LMHeadModel", "gpt2 untied": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "llama tied": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip


def run_of(path: Path, *overrides: str, tokenizer: str = "byte", average: float | None = None) -> Run:
    """A run's folder with one checkpoint, in which no weight is at its initial value. `average`: of all weights."""
    settings = check(composed(*overrides, "sequence=96", "device=cpu"), needs_text=False)
    config, run = settings.config, Run(path)
    run.create(settings.as_run())
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZERS[tokenizer].state()))
    parallel = build.parallel_model(config, Plan(), TOKENIZERS[tokenizer].vocabulary)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parallel.net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.1)
    named = list(parallel.named_parameters())
    kept = [] if average is None else [(name, torch.full_like(parameter, average)) for name, parameter in named]
    optimizer = torch.optim.SGD(parallel.net.parameters())
    checkpoint.save(run.checkpoints, named, optimizer, {}, {"step": 1, "text": ""}, 1, kept)
    return run


def net_of(run: Run) -> Model:
    config = check(run.config(), needs_text=False).config
    return restore(config, Plan(), run)[1].net.eval()


def theirs(folder: Path, **more: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more).eval()


def written(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("model", MODELS)
def test_transformers_gives_the_same_logits_and_goes_on_with_the_same_tokens(model: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *MODELS[model])
    folder, with_code = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    assert with_code == (model not in CLASSES) == any(folder.glob("*.py"))
    # this package need not be installed where the export is used
    assert [file for file in folder.glob("*.py") if "from leanlm" in file.read_text()] == []
    own, other = net_of(run), theirs(folder)
    assert type(other).__name__ == CLASSES.get(model, "ExportedModel")
    tokens = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = own(tokens)[0], other(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    begun = other.generate(tokens[:1, :8], max_new_tokens=64, do_sample=False, use_cache=True)[0].tolist()
    assert begun == [*tokens[0, :8].tolist(), *generate(own, tokens[0, :8].tolist(), 64, temperature=0)]
    loss = other(tokens, labels=tokens).loss
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(expected[:, :-1].mT, tokens[:, 1:])), abs=1e-5)


ENCODERS = {
    "bert": (["model=bert", *HEADS], "BertForMaskedLM"),
    "roberta": (["model=roberta", *HEADS, "model.token_types=3"], "RobertaForMaskedLM"),
    "modernbert": (
        ["model=modernbert", *HEADS, "model.depth=3", "model.global_every=2", "model.window=7", "model.mlp_width=24"],
        "ModernBertForMaskedLM",
    ),
    "bidirectional": (["model=small", *HEADS, "model.zero_init=false", "model.causal=false"], "ExportedModel"),
}  # fmt: skip


@pytest.mark.parametrize("model", ENCODERS)
@torch.no_grad()
def test_an_encoder_is_a_masked_language_model_of_transformers(model: str, tmp_path: Path) -> None:
    overrides, name = ENCODERS[model]
    run = run_of(tmp_path / "run", *overrides, "objective=masked", tokenizer="masked")
    folder, with_code = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    assert with_code == (name == "ExportedModel")
    own = net_of(run)
    other = transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(other).__name__ == name
    tokens = torch.randint(2, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = own(tokens)[0]
    assert expected.std() > 0.1
    found = other(tokens, labels=tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)
    assert float(found.loss) == pytest.approx(float(torch.nn.functional.cross_entropy(expected.mT, tokens)), abs=1e-5)
    if with_code:
        with pytest.raises(ValueError, match="rows are padded"):
            other(tokens, attention_mask=torch.ones_like(tokens).tril())
        return
    begun = check(composed(f"init_from={folder}", "optim=adamw", "sequence=96", "device=cpu"), needs_text=False).config
    back = build.parallel_model(begun, Plan(), given(str(folder)).vocabulary, str(folder)).net
    named = dict(own.named_parameters())
    assert {name for name, value in back.named_parameters() if torch.equal(value, named[name])} == named.keys()


@pytest.mark.parametrize("model", CLASSES)
def test_an_import_of_an_export_is_the_same_bits(model: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *MODELS[model], tokenizer="bpe")
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    begun = check(composed(f"init_from={folder}", "optim=adamw", "sequence=96", "device=cpu"), needs_text=False).config
    net = build.parallel_model(begun, Plan(), given(str(folder)).vocabulary, str(folder)).net
    expected = dict(net_of(run).named_parameters())
    found = dict(net.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    config = json.loads((folder / "config.json").read_text())
    assert None not in {key: value for key, value in config.items() if "window" not in key and "scaling" not in key}.values()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_of_a_text_are_the_same(kind: str, tmp_path: Path) -> None:
    own = TOKENIZERS[kind]
    run = run_of(tmp_path / "run", *MODELS["llama"], tokenizer=kind)
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    other = transformers.AutoTokenizer.from_pretrained(folder)
    text = TEXT.replace("\r", "") if kind == "char" else TEXT + "🙂 \x1cunknown\u2003here\u00a0"
    numbers = own.encode(text.encode()).tolist()
    assert len(numbers) > 10
    assert other(text)["input_ids"] == numbers
    assert other.decode(numbers, skip_special_tokens=kind != "word") == own.decode(numbers)
    assert (len(other), other.model_max_length) == (own.vocabulary, 96)
    mark = {"word": "<eos>", "bpe": "<|endoftext|>", "masked": "<|endoftext|>"}.get(kind)
    assert (other.bos_token, other.eos_token) == (mark, mark)
    told = transformers.GenerationConfig.from_pretrained(folder)
    assert (told.bos_token_id, told.eos_token_id) == (own.start, own.start if kind in ("bpe", "masked") else None)
    back = given(str(folder))
    assert back.encode(text.encode()).tolist() == numbers
    assert (back.vocabulary, back.start) == (own.vocabulary, own.start)


def test_what_stood_beside_a_tokenizer_goes_with_it(tmp_path: Path) -> None:
    model = json.loads(TOKENIZERS["bpe"].model.to_str())  # type: ignore[attr-defined]
    model["added_tokens"].append({**model["added_tokens"][0], "id": 290, "content": "<|end|>"})
    beside = {"marks": ["<|endoftext|>", "<|end|>"], "stop": [0, 290], "chat": "{{ bos_token }}{{ messages[0].content }}",
              "vocabulary": 300}  # fmt: skip
    own = Subwords(json.dumps(model), beside)
    told = exporting.write_tokenizer(tmp_path, own, None)
    assert told == {"bos_token_id": 0, "eos_token_id": [0, 290]}
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (other.bos_token_id, other.eos_token_id) == (0, 290)
    said = other.apply_chat_template([{"role": "user", "content": "été"}], tokenize=False)
    assert said == "<|endoftext|>été"
    assert other(said)["input_ids"] == own.encode(said.encode()).tolist()


@pytest.mark.parametrize("model", ["gpt2", "llama tied", "modern"])
def test_several_files(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path / "run", *MODELS[model])
    one, _ = export(Export(run=str(run.path), to=str(tmp_path / "one")))
    monkeypatch.setattr(exporting, "LIMIT", 10_000)
    many, _ = export(Export(run=str(run.path), to=str(tmp_path / "many")))
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    expected, found = written(one), written(many)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    largest = max(tensor.nbytes for tensor in found.values())
    assert all(file.stat().st_size < max(10_000, largest) + 4_000 for file in files)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(theirs(many)(tokens).logits, theirs(one)(tokens).logits, atol=0, rtol=0)


@pytest.mark.parametrize(("dtype", "wanted"), [("bf16", torch.bfloat16), ("fp32", torch.float32), (None, torch.float64)])
def test_the_number_type(dtype: str | None, wanted: torch.dtype, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *MODELS["gpt2"], "precision=fp64")
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out"), dtype=dtype))
    expected = net_of(run).embed.get_parameter("tokens.weight")
    assert torch.equal(written(folder)["transformer.wte.weight"], expected.to(wanted))
    assert theirs(folder).dtype == wanted


def test_an_average_is_what_is_exported(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *MODELS["llama"], average=0.25)
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    assert {float(tensor.min()) for tensor in written(folder).values()} == {0.25}
    assert {float(tensor.max()) for tensor in written(folder).values()} == {0.25}


def test_padding_at_the_left_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *MODELS["lstm"])
    folder, _ = export(Export(run=str(run.path), to=str(tmp_path / "out")))
    other, tokens, mask = theirs(folder), torch.arange(6).view(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert other(tokens, attention_mask=mask).logits.shape == (2, 3, 256)
    with pytest.raises(ValueError, match="padded at their left"):
        other(tokens, attention_mask=mask.flip(1))


def test_nothing_is_overwritten_and_nothing_half_done_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, to = run_of(tmp_path / "run", *MODELS["lstm"]), tmp_path / "deep" / "out"
    asked = Export(run=str(run.path), to=str(to))

    def fails(*_: object) -> None:
        assert [file.name for file in to.iterdir()] == [".unfinished"]
        with pytest.raises(UserError, match="another export is at work there"), claimed(to):
            pass
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fails)
        with pytest.raises(UserError, match="cannot be written: .*No space left"):
            export(asked)
    assert not to.exists()
    to.mkdir(parents=True)
    with pytest.raises(UserError, match="no best checkpoint"):
        export(Export(run=str(run.path), to=str(to), checkpoint="best"))
    assert list(to.iterdir()) == []
    export(asked)
    before = {file.name: file.read_bytes() for file in to.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
            "modeling_leanlm.py"} <= before.keys()  # fmt: skip
    with pytest.raises(UserError) as raised:
        export(Export(run=str(run.path), to=str(to), dtype="int8"))
    assert raised.value.problems == (
        "dtype=int8: choose one of fp32, bf16, or null for that of the run's weights",
        f"to={to} is there already, and not an empty folder: name another",
    )
    with pytest.raises(UserError, match="is not an empty folder"), claimed(to):
        pass
    assert {file.name: file.read_bytes() for file in to.iterdir()} == before


def test_a_model_from_elsewhere_is_refused_before_work_starts(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", *MODELS["lstm"])
    run.create({**run.config(), "model": {"_target_": "gated.GatedConvolution", "width": 16}})
    with pytest.raises(UserError, match=r"gated.GatedConvolution: an export can copy files of leanlm.models alone"):
        export(Export(run=str(run.path), to=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for model, code in (("lstm", True), ("llama", False)):
        run, to = run_of(tmp_path / model, *MODELS[model]), tmp_path / f"{model}-out"
        command.job(Export(run=str(run.path), to=str(to)))
        assert ("trust_remote_code=True runs the *.py files there" in capsys.readouterr().out) == code
