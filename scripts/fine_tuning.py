"""Memory and time of fine-tuning a folder in Hugging Face's layout: leanlm beside transformers' Trainer and peft.

    python scripts/fine_tuning.py FOLDER [--steps 6] [--rounds 2] [--only full] [--into scripts/results/fine_tuning.json]

The work is the same for all: the first 90% of Tiny Shakespeare, 4 x 512 tokens a step, AdamW, bf16 autocast over float32
weights; LoRA of rank 8 on all linear layers. Trained in full, leanlm's plan computes every second block again in backward and
keeps the optimizer's state in a file; with LoRA it reads two micro-batches: that changes memory, not the curve. Every contender
runs in a process of its own, in turn; its peak is that of the resident memory of the whole process, its time the median of its
steps but the first. Needs LEANLM_DATA or a network, and the dev dependencies.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, SEQUENCE, RATE = 4, 512, 1e-4
PLANS = {
    "full": ["strategy.recompute=2", "strategy.offload=optimizer", "strategy.return_freed_memory=false"],
    "lora": ["strategy=accumulate", "strategy.accumulate_grad_batches=2", "strategy.return_freed_memory=false"],
}


def leanlm(folder: str, steps: int, lora: bool, into: str, plan: list[str]) -> list[float]:
    from hydra import compose, initialize_config_dir

    import leanlm.training.fit as module
    from leanlm.common.files import CONF
    from leanlm.config.checks import check
    from leanlm.config.resume import effective
    from leanlm.training.callbacks.record import Record

    times: list[float] = []

    class Timed(Record):
        def on_train_start(self, *args):
            super().on_train_start(*args)
            self.last = time.perf_counter()

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
            if batch.micro == module.plan.batches_per_step - 1:
                now = time.perf_counter()
                times.append(now - self.last)
                self.last = now
            self.validated = steps  # no validation at the end: it is not measured here

    module.Record = Timed
    asked = [
        f"init_from={folder}", "data=tinyshakespeare", f"sequence={SEQUENCE}", f"global_batch={ROWS}", "optim=adamw",
        f"optim.lr={RATE}", "optim.warmup=1", f"max_steps={steps}", "precision=bf16-mixed", "logger=csv", "device=cpu",
        "checkpoint_every=100000", "sample_tokens=0", *(["adapter=lora"] if lora else []), *plan,
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = effective(compose("train", overrides=asked), asked)
    module.fit(check(config), Path(into) / "run")
    return times


def transformers(folder: str, steps: int, lora: bool, into: str, plan: list[str]) -> list[float]:
    """Its Trainer, with peft's adapters if `lora`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    from leanlm.data.corpus import tinyshakespeare

    text = b"".join(tinyshakespeare().chunks("train")).decode()
    numbers = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    rows = numbers[: len(numbers) // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.last = getattr(self, "last", time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            times.append(now - self.last)
            self.last = now

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=into, use_cpu=True, bf16=True, per_device_train_batch_size=ROWS, max_steps=steps, learning_rate=RATE,
        weight_decay=0.1, warmup_steps=1, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model, arguments, train_dataset=data, callbacks=[Clock()]).train()
    return times


def peak() -> int:
    """Bytes that this process has held at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def measured(folder: str, name: str, kind: str, steps: int, plan: list[str]) -> dict[str, float]:
    """What a process says that does this and nothing else."""
    done = subprocess.run(
        [sys.executable, __file__, folder, "--steps", str(steps), "--alone", name, "--only", kind, "--plan", *plan],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plan", nargs="*", help="overrides of leanlm, instead of PLANS")
    parser.add_argument("--only", choices=("full", "lora"))
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    if asked.alone:
        with tempfile.TemporaryDirectory() as into:
            times = {"leanlm": leanlm, "transformers": transformers}[asked.alone](
                asked.folder, asked.steps, asked.only == "lora", into, asked.plan
            )
        print(json.dumps({"peak_bytes": peak(), "seconds": statistics.median(times[1:])}))
        return
    found: dict[str, dict[str, float]] = {}
    for kind in [asked.only] if asked.only else ["full", "lora"]:
        for _ in range(asked.rounds):
            for name in ("leanlm", "transformers"):
                one = measured(asked.folder, name, kind, asked.steps, asked.plan or PLANS[kind])
                best = found.setdefault(f"{kind} {name}", one)
                best |= {
                    "peak_bytes": max(best["peak_bytes"], one["peak_bytes"]),
                    "seconds": min(best["seconds"], one["seconds"]),
                }
                print(f"{kind:5} {name:13} {one['peak_bytes'] >> 20:6,} MiB  {one['seconds']:6.2f} s a step", flush=True)
        ours, theirs = found[f"{kind} leanlm"], found[f"{kind} transformers"]
        print(f"{kind:5} leanlm / transformers: memory {ours['peak_bytes'] / theirs['peak_bytes']:.2f}, "
              f"time {ours['seconds'] / theirs['seconds']:.2f}", flush=True)  # fmt: skip
    if asked.into:
        asked.into.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
