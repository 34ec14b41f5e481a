"""Prompts of the miniature: those of sample grids, and whether a model can read a prompt."""

from advdmd.mini.world import caption
from advdmd.models.backbone import Backbone

SAMPLE_PROMPTS = (
    "a picture of a red circle",
    "a picture of three squares",
    "a picture of a blue triangle and a yellow cross",
    "a picture of a circle left of a square",
    "A small yellow square. A large blue circle. Square above circle. Black background.",
    "Two small red triangles. A small green cross. Triangles left of cross. White background.",
)


def check_prompt(backbone: Backbone, prompt: str) -> None:
    """Raises ValueError if a prompt has words outside of the vocabulary, or is longer than the model reads."""
    caption.check_prompt(prompt)
    tokenizer = backbone.pipe.tokenizer
    limit = tokenizer.model_max_length
    if len(tokenizer(prompt).input_ids) > limit:
        raise ValueError(f"prompt {prompt!r} is longer than the {limit - 2} words this model reads: say less")
