"""Kills training, encoding, generation, scoring and export at random moments, lets the same call go on, and compares.

    python runs/kill_test.py [--kills 100] [--seed 0] [--ranks 1] [--out results/reliability/kills.json]

One process: every file of the result must be equal, byte for byte, to that of a run that nobody killed, and no hidden file may
be left behind. Exports replace an older one, scoring begins with the images. Two ranks, of
which one is killed: weights must agree within 2e-4 with those of one process that nobody killed. The work is tiny and its
classes real.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from advdmd import files
from advdmd.commands import train
from advdmd.commands.encode import encode
from advdmd.commands.evaluate import generate_images, score
from advdmd.commands.export import export
from advdmd.data.embedding_cache import PROMPTS_PER_SHARD
from advdmd.mini import pipelines
from advdmd.mini.dataset import make_dataset
from advdmd.mini.suites import CheckerJudge, MiniSuite
from advdmd.mini.world.caption import VOCABULARY
from advdmd.recipes.registry import resolve

TINY = pipelines.MiniConfig(width=32, layers=2, text_width=32, vae_channels=(4, 4, 8))
WORDS = [
    *(
        "iterations=12",
        "algorithm.group_size=2",
        "prompts_per_step=4",
        "data.num_prompts=8",
        "data.images_per_prompt=2",
        "save_every=2",
        "threads=1",
    ),
    *(
        "sample_every=4",
        "eval_every=4",
        "eval_images=2",
        "algorithm.dm_only_iterations=3",
        "algorithm.policy_ramp_iterations=2",
        "discriminator.hidden_size=8",
    ),
]


def teacher(folder: Path) -> Path:
    pipelines.sd3(VOCABULARY, TINY, sd35=True).save_pretrained(folder)
    metadata = {"name": "tiny", "sampling": {"steps": 4, "guidance": 2.0}, "t5_length": 0}
    (folder / "advdmd.json").write_text(json.dumps(metadata))
    return folder


def photos(folder: Path, n: int = 3 * PROMPTS_PER_SHARD) -> Path:
    """A folder of captioned images, three shards of a cache."""
    folder.mkdir()
    dataset = make_dataset(n, 1)
    for i, image in enumerate(dataset.images):
        Image.fromarray(image[0]).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"{caption} {i}"}) for i, caption in enumerate(dataset.prompts)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def digest(folder: Path) -> dict[str, str]:
    """Relative name -> hash of every file but hidden ones; of metrics without measured times."""
    found = {}
    for f in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        data = f.read_bytes()
        if f.name == "metrics.jsonl":
            rows = [json.loads(line) for line in data.decode().splitlines()]
            data = json.dumps(
                [{k: v for k, v in r.items() if k not in ("cost/efficiency", "cost/mfu", "cost/seconds")} for r in rows]
            ).encode()
        found[str(f.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def child(work: Callable[[], object], log: Path) -> int:
    """Do `work` in a forked process, which shares what is imported; returns its pid."""
    if pid := os.fork():
        return pid
    try:
        with open(log, "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        work()
        os._exit(0)
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)


def finished(work: Callable[[], object], log: Path) -> float:
    """Seconds that `work` took; raises RuntimeError if it failed."""
    began = time.monotonic()
    if os.waitpid(child(work, log), 0)[1]:
        raise RuntimeError(f"the work failed: {log.read_text()[-2000:]}")
    return time.monotonic() - began


def trial(
    name: str,
    make: Callable[[Path], Callable[[], object]],
    kills: int,
    rng: random.Random,
    base: Path,
    before: Callable[[Path], object],
) -> dict:
    """`kills` kills of one verb, up to three in a row on one folder, which `before` makes ready, then it may finish."""
    log = base / f"{name}.log"
    whole = base / f"{name}-whole" / "out"  # all results have the same name, as some files hold it
    before(whole)
    finished(make(whole), log)  # also warms the caches of the file system
    shutil.rmtree(whole)
    before(whole)
    took = finished(make(whole), log)
    wanted, done, early, rounds, different, left = digest(whole), 0, 0, 0, [], 0
    while done < kills:
        folder = base / f"{name}-{rounds}" / "out"
        before(folder)
        for _ in range(min(rng.randint(1, 3), kills - done)):
            pid = child(make(folder), log)
            time.sleep(rng.uniform(0.02, 1.05) * took)
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            late = not os.WIFSIGNALED(status)  # it had ended already: no kill, and the moments come earlier from now on
            done, early, took = done + (not late), early + late, took * (0.9 if late else 1)
        finished(make(folder), log)
        found = digest(folder)
        different += [f"{rounds}: {k}" for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k)]
        left += sum(p.name.startswith(".") for p in (*folder.parent.iterdir(), *folder.rglob("*")))
        rounds += 1
        shutil.rmtree(folder)
        print(
            f"{name}: {done} kills ({early} came too late), {rounds} results, {len(different)} files differ, {left} left",
            flush=True,
        )
    return {
        "verb": name,
        "kills": done,
        "too late": early,
        "results": rounds,
        "files each": len(wanted),
        "different": different,
        "left behind": left,
    }


def one_process(kills: int, rng: random.Random, base: Path) -> list[dict]:
    model, images = teacher(base / "teacher"), photos(base / "photos")
    trained = base / "trained"
    finished(lambda: train.train(*resolve("mini-sd35-advdmd", [*WORDS, f"teacher={model}"]), trained), base / "first.log")
    suite = MiniSuite("mini-geneval", images_per_task=32)
    generated = base / "drawn" / "out"
    finished(lambda: generate_images(str(model), suite, generated), base / "first.log")
    verbs = {
        "train": lambda out: lambda: train.train(*resolve("mini-sd35-advdmd", [*WORDS, f"teacher={model}"]), out),
        "encode": lambda out: lambda: encode(images, str(model), out, batch=2),
        "generate": lambda out: lambda: generate_images(str(model), suite, out, batch=16),
        "score": lambda out: lambda: score(suite, out, CheckerJudge()),
        "export": lambda out: lambda: export(trained, out, overwrite=True),
    }
    fractions = {"train": 0.3, "encode": 0.2, "generate": 0.2, "score": 0.1, "export": 0.2}
    ready = {"score": lambda out: shutil.copytree(generated, out), "export": lambda out: export(trained, out)}
    nothing = lambda _: None  # noqa: E731
    return [trial(v, make, round(fractions[v] * kills), rng, base, ready.get(v, nothing)) for v, make in verbs.items()]


def start_ranks(work: Callable[[], object], ranks: int, log: Path) -> list[int]:
    """`work` in so many processes that find each other as torchrun's do; their pids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(rank: int) -> None:
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({k: str(v) for k, v in env.items()})
        work()

    return [child(partial(one, rank), log) for rank in range(ranks)]


def ends_by_itself(pid: int) -> bool:
    """Whether a process whose peer was killed ends by itself; after a minute it is ended, as torchrun would do at once."""
    for _ in range(600):
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def many_ranks(kills: int, ranks: int, rng: random.Random, base: Path) -> list[dict]:
    from safetensors.torch import load_file

    model, whole, log = teacher(base / "teacher"), base / "whole", base / "log"
    train = lambda out: lambda: train.train(*resolve("mini-sd35-advdmd", [*WORDS, f"teacher={model}"]), out)  # noqa: E731
    finished(train(whole), log)
    off, done, late, results, ended_alone = 0.0, 0, 0, 0, 0

    def finish(folder: Path) -> float:
        began = time.monotonic()
        ends = [os.waitpid(pid, 0)[1] for pid in start_ranks(train(folder), ranks, log)]
        if any(ends):
            raise RuntimeError(f"the work failed: {log.read_text()[-2000:]}")
        return time.monotonic() - began

    finish(base / "warm")
    took = finish(base / "timed")
    while done < kills:
        folder = base / f"killed-{results}"
        for _ in range(min(rng.randint(1, 3), kills - done)):
            pids = start_ranks(train(folder), ranks, log)
            time.sleep(rng.uniform(0.02, 1.05) * took)
            killed = rng.choice(pids)
            os.kill(killed, signal.SIGKILL)
            hit = os.WIFSIGNALED(os.waitpid(killed, 0)[1])
            others_ended = [ends_by_itself(pid) for pid in pids if pid != killed]
            done, late, ended_alone, took = (
                done + hit,
                late + (not hit),
                ended_alone + (hit and all(others_ended)),
                took * (1 if hit else 0.9),
            )
        finish(folder)
        a, b = (load_file(f / "checkpoints/step-0000012.safetensors") for f in (whole, folder))
        off = max(off, *((a[k] - b[k]).abs().max().item() for k in a if "/net/" in k))
        results += 1
        shutil.rmtree(folder)
        print(f"{ranks} ranks: {done} kills ({late} came too late), {results} results, weights off by {off:.2g}", flush=True)
    row = {"verb": f"train, {ranks} ranks", "kills": done, "too late": late, "results": results}
    return [row | {"others ended of themselves": ended_alone, "largest difference": off}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    files.STALE = 0  # whatever is left behind counts
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as base:
        rows = (
            one_process(args.kills, rng, Path(base)) if args.ranks == 1 else many_ranks(args.kills, args.ranks, rng, Path(base))
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        args.out.write_text(json.dumps({"commit": commit, "seed": args.seed, "rows": rows}, indent=1))
    sys.exit(any(r.get("different") or r.get("left behind") or r.get("largest difference", 0) > 2e-4 for r in rows))


if __name__ == "__main__":
    main()
