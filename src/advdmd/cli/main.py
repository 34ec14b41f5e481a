"""The command line. Mistakes of the user end with one line on stderr and exit code 2."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from advdmd.cli import evaluate
from advdmd.cli.evaluate import Guidance, Out, Steps, Threads, own_sampling

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a text-to-image flow model into a 4- or 2-step student (AdvDMD, DMD2, TwinFlow).",
)
app.add_typer(evaluate.app)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Lose the run that the folder holds.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Overrides such as algorithm.steps=2 or match.lr=3e-5.")]


@app.command()
def show(
    recipe: Annotated[str | None, typer.Argument(help="Recipe name or YAML file; none lists them.")] = None,
    changes: Changes = None,
    card: Annotated[
        float | None, typer.Option(help="GB of the card it is to run on; by default the one it is named after.")
    ] = None,
    cards: Annotated[
        int | None, typer.Option(min=1, help="How many of them, likewise; sharded recipes share networks among them.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of its images in pixels, likewise, for the memory of a published model.")
    ] = None,
) -> None:
    """Print a resolved recipe, what an iteration costs and what it takes of a card, before anything is loaded."""
    from advdmd.distillation import memory
    from advdmd.recipes import registry
    from advdmd.recipes.overrides import dump
    from advdmd.recipes.published import preset_from_name
    from advdmd.recipes.recipe import CachedData

    if recipe is None:
        print("\n".join(registry.known_recipes()))
        return
    name, r = registry.resolve(recipe, changes or [])
    print(dump(name, r))
    parts = max((r.forwards(i) for i in range(r.iterations)), key=lambda p: sum(p.values()))
    print(
        "forwards per sample, a full iteration: "
        + ", ".join(f"{k} {v:g}" for k, v in parts.items())
        + f" = {sum(parts.values()):g}"
    )
    mean = r.forwards_until(r.iterations) / r.iterations
    print(f"mean over the schedule: {mean:.1f}; {r.iterations} iterations of {r.batch} samples")
    if not isinstance(r.data, CachedData) and card is None:
        return
    if preset := preset_from_name(name):
        card, cards, resolution = card or preset.card, cards or preset.cards, resolution or preset.side
    cards, resolution = cards or 1, resolution or 1024
    r.check_shares(cards)
    need = memory.estimate(r, resolution, cards)
    each = f", {need.adapter / 1e6:.0f} M in each of {memory.num_trainable(r)} adapters" if need.adapter else ""
    print(f"transformer: {need.base / 1e9:.2f} B parameters{each}")
    print(
        f"memory of {'a card' if cards == 1 else f'each of {cards} cards'} at {resolution} pixels, GB: "
        + ", ".join(f"{k} {v / 1e9:.1f}" for k, v in need.parts.items())
    )
    print(f"in all {need.total / 1e9:.1f} GB; activations are an estimate")
    if card is not None:
        print(memory.fit_advice(r, need, card))


@app.command()
def pretrain(
    stage: Annotated[
        str,
        typer.Argument(
            help="autoencoder, mini-sd35, mini-sd35-again, mini-sd35-deep, mini-sd3, in this order; "
            "or qwen-autoencoder, qwen-autoencoder-again, mini-qwen, mini-qwen-again, mini-qwen-more"
        ),
    ],
    out: Out,
    start: Annotated[
        Path | None, typer.Option(help="mini-sd35, qwen-autoencoder-again, mini-qwen: the vae folder; others: the pipeline.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates; by default the recipe's.")] = None,
    threads: Threads = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
) -> None:
    """Train a stage of the miniature's teachers from scratch; rerun to resume."""
    from advdmd.commands.pretrain import pretrain as go

    go(stage, out, start, steps, threads, device)


@app.command()
def encode(
    source: Annotated[
        Path, typer.Argument(help="Prompts (.txt, .jsonl), a folder with metadata.jsonl, .tar files or a dataset.")
    ],
    teacher: Annotated[str, typer.Argument(help="Pipeline folder, hub id or shipped name: whose encoders.")],
    out: Out,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels; by default the teacher's own.")] = None,
    reals: Annotated[str, typer.Option(help="source, or teacher: it draws what the critic takes for real.")] = "source",
    per_prompt: Annotated[int, typer.Option(help="Images of each prompt, with --reals teacher.")] = 1,
    by_shape: Annotated[bool, typer.Option("--by-shape", help="Lying and standing images keep about their shape.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="I/N: this is process I of N, from 0; by default what torchrun says.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts or images at a time.")] = 8,
    threads: Threads = 2,
) -> None:
    """Encode prompts and captioned images once, for training; rerun to resume."""
    import torch

    from advdmd.commands.encode import encode as go
    from advdmd.models.loading import resolve_device
    from advdmd.training import distributed

    torch.set_num_threads(threads)
    of = evaluate.worker_of(shard) if shard else distributed.rank_and_world_size()
    place = distributed.local_device(resolve_device(device))
    done = go(source, teacher, out, resolution, reals, per_prompt, of, place, batch, by_shape=by_shape)
    print(f"cache: {out}" if done else f"{out}: the shards of process {of[0]} of {of[1]} are done, others are missing")


@app.command()
def train(
    recipe: str,
    changes: Changes = None,
    out: Out = Path("runs/train"),
    overwrite: Overwrite = False,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio, beside metrics.jsonl.")] = None,
) -> None:
    """Distil a teacher by a recipe; rerun the same command to resume."""
    from advdmd.commands.train import train as go
    from advdmd.monitoring import health
    from advdmd.recipes import registry

    name, r = registry.resolve(recipe, changes or [])
    student = go(name, r, out, overwrite, track or ())
    print(f"student: {student}")
    print(f"health: {health.summary(health.read(out), r)}")


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    against: Annotated[list[Path] | None, typer.Option(help="Good runs to compare to, instead of the miniature's.")] = None,
) -> None:
    """Explain a run: each panel beside its range in good runs, and what to do."""
    from advdmd.monitoring import health
    from advdmd.recipes import registry

    metrics = health.read(run)
    r = registry.resolve(str(health.run_of(run) / "recipe.yaml"))[1]
    ranges = health.ranges_of_runs([health.read(f) for f in against]) if against else health.ranges_for(r)
    findings = health.diagnose(metrics, ranges)
    for f in findings:
        band = f"{f.band[0]:9.3g} to {f.band[1]:<9.3g}" if f.band else "   not measured       "
        print(f"{'out' if f.remedy else 'ok ':4}{f.panel.key:22}{f.value:9.3g}   {band} {f.panel.meaning}")
    print(f"\n{metrics[-1]['step'] + 1:.0f} iterations: {health.summarize(metrics, findings) if ranges else health.NO_RANGES}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Training runs, or the main job's folder.")],
    scores: Annotated[
        list[Path] | None, typer.Option(help="Evaluations to show; the first of a suite is what others are compared to.")
    ] = None,
    out: Out = Path("report.html"),
) -> None:
    """Write runs as one HTML page that needs no network: verdict, curves, panels, samples, scores, failures."""
    from advdmd.monitoring import html_report

    print(html_report.write_report(runs, scores or [], out))


@app.command()
def demo(
    models: Annotated[list[str] | None, typer.Argument(help="Teachers and students: folders, hub ids, shipped names.")] = None,
    port: int = 7860,
    threads: Threads = 2,
) -> None:
    """Show a teacher beside its students on a page of this machine: prompt, steps, seed, time, verdict (extra: demo)."""
    from advdmd.commands.demo import serve

    serve(models or ["mini-sd35"], port, threads)


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

    from advdmd.commands.sample import paint

    torch.set_num_threads(threads)
    for path in paint(model, prompts, out, own_sampling(model, steps, guidance), seed):
        print(path)


@app.command()
def export(run: Path, out: Out, overwrite: Overwrite = False) -> None:
    """Write the student of a training run as a stock diffusers folder."""
    from advdmd.commands.export import export_run

    print(export_run(run, out, overwrite))


@app.command()
def mini(
    changes: Changes = None,
    out: Out = Path("runs/mini"),
    overwrite: Overwrite = False,
    images: Annotated[int, typer.Option(help="Images per task.")] = 96,
) -> None:
    """The main job: distil the shipped teacher to 4 steps and score it beside its teacher."""
    from advdmd.commands.mini import mini as go

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
        said = str(e)  # which may hold a prompt of any length
        print("error:", said if len(said) < 3000 else f"{said[:1500]} [...] {said[-1000:]}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as e:
        print(f"stopped: {e}", file=sys.stderr)
        sys.exit(3)
    except Interrupted:
        print("\ninterrupted: the last checkpoint is kept, the same command goes on from it", file=sys.stderr)
        sys.exit(130)
