"""Tiny causal LMs of transformers with logits that differ, and their own log-probabilities."""

import torch
import transformers as hf

IDS = torch.tensor([[5, 9, 2, 40, 7, 88, 3], [1, 90, 17, 4, 4, 60, 33]])
LABELS = IDS.clone()
LABELS[0, :2] = -100
LABELS[1, 5:] = -100
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "pad_token_id": 0,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def make(name="Llama", **options):
    torch.manual_seed(0)
    config = getattr(hf, f"{name}Config")(**{**SIZES, **options})
    return getattr(hf, f"{name}ForCausalLM")(config).eval()


def own_logprobs(model, labels=LABELS):
    """The definition, from the model's own logits in fp32 or fp64."""
    logits = model(input_ids=IDS).logits[:, :-1]
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    target = labels[:, 1:]
    return logp.gather(2, target.clamp(min=0)[..., None])[..., 0].masked_fill(target == -100, 0)
