"""The LM head: log-probabilities of targets without [tokens, vocab] logits."""

from bvpo_kernels.head.api import linear_logprobs
from bvpo_kernels.head.certificate import Certificate, tail_certificates

__all__ = ["Certificate", "linear_logprobs", "tail_certificates"]
