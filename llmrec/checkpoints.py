"""Checkpoints: the selected weights, and the states that a killed run resumes from.

RUN/checkpoints/fit-epoch-007/                       model.safetensors: the best epoch so far
RUN/checkpoints/fit-state-0008-000120-best-007/      everything after 120 steps of epoch 8:
    model.safetensors, optimizer.safetensors, state.json

Each folder is written under a temporary name, with the sha256 of its files, and renamed; only then
is what it makes superfluous deleted. So at every instant a whole state lies on the disk, and the
best weights that it names. No random generator is stored: batches, negatives and dropout are
functions of seed, epoch, step and process.

All processes save together and the first one writes. What FSDP2 has shared out among them is put
together for the files, so these do not depend on how a run was distributed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from llmrec.errors import UsageError
from llmrec.runs import CHECKPOINTS, check_folder, discard, new_folder

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
"""Version of a state's layout."""


@dataclass
class Progress:
    """Where one stage of training stands, whichever process asks."""

    epoch: int = 1
    """The epoch in training, from 1 on."""
    step: int = 0
    """Its optimizer steps that are done."""
    losses: list[float] = field(default_factory=list)
    """Summed loss of these steps, one figure per process."""
    flops: list[int] = field(default_factory=list)
    """Floating-point operations of all steps, one figure per process."""
    epoch_seconds: float = 0.0
    """Time spent on these steps."""
    seconds: float = 0.0
    """Time spent training before this epoch."""
    best_epoch: int = 0
    """The epoch with the best validation score; 0 before the first."""
    best: float | None = None
    """Its score."""
    finished: bool = False
    """Whether no further epoch is to come."""


def weights_path(run: Path, stage: str, epoch: int) -> Path:
    """The folder of an epoch's weights; `stage` is fit or refit."""
    return run / CHECKPOINTS / f"{stage}-epoch-{epoch:03d}"


def save_weights(run: Path, stage: str, epoch: int, model: nn.Module) -> None:
    """Write an epoch's weights; called by all processes."""
    tensors = _whole(_learned(model))
    if _writes():
        with new_folder(weights_path(run, stage, epoch)) as folder:
            _save_tensors(tensors, folder / MODEL)


def load_weights(run: Path, stage: str, epoch: int, model: nn.Module) -> None:
    """Put an epoch's weights into the model.

    Raises:
        UsageError: They are missing or damaged.
    """
    path = weights_path(run, stage, epoch)
    check_folder(path, "Train again with --run.resume never --run.overwrite true.")
    _load_model(model, path)


def newest_state(run: Path, stage: str) -> Path | None:
    """The folder of the latest state of a stage, if there is one."""
    return max((run / CHECKPOINTS).glob(f"{stage}-state-*"), default=None)


def save_state(
    run: Path,
    stage: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: Mapping[str, Any],
    keep: int,
) -> None:
    """Write all that the rest of the stage depends on, then delete what is no longer needed.

    Called by all processes.

    Args:
        run: the run folder.
        stage: fit or refit.
        model: the bare model, not its distributed wrapper.
        optimizer: its state goes along, by the parameters' order.
        progress: where training stands.
        identity: what decides the run's numbers; resuming under another one is refused.
        keep: how many states stay.
    """
    name = f"{stage}-state-{progress.epoch:04d}-{progress.step:06d}-best-{progress.best_epoch:03d}"
    weights, moments = _whole(_learned(model)), _whole(_optimizer_tensors(optimizer))
    if not _writes():
        return
    with new_folder(run / CHECKPOINTS / name) as folder:
        _save_tensors(weights, folder / MODEL)
        _save_tensors(moments, folder / OPTIMIZER)
        record = {"format": FORMAT, "progress": asdict(progress), "identity": dict(identity)}
        (folder / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")
    tidy(run, stage, keep)


def read_state(path: Path) -> tuple[Progress, dict[str, Any]]:
    """A state's progress and the identity of its run, after checking it and its best weights.

    Raises:
        UsageError: A file is missing, damaged or of another version; says how to go on.
    """
    run, stage = path.parent.parent, path.name.partition("-")[0]
    older = sorted(path.parent.glob(f"{stage}-state-*"))[:-1]
    if older:
        remedy = f"Delete the folder {path} to resume from {older[-1].name}."
    else:
        remedy = "Start over with --run.resume never."
    check_folder(path, remedy)
    record = json.loads((path / STATE).read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        raise UsageError(
            f"{path / STATE} has format {record.get('format')}, and this version of llmrec reads "
            f"{FORMAT}. Start over with --run.resume never."
        )
    progress = Progress(**record["progress"])
    if progress.best_epoch:
        check_folder(
            weights_path(run, stage, progress.best_epoch), "Start over with --run.resume never."
        )
    return progress, record["identity"]


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Put a state into model and optimizer.

    Raises:
        UsageError: See `read_state`.
    """
    progress, _ = read_state(path)
    _load_model(model, path)
    moments: dict[int, dict[str, Tensor | int]] = {}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    with safe_open(path / OPTIMIZER, "pt") as file:
        for name in file.keys():
            number, _, key = name.partition(".")
            value = file.get_tensor(name)
            whole = value.dtype == torch.int64  # see _optimizer_tensors
            moments.setdefault(int(number), {})[key] = (
                int(value) if whole else _like(weights[int(number)], value)
            )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return progress


def refuse_another(path: Path, identity: Mapping[str, Any], processes: int) -> None:
    """Refuse to resume a state under other options, other data or another number of processes.

    Raises:
        UsageError: Names what differs and the ways out.
    """
    progress, before = read_state(path)
    names = [name for name in {**before, **identity} if before.get(name) != identity.get(name)]
    run = path.parent.parent
    ways = "resume it as it was, name another --run.folder, or start over with --run.resume never"
    if names:
        name = names[0]
        was, now = (_short(values.get(name)) for values in (before, identity))
        raise UsageError(
            f"{run} holds an unfinished run with {name} {was}, now {now}"
            f"{f' (and {len(names) - 1} more)' if names[1:] else ''}: {ways}."
        )
    if len(progress.losses) != processes:
        raise UsageError(
            f"{run} holds an unfinished run of {len(progress.losses)} processes, now {processes}: "
            f"{ways}."
        )


def tidy(run: Path, stage: str, keep: int) -> None:
    """Delete what no kept state needs: older states, their weights, and half-written folders."""
    if not (run / CHECKPOINTS).exists():
        return
    states = sorted((run / CHECKPOINTS).glob(f"{stage}-state-*"))[-keep:]
    best = {int(re.sub(r".*-best-", "", state.name)) for state in states}
    wanted = {*states, *(weights_path(run, stage, epoch) for epoch in best)}
    for path in (run / CHECKPOINTS).iterdir():
        if path.name.lstrip(".").startswith(f"{stage}-") and path not in wanted:
            discard(path)


def finish_checkpoints(run: Path) -> None:
    """Delete a finished run's states, and all weights but the selected ones."""
    for stage in ("fit", "refit"):
        state = newest_state(run, stage)
        if state is not None:
            tidy(run, stage, keep=1)
            discard(state)


def _saved_names(model: nn.Module) -> set[str]:
    """What training changes, and buffers; a language model's frozen weights stay where they are."""
    state = model.state_dict().keys()
    # A weight under two names (an output layer that shares the input's table) counts once.
    learned = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {*learned, *(name for name, _ in model.named_buffers())} & state


def _learned(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name] for name in sorted(_saved_names(model))}


def _load_model(model: nn.Module, folder: Path) -> None:
    names = _saved_names(model)
    with safe_open(folder / MODEL, "pt") as file:
        if odd := names ^ set(file.keys()):
            raise UsageError(
                f"{folder / MODEL} is not of this model ({min(odd)}). "
                "Start over with --run.resume never."
            )
        state = model.state_dict()
        weights = {name: _like(state[name], file.get_tensor(name)) for name in names}
    model.load_state_dict(weights, strict=False)


def _writes() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was shared out, put together by all processes for the one that writes."""
    together = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if _writes() else tensor.new_empty(0)
        together[name] = tensor.contiguous()
    return together


def _like(known: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as this process holds another of its shape: all of it, or its part."""
    if not isinstance(known, DTensor) or value.shape != known.shape:  # a count of steps is whole
        return value
    part = distribute_tensor(value, known.device_mesh, known.placements, src_data_rank=None)
    return part.clone()  # a part is a view, and would keep the whole


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # its name for the disk's refusals
        raise OSError(str(error)) from error


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as ``<number of the parameter>.<name>``.

    8-bit AdamW counts steps in Python's integers, here int64 of no dimension; it puts its moments
    one level deeper, and shares two tables, qmap1 and qmap2, among all parameters.
    """
    tensors = {}
    for number, values in optimizer.state_dict()["state"].items():
        deeper = [value for value in values.values() if isinstance(value, dict)]
        flat = {name: value for name, value in values.items() if not isinstance(value, dict)}
        for name, value in itertools.chain(flat.items(), *(inner.items() for inner in deeper)):
            tensor = torch.as_tensor(value)
            # Tensors that share memory cannot be saved.
            tensor = tensor.clone() if name in ("qmap1", "qmap2") else tensor.contiguous()
            tensors[f"{number}.{name}"] = tensor
    return tensors


def _short(value: Any) -> str:
    """A value as one writes it; long hashes cut."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{40,}", text) else text
