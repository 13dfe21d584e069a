"""How many layers a model has and of which types: what its norms are counted against."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gemma_fold.rules.row import Config, Family, Norm, value_at
from gemma_fold.rules.tree import Refused, templates

#: An index inside a tensor name: a number between dots, written as engines write it.
INDEX = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
_MOST_LAYERS = 10_000  # real models have hundreds


@dataclass(slots=True)
class Layers:
    """The layers of one model. counted: config paths that were absent, so tensors were counted.

    Methods raise Refused where the config gives no sensible number.
    """

    config: Config
    row: Family
    root: str
    names: Mapping[str, list[str]]
    counted: dict[str, int] = field(default_factory=dict)

    def limit(self, norm: Norm) -> int | None:
        """The first index that is not a layer the row knows; None without a limit."""
        if norm.absolute or "{i}" not in norm.names:
            return None
        count = self._count(norm.layers or self.row.layers)
        return count + self._number(self.row.draft_layers) if self.row.draft_layers else count

    def required(self, norm: Norm) -> Iterable[int]:
        """The layers that must have `norm`; none where the config does not tell."""
        count = self._count(norm.layers or self.row.layers)
        if not norm.layer_types:
            return range(count)
        return [i for i in range(count) if self._types(i) & set(norm.layer_types)]

    def _types(self, layer: int) -> set[str]:
        found = set()
        for key in ("layer_types", "layers_block_type", "mlp_layer_types"):
            types = self.config.get(key)
            if isinstance(types, list) and layer < len(types):
                found.add(str(types[layer]))
        interval = self.config.get("full_attention_interval")
        if "layer_types" not in self.config and isinstance(interval, int) and interval > 0:
            found.add("linear_attention" if (layer + 1) % interval else "full_attention")
        return found

    def _count(self, path: str) -> int:
        if value_at(self.config, path) is not None:
            return self._number(path)
        # Configs may leave out what equals their class's default; the tensors are all there is.
        if path not in self.counted:
            self.counted[path] = self._count_tensors(path)
        return self.counted[path]

    def _number(self, path: str) -> int:
        value = value_at(self.config, path)
        if value is None:
            return 0
        if not isinstance(value, int) or not 0 <= value <= _MOST_LAYERS:
            raise Refused(f"config.json says {path}={value!r}, which is not a number of layers")
        return value

    def _count_tensors(self, path: str) -> int:
        found = [
            int(index[0])
            for norm in self.row.norms
            if not norm.absolute and (norm.layers or self.row.layers) == path
            for template in templates(norm, self.root)
            if "{i}" in template
            for name in self.names.get(template, ())
            if (index := INDEX.search(name))
        ]
        last = max(found, default=0)
        if last >= _MOST_LAYERS:
            raise Refused(
                f"config.json has no {path}, and its tensors go up to layer {last}, which no "
                "model has; get the original config.json"
            )
        return last + 1
