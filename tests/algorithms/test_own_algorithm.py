"""A new algorithm is one class and one line that registers a recipe; then every command knows it."""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import pytest
import typer
from safetensors.torch import load_file

from advdmd import flow
from advdmd.algorithms.base import Algorithm, Trainable
from advdmd.cli import main
from advdmd.losses import mean_flat
from advdmd.models.sampler import SamplerConfig
from advdmd.recipes import registry
from advdmd.rollout import Velocity, sample_euler

COMMAND = typer.main.get_command(main.app)


class Models(NamedTuple):
    teacher: Velocity
    student: Trainable


@dataclass(frozen=True, kw_only=True)
class Regression(Algorithm[Models]):
    """The student's one step is fitted to the teacher's many steps from the same noise."""

    steps: int = 1
    group_size: int = 2
    teacher_steps: int = 4

    name: ClassVar[str] = "regression"

    def build(self, builder):
        return Models(builder.teacher(), builder.student("dm"))

    def train_step(self, models, batch, iteration, rng):
        noise = rng.normal("rollout", batch.real_latents.shape[1:])
        target = sample_euler(models.teacher, batch.cond, noise, flow.grid(self.teacher_steps, device=noise.device))
        t = noise.new_ones(len(noise))
        x0 = flow.x0_from_velocity(noise, models.student(noise, t, batch.cond), t)
        return models.student.update([mean_flat((x0 - target).square())], "dm")

    def sampler(self):
        return SamplerConfig(steps=self.steps, eta=1.0)

    def forwards_per_sample(self, iteration, costs):
        return {"teacher": 2.0 * self.teacher_steps, "student": 1 + costs.backward}


def regression(iterations=100):
    _, base = registry.resolve("mini-sd35-dmd2")
    return replace(base, algorithm=Regression(), iterations=iterations, prompts_per_step=2)


@pytest.fixture
def registered():
    registry.register("mini-sd35-regression", regression)
    yield
    registry._registered.clear()


def advdmd(*words):
    COMMAND.main([str(w) for w in words], standalone_mode=False)


def test_a_registered_algorithm_trains_resumes_and_exports_through_the_command_line(registered, tmp_path, capsys):
    words = ["algorithm.teacher_steps=2", "data.num_prompts=4", "data.images_per_prompt=1", "threads=1", "save_every=1"]
    for iterations in (2, 3):  # a longer run is another recipe: it needs its own folder
        advdmd("train", "mini-sd35-regression", f"iterations={iterations}", *words, "--out", tmp_path / f"run{iterations}")
    advdmd("train", "mini-sd35-regression", "iterations=2", *words, "--out", tmp_path / "run2")  # has ended: nothing to do
    advdmd("export", tmp_path / "run2", "--out", tmp_path / "student")
    advdmd("show", "mini-sd35-regression")
    assert "student/dm_loss" in (tmp_path / "run3/metrics.jsonl").read_text()
    assert "teacher" in capsys.readouterr().out
    advdmd("doctor", tmp_path / "run2")
    assert "not measured" in capsys.readouterr().out
    advdmd("sample", tmp_path / "student", "a picture of a red circle", "--out", tmp_path / "pictures", "--threads", 1)
    two, three = (load_file(tmp_path / f"run{n}/student/transformer/diffusion_pytorch_model.safetensors") for n in (2, 3))
    assert any((two[k] != three[k]).any() for k in two), "the third iteration trained"


def test_its_recipe_file_is_read_by_name_and_its_keys_are_checked(registered, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: mini-sd35-regression\nalgorithm:\n  teacher_steps: 3\n")
    assert registry.resolve(str(file))[1].algorithm == Regression(teacher_steps=3)
    with pytest.raises(ValueError, match="teacher_step"):
        registry.resolve("mini-sd35-regression", ["algorithm.teacher_step=3"])
    with pytest.raises(ValueError, match="registered already"):
        registry.register("mini-sd35-regression", regression)
