"""A run's model and tokenizer as a folder in Hugging Face's layout."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanlm.common.errors import UserError, refuse
from leanlm.common.files import write, write_json
from leanlm.common.run_folder import Run
from leanlm.config.arguments import made, target, typed
from leanlm.config.pretrained import is_run
from leanlm.config.schema import Config
from leanlm.data.exported_tokenizer import chat_template, marks, portable, stops
from leanlm.data.tokenizer import Tokenizer
from leanlm.inference.exported_adapter import write_adapter
from leanlm.inference.exported_model import Layout, layout, tensors
from leanlm.inference.restoring import restore, tokenizer_of
from leanlm.models.lora import merge
from leanlm.models.pretrained import CONFIG, INDEX, WEIGHTS
from leanlm.strategies.plan import Plan

LIMIT = 5 * 10**9  # bytes of a file of weights
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("model", "peft")
UNFINISHED = ".unfinished"


@dataclass
class Export:
    """What `conf/export.yaml` sets."""

    run: str = "latest"
    checkpoint: str = "last"
    to: str | None = None
    dtype: str | None = None
    format: str = "model"

    def problems(self) -> list[str]:
        found = []
        if self.format not in FORMATS:
            found.append(f"format={self.format}: choose one of {', '.join(FORMATS)}")
        if self.dtype not in (None, *DTYPES):
            found.append(f"dtype={self.dtype}: choose one of {', '.join(DTYPES)}, or null for that of the run's weights")
        if self.to is None:
            found.append("to=null: name a folder that is not there yet, such as to=exported")
        elif (folder := Path(os.path.expanduser(self.to))).exists() and (not folder.is_dir() or any(folder.iterdir())):
            found.append(f"to={self.to} is there already, and not an empty folder: name another")
        return found


class Exported(NamedTuple):
    folder: Path
    with_code: bool  # transformers has to run code in it


def export(asked: Export) -> Exported:
    """Write a run's model and tokenizer to a folder. An adapter is merged into the weights beside which it was trained, or
    written alone, in peft's layout.

    Raises:
        UserError: the run or the folder cannot be used, or the model has no counterpart in transformers.
    """
    run = Run.find(asked.run)
    problems, config = typed(run.config())
    refuse([*asked.problems(), *problems])
    config.device = {"accelerator": "cpu"}
    arguments = {key: value for key, value in config.model.items() if key != "_target_"}
    kind = target("model", config.model)
    found = layout(kind, arguments, tokenizer_of(run).vocabulary, config.sequence)
    folder = Path(os.path.expanduser(str(asked.to)))
    if asked.format == "peft":
        refuse(_without_peft(config, found))
    with claimed(folder) as part:
        tokenizer, parallel, _ = restore(config, Plan(), run, asked.checkpoint)
        dtype = DTYPES.get(str(asked.dtype), next(parallel.net.parameters()).dtype)
        told = write_tokenizer(part, tokenizer, None if kind.carries_state else config.sequence)
        if asked.format == "peft":
            lora = made("adapter", config.adapter)
            write_adapter(part, parallel.net, lora, found.source, str(config.init_from), dtype)
            return Exported(folder, False)
        merge(parallel.net)
        told |= {} if not found.code else {"use_cache": False}
        write_weights(part, tensors(parallel.net, found.source), dtype)
        write_json(part / "generation_config.json", told)
        write_json(part / CONFIG, found.config | told | {"torch_dtype": str(dtype).removeprefix("torch.")})
        for name, text in found.code.items():
            write(part / name, text)
    return Exported(folder, bool(found.code))


def _without_peft(config: Config, found: Layout) -> list[str]:
    """Why peft's layout does not do for a run, one line each."""
    instead = "format=model writes the whole model"
    if not config.adapter:
        return ["format=peft: this run has trained no adapter; leave it out"]
    if found.code:
        return [f"format=peft: transformers has no such model, on which peft could put the adapter; {instead}"]
    if is_run(str(config.init_from)):
        return [f"format=peft: peft needs a folder of Hugging Face's for the base, and {config.init_from} is a run; {instead}"]
    return []


@contextmanager
def claimed(to: Path) -> Iterator[Path]:
    """A folder within `to` for the files of an export, which move up when all are whole, config.json last.

    Raises:
        UserError: `to` cannot be made, or is not empty: nobody else gets it while this one is at work.
    """
    made, part = not to.exists(), to / UNFINISHED
    try:
        to.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except FileExistsError:
        raise UserError(f"to={to}: another export is at work there, or was killed: remove it, or name another") from None
    except OSError as error:
        raise UserError(f"to={to} cannot be made: {error.strerror}") from None
    try:
        if len(list(to.iterdir())) > 1:
            raise UserError(f"to={to} is not an empty folder: name another")
        yield part
        for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG):
            file.replace(to / file.name)
        part.rmdir()
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if made:
            with suppress(OSError):
                to.rmdir()  # only an empty one
        raise


def write_tokenizer(folder: Path, tokenizer: Tokenizer, length: int | None) -> dict[str, Any]:
    """Write a tokenizer's files. `length`: the longest row that the model reads, in tokens; None: any.

    Returns:
        What config.json says of it.
    """
    model, template = portable(tokenizer), chat_template(tokenizer)
    write(folder / "tokenizer.json", model.to_str())
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks(tokenizer, model)}
    write_json(folder / "tokenizer_config.json", told | ({"model_max_length": length} if length else {}))
    if template:
        write(folder / "chat_template.jinja", template)
    ends = stops(tokenizer, model)
    return {"bos_token_id": tokenizer.start, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def write_weights(folder: Path, named: dict[str, tuple[list[Tensor], int]], dtype: torch.dtype) -> None:
    """Write tensors, each made of parts along a dimension, to one file, or to several with an index, of LIMIT bytes at most (or
    one tensor)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files: list[list[str]] = [[]]
    bytes_of = {name: sum(part.numel() for part in parts) * dtype.itemsize for name, (parts, _) in named.items()}
    room = LIMIT
    for name, size in bytes_of.items():
        if size > room and files[-1]:
            files.append([])
            room = LIMIT
        files[-1].append(name)
        room -= size
    stem, _, end = WEIGHTS.partition(".")
    where: dict[str, str] = {}
    for i, names in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"{stem}-{i:05d}-of-{len(files):05d}.{end}"
        held = {name: joined(*named[name]).to(dtype).contiguous() for name in names}
        try:
            save_file(held, folder / file, {"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder.parent}: its weights cannot be written: {error}") from None
        where |= dict.fromkeys(names, file)
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": where})


def joined(parts: list[Tensor], dimension: int) -> Tensor:
    """Without a copy where there is one part."""
    return torch.cat(parts, dimension) if len(parts) > 1 else parts[0]
