"""What only a GPU can tell: whether runs on it are the CPU's, and what published models take of it at true size.

Two parts, each by name or both, added to what --out holds already: `same`: the miniature's recipes on the GPU and on the CPU,
twice, and resumed from a checkpoint; `size`: AdvDMD with adapters on transformers of true size with random weights, in
separate processes: peak memory beside the estimate of `advdmd show`, seconds an iteration, share of the GPU's matrix rate.

    python benchmarks/card.py [same] [size] [--only sd35-medium-80gb@512 ...] [--out results/performance/card.json]

With --tiny, on any machine: the same code with the miniature's transformers, to see that it runs.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from advdmd.commands.train import train
from advdmd.distillation import memory
from advdmd.distillation.build import Builder
from advdmd.files import write_text
from advdmd.models import loading
from advdmd.models.devices import float32_precision
from advdmd.models.quantization import quantize
from advdmd.recipes import registry
from advdmd.recipes.recipe import Recipe
from advdmd.rng import Rng
from advdmd.types import Batch, Cond

SAME = {
    "AdvDMD": ("mini-sd35-advdmd", "algorithm.dm_only_iterations=2", "algorithm.policy_ramp_iterations=4"),
    "AdvDMD, adapters": (
        "mini-sd35-advdmd",
        "algorithm.dm_only_iterations=2",
        "algorithm.policy_ramp_iterations=4",
        "lora_rank=4",
    ),
    "AdvDMD, adapters on bfloat16, checkpointing": (
        *("mini-sd35-advdmd", "algorithm.dm_only_iterations=2", "algorithm.policy_ramp_iterations=4"),
        *("lora_rank=4", "dtype=bfloat16", "gradient_checkpointing=true"),
    ),
    "AdvDMD, mini-qwen": (
        "mini-sd35-advdmd",
        "teacher=mini-qwen",
        "algorithm.dm_only_iterations=2",
        "algorithm.policy_ramp_iterations=4",
    ),
    "DMD2": ("mini-sd35-dmd2",),
    "TwinFlow": ("mini-sd35-twinflow",),
    "TwinFlow, adapters": ("mini-sd35-twinflow", "lora_rank=4"),
}
COMMON = ("iterations=6", "save_every=3", "sample_every=0", "eval_every=0", "data.num_prompts=32")
SIZE = (
    *("sd35-medium-80gb@512", "sd35-medium-80gb@1024", "sd35-large-80gb@512", "sd35-large-80gb@1024"),
    *("qwen-image-24gb@512", "qwen-image-80gb@512", "qwen-image-80gb@1024"),
)
LONG = 15  # seconds
FEW = (
    "prompts_per_step=2",
    "algorithm.group_size=2",
)  # samples an iteration, so that it takes seconds; passes are the preset's


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "transformer/diffusion_pytorch_model.safetensors")


def largest_difference(a: Path, b: Path) -> float:
    """The largest difference between two students' weights."""
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    return max(float((one[k].float() - two[k].float()).abs().max()) for k in one)


def runs(name: str, device: str, folder: Path) -> None:
    """A recipe of SAME on a device; on a GPU also once more, and resumed from the middle."""
    words = SAME[name]
    r = registry.resolve(words[0], [*words[1:], *COMMON, f"device={device}"])[1]
    train(name, r, folder / "run")
    if device == "cpu":
        return
    train(name, r, folder / "again")
    shutil.copytree(folder / "run", folder / "resumed")
    shutil.rmtree(folder / "resumed/student")
    for file in (folder / "resumed/checkpoints").glob("*0006*"):
        file.unlink()
    train(name, r, folder / "resumed")


def same(names: Sequence[str], device: str) -> dict[str, Any]:
    """Per recipe: largest difference of the student's weights between devices, two runs, and a resumed run; and how far
    they moved from the teacher's, beside which to read that."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)

        def start(name: str, on: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, __file__, "--runs", name, "--on", on, "--out", str(folder / on / name)])

        def difference_of(a: Path, b: Path) -> float | None:
            both = (a / "student").is_dir() and (b / "student").is_dir()
            return largest_difference(a / "student", b / "student") if both else None

        # A run of bfloat16 takes minutes of a CPU: the GPU is compared with itself only.
        pairs = [(n, d) for n in names for d in {"cpu", device} if d != "cpu" or "dtype=bfloat16" not in SAME[n]]
        failed = [f"{n} on {d}" for (n, d), job in [(p, start(*p)) for p in pairs] if job.wait()]
        out: dict[str, Any] = {"failed": failed}
        for name in names:
            cpu, gpu = folder / "cpu" / name / "run", folder / device / name
            teacher = loading.shipped_or_path("mini-qwen" if "teacher=mini-qwen" in SAME[name] else "mini-sd35")
            out[name] = {
                "moved": largest_difference(gpu / "run/student", teacher) if (gpu / "run/student").is_dir() else None,
                "cpu and card": difference_of(cpu, gpu / "run"),
                "run and again": difference_of(gpu / "run", gpu / "again"),
                "resumed": difference_of(gpu / "run", gpu / "resumed"),
            }
            print(name, json.dumps(out[name]), flush=True)
        return out


def clock(f: Callable[[], object]) -> float:
    wait()
    began = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - began


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(device: str, n: int) -> float:
    """Operations a second of a bfloat16 product of n x n on random data."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        torch.mm(a, b)
    return 2 * n**3 / statistics.median(clock(lambda: torch.mm(a, b)) for _ in range(10))


def backbone_of(r: Recipe, side: int, device: str, tiny: bool) -> tuple[Any, int]:
    """A backbone whose transformer has the recipe's true size and random weights, on the device; tokens of its text."""
    net, text, _ = memory.transformer(r.teacher)
    qwen = "Qwen" in type(net).__name__
    with torch.device("cpu"):
        pipe = loading.load_pipeline(loading.shipped_or_path("mini-qwen" if qwen else "mini-sd35"))
    dtype = getattr(torch, r.dtype)
    config = pipe.transformer.config if tiny else net.config
    torch.set_default_dtype(dtype)  # as the library does when it loads a model
    try:
        with torch.device(device):
            pipe.transformer = type(net).from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.transformer.to(dtype).requires_grad_(False).eval()
    if tiny:
        return loading.backbone_from_pipeline(pipe, {"side": 8, "t5_length": 0}), 16
    return loading.backbone_from_pipeline(pipe, {"side": side, "t5_length": text - memory.DEFAULT_TEXT_TOKENS}), text


def operations(forward: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    return counter.get_total_flops()


def size(case: str, device: str, tiny: bool, rounds: int = 2) -> dict[str, Any]:
    """One preset at one resolution: iterations with everything in them, on few samples."""
    began = time.perf_counter()
    preset, _, resolution = case.partition("@")
    model, _, gpu = preset.rpartition("-")
    r = registry.resolve(f"{model}-advdmd-4step-{gpu}", [*FEW, f"device={device}"])[1]
    predicted = memory.estimate(r, int(resolution))
    backbone, text = backbone_of(r, int(resolution) // 8, device, tiny)
    net = backbone.net
    width = net.config.joint_attention_dim

    def conditions(n: int) -> Cond:
        pooled = None if "pooled_projection_dim" not in net.config else torch.randn(n, net.config.pooled_projection_dim)
        mask = torch.ones(n, text, dtype=torch.long) if pooled is None else None
        return Cond(torch.randn(n, text, width), pooled, mask).to(device)

    prompts = conditions(r.prompts_per_step)
    member = torch.arange(r.prompts_per_step, device=device).repeat_interleave(r.algorithm.group_size)
    batch = Batch(prompts[member], torch.randn(r.batch, *backbone.latent_shape, device=device), member)
    n = min(r.algorithm.samples_per_pass(r.batch), r.batch)

    @torch.no_grad()
    def forward() -> None:
        backbone.velocity(net, batch.real_latents[:n], torch.full((n,), 0.5, device=device), batch.cond[:n])

    each = operations(forward) / n
    if r.base_bits < 32:
        quantize(backbone.blocks(net), r.base_bits, backbone.dtype, device)
    models = Builder(r, backbone, conditions(1)).build()
    step = r.full_iteration
    F, ids = sum(r.forwards(step).values()), list(range(r.batch))

    def iteration() -> None:
        r.algorithm.train_step(models, batch, step, Rng(0, step, ids, device=device))

    ready = time.perf_counter() - began
    if on := device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    first = clock(iteration)
    resident = torch.cuda.memory_allocated() if on else 0
    unit = min(clock(forward) for _ in range(3)) / n
    # The first is a few hundredths slower; one that takes long is not repeated.
    took = statistics.median(clock(iteration) for _ in range(rounds)) if first < LONG else first
    rate = matrix_rate(device, 8192 if on else 256)
    GB, passing = memory.GB, predicted.parts["activations"] + predicted.parts["gradients"]
    found = {
        "case": case,
        "card": torch.cuda.get_device_name() if on else "cpu",
        "recipe": f"rank {r.lora_rank}, {n} samples a pass, base {r.base_bits if r.base_bits < 32 else 16} bits",
        "predicted_gb": round(predicted.total / GB, 1),
        "predicted_standing_gb": round((predicted.total - passing) / GB, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / GB, 1) if on else None,
        "reserved_gb": round(torch.cuda.max_memory_reserved() / GB, 1) if on else None,
        "standing_gb": round(resident / GB, 1) if on else None,
        "forwards_a_sample": round(F, 1),
        "samples": r.batch,
        "seconds": round(took, 2),
        "first_seconds": round(first, 2),
        "ready_seconds": round(ready, 1),
        "eta": round(F * r.batch * unit / took, 3),
        "teraflop_a_forward": round(each / 1e12, 2),
        "forward_share": round(each / unit / rate, 3),
        "share": round(F * r.batch * each / took / rate, 3),
        "matrix_teraflops": round(rate / 1e12),
    }
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("parts", nargs="*", default=["same", "size"])
    ask.add_argument("--only", nargs="*", help="Some cases or recipes; by default all.")
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--tiny", action="store_true")
    ask.add_argument("--patience", type=float, default=120, help="seconds for a case")
    ask.add_argument("--out", type=Path, default=Path("results/performance/card.json"))
    ask.add_argument("--runs", help=argparse.SUPPRESS)
    ask.add_argument("--on", help=argparse.SUPPRESS)
    ask.add_argument("--case", help=argparse.SUPPRESS)
    args = ask.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.runs:
        return runs(args.runs, args.on, args.out)
    if args.case:
        with float32_precision("bfloat16"):  # as in these cases' runs
            return write_text(args.out, json.dumps(size(args.case, device, args.tiny, args.rounds)))
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    if "same" in args.parts:
        found["same"] = found.get("same", {}) | same([n for n in SAME if not args.only or n in args.only], device)
        write_text(args.out, json.dumps(found, indent=1))
    if "size" in args.parts:
        with tempfile.TemporaryDirectory() as place:
            for case in (c for c in SIZE if not args.only or c in args.only):
                file = Path(place) / f"{case}.json"
                command = [sys.executable, __file__, "--case", case, "--rounds", str(args.rounds), "--out", str(file)]
                try:
                    subprocess.run(command + ["--tiny"] * args.tiny, timeout=args.patience, check=True)
                    measured = json.loads(file.read_text())
                except subprocess.SubprocessError as e:
                    measured = {"case": case, "failed": type(e).__name__}
                found["size"] = [r for r in found.get("size", []) if r["case"] != case] + [measured]
                write_text(args.out, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
