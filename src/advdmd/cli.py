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


SuiteName = Annotated[str, typer.Argument(help="mini-geneval, mini-dpg, geneval or dpg")]
Split = Annotated[
    str, typer.Option(help="Of a suite of the miniature: test, train, exam or pairs (held-out shape x colour pairs).")
]
WorldName = Annotated[str, typer.Option(help="Of a suite of the miniature: half or full.")]
Images = Annotated[
    int | None, typer.Option(help="Images: per task of the miniature's suites (96), per prompt of the others (4).")
]
Prompts = Annotated[
    int, typer.Option(help="Of a suite of the miniature: prompts per task, at most, that the images are spread over.")
]
Csv = Annotated[Path | None, typer.Option("--csv", help="DPG-Bench's dpg_bench.csv.")]
Mode = Annotated[str, typer.Option(help="dpg: fixed, or official for the published script's arithmetic.")]
DetectorFolder = Annotated[Path | None, typer.Option("--detector", help="geneval: Mask2Former, see convert-detector.")]
ClipFolder = Annotated[Path | None, typer.Option("--clip", help="geneval: openai/clip-vit-large-patch14 as a folder.")]
JudgeName = Annotated[str | None, typer.Option("--judge", help="dpg: qwen-vl:FOLDER, mplug:INTERPRETER or endpoint:URL#MODEL.")]
ShardText = Annotated[str, typer.Option("--shard", help="I/N: only the items of process I (from 0) of N.")]
Partial = Annotated[bool, typer.Option("--allow-partial", help="Give a figure, named partial, when not all images are judged.")]
Tolerant = Annotated[bool, typer.Option("--keep-going", help="Count images on which the judge fails, and go on.")]
TrainedOn = Annotated[bool, typer.Option("--trained-on", help="Score a model by its own training reward; the table says so.")]
Device = Annotated[str, typer.Option(help="cpu or cuda, for real models and judges.")]


def _shard(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--shard {text!r}: write I/N with I from 0 to N - 1, such as 0/4")
    return int(i), int(n)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A shipped name, a diffusers folder, or a hub id.")],
    suite: SuiteName = "mini-geneval",
    out: Out = Path("eval"),
    steps: Steps = None,
    guidance: Guidance = None,
    seed: int = 0,
    split: Split = "test",
    world: WorldName = "half",
    images: Images = None,
    prompts: Prompts = 48,
    csv: Csv = None,
    mode: Mode = "fixed",
    detector: DetectorFolder = None,
    clip: ClipFolder = None,
    judge: JudgeName = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the pipeline's own.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of a hub id.")] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16, for other pipelines than the miniature's.")
    ] = "float32",
    device: Device = "cpu",
    shard: ShardText = "0/1",
    allow_partial: Partial = False,
    keep_going: Tolerant = False,
    trained_on: TrainedOn = False,
    against: Annotated[Path | None, typer.Option(help="Folder of another result: prints the paired difference.")] = None,
    threads: Threads = 2,
) -> None:
    """Generate a suite's images with any diffusers pipeline, judge them from disk, print the table."""
    import torch

    from advdmd import evaluate as go
    from advdmd.evaluation import report
    from advdmd.models import load
    from advdmd.models.stock import StockSampling

    torch.set_num_threads(threads)
    bench = go.suite_of(suite, images, prompts, split, world, csv, mode)
    part = _shard(shard)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {dtype!r}: float32, bfloat16 or float16")
    if against is not None:
        report.read_scores(against)
    looks = go.judge_of(bench, detector, clip, judge, device)
    looks.self_test()  # before any drawing: what is missing or broken is said now
    how = go.Scored(shard=part, allow_partial=allow_partial, tolerant=keep_going, trained_on=trained_on)
    if load.is_miniature(model) and (height, width) == (None, None):
        go.draw(model, bench, out, _how(model, steps, guidance), seed, shard=part)
    else:
        told = StockSampling(steps=steps, guidance=guidance, height=height, width=width)
        go.draw_stock(model, bench, out, told, seed, part, revision, device, dtype)
    summary = go.score(bench, out, looks, how)
    print(report.markdown({Path(model).name: summary}))
    print(f"failures: {out / 'gallery.html'}")
    if against is not None:
        print(_difference(report.compare([out], [against])))


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="Folder with images/ITEM/K.png, or GenEval's ITEM/samples/K.png.")],
    suite: SuiteName,
    split: Split = "test",
    world: WorldName = "half",
    images: Images = None,
    prompts: Prompts = 48,
    csv: Csv = None,
    mode: Mode = "fixed",
    detector: DetectorFolder = None,
    clip: ClipFolder = None,
    judge: JudgeName = None,
    device: Device = "cpu",
    shard: ShardText = "0/1",
    allow_partial: Partial = False,
    keep_going: Tolerant = False,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another model's result: its images stand beside the failures.")
    ] = None,
) -> None:
    """Judge images that are already there, of whatever model; joins shards."""
    from advdmd import evaluate as go
    from advdmd.evaluation import report

    bench = go.suite_of(suite, images, prompts, split, world, csv, mode)
    how = go.Scored(shard=_shard(shard), allow_partial=allow_partial, tolerant=keep_going)
    looks = go.judge_of(bench, detector, clip, judge, device)
    print(report.markdown({folder.name: go.score(bench, folder, looks, how)}))
    if against is not None:
        go.side_by_side(folder, against)
        print(_difference(report.compare([folder], [against])))
    print(f"failures: {folder / 'gallery.html'}")


@app.command()
def metric(
    folder: Annotated[Path, typer.Argument(help="Folder of a suite's images, as eval leaves it.")],
    suite: SuiteName,
    name: Annotated[str, typer.Argument(help="clipscore, pickscore, hpsv2, imagereward, diversity, frechet or kernel")],
    weights: Annotated[Path, typer.Option(help="The metric's model as a folder; a CLIP for the last three.")],
    reference: Annotated[Path | None, typer.Option(help="frechet, kernel: folder of images to compare with.")] = None,
    split: Split = "test",
    world: WorldName = "half",
    images: Images = None,
    prompts: Prompts = 48,
    csv: Csv = None,
    device: Device = "cpu",
    trained_on: TrainedOn = False,
) -> None:
    """Measure images that are already drawn with a learned metric."""
    from advdmd.evaluate import suite_of
    from advdmd.measure import measure

    bench = suite_of(suite, images, prompts, split, world, csv)
    found = measure(bench, folder, name, weights, reference, device, trained_on)
    low, high = found.get("interval", (None, None))
    spread = f" [{low:.4f}, {high:.4f}]" if low is not None else ""
    print(f"{found['name']}: {found['mean']:.4f}{spread} over {found['images']} images of {found['suite']}")


@app.command("convert-detector")
def convert_detector(
    checkpoint: Annotated[Path, typer.Argument(help="OpenMMLab's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco .pth")], out: Out
) -> None:
    """GenEval's detector as a transformers folder; a .pth is a pickle, of which only tensors are read."""
    from advdmd.evaluation.mask2former import convert

    print(convert(checkpoint, out))


@app.command("convert-hps")
def convert_hps(
    checkpoint: Annotated[Path, typer.Argument(help="HPS_v2.1_compressed.pt or HPS_v2_compressed.pt")],
    base: Annotated[Path, typer.Option(help="laion/CLIP-ViT-H-14-laion2B-s32B-b79K as a folder: config and tokenizer.")],
    out: Out,
) -> None:
    """HPSv2's weights as a CLIP folder, for advdmd metric and rewards."""
    from advdmd.evaluation.metrics.clip import convert_hps as convert

    print(convert(checkpoint, base, out))


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
