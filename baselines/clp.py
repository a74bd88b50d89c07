"""Channel Lipschitzness-based Pruning (CLP): cut the channels that amplify most; no image is needed.

Paper: Zheng et al., ECCV 2022, arXiv:2208.03111.
Differs: a convolution and its batch norm are paired by what feeds what in a forward, not by their order in the code,
which pairs wrongly in pre-activation blocks and shortcuts; layers with no such partner are left alone. The folded
variance includes the layer's epsilon, as its output does. The score is the paper's proxy of the Lipschitz constant,
the largest singular value of the kernel as a matrix (input channels x positions); it bounds nothing. u stays 3; the
released code's sweep over u on the test set is not a rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.engine.models import Norm
from bench.engine.settings import number
from defenses.base import DefenderView, Defense, DefenseResult, NotApplicable, defense


@defense("clp")
@dataclass(frozen=True)
class ChannelLipschitznessPruning(Defense):
    """Zero scale and shift of each channel whose Lipschitz proxy is an outlier in its layer."""

    paper: ClassVar[str] = "arXiv:2208.03111"
    u: float = number(
        3.0,
        "a channel goes when its proxy exceeds the layer's mean by more than u standard deviations. "
        "The largest z-score of n channels is (n - 1) / sqrt(n): with 3, layers of up to ten channels "
        "cannot lose any",
        at_least=0,
    )

    def defend(self, view: DefenderView) -> DefenseResult:
        pairs = [norm for norm in view.model.norms() if norm.convolution is not None and norm.has_statistics]
        if not pairs:
            raise NotApplicable("no batch norm follows a convolution: there is no stored variance to fold into one")
        scores = [lipschitz(norm) for norm in pairs]
        for tenths in (10, 15, 20, 25, 30, 35, 40, 45, 50):
            pruned = torch.cat([outliers(score, tenths / 10) for score in scores])
            view.log.record("clp/pruned_by_10u", pruned.double().mean().item(), tenths)
        with torch.no_grad():
            for norm, score in zip(pairs, scores, strict=True):
                cut = outliers(score, self.u)
                norm.layer.weight[cut] = 0
                norm.layer.bias[cut] = 0
        pruned = torch.cat([outliers(score, self.u) for score in scores])
        view.log.record("clp/pruned", pruned.double().mean().item(), 0)
        return DefenseResult(view.model)


@torch.no_grad()
def lipschitz(norm: Norm) -> Tensor:
    """(C,) float64: the largest singular value of each channel's kernel, times |scale| over the standard deviation."""
    assert norm.convolution is not None
    kernel = norm.convolution.weight.double().flatten(2)  # (C, inputs of the group, positions)
    deviation = (norm.layer.running_var.double() + norm.layer.eps).sqrt()
    return torch.linalg.matrix_norm(kernel, ord=2) * norm.layer.weight.double().abs() / deviation


def outliers(scores: Tensor, u: float) -> Tensor:
    """(C,) bool: above the mean by more than u standard deviations (unbiased) of the layer."""
    return scores > scores.mean() + u * scores.std()
