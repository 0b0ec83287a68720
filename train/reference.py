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
from tqdm import tqdm

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import segment_sum
from bvpo_kernels.types import KINDS, Unit
from train.config import ModelConfig, RunConfig
from train.data import MicroBatch, StepPlan, load_units, make_step
from train.files import replace_file
from train.head import FusedHeadLM, build_policy

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

    def digest(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return hashlib.sha256(head + hashlib.sha256(content.data).digest()).hexdigest()

    tensors = sorted(model.state_dict().items())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return hashlib.sha256("".join(pool.map(digest, tensors)).encode()).hexdigest()


def fingerprint(policy: FusedHeadLM, cfg: ModelConfig) -> dict[str, str]:
    """Everything besides the token ids that the scores depend on, whatever the libraries."""
    return {
        "format": str(FORMAT),
        "weights": weights_digest(policy.model),
        "param_dtype": cfg.param_dtype,
        "compute_dtype": cfg.compute_dtype,
        "attention": cfg.attention,
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

    def scores(self, units: Sequence[Unit]) -> Tensor:
        """Scores [S] of the segments of `pack(units)`, in its order, on the CPU."""
        index = [self._index[key] for key, _ in _segment_keys(units)]
        return self.scores_S[index]


def build(
    policy: FusedHeadLM, micro_batches: Sequence[MicroBatch], cfg: ModelConfig
) -> ReferenceCache:
    """Score every micro-batch without gradients.

    The micro-batches are those that training will use first: a half-precision GEMM may round a row
    differently in another pack, and the first loss is log 2 exactly only in the same packs.
    """
    keys: list[str] = []
    scores: list[Tensor] = []
    total = sum(micro.batch.num_tokens for micro in micro_batches)
    with torch.no_grad(), tqdm(total=total, desc="reference", unit="tok", unit_scale=True) as bar:
        for micro in micro_batches:
            batch = micro.batch.to(policy.device)
            scores_S = segment_sum(policy(batch), batch.cu_seqlens).cpu()
            if not bool(scores_S.isfinite().all()):
                ids = [unit.unit_id for unit in micro.units]
                raise FloatingPointError(f"reference: non-finite score in one of the units {ids}")
            scores.append(scores_S)
            keys += [key for key, _ in _segment_keys(micro.units)]
            bar.update(batch.num_tokens)
    return ReferenceCache(fingerprint(policy, cfg), tuple(keys), torch.cat(scores))


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
    """The packs of the first epoch and of the evaluation: every unit once."""
    steps = plan.first_epoch()
    if held_out:
        steps.append(make_step(held_out, plan.token_budget))
    return [micro for step in steps for micro in step.micro_batches]


def load_or_build(
    policy: FusedHeadLM, plan: StepPlan, held_out: Sequence[Unit], cfg: RunConfig
) -> ReferenceCache:
    """The cache of the run's folder, checked; built and stored there if there is none.

    Raises:
        ValueError: if the cache was made with other weights or settings, or lacks a response.
    """
    path = cache_path(cfg)
    if not path.exists():
        cache = build(policy, first_packs(plan, held_out), cfg.model)
        save(cache, path)
        return cache
    cache = load(path)
    cache.check_fingerprint(fingerprint(policy, cfg.model), path)
    cache.check_units([*plan.units, *held_out], path)
    return cache


def run(cfg: RunConfig) -> None:
    """`cache-ref`: compute the scores of all pairs and store them in `run_dir`, replacing older."""
    train_units, held_out = load_units(cfg)
    policy, _ = build_policy(cfg)
    policy.self_check()
    plan = StepPlan(train_units, cfg.train, cfg.seed)
    cache = build(policy, first_packs(plan, held_out), cfg.model)
    save(cache, cache_path(cfg))
    print(f"reference scores of {len(cache.keys)} responses: {cache_path(cfg)}")
