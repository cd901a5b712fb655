# SPDX-License-Identifier: Apache-2.0
"""What results and reports have in common: as a dict, as a file, as a table in a notebook."""

import dataclasses
import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report:
    """Base of the frozen dataclasses that long calls return."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, and what follows from them, as plain values for JSON."""
        if not dataclasses.is_dataclass(self):
            raise TypeError(f"[report] {type(self).__name__} is no dataclass")
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dict` as a JSON file."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'><pre style='white-space:pre-wrap;margin:0'>"
            f"{html.escape(_shown(value))}</pre></td></tr>"
            for name, value in self.to_dict().items()
        )
        return f"<table>{rows}</table>"


def new_figure(width: float, height: float, layout: Literal["tight", "constrained"] = "constrained") -> "Figure":
    """An empty matplotlib Figure, in inches. Raises ImportError that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("[plot] matplotlib is missing; pip install 'ternaryforge[plot]'") from error
    return Figure(figsize=(width, height), layout=layout)


def _shown(value: object) -> str:
    """A value for a table cell: short numbers, and no more than the first elements of a list."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and len(value) > 16:
        return ", ".join(_shown(item) for item in value[:16]) + f", ... ({len(value)})"
    return str(value)
