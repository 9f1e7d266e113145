"""What the page and the tables need of the JSON files that runs have written: a line about what one lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_INTERVAL, _SUBGROUP = ("value", "low", "high"), ("by", "value", "lesions", "patients", "pathologies", "auroc")
# What the page and the tables take from a results.json that has metrics. `*` is each of a list or an object; what
# follows a `?` is wanted only where it is there.
RESULT = (
    "classes", "confusion", "interval.over", "metrics.*.value", "operating_point?.temperature",
    "operating_point?.threshold", "two_class?.metrics.auroc.value", "differences?.*.baseline", "fractions?.*.fraction",
    *(f"detection?.*.{name}" for name in _INTERVAL),
    *(f"differences?.*.difference.auroc.{name}" for name in (*_INTERVAL, "p_value")),
    "units?.*.number", "units?.*.metrics",
    "per_class?.*.support", *(f"subgroups?.*.{name}" for name in (*_SUBGROUP, "auroc_malignant")),
)  # fmt: skip
TABLES = (
    "synthetic", "primary", "steps", "cbis",
    *(f"tables.*.{name}" for name in ("lesions", "patients", "comparisons", "absent", "published", "rows")),
    *(f"tables.*.rows.*.{name}" for name in ("name", "kind", "metrics", "files", "leaves_out")),
)  # fmt: skip
ZEROSHOT_ROWS = ("classes", "confusion", "interval.over", "metrics", "never_predicted")


def require(found: dict[str, Any], where: str | Path, keys: tuple[str, ...]) -> None:
    """A ValueError naming the file and the first of `keys`, as in RESULT, that is not there."""
    for key in keys:
        _require(found, key.split("."), where, [])


def _require(value: Any, parts: list[str], where: str | Path, above: list[str]) -> None:
    if not parts:
        return
    first, *rest = parts
    name = first.removesuffix("?")
    if name == "*" and isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            _require(each, rest, where, [*above, str(key)])
    elif not isinstance(value, dict) or name == "*":
        kind = type(value).__name__
        raise ValueError(f"{where}: {'.'.join(above)} is a {kind}, not what holds {'.'.join([first, *rest])}")
    elif name in value and (value[name] or first == name):
        _require(value[name], rest, where, [*above, name])
    elif first == name:
        raise ValueError(f"{where} lacks the key {'.'.join([*above, name])}")
