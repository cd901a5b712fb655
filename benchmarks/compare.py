# SPDX-License-Identifier: Apache-2.0

"""Compares two documents of `ternaryforge bench --output`; exit code 1 where a rate fell by more than 5 %.

Usage: python benchmarks/compare.py OLD.json NEW.json [--loss 0.05]

A combination of OLD that NEW lacks is a failure as well. Rates of two machines, or of two moments of
a machine that others share, differ for reasons that are not ours: both limits are printed first.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RATES = ("decode_tokens_per_second", "prefill_tokens_per_second")
KEYS = ("target", "threads", "context", "prompt_tokens")


def combinations(document: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Results by what was measured."""
    return {tuple(result[key] for key in KEYS): result for result in document["results"]}


def read(path: Path) -> dict[str, Any]:
    """A document. Exits with code 2 for a file that is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        combinations(document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"error: '{path}' is no document of `ternaryforge bench --output`: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None
    return document


def main() -> int:
    """0: nothing lost more than allowed; 1: something did, or is missing."""
    parser = argparse.ArgumentParser(description="Compare two benchmark documents.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--loss", type=float, default=0.05, help="largest allowed loss, as a share")
    options = parser.parse_args()
    old, new = read(options.old), read(options.new)
    for name, document in (("old", old), ("new", new)):
        machine = document["machine"]
        print(f"{name}: {document['model']} on {machine['cpu']}; GB/s by threads:", end=" ")
        print({count: round(rate / 1e9, 1) for count, rate in machine["read_bandwidth"].items()})
    failures = 0
    found = combinations(new)
    for key, before in combinations(old).items():
        label = ", ".join(f"{name} {value}" for name, value in zip(KEYS, key, strict=True))
        after = found.get(key)
        if after is None:
            print(f"MISSING  {label}")
            failures += 1
            continue
        for rate in RATES:
            change = after[rate] / before[rate] - 1
            lost = change < -options.loss
            failures += lost
            print(
                f"{'LOST' if lost else 'ok':8} {change:+7.1%}  {rate} {before[rate]:.2f} -> {after[rate]:.2f}  {label}"
            )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
