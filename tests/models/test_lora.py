"""LoRA models on one base: gradients are right whatever adapter is active in the backward pass."""

import copy
import itertools

import pytest
import torch

from advdmd.mini import pipelines
from advdmd.mini.world.caption import VOCABULARY
from advdmd.models import loading, networks
from advdmd.models.discriminator import DiscriminatorConfig
from advdmd.models.lora import LoraModel, SharedBase, _MergedLoraLinear
from advdmd.rollout import rollout
from advdmd.transitions import cps
from tests import tiny_pipelines
from tests.conftest import TINY

RANK = 4


@pytest.fixture
def lora_models(backbone):
    """Two LoRA models with adapters that are not zero, and the inputs of a pass."""
    torch.manual_seed(0)
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two stars"]))
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
    plain = copy.deepcopy(backbone.net)
    shared_base = SharedBase(backbone.net, ["student", "fake"], RANK, backbone.lora_targets)
    student, fake_score = LoraModel(shared_base, "student"), LoraModel(shared_base, "fake")
    for p in (*student.parameters(), *fake_score.parameters()):
        p.data.normal_(0, 0.1)
    return backbone, plain, student, fake_score, (x, t, cond)


def grads(loss, *nets):
    for p in (p for net in nets for p in net.parameters()):
        p.grad = None
    loss().backward()
    return [[None if p.grad is None else p.grad.clone() for p in net.parameters()] for net in nets]


def test_outside_of_the_lora_models_the_base_is_untouched_to_the_bit(lora_models):
    backbone, plain, student, fake_score, inputs = lora_models
    with torch.no_grad():
        base, by_student, by_fake_score = (backbone.velocity(n, *inputs) for n in (plain, student, fake_score))
        assert torch.equal(backbone.velocity(backbone.net, *inputs), base)
    assert (by_student - base).abs().max() > 1e-3
    assert (by_student - by_fake_score).abs().max() > 1e-3


def test_a_lora_model_holds_its_adapter_and_nothing_else(lora_models):
    backbone, _, student, fake_score, _ = lora_models
    assert not {id(p) for p in student.parameters()} & {id(p) for p in fake_score.parameters()}
    assert {p.shape[0] if k.endswith("A") else p.shape[1] for k, p in student.named_parameters()} == {RANK}
    assert len(student.state_dict()) == len(list(student.parameters()))
    linear = sum(name.endswith(backbone.lora_targets) for name, m in backbone.net.named_modules() if hasattr(m, "base_layer"))
    assert len(student.state_dict()) == 2 * linear > 20


def test_the_fused_network_equals_the_lora_model(lora_models):
    backbone, plain, student, _, inputs = lora_models
    plain.load_state_dict(student.fused_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(backbone.velocity(plain, *inputs), backbone.velocity(student, *inputs), atol=1e-5, rtol=1e-5)


def test_merged_products_have_the_gradients_of_the_sum_they_stand_for(gen):
    sizes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    x, w, bias, a, b = (torch.randn(s, generator=gen(i), dtype=torch.float64) for i, s in enumerate(sizes))
    torch.testing.assert_close(_MergedLoraLinear.apply(x, w, bias, a, b), x @ (w + b @ a).T + bias)
    assert torch.autograd.gradcheck(
        lambda x, a, b: _MergedLoraLinear.apply(x, w, bias, a, b), [t.requires_grad_() for t in (x, a, b)]
    )


@pytest.mark.parametrize(("spanning", "other_active"), list(itertools.product((False, True), (False, True))))
def test_checkpointing_never_changes_a_gradient(lora_models, spanning, other_active):
    """Four cases: one graph through both LoRA models or not, another adapter active in the backward pass or not."""
    backbone, _, student, fake_score, inputs = lora_models
    shared_base = student.shared_base

    def loss():
        v = backbone.velocity(student, *inputs)
        if spanning:  # as in GAN back-propagation, through the fake score's blocks
            return backbone.velocity(fake_score, inputs[0] - v, *inputs[1:]).square().mean()
        with torch.no_grad():
            target = backbone.velocity(fake_score, inputs[0] - v, *inputs[1:])
        return (v - target).square().mean()

    plain = grads(loss, student, fake_score)
    shared_base.checkpoint(backbone.blocks(backbone.net))
    for p in (*student.parameters(), *fake_score.parameters()):
        p.grad = None
    value = loss()
    with shared_base.active("fake" if other_active else ""):
        value.backward()
    checkpointed = [[p.grad for p in net.parameters()] for net in (student, fake_score)]
    for a, b in zip(itertools.chain(*plain), itertools.chain(*checkpointed), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_whatever_happens_between_forward_and_backward(lora_models, checkpointing):
    """Cases in which libraries' adapter switching goes wrong, with checkpointing and without."""
    backbone, _, student, fake_score, inputs = lora_models
    shared_base = student.shared_base
    if checkpointing:
        shared_base.checkpoint(backbone.blocks(backbone.net))
    loss = lambda net=student: backbone.velocity(net, *inputs).square().mean()  # noqa: E731
    alone, theirs = grads(loss, student)[0], grads(lambda: loss(fake_score), fake_score)[0]

    def other_forwards():
        value = loss()
        with torch.no_grad():
            backbone.velocity(backbone.net, *inputs), backbone.velocity(fake_score, *inputs)
        return value

    def other_update():
        value = loss()
        with torch.no_grad():
            for p in fake_score.parameters():
                p.add_(0.0)
        return value

    for between in (loss, other_forwards, other_update):
        for active_adapter in ("", "fake", "student"):  # in the backward pass
            for p in (*student.parameters(), *fake_score.parameters()):
                p.grad = None
            value = between()
            with shared_base.active(active_adapter):
                value.backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), alone, strict=True))
            assert all(p.grad is None for p in fake_score.parameters())
    # Graphs of both LoRA models in one backward pass, and a graph whose weights have changed.
    student_grads, fake_score_grads = grads(lambda: loss() + loss(fake_score), student, fake_score)
    assert all(torch.equal(a, b) for a, b in zip((*student_grads, *fake_score_grads), (*alone, *theirs), strict=True))
    value = loss()
    with torch.no_grad():
        next(student.parameters()).add_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_teachers_gradient_in_its_input_is_the_bases_to_the_bit(lora_models):
    backbone, plain, *_, (x, t, cond) = lora_models
    found = []
    for net in (plain.requires_grad_(False), backbone.net):
        x = x.detach().requires_grad_()
        found += torch.autograd.grad(backbone.velocity(net, x, t, cond).sum(), x)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "make", [lambda: pipelines.qwen_image(VOCABULARY, TINY), lambda: tiny_pipelines.z_image(VOCABULARY, TINY)]
)
def test_checkpointing_does_not_change_gradients_of_other_families(make):
    backbone = loading.backbone_from_pipeline(make(), {"side": pipelines.LATENT})
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two blue squares"]))
    shared_base = SharedBase(backbone.net.eval(), ["student", "fake"], RANK, backbone.lora_targets)
    student, fake_score = LoraModel(shared_base, "student"), LoraModel(shared_base, "fake")
    torch.manual_seed(0)
    for p in (*student.parameters(), *fake_score.parameters()):
        p.data.normal_(0, 0.1)
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])

    def loss():
        v = backbone.velocity(student, x, t, cond)
        with networks.no_param_grad(fake_score):
            return (backbone.velocity(fake_score, x - v, t, cond) * v).mean()

    plain = grads(loss, student, fake_score)
    shared_base.checkpoint(backbone.blocks(backbone.net))
    for a, b in zip(itertools.chain(*plain), itertools.chain(*grads(loss, student, fake_score)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert all(g is None for g in plain[1])


@pytest.mark.parametrize("rank", [0, RANK])
def test_checkpointing_does_not_change_the_gradient_through_the_discriminator(tiny_folder, rank):
    """The trunk is frozen for that pass, also when blocks are recomputed; the pass ends at the last feature block."""
    found = []
    for checkpointing in (False, True):
        backbone, _ = loading.load(str(tiny_folder))
        torch.manual_seed(1)
        with torch.no_grad():
            cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two stars"]))
            null = backbone.encode_text(backbone.tokenize([""]))
        config = DiscriminatorConfig(trunk="own", feature_depths=(0.5, 1.0), hidden_size=8)
        student, score, trunk = networks.trainable_copies(backbone, ["student", "fake", "trunk"], rank, 0, checkpointing)
        fake_score_and_discriminator = networks.make_fake_score_and_discriminator(backbone, config, 0, 2, null, score, trunk)
        torch.manual_seed(2)
        for p in (*student.parameters(), *fake_score_and_discriminator.trunk.parameters()):
            p.data += 0.05 * torch.randn_like(p)
        discriminator = networks.Discriminator(backbone, fake_score_and_discriminator, config)
        x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
        loss = lambda: discriminator.generator_logit(x - backbone.velocity(student, x, t, cond), t, cond).sum()  # noqa: B023, E731
        student_grads, others = grads(loss, student, fake_score_and_discriminator)
        assert all(g is None for g in others)
        discriminator_loss = lambda: discriminator(x, t, cond).sum()  # noqa: B023, E731
        found.append(student_grads + grads(discriminator_loss, fake_score_and_discriminator)[0])
    for a, b in zip(*found, strict=True):  # adapters: to the bit but for the order in which blocks add to what they share
        torch.testing.assert_close(a, b, rtol=1e-5 if rank else 0, atol=1e-8 if rank else 0)
    assert sum(g is not None for g in found[0]) > len(found[0]) / 2


def test_lora_models_on_one_base_equal_separate_networks_with_an_adapter_each(lora_models):
    backbone, plain, student, fake_score, inputs = lora_models

    def loss(a, b):
        x0 = inputs[0] - backbone.velocity(a, *inputs)
        return (x0 * (x0 - backbone.velocity(b, x0, *inputs[1:])).detach()).sum()

    alone = [
        LoraModel(SharedBase(copy.deepcopy(plain), [name], RANK, backbone.lora_targets), name) for name in ("student", "fake")
    ]
    for one, other in zip((student, fake_score), alone, strict=True):
        other.load_state_dict(one.state_dict())
    (shared,), (separate,) = grads(lambda: loss(student, fake_score), student), grads(lambda: loss(*alone), alone[0])
    for a, b in zip(shared, separate, strict=True):
        assert torch.equal(a, b)


def test_the_trajectory_of_a_lora_model_is_that_of_its_fused_network(lora_models):
    backbone, plain, student, _, (_, _, cond) = lora_models
    plain.load_state_dict(student.fused_state_dict())
    noise = torch.randn(2, 2, *backbone.latent_shape)
    sample = lambda net: rollout(  # noqa: E731
        lambda x, t, c: backbone.velocity(net, x, t, c), cond, noise, torch.tensor([1.0, 0.5, 0.0]), cps(1.0)
    )
    torch.testing.assert_close(sample(student).x, sample(plain).x, atol=1e-4, rtol=1e-4)


def test_adapters_learn_in_float32_on_a_bfloat16_base(tiny_folder):
    backbone, _ = loading.load(str(tiny_folder), dtype=torch.bfloat16)
    student = LoraModel(SharedBase(backbone.net, ["student"], RANK, backbone.lora_targets), "student")
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert backbone.net.get_submodule("transformer_blocks.0.attn.to_q").base_layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"]))
    v = backbone.velocity(student, torch.randn(1, *backbone.latent_shape), torch.tensor([0.5]), cond)
    assert v.dtype == torch.float32
    (grads_,) = grads(lambda: v.square().sum(), student)
    assert all(g is not None and g.dtype == torch.float32 for g in grads_)
    assert student.fused_state_dict()["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16
