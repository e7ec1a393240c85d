"""Tasks of EleutherAI's lm-evaluation-harness for a trained model: `python -m leanlm.harness run=runs/X tasks=hellaswag`."""

from leanlm.config import command_line
from leanlm.inference.harness import Harness, results_of
from leanlm.launch.ranks import say


def job(asked: Harness) -> None:
    results, file = results_of(asked)
    from lm_eval.utils import make_table

    say("\n".join(make_table(results, column) for column in ("results", "groups") if results.get(column)))
    if file:
        say(f"results: {file}")


def main() -> None:
    command_line.run("harness", Harness, job)


if __name__ == "__main__":
    main()
