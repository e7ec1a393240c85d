"""LoRA trains as peft's does beside transformers' own model, and the same under every plan."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import composed
from runner import losses, run_all

from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.data.tokenizer import Subwords
from leanlm.models.contract import initial
from leanlm.training import build
from leanlm.training.data import tokens, training_batches

transformers = pytest.importorskip("transformers")

TYPES, STEPS = 280, 10
PLANS = {
    "single": (1, []),
    "accumulate": (1, ["strategy.accumulate_grad_batches=4", "strategy.recompute=blocks"]),
    "ddp": (2, ["strategy.replicate=2", "strategy.zero1=true"]),
    "fsdp": (2, ["strategy.shard=2", "strategy.accumulate_grad_batches=2"]),
    "tensor": (2, ["strategy.tensor=2"]),
    "pipeline": (2, ["strategy.pipeline=2", "strategy.accumulate_grad_batches=4"]),
    "zero_bubble": (2, ["strategy.pipeline=2", "strategy.schedule=zero-bubble", "strategy.accumulate_grad_batches=4"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """Qwen2: its queries, keys and values have biases, and its embedding is the head's."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=TYPES, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(Subwords.train([text.read_bytes()], TYPES).state()["model"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def overrides(folder: Path, text: Path) -> list[str]:
    return [
        f"init_from={folder}", "data=text", f"data.path={text}", "sequence=16", "global_batch=8", f"max_steps={STEPS}",
        "precision=fp64", "optim=adamw", "optim.lr=0.03", "optim.warmup=0", "optim.schedule=constant", "clip=0.5",
        "log_every=1", "val_every=1000", "logger=csv", "device=cpu", "sample_tokens=2", "data.ignore=['Ġ']", "adapter=lora",
        "adapter.rank=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    asked = [*overrides(folder, text), "model.dropout=0.1", "adapter.dropout=0.2", "adapter.rank_stabilized=true"]
    for processes in (1, 2):
        run_all({root / name: [*asked, *plan] for name, (count, plan) in PLANS.items() if count == processes}, processes)
    return {name: root / name for name in PLANS}


@pytest.mark.timeout(420)
@pytest.mark.parametrize("plan", PLANS)
def test_same_curve(plan: str, runs: dict[str, Path]) -> None:
    assert len(losses(runs[plan])) == STEPS
    assert losses(runs[plan]) == pytest.approx(losses(runs["single"]), abs=1e-9)
    assert losses(runs[plan])[-1] < losses(runs[plan])[0] - 0.1


def test_as_peft_trains(folder: Path, text: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    asked = [*overrides(folder, text), "adapter.targets=[attention.query,attention.out,mlp.*]", "adapter.alpha=12"]
    run_all({tmp_path: asked})
    settings = check(composed(*(each for each in asked if not each.startswith("adapter"))))
    prepared = tokens(settings)
    net = build.parallel_model(settings.config, settings.plan, TYPES, str(folder)).net
    targets = r"blocks\.\d+\.(attention\.(query|out)|mlp\..*)"
    lora = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.0)
    theirs: Any = peft.inject_adapter_in_model(lora, net)
    trained = {name: each for name, each in theirs.named_parameters() if each.requires_grad}
    draws = build.model(check(composed(*asked)).config, settings.plan, TYPES)
    for name, parameter in trained.items():  # blocks.0.mlp.up.lora_A.default.weight
        layer, _, matrix = name.removesuffix(".default.weight").partition(".lora_")
        parameter.data = initial(draws, settings.config.seed, f"{layer}.adapter.{matrix.lower()}", parameter)
    assert sum(each.numel() for each in trained.values()) == Run(tmp_path).results()["trained_parameters"]
    optimizer = torch.optim.AdamW(trained.values(), lr=0.03, betas=(0.9, 0.95), weight_decay=0.1)
    curve = []
    batches = iter(training_batches(settings, prepared, net))
    for _ in range(STEPS):
        batch = next(batches)
        logits, _ = theirs(batch.input)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="sum")
        loss = nats / batch.step_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    assert losses(tmp_path) == pytest.approx(curve, abs=1e-9)
