"""Commands that list what there is: spaces, samplers, methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autocompress.cli.options import (
    Device,
    ExportTarget,
    Json,
    MethodName,
    SpaceName,
    Task,
    Trust,
)
from autocompress.cli.printing import console, print_json
from autocompress.core.errors import UsageError

catalog = typer.Typer()
spaces_app = typer.Typer(help="List the search spaces, or show one on a model.")
catalog.add_typer(spaces_app, name="spaces")
methods_app = typer.Typer(help="List the field's methods and what of them is here.")
catalog.add_typer(methods_app, name="methods")


@spaces_app.callback(invoke_without_command=True)
def spaces(context: typer.Context) -> None:
    """List the search spaces."""
    if context.invoked_subcommand is None:
        from autocompress.report.tables import spaces_table
        from autocompress.spaces import available_spaces

        console().print(spaces_table(available_spaces()))


@spaces_app.command("show")
def show_space(
    name: SpaceName,
    model: Annotated[str, typer.Option(help="Directory, hub id or package:NAME/FOLDER.")],
    task: Task = "auto",
    target: ExportTarget = "any",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Show how many layers, choices and combinations a space gives on a model."""
    from autocompress.report.tables import space_table
    from autocompress.workflows.spaces import describe_space

    summary = describe_space(name, model, task, target, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(summary)
    else:
        console().print(space_table(summary))


@catalog.command()
def samplers(as_json: Json = False) -> None:
    """List the samplers: who proposes the next trial."""
    from autocompress.report.tables import samplers_table
    from autocompress.workflows.samplers import describe_samplers

    rows = describe_samplers()
    if as_json:
        print_json(rows)
    else:
        console().print(samplers_table(rows))


@catalog.command()
def device(
    device: Device = "cpu",
    model: Annotated[
        str | None, typer.Option(help="Time the layers of this model, for its measured latency.")
    ] = None,
    space: Annotated[
        str | None, typer.Option(help="Its options are timed; a name or a YAML file, else joint.")
    ] = None,
    task: Task = "auto",
    tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens of a pass, 1 to decode; repeat for several.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What the model computes in; else the checkpoint's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, for --device-profile of a search.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure this machine: FLOP/s and bandwidth; with --model, its layers under each option."""
    from autocompress.cost import profile_document, require_profile_path, write_profile
    from autocompress.report.progress import StudyProgress
    from autocompress.report.tables import device_table
    from autocompress.workflows.device import measure_device
    from autocompress.workflows.latency import measure_latency

    if model is None and (space or tokens or dtype):
        raise UsageError(
            "--space, --tokens and --dtype say how a model is timed, but got no --model. Next "
            "step: add --model, or leave them out to measure the machine's rates alone."
        )
    if out is not None:
        require_profile_path(out)
    profile = measure_device(device)
    if model is not None:
        with StudyProgress(enabled=True) as shown:
            profile = measure_latency(
                profile, model, space or "joint", task=task, tokens=tokens or (),
                dtype=dtype or "auto", device=device, trust_remote_code=trust_remote_code,
                progress=shown,
            )  # fmt: skip
    if out is not None:
        write_profile(profile, out)
    if as_json:
        print_json(profile_document(profile))
    else:
        console().print(device_table(profile))


@methods_app.callback(invoke_without_command=True)
def methods(context: typer.Context, as_json: Json = False) -> None:
    """List the field's methods: those here by name, and why others are not."""
    if context.invoked_subcommand is None:
        from autocompress.report.taxonomy import taxonomy_table
        from autocompress.workflows.taxonomy import describe_taxonomy

        found = describe_taxonomy()
        if as_json:
            print_json(found)
        else:
            console().print(taxonomy_table(found))


@methods_app.command("list")
def list_methods(as_json: Json = False) -> None:
    """List the methods that schemes may name, those of other packages included."""
    from autocompress.report.tables import methods_table
    from autocompress.workflows.methods import describe_methods

    rows = describe_methods()
    if as_json:
        print_json(rows)
    else:
        console().print(methods_table(rows))


@methods_app.command("show")
def show_method(name: MethodName, as_json: Json = False) -> None:
    """Show what a method does, what it needs, and its options with their defaults."""
    from autocompress.report.tables import space_table
    from autocompress.workflows.methods import describe_method

    row = describe_method(name)
    if as_json:
        print_json(row)
    else:
        console().print(space_table(row))
