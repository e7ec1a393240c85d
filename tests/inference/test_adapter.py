"""What a run with an adapter leaves: checkpoints of the adapter alone, beside the weights that it was trained with."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from runner import losses, run_all

from leanlm.common.errors import UserError
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.config.resume import effective
from leanlm.data.tokenizer import Subwords
from leanlm.inference.evaluation import Evaluate, evaluate
from leanlm.inference.export import Export, export
from leanlm.inference.restoring import restore
from leanlm.strategies.plan import Plan
from leanlm.training.fit import fit
from leanlm.training.storage import tensors_in

transformers = pytest.importorskip("transformers")
TYPES = 280
SIZES = {"vocab_size": TYPES, "tie_word_embeddings": True}
MODELS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    ),
    "gpt2": transformers.GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip
TARGETS = {"llama": "['*']", "gpt2": "[attention.query,attention.value,mlp.down]"}  # of GPT-2, two of three in one matrix


def asked(folder: Path, text: Path, *more: str) -> list[str]:
    return [
        f"init_from={folder}", "data=text", f"data.path={text}", "sequence=16", "global_batch=8", "optim=adamw",
        "optim.lr=0.03", "optim.warmup=0", "logger=csv", "device=cpu", "sample_tokens=2", "log_every=1", "adapter=lora",
        "adapter.rank=3",
        "adapter.alpha=5", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Run]]:
    """Family -> the folder of its weights and a run that trained an adapter for 6 steps."""
    root = tmp_path_factory.mktemp("adapters")
    tokenizer = Subwords.train([text.read_bytes()], TYPES).state()["model"]
    for name, config in MODELS.items():
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        (root / name / "tokenizer.json").write_text(tokenizer)
        (root / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    run_all({
        root / f"{name}-run": asked(root / name, text, f"adapter.targets={TARGETS[name]}", "max_steps=6") for name in MODELS
    })  # fmt: skip
    return {name: (root / name, Run(root / f"{name}-run")) for name in MODELS}


def net_of(run: Run) -> Any:
    config = check(run.config(), needs_text=False).config
    return restore(config, Plan(), run)[1].net.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_merged_or_by_peft_transformers_gives_the_same_logits(name: str, trained: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, run = trained[name]
    tokens = torch.randint(TYPES, (3, 16), generator=torch.Generator().manual_seed(1))
    expected = net_of(run)(tokens)[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (base(tokens).logits - expected).abs().max() > 0.01
    export(Export(run=str(run.path), to=str(tmp_path / "merged")))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(tokens).logits, expected, atol=1e-5, rtol=0)
    export(Export(run=str(run.path), to=str(tmp_path / "adapter"), format="peft"))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-5, rtol=0)
    trainable = sum(each.numel() for key, each in adapted.named_parameters() if "lora" in key)
    assert name == "gpt2" or trainable == run.results()["trained_parameters"]


def test_checkpoints_hold_the_adapter_alone_and_go_on(trained: dict, text: Path, tmp_path: Path) -> None:
    folder, run = trained["llama"]
    held = tensors_in(next(run.checkpoints.glob("step-*")))
    weights = [name for name in held if name.startswith("model.")]
    assert len(weights) == 2 * 2 * 7  # A and B of seven layers in two blocks
    assert all(".adapter." in name for name in held if name.startswith(("model.", "optimizer.")))
    assert sum(held[name].size.numel() for name in weights) == run.results()["trained_parameters"]
    run_all({tmp_path / "half": asked(folder, text, "max_steps=6", "optim.schedule=constant", "checkpoint_every=3",
                                      "keep_checkpoints=9")})  # fmt: skip
    for after in (tmp_path / "half" / "checkpoints").glob("step-00000006"):
        after.rename(tmp_path / "step-00000006")
    (tmp_path / "half" / "result.json").unlink()
    whole = losses(tmp_path / "half")
    given = [f"resume={tmp_path / 'half'}", "strategy.accumulate_grad_batches=2"]
    fit(check(effective(composed(*given), given)), tmp_path / "again")
    assert losses(tmp_path / "again")[-3:] == pytest.approx(whole[-3:], abs=1e-6)


def test_evaluate_reads_base_and_adapter(trained: dict) -> None:
    _, run = trained["llama"]
    assert evaluate(Evaluate(run=str(run.path)))["loss"] == pytest.approx(run.results()["loss"], abs=1e-6)
    assert evaluate(Evaluate(run=str(run.path), sequence=8))["tokens"] > 0


def test_another_base_is_refused(text: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(MODELS["llama"])
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(Subwords.train([text.read_bytes()], TYPES).state()["model"])
    run_all({tmp_path / "run": asked(tmp_path / "base", text, "max_steps=2")})
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has other weights than those that it was trained beside"):
        evaluate(Evaluate(run=str(tmp_path / "run")))
    with pytest.raises(UserError, match="has other weights than those that it was trained beside"):
        given = [f"resume={tmp_path / 'run'}", "max_steps=4"]
        fit(check(effective(composed(*given), given)), tmp_path / "run")


def test_an_adapter_on_a_run(text: Path, tmp_path: Path) -> None:
    shape = ["model=gpt2", "model.width=16", "model.depth=1", "model.heads=2"]
    plain = [each for each in asked(tmp_path, text) if not each.startswith(("adapter", "init_from"))]
    run_all({tmp_path / "first": [*plain, *shape, "max_steps=5"]})
    run_all({tmp_path / "then": asked(tmp_path / "first", text, "max_steps=1", "optim.lr=1e-12")})
    first, then = (Run(tmp_path / name).results() for name in ("first", "then"))
    assert then["loss"] == pytest.approx(first["loss"], abs=1e-6)
    assert evaluate(Evaluate(run=str(tmp_path / "then")))["loss"] == pytest.approx(first["loss"], abs=1e-6)
    for key, problem in ({"format": "peft"}, "is a run"), ({"run": str(tmp_path / "first"), "format": "peft"}, "no adapter"):
        with pytest.raises(UserError, match=problem):
            export(Export(**{"run": str(tmp_path / "then"), "to": str(tmp_path / "x"), **key}))
    with pytest.raises(UserError, match="holds an adapter alone"):
        check(composed(*plain, f"init_from={tmp_path / 'then'}"))


def test_what_cannot_work_is_said_together(trained: dict, text: Path) -> None:
    folder, _ = trained["llama"]
    with pytest.raises(UserError) as error:
        check(composed(*asked(folder, text, "adapter.rank=0", "adapter.dropout=1.0", "adapter.targets=[attn.*]")))
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "adapter.rank=0", "adapter.dropout=1", "adapter.targets",
    ]  # fmt: skip
    assert "no linear layer of this Transformer is called attn.*" in error.value.problems[2]
    assert "there are attention.query, attention.key" in error.value.problems[2]
    without = [each for each in asked(folder, text) if not each.startswith("init_from")]
    with pytest.raises(UserError, match="name them, init_from=FOLDER"):
        check(composed(*without))
    with pytest.raises(UserError, match="a stage of strategy.pipeline=2 could have nothing to train"):
        check(
            composed(
                *asked(
                    folder, text, "strategy.pipeline=2", "adapter.targets=[blocks.0.*]", "strategy.accumulate_grad_batches=2"
                )
            )
        )
