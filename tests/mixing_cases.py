"""Populations of unit gradients with known means and covariances."""

from dataclasses import dataclass

import torch

from bvpo_kernels.mixing import Moments, StepStats

KINDS = ("trace", "empty")


@dataclass(frozen=True)
class Population:
    """g_k = mu_k + P_k z + N_k w: z of the prompt, w of the sampling, both standard normal.

    All kinds share z and w, so they are correlated, between prompts and within one.
    """

    kinds: tuple[str, ...]
    means_KD: torch.Tensor
    prompt_KDL: torch.Tensor
    noise_KDL: torch.Tensor

    @property
    def within_KK(self):
        return torch.einsum("kdl,mdl->km", self.noise_KDL, self.noise_KDL)

    @property
    def covariance_KK(self):
        return torch.einsum("kdl,mdl->km", self.prompt_KDL, self.prompt_KDL) + self.within_KK

    @property
    def mean_products_KK(self):
        return self.means_KD @ self.means_KD.T

    def moments(self, units):
        """The truth, in the place of an estimate."""
        families = [self.covariance_KK, self.mean_products_KK, self.within_KK]
        return Moments(self.kinds, torch.stack(families), units)

    def prompts(self, *shape):
        """E[g | prompt], [*shape, K, D]."""
        z = torch.randn(*shape, self.prompt_KDL.shape[2]).double()
        return self.means_KD + torch.einsum("...l,kdl->...kd", z, self.prompt_KDL)

    def sample(self, prompts):
        """Gradients given their prompts."""
        w = torch.randn(*prompts.shape[:-2], self.noise_KDL.shape[2]).double()
        return prompts + torch.einsum("...l,kdl->...kd", w, self.noise_KDL)

    def draw(self, *shape):
        return self.sample(self.prompts(*shape))


def population(kinds=KINDS, dim=24, seed=0, bias=1.0, noise=1.0, shared=0.5):
    """Traces five times as noisy as the others; |mu_u - mu_v| about `bias` sqrt(2)."""
    g = torch.Generator().manual_seed(seed)
    size, latent = len(kinds), dim // 2

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    scale = torch.tensor([1.0 if k == "trace" else 0.2 for k in kinds]).double()[:, None, None]
    means = normal(dim) / dim**0.5 + bias * normal(size, dim) / dim**0.5
    spread = 1 / (dim * latent) ** 0.5
    common = shared * normal(dim, latent) * spread
    prompt = common + noise * scale * normal(size, dim, latent) * spread
    return Population(kinds, means, prompt, noise * scale * normal(size, dim, latent) * spread)


def with_optimum(alpha, batch_size, **options):
    """A population whose a* at `batch_size` (reference "trace") is `alpha`: |Delta| is scaled."""
    p = population(**options)
    t, e = p.kinds.index("trace"), p.kinds.index("empty")
    s = p.covariance_KK
    q, s_d = s[t, t] - s[t, e], s[t, t] + s[e, e] - 2 * s[t, e]
    delta_sq = (q / (1 - alpha) - s_d) / batch_size
    direction = p.means_KD[e] - p.means_KD[t]
    means = p.means_KD.clone()
    means[e] = means[t] + direction / direction.norm() * delta_sq.sqrt()
    return Population(p.kinds, means, p.prompt_KDL, p.noise_KDL)


def gram(gradients):
    """gram[..., i, j, k, l] = <g_k,i, g_l,j> of [..., B, K, D]."""
    return torch.einsum("...ikd,...jld->...ijkl", gradients, gradients)


def stats(gradients_BKD, kinds=KINDS, **fields):
    return StepStats.from_unit_gram(kinds, gram(gradients_BKD), **fields)


def without_rows(step):
    """The same statistics without what the jackknife needs."""
    state = step.to_dict()
    del state["rows_BKK"]
    return StepStats.from_dict(state)


def many_stats(gradients_RBKD, kinds=KINDS, with_rows=True):
    """One StepStats per repetition R; the products are formed for all at once.

    Without rows there is no jackknife, which is most of what taking in a step costs.
    """
    rows = torch.einsum("rbkd,rld->rbkl", gradients_RBKD, gradients_RBKD.sum(1))
    own = torch.einsum("rbkd,rbld->rbkl", gradients_RBKD, gradients_RBKD)
    return [
        StepStats(kinds, gram_BKK, rows_BKK.sum(0), rows_BKK if with_rows else None)
        for gram_BKK, rows_BKK in zip(own, rows, strict=True)
    ]


def squared_error(gradients, weights, truth):
    """|sum_k w_k k_bar - truth|^2 per repetition, of [R, B, K, D]."""
    mixture = torch.einsum("k,rkd->rd", weights, gradients.mean(1))
    return (mixture - truth).square().sum(-1)


def two(a):
    return torch.tensor([a, 1 - a], dtype=torch.float64)


def empirical_argmin(gradients_RBKD, truth_RD):
    """argmin_a of the mean over repetitions of |a t_bar + (1 - a) e_bar - truth|^2, by a grid."""
    grid = torch.linspace(-0.5, 1.5, 2001, dtype=torch.float64)
    empty = gradients_RBKD[:, :, 1].mean(1) - truth_RD
    step = gradients_RBKD[:, :, 0].mean(1) - gradients_RBKD[:, :, 1].mean(1)
    terms = [(x * y).sum(-1).mean() for x, y in ((empty, empty), (empty, step), (step, step))]
    curve = terms[0] + 2 * grid * terms[1] + grid**2 * terms[2]
    return grid[curve.argmin()].item()
