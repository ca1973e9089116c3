"""Which modalities and frames of which sample are missing: the five positional functions, and the mask object.

A `MissingPlan` describes a protocol, ``plan.draw(dataset)`` draws a `MissingMask`, and ``mask.apply(dataset)`` takes
the values away. Every draw is a hash of (seed, sample id, modality, frame): a sample misses the same things whatever
the order of the samples, the batch, the epoch, the process or the method, unless resampling is asked for.

Two families of protocols differ in one respect that matters when a data set is cut into parts:

* *independent* ones ("none", "fixed", "bernoulli", "frames", "burst", "lnln" at a constant rate, "mar" on the class)
  decide for each sample alone: a part of the data set misses what it misses in the whole;
* *count-based* ones ("imbalanced", "exact_count", "heterogeneous", "per_class", "lnln" for training, "mar" on a
  modality, "mnar") meet counts or an average over the given set of ids, so a part drawn alone differs from the whole.

A *missing rate* is a fraction in [0, 1] of what could have been there. Shapes: ``n`` samples, ``N`` the leading shape
([n], or [B, U] for dialogues, where each real utterance is a sample), ``M`` modalities, ``T`` frames.
"""

from .mask import MissingMask
from .operators import bernoulli_mask, exact_count_mask, frame_mask, heterogeneous_mask, imbalanced_mask
from .plan import KINDS, MissingPlan, lnln_protocol

__all__ = [
    "KINDS",
    "MissingMask",
    "MissingPlan",
    "bernoulli_mask",
    "exact_count_mask",
    "frame_mask",
    "heterogeneous_mask",
    "imbalanced_mask",
    "lnln_protocol",
]
