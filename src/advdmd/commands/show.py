"""The command show: a table of recipes, or one recipe with what it costs and the memory it takes."""

from advdmd.distillation import cost, memory
from advdmd.distillation.memory import GB
from advdmd.distillation.micro_batch import fitted
from advdmd.recipes import registry
from advdmd.recipes.overrides import dump
from advdmd.recipes.published import name_parts, preset_from_name
from advdmd.recipes.recipe import Recipe


def recipe_table() -> str:
    """All recipes as a table; those of equal steps and presets share a row: a model's methods, or models without presets."""
    rows: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for name in registry.known_recipes():
        model, method, steps, preset = _parts(name)
        known_steps, presets = rows.setdefault((model, method), ([], []))
        known_steps += [steps] if steps not in known_steps else []
        presets += [preset] if preset and preset not in presets else []
    models = list(dict.fromkeys(model for model, _ in rows))
    shared: dict[tuple[str, ...], tuple[list[str], list[str]]] = {}
    for (model, method), (steps, presets) in sorted(rows.items(), key=lambda row: models.index(row[0][0])):
        own = model if presets else method
        of, methods = shared.setdefault((own, ", ".join(steps), ", ".join(presets) or "-"), ([], []))
        of += [model] if model not in of else []
        methods += [method] if method not in methods else []
    cells = [("model", "algorithm", "steps", "presets")]
    cells += [(", ".join(of), ", ".join(methods), *key[1:]) for key, (of, methods) in shared.items()]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines) + (
        "\n\nName of a recipe: MODEL-ALGORITHM for the miniature (mini-...), MODEL-ALGORITHM-STEPSstep-PRESET for published "
        "models,\nfor example mini-sd35-advdmd and sd35-medium-advdmd-4step-24gb. `advdmd show NAME` prints settings, cost and "
        "memory."
    )


def _parts(name: str) -> tuple[str, str, str, str]:
    """Model, method, steps and preset of a recipe, of which published models' names have all four."""
    if found := name_parts(name):
        return found
    r = registry.recipe_by_name(name)
    return r.teacher, name.removeprefix(f"{r.teacher}-"), str(r.algorithm.steps), ""


def describe(
    name: str,
    r: Recipe,
    gpu_memory: float | None = None,
    gpus: int | None = None,
    resolution: int | None = None,
    gpu: str | None = None,
    nodes: int = 1,
    bandwidth: float = 25.0,  # InfiniBand of 200 Gbit/s
) -> str:
    """A recipe's settings, the forward passes of an iteration and, for published models, the memory of each GPU.

    gpu_memory in GB, gpus and resolution in pixels default to the preset of the recipe's name, then to one GPU and 1024 pixels.
    gpu: a kind of GPU (distillation.cost.MEASURED), for the hours. nodes: machines that the GPUs are on, with `bandwidth` GB/s
    between them. Raises ValueError if the GPUs cannot share an iteration, if rates of the GPU were not measured, if the
    transformer's memory is not known, and on a GPU for the miniature.
    """
    full = r.forwards(r.full_iteration)
    mean = r.forwards_until(r.iterations) / r.iterations
    parts = ", ".join(f"{k} {v:g}" for k, v in full.items())
    lines = [
        dump(name, r),
        f"forwards per sample, a full iteration: {parts} = {sum(full.values()):g}",
        f"mean over the schedule: {mean:.1f}; {r.iterations} iterations of {r.batch} samples",
    ]
    if r.data.has_validation and gpu is not None:
        raise ValueError(f"gpu={gpu}: {r.teacher} is of the miniature, whose runs take minutes on a laptop")
    if r.data.has_validation and gpu_memory is None:  # of the miniature, which any machine holds
        return "\n".join(lines)
    if preset := preset_from_name(name):
        gpu_memory, gpus = gpu_memory or preset.gpu_memory, gpus or preset.gpus
        resolution = resolution or preset.resolution
    gpus, resolution = gpus or 1, resolution or 1024
    r.check_world_size(gpus)
    if gpus % nodes:
        raise ValueError(f"nodes={nodes}: {gpus} GPUs are not the same number on each")
    if r.algorithm.fits_passes_to_gpu:
        r = fitted(r, resolution, gpus, gpu_memory)
        lines.append(
            f"algorithm.micro_batch_size=auto: {r.algorithm.samples_per_pass(r.batch)} samples a pass, by the estimate"
        )
    need = memory.estimate(r, resolution, gpus, nodes)
    adapters = f", {need.adapter / 1e6:.0f} M in each of {need.networks} adapters" if need.adapter else ""
    which = "one GPU" if gpus == 1 else f"each of {gpus} GPUs"
    lines += [
        f"transformer: {need.base / 1e9:.2f} B parameters{adapters}",
        f"memory of {which} at {resolution} pixels, GB: " + ", ".join(f"{k} {v / GB:.1f}" for k, v in need.parts.items()),
        f"in all {need.total / GB:.1f} GB; activations are an estimate",
    ]
    if gpu_memory is not None:
        lines.append(memory.fit_advice(r, need, gpu_memory))
    if gpus > 1:
        lines.append(cost.traffic_line(r, gpus, nodes, bandwidth))
    if gpu is not None:
        lines.append(cost.hours(r, name, gpu, resolution, gpus))
    return "\n".join(lines)
