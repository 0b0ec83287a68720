"""The step of a script: padded batches, an attention mask, and the logits of every token."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from benchmarks.steps.inputs import StepInputs
from bvpo_kernels.types import EMPTY, TRACE, TokenPair, Unit

Sequences = list[tuple[TokenPair, str]]


class NaiveStep:
    """transformers' own forward; DDP where there are several ranks, units dealt out in turn.

    by_kind: a forward for the traces and one for the empties, so that no empty sequence is padded
    to the length of a trace; else all four sequences of a unit are in one batch.
    """

    def __init__(self, inputs: StepInputs, model: Any, *, by_kind: bool) -> None:
        self.inputs, self.by_kind = inputs, by_kind
        self.model = model.train()
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.wrapped: Any = self.model
        if self.ranks > 1:
            self.wrapped = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=inputs.cfg.optim.lr, weight_decay=0.0, fused=True
        )

    def run(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        passes = self._passes()
        total = torch.zeros(())
        for index, units in enumerate(passes):
            with self._sync(last=index == len(passes) - 1):
                loss = self._loss(units)
                # DDP averages over ranks what is a share of the sum over units.
                (loss * self.ranks).backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.inputs.cfg.optim.max_grad_norm)
        self.optimizer.step()
        if self.ranks > 1:
            dist.all_reduce(total)
        return total

    def _passes(self) -> list[list[tuple[Unit, str]]]:
        """(unit, kind) of each forward."""
        rank = dist.get_rank() if self.ranks > 1 else 0
        passes = []
        mine = self.inputs.units[rank :: self.ranks]
        for units in self.inputs.micro_batches:
            group = [unit for unit in units if unit in mine]
            kinds = [[TRACE], [EMPTY]] if self.by_kind else [[TRACE, EMPTY]]
            passes += [[(unit, kind) for unit in group for kind in some] for some in kinds]
        return [some for some in passes if some]

    def _sync(self, *, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.ranks == 1 else self.wrapped.no_sync()

    def _loss(self, items: list[tuple[Unit, str]]) -> Tensor:
        pairs = [(pair, kind) for unit, kind in items for pair in unit.pairs[kind]]
        scores_P2 = self._scores([pair for pair, _ in pairs]).unflatten(0, (-1, 2))
        reference_P2 = torch.tensor([self.inputs.reference_of(pair) for pair, _ in pairs])
        margin_P = (scores_P2 - reference_P2).diff(dim=1).neg()[:, 0]
        cfg = self.inputs.cfg
        weights = {TRACE: cfg.alpha.fixed, EMPTY: 1 - cfg.alpha.fixed}
        weight_P = torch.tensor([weights[kind] for _, kind in pairs]) / len(self.inputs.units)
        return -(weight_P * logsigmoid(cfg.loss.beta * margin_P)).sum()

    def _scores(self, pairs: list[TokenPair]) -> Tensor:
        """[2 P]: chosen and rejected of each pair."""
        rows = [(p.prompt, response) for p in pairs for response in (p.chosen, p.rejected)]
        width = max(len(prompt) + len(response) for prompt, response in rows)
        tokens, mask, scored = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
        for n, (prompt, response) in enumerate(rows):
            length = len(prompt) + len(response)
            tokens[n, :length] = torch.tensor([*prompt, *response])
            mask[n, :length] = 1
            scored[n, len(prompt) : length] = 1
        dtype = self.inputs.case.torch_dtype
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logits = self.wrapped(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            logp = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        return (logp.float() * scored[:, 1:]).sum(1)
