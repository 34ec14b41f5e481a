"""Two processes are one: the same run, however many processes start it and go on with it."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from advdmd.commands import train
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.training import checkpoint, distributed
from advdmd.types import Ranks

COMMON = [
    "iterations=4", "algorithm.group_size=2", "prompts_per_step=4", "data.num_prompts=8", "data.images_per_prompt=2",
    "save_every=2", "sample_every=0",
    "threads=1", "discriminator.hidden_size=8", "seed=3",
]  # fmt: skip
# Policy updates from the second iteration on, whatever the discriminator has learned by then.
WORDS = [*COMMON, "algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=1", "algorithm.auc_gating=false"]
# Two rollouts' gradients are gathered for a step: the last checkpoint holds the second step's first rollout.
GATHERED = [
    "algorithm.policy=forward",
    "algorithm.policy_step=agreement",
    "algorithm.max_policy_rollouts=2",
    "algorithm.min_agreement=1",
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "advdmd"]


def train_in_processes(folder, teacher, n=2, words=WORDS, recipe="mini-sd35-advdmd"):
    """A run by n processes that find each other as torchrun's do; forked, since importing again takes longer than the run."""
    if n == 1:
        return train_in_this_process(folder, teacher, words, recipe)
    in_forked_processes(n, lambda rank: train_in_this_process(folder, teacher, words, recipe))
    return folder


def in_forked_processes(n, do, **more):
    """do(rank) in n forked processes that find each other; all must end well. more: further variables of torchrun's."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(rank):
        env = {"RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | more
        os.environ.update({k: str(v) for k, v in env.items()})
        do(rank)

    jobs = [multiprocessing.get_context("fork").Process(target=one, args=(rank,), daemon=True) for rank in range(n)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(240)
    assert [job.exitcode for job in jobs] == [0] * n


def train_in_this_process(folder, teacher, words, recipe="mini-sd35-advdmd"):
    train.train(*resolve(recipe, [f"teacher={teacher}", *words]), folder)
    return folder


def test_a_process_that_ends_before_it_begins_is_an_error_at_once():
    before = dict(os.environ)
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(ValueError, match="process 1 of 2 ended with status 7"), distributed.local_processes(2, command):
        pass
    assert dict(os.environ) == before


def test_processes_that_a_command_starts_end_with_it(tmp_path):
    """The other process reports that it begins, and then waits for ever."""
    write = f"import os, pathlib, time; pathlib.Path('{tmp_path}/pid').write_text(str(os.getpid()))"
    begin = f"os.write(int(os.environ['{distributed.READY}']), b'1'); time.sleep(600)"
    command = [sys.executable, "-c", f"{write}; {begin}"]
    with distributed.local_processes(2, command):
        assert distributed.rank_and_world_size() == (0, 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def metrics_agree(a, b, absolute=1e-3):
    rows = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (a, b)]
    assert [len(r) for r in rows] == [4, 4]
    for ours, theirs in zip(*rows, strict=True):
        assert set(ours) == set(theirs)
        for k in set(ours) - {"cost/efficiency", "cost/mfu", "cost/seconds"}:
            # Scores are counts of answers: a last digit may change one answer of 120.
            near = 0.02 if k.startswith("eval/") else absolute
            assert ours[k] == pytest.approx(theirs[k], rel=5e-3, abs=near), k


def as_if_stopped_after_two_iterations(folder):
    """As if the run had been stopped after its second iteration."""
    for f in folder.glob("checkpoints/step-0000004*"):
        shutil.rmtree(f) if f.is_dir() else f.unlink()
    shutil.rmtree(folder / "student")
    return folder


def last(folder):
    path = max((folder / "checkpoints").glob("*.safetensors"))
    return path.stem, load_file(path)


def checkpoints_agree(a, b, rtol=1e-3):
    """Weights of two checkpoints, up to what summing in another order does."""
    (step_a, a), (step_b, b) = last(a), last(b)
    assert step_a == step_b
    assert set(a) == set(b)
    for k in a:
        if "/net/" in k or k.startswith("extra"):
            torch.testing.assert_close(a[k], b[k], rtol=rtol, atol=2e-4, msg=lambda m, k=k: f"{k}: {m}")


@pytest.fixture(scope="module")
def one_process(tiny_folder, tmp_path_factory):
    return train_in_this_process(tmp_path_factory.mktemp("alone") / "run", tiny_folder, WORDS)


@pytest.fixture(scope="module")
def two_processes(tiny_folder, tmp_path_factory):
    return train_in_processes(tmp_path_factory.mktemp("both") / "run", tiny_folder)


def test_two_processes_run_as_one_does(one_process, two_processes):
    checkpoints_agree(one_process, two_processes)
    metrics_agree(one_process, two_processes)
    assert (two_processes / "student/model_index.json").is_file()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("mini-sd35-advdmd", [*WORDS, "lora_rank=4"]),
        ("mini-sd35-advdmd", [*WORDS, "lora_rank=4", *GATHERED]),
        ("mini-sd35-twinflow", [*COMMON, "lora_rank=4"]),
    ],
)
def test_replicas_of_adapters_run_as_one_process_does(recipe, words, tiny_folder, tmp_path):
    one, two = (train_in_processes(tmp_path / str(n), tiny_folder, n, words, recipe) for n in (1, 2))
    metrics_agree(one, two)
    checkpoints_agree(one, two)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_a_run(one_process, two_processes, tiny_folder, tmp_path, first, then):
    folder = as_if_stopped_after_two_iterations(shutil.copytree(one_process if first == 1 else two_processes, tmp_path / "run"))
    checkpoints_agree(train_in_processes(folder, tiny_folder, n=then), one_process)


def test_prompts_that_do_not_divide_over_the_processes_are_refused(tiny_folder, tmp_path):
    command = [
        *TORCHRUN,
        "train",
        "mini-sd35-advdmd",
        f"teacher={tiny_folder}",
        *WORDS,
        "prompts_per_step=3",
        "--out",
        tmp_path / "r",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode != 0
    assert "prompts_per_step=3 cannot be shared by 2 processes" in done.stderr
    assert not (tmp_path / "r").exists()
    small = resolve("mini-sd35-twinflow", ["algorithm.group_size=2", "prompts_per_step=2"])[1]
    small.check_world_size(1)
    with pytest.raises(ValueError, match="4 samples an iteration are 2 in each of 2 processes"):
        small.check_world_size(2)


def test_minibatches_are_the_same_for_any_number_of_ranks():
    whole = Rng(1, 2, range(8)).minibatches("order", 3, 2)
    parts = [Rng(1, 2, range(4 * r, 4 * r + 4), Ranks(rank=r, world_size=2)).minibatches("order", 3, 2) for r in (0, 1)]
    for (m, passes), (a, ours), (b, theirs) in zip(whole, *parts, strict=True):
        assert passes == -(-len(m) // 2)
        assert ours == theirs == -(-max(len(a), len(b)) // 2), "all make as many"
        assert sorted(m.tolist()) == sorted([*a.tolist(), *(b + 4).tolist()])
    assert sorted(torch.cat([m for m, _ in whole]).tolist()) == list(range(8))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_stopped_by_sigterm_leaves_a_checkpoint_of_its_last_iteration(processes, tiny_folder, tmp_path):
    """As a cluster sends it: all processes stop after the same iteration, and nothing is lost or done twice."""
    import signal
    import time

    words = ["mini-sd35-dmd2", f"teacher={tiny_folder}", *COMMON, "save_every=0", "sample_every=0"]
    launch = TORCHRUN if processes == 2 else [sys.executable, "-m", "advdmd"]
    command = [*launch, "train", *words, "iterations=4000", "--out", str(tmp_path / "r")]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet)
    until, metrics = time.monotonic() + 120, tmp_path / "r/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < until:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "stopped by SIGTERM after iteration" in stderr
    rows = metrics.read_text().splitlines()
    assert last(tmp_path / "r")[0] == f"step-{len(rows):07d}"
    assert not (tmp_path / "r/student").exists()


def test_a_killed_process_ends_the_job_with_a_message_and_the_run_goes_on_later(tiny_folder, tmp_path):
    import signal
    import time

    words = [*COMMON, "iterations=300", "save_every=3"]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*TORCHRUN, "train", "mini-sd35-dmd2", f"teacher={tiny_folder}", *words, "--out", str(tmp_path / "r")]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet)
    until = time.monotonic() + 120
    while not list((tmp_path / "r/checkpoints").glob("step-*.json")) and time.monotonic() < until:
        time.sleep(0.2)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2
    os.kill(int(workers[1]), signal.SIGKILL)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "another process is gone" in stderr
    assert last(tmp_path / "r")[0] >= "step-0000003"


SHARDED = [
    *WORDS,
    *GATHERED,
    "fsdp=true",
    "algorithm.discriminator_every_nth_sample=2",
    "discriminator.trunk=own",
    "sample_every=2",
    "eval_every=2",
    "eval_images=2",
]


def students_agree(a, b):
    ours, theirs = (load_file(f / "student/transformer/diffusion_pytorch_model.safetensors") for f in (a, b))
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], rtol=1e-3, atol=2e-4, msg=lambda m, k=k: f"{k}: {m}")


@pytest.fixture(scope="module")
def one_process_sharded(tiny_folder, tmp_path_factory):
    return train_in_this_process(tmp_path_factory.mktemp("alone") / "run", tiny_folder, SHARDED)


@pytest.fixture(scope="module")
def sharded(tiny_folder, tmp_path_factory):
    return train_in_processes(tmp_path_factory.mktemp("sharded") / "run", tiny_folder, words=SHARDED)


def test_networks_sharded_over_two_processes_run_as_one_process_does(one_process_sharded, sharded):
    """FSDP2: the same student, metrics and validations."""
    assert len(list(sharded.glob("checkpoints/step-0000004.safetensors/*.safetensors"))) == 2, "each wrote its shards"
    students_agree(sharded, one_process_sharded)
    metrics_agree(sharded, one_process_sharded, 2e-3)


@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_a_sharded_run(
    one_process_sharded, sharded, tiny_folder, tmp_path, first, then
):
    folder = as_if_stopped_after_two_iterations(
        shutil.copytree(one_process_sharded if first == 1 else sharded, tmp_path / "run")
    )
    students_agree(train_in_processes(folder, tiny_folder, n=then, words=SHARDED), one_process_sharded)


HYBRID = [*WORDS, "fsdp=true", "fsdp_sharding=hybrid", "discriminator.trunk=own"]


@pytest.fixture(scope="module")
def one_process_hybrid(tiny_folder, tmp_path_factory):
    return train_in_this_process(tmp_path_factory.mktemp("alone") / "run", tiny_folder, HYBRID)


@pytest.fixture(scope="module")
def two_nodes(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes") / "run"
    in_forked_processes(4, lambda rank: train_in_this_process(folder, tiny_folder, HYBRID), LOCAL_WORLD_SIZE=2)
    return folder


def test_two_nodes_of_two_processes_with_replicas_run_as_one_process_does(one_process_hybrid, two_nodes):
    """A two-dimensional mesh: shards inside a node, replicas across. A norm over shards that counted replicas would differ."""
    students_agree(two_nodes, one_process_hybrid)
    metrics_agree(two_nodes, one_process_hybrid, 2e-3)


def test_one_process_finishes_a_run_that_two_nodes_began(one_process_hybrid, two_nodes, tiny_folder, tmp_path):
    folder = as_if_stopped_after_two_iterations(shutil.copytree(two_nodes, tmp_path / "run"))
    students_agree(train_in_this_process(folder, tiny_folder, HYBRID), one_process_hybrid)


def test_a_hybrid_mesh_has_one_row_of_processes_for_each_node():
    def check(rank):
        with distributed.init_distributed():
            mesh = distributed._mesh("cpu", hybrid=True)
            assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
            assert distributed._mesh("cpu", hybrid=False).mesh.tolist() == [0, 1, 2, 3]
            os.environ["LOCAL_WORLD_SIZE"] = "3"
            with pytest.raises(ValueError, match="4 processes are not the same number on every node"):
                distributed._mesh("cpu", hybrid=True)

    in_forked_processes(4, check, LOCAL_WORLD_SIZE=2)


@pytest.mark.parametrize("bucket", [1, 7, 2**23])
def test_gradients_are_summed_for_any_size_of_a_bucket(bucket):
    def check(rank):
        with distributed.init_distributed():
            distributed.BUCKET = bucket
            params = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 9, 2, 5)]
            for i, p in enumerate(params[:4]):
                if (i, rank) != (1, 0):  # one rank had no sample for it; the last has none anywhere
                    p.grad = torch.arange(p.numel(), dtype=torch.float32) + 10 * rank
            held = [p.grad for p in params]
            total, count = distributed.all_reduce_gradients(params, torch.tensor(0.5 + rank, dtype=torch.float64), 1 + rank)
            assert (total.item(), count) == (2.0, 3)
            for i, p in enumerate(params[:4]):
                once, rows = torch.arange(p.numel(), dtype=torch.float32), (1, 2)[i != 1]
                assert torch.equal(p.grad, rows * once + 10)
                assert held[i] is None or p.grad is held[i], "in place"
            assert params[4].grad is None

    in_forked_processes(2, check)


def test_a_checkpoint_with_a_damaged_shard_is_passed_over(sharded, tmp_path, capsys):
    folder = shutil.copytree(sharded, tmp_path / "run") / "checkpoints"
    shard = max(folder.glob("step-0000004.safetensors/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert checkpoint.latest(folder)[1]["step"] == 2
    assert "damaged" in capsys.readouterr().out


def test_processes_with_different_checkpoints_are_refused(sharded, tmp_path):
    folders = [shutil.copytree(sharded / "checkpoints", tmp_path / str(rank)) for rank in (0, 1)]

    def check(rank):
        with distributed.init_distributed():
            assert checkpoint.latest(folders[0])[1]["step"] == 4
            with pytest.raises(ValueError, match="all processes must use one shared folder"):
                checkpoint.latest(folders[rank])

    max(folders[1].glob("step-*.json")).unlink()
    in_forked_processes(2, check)


def test_leftovers_of_a_killed_write_do_not_stop_a_run_with_another_number_of_processes(
    one_process_sharded, sharded, tiny_folder, tmp_path
):
    """Shards, or a file, of a checkpoint that was being written when the run was killed."""
    for name, source, n in (("file", one_process_sharded, 2), ("shards", sharded, 1)):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / "checkpoints/step-0000004.json").unlink()
        shutil.rmtree(folder / "student")
        students_agree(train_in_processes(folder, tiny_folder, n=n, words=SHARDED), one_process_sharded)


def test_passes_in_bfloat16_keep_trained_weights_in_float32(tiny_folder, tmp_path):
    """Of networks that are sharded and checkpointed, with a GAN; in one process the same recipe is all float32, and close."""
    words = [*SHARDED, "dtype=bfloat16", "gradient_checkpointing=true", "algorithm.gan_loss_weight=0.1"]
    train_in_processes(tmp_path / "both", tiny_folder, words=words)
    _, one_process = last(train_in_this_process(tmp_path / "alone", tiny_folder, words))
    assert {v.dtype for k, v in one_process.items() if "/net/" in k or "/ema/" in k} == {torch.float32}
    shards = [load_file(f) for f in (tmp_path / "both/checkpoints/step-0000004.safetensors").glob("*.safetensors")]
    assert {v.dtype for part in shards for k, v in part.items() if "/net/" in k or "/ema/" in k} == {torch.float32}
    ours, theirs = (
        load_file(tmp_path / f / "student/transformer/diffusion_pytorch_model.safetensors") for f in ("both", "alone")
    )
    before = load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in ours.values()} == {torch.bfloat16}
    change = torch.cat([(theirs[k] - before[k]).flatten() for k in theirs])
    difference = torch.cat([(ours[k].float() - theirs[k]).flatten() for k in theirs])
    assert difference.norm() < 0.5 * change.norm()
