"""Loss and perplexity of a trained model: `python -m leanlm.evaluate run=runs/X [split=test] [text="a sentence"]`."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from leanlm import cli
from leanlm.config import Config, Settings, check
from leanlm.data import tokenizer as tokenizers
from leanlm.data.tokenizer import Tokenizer
from leanlm.errors import UserError
from leanlm.launch import launch, process_group, rank, say
from leanlm.prepare import tokens
from leanlm.runs import Run, write
from leanlm.strategies.plan import Plan
from leanlm.strategies.resolve import resolve

if TYPE_CHECKING:
    from leanlm.strategies.cut import Cut


@dataclass
class Evaluate:
    """What `conf/evaluate.yaml` sets."""

    run: str = "latest"
    split: str = "validation"
    text: str | None = None
    devices: int | None = None
    lanes: int | None = None
    overlap: int | None = None
    rows: int | None = None
    strategy: Plan = field(default_factory=Plan)
    device: Any = None


def evaluate(asked: Evaluate) -> dict[str, float]:
    """Mean loss over every token of a split, once each, or of `asked.text` by the chain rule; within `device.memory`, if set.

    Returns:
        `loss` (nats per token), `perplexity`, `bits_per_byte`, `tokens`, `log_probability` (nats, of all together).
    """
    run = Run.find(asked.run)
    config = run.config()
    given: dict[str, Any] = {"devices": asked.devices, "strategy": asdict(asked.strategy)}
    if asked.strategy.pipeline == 1:
        given["strategy"]["accumulate_grad_batches"] = 1
    given |= {
        key: value
        for key, value in (("val_lanes", asked.lanes), ("val_overlap", asked.overlap), ("device", asked.device))
        if value is not None
    }
    for key, value in given.items():
        OmegaConf.update(config, key, value, merge=False)
    rows = asked.rows or config.global_batch
    plan, _ = resolve(Plan(**given["strategy"]), asked.devices, 0)  # what cannot work about it, `check` says
    readers = max(1, plan.readers)
    # only the rows in a forward pass: the figures do not depend on it
    config.global_batch = -(-rows // readers) * readers * max(1, plan.accumulate_grad_batches)
    settings = check(config)
    if asked.text is None and asked.split not in settings.corpus.splits:
        raise UserError(f"split={asked.split}: the data has {', '.join(settings.corpus.splits)}")
    if asked.text is not None and not settings.plan.cuts_model:
        settings = replace(settings, plan=replace(settings.plan, replicate=1))
    if settings.config.device.get("memory"):
        from leanlm.planning.reading import rows_that_fit

        settings = rows_that_fit(settings, tokenizer_of(run).vocabulary)
    result = launch(_work, (settings, run.path, asked.split, asked.text), settings.plan.world)
    if asked.text is None and rank() == 0:
        write(run.path / f"evaluation-{asked.split}.json", json.dumps(result, indent=2))
    return result


def _work(settings: Settings, path: Path, split: str, text: str | None) -> dict[str, float]:
    import numpy as np

    from leanlm import build

    with process_group(settings.config.device["accelerator"]):
        tokenizer, cut = restore(settings.config, settings.plan, Run(path))
        if text is None:
            data = tokens(settings)
            numbers, size = data.splits[split], data.bytes[split]
        else:
            numbers, size = np.asarray(tokenizer.encode(text.encode())), len(text.encode())
            if not len(numbers):
                raise UserError("text is empty")
        module = build.module(settings, cut, training=False)
        batches = build.whole_split(settings, tokenizer, cut.net, numbers)
        build.trainer(settings, [], []).validate(module, batches, verbose=False)
        found = module.split_loss.compute()
    loss, count = float(found["loss"]), int(found["tokens"])
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss * len(numbers) / size / math.log(2),  # as if tokens that are not counted cost the mean
        "tokens": count,
        "log_probability": -loss * count,
    }


def restore(config: Config, plan: Plan, run: Run) -> "tuple[Tokenizer, Cut]":
    """Tokenizer and trained weights of a run under a plan, from its newest whole checkpoint, whatever plan made it.

    Raises:
        UserError: the run has no whole checkpoint.
    """
    from leanlm import build
    from leanlm.strategies import checkpoint

    newest, damaged = checkpoint.newest_whole(run.checkpoints)
    for line in damaged:
        say(line)
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint" + (" that is whole" if damaged else " yet"))
    tokenizer = tokenizer_of(run)
    cut = build.cut(config, plan, tokenizer.vocabulary)
    checkpoint.load(newest, cut.named_parameters(), None)
    return tokenizer, cut


def tokenizer_of(run: Run) -> Tokenizer:
    return tokenizers.restore(json.loads((run.path / "tokenizer.json").read_text()))


def main() -> None:
    cli.run("evaluate", Evaluate, _main)


def _main(asked: Evaluate) -> None:
    result = evaluate(asked)
    what = f"the {asked.split} split" if asked.text is None else repr(asked.text)
    say(
        f"{what}: {result['tokens']:,} tokens, loss {result['loss']:.4f} nats per token, perplexity "
        f"{result['perplexity']:.2f}, {result['bits_per_byte']:.3f} bits per byte"
        + ("" if asked.text is None else f", log-probability {result['log_probability']:.4f} nats")
    )


if __name__ == "__main__":
    main()
