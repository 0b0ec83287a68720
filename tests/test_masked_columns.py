"""Columns that a bias of -inf takes out of the softmax, as vocabularies with padding have them."""

import pytest
import torch

from bvpo_kernels import linear_logprobs

TOKENS, DIM, VOCAB = 6, 8, 300
# Columns inside a tile, all of a tile (a tile of the small workspace is narrower), all but one.
MASKS = {"some": slice(3, 7), "tile": slice(0, 128), "most": slice(1, None)}


@pytest.fixture(params=MASKS)
def head(request):
    """hidden, weight, bias, and fp64 log-probabilities of all columns."""
    hidden, weight, bias = torch.randn(TOKENS, DIM), torch.randn(VOCAB, DIM), torch.zeros(VOCAB)
    bias[MASKS[request.param]] = -torch.inf
    return hidden, weight, bias, (hidden.double() @ weight.double().T + bias).log_softmax(-1)


@pytest.mark.parametrize("need", ["scores", "frozen", "trained"])
@pytest.mark.parametrize("tolerance", [0.0, 2**-9], ids=["exact", "sparse"])
@pytest.mark.parametrize("impl", ["reference", "eager", "cpp", "triton"])
@pytest.mark.parametrize("masked_target", [False, True], ids=["target", "masked-target"])
def test_results_are_those_of_the_other_columns(head, impl, tolerance, need, masked_target):
    hidden, weight, bias, logp_TV = head
    columns = torch.isinf(bias) if masked_target else bias == 0
    target = columns.nonzero()[:, 0][torch.arange(TOKENS) % int(columns.sum())]
    expected = logp_TV.gather(1, target[:, None])[:, 0]
    hidden = hidden.requires_grad_(need != "scores")
    weight = weight.requires_grad_(need == "trained")
    for workspace in (None, 4096):
        logprobs, entropy = linear_logprobs(
            hidden,
            weight,
            target,
            bias=bias,
            impl=impl,
            tail_tolerance=tolerance,
            workspace_bytes=workspace,
            return_entropy=True,
        )
        torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            entropy.double(), torch.special.entr(logp_TV.exp()).sum(1), rtol=1e-5, atol=2e-5
        )
        if need != "scores" and not masked_target:
            leaves = [hidden, weight] if need == "trained" else [hidden]
            for gradient in torch.autograd.grad(logprobs.sum(), leaves):
                assert bool(gradient.isfinite().all())
                assert bool(gradient.any()) or bool((expected == 0).all())


def test_a_head_of_no_dimension_is_refused():
    with pytest.raises(ValueError, match=r"hidden: expected shape \[T, D\], D >= 1, got \(3, 0\)"):
        linear_logprobs(torch.zeros(3, 0), torch.zeros(5, 0), torch.zeros(3, dtype=torch.int64))
