"""Which plans fit, what each needs and how fast it is: `python -m leanlm.plan model=gpt2-xl device=rtx4090 devices=4`."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from leanlm import cli
from leanlm.config import Config, Settings, check
from leanlm.errors import UserError
from leanlm.planning import device as devices_
from leanlm.planning import report
from leanlm.precision import automatic
from leanlm.prepare import tokens


@dataclass
class Ask(Config):
    """What `conf/plan.yaml` sets beside the keys of a training run."""

    vocabulary: int | None = None
    show: int = 6
    json: bool = False
    picture: str | None = "plan.png"


OWN = {each.name for each in fields(Ask)} - {each.name for each in fields(Config)}


def plan(asked: Ask, overrides: list[str] | None = None) -> dict[str, Any]:
    """Search the plans of a training configuration.

    Args:
        asked: as `conf/plan.yaml` composes it.
        overrides: of the command line, to be repeated in the commands that are printed.

    Returns:
        `device`, `budget_bytes`, `fits` and `does_not_fit` (lists of plans, see `report.as_dict`), `least_bytes`.

    Raises:
        UserError: with every problem found.
    """
    from leanlm.planning.search import search

    device, count = devices_.of_config(asked.device, asked.devices), devices_.count(asked.device, asked.devices)
    node = {key: value for key, value in vars(asked).items() if key not in OWN}
    node["device"] = {"accelerator": "cpu"}
    if asked.precision == "auto":
        node["precision"] = automatic(asked.device)
    settings = check(OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Config(**node)))))  # type: ignore[arg-type]
    vocabulary = asked.vocabulary or tokens(settings).tokenizer.vocabulary
    overrides = overrides or []
    answer = search(settings, vocabulary, device, count, asked.allow, asked.show)
    mine, size = device.share(count), asked.global_batch * asked.sequence
    fits, does_not = ([report.as_dict(found, size, overrides) for found in some] for some in (answer.fitting, answer.others))
    result = {
        "device": device.name,
        "devices": count,
        "vocabulary": vocabulary,
        "budget_bytes": list(mine.memories) or mine.memory,
        "candidates": answer.candidates,
        "simulated": answer.simulated,
        "fits": fits,
        "does_not_fit": [{**one, "reason": report.reason(found)} for one, found in zip(does_not, answer.others, strict=True)],
        "least_bytes": report.enough(answer.least) if mine.memories else max(report.enough(answer.least)),
    }
    if asked.json:
        print(json.dumps(result, indent=2))
        return result
    print(
        f"vocabulary of {vocabulary:,} types" + ("" if asked.vocabulary else " (of the data; vocabulary=... plans for another)")
    )
    report.show(answer, device, count, size, overrides)
    if asked.picture:
        report.draw(answer, Path(asked.picture))
        print(f"picture: {asked.picture}")
    return result


def choose(settings: Settings, scale: float = 1.0, beside: int | None = None) -> tuple[Settings, list[str]]:
    """The fastest exact plan that fits the configured device, and the lines that say why.

    If none leaves the margin free, the one that leaves most is tried, should it fit at all.

    Args:
        settings: whose plan says `auto`.
        scale: of the budget; below 1 after a run has met the end of memory.
        beside: bytes of a machine that the process takes which waits for a run on one device; None: what one with torch does.

    Raises:
        UserError: nothing fits.
    """
    from leanlm.planning.search import search

    config = settings.config
    count = devices_.count(config.device, settings.devices)
    device = devices_.of_config(config.device, count).scaled(scale)
    if count == 1 and device.shared:  # several have one with torch beside them anyhow
        held = device.process[2]
        device = replace(device, memory=device.memory - (held if beside is None or config.restarts else beside))
    vocabulary = tokens(settings).tokenizer.vocabulary
    answer = search(settings, vocabulary, device, count, () if config.resume else config.allow, wanted=4)
    budget = report.budgets(device, count)
    if not answer.fitting and not answer.least.tight:
        raise UserError(
            f"strategy=auto: no plan fits {budget}: the smallest that was looked at needs "
            f"{report.mib(answer.least.fullest.peak)} ({report.arguments(answer.least.plan)}); write device.memory=..., more "
            "devices, allow=[precision,optim.state], or a smaller model or sequence"
        )
    best = answer.fitting[0] if answer.fitting else answer.least
    needs = [best.of_rank(rank) for rank in range(best.plan.world)]
    predicted = [need.peak - need.parts.get("context", 0) for need in needs]  # what a run can measure
    rest = answer.fitting[1:] or answer.others
    after = "".join(
        f"; next {one.seconds:.3g} s, {report.mib(one.fullest.peak)}: {report.arguments(one.plan)}" for one in rest[:1]
    )
    margin = f"none leaves {devices_.MARGIN:.0%} of it free, this may fit: the smallest"
    kind = "the fastest that fits" if answer.fitting else margin
    lines = [
        f"strategy=auto: {best.plan.settings(settings).describe()}",
        f"  predicted peak {report.mib(best.fullest.peak)} of {budget}, {best.seconds:.3g} s a step",
        f"  {kind} of {answer.simulated} plans simulated, the likeliest of {answer.candidates}{after}",
    ]
    prediction = {"peak_memory_bytes": predicted, "seconds_per_step": best.seconds}
    return replace(best.plan.settings(settings), predicted=prediction), lines


def main() -> None:
    cli.run("plan", Ask, _main)


def _main(asked: Ask) -> None:
    ours = OWN | {"device", "strategy"}
    task = HydraConfig.get().overrides.task
    keys = [override.partition("=")[0].partition(".")[0] for override in task]
    plan(asked, [override for override, key in zip(task, keys, strict=True) if key not in ours])


if __name__ == "__main__":
    main()
