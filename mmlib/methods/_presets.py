"""Options by name, some of which live in a subclass: what a release, or another interpretation, does differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..checks import OneOf, check_known

__all__ = ["Presets"]


class Presets:
    """First base of a method with options; a subclass names the frozen dataclass of its options, and sets of them::

        class MCE(Presets, nn.Module, config=MCEConfig, presets={"paper": {}}):
            def __init__(self, backbone, *, preset="paper", **options):
                super().__init__()
                self.config = self.configured(preset, options)


        class ReleasedMCE(MCE, config=ReleasedMCEConfig, presets={"avmnist": {"rate_norm": "none"}}): ...

    ``MCE(backbone, preset="avmnist")`` and ``MCE(backbone, rate_norm="none")`` are then a `ReleasedMCE`: of the
    classes with a ``config``, in the order of their definition, the first that has the preset and takes the options. A
    class has the presets of its bases too. A subclass without a ``config`` takes no part: called by its name, it is
    what it is.

    Config : the dataclass of the class's options
    PRESETS : name -> options, those of the bases first
    """

    Config: ClassVar[type[Any]]
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    _family: ClassVar[list[type[Any]]] = []

    def __init_subclass__(
        cls,
        config: type[Any] | None = None,
        presets: Mapping[str, Mapping[str, Any]] | None = None,
        **others: Any,
    ) -> None:
        super().__init_subclass__(**others)
        if config is None:
            return
        cls.Config = config
        cls.PRESETS = {**cls.PRESETS, **{name: dict(options) for name, options in (presets or {}).items()}}
        cls._family = [*cls._family, cls]
        for older in cls._family[:-1]:
            older._family = cls._family

    def __new__(cls, *args: Any, preset: str = "paper", **options: Any) -> Any:
        return super().__new__(cls.chosen(preset, options))

    @classmethod
    def chosen(cls, preset: str, options: Mapping[str, Any]) -> type[Any]:
        """The class that ``cls(preset=preset, **options)`` is of; ``options`` may hold other arguments of it as well.

        Where none has the preset and takes the options, it is one whose `configured` says what is wrong.
        """
        if not isinstance(preset, str) or not cls._family or cls is not cls._family[0]:
            return cls
        known = set().union(*(_fields(kind) for kind in cls._family))
        settings = {name: value for name, value in options.items() if name in known}
        named = [kind for kind in cls._family if preset in kind.PRESETS and _fields(kind).keys() >= settings.keys()]
        fitting = [kind for kind in named if all(_takes(kind, *setting) for setting in settings.items())]
        return fitting[0] if fitting else max(named, key=lambda kind: len(_fields(kind)), default=cls)

    @classmethod
    def configured(cls, preset: str, options: Mapping[str, Any]) -> Any:
        """The configuration of a preset, with ``options`` over it.

        Raises ValueError for a preset or an option that the class does not have, and what the configuration raises.
        """
        kind = cls.chosen(preset, options)
        OneOf(*dict.fromkeys(name for each in kind._family for name in each.PRESETS))("preset", preset)
        check_known(
            "options", options, dict.fromkeys(name for each in kind._family for name in _fields(each)), "options"
        )
        if preset not in kind.PRESETS or not _fields(kind).keys() >= options.keys():
            raise ValueError(
                f"preset: {preset!r} with the options {sorted(options)} is nothing that {kind.__name__} has"
            )
        return kind.Config(**{**kind.PRESETS[preset], **options})


def _fields(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind.Config)}


def _takes(kind: type[Any], name: str, value: Any) -> bool:
    """Whether a value passes the check beside the field."""
    try:
        _fields(kind)[name].metadata.get("check", lambda *_: None)(name, value)
    except (TypeError, ValueError):
        return False
    return True
