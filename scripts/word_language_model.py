"""pytorch/examples' word_language_model beside leanlm: time a batch and peak memory, in one run.

    python scripts/word_language_model.py --examples CHECKOUT [--rounds 3] [--batches 60]

Both train the example's default on WikiText-2 (LSTM, 2 layers of 200, 20 rows x 35 words, dropout 0.2, SGD at 20, clip
0.25), each in a process of its own, rounds alternating; leanlm as it is, with what makes it smaller at the same
mathematics, and in bf16-mixed. The example's own files run unchanged but for the
number of batches of an epoch, which is cut, and a clock that it prints. Peak memory is that of the whole process
(maximum resident set); leanlm writes metrics.csv and no TensorBoard files. Needs LEANLM_DATA or a network.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table


def prepare(checkout: Path, folder: Path) -> Path:
    """A copy of the example with its data, which prints its clock at every batch and stops after `--epochs`."""
    from leanlm.data.corpus import wikitext2

    copy = folder / "example"
    shutil.copytree(checkout / "word_language_model", copy, ignore=shutil.ignore_patterns("data"))
    (copy / "data" / "wikitext-2").mkdir(parents=True)
    for split, pieces in wikitext2().splits.items():
        name = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}[split]
        shutil.copy(pieces[0].path, copy / "data" / "wikitext-2" / name)
    code = (copy / "main.py").read_text()
    stop = "import os, sys; print('ms', elapsed * 1000 / args.log_interval, flush=True); done = batch >= args.epochs\n"
    marked = code.replace(
        "            total_loss = 0\n            start_time",
        f"            {stop}            if done: return\n            total_loss = 0\n            start_time",
    )
    marked = marked.replace("        val_loss = evaluate(val_data)", "        sys.exit()").replace(
        "import argparse", "import argparse, sys", 1
    )
    assert marked.count("if done: return") == 1
    assert "evaluate(val_data)" not in marked.split("for epoch in")[1]
    (copy / "main.py").write_text(marked)
    return copy


def example(copy: Path, batches: int) -> tuple[float, int]:
    """Milliseconds a batch, by its own clock, and peak bytes."""
    lines, peak = measured([sys.executable, "main.py", "--log-interval", "10", "--epochs", str(batches)], copy)
    times = [float(ms) for ms in re.findall(r"^ms ([\d.]+)", lines, re.MULTILINE)]
    return statistics.median(times[1:]), peak


OURS = {
    "leanlm": ["strategy.return_freed_memory=false"],
    "leanlm, return_freed_memory": ["strategy.return_freed_memory=true"],
    "leanlm, bf16-mixed": ["strategy.return_freed_memory=false", "precision=bf16-mixed"],
}
LIMITS = [("leanlm", 0, 0.8), ("leanlm, return_freed_memory", 0, 0.8), ("leanlm, return_freed_memory", 1, 0.5),
          ("leanlm, bf16-mixed", 0, 0.55)]  # fmt: skip


def leanlm(folder: Path, batches: int, name: str) -> tuple[float, int]:
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, __file__, "--worker", str(run), name, "--batches", str(batches), "--examples", "."]
    _, peak = measured(command, folder)
    rates = [20 * 35 * 1e3 / row["tokens_per_second"] for row in json.loads((run / "rows.json").read_text())]
    return statistics.median(rates[2:]), peak


def worker(run: Path, batches: int, name: str) -> None:
    """A run of leanlm without the validation at its end (the example is stopped before its own)."""
    from hydra import compose, initialize_config_dir

    import leanlm.training.callbacks.record as record
    import leanlm.training.fit as module
    from leanlm.common.files import CONF
    from leanlm.common.run_folder import Run
    from leanlm.config.checks import check

    with initialize_config_dir(str(CONF), version_base="1.3"):
        common = ["experiment=wikitext2_lstm", "device=cpu", "logger=csv", f"max_steps={batches}"]
        config = compose("train", overrides=common + OURS[name])
    settings = check(config)

    class Stop(Exception):
        pass

    def stop(trainer):
        raise Stop

    record.validate_now = stop
    try:
        module.fit(settings, run)
    except Stop:
        (run / "rows.json").write_text(json.dumps(Run(run).rows()))


MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=2)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""


def measured(command: list[str], folder: Path) -> tuple[str, int]:
    """Output and peak resident bytes of a process."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stderr, int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True, help="a checkout of pytorch/examples")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(Path(asked.worker[0]), asked.batches, asked.worker[1])
        return
    found: dict[str, list[tuple[float, int]]] = {"pytorch/examples": [], **{ours: [] for ours in OURS}}
    with tempfile.TemporaryDirectory() as name:
        copy = prepare(asked.examples, Path(name))
        for _ in range(asked.rounds):
            found["pytorch/examples"].append(example(copy, asked.batches))
            for ours in OURS:
                found[ours].append(leanlm(Path(name), asked.batches, ours))
    base = found["pytorch/examples"]
    table = Table("", "ms a batch (each round)", "ratio", "peak MiB", "ratio")
    shares = {}
    for who, values in found.items():
        shares[who] = [statistics.median(a[i] / b[i] for a, b in zip(values, base, strict=True)) for i in (0, 1)]
        each = "  ".join(f"{ms:.0f}" for ms, _ in values)
        peak = statistics.median(peak for _, peak in values) / 2**20
        table.add_row(who, each, f"{shares[who][0]:.2f}x", f"{peak:.0f}", f"{shares[who][1]:.2f}x")
    console = Console(width=100)
    console.print(table)
    for who, i, limit in LIMITS:
        what, value = ("time a batch", "peak memory")[i], shares[who][i]
        console.print(f"{who}: {what} {value:.3f}x, asked at most {limit}x: {'met' if value <= limit else 'NOT met'}")


if __name__ == "__main__":
    main()
