"""A nested state in files: tensors by torch.distributed.checkpoint, every other value in JSON."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

VALUES, METADATA = "state.json", ".metadata"
# What stands for a tensor in the JSON, before its name.
_TENSOR = "tensor\0"
# What may be in `METADATA`, by module.
_DESCRIPTIONS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
}  # fmt: skip


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The tensors by the path to them, and the JSON of the rest.

    Raises:
        TypeError: naming what is neither a tensor nor what JSON can hold.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, json.dumps(_without_tensors(state, "state", tensors))


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: Any = None) -> None:
    """Write this rank's shards to the disk; rank 0 adds where everything is.

    Raises:
        RuntimeError: from the ranks that failed, on all ranks.
    """
    with _collectively(folder):
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(folder, sync_files=True),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )


@contextmanager
def _collectively(folder: Path) -> Iterator[None]:
    """No warning that a run without a process group has none; errors as the caller expects them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # not an Exception, and pages long
            reasons = [f"rank {rank}: {reason[0]!r}" for rank, reason in error.failures.items()]
            raise RuntimeError(f"{folder}: {'; '.join(reasons)}") from error


def read_state(path: Path, template: Mapping[str, Any], group: Any = None) -> dict[str, Any]:
    """A verified checkpoint's values, with the template's tensors, now filled, in their places.

    Only what the template names is read.
    """
    tensors: dict[str, Tensor] = {}
    _without_tensors(template, "state", tensors)
    with _collectively(path):
        dcp.load(
            dict(tensors),
            storage_reader=_SafeReader(path),
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=group is None,
        )
    values = json.loads((path / VALUES).read_text(encoding="utf-8"))
    return {name: _with_tensors(values[name], tensors) for name in template}


def _without_tensors(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A copy for JSON, tensors replaced by references and put into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return _TENSOR + name
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{name}: expected names that are str, got {wrong[0]!r}")
        return {
            key: _without_tensors(item, f"{name}.{key}", tensors) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_tensors(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: expected a tensor or what JSON can hold, got {type(value).__name__}")


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_TENSOR):
        return tensors[value.removeprefix(_TENSOR)]
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    return value


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that training does not touch; DTensors keep their placements."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    stager = DefaultStager(options)
    try:
        staged: Any = stager.stage(tensors)
        return staged
    finally:
        stager.close()


class _SafeReader(dcp.FileSystemReader):
    """Reads tensors without running anything that a file may ask for.

    `.metadata` is a pickle by format; only the classes that describe tensors are let through.
    Tensors are read with `weights_only` by the base class, and nothing else is stored: values that
    are not tensors, which it would unpickle, are in JSON.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        content = (Path(self.path) / METADATA).read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _DESCRIPTIONS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{METADATA}: {module}.{name} does not describe a tensor")
