"""The sizes of the study, and which arms it compares."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way of training: which pairs, which loss, where the weight comes from.

    weight: a fixed a in [0, 1], or what a* takes for the truth, "trace" or "marginal".
    traces: trace pairs per prompt, averaged. double: trace pairs of twice as many prompts per step,
    so that an arm without empty pairs sees as many pairs as one with both kinds. loss, beta: of
    `bvpo_loss`; beta None: that of the study.
    """

    name: str
    weight: float | str = 0.5
    traces: int = 1
    double: bool = False
    loss: str = "dpo"
    beta: float | None = None


# SimPO's beta is its paper's; gamma is the package's default, .5.
ARMS: tuple[Arm, ...] = (
    Arm("a=0", 0.0),
    Arm("a=.25", 0.25),
    Arm("a=.5", 0.5),
    Arm("a=.75", 0.75),
    Arm("a=1", 1.0),
    Arm("a* trace", "trace"),
    Arm("a* marginal", "marginal"),
    Arm("DPO 2x", 1.0, double=True),
    Arm("SimPO 2x", 1.0, double=True, loss="simpo", beta=2.0),
    Arm("KTO 2x", 1.0, double=True, loss="kto"),
    Arm("K=4", 1.0, traces=4),
)
NAMES = tuple(arm.name for arm in ARMS)


@dataclass
class StudyConfig:
    """Options of the study; the defaults are those of the full run.

    out: folder of results, one file per seed and arm: a rerun goes on where the last one stopped.
    report: folder of the report; None: `out`. quick: replace the sizes by small ones.
    seeds: a run of all arms each. arms: their names.
    hidden, intermediate, layers, heads, kv_heads: of the transformer (Qwen3).
    sft_steps, sft_batch, sft_direct, sft_lr: of the supervised training that makes it a reasoning
    model, on `sft_batch` examples with a trace and `sft_direct` without per step. samples:
    responses per prompt and mode that are ranked; proposals: further traces per prompt, for the
    marginal and for K > 1. temperature: of all sampling. units, steps, units_per_step, lr, beta: of
    each arm; halflife, warmup: of the estimate of a*. measure_every: steps between measurements of
    the marginal in its arm. pool, pool_traces: units and traces per response of the brute-force
    curve; checkpoints: after how many steps it is taken (0 is the start). eval_prompts: test
    prompts per mode. probe_units, probe_every: held-out units, and steps between their losses.
    threads: of torch.
    """

    out: str = "runs/study"
    report: str | None = None
    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = NAMES
    hidden: int = 160
    intermediate: int = 512
    layers: int = 3
    heads: int = 5
    kv_heads: int = 5
    sft_steps: int = 400
    sft_batch: int = 64
    sft_direct: int = 4
    sft_lr: float = 3e-3
    samples: int = 8
    proposals: int = 32
    temperature: float = 0.8
    units: int = 256
    steps: int = 48
    units_per_step: int = 16
    lr: float = 1e-5
    beta: float = 1.0
    halflife: float = 8.0
    warmup: int = 4
    measure_every: int = 4
    pool: int = 96
    pool_traces: int = 8
    checkpoints: tuple[int, ...] = (0, 16, 48)
    eval_prompts: int = 1000
    probe_units: int = 32
    probe_every: int = 10
    threads: int = 1


QUICK: dict[str, Any] = {
    "seeds": (0,), "sft_steps": 300, "units": 64, "steps": 12, "units_per_step": 8, "pool": 48,
    "pool_traces": 4, "checkpoints": (0, 12), "eval_prompts": 300, "probe_units": 16,
    "probe_every": 6,
}  # fmt: skip


def sized(cfg: StudyConfig) -> StudyConfig:
    """The configuration with the quick sizes, if it asks for them."""
    return replace(cfg, **QUICK) if cfg.quick else cfg


def chosen_arms(cfg: StudyConfig) -> list[Arm]:
    """The arms of the configuration, in the order of `ARMS`."""
    unknown = sorted(set(cfg.arms) - set(NAMES))
    if unknown or not cfg.arms:
        raise ValueError(f"arms: expected names of {list(NAMES)}, got {unknown or 'none'}")
    return [arm for arm in ARMS if arm.name in cfg.arms]
