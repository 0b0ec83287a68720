"""BVPO in a plain transformers.Trainer; `accelerate launch train/examples/trainer.py` also works.

The data set holds units; the collator packs them; `compute_loss` is five lines. For a trainer with
TRL's losses and metrics see `bvpo_kernels.integrations.trl`.
"""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from bvpo_kernels import TokenPair, Unit, pack
from bvpo_kernels.integrations.scoring import loss_batch, score_batch
from bvpo_kernels.integrations.transformers import patch_model

ALPHA = 0.5


class Units(Dataset):
    """Made-up prompts: two traced answers each, and two answers to the empty trace."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def ids(size: int) -> list[int]:
            return torch.randint(3, 200, (size,), generator=generator).tolist()

        def pair(prompt: list[int], size: int) -> TokenPair:
            return TokenPair(prompt, chosen=ids(size), rejected=ids(size - 1))

        prompts = [ids(8) for _ in range(count)]
        self.units = [
            Unit(str(n), {"trace": [pair(p, 40)], "empty": [pair([*p, 1, 2], 6)]})
            for n, p in enumerate(prompts)
        ]

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, index: int) -> Unit:
        return self.units[index]


class PairTrainer(Trainer):
    """A Trainer whose reference is a frozen copy of the model."""

    reference: torch.nn.Module

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore
        batch = inputs["packed"].to(self.args.device)
        with torch.no_grad():
            reference = score_batch(self.reference, batch)
        loss = loss_batch(model, batch, reference, ALPHA).loss
        return (loss, {}) if return_outputs else loss


def main() -> list[dict[str, float]]:
    """Returns the log of the trainer."""
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(config)
    reference: torch.nn.Module = LlamaForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    patch_model(model)
    patch_model(reference)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3,
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
            remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = PairTrainer(
            model,
            arguments,
            data_collator=lambda units: {"packed": pack(units)},
            train_dataset=Units(8),
        )
        trainer.reference = reference.to(arguments.device).eval()
        trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
