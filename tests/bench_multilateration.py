"""Rows of the bench: positions from delays."""
import numpy as np
import torch
from bench import Case, Peer, close, row
from ssl_nb.acoustics.geometry import mic_pairs, pair_differences, tdoas, wall_array
from ssl_nb.classical.multilateration import multilaterate


def scipy_lm(mics, delays):
    "One Levenberg-Marquardt search after another, from the middle of the microphones."
    from scipy.optimize import least_squares
    places, (i, j) = mics.numpy(), mic_pairs(len(mics)).T.numpy()
    def residuals(p, measured):
        far = np.linalg.norm(p - places, axis=1) / 343.0
        return (far[i] - far[j] - measured) * 1e6
    return lambda: np.stack([least_squares(residuals, places.mean(0), method="lm",
                                           args=(d.numpy(),)).x for d in delays])


def solves(count, given):
    """Six microphones on the walls, errors of 10 µs; the peer is given the first of them only."""
    g, room = torch.Generator().manual_seed(0), torch.tensor([6.0, 5.0, 3.0])
    mics, box = wall_array(room, g).double(), torch.stack([torch.zeros(3), room])
    talkers = (0.5 + torch.rand(count, 3, generator=g) * (room - 1)).double()
    errors = 1e-5 * torch.randn(count, 6, generator=g).double()
    delays = tdoas(mics, talkers) + pair_differences(errors)
    agree = close(1e-5, lambda position: position[:given])
    return Case(lambda: multilaterate(mics, delays, bounds=box).position,
                [Peer("scipy", lambda: scipy_lm(mics, delays[:given]), agree, count / given)])


@row("multilaterate_many", "multilateration, 10,000 solves, 6 microphones")
def _(device="cpu"): return solves(10_000, 100)


@row("multilaterate_one", "multilateration, one solve, 6 microphones")
def _(device="cpu"): return solves(1, 1)
