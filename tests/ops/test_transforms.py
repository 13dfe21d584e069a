"""Function transforms and forward-mode differentiation, against the plain formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gemma_fold import ops

EPS = 1e-6
Norm = Callable[[Tensor, Tensor], Tensor]


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, GAMMA, OTHER, RESIDUAL = made(3, 6, seed=0), made(6, seed=1), made(6, seed=2), made(3, 6, seed=3)


def plain_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gamma


def norm(x: Tensor, gamma: Tensor) -> Tensor:
    return ops.rms_norm(x, gamma, EPS)


def residual_for(x: Tensor) -> Tensor:
    return RESIDUAL.to(x.dtype)[: x.shape[0]]


def add(x: Tensor, gamma: Tensor) -> Tensor:
    y, total = ops.add_rms_norm(x, residual_for(x), gamma, EPS)
    return y + total


def sandwich(x: Tensor, gamma: Tensor) -> Tensor:
    y, total = ops.rms_norm_add_rms_norm(x, residual_for(x), gamma, OTHER, EPS, EPS)
    return y + total


def plain_sandwich(x: Tensor, gamma: Tensor) -> Tensor:
    total = residual_for(x) + plain_norm(x, gamma)
    return plain_norm(total, OTHER.to(x.dtype)) + total


def plain_sum(x: Tensor, gamma: Tensor) -> Tensor:
    total = residual_for(x) + x
    return plain_norm(total, gamma) + total


def add_in_place(x: Tensor, gamma: Tensor) -> Tensor:
    x, total = x.clone(), residual_for(x).clone() + 0 * x
    ops.add_rms_norm_(x, total, gamma, EPS)
    return x + total


def heads_in_place(x: Tensor, gamma: Tensor) -> Tensor:
    q, k = x[:2].clone()[None], x[2:].clone()[None]
    ops.qk_rms_norm(q, k, gamma, gamma, EPS)
    return torch.cat((q[0], k[0]))


def turned_in_place(x: Tensor, gamma: Tensor) -> Tensor:
    q, k = x[:2].clone()[None], x[2:].clone()[None]
    upright = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]], dtype=x.dtype)  # cos 1, sin 0
    ops.qk_rms_norm_rope(q, k, gamma, gamma, upright, None, EPS)
    return torch.cat((q[0], k[0]))


PAIRS: dict[str, tuple[Norm, Norm]] = {
    "norm": (norm, plain_norm),
    "add": (add, plain_sum),
    "sandwich": (sandwich, plain_sandwich),
}
IN_PLACE: dict[str, tuple[Norm, Norm]] = {
    "add_": (add_in_place, plain_sum),
    "heads": (heads_in_place, plain_norm),
    "heads, turned": (turned_in_place, plain_norm),
}


def check(transform: Callable[[Norm], Norm], pair: tuple[Norm, Norm]) -> None:
    ours = transform(pair[0])(X, GAMMA)
    expected = transform(pair[1])(X.double(), GAMMA.double())
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def tangent(f: Norm) -> Norm:
    def run(x: Tensor, gamma: Tensor) -> Tensor:
        return jvp(f, (x, gamma), (x.flip(0), gamma.flip(0)))[1]

    return run


def dual_tangent(f: Norm) -> Norm:
    def run(x: Tensor, gamma: Tensor) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            out = f(forward_ad.make_dual(x, x.flip(0)), forward_ad.make_dual(gamma, gamma.flip(0)))
            found = forward_ad.unpack_dual(out).tangent
            assert found is not None
            return found

    return run


def cotangent(f: Norm) -> Norm:
    def run(x: Tensor, gamma: Tensor) -> Tensor:
        dx, dgamma = vjp(f, x, gamma)[1](x.flip(0))
        return torch.cat((dx, dgamma[None]))

    return run


def cubed(f: Norm) -> Norm:
    return lambda x, gamma: f(x, gamma).pow(3).sum()


def compiled_tangent(f: Norm) -> Norm:
    return torch.compile(tangent(f), backend="eager", fullgraph=True)


TRANSFORMS: dict[str, Callable[[Norm], Norm]] = {
    "jvp": tangent,
    "compiled jvp": compiled_tangent,
    "dual": dual_tangent,
    "jacfwd of x": jacfwd,
    "jacfwd of gamma": lambda f: jacfwd(f, argnums=1),
    "jacrev of x": jacrev,
    "jacrev of gamma": lambda f: jacrev(f, argnums=1),
    "vjp": cotangent,
    "hessian": lambda f: hessian(cubed(f)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("pair", PAIRS)
def test_derivatives(transform: str, pair: str) -> None:
    check(TRANSFORMS[transform], PAIRS[pair])


@pytest.mark.parametrize("transform", ["jvp", "dual", "jacfwd of x"])
@pytest.mark.parametrize("pair", IN_PLACE)
def test_tangents_of_what_works_in_place(transform: str, pair: str) -> None:
    check(TRANSFORMS[transform], IN_PLACE[pair])


def test_gradients_per_sample() -> None:
    def per_sample(f: Norm) -> Norm:
        return lambda x, gamma: vmap(grad(lambda g, row: cubed(f)(row, g)), (None, 0))(gamma, x)

    check(per_sample, PAIRS["norm"])


def test_vmap_alone() -> None:
    batched = vmap(norm, (0, None))(X, GAMMA)
    assert torch.equal(batched, norm(X, GAMMA))


def test_a_gradient_of_a_gradient() -> None:
    def twice(f: Norm) -> Norm:
        def run(x: Tensor, gamma: Tensor) -> Tensor:
            x, gamma = x.clone().requires_grad_(), gamma.clone().requires_grad_()
            first = torch.autograd.grad(cubed(f)(x, gamma), (x, gamma), create_graph=True)
            penalty = sum(one.square().sum() for one in first)
            assert isinstance(penalty, Tensor)
            dx, dgamma = torch.autograd.grad(penalty, (x, gamma))
            return torch.cat((dx, dgamma[None]))

        return run

    for pair in PAIRS.values():
        check(twice, pair)
