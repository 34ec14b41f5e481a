"""The command line. Mistakes of the user end with one line on stderr and exit code 2."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from advdmd import cli_evaluate
from advdmd.cli_evaluate import Guidance, Out, Steps, Threads, own_sampling

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a text-to-image flow model into a 4- or 2-step student (AdvDMD, DMD2, TwinFlow).",
)
app.add_typer(cli_evaluate.app)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Lose the run that the folder holds.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Overrides such as algorithm.steps=2 or match.lr=3e-5.")]


@app.command()
def show(
    recipe: Annotated[str | None, typer.Argument(help="Recipe name or YAML file; none lists them.")] = None,
    changes: Changes = None,
) -> None:
    """Print a resolved recipe and what one of its iterations costs."""
    from advdmd.recipe import dump
    from advdmd.recipes import find

    if recipe is None:
        print("\n".join(find.known()))
        return
    name, r = find.resolve(recipe, changes or [])
    print(dump(name, r))
    parts = max((r.forwards(i) for i in range(r.iterations)), key=lambda p: sum(p.values()))
    print(
        "forwards per sample, a full iteration: "
        + ", ".join(f"{k} {v:g}" for k, v in parts.items())
        + f" = {sum(parts.values()):g}"
    )
    mean = r.forwards_until(r.iterations) / r.iterations
    print(f"mean over the schedule: {mean:.1f}; {r.iterations} iterations of {r.batch} samples")


@app.command()
def pretrain(
    stage: Annotated[
        str,
        typer.Argument(
            help="autoencoder, mini-sd35, mini-sd35-again, mini-sd35-deep, mini-sd3, in this order; "
            "or qwen-autoencoder, mini-qwen, mini-qwen-again"
        ),
    ],
    out: Out,
    start: Annotated[
        Path | None, typer.Option(help="mini-sd35, mini-qwen: the vae folder; later stages: the pipeline to go on from.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates; by default the recipe's.")] = None,
    threads: Threads = 1,
) -> None:
    """Train a stage of the miniature's teachers from scratch; rerun to resume."""
    from advdmd.pretrain import pretrain as go

    go(stage, out, start, steps, threads)


@app.command()
def train(recipe: str, changes: Changes = None, out: Out = Path("runs/train"), overwrite: Overwrite = False) -> None:
    """Distil a teacher by a recipe; rerun the same command to resume."""
    from advdmd.recipes import find
    from advdmd.run import train as go

    name, r = find.resolve(recipe, changes or [])
    print(f"student: {go(name, r, out, overwrite)}")


@app.command()
def sample(
    model: str,
    prompts: list[str],
    out: Out = Path("samples"),
    steps: Steps = None,
    guidance: Guidance = None,
    seed: int = 0,
    threads: Threads = 2,
) -> None:
    """Draw prompts with a teacher or a student."""
    import torch

    from advdmd.run import paint

    torch.set_num_threads(threads)
    for path in paint(model, prompts, out, own_sampling(model, steps, guidance), seed):
        print(path)


@app.command()
def export(run: Path, out: Out, overwrite: Overwrite = False) -> None:
    """Write the student of a training run as a stock diffusers folder."""
    from advdmd.run import export_run

    print(export_run(run, out, overwrite))


@app.command()
def mini(
    changes: Changes = None,
    out: Out = Path("runs/mini"),
    overwrite: Overwrite = False,
    images: Annotated[int, typer.Option(help="Images per task.")] = 96,
) -> None:
    """The main job: distil the shipped teacher to 4 steps and score it beside its teacher."""
    from advdmd.run import mini as go

    result = go(out, changes or [], overwrite, images)
    print("\n" + result["table"])
    print(f"comparison: {out / 'comparison.png'}\nstudent:    {result['student']}")


class Interrupted(BaseException):
    """Ctrl-C, kept from the command-line library, which would end without a word."""


def _interrupt(*_: Any) -> None:
    raise Interrupted


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, _interrupt)
    try:
        app()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(3)
    except Interrupted:
        print("\ninterrupted: the last checkpoint is kept, the same command goes on from it", file=sys.stderr)
        sys.exit(130)
