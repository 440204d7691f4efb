"""The von Mises-Fisher distribution against SciPy, sums over the sphere in whole numbers, and
differences of expectations."""
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch

from ssl_nb.acoustics.geometry import angular_error
from ssl_nb.variational import von_mises_fisher as v

WIDE = torch.float64


def unit(*values):
    x = torch.tensor(values, dtype=WIDE)
    return x / x.norm(dim=-1, keepdim=True)


MEAN = unit(0.3, -0.5, 0.8)


@pytest.mark.parametrize("kappa", [0.0, 1e-6, 0.3, 0.999999, 1.000001, 20.0, 1e4])
def test_density_is_scipys(kappa):
    points = torch.tensor(scipy.stats.uniform_direction(3, seed=0).rvs(200))
    theirs = (scipy.stats.vonmises_fisher(MEAN.numpy(), kappa).logpdf(points.numpy()) if kappa
              else np.full(200, -math.log(4 * math.pi)))
    np.testing.assert_allclose(v.vmf_log_density(points, MEAN, kappa), theirs, rtol=1e-10,
                               atol=1e-8)


def reference(kappa):
    "Mean length and divergence by 60 digits of Python's decimals."
    from decimal import Decimal, getcontext
    getcontext().prec = 60
    k = Decimal(kappa)
    up, down = k.exp(), (-k).exp()
    length = (up + down) / (up - down) - 1 / k
    return float(length), float(k * length + k.ln() - ((up - down) / 2).ln())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (WIDE, 4e-14)])
def test_length_and_divergence_keep_their_digits_from_1e_minus_6_to_1e6(dtype, tolerance):
    kappas = [1e-6, 1e-4, 0.01, 0.5, 0.99, 1.01, 3.0, 10.0, 40.0, 90.0, 1e3, 1e4, 1e6]
    given = torch.tensor(kappas, dtype=dtype)
    wanted = np.array([reference(k) for k in given.double().tolist()])
    np.testing.assert_allclose(v.mean_length(given), wanted[:, 0], rtol=tolerance)
    np.testing.assert_allclose(v.kl_to_uniform(given), wanted[:, 1], rtol=3 * tolerance)


def test_published_check_values():
    kappa = torch.tensor([0.01, 1.0, 10.0, 100.0], dtype=WIDE)
    np.testing.assert_allclose(v.kl_to_uniform(kappa), [1.6667e-5, 0.151596, 1.995732, 4.298317],
                               rtol=2e-5, atol=5e-7)
    np.testing.assert_allclose(v.mean_length(kappa), [0.003333, 0.313035, 0.9, 0.99], atol=5e-7)


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_slopes_are_those_of_the_formulas_and_always_numbers(dtype):
    kappa = torch.tensor([0.0, 1e-6, 0.2, 0.999, 1.001, 30.0, 1e6], dtype=dtype, requires_grad=True)
    slope, = torch.autograd.grad(v.kl_to_uniform(kappa).sum(), kappa)
    k = kappa.detach().double().numpy()
    with np.errstate(all="ignore"):  # d KL / d kappa = kappa (1 / kappa^2 - 1 / sinh^2 kappa)
        wanted = np.where(k < 1e-3, k / 3, k * (1 / k**2 - 1 / np.sinh(np.minimum(k, 300)) ** 2))
    np.testing.assert_allclose(slope, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-9)


def test_entropy_is_scipys():
    for k in (0.4, 6.0, 500.0):
        assert abs(float(v.vmf_entropy(torch.tensor(k, dtype=WIDE)))
                   - scipy.stats.vonmises_fisher(MEAN.numpy(), k).entropy()) < 1e-9


# --- draws ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kappa", [1e-3, 0.7, 12.0, 1e3, 1e5])
def test_draws_have_the_distribution_of_the_cosine_and_a_uniform_turn(kappa):
    drawn = v.vmf_sample(MEAN, kappa, 4000, 5)
    assert drawn.shape == (4000, 3)
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(4000, dtype=WIDE), rtol=0, atol=1e-9)
    versine = (drawn - MEAN).square().sum(-1).numpy() / 2
    law = lambda b: np.expm1(-kappa * b) / np.expm1(-2 * kappa)
    assert scipy.stats.kstest(versine, law).pvalue > 1e-3
    side = unit(0.5, 0.3, 0.0)  # at right angles to the mean
    assert abs(float(side @ MEAN)) < 1e-12
    turn = torch.atan2(drawn @ torch.linalg.cross(MEAN, side), drawn @ side).numpy()
    assert scipy.stats.kstest(turn, scipy.stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_moments_of_draws():
    kappa, n = 3.0, 40_000
    drawn = v.vmf_sample(MEAN, kappa, n, 1)
    length = 1 / np.tanh(kappa) - 1 / kappa
    torch.testing.assert_close(drawn.mean(0), length * MEAN, rtol=0, atol=4 / n**0.5)
    # E u u^T = (length / kappa) I + (1 - 3 length / kappa) mu mu^T
    second = torch.einsum("na,nb->ab", drawn, drawn) / n
    wanted = (length / kappa * torch.eye(3, dtype=WIDE)
              + (1 - 3 * length / kappa) * torch.outer(MEAN, MEAN))
    torch.testing.assert_close(second, wanted, rtol=0, atol=4 / n**0.5)


def grid_expectation(f, mean, kappa, n=200):
    "The expectation of f by a product rule over the sphere, without any draw."
    x, w = np.polynomial.legendre.leggauss(n)
    turn = (np.arange(2 * n) + 0.5) * np.pi / n
    flat = np.sqrt(1 - x**2)[:, None]
    points = torch.tensor(np.stack([flat * np.cos(turn), flat * np.sin(turn),
                                    np.broadcast_to(x[:, None], (n, 2 * n))], -1))
    density = torch.exp(kappa * (points @ mean))
    weights = torch.tensor(w)[:, None] * density
    return float((f(points) * weights).sum() / weights.sum())


def test_gradients_through_draws_are_differences_of_expectations():
    f = lambda u: (u[..., 0] + 0.5 * u[..., 2]) ** 2 + torch.exp(u[..., 1])
    kappa = torch.tensor(4.0, dtype=WIDE, requires_grad=True)
    mean = MEAN.clone().requires_grad_()
    unit_mean = mean / mean.norm()
    value = f(v.vmf_sample(unit_mean, kappa, 60_000, 2)).mean()
    by_kappa, by_mean = torch.autograd.grad(value, (kappa, mean))
    h = 1e-4
    wanted = (grid_expectation(f, MEAN, 4 + h) - grid_expectation(f, MEAN, 4 - h)) / (2 * h)
    assert abs(float(by_kappa) - wanted) < 0.03 * abs(wanted) + 0.003
    for axis in torch.eye(3, dtype=WIDE):
        ahead, back = (MEAN + h * axis, MEAN - h * axis)
        wanted = (grid_expectation(f, ahead / ahead.norm(), 4.0)
                  - grid_expectation(f, back / back.norm(), 4.0)) / (2 * h)
        assert abs(float(by_mean @ axis) - wanted) < 0.03


def test_draws_are_batched_repeatable_and_whole_in_single_precision():
    means = torch.nn.functional.normalize(torch.randn(4, 5, 3,
                                                      generator=torch.Generator().manual_seed(0)),
                                          dim=-1)
    means[0, :3] = torch.eye(3)
    kappa = torch.logspace(-6, 6, 20).reshape(4, 5).requires_grad_()
    drawn = v.vmf_sample(means, kappa, 50, 0)
    assert drawn.shape == (50, 4, 5, 3) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, v.vmf_sample(means, kappa, 50, 0))
    drawn[..., 0].sum().backward()
    assert kappa.grad.isfinite().all() and drawn.isfinite().all()
    away = angular_error(drawn.detach(), means).amax(0)
    assert (away < 7 / kappa.detach().sqrt())[kappa.detach() > 10].all()


# --- cones, fits, two opinions --------------------------------------------------------------------

def test_cones_by_integration():
    for kappa in (0.0, 0.5, 40.0):
        k = max(kappa, 1e-9)
        for level in (0.1, 0.9):
            psi = float(v.credible_angle(torch.tensor(kappa, dtype=WIDE), level))
            inside = scipy.integrate.quad(lambda a: k / (2 * np.sinh(k)) * np.exp(k * np.cos(a))
                                          * np.sin(a), 0, psi)[0]
            assert abs(inside - level) < 1e-7
            side = unit(0.5, 0.3, 0.0)
            point = math.cos(psi) * MEAN + math.sin(psi) * side
            assert abs(float(v.cone_level(point, MEAN, kappa)) - level) < 1e-7


@pytest.mark.parametrize("kappa", [0.3, 2.0, 50.0, 1e4])
def test_fit_is_scipys(kappa):
    drawn = scipy.stats.vonmises_fisher(MEAN.numpy(), kappa, seed=3).rvs(300)
    mean, found = v.vmf_fit(torch.tensor(drawn))
    theirs = scipy.stats.vonmises_fisher.fit(drawn)
    np.testing.assert_allclose(mean, theirs[0], atol=1e-9)
    np.testing.assert_allclose(found, theirs[1], rtol=1e-6)


def test_fit_with_weights_is_the_fit_of_repeated_directions():
    drawn = v.vmf_sample(MEAN, 5.0, 6, 0)
    times = torch.tensor([3, 1, 2, 1, 5, 1])
    repeated = v.vmf_fit(drawn.repeat_interleave(times, 0))
    weighted = v.vmf_fit(torch.stack([drawn] * 2), torch.stack([times.to(WIDE)] * 2))
    for a, b in zip(repeated, weighted): torch.testing.assert_close(b, torch.stack([a] * 2))


def test_fit_of_nearly_equal_directions_in_single_precision():
    near = v.vmf_sample(MEAN.float(), 1e6, 4000, 0)
    assert abs(float(v.vmf_fit(near)[1]) / 1e6 - 1) < 0.1


def test_product_and_divergence_on_a_grid_over_the_sphere():
    other = unit(-0.2, 0.9, 0.1)
    mean, kappa = v.vmf_product(MEAN, 3.0, other, 5.0)
    points = torch.tensor(scipy.stats.uniform_direction(3, seed=1).rvs(50))
    left = v.vmf_log_density(points, MEAN, 3.0) + v.vmf_log_density(points, other, 5.0)
    gap = left - v.vmf_log_density(points, mean, kappa)
    torch.testing.assert_close(gap, gap[:1].expand(50), rtol=0, atol=1e-9)
    log_ratio = lambda u: v.vmf_log_density(u, MEAN, 3.0) - v.vmf_log_density(u, other, 5.0)
    wanted = grid_expectation(log_ratio, MEAN, 3.0)
    assert abs(float(v.vmf_divergence(MEAN, 3.0, other, 5.0)) - wanted) < 1e-9


def test_half_space_by_a_normal_integral_and_by_its_definition():
    up = unit(0.0, 0.0, 1.0)
    for tilt, kappa in ((0.4, 6.0), (-0.4, 6.0), (0.0, 100.0), (1.2, 0.5), (0.02, 2000.0)):
        mean = unit(math.cos(tilt), 0.0, math.sin(tilt))
        # density of the height: a Bessel function of the part along the plane
        law = lambda t: (kappa / (2 * math.sinh(kappa)) * math.exp(kappa * t * math.sin(tilt))
                         * np.i0(kappa * math.sqrt(1 - t * t) * math.cos(tilt)))
        if kappa < 500: wanted = scipy.integrate.quad(law, -1, 0, epsabs=1e-10)[0]
        else: wanted = scipy.stats.norm.cdf(-math.sqrt(kappa) * tilt)
        mass = float(v.mass_behind(mean, kappa, up))
        assert abs(mass - wanted) < (1e-6 if kappa < 500 else 2e-3)
        kl = float(v.kl_to_uniform(torch.tensor(kappa, dtype=WIDE)))
        prior = (1 - mass) * math.log(2 * 0.9) + mass * math.log(2 * 0.1)
        assert abs(float(v.kl_to_half_space(mean, kappa, up, 0.1)) - (kl - prior)) < 1e-9


def test_circle_is_scipys():
    angles = torch.linspace(-3.1, 3.1, 40, dtype=WIDE)
    for k in (1e-3, 2.0, 300.0):
        law = scipy.stats.vonmises(k, 0.7)
        np.testing.assert_allclose(v.circle_log_density(angles, 0.7, k),
                                   law.logpdf(angles.numpy()), rtol=1e-9, atol=1e-9)
        kappa = torch.tensor(k, dtype=WIDE)
        kl = math.log(2 * math.pi) - float(law.entropy())
        assert abs(float(v.circle_kl_to_uniform(kappa)) - kl) < 1e-9
        length = abs(scipy.stats.vonmises(k).expect(np.cos))
        assert abs(float(v.circle_mean_length(kappa)) - length) < 1e-6


# --- the door -------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: v.vmf_log_density([0.0, 0, 2], [0.0, 0, 1], 1.0), "directions.*unit vector"),
    (lambda: v.vmf_log_density([0.0, 0, 1], [0.0, 0, 1], -1.0), "kappa.*0"),
    (lambda: v.vmf_sample([0.0, 0, 1], float("nan"), 3, 0), "kappa"),
    (lambda: v.vmf_sample([0.0, 0, 1], 1.0, -1, 0), "n=-1"),
    (lambda: v.vmf_sample([0.0, 0, 1], 1.0, 1, None), "generator"),
    (lambda: v.credible_angle(1.0, 1.5), "level=1.5"),
    (lambda: v.vmf_fit([[0.0, 0, 1]]), "directions.*at least two"),
    (lambda: v.vmf_fit([[0.0, 0, 1]] * 3), "directions.*all the same"),
    (lambda: v.vmf_fit([[0.0, 0, 1], [0.0, 0, -1]]), "directions.*all sides"),
    (lambda: v.vmf_fit(torch.eye(3), [1.0, 1.0]), "weights.*one for each"),
    (lambda: v.vmf_fit(torch.eye(3), [0.0, 0.0, 0.0]), "weights.*all zero"),
    (lambda: v.kl_to_half_space([1.0, 0, 0], 1.0, [0.0, 0, 1], 0.0), "leak"),
])
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_numpy_lists_and_single_numbers_are_taken():
    assert float(v.kl_to_uniform(1)) > 0.15
    assert v.vmf_log_density(np.eye(3), [1, 0, 0], np.float32(2.0)).shape == (3,)
    assert v.vmf_sample((0, 0, 1), 3, 2, 0).shape == (2, 3)
