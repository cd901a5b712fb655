# SPDX-License-Identifier: Apache-2.0
"""The command `ternaryforge`: one module per verb.

Reports go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failure, 2 wrong usage,
3 a validation threshold missed, 130 interrupted. With TERNARYFORGE_DEBUG set, errors keep their
traceback.
"""

import os
import sys

import typer

from ternaryforge.cli import (
    analyze,
    bench,
    calibrate,
    chat,
    convert,
    doctor,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    plan,
    run,
    search,
    validate,
    verify,
)
from ternaryforge.cli.output import report_error

app = typer.Typer(
    name="ternaryforge",
    help="Convert, evaluate and run language models with ternary weights on CPUs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("convert")(convert.command)
app.command("export")(export.command)
app.command("import")(import_.command)
app.command("calibrate")(calibrate.command)
app.command("analyze")(analyze.command)
app.command("search")(search.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("evaluate")(evaluate.command)
app.command("validate")(validate.command)
app.command("run")(run.command)
app.command("bench")(bench.command)
app.command("inspect")(inspect.command)
app.command("plan")(plan.command)
app.command("verify")(verify.command)
app.command("doctor")(doctor.command)


def main() -> None:
    """Runs the command line and exits."""
    try:
        app()
    except (ValueError, OSError, TypeError, ImportError, MemoryError) as error:
        if os.environ.get("TERNARYFORGE_DEBUG"):
            raise
        report_error(error)
        sys.exit(1)
    except KeyboardInterrupt:  # outside of any command
        sys.exit(130)
