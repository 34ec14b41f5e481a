"""Full disks and numbers that are not finite: the run stops, names the place, and keeps what it had."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from advdmd.commands import train as train_command
from advdmd.data import embedding_cache
from advdmd.recipes.registry import resolve
from advdmd.training import checkpoint
from advdmd.types import Cond

WORDS = [
    "iterations=6", "algorithm.group_size=2", "prompts_per_step=2", "data.num_prompts=6", "data.images_per_prompt=1",
    "save_every=2", "sample_every=0",
    "threads=1", "algorithm.dm_only_iterations=1", "algorithm.policy_ramp_iterations=0", "algorithm.auc_gating=false",
]  # fmt: skip


def train(teacher, out, *words):
    return train_command.train(*resolve("mini-sd35-advdmd", [*WORDS, f"teacher={teacher}", *words]), out)


def weights(folder):
    return load_file(max((folder / "checkpoints").glob("*.safetensors")))


def corrupt(monkeypatch, where, bad, calls):
    """Set one number of what a function returns to `bad`, in its `calls`-th call; "name:1": of the second value it returns."""
    module, (name, _, which) = where[0], where[1].partition(":")
    true, calls_made, which = getattr(module, name), [], int(which or 0)

    def changed(*args, **kw):
        calls_made.append(1)
        out = true(*args, **kw)
        if len(calls_made) != calls:
            return out
        corrupted = (out[which] if isinstance(out, tuple) else out).clone()
        corrupted.view(-1)[0] = bad
        return (*out[:which], corrupted, *out[which + 1 :]) if isinstance(out, tuple) else corrupted

    monkeypatch.setattr(module, name, changed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "calls", "message"),
    [
        ("fake_score_loss", 11, r"iteration \d, fake_score/main: loss"),
        ("student_loss", 3, r"iteration \d, student/dm: loss"),
        ("discriminator_rewards", 2, r"iteration \d, policy: a reward is not finite"),
        ("discriminator_rewards:1", 2, r"iteration \d, policy: a reward is not finite"),  # the final image's
    ],
)
def test_a_number_that_is_not_finite_stops_the_run_before_the_update(
    tiny_folder, tmp_path, monkeypatch, name, calls, message, bad
):
    """A loss or a reward: iteration and network are named, and no network has changed since its last good update."""
    from advdmd.algorithms import policy, updates

    corrupt(monkeypatch, (updates if name in ("fake_score_loss", "student_loss") else policy, name), bad, calls)
    stepped = []
    true = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a, **k: stepped.append(self) or true(self, *a, **k))
    with pytest.raises(FloatingPointError, match=message):
        train(tiny_folder, tmp_path / "r", "save_every=1")
    for optimizer in stepped:
        for group in optimizer.param_groups:
            assert all(torch.isfinite(p).all() for p in group["params"])
    assert checkpoint.latest(tmp_path / "r/checkpoints") is not None


def test_a_gradient_that_is_not_finite_stops_the_run_too(tiny_folder, tmp_path, monkeypatch):
    true, calls_made = torch.nn.utils.get_total_norm, []

    def corrupted(grads, *a, **k):
        calls_made.append(1)
        if len(calls_made) == 9:
            grads[0].view(-1)[0] = float("inf")
        return true(grads, *a, **k)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", corrupted)
    with pytest.raises(FloatingPointError, match=r"iteration \d, .*gradient norm (inf|nan)"):
        train(tiny_folder, tmp_path / "r")


def test_cached_tensors_of_a_prompt_must_be_finite_when_written_and_when_read(tmp_path):
    good = Cond(torch.ones(2, 3, 4), pooled=torch.ones(2, 4))
    content, z = embedding_cache.ShardContent(["a circle", "a square"], ""), torch.ones(1, 4, 8, 8)
    rows = [embedding_cache.Encoded("ab"[n], good[torch.tensor([n])], z, [""]) for n in (0, 1)]
    with pytest.raises(FloatingPointError, match="latents of these prompts are not finite"):
        embedding_cache.write_shard(tmp_path, 0, content, [rows[0], rows[1]._replace(latents=z / 0)])
    assert not list(tmp_path.iterdir())
    with pytest.raises(FloatingPointError, match=r"null.safetensors: pooled of the empty prompt are not finite"):
        embedding_cache.write_null(tmp_path, Cond(good.embeds[:1], pooled=good.pooled[:1] / 0))
    assert not list(tmp_path.iterdir())
    embedding_cache.write_null(tmp_path, good[:1])
    embedding_cache.write_shard(tmp_path, 0, content, rows)
    tensors = load_file(embedding_cache.shard_path(tmp_path, 0))
    tensors["latents"][1, 0, 0, 0] = float("nan")
    embedding_cache._write(embedding_cache.shard_path(tmp_path, 0), tensors, entries=[["a", [""]], ["b", [""]]], sources="")
    embedding_cache.write_text(tmp_path / "plan.json", '{"resolution": 32, "teacher": {}}')
    assert embedding_cache.finalize(tmp_path, [content])
    kept = embedding_cache.EmbeddingCache(tmp_path)
    assert kept.real(0, 0).isfinite().all()
    with pytest.raises(FloatingPointError, match=r"shard-000000.safetensors: what is kept of prompt 1 \('a square'\)"):
        kept.real(1, 0)
    embedding_cache._write(embedding_cache.null_path(tmp_path), {"embeds": torch.full((1, 3, 4), float("nan")).bfloat16()})
    with pytest.raises(FloatingPointError, match=r"null.safetensors: embeds of the empty prompt are not finite"):
        _ = embedding_cache.EmbeddingCache(tmp_path).null


def test_a_twinflow_target_that_is_not_finite_stops_the_run_before_clipping_hides_it(tiny_folder, tmp_path, monkeypatch):
    from advdmd.algorithms import twinflow

    corrupt(monkeypatch, (twinflow.TwinFlow, "integrate"), float("inf"), 3)
    words = [w for w in WORDS if "dm_only" not in w and "ramp" not in w and "gating" not in w]
    with pytest.raises(FloatingPointError, match=r"iteration 2, student: a target is not finite"):
        train_command.train(*resolve("mini-sd35-twinflow", [*words, f"teacher={tiny_folder}"]), tmp_path / "r")


def test_a_file_that_grows_too_large_ends_the_run_with_one_line(tiny_folder, tmp_path):
    """As on a full disk: the operating system refuses the write half way through the first checkpoint."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    command = [
        sys.executable,
        "-m",
        "advdmd",
        "train",
        "mini-sd35-advdmd",
        *WORDS,
        f"teacher={tiny_folder}",
        "--out",
        tmp_path / "r",
    ]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "step-0000002.safetensors cannot be written" in done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "r/checkpoints").iterdir())


def test_a_full_disk_ends_the_run_with_one_line_and_it_goes_on_when_there_is_room(tiny_folder, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    train(tiny_folder, tmp_path / "whole")
    size = sum(f.stat().st_size for f in (tmp_path / "whole/checkpoints").iterdir()) // 2
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        words = [*WORDS, f"teacher={tiny_folder}"]
        command = [sys.executable, "-m", "advdmd", "train", "mini-sd35-advdmd", *words, "--out", str(small / "r")]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "No space left" in done.stderr
        kept = checkpoint.latest(small / "r/checkpoints")
        assert kept is not None
        assert 2 <= kept[1]["step"] < 6
        shutil.copytree(small / "r", tmp_path / "r")
    finally:
        subprocess.run(["umount", small], check=True)
    train(tiny_folder, tmp_path / "r")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "r")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_no_secret_of_the_environment_reaches_what_a_run_writes(tiny_folder, tmp_path, monkeypatch, capfd):
    from advdmd.monitoring import html_report

    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hunter2-sentinel")
    train(tiny_folder, tmp_path / "r", "iterations=2", "sample_every=2")
    html_report.write_report([tmp_path / "r"], [], tmp_path / "report.html")
    printed = "".join(capfd.readouterr())
    assert "hunter2" not in printed
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert len(files) > 15
    assert not [f for f in files if b"hunter2" in f.read_bytes()]
