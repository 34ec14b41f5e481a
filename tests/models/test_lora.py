"""Roles on one base: gradients are right whatever plays when they flow."""

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
def scene(backbone):
    """Roles whose adapters do something, and what a pass needs."""
    torch.manual_seed(0)
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two stars"]))
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
    plain = copy.deepcopy(backbone.net)
    shared_base = SharedBase(backbone.net, ["student", "fake"], RANK, backbone.lora_targets)
    student, fake = LoraModel(shared_base, "student"), LoraModel(shared_base, "fake")
    for p in (*student.parameters(), *fake.parameters()):
        p.data.normal_(0, 0.1)
    return backbone, plain, student, fake, (x, t, cond)


def grads(loss, *nets):
    for p in (p for net in nets for p in net.parameters()):
        p.grad = None
    loss().backward()
    return [[None if p.grad is None else p.grad.clone() for p in net.parameters()] for net in nets]


def test_outside_of_roles_the_base_is_untouched_to_the_bit(scene):
    backbone, plain, student, fake, at = scene
    with torch.no_grad():
        base, mine, other = (backbone.velocity(n, *at) for n in (plain, student, fake))
        assert torch.equal(backbone.velocity(backbone.net, *at), base)
    assert (mine - base).abs().max() > 1e-3
    assert (mine - other).abs().max() > 1e-3


def test_a_role_holds_its_adapter_and_nothing_else(scene):
    backbone, _, student, fake, _ = scene
    assert not {id(p) for p in student.parameters()} & {id(p) for p in fake.parameters()}
    assert {p.shape[0] if k.endswith("A") else p.shape[1] for k, p in student.named_parameters()} == {RANK}
    assert len(student.state_dict()) == len(list(student.parameters()))
    linear = sum(name.endswith(backbone.lora_targets) for name, m in backbone.net.named_modules() if hasattr(m, "base_layer"))
    assert len(student.state_dict()) == 2 * linear > 20


def test_the_fused_network_is_the_role(scene):
    backbone, plain, student, _, at = scene
    plain.load_state_dict(student.fused_state_dict())
    with torch.no_grad():
        torch.testing.assert_close(backbone.velocity(plain, *at), backbone.velocity(student, *at), atol=1e-5, rtol=1e-5)


def test_merged_products_have_the_gradients_of_the_sum_they_stand_for(gen):
    sizes = [(2, 3, 5), (4, 5), (4,), (2, 5), (4, 2)]
    x, w, bias, a, b = (torch.randn(s, generator=gen(i), dtype=torch.float64) for i, s in enumerate(sizes))
    torch.testing.assert_close(_MergedLoraLinear.apply(x, w, bias, a, b), x @ (w + b @ a).T + bias)
    assert torch.autograd.gradcheck(
        lambda x, a, b: _MergedLoraLinear.apply(x, w, bias, a, b), [t.requires_grad_() for t in (x, a, b)]
    )


@pytest.mark.parametrize(("spanning", "late"), list(itertools.product((False, True), (False, True))))
def test_checkpointing_never_changes_a_gradient(scene, spanning, late):
    """The four cases of house.md: one graph through both roles or not, another role playing when gradients flow or not."""
    backbone, _, student, fake, at = scene
    shared_base = student.shared_base

    def loss():
        v = backbone.velocity(student, *at)
        if spanning:  # as in GAN back-propagation, through the fake score's blocks
            return backbone.velocity(fake, at[0] - v, *at[1:]).square().mean()
        with torch.no_grad():
            target = backbone.velocity(fake, at[0] - v, *at[1:])
        return (v - target).square().mean()

    plain = grads(loss, student, fake)
    shared_base.checkpoint(backbone.blocks(backbone.net))
    for p in (*student.parameters(), *fake.parameters()):
        p.grad = None
    found = loss()
    with shared_base.active("fake" if late else ""):
        found.backward()
    again = [[p.grad for p in net.parameters()] for net in (student, fake)]
    for a, b in zip(itertools.chain(*plain), itertools.chain(*again), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("again", [False, True])
def test_whatever_happens_between_a_pass_and_its_gradients_they_are_the_same(scene, again):
    """Cases in which libraries' adapter switching goes wrong, with blocks that run again and without."""
    backbone, _, student, fake, at = scene
    shared_base = student.shared_base
    if again:
        shared_base.checkpoint(backbone.blocks(backbone.net))
    loss = lambda net=student: backbone.velocity(net, *at).square().mean()  # noqa: E731
    alone, theirs = grads(loss, student)[0], grads(lambda: loss(fake), fake)[0]

    def others_pass():
        value = loss()
        with torch.no_grad():
            backbone.velocity(backbone.net, *at), backbone.velocity(fake, *at)
        return value

    def another_learns():
        value = loss()
        with torch.no_grad():
            for p in fake.parameters():
                p.add_(0.0)
        return value

    for between in (loss, others_pass, another_learns):
        for active_adapter in ("", "fake", "student"):  # who plays when gradients flow
            for p in (*student.parameters(), *fake.parameters()):
                p.grad = None
            value = between()
            with shared_base.active(active_adapter):
                value.backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(student.parameters(), alone, strict=True))
            assert all(p.grad is None for p in fake.parameters())
    # Both roles' graphs in one backward, and one whose own weights have moved.
    mine, other = grads(lambda: loss() + loss(fake), student, fake)
    assert all(torch.equal(a, b) for a, b in zip((*mine, *other), (*alone, *theirs), strict=True))
    value = loss()
    with torch.no_grad():
        next(student.parameters()).add_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_teachers_gradient_in_its_input_is_the_bases_to_the_bit(scene):
    backbone, plain, *_, (x, t, cond) = scene
    found = []
    for net in (plain.requires_grad_(False), backbone.net):
        x = x.detach().requires_grad_()
        found += torch.autograd.grad(backbone.velocity(net, x, t, cond).sum(), x)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "make", [lambda: pipelines.qwen_image(VOCABULARY, TINY), lambda: tiny_pipelines.z_image(VOCABULARY, TINY)]
)
def test_other_families_run_their_blocks_again_with_the_same_gradient(make):
    backbone = loading.backbone_from_pipeline(make(), {"side": pipelines.LATENT})
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two blue squares"]))
    shared_base = SharedBase(backbone.net.eval(), ["student", "fake"], RANK, backbone.lora_targets)
    student, fake = LoraModel(shared_base, "student"), LoraModel(shared_base, "fake")
    torch.manual_seed(0)
    for p in (*student.parameters(), *fake.parameters()):
        p.data.normal_(0, 0.1)
    x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])

    def loss():
        v = backbone.velocity(student, x, t, cond)
        with networks.no_param_grad(fake):
            return (backbone.velocity(fake, x - v, t, cond) * v).mean()

    plain = grads(loss, student, fake)
    shared_base.checkpoint(backbone.blocks(backbone.net))
    for a, b in zip(itertools.chain(*plain), itertools.chain(*grads(loss, student, fake)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert all(g is None for g in plain[1])


@pytest.mark.parametrize("rank", [0, RANK])
def test_following_the_critic_gives_the_same_gradient_checkpointed(tiny_folder, rank):
    """Its trunk is frozen for that pass, also when the blocks run again, after the pass has ended early at the last tap."""
    found = []
    for checkpointing in (False, True):
        backbone, _ = loading.load(str(tiny_folder))
        torch.manual_seed(1)
        with torch.no_grad():
            cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle", "a picture of two stars"]))
            null = backbone.encode_text(backbone.tokenize([""]))
        config = DiscriminatorConfig(trunk="own", feature_depths=(0.5, 1.0), hidden_size=8)
        student, score, trunk = networks.trainable_copies(backbone, ["student", "fake", "trunk"], rank, 0, checkpointing)
        fake = networks.make_fake_score_and_discriminator(backbone, config, 0, 2, null, score, trunk)
        torch.manual_seed(2)
        for p in (*student.parameters(), *fake.trunk.parameters()):
            p.data += 0.05 * torch.randn_like(p)
        discriminator = networks.Discriminator(backbone, fake, config)
        x, t = torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.8])
        loss = lambda: discriminator.generator_logit(x - backbone.velocity(student, x, t, cond), t, cond).sum()  # noqa: B023, E731
        mine, theirs = grads(loss, student, fake)
        assert all(g is None for g in theirs)
        learn = lambda: discriminator(x, t, cond).sum()  # noqa: B023, E731
        found.append(mine + grads(learn, fake)[0])
    for a, b in zip(*found, strict=True):  # adapters: to the bit but for the order in which blocks add to what they share
        torch.testing.assert_close(a, b, rtol=1e-5 if rank else 0, atol=1e-8 if rank else 0)
    assert sum(g is not None for g in found[0]) > len(found[0]) / 2


def test_shared_roles_are_separate_networks_with_an_adapter_each(scene):
    backbone, plain, student, fake, at = scene

    def loss(a, b):
        x0 = at[0] - backbone.velocity(a, *at)
        return (x0 * (x0 - backbone.velocity(b, x0, *at[1:])).detach()).sum()

    alone = [
        LoraModel(SharedBase(copy.deepcopy(plain), [name], RANK, backbone.lora_targets), name) for name in ("student", "fake")
    ]
    for role, lone in zip((student, fake), alone, strict=True):
        lone.load_state_dict(role.state_dict())
    (shared,), (separate,) = grads(lambda: loss(student, fake), student), grads(lambda: loss(*alone), alone[0])
    for a, b in zip(shared, separate, strict=True):
        assert torch.equal(a, b)


def test_a_role_walks_a_path_like_any_student(scene):
    backbone, plain, student, _, (_, _, cond) = scene
    plain.load_state_dict(student.fused_state_dict())
    noise = torch.randn(2, 2, *backbone.latent_shape)
    walk = lambda net: rollout(  # noqa: E731
        lambda x, t, c: backbone.velocity(net, x, t, c), cond, noise, torch.tensor([1.0, 0.5, 0.0]), cps(1.0)
    )
    torch.testing.assert_close(walk(student).x, walk(plain).x, atol=1e-4, rtol=1e-4)


def test_adapters_learn_in_float32_on_a_bfloat16_base(tiny_folder):
    backbone, _ = loading.load(str(tiny_folder), dtype=torch.bfloat16)
    role = LoraModel(SharedBase(backbone.net, ["student"], RANK, backbone.lora_targets), "student")
    assert {p.dtype for p in role.parameters()} == {torch.float32}
    assert backbone.net.get_submodule("transformer_blocks.0.attn.to_q").base_layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        cond = backbone.encode_text(backbone.tokenize(["a picture of a red circle"]))
    v = backbone.velocity(role, torch.randn(1, *backbone.latent_shape), torch.tensor([0.5]), cond)
    assert v.dtype == torch.float32
    (grads_,) = grads(lambda: v.square().sum(), role)
    assert all(g is not None and g.dtype == torch.float32 for g in grads_)
    assert role.fused_state_dict()["transformer_blocks.0.attn.to_q.weight"].dtype == torch.bfloat16
