"""TwinFlow: signed times, quarters, the target of an exact flow, its sampler, and a student on disk."""

import json

import pytest
import torch

from advdmd import flow
from advdmd.algorithms.base import Costs
from advdmd.algorithms.twinflow import TwinFlow, TwinFlowModels, barron_loss, guidance_strength
from advdmd.commands import train
from advdmd.distillation.build import Builder
from advdmd.mini import pipelines
from advdmd.models import loading
from advdmd.models.images import image_sampler
from advdmd.models.target_time import TargetTime, attach_zero_target
from advdmd.recipes.registry import resolve
from advdmd.rng import Rng
from advdmd.types import Batch
from tests.test_product import SMALL
from tests.tiny_pipelines import FAMILIES
from tests.toy import as_cond, classes


@pytest.fixture(scope="module", params=FAMILIES)
def any_backbone(request):
    pipe = FAMILIES[request.param]()
    backbone = loading.backbone_from_pipeline(pipe, {"t5_length": 0, "side": pipelines.LATENT, "text_length": 30})
    backbone.net.requires_grad_(False).eval()
    return backbone


def empty(backbone):
    with torch.no_grad():
        return backbone.encode_text(backbone.tokenize([""]))


def inputs(backbone, n=4):
    g = torch.Generator().manual_seed(0)
    cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"] * n))
    return torch.randn(n, *backbone.latent_shape, generator=g), torch.linspace(0.1, 1, n), cond


@torch.no_grad()
def test_with_r_at_t_the_pretrained_network_is_unchanged(any_backbone):
    """Also at negative times, and whatever emb2 is; towards another r it is not."""
    x, t, cond = inputs(any_backbone)
    net = TargetTime(any_backbone.net, any_backbone.time_embedding)
    for s in (t, -t):
        with net.targeting(s):
            ours, plain = (any_backbone.velocity(n, x, s, cond) for n in (net, any_backbone.net))
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 if any_backbone.time_embedding.offset else 0)
    with net.targeting(0.5 * t):
        assert not torch.allclose(any_backbone.velocity(net, x, t, cond), any_backbone.velocity(any_backbone.net, x, t, cond))


@torch.no_grad()
def test_the_weights_kept_for_sampling_are_the_network_with_target_time_zero(any_backbone):
    x, t, cond = inputs(any_backbone)
    import copy

    net = TargetTime(copy.deepcopy(any_backbone.net), any_backbone.time_embedding, copied=True)
    want = any_backbone.velocity(net, x, t, cond)
    with net.targeting(torch.zeros(4)):
        assert torch.equal(want, any_backbone.velocity(net, x, t, cond))
    plain = net.net
    assert not torch.allclose(want, any_backbone.velocity(plain, x, t, cond))
    kept = net.zero_target_state_dict()
    attach_zero_target(plain, kept, any_backbone.time_embedding)
    torch.testing.assert_close(any_backbone.velocity(plain, x, t, cond), want)


def test_quarters_are_equal_and_have_their_times():
    t, r, quarter = TwinFlow().sample_times(Rng(0, 0, range(400)), 400)
    assert torch.bincount(quarter).tolist() == [100] * 4
    assert (t[quarter == 0] == 1).all()
    assert (r[quarter == 0] == 0).all()
    near, any_step, fake_trajectory = (quarter == k for k in (1, 2, 3))
    assert ((t - r)[near] <= 0.05 * t[near] + 1e-6).all()
    assert ((t - r)[near] >= 0).all()
    assert ((r >= 0) & (r <= t))[any_step].all()
    assert (t - r)[any_step].max() > 0.5
    assert (t[fake_trajectory] < 0).all()
    assert torch.equal(t[fake_trajectory], r[fake_trajectory])
    with pytest.raises(ValueError, match="four quarters"):
        TwinFlow().sample_times(Rng(0, 0, range(6)), 6)


@pytest.mark.parametrize(
    ("steps", "last_time", "want"),
    [(1, 0.6, [0.999, 0]), (2, 0.6, [0.999, 0.6, 0]), (4, 0.5, [0.999, 0.83267, 0.66633, 0.5, 0])],
)
def test_grids_are_those_of_twinflows_repository(steps, last_time, want):
    assert flow.twinflow_grid(steps, last_time).tolist() == pytest.approx(want, abs=1e-4)


def test_the_target_of_an_exact_flow_is_that_flow():
    """One data point: v = z - x0 is the average velocity between any two times, so nothing is left to correct."""
    x0 = torch.tensor([[0.3, -0.7]])
    exact = lambda x, t, r, c: (x - x0) / flow.bcast(t, x)  # noqa: E731
    algorithm = TwinFlow(guidance_strength=0.0)
    t, r, quarter = algorithm.sample_times(Rng(0, 0, range(400)), 400)
    t = torch.where(quarter == 3, t, t.clamp(min=0.05))
    r = torch.where(quarter == 3, t, torch.minimum(r, t))
    z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    x, v = flow.interpolate(x0.expand(400, 2), z, t.abs()), z - x0
    models = TwinFlowModels(exact, exact, None, None)
    target = algorithm.target(models, v, x, t, r, v, torch.zeros(400), quarter)
    torch.testing.assert_close(target, v, atol=2e-4, rtol=0)
    off = algorithm.target(models, v + 0.01, x, t, r, v, torch.zeros(400), quarter)
    assert ((off - v - 0.01)[(t - r).abs() > 0.02] < 0).all(), "and what is off is moved towards it"


@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
def test_the_enhanced_target_converges_to_the_guidance_scale(scale):
    """A network that has become its own target, with r at t: v_null + scale (v - v_null)."""
    v, null, t, quarter = torch.tensor([[0.1, -0.2]]), torch.tensor([[0.05, 0.02]]), torch.tensor([0.5]), torch.tensor([1])
    F = v
    for _ in range(200):
        models = TwinFlowModels(
            None, lambda x, t, r, c, now=F: torch.where(classes(c)[:, None] > 0, now, null), None, as_cond(torch.zeros(1))
        )
        F = TwinFlow(guidance_strength=guidance_strength(scale)).target(
            models, F, torch.zeros(1, 2), t, t, v, as_cond(torch.ones(1)), quarter
        )
    torch.testing.assert_close(F, flow.guide(v, null, scale), atol=1e-5, rtol=1e-4)


def test_the_students_own_samples_have_their_velocity_as_target_without_a_clip():
    """However far the network is from it; the clip is for integrals."""
    F, v, t = torch.full((2, 2), 9.0), torch.tensor([[0.1, -0.2]]).expand(2, 2), torch.tensor([0.5, -0.5])
    zero = lambda x, t, r, c: torch.zeros_like(x)  # noqa: E731
    target = TwinFlow(guidance_strength=0.0).target(
        TwinFlowModels(zero, zero, None, None), F, torch.zeros(2, 2), t, t, v, torch.zeros(2), torch.tensor([1, 3])
    )
    torch.testing.assert_close(target, torch.stack([F[0] - 1, v[1]]))


def test_the_rectification_is_a_mean_over_its_quarter():
    """As in TwinFlow's code: half of the quarter's mean is added to the mean of the batch, not an eighth."""
    weights = torch.nn.Parameter(torch.tensor([0.3, -0.4]))

    class Student:
        def __call__(self, x, t, r, c):
            return x * weights + flow.bcast(t, x)

        def update(self, losses):
            self.loss = torch.cat(list(losses)).mean().item()
            return {}

    def run(weight):
        student = Student()
        algorithm = TwinFlow(guidance_strength=0.0, rectification_weight=weight)
        models = TwinFlowModels(student, Student(), None, None)
        batch = Batch(as_cond(torch.zeros(64)), torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
        log = algorithm.train_step(models, batch, 0, Rng(0, 0, range(64)))
        return student.loss, log.get("twinflow/rectification_loss")

    (without, _), (with_it, mean) = run(0.0), run(0.5)
    assert with_it - without == pytest.approx(float(mean), rel=1e-4)


def test_targets_are_guided_by_the_teacher_where_it_is_the_target_network():
    """v + w (v_teacher - v_teacher of the empty prompt), with any strength: nothing feeds back into the target."""
    v, t = torch.tensor([[0.1, -0.2]]), torch.tensor([0.5])
    teacher = lambda x, t, c: torch.where(classes(c)[:, None] > 0, v, 0 * v)  # noqa: E731
    models = TwinFlowModels(lambda x, t, r, c: x, None, teacher, as_cond(torch.zeros(1)))
    algorithm = TwinFlow(guidance_strength=3.0, target_network="teacher", order=1)
    target = algorithm.target(models, 4 * v, torch.zeros(1, 2), t, t, v, as_cond(torch.ones(1)), torch.tensor([1]))
    torch.testing.assert_close(target, flow.guide(v, 0 * v, 4.0))
    with pytest.raises(ValueError, match="guidance_strength=3"):
        TwinFlow(guidance_strength=3.0, target_network="student")


def test_the_robust_loss_grows_like_the_absolute_error():
    """A sample with a large error does not outweigh the others by its square."""
    small, large = barron_loss(torch.full((1, 4), 0.1)), barron_loss(torch.full((1, 4), 1.0))
    assert (large / small).item() == pytest.approx(10, rel=0.01)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    words = [w for w in SMALL if "dm_only" not in w and "ramp" not in w]
    return resolve("mini-sd35-twinflow", [*words, f"teacher={tiny_folder}"]), tmp_path / "twin"


def test_forwards_are_as_declared(folder, backbone, monkeypatch):
    (_, r), _ = folder
    models, counts, velocity = Builder(r, backbone, empty(backbone)).build(), {"grad": 0, "none": 0}, backbone.velocity

    def counted(net, x, t, cond):
        counts["grad" if torch.is_grad_enabled() else "none"] += len(x)
        return velocity(net, x, t, cond)

    monkeypatch.setattr(backbone, "velocity", counted)
    cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"] * 8))
    r.algorithm.train_step(models, Batch(cond, torch.randn(8, 4, 8, 8)), 0, Rng(0, 0, range(8)))
    parts = r.algorithm.forwards_per_sample(0, Costs(0.0))
    assert counts["grad"] == 8
    assert counts["none"] == 8 * (sum(parts.values()) - 1)
    assert sum(r.algorithm.forwards_per_sample(0, Costs()).values()) == pytest.approx(6.25)


def test_a_student_trains_resumes_and_is_read_back_as_it_was_sampled(folder, tiny_folder):
    (name, r), out = folder
    student = train.train(name, r, out)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {
        "twinflow/one_step_loss",
        "twinflow/near_loss",
        "twinflow/any_step_loss",
        "twinflow/fake_trajectory_loss",
        "twinflow/rectification_loss",
    } <= set(metrics[0])
    assert train.train(name, r, out) == student
    backbone, sampler = loading.load(str(student))
    assert (sampler.steps, sampler.last_time, sampler.nfe) == (2, 0.6, 2)
    teacher = loading.load(str(tiny_folder))[0]
    models = Builder(r, teacher, empty(teacher)).build()
    from advdmd.training import checkpoint

    checkpoint.resume(out / "checkpoints", {"student": models.student}, {})
    with torch.no_grad():
        x, t, cond = inputs(teacher)
        mean = models.ema(x, t, t / 2, cond)
        assert not torch.equal(mean, models.student(x, t, t / 2, cond))
        ema = models.student.ema_model()
        with ema.targeting(t / 2):
            assert torch.equal(mean, teacher.velocity(ema, x, t, cond)), "the EMA is the one that was resumed"
    want = image_sampler(teacher, ema, sampler)(["a picture of a red circle"] * 2, [0, 1])
    found = image_sampler(backbone, backbone.net, sampler)(["a picture of a red circle"] * 2, [0, 1])
    assert (abs(want.astype(int) - found.astype(int)) <= 1).all()
    assert "stock pipelines cannot sample it" in (student / "README.md").read_text()


def test_with_adapters_the_network_gets_one_time_and_the_ema_is_a_separate_adapter(any_backbone):
    """t - r / 2 instead of a second embedding: towards r = 0 the network is asked at t itself."""
    import copy

    plain = copy.deepcopy(any_backbone.net)
    backbone = loading.backbone_from_pipeline(any_backbone.pipe, {"t5_length": 0, "side": pipelines.LATENT})
    backbone.net = copy.deepcopy(plain)
    _, r = resolve("mini-sd35-twinflow", ["lora_rank=2", "algorithm.order=1"])
    models = Builder(r, backbone, empty(backbone)).build()
    with torch.no_grad():
        x, t, cond = inputs(backbone)
        assert torch.equal(models.student(x, t, 0 * t, cond), backbone.velocity(plain, x, t, cond)), "adapters start at nothing"
        assert torch.equal(models.student(x, t, t / 2, cond), backbone.velocity(plain, x, t - t / 4, cond))
    before = {k: v.clone() for k, v in backbone.net.state_dict().items() if ".lora_" not in k}
    for step in range(3):
        log = r.algorithm.train_step(models, Batch(cond, torch.randn(4, *backbone.latent_shape)), step, Rng(0, step, range(4)))
    assert log["student/grad_norm"] > 0
    names = [k for k, _ in models.student.net.named_parameters() if "timestep_embedder" in k or "t_embedder" in k]
    assert len(names) == 4, "A and B of both layers of the time embedding, where negative times are learned"
    assert all(torch.equal(before[k], v) for k, v in backbone.net.state_dict().items() if k in before)
    with torch.no_grad():
        mean = models.ema(x, t, 0 * t, cond)
        assert not torch.equal(mean, models.student(x, t, 0 * t, cond))
        assert torch.equal(mean, backbone.velocity(models.student.ema_model(), x, t, cond))
