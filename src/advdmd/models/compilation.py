"""Transformer blocks, compiled once for each kind, role and mode: under whole networks, adapters and checkpointing."""

# torch leaves these types open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportPrivateImportUsage=false

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch import nn

# Graphs of one class of blocks: kinds of blocks x roles x shapes x with and without gradient. Beyond that torch runs eagerly.
GRAPH_LIMIT = 256

_compiled: dict[tuple[type, str], Any] = {}  # a class's forward function, compiled, by backend


def compile_blocks(blocks: Sequence[nn.Module], backend: str | Callable[..., Any] = "inductor") -> None:
    """Have the blocks run a compiled forward function: one of their class, so that equal blocks share its graphs.

    A mode has a graph for its first size of batch, and one for all others. The compiled function is a method of each block, so
    that a copy of a block runs with its own weights. What inductor cannot compile runs eagerly.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPH_LIMIT)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 16 * GRAPH_LIMIT)
    if backend == "inductor":  # where it cannot compile, blocks run as they are, and torch says why
        torch._dynamo.config.suppress_errors = True
    for block in blocks:
        key = (type(block), str(backend))
        if key not in _compiled:
            _compiled[key] = torch.compile(type(block).forward, backend=backend)
        block.forward = MethodType(_compiled[key], block)
