"""`dstrain ckpt`: look at checkpoints, check them, take the model out, delete old ones. Without torch."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dstrain.runtime.spec.errors import CheckpointError, UsageError

if TYPE_CHECKING:  # each command imports what it needs, so that `dstrain --help` answers at once
    from dstrain.runtime.checkpoint.manifest import Manifest

app = typer.Typer(help="List, check, export and prune checkpoints.", no_args_is_help=True)


class Target(StrEnum):
    """What a checkpoint can be exported to."""

    SAFETENSORS = "safetensors"


PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a folder: the newest in it.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_checkpoints(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Looks there and in its folders.")] = Path(
        "checkpoints"
    ),
    json: JsonOption = False,
) -> None:
    """Show the checkpoints below a folder, and which are whole (by their sizes, and the manifests' checksums).

    A table on a terminal. In a pipe one line a checkpoint, without a heading, with tabs between
    path, step, time, bytes, ranks, run id, and "whole" or what is wrong; "-" is unknown.
    """
    from time import time

    from dstrain.launcher import checkpoint_views as views
    from dstrain.launcher.checkpoints import find_folders, survey

    folders = {each: survey(each) for each in find_folders(folder)}
    if json:
        from json import dumps

        typer.echo(dumps([views.as_json(each) for held in folders.values() for each in held], indent=2))
        return
    for each, held in folders.items():
        lines = views.as_table(each, held, time()) if sys.stdout.isatty() else map(views.as_line, held)
        for line in lines:
            typer.echo(line)


@app.command("show")
def show(path: PathArgument, json: JsonOption = False) -> None:
    """Show one checkpoint: who saved it, what is in it, the largest tensors."""
    from time import time

    from dstrain.launcher import checkpoint_views as views
    from dstrain.launcher.checkpoints import look

    checkpoint, manifest = _read(path)
    if json:
        from json import dumps

        typer.echo(dumps(views.show_json(look(checkpoint), manifest), indent=2))
        return
    for line in views.show(look(checkpoint), manifest, time()):
        typer.echo(line)


@app.command("verify")
def verify(
    path: PathArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and compare its SHA-256.")] = False,
) -> None:
    """Check a checkpoint; every damage on a line of its own, exit code 204 if there is any."""
    from dstrain.launcher.checkpoint_views import in_bytes, printable
    from dstrain.runtime.checkpoint.verify import damages

    checkpoint, manifest = _read(path)
    found = [printable(damage) for damage in damages(checkpoint, manifest, deep=deep)]
    if found:
        raise CheckpointError("\n".join(found))
    size = in_bytes(sum(manifest.files.values()))
    how = "every byte was read" if deep else "by its sizes; --deep reads every byte"
    typer.echo(f"{printable(str(checkpoint))}: whole, {len(manifest.tensors)} tensors, {size} ({how})")


@app.command("export")
def export(
    path: PathArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where the file goes.")],
    to: Annotated[Target, typer.Option("--to", help="The format.")] = Target.SAFETENSORS,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
) -> None:
    """Write the model's tensors alone as FOLDER/model.safetensors; read back, it is what was saved."""
    from dstrain.launcher.checkpoint_views import in_bytes, printable
    from dstrain.runtime.checkpoint.export import MODEL_FILE, export_model

    assert to is Target.SAFETENSORS
    checkpoint, manifest = _read(path)
    if output.exists() and not output.is_dir():
        raise UsageError.mismatch("--output", "a folder", f"{output}, a file", f"{MODEL_FILE} is written into it")
    target = output / MODEL_FILE
    if target.exists() and (not force or target.is_dir()):
        raise UsageError.mismatch("--output", "no file of that name", str(target), "give another folder, or --force")
    _, count = export_model(checkpoint, output, manifest)
    size = in_bytes(target.stat().st_size)
    typer.echo(f"wrote {printable(str(target))}: {count} tensors, {size}, of {printable(str(checkpoint))}")


@app.command("prune")
def prune(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of checkpoints.")],
    keep_last: Annotated[int, typer.Option("--keep-last", min=1, metavar="N", help="Keep the newest N whole ones.")],
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, metavar="M", help="Keep steps that M divides, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted; delete nothing.")] = False,
) -> None:
    """Delete older checkpoints, once every byte of the newest whole one was read. What is not ours stays."""
    from dstrain.launcher.checkpoint_views import in_bytes, printable
    from dstrain.launcher.checkpoints import Held, delete, find_checkpoint, plan_pruning, survey
    from dstrain.runtime.checkpoint.manifest import Manifest
    from dstrain.runtime.checkpoint.verify import damages

    if find_checkpoint(folder) == folder:
        raise UsageError.mismatch(
            "DIR", "a folder of checkpoints", f"one checkpoint, {folder}", f"give {folder.parent}"
        )

    def still_whole(held: Held) -> tuple[str, ...]:
        return tuple(damages(held.path, Manifest.read(held.path), deep=True))

    plan = plan_pruning(survey(folder), keep_last, keep_every, still_whole)
    for held in plan.deleted:
        others = [] if dry_run else delete(held.path)
        left = f"; left there, not ours: {', '.join(others)}" if others else ""
        word = "would delete" if dry_run else "deleted"
        typer.echo(printable(f"{word} {held.path} ({in_bytes(held.size_bytes)}){left}"))
    kept = ", ".join(f"{held.step} (damaged)" if held.damages else str(held.step) for held in plan.kept)
    typer.echo(f"{'would keep' if dry_run else 'kept'} {kept}")


def _read(path: Path) -> tuple[Path, Manifest]:
    """The checkpoint that PATH means. Raises UsageError, CheckpointError."""
    from dstrain.launcher.checkpoints import find_checkpoint
    from dstrain.runtime.checkpoint.manifest import Manifest

    checkpoint = find_checkpoint(path)
    return checkpoint, Manifest.read(checkpoint)
