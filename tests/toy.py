"""A world small enough to know exactly: class-conditional 2-D Gaussian mixtures with a closed-form velocity.

A condition is a Cond whose embedding [N, 1, 1] is the class; functions also take plain class indices [N].
"""

import copy
import math

import torch
from torch import nn

from advdmd.algorithms.base import DistillationModels
from advdmd.training.learner import Learner
from advdmd.training.optimizer import OptimizerConfig, ParamGroup
from advdmd.types import Batch, Cond


def as_cond(c):
    """Class indices [N] as conditions."""
    return Cond(c[:, None, None])


def classes(c):
    """Class indices [N] of conditions."""
    return c.embeds[:, 0, 0] if isinstance(c, Cond) else c


class Mixture:
    def __init__(self, std=0.25, shift=0.0, weights=(0.5, 0.5)):
        self.mu = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]], [[0.0, -1.0], [0.0, 1.0]]]) + shift
        self.std, self.logw = std, torch.tensor(weights).log()

    def sample(self, c, g):
        c = classes(c)
        m = torch.multinomial(self.logw.exp().expand(len(c), -1), 1, generator=g)[:, 0]
        return self.mu[c, m] + self.std * torch.randn(len(c), 2, generator=g)

    def log_prob(self, x, c):
        d2 = (x[:, None] - self.mu[classes(c)]).square().sum(-1) / self.std**2
        return torch.logsumexp(self.logw - 0.5 * d2, 1) - math.log(2 * math.pi * self.std**2)

    def __call__(self, x, t, c):
        """E[e - x0 | x_t = x]."""
        t, c = t[:, None], classes(c)
        var = (1 - t) ** 2 * self.std**2 + t**2
        resid = x[:, None] - (1 - t)[..., None] * self.mu[c]
        w = torch.softmax(self.logw - 0.5 * resid.square().sum(-1) / var, 1)
        x0 = self.mu[c] + ((1 - t) * self.std**2 / var)[..., None] * resid
        return (w[..., None] * ((t / var)[..., None] * resid - x0)).sum(1)


class Net(nn.Module):
    """MLP on (x, t, c): a velocity when out = 2, a logit when out = 1."""

    def __init__(self, out, width=96):
        super().__init__()
        self.emb, self.out = nn.Embedding(2, 8), out
        self.net = nn.Sequential(
            nn.Linear(2 + 8 + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, out),
        )

    def forward(self, x, t, c):
        f = t[:, None] * 2.0 ** torch.arange(4) * math.pi
        y = self.net(torch.cat([x, f.sin(), f.cos(), self.emb(classes(c))], 1))
        return y if self.out > 1 else y[:, 0]


class ToyDiscriminator:
    def __init__(self, net):
        self.net = net

    def __call__(self, x, t, c):
        return self.net(x, t, c)

    def generator_logit(self, x, t, c):
        return self.net(x, t, c)


class ScoreAndDiscriminator(nn.Module):
    def __init__(self, score, discriminator):
        super().__init__()
        self.score, self.discriminator = score, discriminator


def pretrained(teacher, steps=600, seed=0):
    """A network that imitates a teacher's exact velocity."""
    torch.manual_seed(seed)
    net, g = Net(2), torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        c = torch.randint(2, (256,), generator=g)
        x0, t = teacher.sample(c, g), torch.rand(256, generator=g)
        x = (1 - t[:, None]) * x0 + t[:, None] * torch.randn(256, 2, generator=g)
        loss = (net(x, t, c) - teacher(x, t, c)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net


def make_models(teacher, net, steps, lr=1e-3, policy_lr=1e-3, fake_lr=2e-3, decay=0, seed=0):
    torch.manual_seed(seed)
    student, score_and_discriminator = copy.deepcopy(net), ScoreAndDiscriminator(copy.deepcopy(net), Net(1))
    optimizers = {
        name: (OptimizerConfig(lr=rate, decay_steps=decay), [ParamGroup(student.parameters())])
        for name, rate in (("dm", lr), ("policy", policy_lr))
    }
    fake_score = (OptimizerConfig(lr=fake_lr, betas=(0.0, 0.999)), [ParamGroup(score_and_discriminator.parameters())])
    return DistillationModels(
        teacher=teacher,
        student=Learner("student", student, student, optimizers, ema_decay=0.99, log_prefixes={"policy": "policy/"}),
        fake_score=Learner(
            "fake_score",
            score_and_discriminator,
            lambda x, t, c, k: score_and_discriminator.score(x, t, c),
            {"main": fake_score},
        ),
        discriminator=ToyDiscriminator(score_and_discriminator.discriminator),
        discriminator_auc=torch.full((steps,), 0.5),
    )


def toy_batch_fn(data, prompts=8, group=8):
    def batch_fn(iteration):
        n = prompts * group
        c = (torch.arange(n) // group + iteration) % 2
        latents = data.sample(c, torch.Generator().manual_seed(1000 + iteration))
        return Batch(as_cond(c), latents), list(range(iteration * n, iteration * n + n))

    return batch_fn


def run_iterations(algorithm, models, batch_fn, iterations, start=0, seed=0):
    from advdmd.rng import Rng

    for iteration in range(start, iterations):
        batch, ids = batch_fn(iteration)
        log = algorithm.train_step(models, batch, iteration, Rng(seed, iteration, ids))
    return log


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])
