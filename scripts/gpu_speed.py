"""One GPU: steps of leanlm beside those of nanoGPT and of plain torch loops, and what the planner said of them beforehand.

    python scripts/gpu_speed.py --predict h100 --into scripts/results/gpu_speed.json     simulates our cases: needs no GPU
    python scripts/gpu_speed.py --nanogpt CHECKOUT --into scripts/results/gpu_speed.json    runs all cases: some 9 minutes
    python scripts/gpu_speed.py --into scripts/results/gpu_speed.json                    prints the table

Where leanlm is not installed, PYTHONPATH must name its `src`. Every case is a process of its own; `--only NAME ...` runs some.
Steps are those of training, with clipping at 1 and AdamW, 8 to warm up and 20 timed. Tokens are random; bytes are the most that
torch's allocator had given out; MFU is 6N and attention (12 L h T for GPT-2) a token, of the data sheet's bf16 rate. nanoGPT is
karpathy/nanoGPT (3adf61e).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

GPT2 = ["model=gpt2", "optim=adamw", "sequence=1024", "precision=bf16-mixed", "clip=1"]
COMPILED = [*GPT2, "strategy.compile=true"]
LSTM = ["model=lstm", "model.width=1024", "model.depth=2", "model.tied=false", "optim=adamw", "sequence=128", "global_batch=64"]
BILLION = ["model=llama", "model.width=2048", "model.depth=18", "model.heads=16", "model.kv_heads=8", "model.mlp_width=5632",
           "optim=adamw", "sequence=2048", "global_batch=8", "precision=bf16-mixed", "strategy.compile=true"]  # fmt: skip
TYPES, WORDS, LLAMA = 50304, 33278, 32000  # token types
OURS: dict[str, tuple[list[str], int]] = {  # overrides and token types
    "12 x 1024, compiled": ([*COMPILED, "global_batch=12"], TYPES),
    "32 x 1024, compiled": ([*COMPILED, "global_batch=32"], TYPES),
    "12 x 1024, eager": ([*GPT2, "strategy.compile=false", "global_batch=12"], TYPES),
    "4 x 12 x 1024, compiled": ([*COMPILED, "global_batch=48", "strategy.accumulate_grad_batches=4"], TYPES),
    "12 x 1024, compiled, no optimizer": ([*COMPILED, "global_batch=12"], TYPES),
    "12 x 1024, compiled, dropout 0.1": ([*COMPILED, "global_batch=12", "model.dropout=0.1"], TYPES),
    "12 x 1024, compiled, recompute=blocks": ([*COMPILED, "global_batch=12", "strategy.recompute=blocks"], TYPES),
    "12 x 1024, compiled, Muon": ([*(part.replace("adamw", "muon") for part in COMPILED), "global_batch=12"], TYPES),
    "LSTM, fp32": ([*LSTM, "precision=fp32"], WORDS),
    "LSTM, bf16": ([*LSTM, "precision=bf16-mixed"], WORDS),
    "1B, 8 x 2048, compiled": (BILLION, LLAMA),
}  # fmt: skip
THEIRS = {
    "nanoGPT 12 x 1024, compiled": (12, True),
    "nanoGPT 32 x 1024, compiled": (32, True),
    "nanoGPT 12 x 1024, eager": (12, False),
    "plain LSTM, fp32": "float32",
    "plain LSTM, bf16": "bfloat16",
}
WHOLE = ("start, cold", "start, warm", "nanoGPT shakespeare", "shakespeare_gpu")  # whole processes
RATIOS = [  # what, case, beside which, what is compared, how often, at most
    ("12 x 1024 compiled / nanoGPT compiled", "12 x 1024, compiled", "nanoGPT 12 x 1024, compiled", "ms", 1, 0.9),
    ("32 x 1024 compiled / nanoGPT compiled", "32 x 1024, compiled", "nanoGPT 32 x 1024, compiled", "ms", 1, 0.9),
    ("peak allocated at 12 x 1024 / nanoGPT's", "12 x 1024, compiled", "nanoGPT 12 x 1024, compiled", "MiB", 1, 0.7),
    ("peak allocated at 32 x 1024 / nanoGPT's", "32 x 1024, compiled", "nanoGPT 32 x 1024, compiled", "MiB", 1, 0.7),
    ("12 x 1024 eager / nanoGPT eager", "12 x 1024, eager", "nanoGPT 12 x 1024, eager", "ms", 1, 1.0),
    ("4 micro-batches / 4 without optimizer", "4 x 12 x 1024, compiled", "12 x 1024, compiled, no optimizer", "ms", 4, 1.02),
    ("dropout 0.1 / none", "12 x 1024, compiled, dropout 0.1", "12 x 1024, compiled", "ms", 1, 1.05),
    ("recompute=blocks / none", "12 x 1024, compiled, recompute=blocks", "12 x 1024, compiled", "ms", 1, 1.3),
    ("Muon / AdamW", "12 x 1024, compiled, Muon", "12 x 1024, compiled", "ms", 1, 1.15),
    ("LSTM 1024 x 2, 64 x 128, float32 / plain loop", "LSTM, fp32", "plain LSTM, fp32", "ms", 1, 1.0),
    ("the same, bf16 / plain loop", "LSTM, bf16", "plain LSTM, bf16", "ms", 1, 1.0),
]  # fmt: skip


def settled(overrides: list[str], tokens: Path) -> Any:
    from measure import composed

    from leanlm.config.checks import check

    text = [
        "data=text",
        f"data.path={tokens}",
        "data.tokenizer=byte",
        "val_every=100000",
        "checkpoint_every=100000",
        "logger=csv",
    ]
    return check(composed([*text, *overrides]))


def mfu(operations: float, seconds: float) -> float:
    from torch.cuda import get_device_name

    from leanlm.config.device_sheets import sheet

    return operations / seconds / float(sheet(get_device_name())["flops"]["bfloat16"])


def ours(name: str, text: Path, warm: int = 8, timed: int = 20) -> dict[str, Any]:
    """A training run in this process."""
    import lightning.pytorch as pl
    import numpy as np
    import torch

    from leanlm.data.prefetch import prefetched
    from leanlm.launch.ranks import process_group
    from leanlm.training import build
    from leanlm.training.data import training_batches
    from leanlm.training.data import whole_split as prepare

    overrides, types = OURS[name]
    settings = settled([*overrides, "device=cuda"], text)

    class Clock(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.begin = time.perf_counter()
            if name.endswith("no optimizer"):
                trainer.optimizers[0].step = lambda closure=None: closure()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if batch.micro < module.plan.batches_per_step - 1 or batch.step + 1 not in (1, warm, warm + timed):
                return
            torch.cuda.synchronize()
            now = time.perf_counter()
            if batch.step == 0:
                self.first = now - self.begin
            elif batch.step + 1 == warm:
                torch.cuda.reset_peak_memory_stats()
                self.begin = now
            else:
                self.seconds = (now - self.begin) / timed

    with process_group("cuda"):
        prepared, clock = prepare(settings), Clock()
        prepared.splits["train"] = np.random.default_rng(0).integers(0, types, 4_000_000).astype(np.uint16)
        parallel = build.parallel_model(settings.config, settings.plan, types)
        operations = _operations(settings, types)
        module = build.module(settings, parallel)
        with closing(prefetched(training_batches(settings, prepared, parallel.net), parallel.device)) as batches:
            build.trainer(settings, [clock], [], warm + timed).fit(module, batches)
    rows = settings.config.global_batch
    return {
        "ms": 1000 * clock.seconds,
        "tokens/s": rows * settings.config.sequence / clock.seconds,
        "mfu": mfu(operations * rows, clock.seconds),
        "MiB": torch.cuda.max_memory_allocated() / 2**20,
        "first step, s": clock.first,
    }


def _operations(settings: Any, types: int) -> float:
    """Of a row, forward and backward."""
    from leanlm.models.contract import without_storage
    from leanlm.strategies.balance import costs
    from leanlm.training import build

    with without_storage():
        return 3 * sum(costs(build.model(settings.config, settings.plan, types)).values())


def nanogpt(name: str, checkout: Path, warm: int = 8, timed: int = 20) -> dict[str, Any]:
    """Its model, its optimizer and the loop of its train.py in this process."""
    import numpy as np
    import torch

    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    rows, compiled = THEIRS[name]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    data = np.random.default_rng(0).integers(0, TYPES, 4_000_000).astype(np.uint16)
    net = GPT(GPTConfig(block_size=1024, vocab_size=TYPES, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True)).cuda()
    optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cuda")
    forward = torch.compile(net) if compiled else net

    def batch() -> tuple[Any, Any]:
        starts = torch.randint(len(data) - 1025, (rows,))
        found = [
            torch.stack([torch.from_numpy(data[i + by : i + by + 1024].astype(np.int64)) for i in starts]) for by in (0, 1)
        ]
        return tuple(part.pin_memory().cuda(non_blocking=True) for part in found)

    begin, first, now = time.perf_counter(), 0.0, batch()
    for step in range(1, warm + timed + 1):
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = forward(*now)
        now = batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (1, warm):
            torch.cuda.synchronize()
            first = first or time.perf_counter() - begin
            torch.cuda.reset_peak_memory_stats()
            since = time.perf_counter()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - since) / timed
    operations = rows * 1024 * (6 * net.get_num_params() + 12 * 12 * 768 * 1024)
    return _figures(seconds, rows * 1024, operations, first)


def plain_lstm(name: str, warm: int = 8, timed: int = 20) -> dict[str, Any]:
    """An LSTM of torch's modules in a plain loop, with all logits at once."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    embed, rnn, head = nn.Embedding(WORDS, 1024), nn.LSTM(1024, 1024, 2, batch_first=True), nn.Linear(1024, WORDS)
    parameters = [part for net in (embed, rnn, head) for part in net.cuda().parameters()]
    optimizer, state, begin, first = torch.optim.AdamW(parameters, 1e-3, fused=True), None, time.perf_counter(), 0.0
    text = torch.randint(WORDS, (64, 129), device="cuda")
    for step in range(1, warm + timed + 1):
        with torch.autocast("cuda", torch.bfloat16, enabled=THEIRS[name] == "bfloat16"):
            hidden, state = rnn(embed(text[:, :-1]), state)
            loss = F.cross_entropy(head(hidden).flatten(0, 1), text[:, 1:].flatten())
        state = tuple(part.detach() for part in state)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step in (1, warm):
            torch.cuda.synchronize()
            first = first or time.perf_counter() - begin
            torch.cuda.reset_peak_memory_stats()
            since = time.perf_counter()
    torch.cuda.synchronize()
    operations = 64 * 128 * 6 * (2 * 8 * 1024 * 1024 + 1024 * WORDS)
    return _figures((time.perf_counter() - since) / timed, 64 * 128, operations, first)


def _figures(seconds: float, tokens: int, operations: float, first: float) -> dict[str, Any]:
    import torch

    return {
        "ms": 1000 * seconds,
        "tokens/s": tokens / seconds,
        "mfu": mfu(operations, seconds),
        "MiB": torch.cuda.max_memory_allocated() / 2**20,
        "first step, s": first,
    }


def start(name: str, folder: Path) -> dict[str, Any]:
    """Seconds from the start of a process to the end of its first step, compiled; `warm` finds what `cold` has compiled."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    text = folder / "text.txt"
    overrides = ["data=text", f"data.path={text}", "data.tokenizer=byte", *COMPILED, "global_batch=12", "max_steps=1",
                 "log_every=1", "sample_tokens=0", "logger=csv", "device=cuda", f"run_dir={folder}/{name[7:]}"]  # fmt: skip
    begin = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "leanlm.train", *overrides], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/1") and "tokens/s" in line:
            seconds = time.time() - begin
    if process.wait():
        raise RuntimeError(f"{name}: exit status {process.returncode}")
    return {"seconds": seconds}


def shakespeare(folder: Path) -> dict[str, Any]:
    """Training clock and validation loss of our experiment, whole validation set; needs LEANLM_DATA or a network."""
    path = folder / "shakespeare"
    subprocess.run(
        [sys.executable, "-m", "leanlm.train", "experiment=shakespeare_gpu", f"run_dir={path}", "logger=csv"], check=True
    )
    found = json.loads((path / "result.json").read_text())
    return {"seconds": found["seconds"], "loss": found["loss"]}


def nanogpt_shakespeare(checkout: Path, folder: Path) -> dict[str, Any]:
    """nanoGPT's own line for one GPU: the best of its estimates, and seconds of its iterations up to it, by its own clock."""
    import re

    from step_time import prepare_nanogpt

    copy = prepare_nanogpt(checkout, folder)
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", "--log_interval=1"]
    done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    clock, best = 0.0, (float("inf"), 0.0)
    for line in done.stdout.splitlines():
        if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
            best = min(best, (float(found[1]), clock))
        if found := re.match(r"iter \d+: loss [\d.]+, time ([\d.]+)ms", line):
            clock += float(found[1]) / 1000
    return {"seconds": best[1], "loss": best[0]}


def predict(card: str, text: Path) -> dict[str, Any]:
    """What the planner says of our cases on a card, and of compiled nanoGPT, which ours is with all logits at once."""
    from unittest import mock

    from omegaconf import OmegaConf

    from leanlm.common.files import CONF
    from leanlm.memory import chunks
    from leanlm.planning.hardware.devices import of_config
    from leanlm.planning.predict import predict

    def said(overrides: list[str], types: int) -> Any:
        return predict(settled([*overrides, "device=cpu"], text), types, of_config(node)).fullest

    node: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF, "device", f"{card}.yaml")))
    found = {}
    needs = {name: partial(said, *case) for name, case in OURS.items()}
    for name, rows in ((name, how[0]) for name, how in THEIRS.items() if how[1] is True):
        needs[name] = partial(said, [*COMPILED, f"global_batch={rows}"], TYPES)
    for name, ask in needs.items():
        with mock.patch("leanlm.memory.chunks.LEAST", 1 << 40 if name.startswith("nanoGPT") else chunks.LEAST):
            need = ask()
        tensors = sum(size for part, size in need.parts.items() if part not in ("allocator", "context"))
        seconds = need.seconds - (need.optimizer if name.endswith("no optimizer") else 0)
        found[name] = {"ms": 1000 * seconds, "MiB": tensors / 2**20}
        print(name, found[name], flush=True)
    return found


def table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    measured, predicted = results.get("measured", {}), results.get("predicted", {})
    cases = Table(title=f"{results.get('card', 'not yet run on a GPU')}; predicted for {results.get('sheet', 'none')}")
    for column in ("case", "ms", "tokens/s", "MFU", "MiB", "first step", "predicted ms", "MiB"):
        cases.add_column(column, justify="left" if column == "case" else "right")
    for name in [*OURS, *THEIRS]:
        one, said = measured.get(name, {}), predicted.get(name, {})
        cases.add_row(name, *(format(one[key], form) if key in one else "" for key, form in (
            ("ms", ".1f"), ("tokens/s", ",.0f"), ("mfu", ".1%"), ("MiB", ",.0f"), ("first step, s", ".0f"))),
            *(format(said[key], form) if key in said else "" for key, form in (("ms", ".1f"), ("MiB", ",.0f"))))  # fmt: skip
    ratios = Table(title="side by side")
    for column in ("what", "ratio", "at most"):
        ratios.add_column(column)
    for what, case, beside, key, times, most in RATIOS:
        both = measured.get(case, {}).get(key), measured.get(beside, {}).get(key)
        ratios.add_row(what, f"{both[0] / both[1] / times:.2f}" if all(both) else "not yet run", str(most))
    for name in WHOLE:
        ratios.add_row(name, json.dumps(measured[name]) if name in measured else "not yet run", "")
    Console(width=130).print(cases, ratios)


def run_here(name: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    text = folder / "text.txt"
    if name in OURS:
        return ours(name, text)
    if name.startswith("start"):
        return start(name, folder)
    if name == "shakespeare_gpu":
        return shakespeare(folder)
    if name == "nanoGPT shakespeare":
        return nanogpt_shakespeare(asked.nanogpt, folder)
    return nanogpt(name, asked.nanogpt) if name.startswith("nanoGPT") else plain_lstm(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--predict", metavar="CARD", help="of conf/device")
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print("RESULT", json.dumps(run_here(asked.case, asked, asked.folder)), flush=True)
        return
    results = json.loads(asked.into.read_text()) if asked.into.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20000)
        if asked.predict:
            results |= {"sheet": asked.predict, "predicted": predict(asked.predict, Path(folder) / "text.txt")}
        names = [name for name in [*OURS, *THEIRS, *WHOLE] if asked.only is None or name in asked.only]
        for name in names if asked.nanogpt else ():
            begin = time.time()
            command = [sys.executable, __file__, "--case", name, "--folder", folder, "--into", str(asked.into)]
            done = subprocess.run(
                [*command, "--nanogpt", str(asked.nanogpt.resolve())], capture_output=True, text=True, timeout=300
            )
            found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if found:
                import torch

                results["card"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
                results.setdefault("measured", {})[name] = json.loads(found[-1].removeprefix("RESULT "))
            print(f"[{time.time() - begin:.0f} s] {name}: {found[-1] if found else done.stderr[-1500:]}", flush=True)
            asked.into.parent.mkdir(parents=True, exist_ok=True)
            asked.into.write_text(json.dumps(results, indent=1))
    asked.into.parent.mkdir(parents=True, exist_ok=True)
    asked.into.write_text(json.dumps(results, indent=1))
    table(results)


if __name__ == "__main__":
    main()
