"""The data of a configured run: its tokens, the micro-batches of each step, the whole of a split."""

import os
from dataclasses import replace
from typing import Any

import numpy as np

from leanlm.common.errors import refuse
from leanlm.config.checks import fits
from leanlm.config.schema import Config, Settings
from leanlm.data.batches import GlobalBatches, Lanes, WholeSplit, Windows
from leanlm.data.packing import Packed, PackedBatches, PieceByPiece, Rows, packed
from leanlm.data.preparation_bar import PreparationBar
from leanlm.data.tokenizer import NAMES, Tokenizer
from leanlm.data.tokens import Progress, Tokens, fingerprint, prepare
from leanlm.launch.ranks import rank
from leanlm.models.contract import Model
from leanlm.strategies.plan import Plan

MANY = 1 << 20  # tokens that are looked at together


def tokens(settings: Settings) -> Tokens:
    """The tokens of the configured text.

    Raises:
        UserError: the text is too short, or `data.ignore` names a token that does not exist.
    """
    data = settings.config.data
    with PreparationBar() as bar:
        made = _in_rows(prepare(settings.corpus, data["tokenizer"], data["vocabulary"], bar), settings, bar)
    of_documents = settings.corpus.form is not None
    problems = [] if of_documents else fits(settings.config, {split: len(numbers) for split, numbers in made.splits.items()})
    unknown = [name for name in data.get("ignore", []) if not made.tokenizer.numbers(name)]
    problems += [f"data.ignore: the tokenizer has no token {name!r}" for name in unknown]
    left_out = ignored(settings.config, made.tokenizer)
    for split, numbers in made.splits.items() if left_out and not of_documents else ():
        if all(np.isin(numbers[first : first + MANY], left_out).all() for first in range(0, len(numbers), MANY)):
            problems.append(f"data.ignore leaves nothing to count: it names all {len(numbers):,} tokens of the {split} split")
    refuse(problems)
    return made


def _in_rows(made: Tokens, settings: Settings, report: Progress) -> Tokens:
    """Prepared splits, those of documents in rows."""
    config = settings.config
    if settings.corpus.form is None:
        return made
    rows = {
        split: packed(documents, f"{made.fingerprint}-{split}", config.sequence, config.seed, report)
        for split, documents in made.splits.items()
    }
    return replace(made, splits=rows)


def split_of(settings: Settings, split: str, tokenizer: Tokenizer) -> tuple[Any, int]:
    """Numbers `[tokens]`, or documents in rows, and bytes of one split of the configured text, by a run's own tokenizer: one
    that is made of the text as it is today may have other numbers.

    Raises:
        UserError: the text has what the tokenizer does not know.
    """
    with PreparationBar() as bar:
        made = prepare(replace(settings.corpus, splits={split: settings.corpus.splits[split]}), tokenizer, 0, bar)
        made = _in_rows(made, settings, bar)
    return made.splits[split], made.bytes[split]


def differs(settings: Settings, text: str) -> str | None:
    """What is to be said of the configured text, if it is or may be another than that of a fingerprint."""
    tokenizer, vocabulary = settings.config.data["tokenizer"], settings.config.data["vocabulary"]
    if tokenizer not in NAMES and not os.path.exists(os.path.expanduser(tokenizer)):
        return f"data.tokenizer={tokenizer} is gone, so that nothing tells whether the text is the run's"
    with PreparationBar() as bar:
        same = fingerprint(settings.corpus, tokenizer, vocabulary, bar) == text
    return None if same else "the text is not the one that the run was trained on"


def ignored(config: Config, tokenizer: Tokenizer) -> list[int]:
    """Numbers of the tokens that are not counted as targets."""
    return [number for name in config.data.get("ignore", []) for number in tokenizer.numbers(name)]


def training_batches(settings: Settings, tokens: Tokens, net: Model, first_step: int = 0) -> GlobalBatches:
    """This rank's micro-batches of every step from `first_step` on."""
    config, plan = settings.config, settings.plan
    text, left_out = tokens.splits["train"], ignored(config, tokens.tokenizer)
    shape = config.sequence, config.global_batch, config.seed
    rest = *_share(plan), plan.batches_per_step, left_out, first_step
    if settings.corpus.form is not None:
        order, isolate = Rows(len(text.ends), *shape), settings.corpus.form.isolate
        return PackedBatches(text.documents.numbers, order, *rest, packed=text, isolate=isolate)
    kind = Lanes if net.carries_state else Windows
    return GlobalBatches(text, kind(len(text), *shape), *rest)


def whole_split(settings: Settings, tokenizer: Tokenizer, net: Model, numbers: Any) -> WholeSplit | PieceByPiece:
    """This rank's part of a split (or of any token numbers), each token once."""
    config, plan = settings.config, settings.plan
    if isinstance(numbers, Packed):
        rows = max(1, min(plan.micro_batch(config.global_batch), len(numbers.pieces)))
        return PieceByPiece(numbers, rows, *_share(plan), ignored(config, tokenizer))
    overlap = config.val_overlap
    if net.carries_state:
        overlap = max(overlap, config.sequence)  # a lane first reads some text to come to a state
        length = WholeSplit.lane_length(len(numbers), config.val_lanes, overlap)
    else:
        length = config.sequence
    rows = max(1, min(plan.micro_batch(config.global_batch), -(-len(numbers) // length)))
    lanes = config.sequence, length, overlap, rows
    return WholeSplit(numbers, tokenizer.start, *lanes, *_share(plan), ignored(config, tokenizer))


def _share(plan: Plan) -> tuple[int, int]:
    """Among how many ranks the rows are divided, and which of them this one is."""
    return plan.data_parallel_size, plan.data_parallel_rank(rank())
