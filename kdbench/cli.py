"""The command line: it parses and prints, nothing else. Only the commands that need torch import it."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdbench import board as boards
from kdbench import config
from kdbench.errors import UserError, unknown
from kdbench.paths import cache_dir, runs_dir

if TYPE_CHECKING:
    from kdbench.stages import Places

DEFAULT_BOARD = "tiny-instruct/v1"

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train knowledge distillation methods under one loop and compare them in one table.",
)

BoardName = Annotated[str, typer.Option("--board", help="<name>/v<N>, <name> (the newest), or a path.")]
RunsDir = Annotated[Path, typer.Option("--runs", help="Folder of runs.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root", envvar="KDBENCH_DATA_ROOT", help="Local folder of data sets; see `kdbench list data`."
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change a setting, repeatable; the section is the name of a method, or one of training, "
        "evaluation, evidence, select, task.",
    ),
]


def _err(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _numbers(text: str, where: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UserError(f"{where} {text}: expected whole numbers with commas, for example 1,2,3") from None


def _places(runs: Path, data_root: Path | None) -> "Places":
    from kdbench.stages import Places

    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: there is no such folder")
    return Places(runs, cache_dir(), data_root, progress=_main_process())


def _size(board: config.Board, size: str | None) -> str:
    if size is None:
        return boards.published_size(board)
    if size not in board.sizes:
        raise unknown("size", size, board.sizes, board.id)
    return size


# -------------------------------------------------------------------------------------------------------- run
@app.command()
def run(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD|FILE.py|all ...]",
            help="Rows of the board, other methods, or files with a method of your own; none or `all`: all "
            "rows. Reference rows (teacher, untrained student) are always run too: they cost an evaluation.",
        ),
    ] = None,
    board: BoardName = DEFAULT_BOARD,
    size: Annotated[str | None, typer.Option(help="One of the board's sizes.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 1,2,3; default: the board's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    runs: RunsDir = runs_dir(),  # noqa: B008
    data_root: DataRoot = None,
    overrides: Overrides = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    track: Annotated[str | None, typer.Option(help="Also log to tensorboard or wandb.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")] = False,
) -> None:
    """Train and score rows of a board, then print its table. What is finished is not repeated."""
    from kdbench import jobs as work

    question = config.load_board(board)
    chosen = _size(question, size)
    rows = work.rows_of(question, methods or [])
    numbers = _numbers(seeds, "--seeds") if seeds else list(question.seeds)
    work.quiet(question.sizes[chosen].threads)
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    say = _err if _main_process() else lambda text: None
    axes = question.axis_values()[0]
    for name in rows:  # most mistakes are found here, before torch is imported
        config.resolve(question, chosen, name, numbers[0], overrides, axes=axes, among=rows)
    workers = work.Workers(jobs, live=sys.stderr.isatty()) if alone and not dry_run else None
    places = _places(runs, data_root)
    plans = work.plans(question, chosen, rows, numbers, overrides, work.device_of(device), places)
    todo = work.jobs_of(plans)
    finished = [plan for plan in plans if plan.finished() is not None]
    say(f"{question.id}, size {chosen}: {len(plans)} runs, {len(finished)} of them finished")
    if dry_run:
        return
    if workers is not None:
        workers.run(todo)
    else:
        work.in_order(todo, say)
    if _main_process():
        print(boards.render(boards.report(question, runs, chosen), "table"), end="")
    statuses = {job.outcome.status for job in todo if job.outcome is not None}
    raise typer.Exit(2 if "refused" in statuses else 1 if statuses - {"done"} else 0)


# ------------------------------------------------------------------------------------------------------- read
@app.command()
def report(
    board: Annotated[str, typer.Argument(metavar="[BOARD]")] = DEFAULT_BOARD,
    size: Annotated[str | None, typer.Option(help="One of the board's sizes.")] = None,
    format: Annotated[str, typer.Option(help="table, markdown, csv or json.")] = "table",
    runs: RunsDir = runs_dir(),  # noqa: B008
) -> None:
    """Print a board's table: published rows and your own."""
    question = config.load_board(board)
    print(boards.render(boards.report(question, runs, _size(question, size)), format), end="")


# ------------------------------------------------------------------------------------------------------ start
def main(args: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 (ran and failed), 2 (your input), 130 (stopped)."""
    usage = typer.BadParameter.__mro__[2]  # what the parser raises for a wrong command line
    try:
        code = app(args=None if args is None else list(args), prog_name="kdbench", standalone_mode=False)
        return int(code or 0)
    except UserError as error:
        _err(f"kdbench: {error}")
    except (KeyboardInterrupt, typer.Abort):
        _err("kdbench: stopped; what is done is kept, the same command goes on from there")
        return 130
    except BrokenPipeError:  # `kdbench report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not isinstance(error, usage):
            raise
        _err(f"kdbench: {error.format_message()}")  # type: ignore[attr-defined]
    return 2
