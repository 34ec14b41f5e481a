"""The command line. Mistakes of the user end with one line on stderr and exit code 2."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a text-to-image flow model into a 4- or 2-step student (AdvDMD, DMD2).",
)
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Lose the run that the folder holds.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Overrides such as algorithm.steps=2 or match.lr=3e-5.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; by default the model's own.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of a teacher.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


def _how(model: str, steps: int | None, guidance: float | None) -> Any:
    """The model's own sampling with what the user changed."""
    from dataclasses import replace

    from advdmd.models import load

    changes = {k: v for k, v in {"steps": steps, "guidance": guidance}.items() if v is not None}
    return replace(load.sampling_of(load.folder_of(model)), **changes)


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
    for path in paint(model, prompts, out, _how(model, steps, guidance), seed):
        print(path)


@app.command("eval")
def evaluate(
    model: str,
    suite: Annotated[str, typer.Argument(help="mini-geneval or mini-dpg")] = "mini-geneval",
    out: Out = Path("eval"),
    steps: Steps = None,
    guidance: Guidance = None,
    seed: int = 0,
    split: Annotated[str, typer.Option(help="test, train or pairs (held-out shape x colour pairs).")] = "test",
    world: Annotated[str, typer.Option(help="half or full")] = "half",
    images: Annotated[int, typer.Option(help="Images per task.")] = 96,
    prompts: Annotated[int, typer.Option(help="Prompts per task, at most, that the images are spread over.")] = 48,
    against: Annotated[Path | None, typer.Option(help="Folder of another result: prints the paired difference.")] = None,
    threads: Threads = 2,
) -> None:
    """Generate a suite's images, score them from disk, print the table."""
    import torch

    from advdmd.evaluation import report
    from advdmd.evaluation.shapes import Shapes
    from advdmd.run import evaluate as go

    torch.set_num_threads(threads)
    bench = Shapes(suite, images_per_task=images, prompts_per_task=prompts, split=split, world=world)
    if against is not None:
        report.read_scores(against)
    summary = go(model, bench, out, _how(model, steps, guidance), seed)
    print(report.markdown({Path(model).name: summary}))
    if against is not None:
        print(_difference(report.compare([out], [against])))


def _difference(result: dict[str, Any]) -> str:
    d = result["difference"]["strict"]["overall"]
    low, high = d["interval"]
    return f"paired difference, strict: {d['mean']:+.3f} [{low:+.3f}, {high:+.3f}] to {d['against']:.3f}"


@app.command()
def compare(
    ours: Annotated[list[Path], typer.Argument(help="Evaluations, one per training seed: their folders or scores.json.")],
    against: Annotated[list[Path], typer.Option(help="The other side: one, or as many in the same order.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the whole comparison.")] = None,
    commit: Annotated[str, typer.Option(help="What to note as the code's version.")] = "",
) -> None:
    """Compare scored results over training seeds, images paired by prompt and noise."""
    import json

    from advdmd.evaluation import report
    from advdmd.train.checkpoint import write_text

    result = report.compare(ours, against) | {"commit": commit}
    print(_difference(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1))


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
