"""What the tensors of an embedding cache's shard must be."""

from advdmd.types import Json

# Of a shard of n prompts: how many dimensions each tensor has (of source images also one less), and what its type begins with.
LAYOUT = {
    **{"embeds": (3, "BF"), "pooled": (2, "BF"), "mask": (2, "I64"), "source": (5, "BF")},
    **{"null_embeds": (3, "BF"), "null_mask": (2, "I64")},
    **{"counts": (1, "I64"), "latents": (4, "BF")},
}


def fits(found: Json, n: int, whole: bool = True) -> None:
    """Raises ValueError unless tensors are what `write_shard` writes of n prompts, or without images `write_null`."""
    needed = {"embeds", "counts", "latents"} if whole else {"embeds"}
    if wrong := sorted((needed - found.keys()) | (found.keys() - LAYOUT.keys())):
        raise ValueError(f"{wrong[0]} is missing or unexpected")
    for name, v in found.items():
        dims, kind = LAYOUT[name]
        if name == "source" and len(v.get_shape()) == dims - 1:
            dims -= 1
        if len(v.get_shape()) != dims or not v.get_dtype().startswith(kind) or (name != "latents" and v.get_shape()[0] != n):
            raise ValueError(f"{name} is {v.get_dtype()} {list(v.get_shape())}")
