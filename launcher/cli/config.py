"""`dstrain config`: look at job files without running them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dstrain.runtime.spec.errors import ConfigError, UsageError

app = typer.Typer(help="Check and show job files.", no_args_is_help=True)

OverridesOption = Annotated[list[str] | None, typer.Option("--set", help="Change a key: train.steps=100.")]
ScriptOption = Annotated[
    bool, typer.Option("--script", help="For a script of your own: model, batch and train.steps may be missing.")
]


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a job.yaml, for editors that complete and check by it."""
    from json import dumps

    from dstrain.runtime.spec.config import JobConfig

    dialect = "https://json-schema.org/draft/2020-12/schema"
    typer.echo(dumps({"$schema": dialect, **JobConfig.model_json_schema()}, indent=2, ensure_ascii=False))


@app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job files.")],
    overrides: OverridesOption = None,
    script: ScriptOption = False,
) -> None:
    """Check job files: every mistake in one go, each with file:line:column; exit code 2 if there is any."""
    from dstrain.runtime.spec.load import load_job

    mistakes = []
    for file in files:
        try:
            load_job(file, overrides or (), for_trainer=not script)
        except ConfigError as error:
            mistakes.append(str(error))
        else:
            typer.echo(f"{file}: valid")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job file.")],
    overrides: OverridesOption = None,
    script: ScriptOption = False,
) -> None:
    """Print the whole job as YAML, defaults filled in; read again it is the same job."""
    from dstrain.runtime.spec.document import to_yaml
    from dstrain.runtime.spec.load import load_job

    job = load_job(file, overrides or (), for_trainer=not script)
    typer.echo(to_yaml(job.model_dump(mode="json", by_alias=True)), nl=False)


@app.command("import-deepspeed")
def import_deepspeed_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A DeepSpeed configuration: JSON.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the job here, not on stdout.")] = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Ranks of the job, where its batch sizes follow from them.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Print our YAML of a DeepSpeed configuration; every key of it is told on stderr as honoured, mapped or refused."""
    from dstrain.runtime.spec.deepspeed.importer import import_deepspeed, read_deepspeed
    from dstrain.runtime.spec.document import to_yaml

    imported = import_deepspeed(read_deepspeed(file), ranks, str(file))
    for line in imported.listing():
        typer.echo(line, err=True)
    text = to_yaml(imported.values)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        with output.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        fix = "give another name, or --force"
        raise UsageError.mismatch("--output", "no file of that name", str(output), fix) from None
    except OSError as error:
        raise UsageError.mismatch("--output", "a file to write", f"{output}: {error.strerror}") from None
