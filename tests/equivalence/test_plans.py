"""The heart of the project: under every plan, every model has the curve and the weights of a plain loop, to 1e-9.

Float64, 20 steps, dropout 0.1, clipping active, tied embeddings, AdamW and Muon, and uncounted tokens that make the
counts of the micro-batches unequal. The reference is a loop of plain torch, in this file.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import composed
from runner import final_weights, losses, run_all

from leanlm import build
from leanlm.config import Settings, check
from leanlm.models.dropout import rows_of_step
from leanlm.module import LanguageModel
from leanlm.prepare import tokens

STEPS, ROWS = 20, 8
MODELS = {
    "elman_tanh": ["model=elman", "model.width=12", "model.depth=2"],
    "elman_relu": ["model=elman", "model.cell=elman_relu", "model.width=12"],
    "lstm": ["model=lstm", "model.width=12", "model.depth=2"],
    "lstm_token_dropout": ["model=lstm", "model.width=12", "model.depth=2", "model.locked=false"],
    "gru": ["model=gru", "model.width=12", "model.depth=2"],
    "gpt2": ["model=gpt2", "model.width=16", "model.depth=2", "model.heads=2"],
    "modern": ["model=transformer", "model.width=16", "model.depth=2", "model.heads=4", "model.kv_heads=2"],
    "llama": ["model=llama", "model.width=16", "model.depth=2", "model.heads=2", "model.kv_heads=1", "model.mlp_width=24"],
    "muon": ["model=transformer", "model.width=16", "model.depth=2", "model.heads=2", "optim=muon"],
    "lstm_muon": ["model=lstm", "model.width=12", "model.depth=2", "optim=muon"],
}  # fmt: skip
ONE_PROCESS = {"accumulate 2": [2, 1], "accumulate 4": [4, 1], "a row at a time": [ROWS, 1]}
SEVERAL = {"ddp 2": [1, 2], "ddp 2, accumulate 2": [2, 2], "ddp 4": [1, 4]}


def overrides(model: str, text: Path, accumulate: int = 1, replicate: int = 1) -> list[str]:
    optim = [] if "muon" in model else ["optim=adamw"]
    return [
        *MODELS[model], *optim, "optim.lr=0.01", "optim.warmup=5", "model.tied=true", "model.dropout=0.1",
        "data=text", f"data.path={text}", "data.tokenizer=char", "data.ignore=[' ',e]", f"global_batch={ROWS}", "sequence=12",
        f"max_steps={STEPS}", "log_every=1", "clip=0.1", "strategy.precision=fp64", "device=cpu", "logger=csv", "val_lanes=4",
        f"strategy.accumulate_grad_batches={accumulate}", f"strategy.replicate={replicate}",
    ]  # fmt: skip


def settings(model: str, text: Path) -> Settings:
    return check(composed(*overrides(model, text)))


def plain_loop(settings: Settings) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """No Lightning, no plan, no chunks: the definition of a run. Returns losses, weights and gradient norms."""
    config = settings.config
    data = tokens(settings)
    net = build.model(config, settings.plan, data.tokenizer.vocabulary)
    named = list(net.named_parameters())
    hidden = [p for n, p in named if config.optim.name == "muon" and p.dim() == 2 and n.startswith("blocks.")]
    rest = [p for _, p in named if not any(p is h for h in hidden)]
    decay = [
        {"params": [p for p in rest if p.dim() > 1]},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0},
    ]
    optimizers = [torch.optim.AdamW([g for g in decay if g["params"]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)]
    optimizers += [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1)] if hidden else []
    peaks = [(g, g["lr"]) for o in optimizers for g in o.param_groups]
    curve, norms, states = [], [], None
    batches = iter(build.training_batches(settings, data, net))
    for step in range(STEPS):
        batch = next(batches)
        for o in optimizers:
            o.zero_grad()
        with rows_of_step(config.seed, step, torch.arange(ROWS)):
            logits, states = net(batch.input, None if batch.fresh or not net.carries_state else states)
        if net.carries_state:
            states = [tuple(part.detach() for part in state) for state in states]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=-100)  # a mean over counted tokens
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)))
        for group, peak in peaks:
            group["lr"] = peak * rate(config.optim.schedule, step)
        for o in optimizers:
            o.step()
        curve.append(loss.item())
    return curve, {n: p.detach() for n, p in named}, norms


def rate(schedule: str, step: int) -> float:
    """Warm-up of 5 steps; then cosine to 0.1, or constant until the last 40% fall to 0."""
    if step < 5:
        return (step + 1) / 5
    if schedule == "wsd":
        return min(1.0, (20 - step) / 8)
    return 0.1 + 0.9 * (1 + float(torch.cos(torch.tensor((step - 5) / 15 * torch.pi, dtype=torch.float64)))) / 2


@pytest.fixture(scope="module")
def references(text: Path) -> dict[str, tuple]:
    return {model: plain_loop(settings(model, text)) for model in MODELS}


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every model under every plan; (model, plan) -> folder of the run."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for processes in (1, 2, 4):
        jobs = {}
        for plan, (accumulate, replicate) in {"single": [1, 1], **ONE_PROCESS, **SEVERAL}.items():
            if replicate == processes:
                for model in MODELS:
                    path = found[model, plan] = root / f"{model}-{plan}"
                    jobs[path] = overrides(model, text, accumulate, replicate)
        run_all(jobs, processes)
    return found


@pytest.mark.timeout(420)
@pytest.mark.parametrize("plan", ["single", *ONE_PROCESS, *SEVERAL])
@pytest.mark.parametrize("model", MODELS)
def test_same_curve_and_weights(model: str, plan: str, text: Path, references, runs) -> None:
    curve, weights, norms = references[model]
    got = losses(runs[model, plan])
    assert len(got) == STEPS
    assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) < 1e-9
    found = final_weights(runs[model, plan], settings(model, text))
    assert found.keys() == weights.keys()
    assert max((found[name] - weights[name]).abs().max().item() for name in weights) < 1e-9
    assert curve[-1] < curve[0] - 0.02, "the run learns"
    assert sum(norm > 0.1 for norm in norms) > 3, "clipping is active"


def test_counts_are_unequal(text: Path) -> None:
    """Without this, a mean of means would pass the tests above."""
    config = check(composed(*overrides("gpt2", text, accumulate=4)))
    data = tokens(config)
    net = build.model(config.config, config.plan, data.tokenizer.vocabulary)
    micros = list(build.training_batches(config, data, net).step(0))
    counts = [(micro.target != -100).sum().item() for micro in micros]
    assert len(set(counts)) > 1
    assert {micro.step_tokens for micro in micros} == {sum(counts)}


@pytest.mark.parametrize("wrong", ["missing 1/n", "mean of means"])
def test_the_comparison_catches_a_wrong_normalisation(wrong: str, text: Path, tmp_path: Path, monkeypatch) -> None:
    right = LanguageModel.training_step

    def broken(self: LanguageModel, batch, index: int) -> torch.Tensor:
        loss = right(self, batch, index)
        if wrong == "missing 1/n":
            return loss * self.plan.accumulate_grad_batches
        return loss * batch.step_tokens / (self.plan.accumulate_grad_batches * (batch.target != -100).sum())

    sgd = ["optim=sgd", "optim.lr=0.5", "clip=0"]  # AdamW hides a wrong factor
    run_all({tmp_path / "right": [*overrides("gpt2", text, accumulate=2), *sgd]})
    monkeypatch.setattr(LanguageModel, "training_step", broken)
    run_all({tmp_path / "wrong": [*overrides("gpt2", text, accumulate=2), *sgd]})
    got, curve = losses(tmp_path / "wrong"), losses(tmp_path / "right")
    assert max(abs(a - b) for a, b in zip(got, curve, strict=True)) > 1e-4
