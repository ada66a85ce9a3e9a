"""Lists every kind of chaos, in the order of the page."""

from __future__ import annotations

from lab.reliability.kind import Kind
from lab.reliability.kinds import (
    building,
    clients,
    descriptors,
    draining,
    engine_files,
    foreign,
    killed,
    stopped,
    storage,
    surroundings,
)

_MODULES = (killed, stopped, draining, clients, descriptors, storage, engine_files, building, surroundings, foreign)


def all_kinds() -> dict[str, Kind]:
    """Returns the kinds by name."""
    kinds = {kind.name: kind for module in _MODULES for kind in module.KINDS}
    assert len(kinds) == sum(len(module.KINDS) for module in _MODULES), "two kinds have one name"
    return kinds
