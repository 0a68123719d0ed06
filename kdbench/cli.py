"""The command line: it parses and prints, nothing else. Only the commands that need torch import it."""

import ast
import dataclasses
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdbench import board as boards
from kdbench import config, registry
from kdbench.errors import UserError, unknown
from kdbench.paths import cache_dir, configs_dir, runs_dir

if TYPE_CHECKING:
    from kdbench.commands import Forecast
    from kdbench.jobs import Job
    from kdbench.record import RunFolder, RunRecord, Score
    from kdbench.stages import Places

DEFAULT_BOARD = "tiny-instruct/v1"
STOPPED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 110},
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
_RUN_HELP = "Its id or the beginning of it, its folder, or its row (the least seed, then the newest)."
_SIDE_HELP = "The id of a run or the beginning of it, its folder, or a row: its runs of all training seeds."
_RUNS_HELP = f"{_SIDE_HELP} A board: all its finished runs."
RunName = Annotated[str, typer.Argument(metavar="RUN", help=_RUN_HELP)]
Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs", min=1, help="How many at the same time; default: the CPU's cores, up to 4; GPU: 1."
    ),
]
Axes = Annotated[
    list[str],
    typer.Option(
        "--axis",
        metavar="AXIS=VALUE,...",
        help="Only these values of an axis of the board, for example dataset=sst2,mr; repeatable.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Change a setting, repeatable; the section is the name of a method, or one of training, "
        "evaluation, evidence, select, task, roles.",
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


def _say(text: str) -> None:
    if _main_process():
        _err(text)


def _places(runs: Path, data_root: Path | None) -> "Callable[[], Places]":
    """Where runs read and write, to be made once torch may be imported; what is wrong is said now."""
    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: there is no such folder")

    def make() -> "Places":
        from kdbench.stages import Places

        return Places(runs, cache_dir(), data_root, progress=_main_process())

    return make


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
    axis: Axes = [],  # noqa: B006
    jobs: Jobs = None,
    runs: RunsDir = runs_dir(),  # noqa: B008
    data_root: DataRoot = None,
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    track: Annotated[str | None, typer.Option(help="Log to tensorboard or wandb too.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")] = False,
) -> None:
    """Train and score rows of a board, then print its table. What is finished is not repeated."""
    from kdbench import commands
    from kdbench import jobs as work

    question = config.load_board(board)
    chosen = _size(question, size)
    rows = commands.rows_of(question, methods or [])
    numbers = _numbers(seeds, "--seeds") if seeds else list(question.seeds)
    axes = commands.chosen_axes(question, chosen, rows, axis)
    for name in rows:  # most mistakes are found here, before torch is imported
        for values in axes[name][:1]:
            among = [*rows, *config.linked_rows(question, chosen)]
            config.resolve(question, chosen, name, numbers[0], overrides, axes=values, among=among)
    places = _places(runs, data_root)
    threads = question.sizes[chosen].threads
    commands.quiet(threads)
    workers = None if dry_run else work.start(live=sys.stderr.isatty())
    commands.check_track(track)
    used = commands.device_of(device)
    plans = commands.plans(question, chosen, rows, numbers, overrides, used, places(), axis)
    todo = work.jobs_of(plans)
    finished = sum(plan.complete() for plan in plans)
    _say(f"{question.id}, size {chosen}: {len(plans)} runs, {finished} of them finished already")
    if dry_run:
        print(_forecast(commands.forecast(question, chosen, plans, todo, runs)))
        return
    work.make(todo, workers, jobs or commands.jobs_for(used, threads), _say)
    if _main_process():
        print(boards.render(boards.report(question, runs, chosen), "table"), end="")
    raise typer.Exit(_code(todo))


@app.command()
def tune(
    board: Annotated[str, typer.Argument(metavar="BOARD")],
    jobs: Jobs = None,
    runs: RunsDir = runs_dir(),  # noqa: B008
    data_root: DataRoot = None,
    device: Device = "auto",
) -> None:
    """Try learning rates for every row of a board on its tuning seed, and write its tuning.json.

    Every row has as many trials. The trials lie in RUNS/tuning and are never part of a report.
    """
    from kdbench import commands
    from kdbench import jobs as work

    question = config.load_board(board)
    if question.tuning is None:
        raise UserError(f"{question.id}: does not tune learning rates: its board.toml has no [tuning]")
    places = _places(runs, data_root)
    threads = question.sizes[question.tuning.size].threads
    commands.quiet(threads)
    workers = work.start(live=sys.stderr.isatty())
    used = commands.device_of(device)
    trials = commands.trials(question, used, places())
    todo = work.jobs_of([plan for plans in trials.values() for plan in plans])
    work.make(todo, workers, jobs or commands.jobs_for(used, threads), _say)
    path = commands.write_tuning(question, trials)
    for name, tuned in config.load_board(board).tuned.items():
        tried = ", ".join(f"{one.lr:g}: {'failed' if one.score is None else f'{one.score:.2f}'}"
                          for one in tuned.trials)  # fmt: skip
        print(f"{name:20} lr {tuned.lr:g}  ({tried})")
    print(f"written to {path}")
    raise typer.Exit(2 if any(job.outcome and job.outcome.status == "refused" for job in todo) else 0)


def _code(jobs: Iterable["Job"]) -> int:
    statuses = {job.outcome.status for job in jobs if job.outcome is not None}
    return 2 if "refused" in statuses else 1 if statuses - {"done"} else 0


def _forecast(lines: Sequence["Forecast"]) -> str:
    from kdbench.jobs import duration

    def bytes_of(amount: int | None) -> str:
        return "unknown" if amount is None else f"{amount / 1e6:,.1f} MB"

    table = [["", "id", "steps", "state", "disk", "time"]]
    for one in lines:
        done = one.state == "finished"
        time = "unknown" if one.seconds is None else duration(one.seconds)
        cost = ["", ""] if done else [bytes_of(one.bytes), time]
        table.append([one.label, one.id, str(one.steps), one.state, *cost])
    left = [one for one in lines if one.state != "finished"]
    if not left:
        return "\n".join([*_aligned(table), "", "Nothing is left to do."])
    known = [one.seconds for one in left if one.seconds is not None]
    said = f"{duration(sum(known))} one after the other" if known else "unknown"
    if known and len(known) < len(left):
        said += f" for {len(known)} of them, the others unknown"
    kept = bytes_of(sum(one.bytes or 0 for one in left))
    most = bytes_of(max((one.training_bytes or 0 for one in left), default=0))
    disk = f"Disk: {kept}, and up to {most} more for each while it trains."
    return "\n".join([*_aligned(table), "", f"Left to do: {len(left)}. {disk} Time: {said}."])


@app.command()
def profile(
    board: BoardName = DEFAULT_BOARD,
    method: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="METHOD|FILE.py",
            help="A row, method or file; repeatable; default: all rows that train.",
        ),
    ] = [],  # noqa: B006
    size: Annotated[str | None, typer.Option(help="One of the board's sizes.")] = None,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Fresh models and random rows: no data, no trained models."),
    ] = False,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="With --random-weights: of each row; default: the task's longest."),
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --random-weights: of each row, and sampled at most.")
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=64, help="With --random-weights: of fresh models whose tokenizer is not here."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many are timed.")] = 5,
    axis: Axes = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
    format: Annotated[str, typer.Option(help="table or json.")] = "table",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it there, not to stdout.")] = None,
    data_root: DataRoot = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured.")] = False,
) -> None:
    """Measure training steps at the board's sizes: seconds by phase, tokens, memory, hardware limit.

    Beside them stands what the paper says that its methods cost, relative to one of them.
    """
    from kdbench import commands
    from kdbench import jobs as work
    from kdbench.profile_report import FORMATS, render

    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    lengths = {"--prompt-tokens": prompt_tokens, "--response-tokens": response_tokens}
    for name, given in {**lengths, "--vocabulary": vocabulary}.items():
        if given is not None and not random_weights:
            raise UserError(f"{name} {given}: is for random rows and models; add --random-weights")
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    question = config.load_board(board)
    chosen = _size(question, size)
    rows = list(dict.fromkeys(method)) or [row.name for row in question.rows if not row.reference]
    values = commands.chosen_axes(question, chosen, rows, axis)
    axes = {name: found[0] for name, found in values.items() if found}
    rows = list(axes)
    for name in rows:  # most mistakes are found here, before torch is imported
        config.resolve(question, chosen, name, question.seeds[0], overrides, axes=axes[name], among=rows)
    places = _places(runs_dir(), data_root)
    commands.quiet(question.sizes[chosen].threads)
    if not dry_run:
        work.start(live=False)
    used = commands.device_of(device)
    from kdbench import profile as measuring

    commands.silence()
    runs = commands.to_profile(question, chosen, rows, overrides, used, axes, bool(method))
    wanted = measuring.Wanted(steps, random_weights, prompt_tokens, response_tokens, vocabulary)
    told = measuring.forecast(runs, places(), wanted)  # what cannot be had is refused before anything is done
    if dry_run:
        print(told)
        return
    machine, found = measuring.measure_all(runs, places(), wanted, _say)
    first = next(iter(axes.values()))
    where = f"{question.id} ({commands.said(first)})" if first else question.id
    text = render(where, chosen, machine, found, format)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        _say(f"written: {out}")
    raise typer.Exit(1 if any(one.error for one in found) else 0)


# ------------------------------------------------------------------------------------------------------- read
@app.command()
def report(
    board: Annotated[str, typer.Argument(metavar="[BOARD]")] = DEFAULT_BOARD,
    size: Annotated[str | None, typer.Option(help="One of the board's sizes.")] = None,
    format: Annotated[str, typer.Option(help="table, markdown, csv or json.")] = "table",
    cost: Annotated[bool, typer.Option("--cost", help="Quality against training time.")] = False,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="ROW", help="With --cost; default: the board's, or the cheapest trained row."),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="With --cost: time to reach the baseline's score plus this; default 0."
        ),
    ] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --cost: draw it too, as .png, .svg or .pdf.")
    ] = None,
    runs: RunsDir = runs_dir(),  # noqa: B008
) -> None:
    """Print a board's table: published rows and your own."""
    if format not in boards.FORMATS:
        raise unknown("format", format, boards.FORMATS)
    for name, given in (("--baseline", baseline), ("--target", target), ("--figure", figure)):
        if given is not None and not cost:
            raise UserError(f"{name} {given}: works only with --cost")
    if target is not None and not 0 <= target < float("inf"):
        raise UserError(f"--target {target:g}: expected a number from 0 on, what is gained over the baseline")
    question = config.load_board(board)
    found = boards.report(question, runs, _size(question, size))
    if not cost:
        print(boards.render(found, format), end="")
        return
    from kdbench import cost_figure, cost_report

    if figure is not None:
        cost_figure.check(figure)
    names = [row.name for row in question.rows]
    view = cost_report.against(found, baseline, target or 0.0, question.baseline, names)
    if figure is not None:
        cost_figure.draw(view, figure)
        _say(f"written: {figure}")
    print(cost_report.render(view, format), end="")


@app.command()
def show(
    run: RunName,
    set_name: Annotated[str | None, typer.Option("--set", help="A test set; default: the first.")] = None,
    against: Annotated[str | None, typer.Option(metavar="RUN", help="A second run, beside it.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many prompts.")] = 5,
    axis: Axes = [],  # noqa: B006
    runs: RunsDir = runs_dir(),  # noqa: B008
) -> None:
    """Print prompts, references, responses and scores of a run, or of two side by side."""
    from kdbench.commands import find_each

    folders = find_each([run] if against is None else [run, against], runs, axis)
    shown = [_answers(folder, set_name) for folder in folders]
    name = shown[0][0]["set"]
    other = shown[-1] if set_name or len(shown) == 1 else _answers(folders[-1], name)
    columns = [{row["example_id"]: row for row in rows} for rows in (shown[0], other)[: len(folders)]]
    seeds = len({row["seed"] for row in folders[0].outputs(name)})
    told = f" (one of {seeds} responses is shown, scores are means over all)" if seeds > 1 else ""
    print(f"set {name}{told}")
    heads = []
    for folder in folders:
        found = folder.record
        heads.append(f"{_about(found)} ({found.board}, {found.size})")
    for line in _beside(heads):
        print(line)
    for example in [one for one in columns[0] if all(one in column for column in columns)][:n]:
        first = columns[0][example]
        print(f"\n{'─' * _WIDTH}\nexample {example}\n")
        print(textwrap.indent(first["prompt"].strip(), "  "))
        for reference in first["references"]:
            print(f"\nreference:\n{textwrap.indent(reference.strip(), '  ')}")
        print()
        for line in _beside([f"response: {_scores(column[example])}" for column in columns]):
            print(line)
        for line in _beside([column[example]["response"].strip() or "(empty)" for column in columns]):
            print(f"  {line}")


_WIDTH = 110


def _answers(folder: "RunFolder", set_name: str | None) -> list[dict[str, Any]]:
    """The rows of a set with the first generation seed, each with its scores by name."""
    sets = folder.output_sets()
    if not sets:
        raise UserError(f"{folder.path}: has no responses: the run {folder.record.status}")
    if set_name is not None and set_name not in sets:
        raise unknown("set", set_name, sets, str(folder.path))
    rows = folder.outputs(set_name or sets[0])
    shown = [row for row in rows if row["seed"] == rows[0]["seed"]]
    arrays = folder.arrays()
    for row in shown:
        row["scores"] = {}
    for name, score in folder.record.scores.items():
        measure, _, of = name.rpartition("/")
        if of == shown[0]["set"] and {"values", "prompt", "stratum"} <= score.arrays.keys():
            values, prompts, strata = (arrays[score.arrays[key]] for key in ("values", "prompt", "stratum"))
            mine = strata == score.args.get("stratum")
            by_prompt = dict(zip(prompts[mine].tolist(), values[mine].tolist(), strict=True))
            for row in shown:
                row["scores"][measure.rpartition("/")[2]] = by_prompt[row["example_id"]]
    return shown


def _scores(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in row["scores"].items())


def _beside(texts: Sequence[str]) -> list[str]:
    """Texts wrapped into columns of equal width."""
    width = _WIDTH // len(texts) - 3
    columns = [
        [part for line in text.splitlines() for part in textwrap.wrap(line, width) or [""]] for text in texts
    ]
    height = max(len(column) for column in columns)
    padded = [[*column, *[""] * (height - len(column))] for column in columns]
    return [" │ ".join(part.ljust(width) for part in parts).rstrip() for parts in zip(*padded, strict=True)]


@app.command()
def analyze(
    names: Annotated[list[str], typer.Argument(metavar="RUN|BOARD...", help=_RUNS_HELP)],
    analysis: Annotated[
        list[str], typer.Option("--analysis", help="Repeatable; default: those of the board.")
    ] = [],  # noqa: B006
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder; default: `figures` in the run's or in the board's folder of runs."),
    ] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="ANALYSIS.KEY=VALUE",
            help="Change a setting of an analysis, for example exposure_bias.divergences='[\"jsd\"]'.",
        ),
    ] = [],  # noqa: B006
    size: Annotated[
        str | None, typer.Option(help="Of a board's runs, or all; default: the published size.")
    ] = None,
    axis: Axes = [],  # noqa: B006
    runs: RunsDir = runs_dir(),  # noqa: B008
) -> None:
    """Compute scores and figures again from what runs saved; no model is loaded.

    The scores go into the runs' records. Runs of one row are drawn together.
    """
    from kdbench import commands

    folders = [folder for name in names for folder in commands.find_runs(name, runs, size, axis)]
    chosen = analysis or list(dict.fromkeys(name for folder in folders for name in folder.record.analyses))
    modules = {name: registry.load_analysis(name) for name in chosen}
    settings = commands.analysis_settings(modules, overrides)
    for folder in folders:
        for name, module in modules.items():
            stem = registry.stem(name)
            made = commands.analysed(name, module, folder, settings[name])
            record = folder.add(stem, module.VERSION, made)
            scores = {key: one for key, one in record.scores.items() if key.startswith(f"{stem}/")}
            about = f"{_about(record)}: {stem}, version {module.VERSION}"
            if len(folders) > 1:
                print(f"{about}, {len(scores)} scores", flush=True)
            else:
                print("\n".join([about, *_aligned([_score(*one) for one in scores.items()])]))
    common = folders[0].path if len(folders) == 1 else folders[0].path.parent
    for module in modules.values():
        if hasattr(module, "figures"):
            for path in module.figures(folders, figures or common / "figures"):
                print(f"written: {path}")


def _about(record: "RunRecord") -> str:
    """A run in words: its row, axis values, seed and id."""
    from kdbench.commands import said

    axes = f", {said(record.axes)}" if record.axes else ""
    return f"{record.row}{axes}, seed {record.seed}, run {record.run_id}"


def _score(name: str, score: "Score") -> list[str]:
    """A line of the table of one run's scores: name, value, unit, 95 % interval or warning, n."""
    low, high = (score.detail.get(key) for key in ("low", "high"))
    interval = f"[{low:.4g}, {high:.4g}]" if isinstance(low, float) and isinstance(high, float) else ""
    said = str(score.detail.get("warning") or interval)
    if instead := score.detail.get("excess_nats"):
        said += " {value:.4g} nats [{low}, {high}]".format(**instead)
    value = "–" if score.value is None else f"{score.value:.4g}"
    return [f"  {name}", value, score.unit, said, f"n {score.n}"]


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="ROW|RUN", help=_SIDE_HELP)],
    second: Annotated[str, typer.Argument(metavar="ROW|RUN", help="What it is compared with.")],
    scores: Annotated[
        list[str], typer.Option("--score", help="Repeatable; default: the board's columns with prompts.")
    ] = [],  # noqa: B006
    board: Annotated[
        str | None, typer.Option(metavar="NAME|TOML", help="Default: that of the first row's newest run.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="One of the board's sizes.")] = None,
    axis: Axes = [],  # noqa: B006
    runs: RunsDir = runs_dir(),  # noqa: B008
) -> None:
    """Compare two methods prompt by prompt: difference, 95 % interval, p-value.

    A row stands for its runs of all training seeds; on a board with axes, runs of the same axis values are
    compared, for each of them apart. Refused where the two were measured on other prompts, with another
    teacher or other decoding settings.
    """
    from kdbench import commands
    from kdbench.compare import paired

    if board is None:
        newest = max(commands.find_runs(first, runs, size, axis), key=lambda one: one.begun).record
        board, size = newest.board, size or newest.size
    question = config.load_board(board)
    chosen = _size(question, size)
    sides = [commands.runs_of(name, question, chosen, runs, axis) for name in (first, second)]
    pairs, left_out = commands.pairs(*sides)
    for name in scores:
        known = dict.fromkeys(one for pair in pairs for run in pair.runs for one in run.record.scores)
        if name not in known:
            raise unknown("score", name, known)
    texts = []
    for pair in pairs:
        names = commands.comparable_columns(question, pair.runs)
        if scores:  # those of other test sets belong to other axis values
            has = {name for run in pair.runs for name in run.record.scores}
            names = [name for name in scores if name in has]
        if not names and len(pairs) > 1:
            continue
        table, warnings = [["", first, second, "difference", "p"]], []
        for one in paired(pair.one, pair.other, names):
            warnings += [f"{one.score}: {one.difference.warning}"] if one.difference.warning else []
            cells = [commands.interval_text(x) for x in (one.a, one.b, one.difference)]
            p_value = one.difference.p_value
            table.append(
                [f"{one.score} {one.a.unit}".strip(), *cells, "–" if p_value is None else f"{p_value:.3g}"]
            )
        at = f"{commands.said(pair.axes)}, " if pair.axes else ""
        head = f"{first} less {second}, {at}{pair.seeds}, the same prompts, 95 % intervals"
        texts.append("\n".join([head, *_aligned(table), *warnings]))
    print("\n\n".join(texts))
    for one_left in left_out:
        _err(f"left out, for only one has it: {one_left}")


@app.command()
def collect(
    names: Annotated[list[str], typer.Argument(metavar="RUN|BOARD...", help=_RUNS_HELP)],
    profile: Annotated[
        list[str], typer.Option("--profile", help="Decoding profile, repeatable: plain or minillm.")
    ] = [],  # noqa: B006
    interventions: Annotated[
        list[str],
        typer.Option("--intervention", help="Repeatable: hand_over, corruption, recovery, or all."),
    ] = [],  # noqa: B006
    axis: Axes = [],  # noqa: B006
    runs: RunsDir = runs_dir(),  # noqa: B008
    data_root: DataRoot = None,
) -> None:
    """Collect more evidence of finished runs: other decoding, interventions. What is there is kept.

    The student is the saved one; a teacher that is in the cache no more is trained again.
    """
    from kdbench import commands

    if not profile and not interventions:
        raise UserError(
            "collect: say what: --profile NAME or --intervention NAME, for example --intervention all"
        )
    commands.check_evidence(profile, interventions)
    folders = [folder for name in names for folder in commands.find_runs(name, runs, axes=axis)]
    places = _places(runs, data_root)
    for folder in folders:
        _err(_about(folder.record))
        commands.quiet(int(folder.config.get("threads", 1)))
        for path in commands.collect(folder, places(), profile, interventions):
            print(f"evidence: {path}")
    found = " ".join(names)
    _err(f"scores and figures of it: kdbench analyze {found} --analysis exposure_bias")


@app.command()
def publish(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help=_RUN_HELP)],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of the published run.")] = False,
    axis: Axes = [],  # noqa: B006
    runs: RunsDir = runs_dir(),  # noqa: B008
) -> None:
    """Check finished runs and copy their records into their boards."""
    from kdbench.commands import find_each

    by_board: dict[str, list[Path]] = {}
    for folder in find_each(names, runs, axis):
        by_board.setdefault(folder.record.board, []).append(folder.path)
    for board, folders in by_board.items():
        question = config.load_board(board)
        for warning in boards.publish(folders, question, replace):
            _err(f"warning: {warning}")
        print(f"{len(folders)} runs published in {question.folder}")


KINDS = ("methods", "boards", "tasks", "analyses", "data", "models")


@app.command(name="list")
def list_(
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS))],
    data_root: DataRoot = None,
) -> None:
    """List methods, boards, tasks, analyses, data sets or models."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS, "list")
    if kind == "data":
        _list_data(data_root)
        return
    lines: list[tuple[str, str]] = []
    if kind == "boards":
        for name in config.boards():
            board = config.load_board(name)
            sizes = ", ".join(board.sizes)
            lines.append((name, f"{board.title or board.question} (sizes: {sizes})"))
    elif kind == "models":
        for name in config.models():
            lines.append((name, _comment(configs_dir() / "models" / f"{name}.toml")))
    else:
        kinds: dict[str, registry.Kind] = {"methods": "distillers", "tasks": "tasks", "analyses": "analyses"}
        for name in registry.names(kinds[kind]):
            lines.append((name, _summary(registry.find(kinds[kind], name))))
    print("\n".join(_aligned([list(line) for line in lines])))


def _summary(path: Path) -> str:
    """The first sentence of a module's docstring; nothing is imported."""
    text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return " ".join(text.split("\n\n")[0].split())


def _comment(path: Path) -> str:
    """The comment that a file begins with."""
    first = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return " ".join(line.lstrip("# ") for line in first if line.startswith("#"))


def _list_data(data_root: Path | None) -> None:
    from kdbench.data import sources

    if data_root is not None and not data_root.is_dir():
        raise UserError(f"--data-root {data_root}: there is no such folder")
    rows = sources(data_root)
    for name in dict.fromkeys(row["set"] for row in rows):
        mine = [row for row in rows if row["set"] == name]
        print(f"{name}: {mine[0]['source']}\n  licence: {mine[0]['licence']}")
        if mine[0]["note"]:
            print(f"  note: {mine[0]['note']}")
        table = []
        for row in mine:
            records = f"{row['records']} records" if row["records"] else ""
            table.append([f"  {row['split']}", row["local"], records, row["hub"], row["sha256"]])
        print("\n".join(_aligned(table)))


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width; the last is as wide as it is."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))] if table else []
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table)
    return ["  ".join(cells).rstrip() for cells in padded]


# -------------------------------------------------------------------------------------------------------- try
@app.command()
def check(
    method: Annotated[str, typer.Argument(metavar="METHOD|FILE.py")],
    overrides: Overrides = [],  # noqa: B006
    law: Annotated[list[str], typer.Option("--law", help="Only this law; repeatable.")] = [],  # noqa: B006
) -> None:
    """Try the laws of the method contract on tiny models.

    Each law is named with pass, fail or not claimed, and the reason.
    """
    from kdbench import commands

    registry.find("distillers", method)
    told: dict[str, dict[str, Any]] = {"method": {}, "training": {}}
    for text in overrides:
        one = config.parse_override(text)
        section = "method" if one.section in ("method", registry.stem(method)) else one.section
        if section not in told:
            raise unknown("section", one.section, [registry.stem(method), *told], "--set")
        told[section][one.key] = one.value
    commands.quiet(1)
    from kdbench import checks

    commands.silence()
    laws = checks.check(method, told["method"], training=told["training"], only=law)
    print(checks.render(laws))
    raise typer.Exit(1 if any(one.status == "fail" for one in laws) else 0)


@app.command()
def gate(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD ...]", help="Default: all that are included.")
    ] = None,
    learn: Annotated[
        bool, typer.Option("--learn", help="Store the numbers of the code as it is, for later gates.")
    ] = False,
) -> None:
    """Compare first updates and short scores of all methods with those stored.

    The regression check of CI: exit code 1 names the number that regressed, and by how much.
    """
    from kdbench import commands

    commands.quiet(1)
    from kdbench import gate as module

    commands.silence()
    report = (module.learn if learn else module.run)(methods or None, progress=True)
    print(report.render())
    raise typer.Exit(0 if report.passed else 1)


# ---------------------------------------------------------------------------------------------------- certify
@app.command()
def certify(
    worlds: Annotated[list[str], typer.Option("--world", help="Repeatable; default: all.")] = [],  # noqa: B006
    repetitions: Annotated[
        int | None, typer.Option(min=2, help="Prompt sets per world; default: 2000.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Three worlds, 100 prompt sets: under a minute.")
    ] = False,
    jobs: Jobs = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table, results and figure.")] = None,
) -> None:
    """Check the estimators of exposure bias where the truth is computed: bias, spread, coverage.

    Exit code 1 where a number is out of bounds for no reason that its own figures tell. With few prompt sets
    bounds are wider, and chance still takes some of the hundreds of numbers out.
    """
    from kdbench import certify as certification
    from kdbench import commands

    plan = certification.FAST if fast else certification.Plan()
    changed = {"worlds": tuple(worlds) or plan.worlds, "repetitions": repetitions or plan.repetitions}
    plan = dataclasses.replace(plan, **changed)  # type: ignore[arg-type]
    commands.quiet(1)
    rows = certification.certify(plan, jobs or commands.jobs_for("cpu", 1), progress=True)
    print(certification.markdown(rows, plan), end="")
    for path in certification.write(rows, plan, out) if out else ():
        _err(f"written: {path}")
    if certification.failed(rows):
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------------ start
def _command_names() -> list[str]:
    return [one.name or str(getattr(one.callback, "__name__", "")) for one in app.registered_commands]


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 (ran and failed), 2 (your input), 130 (stopped)."""
    usage = typer.BadParameter.__mro__[2]  # what the parser raises for a wrong command line
    args = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        if not args[0].startswith("-") and args[0] not in (known := _command_names()):
            raise unknown("command", args[0], known)
        code = int(app(args=args, prog_name="kdbench", standalone_mode=False) or 0)
        if code == STOPPED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code
    except UserError as error:
        _err(f"kdbench: {error}")
    except (KeyboardInterrupt, typer.Abort):
        _err("kdbench: stopped; what is done is kept, the same command goes on from there")
        return STOPPED
    except BrokenPipeError:  # `kdbench report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not isinstance(error, usage):
            raise
        _err(f"kdbench: {error.format_message()}")  # type: ignore[attr-defined]
    return 2
