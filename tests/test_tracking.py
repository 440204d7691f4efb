"""Tracking: the Kalman filter against the Riccati equation and its own recursion."""
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ssl_nb.classical.tracking import kalman_track, kalman_weights


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("interval, sigma, acceleration",
                         [(0.1, 0.5, 3.0), (0.02, 1.0, 0.5), (0.5, 0.2, 1.0)])
def test_the_gain_settles_at_that_of_the_riccati_equation(interval, sigma, acceleration):
    F, H, push = np.array([[1, interval],
                           [0, 1]]), np.array([[1.0, 0]]), np.array([[interval**2 / 2], [interval]])
    P = scipy.linalg.solve_discrete_are(F.T, H.T, acceleration**2 * push @ push.T,
                                        np.array([[sigma**2]]))
    gain = P @ H.T / (P[0, 0] + sigma**2)
    np.testing.assert_allclose(kalman_weights(1200, interval, sigma, acceleration)[-1, :, -1],
                               gain[:, 0], rtol=1e-5)


def textbook(z, interval, sigma, acceleration, speed):
    "The Kalman filter of one track, one axis, step by step in NumPy."
    F, push = np.array([[1, interval], [0, 1]]), np.array([interval**2 / 2, interval])
    x, P, states = np.array([z[0], 0.0]), np.diag([sigma**2, speed**2]), []
    for k, value in enumerate(z):
        if k:
            x, P = F @ x, F @ P @ F.T + acceleration**2 * np.outer(push, push)
            K = P[:, 0] / (P[0, 0] + sigma**2)
            x, P = x + K * (value - x[0]), (np.eye(2) - np.outer(K, [1, 0])) @ P
        states.append(x)
    return np.array(states)


def test_the_matrix_filters_as_the_recursion_does_for_any_batch():
    z = randn(2, 5, 25, 3, dtype=torch.float64).cumsum(-2)
    out = kalman_track(z, 0.1, 0.4, 2.0, speed=0.7)
    expected = np.apply_along_axis(lambda track: textbook(track, 0.1, 0.4, 2.0, 0.7).ravel(), 2,
                                   z.numpy()).reshape(2, 5, 25, 2, 3)
    for k, name in enumerate(("positions", "velocities")):
        np.testing.assert_allclose(out[name], expected[..., k, :], rtol=0, atol=1e-10)
    assert kalman_track(z.float(), 0.1, 0.4, 2.0)["positions"].dtype == torch.float32


def test_the_smoother_is_the_best_of_the_two_and_keeps_straight_lines():
    # the last frame has no later ones
    assert torch.allclose(kalman_weights(20, 0.1, 0.5, 1.0, smooth=True)[-1],
                          kalman_weights(20, 0.1, 0.5, 1.0)[-1])
    line = torch.linspace(0, 6, 40, dtype=torch.float64)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    out = kalman_track(line, 0.1, 0.5, 1.0, speed=100.0, smooth=True)
    torch.testing.assert_close(out["positions"], line, rtol=0, atol=2e-3)
    torch.testing.assert_close(out["velocities"][1:], line.diff(dim=0) / 0.1, rtol=0, atol=2e-2)


@pytest.mark.parametrize("bad", [{"interval": 0.0}, {"sigma": -1.0}, {"acceleration": math.nan},
                                 {"speed": math.inf}, {"n_frames": 0}])
def test_kalman_weights_refuse(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        kalman_weights(**({"n_frames": 5, "interval": 0.1, "sigma": 1.0, "acceleration": 1.0}
                             | bad))
