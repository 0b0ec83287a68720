"""Rows, a tiny model and a trainer for the tests of the TRL integration."""

import torch
from datasets import Dataset
from tiny_chat import make_tokenizer, tiny_config
from transformers import AutoModelForCausalLM

from bvpo_kernels.integrations.trl import BVPOConfig, BVPOTrainer

LITERAL = "<think>\n\n</think>\n\n"
WORDS = ["17", "so 4 + 13", "no, 18", "hm", "it is seventeen", "eighteen?", "x", "20 - 3"]


def rows(count=4):
    """Texts; ragged, so that TRL pads what is packed here."""
    return [
        {
            "prompt": f"What is {n} + {n + 3}? " * (1 + n % 2),
            "chosen": f"<think>{WORDS[n % 8]} {WORDS[(n + 3) % 8] * 2}</think>{WORDS[n % 5]}",
            "rejected": f"<think>{WORDS[(n + 1) % 8]}</think>{WORDS[(n + 2) % 8]}",
            "empty_chosen": WORDS[(n + 2) % 8],
            "empty_rejected": WORDS[(n + 5) % 8] * (1 + n % 3),
        }
        for n in range(count)
    ]


def model(seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config())


def config(folder, cls=BVPOConfig, **options):
    defaults = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "max_length": 256,
        "beta": 0.3,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }
    return cls(str(folder), **{**defaults, **options})


def trainer(folder, data=None, policy=None, reference=1, **options):
    data = Dataset.from_list(rows()) if data is None else data
    extra = {name: options.pop(name) for name in list(options) if name.endswith("dataset")}
    extra |= {name: options.pop(name) for name in ("peft_config",) if name in options}
    return BVPOTrainer(
        model() if policy is None else policy,
        None if reference is None else model(reference),
        config(folder, **options),
        data,
        processing_class=make_tokenizer(),
        **extra,
    )


def first_batch(made):
    """The first micro-batch as the training loop would get it, without the loop."""
    return made.data_collator([made.train_dataset[n] for n in range(2)])


def loss_and_gradients(made, inputs):
    made.model.zero_grad()
    made.current_gradient_accumulation_steps = 1
    loss = made.compute_loss(made.model, inputs)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads
