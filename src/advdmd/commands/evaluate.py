"""Evaluating: which suite, which judge, draw, look, score; for students, teachers and any other diffusers pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advdmd.evaluation import failure_gallery, results, statistics, tables
from advdmd.evaluation.benchmark import Benchmark, Judge, suite_hash
from advdmd.evaluation.dpg import DPG
from advdmd.evaluation.generate import GENERATE_AGAIN, Worker, generate, image_jobs, read_images
from advdmd.evaluation.geneval import GenEval
from advdmd.evaluation.judges import geneval_detector, vqa
from advdmd.evaluation.judging import compute_verdicts, run_judge
from advdmd.files import file_hash, read_object, write_text
from advdmd.mini.diversity import diversity
from advdmd.mini.suites import CheckerJudge, MiniSuite
from advdmd.models import loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from advdmd.models.hub import download
from advdmd.models.images import image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.progress import Progress

SUITES = ("mini-geneval", "mini-dpg", "geneval", "dpg")
JUDGES = "qwen-vl:FOLDER, mplug:INTERPRETER or endpoint:URL#MODEL"


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How images are judged: what is refused, what is only counted."""

    shard: Worker = (0, 1)
    allow_partial: bool = False  # a figure over what is there, named partial
    tolerant: bool = False  # go on when the judge fails on an image
    trained_on: bool = False  # score a model by what it was rewarded with, and say so in the table


def make_suite(
    name: str,
    images: int | None = None,
    prompts: int = 48,
    split: str = "test",
    world: str = "half",
    csv: Path | None = None,
    mode: Any = "fixed",
) -> Benchmark:
    """A suite by name. `images` per task of the miniature's (96), per prompt of the real ones (4)."""
    if name not in SUITES:
        raise ValueError(f"suite {name!r}: one of {', '.join(SUITES)}")
    if csv is not None and name != "dpg":
        raise ValueError(f"--csv is dpg's; {name} has its own prompts")
    if name == "dpg":
        if csv is None:
            raise ValueError("dpg needs --csv: DPG-Bench's prompts are not shipped, name its dpg_bench.csv")
        return DPG(str(_table(csv)), images or 4, mode)
    if name == "geneval":
        return GenEval(images or 4)
    return MiniSuite(name, images or 96, prompts, split, world)


def _table(name: Path) -> Path:
    """A local CSV, or OWNER/NAME/FILE.csv of a data set on the hub. Raises ValueError if it cannot be had."""
    owner, _, rest = str(name).partition("/")
    repo, _, file = rest.partition("/")
    if name.exists() or not file or name.is_absolute():
        return name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file, repo_type="dataset"))
    except Exception as e:  # whatever an unreachable hub or an unknown repository makes the library raise
        raise ValueError(f"{name}: no such file, and not to be had from the hub: {str(e).splitlines()[0]}") from None


def make_judge(suite: Benchmark, detection: Path | None, clip: Path | None, judge: str | None, device: str) -> Judge:
    """What looks at a suite's images."""
    if isinstance(suite, MiniSuite):
        return CheckerJudge()
    if isinstance(suite, GenEval):
        if detection is None or clip is None:
            raise ValueError(
                "geneval needs --detector (a folder made by advdmd convert-detector, or facebook's Mask2Former, which is not "
                "comparable) and --clip (openai/clip-vit-large-patch14 as a folder)"
            )
        return geneval_detector.load_detector(download(detection), download(clip), device)
    kind, _, where = (judge or "").partition(":")
    if kind == "qwen-vl" and where:
        return vqa.qwen_vl(download(where), device)
    if kind == "mplug" and where:
        return vqa.mplug(where)
    if kind == "endpoint" and "#" in where:
        url, _, model = where.rpartition("#")
        return vqa.endpoint(url, model)
    raise ValueError(f"judge {judge!r}: {suite.name} needs --judge {JUDGES}")


def generate_images(
    model: str,
    suite: Benchmark,
    folder: Path,
    how: SamplerConfig | None = None,
    seed: int = 0,
    batch: int = 512,
    shard: Worker = (0, 1),
) -> None:
    """Draw a suite with a model of the miniature; the manifest says which, and how many evaluations an image took."""
    backbone, own = loading.load(model)
    how = how or own
    where = loading.pipeline_folder(model)
    model_note = {"name": Path(model).name, **loading.read_metadata(where), **asdict(how)}
    about = {"weights": file_hash(loading.weights_file(where)), "sampling": asdict(how), "nfe": how.nfe, "model": model_note}
    say, done = _progress(suite, shard), [0]

    def paint(prompts: Sequence[str], keys: Sequence[object]) -> np.ndarray:
        images = image_sampler(backbone, backbone.net, how, lambda n: say(done[0] + n))(prompts, keys)
        done[0] += len(prompts)
        return images

    generate(suite, paint, folder, seed, about | {"suite_hash": suite_hash(suite.items())}, batch, shard)


def generate_with_diffusers(
    model: str,
    suite: Benchmark,
    folder: Path,
    how: DiffusersSampling,
    seed: int = 0,
    shard: Worker = (0, 1),
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Draw a suite with any diffusers pipeline, from a folder or the hub."""
    stock, say, done = DiffusersModel(model, how, revision, device, dtype), _progress(suite, shard), [0]
    note = loading.read_metadata(Path(model)) if Path(model).is_dir() else {}
    about: dict[str, Any] = {"revision": revision, "sampling": stock.told, "dtype": dtype, "nfe": stock.nfe}
    about["model"] = {"name": model, **note, "sampling": stock.told}
    if Path(model).is_dir():
        weights = sorted(Path(model).rglob("*.safetensors"))
        about["weights"] = [file_hash(f) for f in weights]

    def paint(prompts: Sequence[str], keys: Sequence[object]) -> np.ndarray:
        images = stock.paint(prompts, keys)
        done[0] += len(prompts)
        say(done[0])
        return images

    generate(suite, paint, folder, seed, about | {"suite_hash": suite_hash(suite.items())}, 1, shard)


def _progress(suite: Benchmark, shard: Worker) -> Callable[[int], None]:
    return Progress(f"drawing {suite.name}", len(image_jobs(suite, shard)))


def evaluate(model: str, suite: MiniSuite, folder: Path, how: SamplerConfig | None = None, seed: int = 0) -> dict[str, Any]:
    """A model of the miniature on one of its suites: draw into `folder`, score from disk; returns the summary."""
    generate_images(model, suite, folder, how, seed)
    return score(suite, folder, CheckerJudge())


def score(suite: Benchmark, folder: Path, judge: Judge, how: ScoringOptions = ScoringOptions()) -> dict[str, Any]:
    """Score a folder of images and write what was found.

    Raises ValueError if images or verdicts are missing (unless partial figures are allowed), if the judge fails, or if the
    model was trained on this judge's own answers.
    """
    drawn = read_manifest(folder)
    model, seed = drawn.get("model"), drawn.get("seed", 0)
    taught = trained_on_metric(model or {}, judge.name, how.trained_on)
    run_judge(
        suite, folder, judge, how.shard, how.tolerant, Progress(f"judging {suite.name}", len(image_jobs(suite, how.shard)))
    )
    found, total = compute_verdicts(suite, folder, judge, seed), len(image_jobs(suite))
    short = total - found.dropped - len(found.rows)
    if short and not how.allow_partial:
        what = f"{found.missing} images missing, {len(found.errors)} failed" + (f" ({found.errors[0]})" if found.errors else "")
        hint = (
            "the other shards, then score again" if how.shard != (0, 1) else "it again; --allow-partial gives a partial figure"
        )
        raise ValueError(f"{folder}: only {len(found.rows)}/{total} images have a verdict ({what}): run {hint}")
    if not found.rows:
        raise ValueError(f"{folder}: no image has a verdict")
    items = {i.id: i for i in suite.items()}
    summary = {
        "suite": suite.name,
        "suite_hash": suite_hash(suite.items()),
        "split": suite.split,
        "judge": judge.name + (tables.OWN_REWARD if taught else ""),
        "judge_hash": judge.fingerprint,
        "seed": seed,
        "images": len(found.rows),
        "of": total - found.dropped,
        "errors": len(found.errors),
        "dropped": found.dropped,
        "nfe": drawn.get("nfe"),
        "model": model,
        "strict": statistics.summarize(found.rows, "strict"),
        "loose": statistics.summarize(found.rows, "loose"),
        "breakdown": suite.breakdown([items[r["item"]] for r in found.rows], [results.verdict_of(r) for r in found.rows]),
        "diversity": _spread(suite, folder) if not short else {},
    }
    results.write_results(folder, found.rows, summary)
    write_text(folder / "gallery.html", failure_gallery.failure_page([(folder.name, folder, found.rows)]))
    return summary


def trained_on_metric(model: dict[str, Any], name: str, allowed: bool) -> bool:
    """Whether a model's note lists a scorer or judge among its rewards; refused (ValueError) unless `allowed`."""
    taught = name.partition("[")[0] in model.get("rewards", {})
    if taught and not allowed:
        raise ValueError(
            f"this model was trained with {name} as a reward, so {name} is no evidence of its quality; --trained-on gives the "
            "figure all the same, named so in the table"
        )
    return taught


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder's images; empty if something else drew them."""
    manifest = folder / "manifest.json"
    return read_object(manifest, way_out=GENERATE_AGAIN) if manifest.is_file() else {}


def _spread(suite: Benchmark, folder: Path) -> dict[str, float]:
    """Only the miniature knows what a prompt leaves open."""
    if not isinstance(suite, MiniSuite):
        return {}
    return diversity(suite, read_images(suite, folder), [i.id for i, _ in image_jobs(suite)])


def write_comparison_gallery(ours: Path, theirs: Path) -> None:
    """The gallery of our failures with another model's images of the same prompts and seeds beside them."""
    columns = []
    for folder in (ours, theirs):
        columns.append((folder.name, folder, results.read_verdicts(folder)))
    write_text(ours / "gallery.html", failure_gallery.failure_page(columns))
