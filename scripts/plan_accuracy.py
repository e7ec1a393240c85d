"""How well the planner and others predict: random configurations, each predicted before it is run in real processes.

python scripts/plan_accuracy.py --draws 48 --seed 1 --into runs/accuracy.jsonl     adds to the file, and prints the errors
python scripts/plan_accuracy.py --draws 12 --seed 2 --untuned --into runs/untuned.jsonl   of models that it was not fitted to
python scripts/plan_accuracy.py --draws 0 --into runs/accuracy.jsonl               prints them again
python scripts/plan_accuracy.py --again scripts/results/plan_accuracy.jsonl        predicts stored runs anew, after the fact
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 3
SMALLEST, LARGEST = 512 << 20, 14 << 30  # bytes: of the fullest rank (below, it is libraries that are measured); of all
LONGEST = 8  # seconds of a step
MODELS = {  # name -> overrides that may be drawn
    "transformer": {"model.width": [512, 768, 1024], "model.depth": [4, 6, 12], "model.tied": ["true", "false"]},
    "gpt2": {"model.width": [384, 768, 1024], "model.depth": [6, 12], "model.dropout": [0.0, 0.1]},
    "llama": {"model.width": [512, 768], "model.depth": [4, 8, 12]},
    "lstm": {"model.width": [512, 1024, 1536], "model.depth": [2, 4], "model.dropout": [0.0, 0.2]},
    "gru": {"model.width": [512, 1024, 1536], "model.depth": [2, 4]},
    "elman": {"model.width": [512, 1024], "model.depth": [2]},
}
TESTS = Path(__file__).resolve().parent.parent / "tests"
UNTUNED = {  # models of which no run had been seen when the planner's constants were fitted
    "gated": {"model.width": [512, 768, 1024], "model.depth": [6, 12], "model.kernel": [3, 5], "model.tied": ["true", "false"]},
    "transformer": {"model.positions": ["learned"], "model.norm": ["layernorm"], "model.norm_weight": ["true"],
                    "model.activation": ["swiglu", "gelu"], "model.kv_heads": [2], "model.width": [512, 768],
                    "model.heads": [8], "model.depth": [6, 12], "model.bias": ["true", "false"]},
    "lstm": {"model.embedding": [128, 256], "model.cutoffs": ["[1000]", "[500,4000]"], "model.width": [768, 1280],
             "model.depth": [1, 3], "model.locked": ["false"], "model.dropout": [0.2]},
}  # fmt: skip
PLANS = [
    "strategy=single", "strategy=accumulate", "strategy=ddp devices=2", "strategy=ddp devices=2 strategy.zero1=true",
    "strategy=fsdp devices=2", "strategy=fsdp devices=2 strategy.reshard_after_forward=false",
    "strategy=fsdp devices=2 strategy.accumulate_grad_batches=2 strategy.reduce_every_micro_batch=false",
    "strategy=tensor devices=2", "strategy=pipeline devices=2", "strategy=gpipe devices=2", "strategy=interleaved devices=2",
    "strategy=zero_bubble devices=2", "strategy=hsdp devices=4", "strategy=pipeline_ddp devices=4",
    "strategy=pipeline_fsdp devices=4", "strategy=fsdp_tensor devices=4", "strategy=pipeline_tensor devices=4",
]  # fmt: skip
LEVERS = {
    "strategy.recompute": ["none", "none", "blocks", "operators", "2", "0.5"],
    "optim.state": ["fp32", "fp32", "fp32", "bf16", "int8", "int4"],
    "precision": ["fp32", "fp32", "fp32", "bf16-mixed", "bf16"],
    "strategy.offload": ["none", "none", "none", "none", "activations", "optimizer"],
}


def draw(rng: random.Random, models: dict[str, dict[str, list]]) -> list[str]:
    """Overrides of a configuration; it may be one that cannot work."""
    model = rng.choice(list(models))
    found = [f"model={model}", *(f"{key}={rng.choice(values)}" for key, values in models[model].items())]
    found += rng.choice(PLANS).split() + [f"{key}={rng.choice(values)}" for key, values in LEVERS.items()]
    found += [f"global_batch={rng.choice([8, 16, 32, 64])}", f"sequence={rng.choice([128, 256, 512])}"]
    found += [f"optim={rng.choice(['adamw', 'adamw', 'muon', 'adafactor', 'sgd'])}"]
    return found + rng.choice([["data.tokenizer=byte"], ["data.tokenizer=word", "data.vocabulary=8000"]])


def text(folder: Path) -> Path:
    """A text that every machine has."""
    library = Path(sysconfig.get_paths()["stdlib"])
    file = folder / "text.txt"
    file.write_bytes(b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[:500_000])
    return file


def whole_run(folder: Path, steps: int) -> list[str]:
    """Overrides of a short run on that text, with a checkpoint and a validation."""
    return ["data=text", f"data.path={text(folder)}", f"max_steps={steps}", f"val_every={steps}", "checkpoint_every=1",
            "logger=csv", "sample_tokens=0", "val_lanes=8", f"hydra.searchpath=[file://{TESTS}/conf]"]  # fmt: skip


def predict(overrides: list[str]) -> dict:
    """In a process of its own; see `predict_here`."""
    done = subprocess.run([sys.executable, __file__, "--predict", *overrides], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def settled(overrides: list[str]) -> tuple[Any, int]:
    """Settings, and the types of tokens that their text has."""
    from hydra import compose, initialize_config_dir

    from leanlm.common.files import CONF
    from leanlm.config.checks import check
    from leanlm.training.data import tokens

    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = check(compose("train", overrides=overrides))
    return settings, tokens(settings).tokenizer.vocabulary


def may_do(overrides: list[str]) -> bool:
    """Whether a configuration can work, and is roughly of a size that is measured here."""
    from leanlm.common.errors import UserError
    from leanlm.planning.candidates import Estimate
    from leanlm.planning.hardware.devices import this_machine

    try:
        settings, vocabulary = settled(overrides)
    except UserError:
        return False
    rough = Estimate(settings, vocabulary, this_machine())(settings.plan)
    return rough.seconds < LONGEST and 0.6 * SMALLEST < rough.bytes < 2 * LARGEST / settings.plan.world


def predict_here(overrides: list[str]) -> dict:
    import estimators

    from leanlm.planning.hardware.devices import this_machine
    from leanlm.planning.predict import predict

    settings, vocabulary = settled(overrides)
    found = predict(settings, vocabulary, this_machine())
    others = {name: estimate(settings, vocabulary) for name, estimate in estimators.ALL.items()}
    ranks = [{"rank": need.rank, "peak": need.peak, "parts": need.parts} for need in found.needs]
    return {"seconds": found.seconds, "ranks": ranks, "others": others}


def measure(overrides: list[str], path: Path) -> dict:
    command = [sys.executable, "-m", "leanlm.train", *overrides, f"run_dir={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode == 2:
        return {"refused": done.stderr.strip()}
    if done.returncode:
        return {"failed": done.stderr[-2000:]}
    return json.loads((path / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--into", type=Path, default=Path("runs/accuracy.jsonl"))
    parser.add_argument("--again", type=Path)
    parser.add_argument("--untuned", action="store_true", help="of other models")
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    sys.path.append(str(TESTS))
    if asked.again is not None:
        with tempfile.TemporaryDirectory() as folder:
            common, known = whole_run(Path(folder), STEPS), map(json.loads, asked.again.read_text().splitlines())
            report([{**record, "predicted": predict(record["overrides"] + common)} for record in known])
        return
    asked.into.parent.mkdir(parents=True, exist_ok=True)
    drawn = draws(random.Random(asked.seed), UNTUNED if asked.untuned else MODELS)
    with tempfile.TemporaryDirectory() as folder:
        common = whole_run(Path(folder), STEPS)
        for number, (overrides, predicted) in enumerate(predicted_first(drawn, common, asked.draws)):
            measured = measure(overrides + common, Path(folder, f"run{number}"))
            with open(asked.into, "a") as file:
                file.write(json.dumps({"overrides": overrides, "predicted": predicted, "measured": measured}) + "\n")
            print(f"{number + 1}/{asked.draws} {' '.join(overrides)}", flush=True)
    report([json.loads(line) for line in asked.into.read_text().splitlines()])


def draws(rng: random.Random, models: dict[str, dict[str, list]]) -> Iterator[list[str]]:
    while True:
        yield draw(rng, models)


def predicted_first(drawn: Iterator[list[str]], common: list[str], count: int) -> list[tuple[list[str], dict]]:
    """The first so many configurations that can be measured here, each with its prediction; one simulates on each core."""
    import torch

    found: list[tuple[list[str], dict]] = []
    with multiprocessing.Pool(initializer=torch.set_num_threads, initargs=(1,), maxtasksperchild=20) as pool:
        while len(found) < count:
            some = list(itertools.islice(drawn, 4 * (os.cpu_count() or 1)))
            results = pool.imap(_predict_if_measurable, [(overrides, common) for overrides in some])
            found += [(overrides, result) for overrides, result in zip(some, results, strict=True) if result]
            print(f"{len(found)} predicted", flush=True)
    return found[:count]


def _predict_if_measurable(asked: tuple[list[str], list[str]]) -> dict | None:
    overrides, common = asked
    if not may_do(overrides + common):
        return None
    try:
        predicted = predict_here(overrides + common)
    except Exception as error:
        return {"error": repr(error)}
    growth = [rank["peak"] - rank["parts"]["process"] for rank in predicted["ranks"]]
    fits = SMALLEST <= max(growth) <= LARGEST / int(dict(part.split("=", 1) for part in overrides).get("devices", 1))
    return predicted if fits and predicted["seconds"] <= LONGEST else None


def report(records: list[dict]) -> None:
    """The errors of the fullest rank, which decides whether a plan fits, of every simulated rank, and of other estimators."""
    errors: dict[str, list[float]] = {"leanlm": [], "leanlm, the worst rank of each": []}
    for record in records:
        predicted, measured = record["predicted"], record["measured"]
        if "error" in predicted or "peak_memory_bytes" not in measured:
            print("not measured:", " ".join(record["overrides"]), predicted.get("error", "")[-300:], measured.get("failed", ""))
            continue
        before = measured["memory_before_bytes"]
        growth = [peak - start for peak, start in zip(measured["peak_memory_bytes"], before, strict=True)]
        wanted = {rank["rank"]: rank["peak"] - rank["parts"]["process"] for rank in predicted["ranks"]}
        error = max(wanted.values()) / max(growth) - 1
        errors["leanlm"].append(error)
        errors["leanlm, the worst rank of each"].append(max((wanted[n] / growth[n] - 1 for n in wanted), key=abs))
        for name, bytes_ in predicted["others"].items():
            if bytes_ is not None:
                errors.setdefault(name, []).append(bytes_ / max(growth) - 1)
        sizes = f"predicted {max(wanted.values()) / 2**20:.0f}, measured {max(growth) / 2**20:.0f} MiB"
        print(f"{error:+.1%} {sizes}: {' '.join(record['overrides'])}")
    for name, found in errors.items():
        sizes = sorted(map(abs, found))
        if sizes:
            print(f"{name}: {len(sizes)} configurations, median error {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--predict"]:
        print(json.dumps(predict_here(sys.argv[2:])))
    else:
        main()
