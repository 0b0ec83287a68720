"""The LM head: log-probabilities of targets without [tokens, vocab] logits."""

from bvpo_kernels.head.api import linear_logprobs
from bvpo_kernels.head.certificate import Certificate, tail_certificates
from bvpo_kernels.head.pair_loss import linear_bvpo_loss

__all__ = ["Certificate", "linear_bvpo_loss", "linear_logprobs", "tail_certificates"]
