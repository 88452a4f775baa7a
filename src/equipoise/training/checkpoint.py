"""Checkpoints by torch.distributed.checkpoint, also on one process, so that the same files reshard.

A checkpoint is a directory ``step-00000123``: safetensors files, and ``checkpoint.json`` with the step, the state and
every file's size and digest. It is written under another name and renamed once it is whole. Nothing is unpickled.
"""

import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.optim import Adam, Optimizer

from equipoise.errors import UserError
from equipoise.training import manifest

Tensors = dict[str, Shaped[Tensor, "..."]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Loaded:
    """What was loaded.

    Attributes:
        step: the step it was saved at.
        state: as it was given to ``save``.
        path: the checkpoint.
        skipped: newer checkpoints that could not be used, newest first, each with the reason.
        unrestored: random states that were not saved and stay as they are; empty unless inexact loading was allowed.
    """

    step: int
    state: dict[str, Any]
    path: Path
    skipped: tuple[tuple[Path, str], ...]
    unrestored: tuple[str, ...]


def save(folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, which becomes the latest, and return its path; called on every rank alike.

    Whenever it is killed, the last whole checkpoint stays. Checkpoints of later steps are removed: they come from a run
    that went on from another state.

    Args:
        folder: holds the run's checkpoints; every rank sees it.
        step: optimizer steps so far.
        tensors: by name; a plain tensor is taken to be the same on all ranks that name it, a DTensor is sharded.
        state: what JSON can hold; rank 0's counts.
        keep: how many checkpoints to keep, this one included; at least 1.
    Fails: UserError if it cannot be written, as on a full disk; nothing of it is left then.
    """
    assert keep >= 1
    target = folder / f"step-{step:08d}"
    partial = folder / f".tmp-{target.name}"
    try:
        _on_first_rank(lambda: _prepare(folder))
        with _one_process_is_enough():
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            state_dict_saver.save(_packed(tensors), storage_writer=writer)
        _on_first_rank(lambda: _commit(partial, target, step, state))
        _on_first_rank(lambda: _prune(target, keep))
    except (OSError, CheckpointException) as error:
        cause = _cause(error)
        _on_first_rank(lambda: shutil.rmtree(partial, ignore_errors=True))
        if not isinstance(cause, OSError):
            raise cause from error
        kept = latest(folder)
        raise UserError(
            f"Cannot write the checkpoint of step {step} to {folder}: {cause.strerror}; make room or choose another "
            f"folder ({f'the last good checkpoint, {kept.name}, is kept' if kept else 'there is no earlier one'})."
        ) from error
    return target


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in the folder, which may yet turn out to be damaged; None if there is none."""
    return next(iter(_checkpoints(folder)), None)


def load(folder: Path, tensors: Tensors, allow_previous: bool = False, allow_inexact: bool = False) -> Loaded:
    """Fill ``tensors`` in place from the latest checkpoint, after every file's size and digest was verified.

    Args:
        folder: as given to ``save``.
        tensors: as given to ``save``: the same names, shapes and dtypes.
        allow_previous: if the latest cannot be used, take the newest one that can.
        allow_inexact: allow random states (``rng_tensors``) to be missing, or to be saved and not asked for.
    Fails: UserError if there is no checkpoint, or if it is damaged or does not fit; nothing has been filled then.
    """
    layout = _over_ranks({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    loaded = _on_first_rank(lambda: _choose(folder, layout, allow_previous, allow_inexact))
    present = {name: tensor.detach() for name, tensor in tensors.items() if name not in loaded.unrestored}
    try:
        with _one_process_is_enough():
            state_dict_loader.load(present, storage_reader=HuggingFaceStorageReader(str(loaded.path)))
    except CheckpointException as error:
        raise UserError(f"{loaded.path} cannot be read ({_cause(error)}); remove it.") from error
    return loaded


def flatten(model: nn.Module, *optimizers: Optimizer) -> Tensors:
    """The tensors of a model (no wrapper around it) and its optimizers, not copied, so that ``load`` fills them.

    They are ``model.<name>``, parameters and persistent buffers, tied ones once, and ``optimizer.<name>.<state>``.
    Adam's and AdamW's state is made where it is missing; other optimizers must have taken a step. Learning rates and
    other settings of parameter groups are not among them.

    Fails: UserError if an optimizer has a parameter that the model does not have, or state that is not a tensor.
    """
    own = _own_tensors(model)
    names = {id(tensor): name for name, tensor in own.items()}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in own.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in names:
                    raise UserError(f"{type(optimizer).__name__} has a parameter that is not the model's; remove it.")
                for key, value in _state(optimizer, group, parameter).items():
                    name = f"optimizer.{names[id(parameter)]}.{key}"
                    assert name not in tensors, f"two optimizers update {name}"
                    tensors[name] = value
    return tensors


def rng_tensors(device: torch.device | str = "cpu") -> Tensors:
    """This rank's random states, as uint8: torch's on the CPU and, if ``device`` is one, the current CUDA device's."""
    states = {f"rng.{_rank()}.cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states[f"rng.{_rank()}.cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(tensors: Tensors) -> None:
    """Set this rank's random states to those of ``rng_tensors``."""
    torch.set_rng_state(tensors[f"rng.{_rank()}.cpu"])
    if f"rng.{_rank()}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng.{_rank()}.cuda"])


def export_weights(model: nn.Module, path: Path) -> None:
    """Write parameters and persistent buffers as one safetensors file, tied ones once.

    Rank 0 writes; if the model has sharded parameters, every rank must call this.

    Fails: UserError if the file cannot be written; a file that was there stays as it was.
    """
    own = _own_tensors(model)
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in own.items()}
    if _rank() != 0:
        return
    partial = path.with_name(f".tmp-{path.name}")
    try:
        manifest.write(partial, safetensors.torch.save(_packed(whole), metadata={"format": "pt"}))
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"Cannot write the weights to {path}: {error.strerror}; make room for them.") from error


def _packed(tensors: Tensors) -> Tensors:
    """As safetensors takes them: without gaps."""
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _own_tensors(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers by name; what has several names has its first."""
    by_identity = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert isinstance(tensor, Tensor), f"{name} is not a tensor"
        by_identity.setdefault(id(tensor), (name, tensor))
    return dict(by_identity.values())


def _state(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensors:
    """The optimizer's state of one parameter."""
    if isinstance(optimizer, Adam) and parameter.requires_grad and not optimizer.state.get(parameter):
        # As Adam makes it at its first step, which cannot be taken here: it would be counted, and run others' hooks.
        device = parameter.device if group["capturable"] or group["fused"] else "cpu"
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=dtype, device=device)}
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
            optimizer.state[parameter][key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise UserError(f"Cannot save {type(optimizer).__name__}: its state {key!r} is not a tensor; use AdamW.")
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first. ``.old`` stands while the same step is saved anew; it is the older of the two."""
    found = [(re.fullmatch(r"step-([0-9]+)(\.old)?", path.name), path) for path in folder.glob("step-*")]
    order = {path: (int(match[1]), match[2] is None) for match, path in found if match}
    return sorted(order, key=order.__getitem__, reverse=True)


def _prepare(folder: Path) -> None:
    """Make the folder, and remove what a killed process left."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)


def _commit(partial: Path, target: Path, step: int, state: dict[str, Any]) -> None:
    """Seal the checkpoint and give it its name."""
    manifest.seal(partial, step, state)
    old = target.with_name(f"{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    manifest.sync(target.parent)
    if old.exists():
        _remove(old)


def _prune(target: Path, keep: int) -> None:
    """Remove checkpoints later than the target, and the oldest beyond ``keep``."""
    every = _checkpoints(target.parent)
    place = every.index(target)
    for path in every[:place] + every[place + keep :]:
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; it loses its name first, so that none is ever seen half removed."""
    nameless = path.with_name(f".tmp-removed-{path.name}")
    path.rename(nameless)
    shutil.rmtree(nameless)


def _choose(folder: Path, layout: manifest.Layout, allow_previous: bool, allow_inexact: bool) -> Loaded:
    """The newest checkpoint that is whole and fits."""
    every, skipped = _checkpoints(folder), []
    for path in every:
        try:
            step, state = manifest.verify(path)
            return Loaded(step, state, path, tuple(skipped), manifest.fit(path, layout, allow_inexact))
        except UserError as error:
            advice = "--allow-previous takes the one before it" if path != every[-1] else "start in another folder"
            if not allow_previous:
                raise UserError(f"{error}; {advice}.") from error
            skipped.append((path, str(error)))
    reason = f"can be used: {skipped[0][1]}; start in another folder." if skipped else "was found."
    raise UserError(f"No checkpoint in {folder} {reason}")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _on_first_rank(work: Callable[[], Result]) -> Result:
    """Let rank 0 work; every rank gets its result or its error."""
    outcome: list[Any] = [None, None]
    if _rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _over_ranks(layout: manifest.Layout) -> manifest.Layout:
    """What any rank has."""
    every = [layout] * (dist.get_world_size() if dist.is_initialized() else 1)
    if dist.is_initialized():
        dist.all_gather_object(every, layout)
    return {name: place for part in every for name, place in part.items()}


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed."""
    return next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error


@contextmanager
def _one_process_is_enough() -> Iterator[None]:
    """Without the warning that torch.distributed is not initialised: one process is a normal case here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
