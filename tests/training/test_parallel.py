"""Two processes are one: the same run, whoever starts it and whoever goes on with it."""

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
# Policy updates from the second iteration on, whatever the discriminator can tell by then.
WORDS = [*COMMON, "algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=1", "algorithm.auc_gating=false"]
# Two rollouts' gradients are gathered for a step: the last checkpoint holds the second step's first rollout.
GATHERED = [
    "algorithm.policy=forward",
    "algorithm.policy_step=agreement",
    "algorithm.max_policy_rollouts=2",
    "algorithm.min_agreement=1",
]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "advdmd"]


def ran(folder, teacher, n=2, words=WORDS, recipe="mini-sd35-advdmd"):
    """A run by n processes that find each other as torchrun's do; forked, for to import all again takes longer than to run."""
    if n == 1:
        return ran_alone(folder, teacher, words, recipe)
    together(n, lambda rank: ran_alone(folder, teacher, words, recipe))
    return folder


def together(n, do, **more):
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


def ran_alone(folder, teacher, words, recipe="mini-sd35-advdmd"):
    train.train(*resolve(recipe, [f"teacher={teacher}", *words]), folder)
    return folder


def test_a_process_that_ends_before_it_begins_is_an_error_at_once():
    before = dict(os.environ)
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with pytest.raises(ValueError, match="process 1 of 2 ended with status 7"), distributed.local_processes(2, command):
        pass
    assert dict(os.environ) == before


def test_processes_that_a_command_starts_end_with_it(tmp_path):
    """The other process says that it begins, and then waits for ever."""
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
            # Scores are counts of answers: a last digit may turn one question of 120.
            near = 0.02 if k.startswith("eval/") else absolute
            assert ours[k] == pytest.approx(theirs[k], rel=5e-3, abs=near), k


def forget_the_end(folder):
    """As if the run had been stopped after its second iteration."""
    for f in folder.glob("checkpoints/step-0000004*"):
        shutil.rmtree(f) if f.is_dir() else f.unlink()
    shutil.rmtree(folder / "student")
    return folder


def last(folder):
    path = max((folder / "checkpoints").glob("*.safetensors"))
    return path.stem, load_file(path)


def agree(a, b, rtol=1e-3):
    """Weights of two checkpoints, up to what summing in another order does."""
    (step_a, a), (step_b, b) = last(a), last(b)
    assert step_a == step_b
    assert set(a) == set(b)
    for k in a:
        if "/net/" in k or k.startswith("extra"):
            torch.testing.assert_close(a[k], b[k], rtol=rtol, atol=2e-4, msg=lambda m, k=k: f"{k}: {m}")


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory):
    return ran_alone(tmp_path_factory.mktemp("alone") / "run", tiny_folder, WORDS)


@pytest.fixture(scope="module")
def both(tiny_folder, tmp_path_factory):
    return ran(tmp_path_factory.mktemp("both") / "run", tiny_folder)


def test_two_processes_run_as_one_does(alone, both):
    agree(alone, both)
    metrics_agree(alone, both)
    assert (both / "student/model_index.json").is_file()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("mini-sd35-advdmd", [*WORDS, "lora_rank=4"]),
        ("mini-sd35-advdmd", [*WORDS, "lora_rank=4", *GATHERED]),
        ("mini-sd35-twinflow", [*COMMON, "lora_rank=4"]),
    ],
)
def test_replicas_of_adapters_run_as_one_process_does(recipe, words, tiny_folder, tmp_path):
    one, two = (ran(tmp_path / str(n), tiny_folder, n, words, recipe) for n in (1, 2))
    metrics_agree(one, two)
    agree(one, two)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_with_a_run(alone, both, tiny_folder, tmp_path, first, then):
    folder = forget_the_end(shutil.copytree(alone if first == 1 else both, tmp_path / "run"))
    agree(ran(folder, tiny_folder, n=then), alone)


def test_prompts_that_cannot_be_shared_are_refused(tiny_folder, tmp_path):
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


def test_minibatches_are_the_steps_however_it_is_shared():
    whole = Rng(1, 2, range(8)).minibatches("order", 3, 2)
    parts = [Rng(1, 2, range(4 * r, 4 * r + 4), Ranks(rank=r, world_size=2)).minibatches("order", 3, 2) for r in (0, 1)]
    for (m, passes), (a, mine), (b, theirs) in zip(whole, *parts, strict=True):
        assert passes == -(-len(m) // 2)
        assert mine == theirs == -(-max(len(a), len(b)) // 2), "all make as many"
        assert sorted(m.tolist()) == sorted([*a.tolist(), *(b + 4).tolist()])
    assert sorted(torch.cat([m for m, _ in whole]).tolist()) == list(range(8))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_told_to_end_leaves_a_checkpoint_behind_its_last_step(processes, tiny_folder, tmp_path):
    """SIGTERM, as a cluster sends it: all processes stop behind the same step, and nothing is lost or done twice."""
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
    _, said = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "stopped by SIGTERM after iteration" in said
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
    _, said = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "another process is gone" in said
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
def alone_to_share(tiny_folder, tmp_path_factory):
    return ran_alone(tmp_path_factory.mktemp("alone") / "run", tiny_folder, SHARDED)


@pytest.fixture(scope="module")
def spread(tiny_folder, tmp_path_factory):
    return ran(tmp_path_factory.mktemp("spread") / "run", tiny_folder, words=SHARDED)


def test_networks_spread_over_two_processes_run_as_one_process_does(alone_to_share, spread):
    """FSDP2: the same student, metrics and validations."""
    assert len(list(spread.glob("checkpoints/step-0000004.safetensors/*.safetensors"))) == 2, "each wrote its shares"
    students_agree(spread, alone_to_share)
    metrics_agree(spread, alone_to_share, 2e-3)


@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (1, 2)])
def test_a_spread_run_goes_on_with_another_number_of_processes(alone_to_share, spread, tiny_folder, tmp_path, first, then):
    folder = forget_the_end(shutil.copytree(alone_to_share if first == 1 else spread, tmp_path / "run"))
    students_agree(ran(folder, tiny_folder, n=then, words=SHARDED), alone_to_share)


HYBRID = [*WORDS, "fsdp=true", "fsdp_sharding=hybrid", "discriminator.trunk=own"]


@pytest.fixture(scope="module")
def on_no_node(tiny_folder, tmp_path_factory):
    return ran_alone(tmp_path_factory.mktemp("alone") / "run", tiny_folder, HYBRID)


@pytest.fixture(scope="module")
def on_two_nodes(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nodes") / "run"
    together(4, lambda rank: ran_alone(folder, tiny_folder, HYBRID), LOCAL_WORLD_SIZE=2)
    return folder


def test_two_nodes_of_two_processes_with_replicas_run_as_one_process_does(on_no_node, on_two_nodes):
    """A two-dimensional mesh: shards inside a node, replicas across. A norm over shards that counted replicas would differ."""
    students_agree(on_two_nodes, on_no_node)
    metrics_agree(on_two_nodes, on_no_node, 2e-3)


def test_what_two_nodes_have_begun_one_process_ends(on_no_node, on_two_nodes, tiny_folder, tmp_path):
    folder = forget_the_end(shutil.copytree(on_two_nodes, tmp_path / "run"))
    students_agree(ran_alone(folder, tiny_folder, HYBRID), on_no_node)


def test_a_mesh_is_what_the_nodes_hold():
    def look(rank):
        with distributed.init_distributed():
            mesh = distributed._mesh("cpu", hybrid=True)
            assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
            assert distributed._mesh("cpu", hybrid=False).mesh.tolist() == [0, 1, 2, 3]
            os.environ["LOCAL_WORLD_SIZE"] = "3"
            with pytest.raises(ValueError, match="4 processes are not the same number on every node"):
                distributed._mesh("cpu", hybrid=True)

    together(4, look, LOCAL_WORLD_SIZE=2)


@pytest.mark.parametrize("bucket", [1, 7, 2**23])
def test_gradients_are_summed_whatever_is_exchanged_at_once(bucket):
    def look(rank):
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

    together(2, look)


def test_a_damaged_share_is_passed_over(spread, tmp_path, capsys):
    folder = shutil.copytree(spread, tmp_path / "run") / "checkpoints"
    share = max(folder.glob("step-0000004.safetensors/*.safetensors"))
    share.write_bytes(share.read_bytes()[:-1] + b"?")
    assert checkpoint.latest(folder)[1]["step"] == 2
    assert "damaged" in capsys.readouterr().out


def test_processes_that_see_different_checkpoints_are_told_so(spread, tmp_path):
    folders = [shutil.copytree(spread / "checkpoints", tmp_path / str(rank)) for rank in (0, 1)]

    def look(rank):
        with distributed.init_distributed():
            assert checkpoint.latest(folders[0])[1]["step"] == 4
            with pytest.raises(ValueError, match="all processes must use one shared folder"):
                checkpoint.latest(folders[rank])

    max(folders[1].glob("step-*.json")).unlink()
    together(2, look)


def test_leftovers_of_the_other_kind_do_not_stop_a_run(alone_to_share, spread, tiny_folder, tmp_path):
    """Shares, or a file, that were being written at a step when a run was killed, and another number of processes goes on."""
    for name, source, n in (("file", alone_to_share, 2), ("shares", spread, 1)):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / "checkpoints/step-0000004.json").unlink()
        shutil.rmtree(folder / "student")
        students_agree(ran(folder, tiny_folder, n=n, words=SHARDED), alone_to_share)


def test_passes_in_bfloat16_leave_what_learns_in_float32(tiny_folder, tmp_path):
    """Of networks that are spread, checkpointed, with a GAN; alone the same recipe is all float32, and both come close."""
    words = [*SHARDED, "dtype=bfloat16", "gradient_checkpointing=true", "algorithm.gan_loss_weight=0.1"]
    ran(tmp_path / "both", tiny_folder, words=words)
    _, alone = last(ran_alone(tmp_path / "alone", tiny_folder, words))
    assert {v.dtype for k, v in alone.items() if "/net/" in k or "/ema/" in k} == {torch.float32}
    shares = [load_file(f) for f in (tmp_path / "both/checkpoints/step-0000004.safetensors").glob("*.safetensors")]
    assert {v.dtype for part in shares for k, v in part.items() if "/net/" in k or "/ema/" in k} == {torch.float32}
    ours, theirs = (
        load_file(tmp_path / f / "student/transformer/diffusion_pytorch_model.safetensors") for f in ("both", "alone")
    )
    before = load_file(tiny_folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in ours.values()} == {torch.bfloat16}
    moved = torch.cat([(theirs[k] - before[k]).flatten() for k in theirs])
    apart = torch.cat([(ours[k].float() - theirs[k]).flatten() for k in theirs])
    assert apart.norm() < 0.5 * moved.norm()
