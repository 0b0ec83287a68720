"""Checkpoints that a run goes on from: whole or absent, verified before they are read.

    run_dir/checkpoints/step-00000012/
        __0_0.distcp ...      tensors, by torch.distributed.checkpoint; each rank its shards
        .metadata             where each tensor is
        state.json            everything that is not a tensor
        rng-0.json ...        the generators of each rank
        manifest.json         size and sha256 of the files above, step, identity of the run

A folder is filled under a temporary name, put on the disk and renamed when all ranks are done. All
ranks see the same file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from train.checkpoint.state import rng_state, seed_rng, set_rng_state
from train.checkpoint.state_files import (
    METADATA,
    VALUES,
    copy_to_host,
    read_state,
    split_state,
    write_tensors,
)
from train.config import CheckpointConfig
from train.runtime.files import sha256, sync_folder, write_synced
from train.runtime.parallel import World
from train.runtime.settings import differences

FORMAT = 1
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"\.step-\d+\.(tmp|old)")


class Loaded(NamedTuple):
    """step: optimizer steps done. state: the template's tensors, filled, and the saved values."""

    step: int
    state: dict[str, Any]


class Checkpointer:
    """Saves and finds the checkpoints in a folder; every rank calls every method.

    Args:
        folder: for checkpoints alone.
        identity: what a run must share with a checkpoint that it goes on from, by name.
        seed: of the generators of ranks that a checkpoint was made without.

    Raises:
        ValueError: for `keep_latest` or `every` < 1.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        cfg: CheckpointConfig,
        identity: Mapping[str, str],
        seed: int = 0,
    ) -> None:
        if cfg.keep_latest < 1:
            raise ValueError(f"checkpoint.keep_latest: expected >= 1, got {cfg.keep_latest}")
        if cfg.every is not None and cfg.every < 1:
            raise ValueError(f"checkpoint.every: expected >= 1, got {cfg.every}")
        self.folder, self.world, self.cfg = folder, world, cfg
        self.identity, self.seed = dict(identity), seed
        # A group of its own: a background save must not mix with the collectives of training, and
        # JSON and staged tensors are on the host.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._newest: int | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after `step` optimizer steps; with `async_save`, copy it and return.

        A step that is already there, saved or gone on from, is not written again.

        Args:
            state: nested dicts and lists of tensors, DTensors and what JSON can hold.

        Raises:
            TypeError: naming a value that is neither.
            RuntimeError: from the ranks that could not write, now or in the save before.
        """
        self.finish()
        if step == self._newest:
            return
        tensors, values = split_state(state)
        generators = json.dumps(rng_state(self.world.device))
        if self.cfg.async_save:
            tensors = copy_to_host(tensors)
            self._writing = self._pool.submit(self._write, step, tensors, values, generators)
        else:
            self._write(step, tensors, values, generators)
        self._newest = step

    def finish(self) -> None:
        """Wait for a save in the background.

        Raises:
            RuntimeError: if it failed.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_latest(self, template: Callable[[], Mapping[str, Any]]) -> Loaded | None:
        """The newest whole checkpoint, or None; defective ones are named in a warning and skipped.

        Sets the generators of this rank. Tensors are resharded to the template's.

        Args:
            template: makes a state like the saved one, whose tensors are overwritten. It is called
                only if there is a checkpoint: it may allocate the optimizer's state.

        Raises:
            ValueError: if the checkpoint belongs to another run, naming what differs; if
                `checkpoint.resume` is false and the folder holds any.
        """
        found = self._together(partial(checkpoints, self.folder))[0]
        if found and not self.cfg.resume:
            raise ValueError(
                f"checkpoint.resume: expected true, or a run_dir without checkpoints, got false "
                f"and {found[-1]}"
            )
        for path in reversed(found):
            check = partial(find_defect, path, self.world.rank, self.world.size)
            defect = next(filter(None, self._together(check)), None)
            if defect is None:
                return self._load(path, template)
            if self.world.rank == 0:
                warnings.warn(f"{path}: checkpoint refused: {defect}", stacklevel=2)
        return None

    def _write(self, step: int, tensors: dict[str, Tensor], values: str, generators: str) -> None:
        rank, final = self.world.rank, self.folder / f"step-{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        self._together(lambda: _clear(self.folder, temporary) if rank == 0 else None)
        write_tensors(temporary, tensors, self._group)

        def write_own() -> dict[str, Any]:
            own = {f"rng-{rank}.json": generators} | ({VALUES: values} if rank == 0 else {})
            for name, text in own.items():
                write_synced(temporary / name, text)
            names = [*own, *(path.name for path in temporary.glob(f"__{rank}_*"))]
            names += [METADATA] if rank == 0 else []
            return {name: _describe(temporary / name) for name in names}

        files: dict[str, Any] = {}
        for part in self._together(write_own):
            files |= part
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": self.world.size,
            "torch": torch.__version__,
            "identity": self.identity,
            "files": files,
        }

        def publish() -> None:
            if rank == 0:
                write_synced(temporary / _MANIFEST, _sealed(manifest))
                _publish(temporary, final)
                _prune(self.folder, final, self.cfg.keep_latest)

        self._together(publish)

    def _load(self, path: Path, template: Callable[[], Mapping[str, Any]]) -> Loaded:
        manifest = read_manifest(path)
        check_identity(manifest["identity"], self.identity, path)
        state = read_state(path, template(), self._group)
        rank = self.world.rank
        if rank < manifest["world_size"]:
            text = (path / f"rng-{rank}.json").read_text(encoding="utf-8")
            set_rng_state(json.loads(text), self.world.device)
        else:
            seed_rng(self.seed, rank, manifest["step"])
        self._newest = manifest["step"]
        return Loaded(manifest["step"], state)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Results of all ranks; an error on one is raised on all, so that none waits for it."""
        result: tuple[Any, str | None]
        try:
            result = work(), None
        except Exception as error:
            if self._group is None:
                raise
            result = None, f"{type(error).__name__}: {error}"
        if self._group is None:
            return [result[0]]
        results: list[Any] = [None] * self.world.size
        dist.all_gather_object(results, result, group=self._group)
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(results) if text]
        if failed:
            raise RuntimeError(f"checkpoint in {self.folder}: {'; '.join(failed)}")
        return [value for value, _ in results]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    steps = {int(m[1]): path for path in folder.iterdir() if (m := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def find_defect(path: Path, rank: int = 0, size: int = 1) -> str | None:
    """Why a checkpoint cannot be used; of several ranks each reads its share of the files."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return str(error)
    for name in sorted(manifest["files"])[rank::size]:
        expected = manifest["files"][name]
        if not (path / name).is_file():
            return f"{name} is missing"
        bytes_found = (path / name).stat().st_size
        if bytes_found != expected["bytes"]:
            return f"{name}: expected {expected['bytes']} bytes, got {bytes_found}"
        if sha256(path / name) != expected["sha256"]:
            return f"{name}: its sha256 is not the one in {_MANIFEST}"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself.

    Raises:
        ValueError: if it is missing, unreadable or damaged.
    """
    try:
        sealed = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        manifest, digest = sealed["manifest"], sealed["sha256"]
    except FileNotFoundError:
        raise ValueError(f"{_MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{_MANIFEST}: {error}") from None
    if json.loads(_sealed(manifest))["sha256"] != digest:
        raise ValueError(f"{_MANIFEST}: its sha256 is not its content's")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{_MANIFEST}: expected format {FORMAT}, got {manifest['format']}")
    return manifest


def check_identity(got: Mapping[str, str], expected: Mapping[str, str], path: Path) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        ValueError: naming each entry of `expected` or `got` that differs.
    """
    # Both are texts already.
    wrong = differences(expected, got, "this command", "the checkpoint", show=str)
    if wrong:
        raise ValueError(
            f"{path}: the checkpoint belongs to another run ({'; '.join(wrong)}); go on with the "
            f"options and data that it was made with, or choose another run_dir"
        )


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The manifest with a digest of itself."""
    text = json.dumps(manifest, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": manifest})


def _left_overs(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if _LEFT_OVER.fullmatch(path.name))


def _clear(folder: Path, temporary: Path) -> None:
    """An empty `temporary`; what an interrupted save left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _left_overs(folder):
        shutil.rmtree(path)
    temporary.mkdir()


def _publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name, once it is on the disk."""
    sync_folder(temporary)
    if final.exists():
        # Refused when this run began, else the run would have gone on from it.
        os.replace(final, final.with_name(f".{final.name}.old"))
    os.replace(temporary, final)
    sync_folder(final.parent)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Keep `keep` checkpoints up to the newest; later ones were refused when this run began."""
    found = checkpoints(folder)
    last = found.index(newest) + 1
    for path in (*found[: max(last - keep, 0)], *found[last:]):
        # Renamed first: half a folder must not keep the name.
        outgoing = path.with_name(f".{path.name}.old")
        os.replace(path, outgoing)
        shutil.rmtree(outgoing)
    for path in _left_overs(folder):
        shutil.rmtree(path)
