"""Arranges one number for each weight by layer and module."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Real

from tlens_callback.instruments.parts.selection import layer_labels
from tlens_callback.reading import Reading
from tlens_callback.shadow import Shadow

_IN_LAYER = re.compile(r"(?P<before>.*?\.)(?P<layer>\d+)\.(?P<within>.+)")


@dataclass(frozen=True, eq=False)
class ModuleGrid:
    """Arranges weights in a full grid of layers and modules, and all others in a list.

    The grid has the layers that have any of the weights, and the modules that all these layers
    have. A module's name is the shortest end of its path that no other module in the layer has.

    Attributes:
        layers, modules: names of the grid's rows and columns.
        grid: index of the weight at each place.
        outside: the weights that are not in the grid: embeddings, and modules that only some of
            the layers have.
        names: the names of all weights, as given.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...]
    grid: Int[np.ndarray, "layer module"]
    outside: tuple[int, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str], stack: str) -> "ModuleGrid":
        """Arranges the weights with these dotted paths.

        Args:
            stack: path of the layers. A tower for images has layers of its own, perhaps more of
                them.
        """
        matches = [_IN_LAYER.match(name) for name in names]
        at = {
            (int(m["layer"]), m["within"]): i
            for i, m in enumerate(matches)
            if m and m["before"] == f"{stack}."
        }
        layers = sorted({layer for layer, _ in at})
        within = list(dict.fromkeys(path for _, path in at))
        shared = [path for path in within if all((layer, path) in at for layer in layers)]
        grid = np.array([[at[layer, path] for path in shared] for layer in layers], dtype=int)
        inside = set(grid.ravel().tolist())
        return cls(
            layers=tuple(layers) if shared else (),
            modules=tuple(_short(path, within) for path in shared),
            grid=grid.reshape(len(layers) if shared else 0, len(shared)),
            outside=tuple(i for i in range(len(names)) if i not in inside),
            names=tuple(names),
        )

    def readings(
        self,
        key: str,
        values: Real[np.ndarray, "weight ..."],
        shadow: Shadow,
        *,
        unit: str,
        limits: tuple[float, float] | None = None,
        more: tuple[str, ...] = (),
    ) -> Iterator[Reading]:
        """Yields `key` for the grid and `key`_elsewhere for the other weights, unless empty.

        Their axes are [layer, module, *more] and [weight, *more].
        """
        if self.grid.size:
            yield Reading(
                key=key,
                values=values[self.grid],
                axes=("layer", "module", *more),
                unit=unit,
                labels={"module": self.modules, **layer_labels(self.layers, shadow)},
                limits=limits,
            )
        if self.outside:
            yield Reading(
                key=f"{key}_elsewhere",
                values=values[list(self.outside)],
                axes=("weight", *more),
                unit=unit,
                labels={"weight": [self.names[i] for i in self.outside]},
                limits=limits,
            )


def _short(path: str, others: Sequence[str]) -> str:
    """Returns the shortest dotted end of the path that no other path ends with."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        end = ".".join(parts[-n:])
        if not any(other != path and f".{other}".endswith(f".{end}") for other in others):
            return end
    return path
