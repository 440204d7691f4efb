"""Multilateration against SciPy, trust against simulated scenes with known places, and what both
refuse."""
import math, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import least_squares
from scipy.stats import binomtest
from ssl_nb.acoustics.geometry import (max_pair_tdoas, mic_pairs, pair_differences, tdoas,
                                       wall_array)
from ssl_nb.classical.multilateration import (TRUST, WITHIN, closed_form, direction_bound,
                                              multilaterate,
                                              multilateration_curves, position_bound,
                                              spanned_dimensions, trust_features, trust_terms)
from ssl_nb.classical.trust import fit_calibration, reliability, trial, trust_of
from ssl_nb.workshop.speech import speech

ROOT = Path(__file__).resolve().parent.parent
ROOM = [6.0, 5.0, 3.0]
BOX = [[0.0, 0.0, 0.0], ROOM]


def cases(n, noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    mics = wall_array(ROOM, g).double()
    talkers = (0.5 + torch.rand(n, 3, generator=g) * (torch.tensor(ROOM) - 1)).double()
    errors = noise * torch.randn(n, 6, generator=g).double()
    return mics, talkers, tdoas(mics, talkers) + pair_differences(errors)


def scipy_fit(mics, delays, start, loss="linear", scale=1.0):
    "Least squares by SciPy, residuals in units of `scale`; position and cost."
    mics, pairs = mics.numpy(), mic_pairs(len(mics)).numpy()
    def residuals(p):
        far = np.linalg.norm(p - mics, axis=1) / 343.0
        return (far[pairs[:, 0]] - far[pairs[:, 1]] - delays.numpy()) / scale
    return least_squares(residuals, start.numpy(), loss=loss, xtol=1e-14, ftol=1e-14, gtol=1e-14)


def test_least_squares_are_those_of_scipy():
    mics, talkers, delays = cases(60, 1e-4)
    found = multilaterate(mics, delays, bounds=BOX).position
    for p, d, at in zip(found, delays, talkers):
        inside = scipy_fit(mics, d, at, scale=1e-5)
        if not all(0 < x < side for x, side in zip(inside.x, ROOM)): continue
        np.testing.assert_allclose(p.numpy(), inside.x, rtol=0, atol=2e-6)


def test_the_robust_answer_costs_no_more_than_scipy_finds_from_the_truth():
    mics, talkers, delays = cases(60, 1e-5, seed=1)
    g, limits = torch.Generator().manual_seed(2), max_pair_tdoas(mics)
    wrong = torch.rand(60, 15, generator=g).argsort(-1) < 4
    anything = (2 * torch.rand(60, 15, generator=g).double() - 1) * limits
    delays = torch.where(wrong, anything, delays)
    fix, beaten = multilaterate(mics, delays, bounds=BOX, loss="cauchy"), 0
    cost = lambda p, d: float(torch.log1p(((d - tdoas(mics, p)) / 5e-5) ** 2).sum())
    for p, d, at in zip(fix.position, delays, talkers):
        peer = torch.from_numpy(scipy_fit(mics, d, at, loss="cauchy", scale=5e-5).x)
        beaten += cost(p, d) > cost(peer, d) + 1e-3
    assert beaten <= 2 and ((fix.position - talkers).norm(dim=-1) < 0.05).double().mean() > 0.9


@pytest.mark.parametrize("thick", [0.3, 0.02, 0.003])
def test_a_nearly_flat_array_is_not_mirrored(thick):
    "Six microphones under a ceiling, hardly out of one plane: its mirror image fits almost."
    g = torch.Generator().manual_seed(4)
    mics = torch.rand(6, 3, generator=g).double() * torch.tensor([5.0, 4, thick])
    mics[:, 2] += 2.5
    talkers = 0.5 + torch.rand(50, 3, generator=g).double() * torch.tensor([4.0, 3, 1.2])
    errors = pair_differences(1e-6 * torch.randn(50, 6, generator=g).double())
    for loss in ("squared", "cauchy"):
        fix = multilaterate(mics, tdoas(mics, talkers) + errors, bounds=[[0.0] * 3, [5.0, 4, 2.5]],
                            loss=loss)
        assert (fix.position - talkers).norm(dim=-1).median() < 0.02


def test_each_case_may_have_its_array_its_weights_and_its_bounds():
    g = torch.Generator().manual_seed(5)
    mics = torch.rand(7, 5, 3, generator=g).double() * 4
    at = torch.rand(7, 3, generator=g).double() * 4
    delays = tdoas(mics, at)
    weights = 0.2 + torch.rand(7, 10, generator=g).double()
    bounds = torch.stack([torch.zeros(7, 3), 4 + torch.rand(7, 3, generator=g)], 1)
    together = multilaterate(mics, delays, weights=weights, bounds=bounds, loss="cauchy")
    alone = [multilaterate(m, d, weights=w, bounds=b, loss="cauchy")
             for m, d, w, b in zip(mics, delays, weights, bounds)]
    torch.testing.assert_close(together.position, torch.stack([f.position for f in alone]), rtol=0,
                               atol=1e-6)
    torch.testing.assert_close(together.position, at, rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences():
    mics, _, delays = cases(1, 0)  # without residual: then the Gauss-Newton matrix is the exact one
    one = delays[0].clone().requires_grad_()
    multilaterate(mics, one, bounds=BOX).position[0].backward()
    step = torch.zeros(15).double()
    step[3] = 1e-8
    up, down = (multilaterate(mics, delays[0] + s, bounds=BOX).position[0] for s in (step, -step))
    torch.testing.assert_close(one.grad[3], (up - down) / 2e-8, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("n_mics, dim, loss", [(5, 3, "squared"), (6, 3, "cauchy"),
                                               (9, 3, "squared"), (5, 2, "squared")])
def test_two_thirds_of_the_errors_are_within_one_spread(n_mics, dim, loss):
    g = torch.Generator().manual_seed(10 * n_mics + dim)
    side = torch.tensor(ROOM[:dim]).double()
    mics, at = (torch.rand(n, dim, generator=g).double() * side for n in (n_mics, 1500))
    sigma = 1e-6 if loss == "cauchy" else 1e-5  # the wide one would lie beyond the box
    errors = torch.randn(1500, n_mics, generator=g).double() * sigma
    limits = max_pair_tdoas(mics)
    fix = multilaterate(mics, (tdoas(mics, at) + pair_differences(errors)).clamp(-limits, limits),
                        loss=loss)
    share = float(((fix.position - at).norm(dim=-1) < fix.spread).double().mean())
    assert 0.57 < share < 0.73


def test_what_cannot_be_known_is_nan():
    mics, _, delays = cases(1, 1e-5)
    four = multilaterate(mics[:4], tdoas(mics[:4], torch.tensor([2.0, 3, 1]).double()), bounds=BOX)
    assert four.spread.isnan() and not four.trust.isnan()  # all pairs: their sums must close
    star = torch.tensor([[1, 0], [2, 0], [3, 0]])
    three = multilaterate(mics, tdoas(mics, torch.tensor([2.0, 3, 1]).double(), pairs=star), star,
                          bounds=BOX)
    assert three.spread.isnan() and three.trust.isnan()


# --- trust ----------------------------------------------------------------------------------------

def stored():
    table = pd.read_csv(ROOT / "data" / "trust" / "multilateration.csv")
    features = trust_terms(table[["evidence", "geometry", "on_bounds"]].to_numpy())
    return table, trust_of(features, TRUST), torch.tensor((table.error_m < WITHIN).to_numpy())


def test_of_the_test_fixes_that_state_nine_tenths_nine_in_ten_are_right():
    table, stated, right = stored()
    test = torch.tensor((table.split == "test").to_numpy())
    for of in (test, test & torch.tensor((table.loss == "cauchy").to_numpy())):
        nearly = of & (stated >= 0.85) & (stated <= 0.95)
        assert nearly.sum() > 80 and 0.85 <= right[nearly].double().mean() <= 0.95
    half = test & (stated > 0.4) & (stated < 0.6)
    assert 0.4 <= right[half].double().mean() <= 0.6


def test_compact_arrays_state_no_more_than_chance_allows():
    table, stated, right = stored()
    nearly = torch.tensor(((table.split == "test") & (table.kind == "cluster")).to_numpy())
    nearly = nearly & (stated >= 0.85) & (stated <= 0.95)
    count, good = int(nearly.sum()), int(right[nearly].sum())
    assert count > 40 and binomtest(good, count, 0.85, alternative="less").pvalue > 0.05


def test_terms_of_trust_are_those_of_the_spread():
    spread = torch.tensor([0.01, 0.08, 3.0]).double()
    signs = torch.stack([torch.full((3,), 2.0).double(), torch.log1p((spread / 0.08) ** 2),
                         torch.tensor([0.0, 1.0, 0.0]).double()], -1)
    sharp = torch.log1p((0.08 / spread) ** 2)
    torch.testing.assert_close(trust_terms(signs), torch.stack(
        [signs[:, 0], signs[:, 1], sharp, 2 * sharp, signs[:, 2]], -1))


def test_the_stored_rows_are_what_the_library_computes_now():
    sys.path.insert(0, str(ROOT / "data"))
    import make_trust
    table, voices = stored()[0], speech("test")
    for index in (0, 3, 4):
        now = pd.DataFrame(make_trust.rows("test", make_trust.heard(voices, 202, index)))
        then = table[(table.split == "test") & (table["index"] == index)].reset_index(drop=True)
        pd.testing.assert_frame_equal(now, then, check_dtype=False, rtol=0, atol=0.02)


def test_one_feature_of_two_values_has_the_log_odds_of_its_counts():
    x = torch.tensor([[0.0]] * 10 + [[1.0]] * 20)
    good = torch.tensor([True] * 2 + [False] * 8 + [True] * 15 + [False] * 5)
    fitted = fit_calibration(x, good, ridge=0)
    assert abs(fitted.bias - math.log(2 / 8)) < 1e-9
    assert abs(fitted.weights[0] - (math.log(3) - math.log(2 / 8))) < 1e-9
    torch.testing.assert_close(trust_of([[0.0], [1.0]], fitted), torch.tensor([0.2, 0.75]))
    assert trust_of([float("nan")], fitted).isnan()


def test_reliability_counts_by_hand():
    right = [False, True, True, True, True]
    told = reliability([0.1, 0.2, 0.9, 1.0, float("nan")], right, classes=2)
    torch.testing.assert_close(told.stated, torch.tensor([0.15, 0.95]))
    assert told.right.tolist() == [0.5, 1.0] and told.answers.tolist() == [2, 2]


def test_a_trial_depends_on_its_seed_and_number_only():
    voices = speech("valid")
    one, again, other = (trial(voices, 5, k).scene for k in (3, 3, 4))
    assert one.audio.equal(again.audio) and one.room != other.room


# --- bad calls ------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
ODD = [None, "text", True, b"x", object(), [], [[]], {}, 1 + 2j, NAN, INF, -INF, [NAN],
       [[1.0, 2.0]],
       torch.zeros(0), torch.zeros(2, 0, 3), torch.full((6, 3), NAN), torch.zeros(6, 4),
       torch.zeros(6, 3).half(), torch.zeros(6, 3, dtype=torch.bool), np.zeros((3, 6)),
       [[1], [1, 2]],
       torch.zeros(6, 3), torch.zeros(15), -1, 1e300, torch.zeros(7, 6, 3), torch.zeros(4, 15)]
MICS, _, DELAYS = cases(3, 1e-5)
FINE = {
    multilaterate: dict(mics=MICS, delays=DELAYS, pairs=None, weights=None, bounds=BOX,
                        loss="cauchy", scale=5e-5, c=343.0),
    trust_features: dict(mics=MICS, delays=DELAYS, position=torch.ones(3, 3), bounds=BOX, c=343.0,
                         weights=None, pairs=None),
    closed_form: dict(mics=MICS, toas=torch.zeros(6).double(), c=343.0),
    position_bound: dict(mics=MICS, sources=torch.ones(3), sigma=1e-5, pairs=None, c=343.0),
    direction_bound: dict(mics=MICS, directions=torch.tensor([1.0, 0, 0]), sigma=1e-5, c=343.0),
    spanned_dimensions: dict(mics=MICS),
    multilateration_curves: dict(mics=MICS[:, :2].float(), source=torch.ones(2), size=[6.0, 5.0],
                                 sigma=1e-4, draws=2),
    trust_terms: dict(signs=torch.rand(4, 3)),
    trust_of: dict(features=torch.zeros(5), calibration=TRUST),
    fit_calibration: dict(features=torch.rand(9, 2), good=torch.arange(9) > 4, ridge=0.1, steps=3),
    reliability: dict(trust=torch.rand(9), good=torch.arange(9) > 4, classes=3),
}


@pytest.mark.parametrize("function", FINE, ids=lambda f: f.__name__)
def test_bad_calls_are_refused_by_name_or_answered(function):
    fine = FINE[function]
    for name in fine:
        for odd in ODD:
            try: answer = function(**{**fine, name: odd})
            except (ValueError, TypeError) as e:
                assert name in str(e) or any(k in str(e) for k in fine), (name, odd, str(e))
                continue
            for part in answer if isinstance(answer, tuple) else [answer]:
                if isinstance(part, torch.Tensor) and name in ("mics", "delays", "bounds"):
                    hopeless = torch.is_floating_point(part) and part.isnan().all() and part.numel()
                    assert not hopeless or part is getattr(answer, "spread", None), (name, odd)
