"""The commands eval and score: which suite, which judge; sample, judge, score.

For students, teachers and other diffusers pipelines.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from advdmd.evaluation import failure_gallery, results, statistics, tables
from advdmd.evaluation.benchmark import Benchmark, Judge, Verdict, suite_hash
from advdmd.evaluation.dpg import DPG
from advdmd.evaluation.generate import GENERATE_AGAIN, LAYOUTS, Worker, generate, image_jobs
from advdmd.evaluation.geneval import GenEval
from advdmd.evaluation.judges import geneval_detector, vqa
from advdmd.evaluation.judging import compute_verdicts, run_judge
from advdmd.files import file_hash, read_object, write_text
from advdmd.models import loading
from advdmd.models.diffusers_pipeline import DiffusersModel, DiffusersSampling
from advdmd.models.hub import download
from advdmd.models.images import LATENTS_PER_PASS, image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.progress import Progress
from advdmd.recipes.registry import has_miniature
from advdmd.types import Json, Prompt

MINI_SUITES = ("mini-geneval", "mini-dpg")


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How images are scored: what is refused, and what is only counted."""

    worker: Worker = (0, 1)
    allow_partial: bool = False  # a figure over the images that are there, named partial
    tolerant: bool = False  # go on when the judge fails on an image
    allow_training_reward: bool = False  # score a model by its own training reward; the table says so


def suite_names() -> tuple[str, ...]:
    """The suites that are installed."""
    return (*(MINI_SUITES if has_miniature() else ()), "geneval", "dpg")


def make_suite(
    name: str,
    images: int | None = None,
    prompts: int = 48,
    split: str = "test",
    world: str = "half",
    csv: Path | None = None,
    mode: Literal["fixed", "official"] = "fixed",
) -> Benchmark:
    """A suite by name. images: per task of the miniature's suites (96), per prompt of the others (4).

    prompts, split and world are of the miniature's suites, csv and mode of DPG-Bench. Raises ValueError on what is unknown or
    does not go together.
    """
    if name not in suite_names():
        raise ValueError(f"suite {name!r}: one of {', '.join(suite_names())}")
    if csv is not None and name != "dpg":
        raise ValueError(f"--csv is dpg's; {name} has its own prompts")
    if name == "dpg":
        if csv is None:
            raise ValueError("dpg needs --csv: DPG-Bench's prompts are not shipped, name its dpg_bench.csv")
        return DPG(str(_csv_file(csv)), 4 if images is None else images, mode)
    if name == "geneval":
        return GenEval(4 if images is None else images)
    from advdmd.mini.suites import MiniSuite

    return MiniSuite(name, 96 if images is None else images, prompts, split, world)


def _csv_file(name: Path) -> Path:
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


def make_judge(suite: Benchmark, detector: Path | None, clip: Path | None, judge: str | None, device: str) -> Judge:
    """What judges a suite's images. Raises ValueError if weights that the suite's judge needs are not named."""
    if suite.name in MINI_SUITES:
        from advdmd.mini.suites import CheckerJudge

        return CheckerJudge()
    if suite.name == "geneval":
        if detector is None or clip is None:
            raise ValueError(
                "geneval needs --detector (a folder made by advdmd convert-detector, or facebook's Mask2Former, which is not "
                "comparable) and --clip (openai/clip-vit-large-patch14 as a folder)"
            )
        return geneval_detector.load_detector(download(detector), download(clip), device)
    if judge is None:
        raise ValueError(f"{suite.name} needs --judge {' or '.join(f'{k}:{v}' for k, v in vqa.JUDGES.items())}")
    return vqa.make_judge(judge, device)


def is_native(model: str) -> bool:
    """Whether a model is sampled with its backbone rather than through diffusers' own call.

    Folders with this package's metadata are: shipped teachers, and students of any size.
    """
    path = loading.shipped_or_path(model)
    return (path / "model_index.json").is_file() and bool(loading.read_metadata(path))


def generate_images(
    model: str,
    suite: Benchmark,
    folder: Path,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    batch: int | None = None,
    worker: Worker = (0, 1),
    device: str = "cpu",
    dtype: str = "auto",
) -> None:
    """Sample a suite with a model that a backbone can load; the manifest says which, and its evaluations per image.

    sampler: by default the model's own. batch: images between two writes. device, dtype: as in `loading.load_for_sampling`.

    Raises ValueError if the folder holds images of another run.
    """
    loading.check_text_to_image(loading.pipeline_class(loading.pipeline_folder(model, loading.DESCRIPTION_FILES)))
    backbone, default = loading.load_for_sampling(model, device, dtype)
    batch = batch or max(4, min(512, 4 * LATENTS_PER_PASS // math.prod(backbone.latent_shape)))
    sampler, path = sampler or default, loading.pipeline_folder(model)
    sampling = sampler.to_json()
    record = {"name": Path(model).name, **loading.read_metadata(path), **sampling}
    about = {"weights": loading.weights_hash(path), "sampling": sampling, "nfe": sampler.nfe, "model": record}
    if backbone.dtype != torch.float32:
        about["dtype"] = str(backbone.dtype).removeprefix("torch.")
    progress, done = _progress(suite, worker), [0]

    def sample(prompts: Sequence[Prompt], keys: Sequence[object]) -> np.ndarray:
        report = image_sampler(backbone, backbone.net, sampler, lambda n: progress(done[0] + n))
        images = report(prompts, keys)
        done[0] += len(prompts)
        return images

    generate(suite, sample, folder, seed, about | {"suite_hash": suite_hash(suite.items())}, batch, worker)


def generate_with_diffusers(
    model: str,
    suite: Benchmark,
    folder: Path,
    sampling: DiffusersSampling,
    seed: int = 0,
    worker: Worker = (0, 1),
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Sample a suite with any diffusers pipeline, from a folder or the hub. Raises ValueError if it cannot be loaded."""
    pipeline, progress, done = DiffusersModel(model, sampling, revision, device, dtype), _progress(suite, worker), [0]
    folder_of_model = Path(model) if Path(model).is_dir() else None
    metadata = loading.read_metadata(folder_of_model) if folder_of_model else {}
    kwargs = pipeline.call_kwargs
    about: Json = {"revision": revision, "sampling": kwargs, "dtype": dtype, "nfe": pipeline.nfe}
    about["model"] = {"name": model, **metadata, "sampling": kwargs}
    if folder_of_model:
        about["weights"] = [file_hash(f) for f in sorted(folder_of_model.rglob("*.safetensors"))]

    def sample(prompts: Sequence[Prompt], keys: Sequence[object]) -> np.ndarray:
        images = pipeline.sample(prompts, keys)
        done[0] += len(prompts)
        progress(done[0])
        return images

    generate(suite, sample, folder, seed, about | {"suite_hash": suite_hash(suite.items())}, 1, worker)


def _progress(suite: Benchmark, worker: Worker) -> Callable[[int], None]:
    return Progress(f"sampling {suite.name}", len(image_jobs(suite, worker)))


def evaluate(
    model: str | Path,
    suite: str | Benchmark,
    out: str | Path,
    sampler: SamplerConfig | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Json:
    """Sample a suite with a model into the folder `out` and score it from disk; returns the summary.

    model: shipped name, pipeline folder or hub id. suite: name or object, see `make_suite`. judge: by default the miniature's
    checker, for its suites. device, dtype: as in `loading.load_for_sampling`.

    Raises ValueError if another suite has no judge, or as `score`.
    """
    suite, out = make_suite(suite) if isinstance(suite, str) else suite, Path(out)
    generate_images(str(model), suite, out, sampler, seed, device=device, dtype=dtype)
    return score(suite, out, judge or make_judge(suite, None, None, None, "cpu"))


def score(suite: Benchmark, folder: Path, judge: Judge, options: ScoringOptions = ScoringOptions()) -> Json:
    """Score a folder of images and write the results there; returns the summary.

    Raises ValueError if images or verdicts are missing (unless partial figures are allowed), if the judge fails, or if the
    model was trained with this judge as a reward.
    """
    manifest = read_manifest(folder)
    model, seed = manifest.get("model"), manifest.get("seed", 0)
    own_reward = trained_on_metric(model or {}, judge.name, options.allow_training_reward)
    progress = Progress(f"judging {suite.name}", len(image_jobs(suite, options.worker)))
    run_judge(suite, folder, judge, options.worker, options.tolerant, progress)
    found, total = compute_verdicts(suite, folder, judge, seed), len(image_jobs(suite))
    short = total - found.excluded - len(found.rows)
    if short and not options.allow_partial:
        first = f", the first {found.missing[0]}" if found.missing else ""
        what = f"{len(found.missing)} images missing{first}; {len(found.errors)} failed"
        what += f" ({found.errors[0]})" if found.errors else f"; {LAYOUTS}" if first and not found.rows else ""
        others = options.worker != (0, 1)
        hint = "the other workers, then score again" if others else "it again; --allow-partial gives a partial figure"
        raise ValueError(f"{folder}: only {len(found.rows)}/{total} images have a verdict ({what}): run {hint}")
    if not found.rows:
        raise ValueError(f"{folder}: no image has a verdict")
    items = {i.id: i for i in suite.items()}
    verdicts = [Verdict.from_json(r) for r in found.rows]
    summary: Json = {
        "suite": suite.name,
        "suite_hash": suite_hash(suite.items()),
        "split": suite.split,
        "judge": judge.name + (tables.OWN_REWARD if own_reward else ""),
        "judge_hash": judge.fingerprint,
        "seed": seed,
        "images": len(found.rows),
        "of": total - found.excluded,
        "errors": len(found.errors),
        "dropped": found.excluded,
        "nfe": manifest.get("nfe"),
        "model": model,
        "strict": statistics.summarize(found.rows, "strict"),
        "loose": statistics.summarize(found.rows, "loose"),
        "breakdown": suite.breakdown([items[r["item"]] for r in found.rows], verdicts),
        "diversity": suite.diversity(folder) if not short else {},
    }
    results.write_results(folder, found.rows, summary)
    write_text(folder / "gallery.html", failure_gallery.failure_page([(folder.name, folder, found.rows)]))
    return summary


def trained_on_metric(model: Json, name: str, allow: bool) -> bool:
    """Whether a model's metadata list a scorer or judge among its training rewards. Raises ValueError if so, unless `allow`."""
    trained = re.split(r"\[| \(", name)[0] in model.get("rewards", {})
    if trained and not allow:
        raise ValueError(
            f"this model was trained with {name} as a reward, so {name} is no evidence of its quality; --allow-training-reward "
            "gives the figure all the same, named so in the table"
        )
    return trained


def read_manifest(folder: Path) -> Json:
    """The manifest of a folder's images; empty if another program generated them."""
    manifest = folder / "manifest.json"
    return read_object(manifest, hint=GENERATE_AGAIN) if manifest.is_file() else {}


def write_comparison_gallery(ours: Path, theirs: Path) -> None:
    """Write the gallery of our failures with another model's images of the same prompts and seeds beside them."""
    columns = [(folder.name, folder, results.read_verdicts(folder)) for folder in (ours, theirs)]
    write_text(ours / "gallery.html", failure_gallery.failure_page(columns))
