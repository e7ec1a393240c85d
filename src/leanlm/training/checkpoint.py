"""One checkpoint format under every plan: a folder of `torch.distributed.checkpoint` with global names.

A checkpoint holds `model.<parameter>`, `optimizer.<parameter>.<state>`, `average.<parameter>` (with `callbacks=ema`),
`carried.<block>.<part>` (rows of the global batch), `rng.<rank>`, and beside them `state.json` (step, versions, plan),
`callbacks.pt` (their states) and `manifest.json` (size and sha256 of every file). It is written under another name and
renamed when whole; older ones are removed only then.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlm.common.errors import UserError, refuse
from leanlm.common.files import write
from leanlm.launch.ranks import on_rank_0, rank, say
from leanlm.memory import offload
from leanlm.optimizers.base import owned, put_away
from leanlm.optimizers.low_bit import convert, empty_like

FORMAT = 1
STATE, CALLBACKS = "state.json", "callbacks.pt"

Named = Iterable[tuple[str, Tensor]]  # a rank's parameters, whole or its shards, by global name


def save(
    folder: Path,
    named: Named,
    optimizer: torch.optim.Optimizer,
    carried: dict[str, Tensor],
    state: dict[str, Any],
    keep: int,
    average: Named = (),
    callbacks: dict[str, Any] | None = None,
) -> Path:
    """Write `folder/step-N` and keep the last `keep` checkpoints. All ranks must call it.

    Args:
        named: parameters to save; each must be given by one rank, or the same by several.
        carried: recurrent state of the global batch, `[global batch, ...]` each.
        state: JSON to keep beside; `state["step"]` names the checkpoint.
        keep: checkpoints to keep, at least 1.
        average: of the parameters over the steps, if one is kept.
        callbacks: name -> state of each callback that has one.

    Raises:
        UserError: on all ranks: a number is not finite, or the disk is full; the checkpoints that were there are as before.
    """
    from leanlm.training import storage

    whole = folder / f"step-{state['step']:08d}"
    part = folder / f".writing-{whole.name}"
    named = list(named)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in named}
    for name, parameter in named:
        state_of_one = optimizer.state.get(parameter, {}).items()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state_of_one if isinstance(value, Tensor)}
    tensors |= {f"average.{name}": value for name, value in average}
    tensors |= {f"carried.{name}": value for name, value in carried.items()}
    tensors |= {f"rng.{rank()}": torch.get_rng_state()}

    def begin() -> None:
        for left in folder.glob(".writing-*"):  # by a run that was killed
            shutil.rmtree(left)
        part.mkdir(parents=True)

    def end() -> None:
        write(part / STATE, json.dumps({"format": FORMAT, **state}, indent=1))
        if callbacks:
            with open(part / CALLBACKS, "wb") as file:
                torch.save(callbacks, file)
        files = sorted(file for file in part.iterdir() if file.is_file())
        manifest = {file.name: [file.stat().st_size, _digest(file)] for file in files}
        write(part / "manifest.json", json.dumps(manifest, indent=1))
        if whole.exists():  # a run that was resumed may reach a step again
            shutil.rmtree(whole)
        part.rename(whole)
        if os.name == "posix":  # Windows opens no folders
            _sync(folder)
        # one of a later step is damaged, or this run would have begun there: it must not crowd out whole ones
        kept = [each for each in checkpoints(folder) if each.name <= whole.name][-keep:]
        for other in set(checkpoints(folder)) - set(kept):
            shutil.rmtree(other)

    try:
        failed = on_rank_0(lambda: storage.failure(begin))
        failed = failed or storage.failure(lambda: storage.save(tensors, part))  # all ranks hear of what fails on one
        failed = failed or on_rank_0(lambda: storage.failure(end))
    finally:
        offload.release_all()
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
    if failed:
        raise UserError(f"no checkpoint of step {state['step']} was written: {failed}; {newest(folder)}")
    return whole


def load(
    folder: Path,
    named: Named,
    optimizer: torch.optim.Optimizer | None,
    average: Named = (),
    prefer_average: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint, made under any plan, into parameters (a name may be there twice) and their optimizer. All ranks must
    call it.

    Args:
        optimizer: whose state is filled; None: only the parameters are wanted.
        average: filled with the average of the weights, or with the weights where the checkpoint has none.
        prefer_average: fill the parameters with the average, if the checkpoint has one.

    Returns:
        The carried state and the JSON that `save` was given.
    """
    from leanlm.training import storage

    stored = storage.tensors_in(folder)
    named = list(named)
    parameters = dict(named)
    missing = [name for name in parameters if f"model.{name}" not in stored]
    if missing:
        raise UserError(f"{folder} is of another model: it has no {missing[0]} ({len(missing)} of {len(parameters)} lacking)")
    has_average = any(name.startswith("average.") for name in stored)
    kind = "average" if prefer_average and has_average else "model"
    tensors = {f"{kind}.{name}": parameter.detach() for name, parameter in parameters.items()}
    average = list(average)
    tensors |= {f"average.{name}": part for name, part in reversed(average) if has_average}
    states: dict[str, dict[str, Tensor]] = {}  # of the optimizer: parameter -> key -> tensor
    for name, meta in stored.items():
        kind, _, rest = name.partition(".")
        owner, _, key = rest.rpartition(".")
        if kind == "optimizer" and optimizer is not None and owner in parameters:
            parameter, state = parameters[owner], states.setdefault(owner, {})
            whole = key in getattr(optimizer, "whole_state", ())
            if len(meta.size) == parameter.dim() > 0 and not whole:  # as large, or packed along its last dimension
                state[key] = empty_like(owned(optimizer, parameter), meta.size, meta.properties.dtype)
            else:
                state[key] = torch.empty(meta.size, dtype=meta.properties.dtype, device=parameter.device)
            if (file := getattr(optimizer, "scratch", None)) is not None:
                put_away(state, file)
            tensors[name] = state[key]
        elif kind == "carried" or name == f"rng.{rank()}":
            tensors[name] = torch.empty(meta.size, dtype=meta.properties.dtype)

    storage.load(tensors, folder)
    offload.release_all()
    for name, parameter in named:
        if parameter is not parameters[name]:
            parameter.detach().copy_(parameters[name].detach())
    for name, part in average:
        source = tensors[f"average.{name}"] if has_average else parameters[name].detach()
        if part is not source:
            part.copy_(source)
    if optimizer is not None:
        for name, parameter in named:
            if name in states:
                mine = parameter is parameters[name]
                optimizer.state[parameter] = {key: part if mine else part.clone() for key, part in states[name].items()}
                convert(optimizer.state[parameter], owned(optimizer, parameter), getattr(optimizer, "kind", None))
        if f"rng.{rank()}" in tensors:
            torch.set_rng_state(tensors[f"rng.{rank()}"])
    carried = {name.removeprefix("carried."): value for name, value in tensors.items() if name.startswith("carried.")}
    return carried, state_of(folder)


def state_of(folder: Path) -> dict[str, Any]:
    """The JSON of a checkpoint."""
    return json.loads((folder / STATE).read_text())


def callback_states(folder: Path) -> dict[str, Any]:
    """Name -> state of each callback that had one.

    Only numbers, text and tensors are read: a callback that saved something else begins anew, rather than end the run.
    """
    file = folder / CALLBACKS
    try:
        return torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
    except pickle.UnpicklingError as error:
        say(f"callbacks begin anew: {file} holds more than numbers, text and tensors: {error}".splitlines()[0])
        return {}


def newest(folder: Path) -> str:
    """Says which checkpoint is the last."""
    found = checkpoints(folder)
    return f"the last checkpoint is {found[-1]}" if found else f"there is no checkpoint in {folder}"


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*"))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; says what is wrong with those after it. None: there is no
    checkpoint yet. All ranks must call it: one reads the files, the others wait.

    Raises:
        UserError: all of them are damaged.
    """

    def find() -> Path | None:
        damaged: list[str] = []
        for each in reversed(checkpoints(folder)):
            wrong = damage(each)
            if wrong is None:
                for line in damaged:
                    say(f"{line}; using {each.name}, the one before it")
                return each
            damaged.append(f"{each} is damaged: {wrong}")
        refuse([*damaged, f"{folder} has no whole checkpoint: start a new run"] if damaged else [])
        return None

    return on_rank_0(find)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        items = [(name, size, digest) for name, (size, digest) in manifest.items()]
    except (OSError, ValueError, AttributeError, TypeError):
        return "manifest.json is missing or cannot be read"
    for name, size, digest in items:
        if not (file := checkpoint / name).is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _digest(file) != digest:
            return f"{name} is not what was written (its sha256 differs)"
    return None


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
