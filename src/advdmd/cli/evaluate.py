"""The command line of evaluation: eval, score, metric, compare, and the converters of judges' weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from advdmd.models.sampler import SamplerConfig
    from advdmd.types import Json

app = typer.Typer()
Out = Annotated[Path, typer.Option("--out", help="Folder to write to.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; by default the model's own.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale of a teacher.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads.")]


def sampler_of(model: str, steps: int | None, guidance: float | None) -> "SamplerConfig":
    """How a model is sampled by its metadata, with what the user has changed."""
    from advdmd.models import loading

    return loading.default_sampling(loading.pipeline_folder(model)).changed(steps, guidance)


SuiteName = Annotated[str, typer.Argument(help="mini-geneval, mini-dpg, geneval or dpg")]
Split = Annotated[
    str, typer.Option(help="Of a suite of the miniature: test, train, validation or pairs (held-out shape x colour pairs).")
]
WorldName = Annotated[str, typer.Option(help="Of a suite of the miniature: half or full.")]
Images = Annotated[
    int | None, typer.Option(help="Images: per task of the miniature's suites (96), per prompt of the others (4).")
]
Prompts = Annotated[
    int, typer.Option(help="Of a suite of the miniature: prompts per task, at most, that the images are spread over.")
]
Csv = Annotated[Path | None, typer.Option("--csv", help="DPG-Bench's dpg_bench.csv, or OWNER/NAME/FILE.csv on the hub.")]
Mode = Annotated[
    Literal["fixed", "official"], typer.Option(help="dpg: fixed, or official for the published script's arithmetic.")
]
DetectorFolder = Annotated[Path | None, typer.Option("--detector", help="geneval: Mask2Former, a folder or hub id.")]
ClipFolder = Annotated[Path | None, typer.Option("--clip", help="geneval: openai/clip-vit-large-patch14, a folder or hub id.")]
JudgeName = Annotated[str | None, typer.Option("--judge", help="dpg: qwen-vl:FOLDER, mplug:INTERPRETER or endpoint:URL#MODEL.")]
WorkerText = Annotated[str, typer.Option("--worker", help="I/N: only the items of process I (from 0) of N.")]
Partial = Annotated[bool, typer.Option("--allow-partial", help="Give a figure, named partial, when not all images are judged.")]
Tolerant = Annotated[bool, typer.Option("--keep-going", help="Count images on which the judge fails, and go on.")]
TrainingReward = Annotated[
    bool, typer.Option("--allow-training-reward", help="Score a model by its own training reward; the table says so.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto: float32 on the CPU, as stored on a GPU.")]


def worker_of(text: str) -> tuple[int, int]:
    """The text I/N as (I, N). Raises ValueError unless 0 <= I < N."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"--worker {text!r}: write I/N with I from 0 to N - 1, such as 0/4")
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
    dtype: Dtype = "auto",
    device: Device = "auto",
    worker: WorkerText = "0/1",
    allow_partial: Partial = False,
    keep_going: Tolerant = False,
    allow_training_reward: TrainingReward = False,
    against: Annotated[Path | None, typer.Option(help="Folder of another result: prints the paired difference.")] = None,
    threads: Threads = 2,
) -> None:
    """Sample a suite with any diffusers pipeline, judge the images from disk, print the table."""
    import torch

    from advdmd.commands import evaluate as commands
    from advdmd.evaluation import results, tables
    from advdmd.models import devices
    from advdmd.models.diffusers_pipeline import DiffusersSampling

    torch.set_num_threads(threads)
    bench = commands.make_suite(suite, images, prompts, split, world, csv, mode)
    part = worker_of(worker)
    if dtype not in devices.DTYPES:
        raise ValueError(f"--dtype {dtype!r}: one of {', '.join(devices.DTYPES)}")
    device = devices.resolve_device(device)
    if against is not None:
        results.read_scores(against)
    suite_judge = commands.make_judge(bench, detector, clip, judge, device)
    suite_judge.self_test()  # before any image is sampled
    options = commands.ScoringOptions(
        worker=part, allow_partial=allow_partial, tolerant=keep_going, allow_training_reward=allow_training_reward
    )
    if commands.is_native(model) and (height, width) == (None, None):
        commands.generate_images(model, bench, out, sampler_of(model, steps, guidance), seed, None, part, device, dtype)
    else:
        sampling = DiffusersSampling(steps=steps, guidance_scale=guidance, height=height, width=width)
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        commands.generate_with_diffusers(model, bench, out, sampling, seed, part, revision, device, dtype)
    summary = commands.score(bench, out, suite_judge, options)
    print(tables.markdown({Path(model).name: summary}))
    print(f"failures: {out / 'gallery.html'}")
    if against is not None:
        print(_difference(results.compare([out], [against])))


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
    device: Device = "auto",
    worker: WorkerText = "0/1",
    allow_partial: Partial = False,
    keep_going: Tolerant = False,
    against: Annotated[
        Path | None, typer.Option(help="Folder of another model's result: its images stand beside the failures.")
    ] = None,
) -> None:
    """Judge images that are already there, of whatever model; joins workers."""
    from advdmd.commands import evaluate as commands
    from advdmd.evaluation import results, tables
    from advdmd.models import devices

    bench = commands.make_suite(suite, images, prompts, split, world, csv, mode)
    options = commands.ScoringOptions(worker=worker_of(worker), allow_partial=allow_partial, tolerant=keep_going)
    suite_judge = commands.make_judge(bench, detector, clip, judge, devices.resolve_device(device))
    print(tables.markdown({folder.name: commands.score(bench, folder, suite_judge, options)}))
    if against is not None:
        commands.write_comparison_gallery(folder, against)
        print(_difference(results.compare([folder], [against])))
    print(f"failures: {folder / 'gallery.html'}")


@app.command()
def metric(
    folder: Annotated[Path, typer.Argument(help="Folder of a suite's images, as eval leaves it.")],
    suite: SuiteName,
    name: Annotated[
        str, typer.Argument(help="clipscore, pickscore, hpsv2, imagereward, diversity, frechet, kernel, fid or kid")
    ],
    weights: Annotated[
        Path,
        typer.Option(
            help="The metric's model, a folder or hub id; a CLIP for diversity, frechet, kernel; FID's Inception file."
        ),
    ],
    reference: Annotated[Path | None, typer.Option(help="frechet, kernel, fid, kid: folder of images to compare with.")] = None,
    split: Split = "test",
    world: WorldName = "half",
    images: Images = None,
    prompts: Prompts = 48,
    csv: Csv = None,
    device: Device = "auto",
    allow_training_reward: TrainingReward = False,
) -> None:
    """Measure images that are already generated with a learned metric."""
    from advdmd.commands.evaluate import make_suite
    from advdmd.commands.metric import compute_metric
    from advdmd.models import devices

    bench = make_suite(suite, images, prompts, split, world, csv)
    found = compute_metric(bench, folder, name, weights, reference, devices.resolve_device(device), allow_training_reward)
    low, high = found.get("interval", (None, None))
    spread = f" [{low:.4f}, {high:.4f}]" if low is not None else ""
    print(f"{found['name']}: {found['mean']:.4f}{spread} over {found['images']} images of {found['suite']}")


@app.command("convert-detector")
def convert_detector(
    checkpoint: Annotated[Path, typer.Argument(help="OpenMMLab's mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco .pth")], out: Out
) -> None:
    """GenEval's detector as a transformers folder; a .pth is a pickle, of which only tensors are read."""
    from advdmd.evaluation.judges.mask2former import convert

    print(convert(checkpoint, out))


@app.command("convert-hps")
def convert_hps(
    checkpoint: Annotated[Path, typer.Argument(help="HPS_v2.1_compressed.pt or HPS_v2_compressed.pt")],
    base: Annotated[Path, typer.Option(help="laion/CLIP-ViT-H-14-laion2B-s32B-b79K as a folder: config and tokenizer.")],
    out: Out,
) -> None:
    """HPSv2's weights as a CLIP folder, for advdmd metric and rewards."""
    from advdmd.rewards.clip import convert_hps as convert

    print(convert(checkpoint, base, out))


def _difference(result: "Json") -> str:
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

    from advdmd.evaluation import results
    from advdmd.files import write_text

    result = results.compare(ours, against) | {"commit": commit}
    print(_difference(result))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=1))
