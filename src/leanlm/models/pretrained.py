"""Weights of a folder in Hugging Face's layout: config.json, model.safetensors in one or many files.

Only what a parameter holds is read, when it is filled, so that no process holds more than its own and one tensor.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from leanlm.common.errors import UserError
from leanlm.models.contract import Model
from leanlm.models.families import family_of

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
POSITIONS = "embed.positions.weight"
SAMPLES, PIECE = 512, 1 << 16  # of a file, for its fingerprint; bytes of each
# Buffers and copies of tied weights that earlier versions of transformers have written, and BERT's heads for whole sentences.
LEFT_OUT = re.compile(
    r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids|decoder\.(weight|bias))$"
    r"|^(bert|roberta)\.pooler\.|^cls\.seq_relationship\."
)
RENAMED = re.compile(r"LayerNorm\.(gamma|beta)$")  # in the first files of BERT's


def read_json(file: Path) -> dict[str, Any]:
    """Raises UserError: it is not there, or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent}: there is no {file.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


class Weights:
    """The tensors of a folder, by the names that parameters have here."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError: config.json or the names of the weights are not understood, or a file is missing."""
        self.folder, self.config = folder, read_json(folder / CONFIG)
        self.family, _ = family_of(self.config, str(folder / CONFIG))
        index = folder / INDEX
        names = set(read_json(index)["weight_map"].values()) if index.is_file() else {WEIGHTS}
        missing = [name for name in sorted(names) if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: there is no {missing[0]}; weights are read from safetensors files")
        self.held: dict[str, tuple[Path, str, list[int]]] = {}  # name -> file, name there, shape there
        for path in (folder / name for name in names):
            with opened(path) as file:
                for key in file.keys():  # noqa: SIM118
                    self.held[self._by_rules(key)] = path, key, file.get_slice(key).get_shape()
        self.without_head = bool(self.family.head) and not any(name.startswith(self.family.head) for name in self.held)

    def _by_rules(self, name: str) -> str:
        """A name as the rules have it: some files leave out the prefix of all names but the head's."""
        name = RENAMED.sub(lambda end: f"LayerNorm.{'weight' if end[1] == 'gamma' else 'bias'}", name)
        first = {rule.theirs.partition(".")[0] for rule in self.family.rules}
        return name if name.partition(".")[0] in first else self.family.prefix + name

    def __contains__(self, name: str) -> bool:
        """Whether the value of a parameter is in the file: of a family's head it may not be."""
        return not (self.without_head and self.family.source(name)[0].startswith(self.family.head))

    def problems(self, net: Model) -> list[str]:
        """What of the weights is not in a model, or of the model not in the weights, one line each."""
        have = {name: shape for name, (_, _, shape) in self.held.items()}
        want: dict[str, list[int]] = {}
        for name, parameter in net.named_parameters():
            theirs, part, transposed = self.family.source(name)
            if name not in self:
                continue
            rows, *columns = parameter.shape
            shape = [*columns, rows * (part + 1)] if transposed else [rows * (part + 1), *columns]
            want[theirs] = max(want.get(theirs, []), shape)  # it ends with its last part
            if name == POSITIONS and theirs in have and rows <= have[theirs][0]:
                want[theirs] = have[theirs]  # a shorter context
        unused = {self.family.source("head.projection.weight")[0]} - {*want}  # a copy of the embedding, where they are tied
        return [
            f"{self.folder}: {name} is {have.get(name, 'not there')}; by {CONFIG} it should be {want.get(name, 'not there')}"
            for name in sorted({*have, *want} - unused)
            if have.get(name) != want.get(name) and not LEFT_OUT.search(name)
        ]

    def fingerprint(self) -> str:
        """Names the weights by config.json, what each file begins with, and SAMPLES pieces that are spread over it: large files
        need not be read for it."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted({path for path, _, _ in self.held.values()}):
            size = path.stat().st_size
            digest.update(f"\0{path.name}\0{size}\0".encode())
            with open(path, "rb") as file:
                for place in range(0, size, max(PIECE, size // SAMPLES)):
                    file.seek(place)
                    digest.update(file.read(PIECE))
        return digest.hexdigest()

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """The value of a parameter, with the shape and type of `like`; it may be a part of the file, to be copied."""
        theirs, part, transposed = self.family.source(name)
        path, key, _ = self.held[theirs]
        rows = slice(part * like.shape[0], (part + 1) * like.shape[0])
        with opened(path) as file:  # anew for each, or the pages of the whole file would count as this process's
            held = file.get_slice(key)
            return (held[:, rows].t() if transposed else held[rows]).to(like.dtype)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises UserError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
