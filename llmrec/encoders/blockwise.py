"""A language model larger than memory: its blocks stay on disk and are read one at a time.

Only embeddings, final norm and the like are held. Each transformer block in turn is read from the
safetensors files, run over all texts and dropped; the states between two blocks wait in a scratch
folder. Every step goes through the model's own forward pass, in which the blocks before the one at
hand give back what they gave when it was their turn: masks, rotary angles and position biases are
the model's own.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
)

from llmrec.errors import UsageError


def model_class(hf_config: PreTrainedConfig) -> type[AutoModel] | type[AutoModelForTextEncoding]:
    """What loads a model that reads text: T5 and its kin without their decoders."""
    if type(hf_config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return AutoModelForTextEncoding
    return AutoModel


def load_without_blocks(
    source: str,
    hf_config: PreTrainedConfig,
    parts: Callable[[nn.Module], tuple[nn.Module, nn.ModuleList]],
    device: torch.device,
    options: dict[str, Any],
) -> tuple[nn.Module, dict[str, Any], Mapping[str, Tensor]]:
    """Load all of a model but its blocks, which stay without memory ("meta" tensors).

    Args:
        source: local folder or hub id.
        hf_config: the model's configuration.
        parts: finds the text encoder of a model and its blocks.
        device: where the rest is put.
        options: for ``from_pretrained``.

    Returns:
        The model, what transformers says of its loading, and the weights left on disk: name ->
        tensor, read when it is asked for.
    """
    with torch.device("meta"):
        skeleton = model_class(hf_config).from_config(hf_config)
    encoder, blocks = parts(skeleton)
    on_disk = {id(block) for block in blocks}
    if encoder is not skeleton:  # a decoder that reads no text here; embeddings may be shared
        on_disk |= {id(m) for m in skeleton.children() if m is not encoder} - {
            id(m) for m in skeleton.children() if isinstance(m, nn.Embedding)
        }
    places = _device_map(skeleton, on_disk, str(device))
    # It would warn of the parts that stay on disk.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    try:
        model, info = model_class(hf_config).from_pretrained(source, device_map=places, **options)
    except ValueError as error:
        if "re-saved" not in str(error):
            raise
        raise UsageError(
            f"the weights of type {hf_config.model_type} lie on disk in another form than they are "
            "used, so its blocks cannot be read one by one. Leave out encoder.placement=blocks."
        ) from error
    weights: Mapping[str, Tensor] = next(
        module._hf_hook.weights_map.dataset
        for module in model.modules()
        if hasattr(module, "_hf_hook") and getattr(module._hf_hook, "weights_map", None) is not None
    )
    remove_hook_from_submodules(model)  # they would read a weight at each use
    return model, info, weights


def _device_map(
    module: nn.Module, on_disk: set[int], device: str, path: str = ""
) -> dict[str, str]:
    """Name of a part -> where it lies, for all parts of a module."""
    found: dict[str, str] = {}
    for name, child in module.named_children():
        if id(child) in on_disk:
            found[path + name] = "disk"
        elif any(id(inner) in on_disk for inner in child.modules()):
            found |= _device_map(child, on_disk, device, f"{path}{name}.")
        else:
            found[path + name] = device
    return found | {path + name: device for name, _ in module.named_parameters(recurse=False)}


class _Reached(Exception):
    """Ends a forward pass behind the block at hand, with its output."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state


class BlocksOnDisk:
    """The blocks of a model, of which at most one is in memory at any time."""

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        weights: Mapping[str, Tensor],
        device: torch.device,
        name: str,
    ) -> None:
        """Take over the forward passes of the blocks of `model`; see `load_without_blocks`."""
        paths = {id(module): path for path, module in model.named_modules()}
        self.paths = [paths[id(block)] for block in blocks]
        self.blocks: list[nn.Module] = list(blocks)
        self.weights, self.device, self.name = weights, device, name
        self.forwards = [block.forward for block in self.blocks]
        for number, block in enumerate(self.blocks):
            block.forward = partial(self._forward, number)
        self._at: int | None = None
        self._state: Any = None

    @contextmanager
    def sweep(
        self,
        read: Callable[[int], Tensor],
        sizes: Sequence[int],
        scratch: Path,
        advance: Callable[[int], object],
    ) -> Iterator[Callable[[int], Tensor]]:
        """Run all blocks but the last over all batches; gives a `read` that finishes a batch.

        Args:
            read: runs the model over the batch of a number.
            sizes: tokens in each batch, padding included, the longest texts first.
            scratch: folder in which a temporary one holds the states between two blocks.
            advance: called with a batch's number after each block.

        Raises:
            UsageError: The states would not fit on the disk, or the model does more between its
                blocks than hand states on.
        """
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".shard-states-") as temporary:
            folder = Path(temporary)
            try:
                for number in range(len(self.blocks) - 1):
                    folder.touch()  # in use, though its files are only replaced
                    with self._loaded(number):
                        for batch in range(len(sizes)):
                            self._step(number, read, folder / f"{batch}.pt")
                            if number == batch == 0:
                                self._check_room(folder, sizes)
                            advance(batch)
                with self._loaded(len(self.blocks) - 1):
                    yield lambda batch: self._last(read, batch, folder)
            finally:
                self._at = self._state = None

    def _step(self, number: int, read: Callable[[int], Tensor], file: Path) -> None:
        """Run one block over one batch, from the states in a file to those that replace them."""
        self._at, self._state = number, self._kept(file) if number else None
        try:
            read(int(file.stem))
        except _Reached as reached:
            _check_state(reached.state, self.name)
            with file.open("wb") as out:  # a full disk is then an OSError
                torch.save(reached.state, out)

    def _last(self, read: Callable[[int], Tensor], batch: int, folder: Path) -> Tensor:
        self._at = len(self.blocks) - 1
        self._state = self._kept(folder / f"{batch}.pt") if self._at else None
        return read(batch)

    def _kept(self, file: Path) -> Any:
        return torch.load(file, map_location=self.device, weights_only=True)

    def _forward(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """What the model calls in place of a block's forward pass."""
        if self._at is None:  # one text at a time: correct, and each block is read for it
            with self._loaded(number):
                return self.forwards[number](*args, **kwargs)
        states = args[0] if args else kwargs["hidden_states"]
        if number and states is not _states(self._state):
            raise UsageError(
                f"encoder.model={self.name} changes its states between two blocks, so its blocks "
                "cannot be run one by one. Use encoder.placement=spread."
            )
        if number < self._at:
            return self._state
        state = self.forwards[number](*args, **kwargs)
        if number == len(self.blocks) - 1:
            return state
        raise _Reached(state)

    @contextmanager
    def _loaded(self, number: int) -> Iterator[None]:
        """Hold the weights of one block for a while."""
        block, path = self.blocks[number], self.paths[number]
        names = [name for name, _ in block.named_parameters()]
        names += [name for name, buffer in block.named_buffers() if buffer.is_meta]
        try:
            for name in names:
                set_module_tensor_to_device(
                    block, name, self.device, value=self.weights[f"{path}.{name}"]
                )
            for name, _ in block.named_buffers():
                set_module_tensor_to_device(block, name, self.device)
            yield
        finally:
            for name in names:
                set_module_tensor_to_device(block, name, "meta")

    def _check_room(self, folder: Path, sizes: Sequence[int]) -> None:
        """After the first batch, whose texts are the longest."""
        needed = (folder / "0.pt").stat().st_size * sum(sizes) / sizes[0]
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UsageError(
                f"encoder.placement=blocks keeps {needed / 1e9:.1f} GB of states in "
                f"{folder.parent}, where {free / 1e9:.1f} GB are free. Free some space, name "
                "another folder for the store, or lower encoder.max_item_tokens."
            )


def _states(state: Any) -> Any:
    return state if isinstance(state, Tensor) else state[0]


def _check_state(state: Any, name: str) -> None:
    """Refuse what a block hands on if it is more than tensors."""
    parts = state if isinstance(state, tuple) else (state,)
    if not all(part is None or isinstance(part, Tensor) for part in parts):
        raise UsageError(
            f"encoder.model={name} hands more than tensors from block to block, so its blocks "
            "cannot be run one by one. Use encoder.placement=spread."
        )
