"""What to drop: `MissingPlan`, a small class for each kind of protocol, and LNLN's protocol, which is several plans."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..batch import BATCH, DATASET, MultimodalBatch, MultimodalDataset
from ..checks import (
    Device,
    Either,
    Flag,
    Is,
    Maybe,
    Named,
    Number,
    OneOf,
    Several,
    Text,
    Whole,
    check_known,
    check_options,
    option,
)
from .operators import (
    Source,
    any_frame,
    as_rate,
    as_rates,
    check_some_left,
    draw_bernoulli,
    draw_exact_count,
    draw_heterogeneous,
    draw_imbalanced,
    drop_bursts,
    drop_frames,
    keep_some,
    last_to_go,
    pick,
    restore_modality,
)
from .remains import Remains

if TYPE_CHECKING:
    from .mask import MissingMask

__all__ = ["KINDS", "MissingPlan", "lnln_protocol"]

NAMES = Either(Text, Several(Text))

_CLASSES: dict[str, type[MissingPlan]] = {}


@dataclass(frozen=True, eq=False, repr=False)
class MissingPlan:
    """A missing-data protocol: what kind, how much, from which seed. ``plan.draw(dataset)`` gives its `MissingMask`.

    The kinds, with their own options:

    * ``"none"``: nothing is dropped.
    * ``"fixed"``: only the modalities ``present`` stay, in every sample.
    * ``"imbalanced"``: exact counts of the subsets, BALM Eq. 36. With ``assign="shuffled"`` every sample gets its own
      subset, with ``"blocked"`` subsets lie in contiguous blocks along ascending ids (the released habit).
    * ``"bernoulli"``: independent per sample and modality, given that something is left.
    * ``"exact_count"``: int(n r) samples miss each modality (RedCore, MCE). With ``all_missing="repair"`` empty samples
      are repaired by swaps, with ``"keep"`` they stay (the releases).
    * ``"frames"``: frames are dropped independently; ``"burst"``: in ``blocks`` contiguous blocks per sample.
    * ``"lnln"``: LNLN and DEAR. Without rates, for training: per sample and modality a rate from U(0, 1), which is 0
      for half (rounded down) of the samples of each modality. With rates: constant, as in their tests.
    * ``"heterogeneous"``: DREAM A.4, see `heterogeneous_mask`; ``rates`` is eta.
    * ``"per_class"``: SMIL. With ``counts={"audio": k}`` the first k samples of each class, in a random order, have it.
    * ``"mar"``: missing at random. The chance to lose a modality is logistic in a summary of the modality ``on``, which
      is always seen; or ``on="class"`` with one rate per class, ``rates={"audio": [r_0, ..., r_K-1]}``.
    * ``"mnar"``: missing not at random, logistic in a summary of the very values that are dropped.

    kind : one of `KINDS`
    rates : missing rates in [0, 1]: one for all modalities, or one each in the data set's order, or a mapping from
        names (others lose nothing). In "frames", "burst" and "lnln" a rate may also be a pair (low, high): uniform per
        sample; or the name of an entry of ``extras`` that holds one rate per sample
    seed : any integer
    resample : draw anew in every epoch, ``draw(dataset, epoch=e)``
    allow_empty : samples may lose everything. Otherwise none does: one that would keeps a modality or frame drawn at
        random (``realised()["restored"]`` counts them), or ValueError where "fixed" leaves nothing
    then : a plan applied to what this one left, such as frames after modalities

    "mar" and "mnar" know ``slope=2.0`` and ``statistic="mean"``: the log-odds change by slope per standard deviation of
    the summary, "mean" or "norm" of the values, or "length" in frames. "frames", "burst" and "lnln" know

    shared : the same frames in all modalities (of equal length); "equal": in those whose sequences are equally long
        with their padding, the others on their own
    keep_ends : names of the modalities whose first and last frame stay; default those of token ids
    keep_one : every modality keeps a frame

    The first lines of `mmlib.missing` say which kinds depend on the set of ids. Raises ValueError or TypeError for
    settings that are unknown, out of range, or not used by the kind.
    """

    kind: str
    rates: Any = None
    seed: int = option(0, Whole())
    resample: bool = option(False, Flag())
    _: KW_ONLY
    allow_empty: bool = option(False, Flag())
    then: MissingPlan | None = None

    of_kind: ClassVar[str]
    on_any_device: ClassVar[bool] = False  # drawn where the mask is kept; other kinds are drawn on the CPU

    def __init_subclass__(cls, kind: str = "") -> None:
        if kind:
            cls.of_kind = kind
            _CLASSES[kind] = cls

    if TYPE_CHECKING:  # the options of the kinds; the dataclass writes its own

        def __init__(
            self, kind: str, rates: Any = None, seed: int = 0, resample: bool = False, **options: Any
        ) -> None: ...

    def __new__(cls, kind: Any = None, *_: Any, **options: Any) -> MissingPlan:
        if cls is not MissingPlan:
            return super().__new__(cls)
        chosen = _CLASSES[OneOf(*KINDS)("kind", kind)]
        for name in sorted(_settings() - {f.name for f in fields(chosen)}):
            if name in options:
                raise ValueError(f"{name}: a plan of kind {kind!r} does not use it, got {options[name]!r}")
        return super().__new__(chosen)

    def __post_init__(self) -> None:
        OneOf(self.of_kind)("kind", self.kind)
        check_options(self)
        Maybe(Is("a MissingPlan", MissingPlan))("then", self.then)
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "rates", _plain(self.rates))
        self.check_rates()

    def check_rates(self) -> None:
        """Everything about the rates that can be known without a data set: here that there are none."""
        if self.rates is not None:
            raise ValueError(f"rates: a plan of kind {self.kind!r} does not use it, got {self.rates!r}")

    @property
    def may_empty(self) -> bool:
        """Whether samples may lose everything."""
        return self.allow_empty

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MissingPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def __repr__(self) -> str:
        rest = "".join(f", {name}={value!r}" for name, value in self._changed().items() if name != "kind")
        return f"MissingPlan({self.kind!r}{rest})"

    def _changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        default = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        return {name: getattr(self, name) for name in default if getattr(self, name) != default[name]}

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON's own types, defaults left out; `from_dict` reads it back."""
        out = {name: list(v) if isinstance(v, tuple) else v for name, v in self._changed().items()}
        if self.then is not None:
            out["then"] = self.then.to_dict()
        return out

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> MissingPlan:
        """The plan of `to_dict`; ValueError for settings that do not exist."""
        values = dict(Named(Is("a setting", object), 0)("settings", settings))
        check_known("settings", values, sorted(_settings()), "settings")
        if isinstance(values.get("then"), Mapping):
            values["then"] = MissingPlan.from_dict(values["then"])
        return cls(**values)

    def draw(
        self,
        dataset: MultimodalDataset | MultimodalBatch,
        epoch: int | None = None,
        device: torch.device | str | None = None,
    ) -> MissingMask:
        """The mask of ``dataset``'s samples, by their ids.

        epoch : the epoch that a plan with ``resample=True`` draws for (default 0); without it every epoch is the same.
        device : where the mask is kept (default the CPU). "frames" and "lnln" are also drawn there, the same on every
            device; other kinds are drawn on the CPU and moved

        Raises ValueError for modalities that the data set does not have, ids that repeat, targets that the kind needs
        and the data set lacks, and protocols that would leave a sample with nothing.
        """
        Either(DATASET, BATCH)("dataset", dataset)
        Maybe(Whole(0))("epoch", epoch)
        data = dataset.data if isinstance(dataset, MultimodalDataset) else dataset
        where = Device()("device", "cpu" if device is None else device)
        there = all(plan.on_any_device for plan in self._chain())
        left = Remains(data, where if there else torch.device("cpu"))
        for step, plan in enumerate(self._chain()):
            turn = (epoch or 0) if plan.resample else "every epoch"
            # A second plan of the same seed must not repeat the numbers of the first: its place is part of the seed.
            plan.drop(left, Source(left.ids, plan.seed, turn, step))
        return left.mask(self, epoch if self.resample else None).to(where)

    def _chain(self) -> Iterator[MissingPlan]:
        plan: MissingPlan | None = self
        while plan is not None:
            yield plan
            plan = plan.then

    def drop(self, left: Remains, source: Source) -> None:
        """Take whole modalities away, in place; kinds that drop frames do otherwise."""
        before = left.present
        present = before & self.keeps(left, source)
        if not self.may_empty:
            left.restored += restore_modality(source, present, before, left.names)
        left.present = present

    def keeps(self, left: Remains, source: Source) -> Tensor:
        """bool [n, M]: the modalities that stay where they are there."""
        raise NotImplementedError


def _settings() -> set[str]:
    """The names of all settings of all kinds."""
    return {f.name for kind in _CLASSES.values() for f in fields(kind)}


def _plain(rates: Any) -> Any:
    """Rates as numbers, strings, lists and dicts, so that a plan compares, hashes and travels as JSON."""
    if isinstance(rates, Mapping):
        return {str(k): _plain(v) for k, v in rates.items()}
    if hasattr(rates, "tolist"):
        rates = rates.tolist()
    if isinstance(rates, (list, tuple)):
        return [_plain(r) for r in rates]
    return rates


def _as_tuple(plan: MissingPlan, name: str) -> None:
    """Turn a setting that holds one name or several into a tuple of names, in place."""
    value = getattr(plan, name)
    if value is not None:
        object.__setattr__(plan, name, (value,) if isinstance(value, str) else tuple(value))


# --- Whole modalities -----------------------------------------------------------------------------------------------


class Nothing(MissingPlan, kind="none"):
    """Nothing is dropped."""

    on_any_device = True

    def keeps(self, left: Remains, source: Source) -> Tensor:
        return left.present


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Fixed(MissingPlan, kind="fixed"):
    """Only the modalities ``present`` stay."""

    present: tuple[str, ...] = option((), NAMES)

    def __post_init__(self) -> None:
        super().__post_init__()
        _as_tuple(self, "present")
        if not self.present and not self.allow_empty:
            raise ValueError("present: expected the names of the modalities that stay, got none")

    def keeps(self, left: Remains, source: Source) -> Tensor:
        check_known("present", self.present, left.names)
        stays = torch.tensor([name in self.present for name in left.names]).expand(left.present.shape)
        lost = int((left.present.any(-1) & ~(left.present & stays).any(-1)).sum())
        if lost and not self.allow_empty:
            raise ValueError(
                f"present: {lost} of {len(stays)} samples have nothing of {list(self.present)}; leave them out, or "
                f"pass allow_empty=True"
            )
        return stays


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PerClass(MissingPlan, kind="per_class"):
    """Of each class the first k samples in a random order keep a modality (SMIL)."""

    counts: Mapping[str, int] = option({}, Named(Whole(0), 0))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "counts", dict(self.counts))
        if not self.counts:
            raise ValueError("counts: expected {modality: samples per class that have it}, got none")

    def keeps(self, left: Remains, source: Source) -> Tensor:
        check_known("counts", self.counts, left.names)
        present = left.present.clone()
        target = left.target()
        for name, count in self.counts.items():
            m = left.names.index(name)
            order = source.order("class", name)
            order = order[left.present[order, m]]
            order = order[target[order].argsort(stable=True)]
            _, sizes = target[order].unique_consecutive(return_counts=True)
            start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            present[order, m] = torch.arange(len(order)) - start < count
        return present


class WithRates(MissingPlan):
    """A plan that needs missing rates, one per modality."""

    def check_rates(self) -> None:
        if self.rates is None:
            raise ValueError(f"rates: a plan of kind {self.kind!r} needs missing rates, got none")
        rates, items = self.rates, [("rates", self.rates)]
        if isinstance(rates, Mapping):
            items = [(f"rates[{name!r}]", r) for name, r in rates.items()]
        elif isinstance(rates, list):
            items = [(f"rates[{i}]", r) for i, r in enumerate(rates)]
        if not items:
            raise ValueError("rates: expected one missing rate per modality, got none")
        for name, rate in items:
            self.check_rate(name, rate)

    def check_rate(self, name: str, rate: Any) -> None:
        """The same about one of them."""
        as_rate(rate, name)

    def rates_of(self, names: Sequence[str]) -> list[Any]:
        """One rate per modality of the data set."""
        if isinstance(self.rates, Mapping):
            check_known("rates", self.rates, names)
            return [self.rates.get(name, 0.0) for name in names]
        if isinstance(self.rates, list):
            if len(self.rates) != len(names):
                raise ValueError(
                    f"rates: expected {len(names)} of them, for {list(names)}, got {len(self.rates)}: {self.rates}"
                )
            return self.rates
        return [self.rates] * len(names)


class GivenRates(WithRates):
    """Whole modalities are dropped at given rates, one of them below 1 unless samples may be empty."""

    def check_rates(self) -> None:
        super().check_rates()
        if isinstance(self.rates, list) and not self.may_empty:  # otherwise the modalities are not known yet
            check_some_left(self.rates)

    def rates_of(self, names: Sequence[str]) -> list[Any]:
        rates = super().rates_of(names)
        if not self.may_empty:
            check_some_left(rates)
        return rates


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Imbalanced(GivenRates, kind="imbalanced"):
    """Exact counts of the subsets, BALM Eq. 36."""

    assign: str = option("shuffled", OneOf("shuffled", "blocked"))

    def keeps(self, left: Remains, source: Source) -> Tensor:
        rates = self.rates_of(left.names)
        order = source.order("rows") if self.assign == "shuffled" else left.ascending()
        return draw_imbalanced(order, rates, self.allow_empty)


class Bernoulli(GivenRates, kind="bernoulli"):
    """Independent per sample and modality, given that something is left."""

    def keeps(self, left: Remains, source: Source) -> Tensor:
        rates = torch.tensor(self.rates_of(left.names), dtype=torch.float64)
        return draw_bernoulli(source, rates, left.present, left.names, self.allow_empty)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ExactCount(GivenRates, kind="exact_count"):
    """int(n r) samples miss each modality (RedCore, MCE)."""

    all_missing: str = option("repair", OneOf("repair", "keep"))

    @property
    def may_empty(self) -> bool:
        return self.allow_empty or self.all_missing == "keep"

    def keeps(self, left: Remains, source: Source) -> Tensor:
        return draw_exact_count(source, self.rates_of(left.names), left.names, repair=not self.may_empty)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NotAtRandom(WithRates, kind="mnar"):
    """The chance to lose a modality is logistic in a summary of the values that are lost."""

    slope: float = option(2.0, Number())
    statistic: str = option("mean", OneOf("mean", "norm", "length"))

    def keeps(self, left: Remains, source: Source) -> Tensor:
        present = left.present.clone()
        for m, (name, rate) in enumerate(zip(left.names, self.rates_of(left.names), strict=True)):
            if rate != 0.0:
                present[:, m] &= source.uniform("modality", name) >= self.chance(left, name, rate)
        return present

    def chance(self, left: Remains, name: str, rate: Any) -> Tensor:
        """float64 [n]: the probability that a sample loses modality ``name``."""
        return logistic(left, name, self.statistic, self.slope, rate)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AtRandom(NotAtRandom, kind="mar"):
    """The chance to lose a modality is logistic in a summary of another one, or given for each class."""

    on: str | None = option(None, Maybe(Text))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on is None:
            raise ValueError('on: a plan of kind "mar" needs the modality that decides, or "class"')

    def check_rates(self) -> None:
        if self.on == "class" and self.rates is not None and not isinstance(self.rates, Mapping):
            raise TypeError(f'rates: with on="class" expected {{modality: one rate per class}}, got {self.rates!r}')
        super().check_rates()

    def check_rate(self, name: str, rate: Any) -> None:
        if self.on == "class":
            as_rates(rate, name)
        else:
            as_rate(rate, name)

    def rates_of(self, names: Sequence[str]) -> list[Any]:
        rates = super().rates_of(names)
        if self.on == "class" or self.on is None:
            return rates
        check_known("on", (self.on,), names)
        if isinstance(self.rates, Mapping) and rates[names.index(self.on)]:
            raise ValueError(f"rates[{self.on!r}]: the modality that decides is always seen; expected 0 or no rate")
        return [0.0 if name == self.on else r for name, r in zip(names, rates, strict=True)]

    def chance(self, left: Remains, name: str, rate: Any) -> Tensor:
        if self.on != "class":
            return logistic(left, str(self.on), self.statistic, self.slope, rate)
        target = left.target()
        if int(target.min()) < 0 or int(target.max()) >= len(rate):
            raise ValueError(f"rates[{name!r}]: expected one rate per class, {int(target.max()) + 1}, got {len(rate)}")
        return torch.tensor(rate, dtype=torch.float64)[target]


def logistic(left: Remains, name: str, statistic: str, slope: float, rate: float) -> Tensor:
    """float64 [n]: sigmoid(a + slope z), z the standardised summary of modality ``name``, a such that the mean is rate.

    Samples in which the modality is not there have z = 0.
    """
    if rate in (0.0, 1.0):
        return torch.full((len(left.ids),), rate, dtype=torch.float64)
    there = left.present[:, left.names.index(name)]
    order = left.ids.argsort()  # sums in the order of the ids, so that no last digit depends on the samples' order
    z = left.summary(name, statistic)[order]
    known = there[order]
    if known.any():
        z = z - z[known].mean()
        z = z / z[known].std(correction=0).clamp_min(1e-12)
    z = torch.where(known, z, 0.0)
    low, high = torch.tensor(-1e3, dtype=z.dtype), torch.tensor(1e3, dtype=z.dtype)
    for _ in range(100):
        middle = (low + high) / 2
        if torch.sigmoid(middle + slope * z).mean() < rate:
            low = middle
        else:
            high = middle
    chance = torch.empty_like(z)
    chance[order] = torch.sigmoid((low + high) / 2 + slope * z)
    return chance


# --- Frames ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Frames(WithRates, kind="frames"):
    """Frames are dropped independently of each other; a rate may also be a pair, or the name of an entry of extras."""

    shared: bool | str = option(False, Either(Flag(), OneOf("equal")))
    keep_ends: tuple[str, ...] | None = option(None, Maybe(NAMES))
    keep_one: bool = option(False, Flag())

    on_any_device = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _as_tuple(self, "keep_ends")

    def check_rate(self, name: str, rate: Any) -> None:
        if isinstance(rate, list):
            pair = as_rates(rate, name)
            if len(pair) != 2 or pair[0] > pair[1]:
                raise ValueError(f"{name}: expected a pair (low, high) of missing rates, got {rate!r}")
        elif not isinstance(rate, str):
            as_rate(rate, name)

    def drop(self, left: Remains, source: Source) -> None:
        """Drop frames, in place; a sample that would lose all keeps one, unless it may be empty."""
        names, before = left.names, left.present
        check_known("keep_ends", self.keep_ends or (), names)
        base, rates = {name: left.frames(name) for name in names}, self.rates_of(names)
        ends = left.tokens() if self.keep_ends is None else self.keep_ends
        present = before.clone()
        for m, (name, nominal) in enumerate(zip(names, rates, strict=True)):
            if nominal != 0:
                rate = self.rate(left, source, name, nominal)
                keep = self.kept(source, self.stream(name, base[name]), base[name], rate, name in ends)
                left.observed[name] = keep
                present[:, m] &= any_frame(keep)  # a modality without frames is not there
        left.present = present
        lost = (before.any(-1) & ~present.any(-1)).nonzero()[:, 0]
        if not self.may_empty and len(lost):
            self._restore(left, source, base, rates, lost, pick(source, lost, before[lost], names))

    def _restore(
        self, left: Remains, source: Source, base: dict[str, Tensor], rates: list[Any], lost: Tensor, chosen: Tensor
    ) -> None:
        """Give the samples ``lost`` back one frame of the modality that was chosen for each."""
        if all(isinstance(r, (int, float)) and r >= 1 for r in rates):
            raise ValueError(
                "rates: missing rates of 1 leave nothing of some samples; lower one, pass keep_one=True or "
                "allow_empty=True"
            )
        for m, name in enumerate(left.names):
            rows = lost[chosen == m]
            if len(rows):
                key = source.key("frame", self.stream(name, base[name]))[rows]
                left.observed[name][rows, last_to_go(key, base[name][rows])] = True
        left.present[lost, chosen] = True
        left.restored += len(lost)

    def stream(self, name: str, base: Tensor) -> Any:
        """What a modality's frame noise is keyed by: its name, or what it shares."""
        if self.shared == "equal":
            return "length", base.shape[-1]
        return "all" if self.shared else name

    def rate(self, left: Remains, source: Source, name: str, nominal: Any) -> Tensor:
        """float64 [n]: a number for all, a draw from U(low, high) each, or what an entry of ``extras`` says."""
        if isinstance(nominal, str):
            return left.extra_rate(nominal)
        if isinstance(nominal, list):
            return nominal[0] + (nominal[1] - nominal[0]) * source.uniform("rate", name)
        return torch.full((len(left.ids),), float(nominal), dtype=torch.float64, device=left.ids.device)

    def kept(self, source: Source, stream: Any, base: Tensor, rate: Tensor, ends: bool) -> Tensor:
        """bool [n, T]: the frames of ``base`` that stay at rate [n]."""
        return drop_frames(source.key("frame", stream), base, rate, ends, self.keep_one)


class LNLN(Frames, kind="lnln"):
    """LNLN's and DEAR's frames: constant rates for tests, without rates a draw per sample and modality for training."""

    def check_rates(self) -> None:
        if self.rates is not None:
            super().check_rates()

    def rate(self, left: Remains, source: Source, name: str, nominal: Any) -> Tensor:
        if nominal is not None:
            return super().rate(left, source, name, nominal)
        rate = source.uniform("rate", name)
        rate[source.order("zero", name)[: len(rate) // 2]] = 0.0
        return rate


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Burst(Frames, kind="burst"):
    """Frames are dropped in contiguous blocks."""

    blocks: int = option(1, Whole(1))

    on_any_device = False

    def kept(self, source: Source, stream: Any, base: Tensor, rate: Tensor, ends: bool) -> Tensor:
        keep = drop_bursts(source, stream, base, rate, self.blocks)
        return keep_some(keep, base, source.key("frame", stream), ends, self.keep_one)


class Heterogeneous(MissingPlan, kind="heterogeneous"):
    """DREAM A.4, see `heterogeneous_mask`; ``rates`` is eta."""

    def check_rates(self) -> None:
        if self.rates is None:
            raise ValueError(f"rates: a plan of kind {self.kind!r} needs missing rates, got none")
        as_rate(self.rates, "rates")

    def drop(self, left: Remains, source: Source) -> None:
        base = [left.frames(name) for name in left.names]
        left.present, observed = draw_heterogeneous(source, base, left.present, float(self.rates), left.names)
        left.observed.update(zip(left.names, observed, strict=True))


KINDS = (
    "none", "fixed", "imbalanced", "bernoulli", "exact_count", "frames", "lnln", "heterogeneous", "per_class", "mar",
    "mnar", "burst",
)  # fmt: skip
"""The kinds of `MissingPlan`."""


# --- A protocol of several plans ------------------------------------------------------------------------------------

LNLN_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def lnln_protocol(
    seed: int = 0,
    static_masks: bool = False,
    rates: Sequence[float] = LNLN_RATES,
    test_seed: int = 1111,
    keep_ends: Sequence[str] | None = None,
) -> tuple[MissingPlan, dict[str, MissingPlan]]:
    """LNLN's protocol, which DEAR inherits: (training plan, test plans by name "r=0.0" to "r=0.9").

    Training draws a rate per sample and modality from U(0, 1), which is 0 for half of the samples of each modality,
    anew in every epoch. Tests have one constant rate for all samples and modalities; their masks are those of
    ``test_seed`` whatever the run's seed, so all runs are tested alike. Scores are reported as the mean over the rates.

    seed : of training
    static_masks : as the public code behaves: training draws once, from ``test_seed`` and not the run's seed, and
        modalities whose sequences are equally long lose the same frames. (There, the choice of the half that loses
        nothing alone follows the run's seed; here it does not.)
    rates : of the tests, in [0, 1]
    keep_ends : modalities whose first and last frame stay; default those of token ids. Name text that is stored as
        features, whose [CLS] and [SEP] the protocol keeps too

    A sample that would lose everything keeps one frame, so a rate of 1 needs text whose ends stay.
    """
    Maybe(Several(Text))("keep_ends", keep_ends)
    ends = None if keep_ends is None else tuple(keep_ends)
    Whole()("seed", seed)
    Whole()("test_seed", test_seed)
    Flag()("static_masks", static_masks)
    shared: bool | str = "equal" if static_masks else False
    train = MissingPlan(
        "lnln", seed=test_seed if static_masks else seed, resample=not static_masks, keep_ends=ends, shared=shared
    )
    tests = {
        f"r={float(r)!r}": MissingPlan("lnln", float(r), seed=test_seed, keep_ends=ends, shared=shared)
        for r in as_rates(rates)
    }
    return train, tests
