"""Random command lines and random files as text: each is taken, or refused with one line a problem; nothing else happens.

    python scripts/fuzz.py [--lines 500] [--files 300] [--seed 1]

A command line goes through all that `leanlm.train` does before work starts; a file is prepared as `data=text` prepares it, and
its tokens must give the text back. Prints what failed, with its traceback, and how many were taken and refused.
"""

import argparse
import gzip
import os
import random
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 60  # seconds of one trial
VALUES = [
    "0", "1", "-1", "2", "7", "1e9", "-0.5", "0.1", "nan", "inf", "true", "null", "''", "~", "[]", "[1,2]", "[", "{a:1}", "}",
    "a,b", "a b", "${x}", "${oc.env:HOME}", "\\", "'", '"', "é", "文字", "🙂", "=", "==", "a=b", "/nowhere", "../..", "???",
    "choice(1,2)", "range(1,3)", "*", "!x", "&a", "%", "#c", "x" * 300, "\n", "\t", "auto", "latest",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=500)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LEANLM_CACHE"] = f"{folder}/cache"
        os.chdir(folder)
        Path("a.txt").write_text("the cat sat on the mat.\n" * 2000)
        for what, count, trial in (("command lines", asked.lines, line), ("files", asked.files, file)):
            ended = Counter(tried(trial, draw) for _ in range(count))
            print(f"{count} {what}: {dict(ended)}", flush=True)


def tried(trial: Callable[[random.Random], Callable[[], None]], draw: random.Random) -> str:
    """How one trial ends: taken, refused or failed."""
    from leanlm.common.errors import UserError

    run = trial(draw)
    signal.alarm(LONGEST)
    try:
        run()
    except UserError as error:
        if all(problem and "\n" not in problem.strip() for problem in error.problems):
            return "refused"
        print(f"FAILED {run.__doc__}: not one line a problem: {error.problems}")
    except BaseException:
        print(f"FAILED {run.__doc__}\n{traceback.format_exc()}")
    else:
        return "taken"
    finally:
        signal.alarm(0)
    return "failed"


def line(draw: random.Random) -> Callable[[], None]:
    """A command line of `leanlm.train`."""
    from hydra import compose, initialize_config_dir

    from leanlm.common.files import CONF
    from leanlm.config.arguments import leaves
    from leanlm.config.command_line import check_jobs
    from leanlm.config.line import Line
    from leanlm.config.schema import Config

    with initialize_config_dir(str(CONF), version_base="1.3"):
        keys = list(leaves(compose("train")))
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra"]
    words_typed = ["data=text", "data.path=a.txt"]
    for _ in range(draw.randint(1, 4)):
        kind, value = draw.random(), draw.choice(VALUES)
        group = draw.choice(groups)
        if kind < 0.5:
            words_typed.append(f"{draw.choice(['', '', '', '+', '++', '~'])}{draw.choice(keys)}={value}")
        elif kind < 0.75:
            words_typed.append(f"{group}={draw.choice([*(each.stem for each in CONF.glob(f'{group}/*.yaml')), value])}")
        else:
            words_typed.append("".join(draw.choice("abз=.[]{}'\"$ ,~-0") for _ in range(draw.randint(1, 12))))

    def run() -> None:
        check_jobs(Line(words_typed), "train", Config)

    run.__doc__ = repr(words_typed)
    return run


def file(draw: random.Random) -> Callable[[], None]:
    """A file as the text of `data=text`."""
    from leanlm.data.corpus import text
    from leanlm.data.tokens import prepare

    kinds: list[Callable[[], bytes]] = [
        lambda: draw.randbytes(draw.randint(0, 2000)),
        lambda: "".join(chr(draw.randint(1, 0x2FFF)) for _ in range(draw.randint(1, 800))).encode("utf-8", "ignore"),
        lambda: b"".join(
            draw.choice([b"word ", b"\r\n", b"\r", b"\n", b"\t", b"\xc3\xa9"]) for _ in range(draw.randint(1, 900))
        ),
        lambda: "naïve café\n".encode("latin-1") * 50,
        lambda: "unicode\n".encode("utf-16") * 50,
        lambda: gzip.compress(b"packed\n" * draw.randint(1, 500), mtime=0)[: draw.choice([None, 20])],
    ]
    content, tokenizer = draw.choice(kinds)(), draw.choice(["byte", "char", "word", "bpe"])
    Path("b.txt").write_bytes(content)

    def run() -> None:
        made = prepare(text("b.txt", 0.2), tokenizer, 300)
        for split, numbers in made.splits.items():
            found: Any = made.tokenizer.decode(numbers.tolist())
            assert tokenizer == "word" or len(found.encode()) == made.bytes[split], (split, found[:80])

    run.__doc__ = f"{tokenizer} {content[:60]!r}"
    return run


if __name__ == "__main__":
    main()
