"""The command line. Thin: each command parses, calls one verb and prints.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autocompress.core.errors import AutocompressError

if TYPE_CHECKING:
    from autocompress.fronts.document import FrontDocument

app = typer.Typer(
    name="autocompress",
    help="Model, task and budget in; a measured Pareto front of compressed models out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
spaces_app = typer.Typer(help="List the search spaces, or show one on a model.")
app.add_typer(spaces_app, name="spaces")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory of a search.")]
Model = Annotated[str, typer.Argument(help="Directory, hub id or package:NAME/FOLDER.")]
Task = Annotated[str, typer.Option(help="Task, or auto to read it from the config.")]
Data = Annotated[str, typer.Option(help="File, `datasets` directory or hub name, python-docs, …")]
Space = Annotated[str, typer.Option(help="Name of a search space, or a YAML file.")]
SpaceName = Annotated[str, typer.Argument(help="Name of a search space, or a YAML file.")]
Sampler = Annotated[str, typer.Option(help="random, tpe or nsga2.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(help="'200 trials', 30m or '2e6 tokens'; repeat for several limits."),
]
Driver = Annotated[str, typer.Option(help="local or ray.")]
Workers = Annotated[int, typer.Option(help="Trials at the same time (Ray).")]
Gpus = Annotated[float, typer.Option(help="GPUs per Ray worker; may be a fraction.")]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join, e.g. auto.")]
Seed = Annotated[int, typer.Option(help="Seed of the splits and the sampler.")]
Device = Annotated[str, typer.Option(help="Torch device, e.g. cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Search-time dtype; auto measures which is fastest.")]
OptionalOut = Annotated[Path | None, typer.Option(help="Run directory to write.")]
Out = Annotated[Path, typer.Option(help="Directory to write.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")]
Calibration = Annotated[int, typer.Option(help="Tokens for layer statistics.")]
SearchTokens = Annotated[int, typer.Option(help="Tokens of every trial.")]
ReportTokens = Annotated[int, typer.Option(help="Held-out tokens of the front.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per sequence.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds until a trial is given up (Ray).")]
Profile = Annotated[str, typer.Option(help="Named device of the analytic latency.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code of the model repository run.")
]
MinQuality = Annotated[float | None, typer.Option(help="Least retained quality; 1 is the base.")]
MaxBytes = Annotated[str | None, typer.Option(help="Largest size, e.g. 60MB.")]
MaxLatency = Annotated[float | None, typer.Option(help="Most milliseconds per token.")]
MinEfficiency = Annotated[float | None, typer.Option(help="Least cost efficiency; 1 is the base.")]
By = Annotated[str, typer.Option(help="cost-efficiency, quality, size or knee.")]
MemberId = Annotated[str, typer.Argument(help="Member id (or its start), or a baseline's name.")]
Format = Annotated[
    str, typer.Option("--format", help="packed (small) or dense (any tool loads it).")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and re-measure.")
]
Evaluated = Annotated[str, typer.Argument(help="An export, a model directory or a hub id.")]
BaseModel = Annotated[str | None, typer.Option(help="Base model to compare with.")]
Tokens = Annotated[int | None, typer.Option(help="Report tokens to evaluate on.")]
Target = Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="What to judge.")]


def run(arguments: list[str] | None = None) -> int:
    """Run one command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(args=arguments, prog_name="autocompress")
    except AutocompressError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@app.command()
def search(
    model: Model,
    task: Task = "auto",
    data: Data = "auto",
    space: Space = "joint",
    sampler: Sampler = "nsga2",
    budget: Budgets = None,
    driver: Driver = "local",
    workers: Workers = 1,
    gpus_per_worker: Gpus = 0.0,
    address: Address = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    out: OptionalOut = None,
    resume: Resume = False,
    calibration_tokens: Calibration = 8192,
    search_tokens: SearchTokens = 4096,
    report_tokens: ReportTokens = 8192,
    sequence_length: SequenceLength = 256,
    trial_timeout: Timeout = None,
    device_profile: Profile = "cpu-2core-avx512",
    trust_remote_code: Trust = False,
) -> None:
    """Search compressed versions of MODEL and write a measured Pareto front."""
    from autocompress.report.tables import front_table
    from autocompress.workflows.settings import SearchSettings

    settings = SearchSettings(
        model=model, task=task, data=data, space=space, sampler=sampler,
        budget=tuple(budget or ("100 trials",)), driver=driver, workers=workers,
        gpus_per_worker=gpus_per_worker, address=address, seed=seed, device=device, dtype=dtype,
        calibration_tokens=calibration_tokens, search_tokens=search_tokens,
        report_tokens=report_tokens, sequence_length=sequence_length,
        trial_timeout_seconds=trial_timeout, device_profile=device_profile,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    from autocompress.workflows.search import run_search

    finished = run_search(settings, out, resume=resume, show_progress=True)
    _console().print(front_table(finished.document))
    _say(f"report: {finished.directory / 'report.html'}")


@app.command()
def front(directory: RunDir, as_json: Json = False) -> None:
    """Print the front of a run as a table."""
    from autocompress.report.tables import front_table

    document = _read_front(directory)
    if as_json:
        _print_json(document.to_json())
    else:
        _console().print(front_table(document))


@app.command()
def pick(
    directory: RunDir,
    max_bytes: MaxBytes = None,
    min_quality: MinQuality = None,
    max_latency_ms: MaxLatency = None,
    by: By = "cost-efficiency",
    as_json: Json = False,
) -> None:
    """Pick one member of a front under constraints; exits 1 if none fits."""
    from autocompress.fronts.document import parse_bytes
    from autocompress.fronts.document import pick as pick_member
    from autocompress.report.tables import member_table

    member = pick_member(
        _read_front(directory),
        by=by,
        min_quality=min_quality,
        max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
        max_latency_ms=max_latency_ms,
    )
    if as_json:
        _print_json(member.to_json())
    else:
        _console().print(member_table(member))


@app.command()
def export(
    directory: RunDir,
    member: MemberId,
    out: Out,
    checkpoint_format: Format = "packed",
    verify: Verify = True,
) -> None:
    """Export a member; the reload in a fresh process must reproduce its claim, or exit 1."""
    from autocompress.report.progress import StudyProgress
    from autocompress.report.tables import verification_table
    from autocompress.workflows.export import export_member

    with StudyProgress(enabled=True) as shown:
        written = export_member(
            directory,
            member,
            out,
            checkpoint_format=checkpoint_format,
            verify=verify,
            progress=shown,
        )
    if written.verification is not None:
        _console().print(verification_table(written.verification))
    _say(f"exported {member} to {out}")


@app.command()
def evaluate(
    model: Evaluated,
    base: BaseModel = None,
    task: Task = "auto",
    data: Data = "auto",
    tokens: Tokens = None,
    as_json: Json = False,
) -> None:
    """Measure a model on report tokens, beside its base model."""
    from autocompress.report.progress import StudyProgress
    from autocompress.report.tables import evaluation_table
    from autocompress.workflows.evaluate import evaluate_model

    with StudyProgress(enabled=True) as shown:
        result = evaluate_model(
            model, base=base, task=task, data=data, tokens=tokens, progress=shown
        )
    if as_json:
        _print_json(result.to_json())
    else:
        _console().print(evaluation_table(result.to_json()))


@app.command()
def gate(
    target: Target,
    min_quality: MinQuality = None,
    max_bytes: MaxBytes = None,
    min_cost_efficiency: MinEfficiency = None,
    max_latency_ms: MaxLatency = None,
    as_json: Json = False,
) -> None:
    """Judge a run's picked member or an export; exits 0 if every check passes, else 1."""
    from autocompress.fronts.document import parse_bytes
    from autocompress.report.tables import gate_table
    from autocompress.workflows.gate import judge_target

    verdict = judge_target(
        target,
        min_quality=min_quality,
        max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
        min_cost_efficiency=min_cost_efficiency,
        max_latency_ms=max_latency_ms,
    )
    if as_json:
        _print_json(verdict.to_json())
    else:
        _console().print(gate_table(verdict.candidate, verdict.checks))
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def report(directory: RunDir) -> None:
    """Write report.html of a run again from its front and journal."""
    from autocompress.workflows.report import write_report

    _say(f"report: {write_report(directory)}")


@spaces_app.callback(invoke_without_command=True)
def spaces(context: typer.Context) -> None:
    """List the search spaces."""
    if context.invoked_subcommand is None:
        from autocompress.report.tables import spaces_table
        from autocompress.spaces import available_spaces

        _console().print(spaces_table(available_spaces()))


@spaces_app.command("show")
def show_space(
    name: SpaceName,
    model: Annotated[str, typer.Option(help="Directory, hub id or package:NAME/FOLDER.")],
    task: Task = "auto",
    as_json: Json = False,
) -> None:
    """Show how many layers, choices and combinations a space gives on a model."""
    from autocompress.report.tables import space_table
    from autocompress.workflows.spaces import describe_space

    summary = describe_space(name, model, task)
    if as_json:
        _print_json(summary)
    else:
        _console().print(space_table(summary))


@app.command()
def methods(as_json: Json = False) -> None:
    """List the compression methods."""
    from autocompress.report.tables import methods_table
    from autocompress.workflows.methods import describe_methods

    rows = describe_methods()
    if as_json:
        _print_json(rows)
    else:
        _console().print(methods_table(rows))


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    from autocompress import __version__

    if as_json:
        _print_json({"autocompress": __version__})
    else:
        sys.stdout.write(f"autocompress {__version__}\n")


def _read_front(directory: Path) -> FrontDocument:
    from autocompress.fronts.document import FrontDocument

    return FrontDocument.read(directory)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _say(text: str) -> None:
    """One line of progress for people, on stderr."""
    sys.stderr.write(f"{text}\n")


def _print_json(document: object) -> None:
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
