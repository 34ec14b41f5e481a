"""Prompts of sample grids in the miniature."""

SAMPLE_PROMPTS = (
    "a picture of a red circle",
    "a picture of three squares",
    "a picture of a blue triangle and a yellow cross",
    "a picture of a circle left of a square",
    "A small yellow square. A large blue circle. Square above circle. Black background.",
    "Two small red triangles. A small green cross. Triangles left of cross. White background.",
)
