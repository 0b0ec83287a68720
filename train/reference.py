"""Scores of the reference model: computed once, kept on disk, refused where they do not belong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import segment_sum
from bvpo_kernels.types import KINDS, Unit
from train import parallel
from train.config import ModelConfig, RunConfig
from train.data import MicroBatch, StepPlan, load_units
from train.files import replace_file
from train.head import FusedHeadLM, build_policy
from train.parallel import ALONE, World, whole

FORMAT = 1
_MISSING_SHOWN = 5


def response_key(prompt: Sequence[int], response: Sequence[int]) -> str:
    """sha256 of (prompt ids, response ids); the prompt's length keeps the border between them."""
    ids = np.asarray([len(prompt), *prompt, *response], dtype="<i8")
    return hashlib.sha256(ids.tobytes()).hexdigest()


def _segment_keys(units: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    """(key, description) of every segment, in the order in which `pack` lays them out."""
    for unit in units:
        for kind in (*KINDS, MARGINAL):
            for number, pair in enumerate(unit.pairs.get(kind, ())):
                for side in ("chosen", "rejected"):
                    key = response_key(pair.prompt, getattr(pair, side))
                    yield key, f"unit {unit.unit_id!r}, {kind} pair {number}, {side}"


def weights_digest(model: nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every parameter and buffer that is saved."""

    def digest(name: str, tensor: Tensor) -> str:
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(head + hashlib.sha256(content.data).digest()).hexdigest()

    digests = []
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for name, tensor in sorted(model.state_dict().items()):
            # A sharded tensor is whole for a moment, here only: a collective of all ranks.
            digests.append(pool.submit(digest, name, whole(tensor)))
            if isinstance(tensor, DTensor):
                digests[-1].result()
        return hashlib.sha256("".join(d.result() for d in digests).encode()).hexdigest()


def fingerprint(policy: FusedHeadLM, cfg: ModelConfig) -> dict[str, str]:
    """Everything besides the token ids that the scores depend on, whatever the libraries."""
    return {
        "casts": "fsdp" if isinstance(policy, FSDPModule) else "autocast",
        "format": str(FORMAT),
        "weights": weights_digest(policy.model),
        "param_dtype": cfg.param_dtype,
        "compute_dtype": cfg.compute_dtype,
        "attention": policy.model.config._attn_implementation,
        "temperature": repr(policy.transform.temperature),
        "softcap": repr(policy.transform.softcap),
        "trace_open": cfg.trace_open,
        "trace_close": cfg.trace_close,
        "empty_trace": cfg.empty_trace,
    }


@dataclass(frozen=True)
class ReferenceCache:
    """log pi_ref(y|x) in nats by `response_key`, and what they were computed with."""

    fingerprint: Mapping[str, str]
    keys: tuple[str, ...]
    scores_S: Tensor

    @cached_property
    def _index(self) -> dict[str, int]:
        return {key: number for number, key in enumerate(self.keys)}

    def check_fingerprint(self, expected: Mapping[str, str], where: str | Path) -> None:
        """Refuse a cache made by another model or in another way.

        Raises:
            ValueError: naming each key that differs, what was expected and what was found.
        """
        names = sorted({*expected, *self.fingerprint})
        wrong = [
            f"{name}: expected {expected.get(name)!r}, got {self.fingerprint.get(name)!r}"
            for name in names
            if expected.get(name) != self.fingerprint.get(name)
        ]
        if wrong:
            raise ValueError(
                f"{where}: the reference scores belong to another run ({'; '.join(wrong)}); "
                f"rebuild them with cache-ref"
            )

    def check_units(self, units: Sequence[Unit], where: str | Path) -> None:
        """Refuse a cache that lacks a response of `units`.

        Raises:
            ValueError: naming the first responses that are missing and how many there are.
        """
        missing = [what for key, what in _segment_keys(units) if key not in self._index]
        if missing:
            shown = "; ".join(missing[:_MISSING_SHOWN])
            raise ValueError(
                f"{where}: reference scores are missing for {len(missing)} responses ({shown}"
                f"{'; ...' if len(missing) > _MISSING_SHOWN else ''}); rebuild them with cache-ref"
            )

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Nothing: the scores are there."""

    def of(self, micro: MicroBatch) -> Tensor:
        """Scores [S] of a micro-batch, on the CPU."""
        return self.scores(micro.units)

    def scores(self, units: Sequence[Unit]) -> Tensor:
        """Scores [S] of the segments of `pack(units)`, in its order, on the CPU."""
        index = [self._index[key] for key, _ in _segment_keys(units)]
        return self.scores_S[index]


def build(
    policy: FusedHeadLM, micro_batches: Sequence[MicroBatch], cfg: ModelConfig, world: World = ALONE
) -> ReferenceCache:
    """Score every micro-batch without gradients; all ranks call, and all get the scores of all.

    The micro-batches are those that training will use first: a half-precision GEMM may round a row
    differently in another pack, and the first loss is log 2 exactly only in the same packs.
    """
    keys: list[str] = []
    scores: list[Tensor] = []
    failed: list[str] = []
    total = sum(micro.batch.num_tokens for micro in micro_batches)
    bar = tqdm(
        total=total, desc="reference", unit="tok", unit_scale=True, disable=not world.is_main
    )
    with torch.no_grad(), bar:
        for micro in micro_batches:
            batch = micro.batch.to(policy.device)
            scores_S = segment_sum(policy(batch), batch.cu_seqlens).cpu()
            bar.update(batch.num_tokens)
            if micro.is_filler:
                continue
            if not bool(scores_S.isfinite().all()):
                failed += [unit.unit_id for unit in micro.units]
            scores.append(scores_S)
            keys += [key for key, _ in _segment_keys(micro.units)]
    joined = torch.cat(scores) if scores else torch.empty(0)
    parts = world.gather_objects((keys, joined, failed))
    if failed := [name for part in parts for name in part[2]]:
        raise FloatingPointError(f"reference: non-finite score in one of the units {failed}")
    all_keys = tuple(key for part in parts for key in part[0])
    return ReferenceCache(
        fingerprint(policy, cfg), all_keys, torch.cat([part[1] for part in parts])
    )


def save(cache: ReferenceCache, path: Path) -> None:
    """Write `path` (safetensors: `scores` [S]) and its sidecar `path` + ".json".

    The sidecar holds the fingerprint, the keys in the order of the scores, and the digest of the
    scores, so that two halves of different caches are told apart.
    """
    replace_file(path, lambda name: save_file({"scores": cache.scores_S}, name))
    sidecar = {
        "fingerprint": dict(cache.fingerprint),
        "scores_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "keys": list(cache.keys),
    }
    text = json.dumps(sidecar, indent=1)
    replace_file(_sidecar(path), lambda name: name.write_text(text, encoding="utf-8"))


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def load(path: Path) -> ReferenceCache:
    """What `save` wrote.

    Raises:
        ValueError: if the sidecar is missing or does not belong to the scores.
    """
    sidecar_path = _sidecar(path)
    if not sidecar_path.is_file():
        raise ValueError(f"{path}: expected its sidecar {sidecar_path}, got no such file")
    sidecar = json.loads(sidecar_path.read_text(encoding="utf-8"))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sidecar["scores_sha256"]:
        raise ValueError(
            f"{path}: expected scores with sha256 {sidecar['scores_sha256']}, as {sidecar_path} "
            f"says, got {found}"
        )
    scores_S = load_file(path)["scores"]
    return ReferenceCache(sidecar["fingerprint"], tuple(sidecar["keys"]), scores_S)


def cache_path(cfg: RunConfig) -> Path:
    return Path(cfg.run_dir) / "reference.safetensors"


def first_packs(plan: StepPlan, held_out: Sequence[Unit]) -> list[MicroBatch]:
    """This rank's packs in which the run first meets each unit, the held-out ones included."""
    evaluated = plan.step_of(held_out).micro_batches if held_out else ()
    return [*plan.first_packs(), *evaluated]


def load_or_build(
    policy: FusedHeadLM, plan: StepPlan, held_out: Sequence[Unit], cfg: RunConfig,
    world: World = ALONE,
) -> ReferenceCache:  # fmt: skip
    """The cache of the run's folder, checked; built and stored there if there is none.

    Raises:
        ValueError: if the cache was made with other weights or settings, or lacks a response.
    """
    path = cache_path(cfg)
    if not world.broadcast_object(path.exists()):
        return _build_and_save(policy, plan, held_out, cfg, world)
    cache = load(path)
    cache.check_fingerprint(fingerprint(policy, cfg.model), path)
    cache.check_units([*plan.units_used, *held_out], path)
    return cache


def _build_and_save(
    policy: FusedHeadLM, plan: StepPlan, held_out: Sequence[Unit], cfg: RunConfig, world: World
) -> ReferenceCache:
    cache = build(policy, first_packs(plan, held_out), cfg.model, world)
    if world.is_main:
        save(cache, cache_path(cfg))
    world.barrier()
    return cache


def run(cfg: RunConfig) -> None:
    """`cache-ref`: compute the scores of all pairs and store them in `run_dir`, replacing older."""
    with parallel.start(cfg.parallel) as world:
        train_units, held_out = load_units(cfg)
        policy, _ = build_policy(cfg, world)
        policy.self_check()
        plan = StepPlan(train_units, cfg.train, cfg.seed, world.rank, world.size)
        cache = _build_and_save(policy, plan, held_out, cfg, world)
        if world.is_main:
            print(f"reference scores of {len(cache.keys)} responses: {cache_path(cfg)}")
