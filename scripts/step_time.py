"""Time of one optimizer step: leanlm beside nanoGPT, Hugging Face's Trainer and a bare torch loop, in one run.

    python scripts/step_time.py --nanogpt CHECKOUT [--rounds 3] [--steps 150]

The work is nanoGPT's CPU line (Tiny Shakespeare, 4 layers, width 128, 12 x 64). Every contender runs in a process of its
own; rounds alternate between them, so that a busy machine disturbs all alike. Also compares the losses of the first 50
steps of leanlm and of nanoGPT's model and optimizer from the same weights and batches. Needs LEANLM_DATA or a network,
and the dev dependencies.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --lr_decay_iters=2000 --dropout=0.0"
)
RUN = ["experiment=nanogpt_cpu", "device=cpu", "val_every=100000", "checkpoint_every=100000"]


def configure(*overrides: str):
    from hydra import compose, initialize_config_dir

    from leanlm.common.files import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*RUN, *overrides])


def leanlm(steps: int, folder: Path, *overrides: str) -> list[float]:
    """Milliseconds of each step of a whole run: progress, records, loggers and all."""

    import leanlm.training.fit as module
    from leanlm.config.checks import check
    from leanlm.training.callbacks.record import Record

    times = []

    class Timed(Record):
        def on_train_start(self, *args):
            super().on_train_start(*args)
            self.last = time.perf_counter()

        def on_train_batch_start(self, *args):
            if len(times) == steps - 1:
                self.validated = steps  # no validation at the end: it is not measured here

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            now = time.perf_counter()
            times.append((now - self.last) * 1e3)
            self.last = now

    module.Record = Timed
    config = configure(f"max_steps={steps}", *overrides)
    module.fit(check(config), folder / "run")
    return times


def bare(steps: int, folder: Path) -> list[float]:
    """The same model, data and optimizer in a plain loop."""
    import torch
    import torch.nn.functional as F

    from leanlm.config.checks import check
    from leanlm.optimizers import build as optimizers
    from leanlm.optimizers import settings as optim
    from leanlm.training import build
    from leanlm.training.data import tokens, training_batches

    settings = check(configure())
    prepared = tokens(settings)
    net = build.parallel_model(settings.config, settings.plan, prepared.tokenizer.vocabulary).net
    optimizer = optimizers.build(net.named_parameters(), settings.config.optim)
    batches, times = iter(training_batches(settings, prepared, net)), []
    last = time.perf_counter()
    for step in range(steps):
        batch = next(batches)
        loss = F.cross_entropy(net(batch.input)[0].flatten(0, 1), batch.target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * optim.factor(settings.config.optim, step, 2000)
        optimizer.step()
        now = time.perf_counter()
        times.append((now - last) * 1e3)
        last = now
    return times


def trainer(steps: int, folder: Path) -> list[float]:
    """Hugging Face's Trainer with its GPT-2 of the same sizes."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    from leanlm.config.checks import check
    from leanlm.training.data import tokens

    text = tokens(check(configure())).splits["train"]

    class Windows(torch.utils.data.Dataset):
        def __len__(self):
            return len(text) // 64 - 1

        def __getitem__(self, i):
            window = torch.from_numpy(np.asarray(text[i * 64 : i * 64 + 64]).astype(np.int64))
            return {"input_ids": window, "labels": window}

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.last = getattr(self, "last", time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            times.append((now - self.last) * 1e3)
            self.last = now

    zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=65, n_positions=64, n_embd=128, n_layer=4, n_head=4, **zero))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), use_cpu=True, per_device_train_batch_size=12, max_steps=steps, learning_rate=1e-3,
        lr_scheduler_type="cosine", warmup_steps=100, weight_decay=0.1, logging_steps=10, save_strategy="no", report_to="none",
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Windows(), callbacks=[Clock()]).train()
    return times


def prepare_nanogpt(checkout: Path, folder: Path) -> Path:
    """A copy of the checkout with the data in its place."""
    from leanlm.data.corpus import tinyshakespeare

    copy = folder / "nanogpt"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    data = copy / "data" / "shakespeare_char"
    shutil.copy(tinyshakespeare().splits["train"][0].path, data / "input.txt")
    (data / "requests.py").touch()  # prepare.py imports it to download what is there already
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    return copy


def nanogpt(steps: int, copy: Path) -> list[float]:
    """Its own training script, by its own clock."""
    done = subprocess.run(
        [sys.executable, "train.py", *NANOGPT.split(), f"--max_iters={steps}"],
        cwd=copy,
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(ms) for ms in re.findall(r"^iter [1-9]\d*: .* time ([\d.]+)ms", done.stdout, re.MULTILINE)]


def same_losses(copy: Path, folder: Path) -> float:
    """Largest difference of 50 losses: nanoGPT's model, optimizer and clipping in a loop, and a run of leanlm."""
    import torch

    from leanlm.common.run_folder import Run
    from leanlm.config.checks import check
    from leanlm.optimizers import settings as optim
    from leanlm.training import build
    from leanlm.training.data import tokens, training_batches

    run = folder / "fifty"
    leanlm(50, run, "log_every=1")
    sys.path.insert(0, str(copy))
    from model import GPT, GPTConfig

    settings = check(configure())
    prepared = tokens(settings)
    net = build.parallel_model(settings.config, settings.plan, prepared.tokenizer.vocabulary).net
    gpt = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False))
    source, target = dict(net.named_parameters()), dict(gpt.named_parameters())
    pairs = {"transformer.wte.weight": "embed.tokens.weight", "transformer.wpe.weight": "embed.positions.weight"}
    pairs["transformer.ln_f.weight"] = "head.norm.weight"
    with torch.no_grad():
        for i in range(4):
            at, to = f"blocks.{i}.", f"transformer.h.{i}."
            qkv = [source[f"{at}attention.{part}.weight"] for part in ("query", "key", "value")]
            target[f"{to}attn.c_attn.weight"].copy_(torch.cat(qkv))
            pairs |= {
                f"{to}attn.c_proj.weight": f"{at}attention.out.weight",
                f"{to}mlp.c_fc.weight": f"{at}mlp.up.weight",
            }
            pairs |= {
                f"{to}mlp.c_proj.weight": f"{at}mlp.down.weight",
                f"{to}ln_1.weight": f"{at}attention_norm.weight",
            }
            pairs[f"{to}ln_2.weight"] = f"{at}mlp_norm.weight"
        for theirs, ours in pairs.items():
            target[theirs].copy_(source[ours])
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    batches, curve = iter(training_batches(settings, prepared, net)), []
    for step in range(50):
        batch = next(batches)
        loss = gpt(batch.input, batch.target)[1]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * optim.factor(settings.config.optim, step, 50)
        optimizer.step()
        curve.append(loss.item())
    ours = [row["train_loss"] for row in Run(run / "run").rows()]
    return max(abs(a - b) for a, b in zip(ours, curve, strict=True))


WORKERS = {
    "bare torch loop": lambda steps, folder: bare(steps, folder),
    "HF Trainer": lambda steps, folder: trainer(steps, folder),
    "leanlm": lambda steps, folder: leanlm(steps, folder),
    "leanlm bf16-mixed": lambda steps, folder: leanlm(steps, folder, "precision=bf16-mixed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.worker == "losses":
            print("RESULT", json.dumps(same_losses(asked.nanogpt, folder)))
            return
        if asked.worker:
            print("RESULT", json.dumps(WORKERS[asked.worker](asked.steps, folder)))
            return
        copy = prepare_nanogpt(asked.nanogpt, folder)

        def worker(which: str):
            command = [sys.executable, __file__, "--nanogpt", str(copy), "--worker", which, "--steps", str(asked.steps)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            return json.loads(done.stdout.split("RESULT ")[1])

        medians: dict[str, list[float]] = {}
        for _ in range(asked.rounds):
            for which in ("nanoGPT", *WORKERS):
                times = nanogpt(asked.steps, copy) if which == "nanoGPT" else worker(which)
                medians.setdefault(which, []).append(statistics.median(times[10:]))  # the first ones warm up
        difference = worker("losses")

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(medians[a], medians[b], strict=True))

    table = Table("", "ms a step (each round)", "median", "of nanoGPT's")
    for which, values in medians.items():
        each = "  ".join(f"{value:.1f}" for value in values)
        table.add_row(which, each, f"{statistics.median(values):.1f}", f"{ratio(which, 'nanoGPT'):.2f}x")
    console = Console(width=100)
    console.print(table)
    for text, value, limit in (
        ("leanlm / nanoGPT, float32", ratio("leanlm", "nanoGPT"), 0.95),
        ("leanlm bf16-mixed / nanoGPT float32", ratio("leanlm bf16-mixed", "nanoGPT"), 0.77),
        ("leanlm / bare torch loop", ratio("leanlm", "bare torch loop"), 1.05),
        ("leanlm / HF Trainer", ratio("leanlm", "HF Trainer"), 0.7),
    ):
        console.print(f"{text}: {value:.3f}, demanded at most {limit}: {'met' if value <= limit else 'NOT met'}")
    met = "met" if difference <= 1e-4 else "NOT met"
    console.print(f"largest difference of 50 losses from nanoGPT's: {difference:.1e}, demanded at most 1e-4: {met}")


if __name__ == "__main__":
    main()
