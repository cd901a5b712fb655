# SPDX-License-Identifier: Apache-2.0
"""`ternaryforge doctor`: CPU, targets, self-test, versions."""

import typer

from ternaryforge.cli.output import (
    JsonOption,
    SeedOption,
    ThreadsOption,
    print_json,
    print_table,
)


def command(
    *,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Check this machine: CPU, targets, self-test, versions."""
    from ternaryforge.diagnosis import diagnose

    del threads, seed  # the self-test chooses its own
    diagnosis = diagnose()
    if json:
        print_json(diagnosis.to_dict())
    else:
        rows: dict[str, object] = {
            "CPU": diagnosis.cpu,
            "system": diagnosis.system,
            "active target": diagnosis.active_target,
            "layout of large models": diagnosis.layout,
            "threads": f"{diagnosis.threads} ({diagnosis.thread_backend})",
        }
        for target, failures in diagnosis.self_test.items():
            rows[f"self-test {target}"] = "; ".join(failures) or "passed"
        for package, version in diagnosis.versions.items():
            rows[package] = version or "not installed"
        print_table(rows)
    if not diagnosis.healthy:
        raise typer.Exit(1)
