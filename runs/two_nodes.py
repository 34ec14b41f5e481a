"""Two nodes of two processes each, as two torchrun agents on one machine: one is killed, both start again, the run goes on.

    python runs/two_nodes.py [--out results/reliability/two_nodes.json]

Networks are sharded inside a node, with replicas across (fsdp_sharding=hybrid). Each node runs its agent in a loop, as in
docs/own-model.md. The student must be that of one process.
"""

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

WORDS = [
    *("mini-sd35-advdmd", "fsdp=true", "fsdp_sharding=hybrid", "iterations=24", "save_every=4", "sample_every=0", "threads=1"),
    *("algorithm.dm_only_iterations=6", "algorithm.policy_ramp_iterations=12", "data.num_prompts=64", "eval_every=0"),
]
TIMEOUT = 900  # seconds of the whole


def node(rank: int, port: int, out: Path) -> subprocess.Popen[str]:
    """One node's agent, which is started again until the run has ended."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=2"),
        *("--master-addr=127.0.0.1", f"--master-port={port}", "-m", "advdmd", "train", *WORDS, "--out", str(out)),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    loop = f"until {shlex.join(command)}; do echo again; sleep 2; done"
    return subprocess.Popen(["bash", "-c", loop], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def descendants(pid: int) -> list[int]:
    children = [int(c) for c in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]
    return [d for c in children for d in (c, *descendants(c))]


def largest_difference(a: Path, b: Path) -> float:
    ours, theirs = (load_file(f / "student/transformer/diffusion_pytorch_model.safetensors") for f in (a, b))
    return max(float((ours[k] - theirs[k]).abs().max()) for k in ours)


def main() -> None:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    ask.add_argument("--out", type=Path)
    out = ask.parse_args().out
    with tempfile.TemporaryDirectory() as place, socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port, shared, alone = s.getsockname()[1], Path(place) / "shared", Path(place) / "alone"
        s.close()
        began = time.monotonic()
        nodes = [node(rank, port, shared) for rank in (0, 1)]
        while not list(shared.glob("checkpoints/step-*.json")) and time.monotonic() - began < TIMEOUT:
            time.sleep(0.5)
        killed_at = max(int(f.stem.partition("-")[2]) for f in shared.glob("checkpoints/step-*.json"))
        for pid in descendants(nodes[1].pid):
            os.kill(pid, signal.SIGKILL)
        again = [n.communicate(timeout=TIMEOUT)[0].count("again") for n in nodes]
        steps = [json.loads(line)["step"] for line in (shared / "metrics.jsonl").read_text().splitlines()]
        subprocess.run([sys.executable, "-m", "advdmd", "train", *WORDS, "--out", str(alone)], check=True, capture_output=True)
        found = {
            "nodes": 2,
            "processes of a node": 2,
            "iterations": len(steps),
            "second node's processes killed after a checkpoint at": killed_at,
            "starts of each node's agent": [n + 1 for n in again],
            "every iteration logged once": steps == list(range(24)),
            "largest difference of a weight to one process": largest_difference(shared, alone),
        }
    print(json.dumps(found, indent=1))
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
