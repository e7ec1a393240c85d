"""How well the planner predicts a GPU: predicted on any machine, by the card's data sheet, then measured on one that has it.

python scripts/plan_gpu.py --card h200 --seed 1 --into runs/gpu.jsonl     draws and predicts: needs no GPU
python scripts/plan_gpu.py --measure 8 --into runs/gpu.jsonl              runs what is not measured yet, 8 processes at once
python scripts/plan_gpu.py --into runs/gpu.jsonl                          prints the errors

Memory: random models, sizes and levers on one device, and (`untuned`) models that nothing was fitted to. Bytes are what torch's
allocator had given out at most, and what it had taken from the card. Times: plans of three problems, spread evenly over the
rough order of all that fit, and first the one that `strategy=auto` takes; run one after the other, each plan's fastest step.
`--overhead`: seconds that an operation takes to start where they will run.
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from plan_accuracy import LEVERS, MODELS, TESTS, UNTUNED, settled, whole_run

STEPS = 6
SMALLEST, LONGEST = 512 << 20, 2.0  # bytes of a run's tensors, and seconds of a step
PROBLEMS = [
    "model=gpt2 global_batch=16 sequence=1024 data.tokenizer=byte",
    "model=lstm model.width=1024 model.depth=2 global_batch=32 sequence=256 data.tokenizer=word data.vocabulary=8000",
    "model=llama model.width=768 model.depth=12 global_batch=32 sequence=512 precision=bf16-mixed data.tokenizer=byte",
]
PLANS = 8


def draw(rng: random.Random, models: dict[str, dict[str, list]]) -> list[str]:
    """Overrides of a configuration on one device; it may be one that cannot work."""
    model = rng.choice(list(models))
    found = [f"model={model}", *(f"{key}={rng.choice(values)}" for key, values in models[model].items())]
    found += [rng.choice(["strategy=single", "strategy=accumulate"])]
    found += [f"{key}={rng.choice(values)}" for key, values in LEVERS.items()]
    found += [f"global_batch={rng.choice([8, 16, 32])}", f"sequence={rng.choice([256, 512, 1024])}"]
    found += [f"optim={rng.choice(['adamw', 'adamw', 'muon', 'adafactor', 'sgd'])}"]
    return found + rng.choice([["data.tokenizer=byte"], ["data.tokenizer=word", "data.vocabulary=8000"]])


def predicted(overrides: list[str], device: Any) -> dict[str, Any] | None:
    """Bytes and seconds; None if it cannot work or is not of a size to be measured."""
    from leanlm.common.errors import UserError
    from leanlm.planning.predict import predict

    try:
        settings, vocabulary = settled(overrides)
    except UserError:
        return None
    found = predict(settings, vocabulary, device)
    parts = found.fullest.parts
    allocated = sum(parts.values()) - parts["allocator"] - parts["context"]
    if allocated < SMALLEST or found.seconds > LONGEST:
        return None
    return {"allocated": allocated, "reserved": allocated + parts["allocator"], "seconds": found.seconds, "parts": parts}


def predict_all(asked: argparse.Namespace, common: list[str]) -> list[dict[str, Any]]:
    from omegaconf import OmegaConf

    from leanlm.common.files import CONF
    from leanlm.planning.hardware.devices import of_config
    from leanlm.planning.report import arguments
    from leanlm.planning.search import search

    node: Any = OmegaConf.to_container(OmegaConf.load(Path(CONF, "device", f"{asked.card}.yaml")))
    device = of_config(node | ({"overhead": asked.overhead} if asked.overhead else {}))
    records: list[dict[str, Any]] = []
    for kind, models, count, seed in (("tuned", MODELS, 48, asked.seed), ("untuned", UNTUNED, 12, asked.seed + 1)):
        rng = random.Random(seed)
        found: list[dict[str, Any]] = []
        while len(found) < count:
            overrides = draw(rng, models)
            if prediction := predicted(overrides + common, device):
                found.append({"kind": kind, "card": asked.card, "overrides": overrides, "predicted": prediction})
                print(f"{kind} {len(found)}/{count} {' '.join(overrides)}", flush=True)
        records += found
    for number, problem in enumerate(PROBLEMS):
        settings, vocabulary = settled([*problem.split(), *common])
        chosen = search(settings, vocabulary, device, 1, wanted=4).fitting[0].plan
        plans = [chosen, *(plan for plan in spread(settings, vocabulary, device) if plan != chosen)]
        for plan in plans:
            overrides = [*problem.split(), *arguments(plan).split()]
            if prediction := predicted(overrides + common, device):
                kind = f"times {number}"
                records.append({"kind": kind, "card": asked.card, "overrides": overrides, "predicted": prediction})
                print(kind, f"{prediction['seconds']:.3f} s", arguments(plan), flush=True)
    return records


def spread(settings: Any, vocabulary: int, device: Any) -> list[Any]:
    """Plans that fit, evenly over the rough order."""
    from leanlm.planning.candidates import Estimate, families
    from leanlm.planning.simulation.step import stages
    from leanlm.strategies.plan import Plan

    rough, whole = Estimate(settings, vocabulary, device), stages(settings.config, Plan(), vocabulary)
    every = [plan for plans in families(settings, 1, whole, device, ()) for plan in plans]
    fitting = sorted((plan for plan in every if rough(plan).bytes < rough.room(plan)), key=lambda plan: rough(plan).seconds)
    return [fitting[round(i * (len(fitting) - 1) / (PLANS - 1))] for i in range(PLANS)]


def measure(overrides: list[str], common: list[str], folder: Path) -> dict[str, Any]:
    """Train in this process, on a GPU that it has given back before."""
    import torch
    from hydra import compose, initialize_config_dir

    from leanlm.common.files import CONF
    from leanlm.config.checks import check
    from leanlm.training.fit import fit

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    path = Path(tempfile.mkdtemp(dir=folder))
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[*overrides, *common])
        result = fit(check(config), path)
    except Exception as error:
        return {"failed": repr(error)[-1500:]}
    with open(path / "metrics.csv") as file:
        rates = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row.get("tokens_per_second")]
    size = config.global_batch * config.sequence
    return {
        "allocated": result["peak_allocated_bytes"][0],
        "reserved": result["peak_memory_bytes"][0],
        "seconds": size / max(rates[1:]),
        "torch": torch.__version__,
        "card": torch.cuda.get_device_name(),
    }


def measure_all(records: list[dict[str, Any]], processes: int, common: list[str], folder: Path, into: Path) -> None:
    """Memory in several processes at once, times in one that is alone."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for several, mine in ((processes, "tuned untuned"), (1, "times")):
        todo = [record for record in records if "measured" not in record and record["kind"].split()[0] in mine]
        run = partial(measure, common=common, folder=folder)
        with ProcessPoolExecutor(several, multiprocessing.get_context("spawn")) as pool:
            for record, found in zip(todo, pool.map(run, [record["overrides"] for record in todo]), strict=True):
                record["measured"] = found
                into.write_text("".join(json.dumps(record) + "\n" for record in records))


def report(records: list[dict[str, Any]]) -> None:
    import torch
    from torchmetrics.functional import spearman_corrcoef

    done = [record for record in records if "allocated" in record.get("measured", {})]
    for record in records:
        if "failed" in record.get("measured", {}):
            print("not measured:", " ".join(record["overrides"]), record["measured"]["failed"][-300:])
    for kind in ("tuned", "untuned"):
        mine = [record for record in done if record["kind"] == kind]
        for record in mine:
            errors = [record["predicted"][key] / record["measured"][key] - 1 for key in ("allocated", "reserved")]
            sizes = [record["measured"][key] / 2**20 for key in ("allocated", "reserved")]
            print(
                f"{errors[0]:+.1%} of {sizes[0]:.0f} MiB, {errors[1]:+.1%} of {sizes[1]:.0f}: {' '.join(record['overrides'])}"
            )
        for key in ("allocated", "reserved"):
            found = [record["predicted"][key] / record["measured"][key] - 1 for record in mine]
            if found:
                worst, short = max(found, key=abs), min(found)
                middle = statistics.median(map(abs, found))
                print(f"{kind}, {key}: {len(found)} runs, median {middle:.1%}, worst {worst:+.1%}, shortest {short:+.1%}")
    for number, problem in enumerate(PROBLEMS):
        mine = [record for record in done if record["kind"] == f"times {number}"]
        if mine:
            both = [torch.tensor([record[of]["seconds"] for record in mine]) for of in ("predicted", "measured")]
            for wanted, got, record in zip(*both, mine, strict=True):
                print(f"predicted {wanted:.3f} s, measured {got:.3f} s: {' '.join(record['overrides'][5:])}")
            print(f"{problem}: {len(mine)} plans, rank correlation {spearman_corrcoef(*both):.2f}, auto's "
                  f"{both[1][0] / both[1].min():.2f} times the fastest")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", help="of conf/device")
    parser.add_argument("--overhead", type=float)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--measure", type=int, metavar="PROCESSES")
    parser.add_argument("--text", type=Path, help="the same on both machines; None: Python's own source code")
    parser.add_argument("--into", type=Path, required=True)
    asked = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    sys.path.append(str(TESTS))
    with tempfile.TemporaryDirectory() as folder:
        common = [*whole_run(Path(folder), STEPS), "log_every=1", *([f"data.path={asked.text}"] if asked.text else [])]
        if asked.card:
            asked.into.parent.mkdir(parents=True, exist_ok=True)
            asked.into.write_text("".join(json.dumps(record) + "\n" for record in predict_all(asked, common)))
        records = [json.loads(line) for line in asked.into.read_text().splitlines()]
        if asked.measure:
            measure_all(records, asked.measure, common, Path(folder), asked.into)
    report(records)


if __name__ == "__main__":
    main()
