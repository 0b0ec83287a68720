"""`python -m train estimate`: does a step fit, and how long does it take?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from bvpo_kernels.backends.eager.grad_stats import scratch_bytes
from bvpo_kernels.head.cost import HeadShape, scored_flops
from train.config import RunConfig
from train.model.adapters import check
from train.model.attention import AUTO
from train.model.models import attention_of
from train.online import needs_copy, scores_steps
from train.sizing.config import EstimationConfig
from train.sizing.head_schedule import HeadSchedule, head_schedule
from train.sizing.trace import (
    QUADRATIC,
    Activations,
    Sizes,
    fake_policy,
    load_config,
    sizes,
    trace,
)

Run = TypeVar("Run", bound=RunConfig)
GIB = 2**30
# FLOPs of attention's backward over its forward: QK^T once more than the plain one's two.
FUSED_BACKWARD, PLAIN_BACKWARD = 2.5, 2.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, where a step needs the most. reference: weights of `reference:
    frozen_copy`. host: on the host instead (cpu_offload)."""

    parameters: int
    reference: int
    gathered: int
    gradients: int
    optimizer: int
    kept: int
    working: int
    statistics: int
    host: int
    where: str

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in DEVICE_ROWS)


DEVICE_ROWS = {
    "parameters": "parameters",
    "reference": "frozen copy",
    "gathered": "gathered weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "kept": "activations for the backward",
    "working": "working memory",
    "statistics": "gradient statistics",
}


@dataclass(frozen=True)
class Compute:
    """FLOPs of one rank in one step. reference: the forward of a reference that scores the step's
    own packs. model: what the mathematics of training needs, for the MFU: nothing is recomputed, no
    masked pair of tokens counts, and no reference."""

    decoder: float
    recomputation: float
    attention: float
    head: float
    reference: float
    model: float

    @property
    def total(self) -> float:
        return self.decoder + self.recomputation + self.attention + self.head + self.reference


@dataclass(frozen=True)
class Estimate:
    """micro_batches: of one rank in a step."""

    sizes: Sizes
    memory: Memory
    compute: Compute
    micro_batches: int


def _itemsize(name: str) -> int:
    return getattr(torch, name).itemsize


def _shards(cfg: RunConfig, gpus: int) -> int:
    replicate = cfg.parallel.replicate
    if gpus < 1 or replicate < 1 or gpus % replicate:
        raise ValueError(
            f"gpus: expected a multiple of parallel.replicate, {replicate}, got {gpus}"
        )
    return gpus // replicate


def count_micro_batches(cfg: RunConfig, gpus: int, segments: int) -> int:
    """Of one rank in a step, when units have four segments and fill their packs."""
    packs = -(-cfg.train.units_per_step * 4 // segments)
    return -(-packs // gpus)


def _statistics(
    cfg: RunConfig, size: Sizes, groups: int, micro_batches: int, matrices: int, device: str
) -> int:
    """Of `GradStats`: tiles of the groups' gradients, dH in fp32, and what is kept of them."""
    options = cfg.alpha.estimate
    if options is None or options.mode == "norm":
        return 0
    scratch = scratch_bytes(device) if options.mode == "exact" else 0
    scratch += 4 * cfg.train.tokens_per_micro_batch * size.head[1]
    if options.mode == "exact" and options.cross == "exact":
        return scratch + 2 * 4 * size.trained  # one gradient per kind
    head = size.head[0] * size.head[1] if size.head_trained else 0
    vectors = size.trained - size.trained_matrices - head
    sketch = options.sketch_size**2 * matrices + max(vectors, 0)
    return scratch + 4 * groups * sketch * micro_batches


def _memory(
    cfg: RunConfig, size: Sizes, used: Activations, gpus: int, micro_batches: int, statistics: int
) -> Memory:
    shards = _shards(cfg, gpus)
    itemsize, compute = _itemsize(cfg.model.param_dtype), _itemsize(cfg.model.compute_dtype)
    sharded = gpus > 1
    # Adapters of half-precision weights are fp32.
    trained = size.trained * (itemsize if cfg.adapter is None else max(itemsize, 4))
    parameters = ((size.parameters - size.trained) * itemsize + trained) // shards
    gradients, optimizer = trained // shards, 2 * trained // shards
    # A second set of the same weights, sharded alike. Its gathered layers and activations are gone
    # before the policy's forward, which needs as many, and a backward.
    copied = parameters if needs_copy(cfg) else 0
    gathered = host = 0
    if sharded:
        # The head's group, the layer that runs and the one that is gathered ahead of it.
        elements = min(size.last + 2 * size.layer, size.parameters)
        if not cfg.parallel.reshard_after_forward:
            elements = size.parameters
        gathered = elements * compute
    if cfg.parallel.cpu_offload:
        host = parameters + copied + gradients + optimizer
        parameters = copied = gradients = optimizer = 0
    if sharded and micro_batches > 1 and not cfg.parallel.sync_every_micro_batch:
        gradients += size.trained * _itemsize(cfg.parallel.reduce_dtype)
    return Memory(
        parameters=parameters, reference=copied, gathered=gathered, gradients=gradients,
        optimizer=optimizer, kept=used.kept, working=used.peak - used.kept, statistics=statistics,
        host=host, where=used.where,
    )  # fmt: skip


def _compute(
    cfg: RunConfig, size: Sizes, segments: int, micro_batches: int, head: HeadSchedule
) -> Compute:
    tokens, recomputed = cfg.train.tokens_per_micro_batch, size.recomputed / size.layers
    again = recomputed * size.matrices - size.recomputed * size.closing
    # Pairs of tokens: eager and sdpa go through the whole row and its mask, a flash attention with
    # variable lengths through the lower half of each segment.
    needed = tokens**2 / segments / 2
    quadratic = cfg.model.attention in QUADRATIC
    per_pair = 4 * size.attention  # QK^T and PV, two FLOPs each
    forward = per_pair * (tokens**2 if quadratic else needed)
    backward = PLAIN_BACKWARD if cfg.model.attention == "eager" else FUSED_BACKWARD
    vocab, dim = size.head
    shape = HeadShape(tokens, dim, vocab, size.head_rank)
    product, scores = 2 * tokens * vocab * dim, scored_flops(shape)
    linear, weights = 2 * size.matrices * tokens, 2 * size.trained_matrices * tokens
    scored = linear + forward + scores
    if cfg.reference == "adapter_off":
        scored -= weights
    return Compute(
        # The input gradient of a first layer on a frozen embedding, not needed, is counted.
        decoder=micro_batches * (2 * linear + weights),
        recomputation=micro_batches * 2 * tokens * again,
        attention=micro_batches * forward * (1 + backward + recomputed),
        head=micro_batches * head.flops,
        reference=micro_batches * scored if scores_steps(cfg) else 0.0,
        model=micro_batches
        * (
            2 * linear
            + weights
            + 3 * (per_pair * needed + scores - product)
            + (3 if size.head_trained else 2) * product
        ),
    )


def with_attention(cfg: Run) -> Run:
    """The same with model.attention "auto" replaced by what this machine would take."""
    if cfg.model.attention != AUTO:
        return cfg
    return replace(cfg, model=replace(cfg.model, attention=attention_of(cfg.model, packed=True)))


def estimate(
    cfg: RunConfig,
    gpus: int,
    segments: int = 4,
    config: PretrainedConfig | None = None,
    device: str = "cuda",
) -> Estimate:
    """Memory and FLOPs of one rank, from shapes alone.

    Args:
        device: its type, by which the library chooses workspaces.
        config: of the model; None: what `model.name` says.

    Raises:
        FileNotFoundError, ValueError: naming the argument that cannot be served.
    """
    check(cfg)
    cfg = with_attention(cfg)
    _shards(cfg, gpus)
    if segments < 1:
        raise ValueError(f"segments: expected a number >= 1, got {segments}")
    config = load_config(cfg.model) if config is None else config
    micro_batches = count_micro_batches(cfg, gpus, segments)
    with fake_policy(config, cfg, gpus > 1) as policy:
        size = sizes(policy, cfg.train.checkpoint_layers)
        # A unit's pair of each kind is a group of two segments.
        groups = -(-segments // 2)
        vocab, dim = size.head
        shape = HeadShape(cfg.train.tokens_per_micro_batch, dim, vocab, size.head_rank)
        head = head_schedule(cfg, shape, groups, device, weight=size.head_trained)
        used = trace(policy, cfg, gpus > 1, head)
        matrices = sum(p.ndim > 1 and p.requires_grad for p in policy.parameters())
    statistics = _statistics(cfg, size, groups, micro_batches, matrices, device)
    memory = _memory(cfg, size, used, gpus, micro_batches, statistics)
    return Estimate(size, memory, _compute(cfg, size, segments, micro_batches, head), micro_batches)


# What a user can turn: section, field and the value that takes least memory.
_KNOBS = (
    ("parallel", "sync_every_micro_batch", True),
    ("model", "attention", "flash_attention_2"),
    ("train", "checkpoint_layers", 1),
    ("parallel", "reshard_after_forward", True),
    ("parallel", "replicate", 1),
    ("parallel", "cpu_offload", True),
)


def advise(cfg: RunConfig, gpus: int, segments: int, limit: float) -> str:
    """The option that lowers a rank's memory most, when it is more than `limit` bytes."""
    config = load_config(cfg.model)
    totals: dict[str, int] = {}
    for section, field, value in _KNOBS:
        changed = copy.deepcopy(cfg)
        setattr(getattr(changed, section), field, value)
        if changed != cfg and (gpus > 1 or section != "parallel"):
            name = f"{section}.{field} {str(value).lower()}"
            totals[name] = estimate(changed, gpus, segments, config).memory.total
    totals[f"--gpus {2 * gpus}"] = estimate(cfg, 2 * gpus, segments, config).memory.total
    best = min(totals, key=totals.__getitem__)
    text = f"It does not fit; {best} helps most: {totals[best] / GIB:.1f} GiB."
    if totals[best] > limit:
        text += " Further: what remains of these, then fewer train.tokens_per_micro_batch."
    return text


def table(result: Estimate, cfg: EstimationConfig) -> str:
    """The estimate as aligned text."""
    memory, compute = result.memory, result.compute
    rows = [(label, getattr(memory, name)) for name, label in DEVICE_ROWS.items()]
    size = result.sizes
    lines = [
        f"{cfg.model.name}: {size.parameters / 1e9:.2f} B parameters, {size.trained / 1e9:.2f} B "
        f"trained, on {cfg.gpus} GPUs",
        f"a micro-batch of {cfg.train.tokens_per_micro_batch} tokens in {cfg.segments} segments, "
        f"{result.micro_batches} per rank and step; attention {cfg.model.attention}",
        "",
        "memory of a rank                      GiB",
        *(f"  {label:<30} {value / GIB:>8.2f}" for label, value in rows),
        f"  {'total':<30} {memory.total / GIB:>8.2f} of {cfg.gpu_memory:g}",
    ]
    if memory.host:
        lines.append(f"  {'on the host':<30} {memory.host / GIB:>8.2f}")
    seconds = compute.total / cfg.tflops / 1e12
    lines += [
        f"  The most is needed in: {memory.where}. Not counted: what the driver, the collectives'",
        "  library and the allocator keep for themselves.",
        "",
        "FLOPs of a rank and step            TFLOP",
        *(
            f"  {field.name:<30} {getattr(compute, field.name) / 1e12:>8.0f}"
            for field in fields(compute)
            if field.name != "model"
        ),
        f"  {'total':<30} {compute.total / 1e12:>8.0f}",
        f"  {seconds:.1f} s at {cfg.tflops:g} TFLOP/s, communication not counted; MFU "
        f"{compute.model / seconds / cfg.peak_tflops / 1e12:.0%} of {cfg.peak_tflops:g}",
    ]
    return "\n".join(lines)


def run(cfg: EstimationConfig) -> None:
    """`estimate`: print the table, and what helps if the step does not fit."""
    for name in ("gpu_memory", "tflops", "peak_tflops"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"{name}: expected a number > 0, got {getattr(cfg, name)}")
    cfg = with_attention(cfg)
    result = estimate(cfg, cfg.gpus, cfg.segments)
    print(table(result, cfg))
    limit = cfg.gpu_memory * GIB
    if result.memory.total > limit:
        print(advise(cfg, cfg.gpus, cfg.segments, limit))
