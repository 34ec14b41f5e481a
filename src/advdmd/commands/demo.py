"""The compare page: a teacher beside its students, the same prompt and noise, with cost, time and the checker's result."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from advdmd.commands.sample import check_prompts
from advdmd.models import loading
from advdmd.models.backbone import Backbone
from advdmd.models.images import image_grid, image_sampler
from advdmd.models.sampler import SamplerConfig
from advdmd.monitoring.html_report import labels
from advdmd.recipes.registry import has_miniature

MOST_STEPS, MOST_IMAGES, QUEUE, LONGEST = 50, 16, 8, 400  # what a visitor may ask for; characters of a prompt
EXAMPLE = "a picture of a red circle left of a blue square"
SMALL = 64  # pixels of a side
WIDE = 300  # pixels of a control: on a phone one below the other
STYLE = """
.small img { image-rendering: pixelated; width: auto; max-width: 100%; margin: auto }
.picture [data-testid=block-label] { position: static; max-width: none; padding-right: 5em }
.picture .image-container { position: static }
"""  # name and buttons stand above their picture, where the library puts them over it


@dataclass(frozen=True)
class DemoModel:
    """A pipeline that is shown, with its own way of sampling."""

    label: str
    backbone: Backbone
    sampler: SamplerConfig

    @property
    def is_teacher(self) -> bool:
        """Whether it takes any number of steps, as the ODE does."""
        return self.sampler.eta is None and self.sampler.last_time is None

    @property
    def is_small(self) -> bool:
        """Whether its images are shown enlarged, without smoothing."""
        return self.backbone.pipe.vae_scale_factor * self.backbone.latent_shape[-1] <= SMALL

    @classmethod
    def read(cls, name: str, device: str = "auto", dtype: str = "auto") -> "DemoModel":
        """A model by name on a device. Raises ValueError if it cannot be loaded."""
        loading.check_text_to_image(loading.pipeline_class(loading.pipeline_folder(name, loading.DESCRIPTION_FILES)))
        backbone, sampler = loading.load_for_sampling(name, device, dtype)
        path = loading.pipeline_folder(name)
        made_by = loading.read_metadata(path).get("recipe")
        return cls(f"student of {made_by}" if made_by else f"teacher {path.name}", backbone, sampler)

    def sample(self, prompt: str, seed: int, images: int, steps: int | None = None) -> tuple[np.ndarray, str]:
        """Images [images, H, W, 3] and a line: steps, evaluations, seconds, checker's result. A student keeps its own steps."""
        sampler = replace(self.sampler, steps=steps) if steps and self.is_teacher else self.sampler
        began = time.perf_counter()
        drawn = image_sampler(self.backbone, self.backbone.net, sampler)(
            [prompt] * images, [("demo", k, seed) for k in range(images)]
        )
        took = time.perf_counter() - began
        line = f"**{self.label}**: {sampler.steps} steps, {sampler.nfe} evaluations an image, {took:.2f} s"
        return drawn, f"{line}\n\n{self.check_result(prompt, drawn)}"

    def check_result(self, prompt: str, images: np.ndarray) -> str:
        """What the miniature's checker finds in images [N, 32, 32, 3]; empty for other models."""
        if not has_miniature():
            return ""
        from advdmd.mini.pipelines import is_mini_pipeline
        from advdmd.mini.suites import MiniSuite, item_of

        if not is_mini_pipeline(self.backbone):
            return ""
        try:
            item = item_of(prompt)
        except ValueError:
            return "not checked: the prompt is not one of the checker's sentences"
        found = MiniSuite("mini-dpg").judge_images([item] * len(images), images)
        right = sum(v.strict == 1 for v in found)
        wrong = next((v.reason.replace("\n", "; ") for v in found if v.strict < 1), "")
        return f"{right} of {len(found)} right" + (f"; first miss: {wrong}" if wrong else "")


def compare(
    models: Sequence[DemoModel], prompt: str, steps: float, seed: float, images: float
) -> list[tuple[Image.Image, str]]:
    """A sheet and its line for each model. Raises ValueError on a prompt or a number outside of what is allowed."""
    if len(prompt) > LONGEST:
        raise ValueError(f"the prompt has {len(prompt)} characters: at most {LONGEST}")
    if None in (steps, seed, images):
        raise ValueError("steps, seed and images are numbers: one of them is empty")
    for name, value, least, most in (
        ("steps", steps, 1, MOST_STEPS),
        ("images", images, 1, MOST_IMAGES),
        ("seed", seed, 0, 2**31 - 1),
    ):
        if not (math.isfinite(value) and value == int(value) and least <= value <= most):
            raise ValueError(f"{name}={value:.10g}: a whole number from {least} to {most}")
    for m in models:
        check_prompts(m.backbone, [prompt])
    drawn = [m.sample(prompt, int(seed), int(images), int(steps)) for m in models]
    return [(sheet(found), line) for found, line in drawn]


def answers(models: Sequence[DemoModel], *asked: Any) -> list[Any]:
    """What the page shows: a status, then a sheet and a line for each model; after an error nothing of an earlier question."""
    try:
        found = compare(models, *asked)
    except ValueError as e:
        return [f"**{e}**", *[None, ""] * len(models)]
    return ["", *(x for pair in found for x in pair)]


def sheet(images: np.ndarray) -> Image.Image:
    """Images [N, H, W, 3] uint8 on a square sheet; between them and where there is none it is transparent."""
    columns = math.ceil(math.sqrt(len(images)))
    opaque = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255)
    rows = np.pad(opaque, ((0, -len(images) % columns), (0, 0), (0, 0), (0, 0))).reshape(-1, columns, *opaque.shape[1:])
    return image_grid(list(rows), max(1, 512 // (columns * images.shape[1])), gap=0)


def distinct(models: Sequence[DemoModel], names: Sequence[str]) -> list[DemoModel]:
    """The models with labels that tell them apart: by the ends of their folders' paths where two are called the same."""
    if len({m.label for m in models}) == len(models):
        return list(models)
    ends = labels([loading.shipped_or_path(n) for n in names])
    return [replace(m, label=f"{m.label} ({end})") for m, end in zip(models, ends, strict=True)]


def page(models: Sequence[DemoModel]) -> Any:
    """The page as a gradio Blocks. Raises ValueError where gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("the compare page needs gradio: pip install 'advdmd[demo]'") from None

    teacher = next((m for m in models if m.is_teacher), models[0])
    with gr.Blocks(title="advdmd", analytics_enabled=False) as blocks:
        gr.Markdown("# Teacher beside students\nThe same prompt and noise for all. Students take the steps they were made for.")
        prompt = gr.Textbox(EXAMPLE, label="Prompt", max_length=LONGEST, elem_id="prompt")
        with gr.Row():
            steps = gr.Slider(1, MOST_STEPS, teacher.sampler.steps, step=1, label="Teacher's steps", min_width=WIDE)
            seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=WIDE)
            images = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Number of images", min_width=WIDE)
        button = gr.Button("Generate", variant="primary", elem_id="draw")
        status = gr.Markdown(elem_id="status")
        shown: list[Any] = []
        with gr.Row():
            for i, m in enumerate(models):
                with gr.Column(min_width=260):
                    picture = gr.Image(
                        format="png",
                        label=m.label,
                        buttons=["download", "fullscreen"],
                        elem_id=f"picture-{i}",
                        elem_classes=["picture", *["small"] * m.is_small],
                    )
                    shown.append(picture)
                    shown.append(gr.Markdown(elem_id=f"line-{i}"))

        for event in (button.click, prompt.submit):
            event(
                partial(answers, models),
                [prompt, steps, seed, images],
                [status, *shown],
                concurrency_limit=1,
                concurrency_id="draw",
                api_name="draw",
            )
    return blocks.queue(max_size=QUEUE)


def serve(names: Sequence[str], port: int, threads: int, device: str = "auto", dtype: str = "auto") -> None:
    """Show the models on loopback until interrupted. Raises ValueError, before anything is served, on what cannot be loaded."""
    torch.set_num_threads(threads)
    blocks = page(distinct([DemoModel.read(n, device, dtype) for n in names], names))
    import gradio as gr

    plain = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no fonts from afar
    blocks.launch(server_name="127.0.0.1", server_port=port, share=False, theme=plain, css=STYLE, show_error=False)
