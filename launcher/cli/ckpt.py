"""`dstrain ckpt`: look at checkpoints, check them, take the model out or bring one in, delete old ones.

Without torch, but for `import` of files that torch has written.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dstrain.runtime.spec.errors import CheckpointError, UsageError

if TYPE_CHECKING:  # each command imports what it needs, so that `dstrain --help` answers at once
    from dstrain.runtime.checkpoint.foreign import Source
    from dstrain.runtime.checkpoint.manifest import Manifest

app = typer.Typer(help="List, check, export, import and prune checkpoints.", no_args_is_help=True)


class Target(StrEnum):
    """What a checkpoint can be exported to."""

    SAFETENSORS = "safetensors"


class Dtype(StrEnum):
    """Of what is exported."""

    SAVED = "saved"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


SAFETENSORS_NAMES = {Dtype.SAVED: None, Dtype.BF16: "BF16", Dtype.FP16: "F16", Dtype.FP32: "F32"}


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
    from dstrain.launcher.checkpoint_views import files_elsewhere, in_bytes, printable
    from dstrain.runtime.checkpoint.verify import damages, elsewhere, foreign_files

    checkpoint, manifest = _read(path)
    found = [printable(damage) for damage in damages(checkpoint, manifest, deep=deep)]
    away = elsewhere(checkpoint, manifest)
    for line in files_elsewhere(away):
        typer.echo(printable(f"{checkpoint}: {line}; verify it there"))
    for name in foreign_files(checkpoint, manifest):
        typer.echo(printable(f"{checkpoint / name}: not of this checkpoint; nothing reads it"))
    if found:
        raise CheckpointError("\n".join(found))
    here = set(manifest.files) - {name for names in away.values() for name in names}
    size = in_bytes(sum(manifest.files[name] for name in here))
    how = "every byte was read" if deep else "by its sizes; --deep reads every byte"
    said = f"no damage in {len(here)} of {len(manifest.files)} files" if away else "whole"
    typer.echo(f"{printable(str(checkpoint))}: {said}, {len(manifest.tensors)} tensors, {size} ({how})")


@app.command("export")
def export(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where the files go.")],
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="A checkpoint, or a folder: the newest in it.")
    ] = None,
    to: Annotated[Target, typer.Option("--to", help="The format.")] = Target.SAFETENSORS,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="fp32 takes the master weights.")] = Dtype.SAVED,
    average: Annotated[bool, typer.Option("--average", help="The averaged weights (train.ema_decay).")] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of one file; such as 500MB.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Write over a model that is there.")] = False,
) -> None:
    """Write the model alone as safetensors, with config.json if it is one of transformers; read back and compared.

    Without PATH the newest in ./checkpoints, if one job alone has saved there.
    """
    from dstrain.launcher.checkpoint_views import bytes_of, in_bytes, printable
    from dstrain.launcher.checkpoints import only_folder
    from dstrain.runtime.checkpoint.export import ExportOptions, export_model, in_the_way, plan_export

    assert to is Target.SAFETENSORS
    max_bytes = bytes_of(max_shard_size)
    if not max_bytes:
        raise UsageError.mismatch("--max-shard-size", "a size such as 5GB or 500MB", max_shard_size)
    checkpoint, manifest = _read(path or only_folder(Path("checkpoints")))
    plan = plan_export(manifest, ExportOptions(SAFETENSORS_NAMES[dtype], average, max_bytes))
    if output.exists() and not output.is_dir():
        fix = f"{plan.files[-1]} is written into it"
        raise UsageError.mismatch("--output", "a folder", f"{output}, a file", fix)
    for there in in_the_way(output, plan):
        if not force or there.is_dir():
            raise UsageError.mismatch("--output", "no file of that name", str(there), "give another folder, or --force")
    export_model(checkpoint, output, manifest, plan)
    written = output if len(plan.shards) > 1 else output / plan.files[-1]
    count = f"{len(plan.tensors)} tensors" + (f" in {len(plan.shards)} files" if len(plan.shards) > 1 else "")
    typer.echo(printable(f"wrote {written}: {count}, {in_bytes(plan.size)}, of {checkpoint}"))


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="Safetensors, a file of torch.save, or a folder of DeepSpeed's ZeRO."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="Where step-N is made.")],
    step: Annotated[
        int | None, typer.Option("--step", min=0, metavar="N", help="Its step; else what SOURCE says, else 0.")
    ] = None,
) -> None:
    """Make a checkpoint of another program's: the model, and Adam's moments of DeepSpeed's. No code of it is run."""
    from dstrain.launcher.checkpoint_views import in_bytes, printable
    from dstrain.runtime.checkpoint.foreign import import_checkpoint

    found = _open(source)
    step = step if step is not None else found.step or 0
    target = import_checkpoint(found, output, step)
    for note in found.notes:
        typer.echo(printable(note))
    size = in_bytes(sum(tensor.part.size for tensor in found.tensors))
    typer.echo(printable(f"made {target}: {len(found.tensors)} tensors, {size}, of {found.path} ({found.what})"))


def _open(source: Path) -> Source:
    """Files of torch are the one thing here that needs torch."""
    from dstrain.runtime.checkpoint.foreign import Kind, kind_of

    kind = kind_of(source)
    if kind is Kind.TORCH:
        from dstrain.runtime.checkpoint.foreign_torch import open_torch

        return open_torch(source)
    if kind is Kind.DEEPSPEED:
        from dstrain.runtime.checkpoint.foreign_deepspeed import open_deepspeed

        return open_deepspeed(source)
    from dstrain.runtime.checkpoint.foreign_safetensors import open_safetensors

    return open_safetensors(source)


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
