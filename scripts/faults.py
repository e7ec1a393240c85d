"""Runs that are killed, meet a full disk and have bits of their checkpoints flipped lose nothing.

    python scripts/faults.py [--kills 5] [--disks 20] [--bits 20] [--seed 0]

Eight runs in float64, of LSTMs and Transformers, are each killed by SIGKILL with all their processes and resumed under another
plan, again and again: while they start, between steps, while they write a checkpoint. Then the disk of a run is filled so that
it ends at a random byte of a checkpoint, and bits of checkpoints are flipped. Every loss must be that of the run that nothing
happened to, to 1e-12. Prints a line for each, and ends with 1 if something was wrong. Needs Linux with `unshare`.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
STEPS, EQUAL, LONGEST = 60, 1e-12, 120  # LONGEST: seconds of one life of a run
LSTM = "model=lstm model.width=24 model.depth=3"
TRANSFORMER = "model=transformer model.width=32 model.depth=4 model.heads=4"
RUNS = [
    f"{LSTM} optim=adamw",
    f"{LSTM} optim=adamw model.tied=true callbacks=[best,ema]",
    f"{LSTM} optim=muon optim.schedule=constant",
    f"{LSTM} optim=sgd optim.lr=0.5 model.locked=false",
    f"{TRANSFORMER} optim=adamw",
    f"{TRANSFORMER} optim=muon callbacks=[best,ema]",
    f"{TRANSFORMER} optim=adamw model.tied=true model.kv_heads=2 model.activation=swiglu",
    f"{TRANSFORMER} optim=muon model.positions=learned model.norm=layernorm",
]
PLANS = [
    "strategy=single", "strategy=accumulate strategy.accumulate_grad_batches=4", "strategy=single strategy.recompute=blocks",
    "strategy=ddp devices=2", "strategy=ddp strategy.zero1=true devices=2", "strategy=fsdp devices=2",
    "strategy=fsdp strategy.accumulate_grad_batches=2 devices=2", "strategy=tensor devices=2", "strategy=pipeline devices=2",
    "strategy=gpipe devices=2",
]  # fmt: skip
EVERY = (
    f"data=text data.tokenizer=char global_batch=8 sequence=32 max_steps={STEPS} optim.warmup=5 model.dropout=0.1 "
    "precision=fp64 device=cpu logger=csv log_every=1 val_every=7 val_lanes=8 checkpoint_every=2 sample_tokens=8"
)
MODULES = ("heapq", "textwrap", "bisect", "shlex", "queue", "sched")  # of Python's library: the text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="of each run")
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--bits", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if "FAULTS_OWN_MOUNTS" not in os.environ:  # a disk that is mounted here goes with this process
        os.environ["FAULTS_OWN_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "--map-root-user", "--mount", sys.executable, *sys.argv])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("text.txt").write_text("".join(Path(os.__file__).with_name(f"{name}.py").read_text() for name in MODULES))
        sys.path.insert(0, str(TESTS))
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "LEANLM_CACHE": f"{folder}/cache"}
        multiprocessing.set_forkserver_preload(["warm"])
        wrong = [
            *(
                each
                for number in range(len(RUNS))
                for each in killed(number, asked.kills, random.Random(f"{asked.seed} {number}"))
            ),
            *disks(asked.disks, random.Random(f"{asked.seed} disk")),
            *bits(asked.bits, random.Random(f"{asked.seed} bits")),
        ]
    print("\n".join(["", *wrong]) if wrong else "nothing was lost")
    sys.exit(bool(wrong))


def command(number: int, path: Path, *more: str) -> list[str]:
    """That begins run `number` in the folder `path`."""
    return [*RUNS[number].split(), *EVERY.split(), f"data.path={Path('text.txt').resolve()}", f"run_dir={path}", *more]


def reference(number: int) -> Path:
    """The run that nothing happens to, under `single`, with its last three checkpoints; made once."""
    path = Path(f"reference-{number}").resolve()
    if not path.is_dir():
        wrong = lived(command(number, path, "checkpoint_every=10", "keep_checkpoints=3"), 0)[1]
        assert not wrong, wrong
    return path


def killed(number: int, kills: int, draw: random.Random) -> list[str]:
    """Kill a run and resume it, `kills` times; what is wrong in the end."""
    whole, path, plans = reference(number), Path(f"run-{number}").resolve(), list[str]()
    ends, wrong, began = Counter[str](), list[str](), time.monotonic()
    os.environ["LEANLM_CACHE"] = f"{path}-cache"  # the preparation of the text may be killed too
    while len(plans) <= kills and not wrong and not (path / "result.json").is_file():
        fit = [plan for plan in PLANS if plan not in plans and not ("zero1" in plan and "sgd" in RUNS[number])]
        plans.append(draw.choice(fit))
        known = (path / "config.yaml").is_file()
        arguments = [f"resume={path}"] if known else command(number, path)
        with open(f"{path}.txt", "ab+") as said:
            life = subprocess.Popen(
                [sys.executable, "-m", "leanlm.train", *arguments, *plans[-1].split()],
                stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip
            try:
                if len(plans) <= kills:
                    last = len(plans) == kills and number % 2
                    ends[wait_for_a_moment(life, path / "checkpoints", draw, STEPS if last else STEPS // (kills + 2))] += 1
                elif life.wait(LONGEST):
                    wrong.append(f"run {number}, {plans}: ended with {life.returncode}")
            except subprocess.TimeoutExpired:
                wrong.append(f"run {number}, {plans}: took longer than {LONGEST} s")
            finally:
                if life.poll() is None:
                    os.killpg(life.pid, signal.SIGKILL)
                    life.wait(LONGEST)
    text = Path(f"{path}.txt").read_text()
    if wrong or "Traceback" in text:
        wrong.append(f"run {number}, {plans}: {text[-2000:]}")
    else:
        wrong += [f"run {number}, {plans}: {each}" for each in differences(path, whole)]
    names = ", ".join(plan.replace("strategy=", "").replace("strategy.", "").replace(" devices=2", "") for plan in plans)
    print(
        f"run {number} ({RUNS[number]}), killed {dict(ends)}, plans {names}: "
        f"{'WRONG' if wrong else far(path, whole)}, {time.monotonic() - began:.0f} s", flush=True,
    )  # fmt: skip
    return wrong


def wait_for_a_moment(life: subprocess.Popen, folder: Path, draw: random.Random, steps: int) -> str:
    """Wait for the moment to kill a run that writes checkpoints into `folder`, at most `steps` later; what it does then."""
    until = time.monotonic() + LONGEST
    moment = "ending" if steps == STEPS else draw.choice(["starting", "stepping", "writing", "writing"])
    if moment == "starting":
        time.sleep(draw.uniform(0, 8))
        return moment
    target = STEPS if moment == "ending" else newest(folder) + draw.randint(1, steps)
    while newest(folder) < target and life.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if moment != "writing":
        time.sleep(draw.uniform(0, 0.02 if moment == "ending" else 0.2))  # its result comes soon
    while moment == "writing" and not list(folder.glob(".writing-*")) and life.poll() is None and time.monotonic() < until:
        pass
    return moment if life.poll() is None else "not: it had ended"


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 before there is one."""
    return max((int(each.name.removeprefix("step-")) for each in folder.glob("step-*")), default=0)


def disks(count: int, draw: random.Random) -> list[str]:
    """Fill a disk so that a checkpoint, or what is written before it, does not fit, make room, and resume; what is wrong."""
    disk, ended, wrong = Path("disk").resolve(), Counter[str](), list[str]()
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "leanlm", disk], check=True)
    for number in (draw.randrange(len(RUNS)) for _ in range(count)):
        path = begun(number, disk / "run")
        before = sorted(each.name for each in path.glob("checkpoints/*"))
        size = sum(file.stat().st_size for file in (path / "checkpoints" / before[-1]).iterdir())
        full_at = draw.randrange(size)
        with open(disk / "other", "wb") as other:
            room = os.statvfs(disk)
            os.posix_fallocate(other.fileno(), 0, room.f_bavail * room.f_frsize - full_at - 3 * room.f_frsize)  # 3: for metrics
        said, problems = lived([f"resume={path}", "checkpoint_every=10", draw.choice(PLANS[:3])], 2)
        (disk / "other").unlink()
        if len(said.err.splitlines()) != 1 or not said.err.startswith("error: ") or "make room" not in said.err:
            problems.append(f"said {said.err!r}")
        if sorted(each.name for each in path.glob("checkpoints/*")) != before:
            problems.append(f"left {[each.name for each in path.glob('checkpoints/*')]} of {before}")
        ended["in a checkpoint" if "no checkpoint of step" in said.err else "before it"] += 1
        problems += lived([f"resume={path}"], 0)[1] or differences(path, reference(number))
        wrong += [f"full disk, run {number}, byte {full_at} of {size}: {each}" for each in problems]
        shutil.rmtree(path)
    subprocess.run(["umount", disk], check=True)
    print(f"{count} full disks {dict(ended)}: {len(wrong)} wrong", flush=True)
    return wrong


def bits(count: int, draw: random.Random) -> list[str]:
    """Flip a bit of the newest checkpoint, or of both that there are, and resume; what is wrong."""
    flipped, wrong = Counter[str](), list[str]()
    for trial in range(count):
        number = draw.randrange(len(RUNS))
        path = begun(number, Path("flipped").resolve())
        damaged = sorted(path.glob("checkpoints/*"))[-1 if trial % 4 else 0 :]
        for folder in damaged:
            file = draw.choice(sorted(folder.iterdir()))
            content, place = bytearray(file.read_bytes()), draw.randrange(file.stat().st_size)
            content[place] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            flipped[file.name] += 1
        whole = len(damaged) == 1
        problems = []
        for module, words in (("evaluate", [f"run={path}"]), ("train", [f"resume={path}", "checkpoint_every=10"])):
            said, found = lived(words, 0 if whole else 2, module)
            problems += found
            if any(f"{folder} is damaged: " not in said.out + said.err for folder in damaged):
                problems.append(f"{module} does not name {damaged}: {said}")
        if whole:
            problems += differences(path, reference(number))
        wrong += [f"flipped bit {place} of {file.name}, run {number}: {each}" for each in problems]
        shutil.rmtree(path)
    print(f"{count} flipped bits {dict(flipped)}: {len(wrong)} wrong", flush=True)
    return wrong


class Said:
    def __init__(self, out: str, err: str) -> None:
        self.out, self.err = out, err


def begun(number: int, path: Path) -> Path:
    """Run `number` as it was before its last 20 steps, in the folder `path`."""
    shutil.copytree(reference(number), path)
    shutil.rmtree(sorted(path.glob("checkpoints/*"))[-1])
    (path / "result.json").unlink()
    return path


def lived(words: list[str], status: int, module: str = "train") -> tuple["Said", list[str]]:
    """What a command says, which should end with `status`, and what is wrong with it."""
    import shell

    words = [each for word in words for each in (word.split() if word.startswith("strategy=") else [word])]
    ended = shell.command(f"leanlm.{module}", *words, cwd=Path.cwd(), timeout=LONGEST)
    said = Said(ended.stdout, ended.stderr)
    fine = ended.returncode == status and "Traceback" not in ended.stderr
    return said, [] if fine else [f"{module} {' '.join(words)} ended with {ended.returncode}, not {status}: {said.err}"]


def far(path: Path, whole: Path) -> str:
    """How far the losses of a run are from those of another."""
    from leanlm.common.run_folder import Run

    pairs = zip(Run(path).rows(), Run(whole).rows(), strict=True)
    return f"{max(abs(ours[key] - theirs[key]) for ours, theirs in pairs for key in theirs if key.endswith('loss')):.1e}"


def differences(path: Path, whole: Path) -> list[str]:
    """What a run lacks or has otherwise than the run that nothing happened to."""
    from leanlm.common.run_folder import Run

    ours, theirs, wrong = Run(path).rows(), Run(whole).rows(), list[str]()
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        return [f"rows of steps {[int(row['step']) for row in ours]}"]
    for a, b in zip(ours, theirs, strict=True):
        if a.keys() != b.keys() or any(abs(a[key] - b[key]) > EQUAL for key in b if key.endswith("loss")):
            wrong.append(f"{a} instead of {b}")
    results = [json.loads((each / "result.json").read_text()) for each in (path, whole)]
    if abs(results[0]["loss"] - results[1]["loss"]) > EQUAL or results[0]["tokens"] != results[1]["tokens"]:
        wrong.append(f"result.json: {[(each['loss'], each['tokens']) for each in results]}")
    if left := list(path.glob("**/.writing-*")):
        wrong.append(f"left {left}")
    return wrong[:3]


if __name__ == "__main__":
    main()
