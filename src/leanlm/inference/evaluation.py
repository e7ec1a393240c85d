"""The loss of a trained model."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from leanlm.common.errors import UserError
from leanlm.common.files import write
from leanlm.common.run_folder import Run
from leanlm.config.checks import check
from leanlm.config.pretrained import is_run
from leanlm.config.schema import Settings
from leanlm.inference.restoring import find, restore, tokenizer_of
from leanlm.launch.processes import launch
from leanlm.launch.ranks import on_rank_0_first, process_group, rank, say
from leanlm.strategies.checks import resolve
from leanlm.strategies.plan import Plan


@dataclass
class Evaluate:
    """What `conf/evaluate.yaml` sets."""

    run: str = "latest"
    checkpoint: str = "last"
    split: str = "validation"
    text: str | None = None
    pseudo: bool = False
    data: Any = None
    sequence: int | None = None
    devices: int | None = None
    lanes: int | None = None
    overlap: int | None = None
    rows: int | None = None
    strategy: Plan = field(default_factory=Plan)
    device: Any = None


def evaluate(asked: Evaluate, within: Callable[[Settings, int], Settings] | None = None) -> dict[str, Any]:
    """Mean loss over every token of a split, once each, or of `asked.text` by the chain rule; of a masked model over hidden
    tokens, of `asked.text` or with `asked.pseudo` over each, hidden by itself.

    Args:
        asked: what `conf/evaluate.yaml` sets.
        within: where `device.memory` is set, settings and vocabulary -> settings that take no more.

    Returns:
        `loss` (nats per token), `perplexity`, `bits_per_byte` (of hidden tokens instead `accuracy`), `tokens`,
        `log_probability` (nats, of all together), of a mixture also `sources`, the loss of each.
    """
    run, config = find(asked.run, asked.sequence, asked.data)
    given: dict[str, Any] = dict.fromkeys(("callbacks", "logger"))
    given |= {"devices": asked.devices, "strategy": asdict(asked.strategy)}
    if asked.strategy.pipeline == 1:
        given["strategy"]["accumulate_grad_batches"] = 1
    instead = {"val_lanes": asked.lanes, "val_overlap": asked.overlap, "device": asked.device}
    config.update(given | {key: value for key, value in instead.items() if value is not None})
    rows = asked.rows or config.global_batch
    plan, _ = resolve(Plan(**given["strategy"]), asked.devices, 0)  # what cannot work about it, `check` says
    data_parallel_size = max(1, plan.data_parallel_size)
    # only the rows in a forward pass: the figures do not depend on it
    config.global_batch = -(-rows // data_parallel_size) * data_parallel_size * max(1, plan.accumulate_grad_batches)
    settings = check(config, needs_text=asked.text is None, needs_tokenizer=False)
    if asked.text is None and asked.split not in settings.corpus.splits:
        raise UserError(f"split={asked.split}: the data has {', '.join(settings.corpus.splits)}")
    if asked.text is not None and not settings.plan.splits_model:
        settings = replace(settings, plan=replace(settings.plan, replicate=1))
    if within is not None and settings.config.device.get("memory"):
        settings = within(settings, tokenizer_of(run).vocabulary)
    result = launch(_work, (settings, run.path, asked), settings.plan.world)
    if asked.text is None and asked.data is None and not asked.pseudo and is_run(str(run.path)) and rank() == 0:
        kind = "" if asked.checkpoint == "last" else f"-{asked.checkpoint}"
        write(run.path / f"evaluation-{asked.split}{kind}.json", json.dumps(result, indent=2))
    return result


def _work(settings: Settings, path: Path, asked: Evaluate) -> dict[str, Any]:
    import numpy as np

    from leanlm.training import build, data
    from leanlm.training.lightning_module import measures

    text = asked.text
    with process_group(settings.config.device["accelerator"]):
        tokenizer, parallel, state = restore(settings.config, settings.plan, Run(path), asked.checkpoint)
        objective = data.objective(settings.config)
        if asked.pseudo or text is not None:
            objective = objective.one_by_one()
        if text is None:
            if rank() == 0 and "text" in state and (said := data.differs(settings, state["text"])):
                say(f"{said}; it is read with the tokenizer of {path}")
            numbers, size = on_rank_0_first(lambda: data.split_of(settings, asked.split, tokenizer))
        else:
            numbers, size = np.asarray(tokenizer.encode(text.encode())), len(text.encode())
            numbers = objective.frame(tokenizer, numbers)
            if not len(numbers):
                raise UserError("text is empty")
        module = build.module(settings, parallel, training=False)
        batches = data.whole_split(settings, tokenizer, parallel.net, numbers, objective.ready(tokenizer, settings.config.seed))
        build.trainer(settings, [], []).validate(module, batches, verbose=False)
        found = module.split_loss.compute()
    loss, count = float(found["loss"]), int(found["tokens"])
    result: dict[str, Any] = measures(loss, len(numbers), size, float(found["accuracy"])) | {
        "tokens": count,
        "log_probability": -loss * count,
    }
    if text is None and settings.corpus.sources:
        result["sources"] = {name: each.item() for name, each in zip(numbers.parts, found["losses"], strict=False)}
    return result
