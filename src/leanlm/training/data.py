"""The data of a configured run: its tokens, the micro-batches of each step, the whole of a split."""

import os
from dataclasses import replace
from typing import Any

import numpy as np

from leanlm.common.errors import refuse
from leanlm.config.arguments import made as made_of
from leanlm.config.checks import fits
from leanlm.config.schema import Config, Settings
from leanlm.data.batches import GlobalBatches, Lanes, Order, WholeSplit, Windows
from leanlm.data.corpus import Corpus
from leanlm.data.mixture import Mixed, MixedBatches, SourceBySource, Turns, mixed, turns
from leanlm.data.objectives import Causal
from leanlm.data.packing import Packed, PackedBatches, PieceByPiece, Rows, packed
from leanlm.data.preparation_bar import PreparationBar
from leanlm.data.tokenizer import NAMES, Tokenizer
from leanlm.data.tokens import Progress, Tokens, common_tokenizer, fingerprint, prepare
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
        made = _prepared(settings.corpus, data["tokenizer"], data["vocabulary"], settings.config, bar)
    streams = [
        (source, split, numbers)
        for split, whole in made.splits.items()
        for source, numbers in (whole.parts if isinstance(whole, Mixed) else {"": whole}).items()
        if not isinstance(numbers, Packed)
    ]
    problems = [
        line for source, split, numbers in streams if split == "train" for line in fits(settings.config, len(numbers), source)
    ]
    unknown = [name for name in data.get("ignore", []) if not made.tokenizer.numbers(name)]
    problems += [f"data.ignore: the tokenizer has no token {name!r}" for name in unknown]
    left_out = ignored(settings.config, made.tokenizer)
    for source, split, numbers in streams if left_out else ():
        if all(np.isin(numbers[first : first + MANY], left_out).all() for first in range(0, len(numbers), MANY)):
            what = f"the {split} split" + (f" of data.sources.{source}" if source else "")
            problems.append(f"data.ignore leaves nothing to count: it names all {len(numbers):,} tokens of {what}")
    refuse(problems)
    return replace(made, tokenizer=objective(settings.config).vocabulary(made.tokenizer))


def objective(config: Config) -> Causal:
    """What is learned of the text."""
    return made_of("objective", config.objective)


def _prepared(corpus: Corpus, tokenizer: str | Tokenizer, vocabulary: int, config: Config, report: Progress) -> Tokens:
    """Prepared splits, those of documents in rows, those of a mixture by source."""
    if corpus.sources:
        name = fingerprint(corpus, tokenizer, vocabulary, report)
        one = common_tokenizer(corpus, tokenizer, vocabulary, report) if isinstance(tokenizer, str) else tokenizer
        return mixed(corpus, name, {name: _prepared(each, one, 0, config, report) for name, each in corpus.sources.items()})
    made = prepare(corpus, tokenizer, vocabulary, report)
    if corpus.form is None:
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
        made = _prepared(settings.corpus.only(split), tokenizer, 0, settings.config, bar)
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
    config, plan, corpus = settings.config, settings.plan, settings.corpus
    text, left_out = tokens.splits["train"], ignored(config, tokens.tokenizer)
    shape = config.sequence, config.global_batch, config.seed
    learned = objective(config).ready(tokens.tokenizer, config.seed)
    rest = *_share(plan), plan.batches_per_step, left_out, first_step, learned

    def of(corpus: Corpus, text: Any, kind: type[Order]) -> GlobalBatches:
        if corpus.form is None:
            return GlobalBatches(text, kind(len(text), *shape), *rest)
        order = Rows(len(text.ends), *shape)
        return PackedBatches(text.documents.numbers, order, *rest, packed=text, isolate=corpus.form.isolate)

    if not corpus.sources:
        return of(corpus, text, Lanes if net.carries_state else Windows)
    parts = [of(corpus.sources[name], part, Windows) for name, part in text.parts.items()]
    order = Turns(turns(corpus.shares), [part.order for part in parts], config.global_batch)
    return MixedBatches(np.empty(0, np.uint8), order, *rest, parts=parts)


def whole_split(settings: Settings, tokenizer: Tokenizer, net: Model, numbers: Any, scored: Causal | None = None) -> Any:
    """This rank's batches of a split (or of any token numbers), each token once. `scored`: by another objective than the run's,
    which knows the tokenizer."""
    config, plan = settings.config, settings.plan
    scored = scored or objective(config).ready(tokenizer, config.seed)
    most = plan.micro_batch(config.global_batch)
    if isinstance(numbers, Mixed):
        return SourceBySource([whole_split(settings, tokenizer, net, part, scored) for part in numbers.parts.values()])
    if isinstance(numbers, Packed):
        rows = max(1, min(most, len(numbers.pieces)))
        return scored.whole(PieceByPiece(numbers, rows, *_share(plan), ignored(config, tokenizer), scored), most)
    overlap, sequence = config.val_overlap, config.sequence
    if net.carries_state:
        overlap = max(overlap, config.sequence)  # a lane first reads some text to come to a state
        length = WholeSplit.lane_length(len(numbers), config.val_lanes, overlap)
    else:
        length = sequence = min(config.sequence, len(numbers))
    rows = max(1, min(most, -(-len(numbers) // length)))
    lanes = sequence, length, overlap, rows
    return scored.whole(WholeSplit(numbers, tokenizer.start, *lanes, *_share(plan), ignored(config, tokenizer), scored), most)


def _share(plan: Plan) -> tuple[int, int]:
    """Among how many ranks the rows are divided, and which of them this one is."""
    return plan.data_parallel_size, plan.data_parallel_rank(rank())
