"""The arguments and options that commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autocompress.export.formats import EXPORTERS

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
RunDir = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory of a search.")]
Model = Annotated[str, typer.Argument(help="Directory, hub id or package:NAME/FOLDER.")]
Task = Annotated[str, typer.Option(help="Task, or auto to read it from the config.")]
Data = Annotated[str, typer.Option(help="File, `datasets` directory or hub name, python-docs, …")]
_SPACE = "Name of a search space, or a YAML file."
Space = Annotated[str, typer.Option(help=_SPACE)]
ExportTarget = Annotated[
    str,
    typer.Option("--target", help="Where it runs: any, transformers, vllm, llama.cpp, openvino."),
]
Rotate = Annotated[
    str, typer.Option(help="none, or hadamard: rotate the whole model first; costs nothing to run.")
]
SpaceOfEffort = Annotated[
    str | None, typer.Option("--space", help=_SPACE, show_default="joint; quick: quick")
]
SpaceName = Annotated[str, typer.Argument(help="Name of a search space, or a YAML file.")]
MethodName = Annotated[str, typer.Argument(help="Name of a method.")]
Sampler = Annotated[str, typer.Option(help="guided, or see `autocompress samplers`.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        help="'200 trials', 30m, '2e6 tokens' or '4 gpu-hours'; repeat for several limits.",
        show_default="100 trials; quick: 16 trials",
    ),
]
Effort = Annotated[
    str, typer.Option(help="standard, or quick: a first look, small in all that is not given.")
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
ProfileOut = Annotated[Path | None, typer.Option("--out", help="Folder for profile and page.")]
Empirical = Annotated[bool, typer.Option("--empirical", help="The data's labels, not sampled.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the search in --out.")]
_STATISTICS = "Tokens for layer statistics."
Calibration = Annotated[int, typer.Option(help=_STATISTICS)]
StatisticsTokens = Annotated[
    int | None,
    typer.Option("--calibration-tokens", help=_STATISTICS, show_default="8192; quick: 2048"),
]
SearchTokens = Annotated[
    int | None, typer.Option(help="Tokens of every trial.", show_default="4096; quick: 1024")
]
PredictionTokens = Annotated[
    int, typer.Option("--search-tokens", help="Held-out tokens that damages are predicted for.")
]
ReportTokens = Annotated[
    int | None, typer.Option(help="Held-out tokens of the front.", show_default="8192; quick: 1536")
]
SequenceLength = Annotated[int, typer.Option(help="Tokens per sequence.")]
Timeout = Annotated[
    float | None, typer.Option(help="Seconds until a trial is given up (Ray only).")
]
Profile = Annotated[
    str, typer.Option(help="Device of the latency: a name, or a file of `device --out`.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code of the model repository run.")
]
MinQuality = Annotated[
    float | None, typer.Option(help="Least retained quality, e.g. 0.97; 1 is the base.")
]
MaxBytes = Annotated[str | None, typer.Option(help="Largest size, e.g. 60MB.")]
MaxLatency = Annotated[float | None, typer.Option(help="Most milliseconds per token.")]
MinEfficiency = Annotated[float | None, typer.Option(help="Least cost efficiency; 1 is the base.")]
By = Annotated[str, typer.Option(help="cost-efficiency, quality, size or knee.")]
MemberId = Annotated[str, typer.Argument(help="Member id (or its start), or a baseline's name.")]
BlockSteps = Annotated[
    int,
    typer.Option(
        help="Steps that tune scales and rounding of each block as a whole, such as 96; 0: none."
    ),
]
Format = Annotated[str, typer.Option("--format", help=f"One of: {', '.join(EXPORTERS)}.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and re-measure.")
]
Evaluated = Annotated[str, typer.Argument(help="An export, a model directory or a hub id.")]
BaseModel = Annotated[str | None, typer.Option(help="Base model to compare with.")]
Tokens = Annotated[int | None, typer.Option(help="Report tokens to evaluate on.")]
Target = Annotated[Path, typer.Argument(metavar="RUN_OR_EXPORT", help="What to judge.")]
Weighting = Annotated[
    str, typer.Option(help="How tokens count in layer statistics: gradient or none.")
]
Cache = Annotated[
    Path | None, typer.Option(help="Statistics and bank; in the run directory by default.")
]
BankSize = Annotated[
    str | None,
    typer.Option(
        help="Largest size of the bank, e.g. 40GB; by default 20 GiB, or half of the free disk if "
        "that is less."
    ),
]
Aims = Annotated[
    list[str] | None,
    typer.Option(
        "--aim",
        help="A size such as 60MB (or 3ms, where latency comes first in --optimize) at which the "
        "best model is wanted most; may be repeated. Without one: the sizes of the baselines.",
    ),
]
Optimize = Annotated[
    str,
    typer.Option(
        help="quality and what it is traded for, the main one first: bytes, latency, bytes_moved, "
        "macs, or several, e.g. quality,bytes,latency."
    ),
]
Finalize = Annotated[
    bool | None,
    typer.Option(
        help="At the end rebuild the member of best cost efficiency with more care.",
        show_default="finalize; quick: no-finalize",
    ),
]
