"""The definition of a run as a loop of plain torch, and small configurations to compare with it.

Float64, 10 steps of which 5 warm up, dropout 0.1, clipping active, tied embeddings, AdamW and Muon, and uncounted tokens that
make the counts of the micro-batches unequal.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import composed

from leanlm.config.checks import check
from leanlm.config.schema import Settings
from leanlm.models.dropout import draw, row_keys, sites
from leanlm.strategies.schedules import SCHEDULES
from leanlm.training import build
from leanlm.training.data import tokens, training_batches

STEPS, ROWS = 10, 8
MODELS = {
    "elman_tanh": ["model=elman", "model.width=12", "model.depth=2"],
    "elman_relu": ["model=elman", "model.cell=elman_relu", "model.width=12"],
    "lstm": ["model=lstm", "model.width=12", "model.depth=2"],
    "lstm_token_dropout": ["model=lstm", "model.width=12", "model.depth=2", "model.locked=false", "model.embedding=8"],
    "gru": ["model=gru", "model.width=12", "model.depth=2"],
    "gpt2": ["model=gpt2", "model.width=16", "model.depth=2", "model.heads=2"],
    "modern": ["model=transformer", "model.width=16", "model.depth=2", "model.heads=4", "model.kv_heads=2"],
    "llama": ["model=llama", "model.width=16", "model.depth=2", "model.heads=4", "model.kv_heads=2", "model.mlp_width=24"],
    "muon": ["model=transformer", "model.width=16", "model.depth=2", "model.heads=2", "optim=muon"],
    "lstm_muon": ["model=lstm", "model.width=12", "model.depth=2", "optim=muon"],
    "adaptive": ["model=lstm", "model.width=16", "model.depth=2", "model.cutoffs=[6,14]", "model.tied=false"],
    "roberta": ["model=roberta", "objective=masked", "model.width=16", "model.depth=2", "model.heads=2"],
    "modernbert": ["model=modernbert", "objective=masked", "model.width=16", "model.depth=2", "model.heads=4",
                   "model.mlp_width=24", "model.window=4", "model.global_every=2"],
    "adafactor": ["model=gpt2", "model.width=16", "model.depth=2", "model.heads=2", "optim=adafactor"],
}  # fmt: skip


def supported(model: str, plan: dict) -> bool:
    """torch before 2.13 cannot split the backward pass of recurrent layers and of split matrices; leanlm refuses that there."""
    hard = model.startswith(("elman", "lstm", "gru", "adaptive")) or plan.get("tensor", 1) > 1
    return torch.__version__ >= "2.13" or not (hard and SCHEDULES[plan.get("schedule", "1f1b")].splits_backward)


def overrides(model: str, text: Path, plan: dict | None = None, depth: int | None = None) -> list[str]:
    optim = [] if any(part.startswith("optim=") for part in MODELS[model]) else ["optim=adamw"]
    return [
        "model.tied=true", *MODELS[model], *optim, f"optim.lr={0.05 if model == 'adafactor' else 0.01}", "optim.warmup=5",
        "model.dropout=0.1",
        "data=text", f"data.path={text}", "data.tokenizer=char", "data.ignore=[' ',e]",
        "data.validation=0.02", f"global_batch={ROWS}", "sequence=12",
        f"max_steps={STEPS}", "log_every=1", "clip=0.1", "precision=fp64", "device=cpu", "logger=csv", "val_lanes=4",
        "sample_tokens=2",
        *(f"strategy.{key}={value}" for key, value in (plan or {}).items()), *([f"model.depth={depth}"] if depth else []),
    ]  # fmt: skip


def settings(model: str, text: Path, depth: int | None = None) -> Settings:
    return check(composed(*overrides(model, text, depth=depth)))


def plain_loop(settings: Settings) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """No Lightning, no plan, no chunks: the definition of a run. Returns losses, weights and gradient norms."""
    config = settings.config
    prepared = tokens(settings)
    net = build.parallel_model(config, settings.plan, prepared.tokenizer.vocabulary).net
    named = list(net.named_parameters())
    hidden = [p for n, p in named if config.optim.name == "muon" and p.dim() == 2 and n.startswith("blocks.")]
    rest = [p for _, p in named if not any(p is h for h in hidden)]
    decay = [
        {"params": [p for p in rest if p.dim() > 1]},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0},
    ]
    if config.optim.name == "adafactor":
        optimizers: list[torch.optim.Optimizer] = [torch.optim.Adafactor(rest, lr=0.05)]
    else:
        optimizers = [torch.optim.AdamW([g for g in decay if g["params"]], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)]
    optimizers += [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1)] if hidden else []
    peaks = [(g, g["lr"]) for o in optimizers for g in o.param_groups]
    curve, norms, states = [], [], None
    batches = iter(training_batches(settings, prepared, net))
    for step in range(STEPS):
        batch = next(batches)
        for o in optimizers:
            o.zero_grad()
        draw(sites(net), row_keys(config.seed, step, torch.arange(ROWS), sites(net)))
        logits, states = net(batch.input, None if batch.fresh or not net.carries_state else states)
        if net.carries_state:
            states = [tuple(part.detach() for part in state) for state in states]
        if not (batch.target != -100).any():  # nothing to learn from
            curve.append(0.0)
            norms.append(0.0)
            continue
        loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), ignore_index=-100)  # a mean over counted tokens
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip or torch.inf)))
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
        return min(1.0, (STEPS - step) / (0.4 * STEPS))
    return 0.1 + 0.9 * (1 + float(torch.cos(torch.tensor((step - 5) / (STEPS - 5) * torch.pi, dtype=torch.float64)))) / 2
