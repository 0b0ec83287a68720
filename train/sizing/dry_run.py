"""What `train --dry_run` says: the plan of the run, and what a rank holds beside the estimate."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from train.config import RunConfig
from train.model.head import FusedHeadLM
from train.runtime.parallel import World
from train.sizing.estimate import GIB, estimate
from train.steps import StepPlan


def held_bytes(policy: nn.Module) -> int:
    """Bytes of the parameters on this rank."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in policy.parameters())


def planned(
    cfg: RunConfig, plan: StepPlan, policy: FusedHeadLM, held_out: int, world: World
) -> str:
    """Lines for the main rank: units, steps, the first step, and memory, estimated and held."""
    first = plan[0]
    result = estimate(cfg, world.size, config=policy.model.config, device=world.device.type)
    memory = result.memory
    return "\n".join(
        [
            f"dry run: {plan.num_steps} steps of {plan.units_per_step} units from {len(plan.units)}"
            f", {held_out} held out, on {world.size} rank(s)",
            f"  step 1: {first.num_tokens} tokens, {len(first.micro_batches)} packs on this rank, "
            f"fill {first.fill:.0%}",
            f"  parameters on this rank {held_bytes(policy) / GIB:.3f} GiB, estimated "
            f"{memory.parameters / GIB:.3f}",
            f"  a step is estimated to need {memory.total / GIB:.3f} GiB on a rank, most in: "
            f"{memory.where}",
        ]
    )
