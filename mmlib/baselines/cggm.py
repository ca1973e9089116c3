"""CGGM: encoder gradients rescaled by how fast a classifier of each modality improves; the parent of BALM's GRM.

Guo, Jin, Chen, Zhao: "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning" (NeurIPS 2024), a
baseline of BALM, for any number of modalities of which any may be missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backbones.base import Backbone
from ..methods.balm import BALM, GradientRebalancing

__all__ = ["CGGM"]


class ClassifierGuidance(GradientRebalancing):
    """Delta^m of accuracies, coefficients within (0, rho M), and a modulation loss that aligns."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.form = "cggm"

    def discrepancies(self, fused: Tensor, unimodal: Tensor, y: Tensor) -> Tensor:
        """Whether each classifier is right [M, n]; of scores whether its sign is, of labels the mean over them."""
        if y.dtype == torch.bool:
            return ((unimodal > 0) == y).to(self.level.dtype).mean(-1)
        right = (unimodal[..., 0] > 0) == (y > 0) if y.is_floating_point() else unimodal.argmax(-1) == y
        return right.to(self.level.dtype)

    def gain(self, now: Tensor) -> Tensor:
        """How much more accurate the classifiers became."""
        return now - self.level

    def coefficients(self, change: Tensor) -> Tensor:
        """BALM's Eq. 21, bounded."""
        return super().coefficients(change).clamp(0.0, self.config.rho * len(self.modalities))


class CGGM(BALM):
    """A backbone with classifier-guided gradients, through BALM's plug.

    Delta^m is the gain in accuracy of the classifier of m from one mini-batch to the next (of scores: in the sign), and
    the coefficients are those of BALM's Eq. 21. L_mod is ``(sum |c_m| - sum c_m cos_m) / M`` with c = mu / rho and
    pulls the output layers together. As in the release, the cosines are those of weights.

    Arguments as in `BALM`; tau is its lambda. The release bounds nothing, so that a mini-batch on which the gains of
    all modalities cancel, which accuracies of few samples often do, has coefficients in the millions; here mu is kept
    in (0, rho M). Our interpretation: the classifiers are two-layer nets on the encodings, where the release has small
    Transformers on sequences, and learn at the learning rate of everything else, where the release takes half of it.
    """

    rebalancer = ClassifierGuidance

    def __init__(self, backbone: Backbone, *args: Any, **options: Any):
        super().__init__(backbone, *args, **{"preset": "+GRM", **options})
