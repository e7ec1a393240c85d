"""What `python -m leanlm.plan` asks, and what it is answered."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from leanlm.common.files import literal
from leanlm.common.precision import automatic
from leanlm.config.checks import check
from leanlm.config.schema import Config
from leanlm.planning import report
from leanlm.planning.hardware import devices
from leanlm.training.data import tokens


@dataclass
class Ask(Config):
    """What `conf/plan.yaml` sets beside the keys of a training run."""

    vocabulary: int | None = None
    show: int = 6
    json: bool = False
    picture: str | None = "plan.png"


OWN = {each.name for each in fields(Ask)} - {each.name for each in fields(Config)}


def plan(asked: Ask, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Search the plans of a training configuration; the commands that are printed repeat the overrides.

    Returns:
        `device`, `budget_bytes`, `fits` and `does_not_fit` (lists of plans, see `report.as_dict`), `least_bytes`.

    Raises:
        UserError: with every problem found.
    """
    from leanlm.planning.search import search

    device, count = devices.of_config(asked.device, asked.devices), devices.count(asked.device, asked.devices)
    node = {key: value for key, value in vars(asked).items() if key not in OWN}
    node |= {"device": {"accelerator": "cpu"}}
    if asked.precision == "auto":
        node["precision"] = automatic(asked.device)
    settings = check(OmegaConf.create(literal(asdict(Config(**node)))), needs_weights=False)
    vocabulary = asked.vocabulary or tokens(settings).tokenizer.vocabulary
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
    own = "as asked for: let data and data.tokenizer match" if asked.vocabulary else "of the data; or write vocabulary=..."
    print(f"vocabulary of {vocabulary:,} types ({own})")
    if asked.precision == "auto" and (precision := settings.config.precision) != "fp32":
        print(f"precision=auto is {precision} on this device, which may move the curve; precision=fp32 does not")
    report.show(answer, device, count, size, overrides)
    if asked.picture:
        report.draw(answer, Path(asked.picture))
        print(f"picture: {asked.picture}")
    return result
