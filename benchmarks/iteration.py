"""What an iteration must cost against what it does cost: forwards counted and measured, in one run.

A forward of the batch without gradient is timed between the iterations; medians; ratios only, as clocks here drift. Where
nvidia-modelopt is installed (it needs omegaconf and pulp too), its DMD2 is measured in the same way, beside ours, and so is a
step of diffusers' LoRA script.
Usage: python benchmarks/iteration.py [--threads 1] [--rounds 7] [--out results/performance/iteration.json]
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from advdmd import flow
from advdmd.distillation.build import setup
from advdmd.recipes import registry
from advdmd.rng import Rng


def clock(f) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def rounds_of(forward: Callable[[], None], iteration: Callable[[], float], rounds: int) -> tuple[float, float]:
    """Medians over rounds of the forwards that an iteration counts and of those it takes, in units of the batch's forward,
    which is timed before and after it."""
    counts, ratios = [], []
    for i in range(rounds + 1):
        before = clock(forward) / 3
        began = time.perf_counter()
        counted = iteration()
        took = time.perf_counter() - began
        after = clock(forward) / 3
        if i:  # the first round warms up
            counts.append(counted)
            ratios.append(took / ((before + after) / 2))
    counted = statistics.mean(counts)
    per_forward = statistics.median(r / c for r, c in zip(ratios, counts, strict=True))  # as iterations need not be alike
    return counted, counted * per_forward


def forwards(backbone: Any, batch: Any) -> Callable[[], None]:
    """Three forwards of the teacher on the batch."""
    t = torch.full((len(batch),), 0.5)

    @torch.no_grad()
    def run() -> None:
        for _ in range(3):
            backbone.velocity(backbone.net, batch.real_latents, t, batch.cond)

    return run


def row(name: str, counted: float, measured: float, batch: int) -> dict[str, Any]:
    return {
        "recipe": name,
        "counted": round(counted, 2),
        "measured": round(measured, 2),
        "eta": round(counted / measured, 3),
        "batch": batch,
    }


def measure(name: str, rounds: int, threads: int, *changes: str) -> dict[str, Any]:
    """A full iteration of a recipe."""
    _, r = registry.resolve(name, ["data.num_prompts=16", f"threads={threads}", *changes])
    torch.set_num_threads(threads)
    backbone, data, models = setup(r, r.data.open(r.teacher))
    step = r.full_iteration
    batch, ids = data.batch_fn(0)

    def iteration() -> float:
        r.algorithm.train_step(models, batch, step, Rng(0, step, ids))
        return sum(r.forwards(step).values())

    return row(" ".join((name, *changes)), *rounds_of(forwards(backbone, batch), iteration, rounds), len(batch))


def modelopt_dmd2(rounds: int, threads: int) -> dict[str, Any] | None:
    """One update of the generator and one of the fake score by nvidia-modelopt's DMD2, whole networks, backward simulation,
    on the batch and grid of our recipe; passes are counted as they happen, one with gradient as three."""
    try:
        from modelopt.torch.fastgen import DMDConfig, DMDPipeline, SampleTimestepConfig  # type: ignore[import-not-found]
    except ImportError:
        return None
    _, r = registry.resolve("mini-sd35-dmd2", ["data.num_prompts=16", f"threads={threads}"])
    torch.set_num_threads(threads)
    backbone, data, _ = setup(r, r.data.open(r.teacher))
    batch, _ = data.batch_fn(0)
    shift = 1.0 if (given := r.algorithm.sampler().shift) is None else given
    student, fake_score = (copy.deepcopy(backbone.net).requires_grad_(True) for _ in range(2))
    times = SampleTimestepConfig(t_list=flow.grid(4, shift).tolist(), shift=shift)
    config = DMDConfig(
        pred_type="flow",
        guidance_scale=r.guidance_scale,
        student_sample_steps=4,
        student_sample_type="sde",
        num_train_timesteps=1000,
        backward_simulation=True,
        sample_t_cfg=times,
        fake_score_pred_type="flow",
    )
    pipe = DMDPipeline(student, backbone.net, fake_score, config)
    optims = [torch.optim.Adam(net.parameters(), lr=1e-4, fused=True) for net in (student, fake_score)]
    passes: list[int] = []
    for net in (student, fake_score, backbone.net):
        net.register_forward_hook(lambda *_: passes.append(3 if torch.is_grad_enabled() else 1))
    cond = {"encoder_hidden_states": batch.cond.embeds, "pooled_projections": batch.cond.pooled, "return_dict": False}
    negative = {"negative_encoder_hidden_states": data.null.embeds.expand(len(batch), -1, -1)}
    losses = ((pipe.compute_student_loss, negative), (pipe.compute_fake_score_loss, {}))

    def iteration() -> float:
        passes.clear()
        for optim, (loss, more) in zip(optims, losses, strict=True):
            optim.zero_grad(set_to_none=True)
            loss(batch.real_latents, torch.randn_like(batch.real_latents), **cond, **more)["total"].backward()
            torch.nn.utils.clip_grad_norm_([p for g in optim.param_groups for p in g["params"]], 1.0)
            optim.step()
        return float(sum(passes))

    return row("nvidia-modelopt DMD2, no GAN", *rounds_of(forwards(backbone, batch), iteration, rounds), len(batch))


def plain_lora(rounds: int, threads: int) -> dict[str, Any]:
    """A step of diffusers' LoRA script for SD3 (train_dreambooth_lora_sd3.py), without its logging: peft's adapters on its
    layers of the stock transformer, flow matching on the same batch, clipped gradients, AdamW."""
    from peft import LoraConfig

    layers = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "to_k", "to_out.0", "to_q", "to_v")
    _, r = registry.resolve("mini-sd35-advdmd", ["data.num_prompts=16", f"threads={threads}"])
    torch.set_num_threads(threads)
    backbone, data, _ = setup(r, r.data.open(r.teacher))
    batch, _ = data.batch_fn(0)
    net: Any = copy.deepcopy(backbone.net).requires_grad_(False)
    net.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=[f"attn.{name}" for name in layers]))
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)

    def iteration() -> float:
        noise, sigma = torch.randn_like(batch.real_latents), torch.rand(len(batch), 1, 1, 1)
        noisy = (1 - sigma) * batch.real_latents + sigma * noise
        embeds, pooled = batch.cond.embeds, batch.cond.pooled
        (v,) = net(noisy, embeds, pooled, sigma.flatten() * 1000, return_dict=False)
        (v - (noise - batch.real_latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return 2.0

    return row("LoRA training, as diffusers' script", *rounds_of(forwards(backbone, batch), iteration, rounds), len(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Recipes as they are; as adapters of a 24th of the width, as rank 64 is of SD3.5 Medium's; with one minibatch of the fake
    # score instead of two; and nvidia-modelopt's.
    names = ("mini-sd35-advdmd", "mini-sd35-dmd2", "mini-sd35-twinflow")
    runs = [(n, *c) for n in names for c in ((), ("lora_rank=4",))]
    runs += [(n, "algorithm.fake_score_updates=1") for n in names[:2]]
    runs += [("mini-sd35-dmd2", "algorithm.fake_score_updates=1", "algorithm.gan_loss_weight=0")]
    rows = [measure(n, args.rounds, args.threads, *c) for n, *c in runs]
    rows.append(plain_lora(3 * args.rounds, args.threads))
    if modelopt := modelopt_dmd2(3 * args.rounds, args.threads):  # its iterations differ in the length of their rollouts
        rows.append(modelopt)
    print("| recipe | counted F | measured F | eta |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['recipe']} | {r['counted']:g} | {r['measured']:g} | {r['eta']:.2f} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
