"""The command line. Thin: each command parses, calls one verb and prints.

Heavy libraries are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from autocompress.cli.catalog import catalog
from autocompress.cli.options import (
    Address,
    Aims,
    BankSize,
    BaseModel,
    BlockSteps,
    Budgets,
    By,
    Cache,
    Calibration,
    Data,
    Device,
    Driver,
    Dtype,
    Effort,
    Empirical,
    Evaluated,
    ExportTarget,
    Finalize,
    Format,
    Gpus,
    Json,
    MaxBytes,
    MaxLatency,
    MemberId,
    MinEfficiency,
    MinQuality,
    Model,
    Optimize,
    OptionalOut,
    Out,
    PredictionTokens,
    Profile,
    ProfileOut,
    ReportTokens,
    Resume,
    Rotate,
    RunDir,
    Sampler,
    SearchTokens,
    Seed,
    SequenceLength,
    Space,
    SpaceOfEffort,
    StatisticsTokens,
    Target,
    Task,
    Timeout,
    Tokens,
    Trust,
    Verify,
    Weighting,
    Workers,
)
from autocompress.cli.printing import console, print_json, say
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
app.add_typer(catalog)


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
    effort: Effort = "standard",
    task: Task = "auto",
    data: Data = "auto",
    space: SpaceOfEffort = None,
    target: ExportTarget = "any",
    rotate: Rotate = "none",
    sampler: Sampler = "guided",
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
    calibration_tokens: StatisticsTokens = None,
    search_tokens: SearchTokens = None,
    report_tokens: ReportTokens = None,
    sequence_length: SequenceLength = 256,
    trial_timeout: Timeout = None,
    device_profile: Profile = "cpu-2core-avx512",
    trust_remote_code: Trust = False,
    token_weighting: Weighting = "gradient",
    cache: Cache = None,
    bank_size: BankSize = None,
    aim: Aims = None,
    finalize: Finalize = None,
    optimize: Optimize = "quality,bytes",
) -> None:
    """Search compressed versions of MODEL and write a measured Pareto front."""
    from autocompress.report.tables import front_table
    from autocompress.workflows.search import search as run_search

    finished = run_search(
        model, effort=effort, task=task, data=data, space=space, target=target, rotate=rotate,
        sampler=sampler, budget=budget, driver=driver, workers=workers,
        gpus_per_worker=gpus_per_worker, address=address, seed=seed, device=device, dtype=dtype,
        out=out, resume=resume, calibration_tokens=calibration_tokens,
        search_tokens=search_tokens, report_tokens=report_tokens,
        sequence_length=sequence_length, trial_timeout=trial_timeout,
        device_profile=device_profile, trust_remote_code=trust_remote_code,
        token_weighting=token_weighting, cache=cache, bank_size=bank_size, aim=aim or (),
        finalize=finalize, optimize=optimize, progress=True,
    )  # fmt: skip
    console().print(front_table(finished.document))
    say(f"report: {finished.directory / 'report.html'}")


@app.command()
def front(directory: RunDir, as_json: Json = False) -> None:
    """Print the front of a run as a table."""
    from autocompress.report.tables import front_table

    document = _read_front(directory)
    if as_json:
        print_json(document.to_json())
    else:
        console().print(front_table(document))


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
        print_json(member.to_json())
    else:
        console().print(member_table(member))


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
        console().print(verification_table(written.verification))
    say(f"exported {member} to {out}")


@app.command()
def finalize(
    directory: RunDir, member: MemberId, block_steps: BlockSteps = 0, as_json: Json = False
) -> None:
    """Rebuild a member with more care at the same bytes; it replaces the member if better."""
    from autocompress.report.progress import StudyProgress
    from autocompress.workflows.finalize import finalize_member

    with StudyProgress(enabled=True) as shown:
        done = finalize_member(directory, member, block_steps=block_steps, progress=shown)
    if as_json:
        print_json(done.to_json())
    else:
        sys.stdout.write(f"{done.summary}\n")


@app.command()
def evaluate(
    model: Evaluated,
    base: BaseModel = None,
    task: Task = "auto",
    data: Data = "auto",
    tokens: Tokens = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a model on report tokens, beside its base model."""
    from autocompress.report.progress import StudyProgress
    from autocompress.report.tables import evaluation_table
    from autocompress.workflows.evaluate import evaluate_model

    with StudyProgress(enabled=True) as shown:
        result = evaluate_model(
            model, base=base, task=task, data=data, tokens=tokens,
            trust_remote_code=trust_remote_code, progress=shown,
        )  # fmt: skip
    if as_json:
        print_json(result.to_json())
    else:
        console().print(evaluation_table(result.to_json()))


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
        print_json(verdict.to_json())
    else:
        console().print(gate_table(verdict.candidate, verdict.checks))
    raise typer.Exit(0 if verdict.passed else 1)


@app.command()
def solve(
    directory: RunDir,
    max_bytes: MaxBytes = None,
    max_latency_ms: MaxLatency = None,
    as_json: Json = False,
) -> None:
    """Best allocation for a new budget, predicted from a run's trials with no forward pass."""
    from autocompress.report.solutions import solutions_table
    from autocompress.workflows.solve import solve_run

    solutions = solve_run(directory, max_bytes=max_bytes, max_latency_ms=max_latency_ms)
    if as_json:
        print_json([solution.to_json() for solution in solutions])
    else:
        console().print(solutions_table(solutions))


@app.command()
def profile(
    model: Model,
    task: Task = "auto",
    data: Data = "auto",
    space: Space = "joint",
    calibration_tokens: Calibration = 8192,
    search_tokens: PredictionTokens = 2048,
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    empirical: Empirical = False,
    trust_remote_code: Trust = False,
    out: ProfileOut = None,
    as_json: Json = False,
) -> None:
    """Predict how much each layer of MODEL suffers from each option of a space."""
    from autocompress.report.sensitivity import sensitivity_table
    from autocompress.workflows.profile import PAGE
    from autocompress.workflows.profile import profile as run_profile

    found = run_profile(
        model, task=task, data=data, space=space, calibration_tokens=calibration_tokens,
        search_tokens=search_tokens, sequence_length=sequence_length, seed=seed,
        empirical=empirical, trust_remote_code=trust_remote_code, out=out, progress=True,
    )  # fmt: skip
    if as_json:
        print_json(found.to_json())
    else:
        console().print(sensitivity_table(found.to_json()))
    if out is not None:
        say(f"page: {out / PAGE}")


@app.command()
def report(directory: RunDir) -> None:
    """Write report.html of a run again from its front and journal."""
    from autocompress.workflows.report import write_report

    say(f"report: {write_report(directory)}")


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    from autocompress import __version__

    if as_json:
        print_json({"autocompress": __version__})
    else:
        sys.stdout.write(f"autocompress {__version__}\n")


def _read_front(directory: Path) -> FrontDocument:
    from autocompress.fronts.document import FrontDocument

    return FrontDocument.read(directory)
