"""CGGM: encoder gradients rescaled by how fast a classifier of each modality improves; the parent of BALM's GRM.

Guo, Jin, Chen, Zhao: "Classifier-guided Gradient Modulation for Enhanced Multimodal Learning" (NeurIPS 2024), a
baseline of BALM, for any number of modalities of which any may be missing.
"""

from __future__ import annotations

from typing import Any

from ..backbones.base import BACKBONE, Backbone
from ..checks import Number
from ..methods.balm import BALM

__all__ = ["CGGM"]

DEFAULTS: dict[str, Any] = {
    "calibration": False,
    "discrepancy": "accuracy",
    "lmod": "cggm",
    "rho": 1.3,
    "tau": 0.2,
}


class CGGM(BALM):
    """A backbone with classifier-guided gradients, through BALM's hook.

    Delta^m is the gain in accuracy of the classifier of m from one mini-batch to the next (of scores: in the sign), and
    the coefficients are those of BALM's Eq. 21. L_mod is ``(sum |c_m| - sum c_m cos_m) / M`` with c = mu / rho and
    pulls the output layers together. As in the release, the cosines are those of weights.

    Arguments and options as in `BALM`, with CGGM's values of rho, tau (its lambda), ``discrepancy`` and ``lmod``, and
    without calibration. The release bounds nothing (``mu_clip=None``), so that a mini-batch on which the gains of all
    modalities cancel, which accuracies of few samples often do, has coefficients in the millions; here mu is kept in
    (0, rho M). Our interpretation: the classifiers are two-layer nets on the encodings, where the release has small
    Transformers on sequences, and learn at the learning rate of everything else, where the release takes half of it.
    """

    def __init__(self, backbone: Backbone, **options: Any):
        given = {**DEFAULTS, **options}
        given.setdefault(
            "mu_clip", (0.0, Number(above=0)("rho", given["rho"]) * len(BACKBONE("backbone", backbone).modalities))
        )
        super().__init__(backbone, **given)
