"""The step of TRL's DPOTrainer, on the pairs of both kinds."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps.inputs import StepInputs
from bvpo_kernels.types import KINDS, TokenPair
from train.model.models import load_tokenizer


class TRLStep:
    """A row per pair, both kinds in one batch; the mean over rows is L_c at a = 1/2.

    Everything that is not said here is TRL's default: its head without logits and gradient
    checkpointing among it. The reference scores are given, as precomputed ones are.
    """

    def __init__(self, inputs: StepInputs, model: Any) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        if inputs.cfg.alpha.fixed != 0.5:
            raise ValueError(f"alpha.fixed: expected 0.5, got {inputs.cfg.alpha.fixed}")

        base: Any = DPOTrainer

        class Trainer(base):
            """Rows hold token ids and reference scores already."""

            def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
                return dataset

            def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
                return dataset

        cfg, self.inputs = inputs.cfg, inputs
        self.batches = [
            [self._row(p) for unit in units for kind in KINDS for p in unit.pairs[kind]]
            for units in inputs.micro_batches
        ]
        self._folder = tempfile.TemporaryDirectory()
        args = DPOConfig(
            self._folder.name, per_device_train_batch_size=len(self.batches[0]),
            gradient_accumulation_steps=len(self.batches), beta=cfg.loss.beta,
            learning_rate=cfg.optim.lr, max_grad_norm=cfg.optim.max_grad_norm, max_length=None,
            bf16=inputs.case.torch_dtype == torch.bfloat16, use_cpu=True, report_to="none",
            precompute_ref_log_probs=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = Dataset.from_list([row for batch in self.batches for row in batch])
        self.trainer = Trainer(
            model, args=args, train_dataset=rows, processing_class=load_tokenizer(cfg.model)
        )
        self.trainer.create_optimizer_and_scheduler(num_training_steps=100)
        self.trainer.current_gradient_accumulation_steps = len(self.batches)
        self.model = self.trainer.model
        self.optimizer = self.trainer.optimizer
        if args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        # What `train` does before its first step: autocast is put around the model's forward.
        self.prepared = self.trainer.accelerator.prepare_model(self.model)

    def _row(self, pair: TokenPair) -> dict[str, Any]:
        chosen, rejected = self.inputs.reference_of(pair)
        return {
            "prompt_ids": list(pair.prompt),
            "chosen_ids": list(pair.chosen),
            "rejected_ids": list(pair.rejected),
            "ref_chosen_logps": chosen,
            "ref_rejected_logps": rejected,
        }

    def run(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for rows in self.batches:
            batch = self.trainer.data_collator(rows)
            total += self.trainer.training_step(self.prepared, batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.inputs.cfg.optim.max_grad_norm)
        self.optimizer.step()
        return total
