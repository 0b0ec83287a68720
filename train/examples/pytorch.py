"""BVPO in plain PyTorch: pack, score, mix, and let the gradients choose the weight.

`python train/examples/pytorch.py` trains a tiny random Llama on made-up pairs, on the CPU.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bvpo_kernels import AlphaEstimator, GradStats, TokenPair, Unit, pack
from bvpo_kernels.integrations.scoring import loss_batch, score_batch
from bvpo_kernels.integrations.transformers import patch_model

STEPS, UNITS = 6, 4


def make_unit(name: str, generator: torch.Generator) -> Unit:
    """A prompt with two traced answers, and with two answers to the empty trace."""

    def ids(count: int) -> list[int]:
        return torch.randint(3, 200, (count,), generator=generator).tolist()

    prompt, empty_trace = ids(8), [1, 2]  # ids of <think></think>
    return Unit(
        name,
        {
            "trace": [TokenPair(prompt, chosen=ids(40), rejected=ids(30))],
            "empty": [TokenPair(prompt + empty_trace, chosen=ids(6), rejected=ids(5))],
        },
    )


def main() -> list[float]:
    """Returns the loss of each step."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2)
    )  # fmt: skip
    patch_model(model)
    generator = torch.Generator().manual_seed(1)
    batch = pack([make_unit(f"prompt-{n}", generator) for n in range(UNITS)])
    with torch.no_grad():
        reference = score_batch(model, batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    stats, estimator = GradStats(model), AlphaEstimator(warmup=2)
    losses = []
    for step in range(STEPS):
        alpha = estimator.value()
        with stats.collect(batch):
            result = loss_batch(model, batch, reference, alpha, loss="dpo", beta=0.1)
            result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        estimator.update(stats.result())
        losses.append(result.loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}, alpha {alpha:.3f}")
    return losses


if __name__ == "__main__":
    main()
