"""Which plans fit, what each needs and how fast it is: `python -m leanlm.plan model=gpt2-xl device=rtx4090 devices=4`."""

from hydra.core.hydra_config import HydraConfig

from leanlm.config import command_line, words
from leanlm.planning.query import OWN, Ask, plan


def job(asked: Ask) -> None:
    ours = OWN | {"device", "strategy"}
    task = map(words.typed, HydraConfig.get().overrides.task)
    plan(asked, [word for word in task if word.partition("=")[0].partition(".")[0] not in ours])


def main() -> None:
    command_line.run("plan", Ask, job)


if __name__ == "__main__":
    main()
