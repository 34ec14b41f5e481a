"""Digests of everything that a move or a rename must not change, bit for bit on one machine.

    python runs/digests.py OUT.json [--against OLD.json]

Weights after four iterations of every kind of run (algorithm x teacher x whole, adapters, adapters on bfloat16 with
checkpointing; two processes, sharded), pictures, an exported student, an evaluation table, a cache, one draw of every random
stream. A digest of tensors does not depend on their names. With --against OLD.json differences are printed and end with status
1.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from advdmd.rng import Rng, generator

SMALL = [
    "iterations=4",
    "prompts_per_step=4",
    "algorithm.group_size=4",
    "threads=1",
    "data.num_prompts=48",
    "data.images_per_prompt=2",
]
SMALL += ["save_every=4", "sample_every=2", "ema_decay=.9"]
METHODS = {
    "advdmd": [
        "-advdmd-long",
        "algorithm.dm_only_iterations=1",
        "algorithm.policy_ramp_iterations=2",
        "algorithm.micro_batch_size=8",
        "algorithm.gan_loss_weight=.1",
    ],
    "dmd2": ["-dmd2-long", "algorithm.micro_batch_size=8"],
    "twinflow": ["-twinflow"],
}
KINDS = {
    "whole": [],
    "adapters": ["lora_rank=4"],
    "adapters-bf16-checkpointing": ["lora_rank=4", "dtype=bfloat16", "gradient_checkpointing=true"],
}
PLAIN = [
    "algorithm.action=sample",
    "algorithm.credit=final",
    "algorithm.steps=2",
    "discriminator.trunk=fake",
    "discriminator.trunk_grad_scale=.01",
]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# name -> (words before `train`, recipe, overrides)
RUNS: dict[str, tuple[list[str], str, list[str]]] = {
    f"{teacher}-{method}-{kind}": ([], f"{teacher}{suffix}", [*more, *words])
    for teacher in ("mini-sd35", "mini-sd3", "mini-qwen")
    for method, (suffix, *more) in METHODS.items()
    for kind, words in KINDS.items()
} | {
    "mini-sd35-advdmd-plain": ([], "mini-sd35-advdmd", [*METHODS["advdmd"][1:], *PLAIN]),
    "mini-sd35-advdmd-eval": ([], "mini-sd35-advdmd", [*METHODS["advdmd"][1:], "eval_every=2", "eval_images=6"]),
    "two-processes-advdmd": (TWO, "mini-sd35-advdmd-long", METHODS["advdmd"][1:]),
    "two-processes-advdmd-adapters": (TWO, "mini-qwen-advdmd-long", [*METHODS["advdmd"][1:], "lora_rank=4"]),
    "two-processes-twinflow": (TWO, "mini-sd35-twinflow", []),
    "sharded-advdmd": (TWO, "mini-sd35-advdmd-long", [*METHODS["advdmd"][1:], "fsdp=true"]),
    "sharded-dmd2-bf16": (TWO, "mini-qwen-dmd2-long", [*METHODS["dmd2"][1:], "fsdp=true", "dtype=bfloat16"]),
}
STREAMS = (
    *(
        "rollout",
        "fake.k",
        "fake.k/2",
        "fake.u",
        "fake.e",
        "critic.k",
        "critic.u",
        "critic.fake",
        "critic.real",
        "critic.order",
    ),
    *("match.k", "match.k/2", "match.u", "match.e", "match.w", "match1.k", "match1.k/2", "match1.u", "match1.e", "reward.e"),
    *("t", "r", "z", "fake", "again", "again.t", "posterior", "e", "drop"),
)
KEYS = (
    ("image", ("exam", "colors-000", 0)),
    ("image", ("look", 0)),
    ("image", ("sample", 0, 0)),
    ("hops", "k"),
    (0, "epoch", 1),
    (0, "bucket", 1),
)
CLOCKS = ("cost/efficiency", "cost/mfu", "cost/seconds")


def digest(*chunks: bytes) -> str:
    return hashlib.sha256(b"".join(chunks)).hexdigest()[:16]


def of_tensors(files: list[Path]) -> str:
    """Of the tensors in some files, whatever they are called."""
    return digest(
        *sorted(
            hashlib.sha256(f"{v.dtype}{tuple(v.shape)}".encode() + v.contiguous().view(torch.uint8).numpy().tobytes()).digest()
            for f in files
            for v in (x.reshape(-1) if x.ndim == 0 else x for x in load_file(f).values())
        )
    )


def of_picture(path: Path) -> str:
    return digest(np.asarray(Image.open(path)).tobytes())


def advdmd(*words: str, before: list[str] = []) -> None:  # noqa: B006
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *(before or []), "-m", "advdmd", *words], capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"advdmd {' '.join(words)}:\n{done.stderr[-3000:]}")


def of_run(name: str, folder: Path) -> dict[str, str]:
    before, recipe, words = RUNS[name]
    out = folder / name
    advdmd("train", recipe, *SMALL, *words, "--out", str(out), before=before)
    (last,) = (out / "checkpoints").glob("step-*.safetensors")
    files = [last] if last.is_file() else sorted(last.glob("*.safetensors"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        f"{name}/checkpoint": of_tensors(files),
        f"{name}/student": of_tensors(sorted((out / "student/transformer").glob("*.safetensors"))),
        f"{name}/pictures": digest(*(of_picture(p).encode() for p in sorted((out / "samples").glob("*.png")))),
        f"{name}/metrics": digest(*(repr(sorted(v for k, v in line.items() if k not in CLOCKS)).encode() for line in lines)),
        **{f"{name}/best": of_tensors([p]) for p in out.glob("best-*.safetensors")},
    }


def of_products(folder: Path) -> dict[str, str]:
    """A student's picture here and in stock diffusers, an evaluation table, a cache."""
    student = folder / "mini-sd35-advdmd-whole/student"
    advdmd("sample", str(student), "a picture of a red circle", "--out", str(folder / "pictures"), "--threads", "1")
    advdmd("eval", str(student), "mini-dpg", "--images", "12", "--out", str(folder / "scores"), "--threads", "1")
    advdmd(
        "eval", "mini-sd35", "mini-geneval", "--images", "4", "--steps", "4", "--out", str(folder / "teacher"), "--threads", "1"
    )
    scores = [json.loads((folder / place / "scores.json").read_text()) for place in ("scores", "teacher")]
    photos = folder / "photos"
    photos.mkdir()
    for i in range(4):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 56 - 4 * i, 3), np.uint8)).save(photos / f"{i}.png")
    lines = [
        json.dumps({"file_name": f"{i}.png", "text": f"a picture of {n}"})
        for i, n in enumerate(("one circle", "two squares", "a red star", "a ring"))
    ]
    (photos / "metadata.jsonl").write_text("\n".join(lines))
    os.chdir(folder)
    advdmd("encode", "photos", "mini-sd35", "--out", "cache", "--device", "cpu", "--threads", "1")
    advdmd("encode", "photos", "mini-sd35", "--out", "drawn", "--real-images", "teacher", "--device", "cpu", "--threads", "1")
    stock = json.loads((student / "advdmd.json").read_text())["stock_call"]
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(student, text_encoder_3=None, tokenizer_3=None)
    torch.manual_seed(0)
    image = pipe("a picture of a red circle", generator=torch.Generator().manual_seed(0), **stock).images[0]
    plans = [json.loads((folder / place / "plan.json").read_text()) for place in ("cache", "drawn")]
    return {
        "sample/picture": of_picture(folder / "pictures/000.png"),
        "stock/picture": digest(np.asarray(image).tobytes()),
        "eval/scores": digest(*(json.dumps([s["scores"], s["suite_hash"], s["judge_hash"]]).encode() for s in scores)),
        "eval/record": digest(*(json.dumps(sorted(s)).encode() for s in scores)),
        "cache/plan": digest(
            json.dumps([{k: v for k, v in p.items() if k != "content"} for p in plans], sort_keys=True).encode()
        ),
        "cache/manifest": digest(*((folder / place / "manifest.json").read_bytes() for place in ("cache", "drawn"))),
        "cache/tensors": of_tensors(
            [f for place in ("cache", "drawn") for f in sorted((folder / place).glob("*.safetensors"))]
        ),
    }


def of_streams() -> dict[str, str]:
    rng = Rng(7, 3, [0, 5])
    draws = {f"stream/{name}": digest(rng.normal(name, (3,)).numpy().tobytes()) for name in STREAMS}
    return draws | {f"stream/{key}": digest(torch.randn(3, generator=generator(*key)).numpy().tobytes()) for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=lambda p: Path(p).resolve())
    parser.add_argument("--against", type=lambda p: Path(p).resolve())
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = [n for n in RUNS if args.only in n]
        in_processes, in_pairs = [n for n in names if RUNS[n][0]], [n for n in names if not RUNS[n][0]]
        found = of_streams()
        with ThreadPoolExecutor(2) as pool:  # two single-threaded runs at a time
            for of in pool.map(lambda n: of_run(n, folder), in_pairs):
                found |= of
        for n in in_processes:
            found |= of_run(n, folder)
        if not args.only:
            found |= of_products(folder)
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if args.against:
        old = json.loads(args.against.read_text())
        changed = sorted(k for k in found if found[k] != old.get(k))
        print(f"{len(found) - len(changed)} of {len(found)} digests are equal", *changed, sep="\n")
        sys.exit(bool(changed))


if __name__ == "__main__":
    main()
