"""The certified sparse backward of `linear_logprobs`: its rule, its ops and its certificate."""

from bvpo_kernels.tail.certificate import Certificate, tail_certificates

__all__ = ["Certificate", "tail_certificates"]
