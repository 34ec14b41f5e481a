"""The command line. Mistakes of the user end with one line on stderr and exit code 2."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from advdmd.cli import evaluate
from advdmd.cli.evaluate import Device, Dtype, Guidance, Out, Steps, Threads, sampler_of, worker_of
from advdmd.cli.renamed_options import check_options

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluate.app)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove the run that the folder holds.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Overrides such as algorithm.steps=2 or dm_optimizer.lr=3e-5.")]
RunChanges = Annotated[
    list[str] | None, typer.Argument(help="What may change in a run: data.folder=... where its cache has moved, device=...")
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"advdmd {version('advdmd')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Turn a text-to-image flow model into a 4- or 2-step student (AdvDMD, DMD2, TwinFlow)."""


@app.command()
def show(
    recipe: Annotated[str | None, typer.Argument(help="Recipe name or YAML file; without one: a table of recipes.")] = None,
    changes: Changes = None,
    gpu_memory: Annotated[float | None, typer.Option(help="GB of each GPU; by default those of the preset.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Number of GPUs; by default that of the preset.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels; by default that of the preset.")] = None,
    gpu: Annotated[str | None, typer.Option(help="h100 or h200: prints the hours of the run on it.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that the GPUs are on.")] = 1,
    bandwidth: Annotated[float, typer.Option(help="GB/s between GPUs or machines; 25 is InfiniBand of 200 Gbit/s.")] = 25.0,
) -> None:
    """Print a resolved recipe, what an iteration costs and the GPU memory it takes; nothing is loaded."""
    from advdmd.commands.show import describe, recipe_table
    from advdmd.recipes import registry

    if recipe is None:
        print(recipe_table())
        return
    print(describe(*registry.resolve(recipe, changes or []), gpu_memory, gpus, resolution, gpu, nodes, bandwidth))


@app.command()
def pretrain(
    stage: Annotated[
        str,
        typer.Argument(
            help="autoencoder, mini-sd35, mini-sd35-stage2, mini-sd35-stage3, mini-sd3, in this order; "
            "or qwen-autoencoder, qwen-autoencoder-stage2, mini-qwen, mini-qwen-stage2, mini-qwen-stage3"
        ),
    ],
    out: Out,
    start: Annotated[
        Path | None, typer.Option(help="mini-sd35, qwen-autoencoder-stage2, mini-qwen: the vae folder; others: the pipeline.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates; by default the recipe's.")] = None,
    threads: Threads = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "cpu",
) -> None:
    """Train a stage of the miniature's teachers from scratch; rerun to resume."""
    from advdmd.commands.pretrain import pretrain as run

    run(stage, out, start, steps, threads, device)


@app.command()
def encode(
    source: Annotated[
        Path, typer.Argument(help="Prompts (.txt, .jsonl), a folder with metadata.jsonl, .tar files or a dataset.")
    ],
    teacher: Annotated[str, typer.Argument(help="Pipeline folder, hub id or shipped name: whose encoders.")],
    out: Out,
    resolution: Annotated[int | None, typer.Option(help="Side of the images in pixels; by default the teacher's own.")] = None,
    real_images: Annotated[
        str, typer.Option(help="source, or teacher: it generates what the discriminator takes for real.")
    ] = "source",
    per_prompt: Annotated[int, typer.Option(help="Images of each prompt, with --real-images teacher.")] = 1,
    aspect_buckets: Annotated[
        bool, typer.Option("--aspect-buckets", help="Landscape and portrait images keep about their aspect ratio.")
    ] = False,
    worker: Annotated[str | None, typer.Option(help="I/N: this is process I of N, from 0; by default torchrun's rank.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Key or column of captions, where it has another name.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Key or column of images, where it has another name.")] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Key or column of the images that captions edit, where it has another name.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    batch: Annotated[int, typer.Option(help="Prompts or images at a time.")] = 8,
    threads: Threads = 2,
) -> None:
    """Encode prompts and captioned images once, for training; rerun to resume."""
    import torch

    from advdmd.commands.encode import encode as run
    from advdmd.data.captioned_images import Columns
    from advdmd.models.devices import resolve_device
    from advdmd.training import distributed

    torch.set_num_threads(threads)
    part = worker_of(worker) if worker else distributed.rank_and_world_size()
    place = distributed.local_device(resolve_device(device))
    done = run(
        *(source, teacher, out, resolution, real_images, per_prompt, part, place, batch),
        by_aspect=aspect_buckets,
        steps=steps,
        guidance=guidance,
        columns=Columns(caption_column, image_column, source_column),
    )
    print(f"cache: {out}" if done else f"{out}: the shards of process {part[0]} of {part[1]} are done, others are missing")


@app.command()
def train(
    recipe: str,
    changes: Changes = None,
    out: Out = Path("runs/train"),
    overwrite: Overwrite = False,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb or trackio, beside metrics.jsonl.")] = None,
) -> None:
    """Distil a teacher by a recipe; rerun the same command to resume."""
    from advdmd.commands.train import train as run
    from advdmd.distillation.validation import start_table
    from advdmd.evaluation.tables import markdown_table
    from advdmd.monitoring import health
    from advdmd.recipes import registry

    name, r = registry.resolve(recipe, changes or [])
    student, metrics = run(name, r, out, overwrite, report_to or ()), health.read_metrics(out)
    print(markdown_table(start_table(out, metrics)), end="")
    print(f"student: {student}")
    print(f"health: {health.summary(metrics, r)}")


@app.command()
def doctor(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    against: Annotated[list[Path] | None, typer.Option(help="Good runs to compare to, instead of the miniature's.")] = None,
) -> None:
    """Explain a run: each diagnostic beside its range in good runs, and what to do."""
    from advdmd.commands.doctor import doctor as explain

    print(explain(run, against or ()))


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="Folder of an AdvDMD run.")],
    changes: RunChanges = None,
    prompts: Annotated[int, typer.Option(help="Prompts that the reward is judged on.")] = 48,
    images: Annotated[int, typer.Option(help="Images of each prompt.")] = 8,
    batches: Annotated[int, typer.Option(help="Iterations' samples in each half of a gradient.")] = 8,
    step_size: Annotated[float, typer.Option(help="Length of a step, as a share of the weights' norm.")] = 0.003,
    seed: int = 0,
    scorer: Annotated[str | None, typer.Option(help="NAME:FOLDER of a metric; in the miniature its checker.")] = None,
) -> None:
    """Measure what a run's reward knows of a score, how much of its gradients is signal, and what a step along each does."""
    from advdmd.commands.audit import AuditConfig, as_text
    from advdmd.commands.audit import audit as run_audit

    config = AuditConfig(images=images, batches=batches, step_size=step_size, seed=seed)
    print(as_text(run_audit(run, config, prompts, scorer, changes or [])))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Training runs, or the main job's folder.")],
    scores: Annotated[
        list[Path] | None, typer.Option(help="Evaluations to show; the first of a suite is what others are compared to.")
    ] = None,
    out: Out = Path("report.html"),
) -> None:
    """Write runs as one HTML page that needs no network: health, curves, samples, scores, failures."""
    from advdmd.monitoring.html_report import write_report

    print(write_report(runs, scores or [], out))


@app.command()
def demo(
    models: Annotated[list[str] | None, typer.Argument(help="Teachers and students: folders, hub ids, shipped names.")] = None,
    port: int = 7860,
    threads: Threads = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show a teacher beside its students on a local page, with time and the result of the checker (extra: demo)."""
    from advdmd.commands.demo import serve

    serve(models or ["mini-sd35"], port, threads, device, dtype)


@app.command()
def sample(
    model: str,
    prompts: list[str],
    source: Annotated[
        list[Path] | None, typer.Option(help="Image that prompts edit: one for all, or repeated, the same number for each.")
    ] = None,
    out: Out = Path("samples"),
    steps: Steps = None,
    guidance: Guidance = None,
    seed: int = 0,
    threads: Threads = 2,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Sample prompts with a teacher or a student."""
    import torch

    from advdmd.commands.sample import edits_of
    from advdmd.commands.sample import sample as run

    torch.set_num_threads(threads)
    what = edits_of(prompts, source) if source else prompts
    for path in run(model, what, out, sampler_of(model, steps, guidance), seed, device, dtype):
        print(path)


@app.command()
def export(
    run: Path,
    out: Out,
    changes: RunChanges = None,
    overwrite: Overwrite = False,
    only: Annotated[str | None, typer.Option(help="speed: the student's adapter alone, without its teacher's LoRA.")] = None,
    push: Annotated[str | None, typer.Option(help="OWNER/NAME: upload the folder to this repository on the hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if there is none.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --push: say what would go, send nothing.")] = False,
) -> None:
    """Write the student of a training run as a stock diffusers folder; data.folder=... where its cache has moved."""
    from advdmd.commands.export import export
    from advdmd.commands.push import check_repository
    from advdmd.commands.push import push as upload

    if push is not None:
        check_repository(push)
    print(folder := export(run, out, overwrite, changes or [], only))
    if push is not None:
        upload(folder, push, private, dry_run)


@app.command()
def mini(
    changes: Changes = None,
    out: Out = Path("runs/mini"),
    overwrite: Overwrite = False,
    images: Annotated[int, typer.Option(help="Images per task.")] = 96,
) -> None:
    """The main job: distil the shipped teacher to 4 steps and score it beside its teacher."""
    from advdmd.commands.mini import mini as run

    result = run(out, changes or [], overwrite, images)
    print("\n" + result["table"])
    print(f"comparison: {out / 'comparison.png'}\nstudent:    {result['student']}")


class Interrupted(BaseException):
    """Ctrl-C, kept from the command-line library, which would end without a message."""


def _interrupt(*_: object) -> None:
    raise Interrupted


OUT_OF_MEMORY = (
    "Training: lower algorithm.micro_batch_size or lora_rank, set gradient_checkpointing=true, base_bits=4 or a smaller "
    "resolution; advdmd show RECIPE prints the memory by part. Sampling: --dtype bfloat16 or --device cpu"
)
WITHOUT_MPS = "Set PYTORCH_ENABLE_MPS_FALLBACK=1 to have the CPU do it, or use device=cpu"


@contextmanager
def _one_speaks() -> Iterator[str]:
    """Inside, the first of several processes of torchrun alone prints. Yields what begins the errors of the others."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        yield ""
        return
    heard = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield f"process {rank}: "
        finally:
            sys.stdout, sys.stderr = heard


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, _interrupt)
    errors = sys.stderr
    with _one_speaks() as who:
        try:
            check_options(sys.argv[1:])
            app()
        except (ValueError, OSError) as e:
            text = str(e)  # which may hold a prompt of any length
            print(f"{who}error:", text if len(text) < 3000 else f"{text[:1500]} [...] {text[-1000:]}", file=errors)
            sys.exit(2)
        except FloatingPointError as e:
            print(f"{who}stopped: {e}", file=errors)
            sys.exit(3)
        except Interrupted:
            print(f"{who}interrupted: what is written is kept, the same command goes on from there", file=errors)
            sys.exit(130)
        except (RuntimeError, TypeError) as e:
            if "MPS" in str(e):  # what torch says of an operation or a type that Apple's GPUs lack
                print(f"{who}error: device=mps: {str(e).split('. ')[0]}. {WITHOUT_MPS}", file=errors)
                sys.exit(2)
            if type(e).__name__ != "OutOfMemoryError":  # torch's; importing torch for its name takes seconds
                raise
            print(f"{who}error: the GPU's memory is not enough: {str(e).split('.')[0]}. {OUT_OF_MEMORY}", file=errors)
            sys.exit(2)
