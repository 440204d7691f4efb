"""The engine of all correlations against NumPy, and its ways against one another."""
import time
import numpy as np
import pytest
import torch
from ssl_nb.acoustics.geometry import mic_pairs, robot_head_array
from ssl_nb.classical import correlations
from ssl_nb.classical.correlations import (band_bins, bin_weights, block_matrices, block_width,
                                           correlate, pair_runs, takes_blocks, transform_length)
from ssl_nb.classical.gcc_phat import delays_from_gcc, gcc_phat, peak_ambiguity, peak_heights
from ssl_nb.classical.steered_power import SteeredPower, sphere_grid


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def by_numpy(audio, max_lag, band, fs):
    "PHAT of all pairs of one frame (mics, time), one frequency after the other."
    n = transform_length(audio.shape[-1], max_lag)
    X, f = np.fft.fft(audio.numpy(), n), np.abs(np.fft.fftfreq(n, 1 / fs))
    keep = (f >= band[0] - 1e-6) & (f <= band[1] + 1e-6)
    W = np.where(keep, X / np.abs(X), 0) / np.sqrt(keep.sum())
    turn = np.exp(2j * np.pi * np.outer(np.arange(-max_lag, max_lag + 1), np.arange(n)) / n)
    return np.array([(turn * (W[i] * W[j].conj())).sum(-1).real
                     for i, j in mic_pairs(len(audio)).tolist()])


@pytest.mark.parametrize("max_lag", [20, 80])  # by the matrix, by the transform
@pytest.mark.parametrize("band", [(0, 8000), (300, 3400), (100.5, 7999), (4000, 4100)])
def test_band_equals_brute_force(band, max_lag):
    audio = noise(3, 500)
    found = gcc_phat(audio, max_lag=max_lag, band=band, fs=16000)
    np.testing.assert_allclose(found, by_numpy(audio, max_lag, band, 16000), rtol=0, atol=1e-10)
    assert found.abs().max() <= 1 + 1e-9


def test_a_band_ignores_what_lies_outside():
    quiet, fs, t = noise(2, 4000), 16000, torch.arange(4000).double() / 16000
    loud = quiet + 1e3 * torch.sin(2 * torch.pi * 6000 * t)
    window = torch.hann_window(4000, dtype=torch.float64)
    inside = [gcc_phat(x * window, max_lag=30, band=(500, 4000), fs=fs) for x in (quiet, loud)]
    torch.testing.assert_close(*inside, rtol=0, atol=0.02)


@pytest.mark.parametrize("band", [None, (300, 3400)])
@pytest.mark.parametrize("max_lag, interpolation", [(20, 1), (20, 4), (150, 1), (150, 2)])
def test_long_recordings_take_another_way_to_the_same_numbers(max_lag, interpolation, band,
                                                              monkeypatch):
    audio, pairs = noise(2, 4, 900), torch.tensor([[0, 1], [0, 2], [3, 1]])
    how = pairs, max_lag, "phat", 1.0, interpolation, band, 16000
    usual = correlate(audio, *how)
    monkeypatch.setitem(correlations._AT_ONCE, "cpu", 100)
    torch.testing.assert_close(correlate(audio, *how), usual, rtol=0, atol=1e-12)
    audio.requires_grad_()
    correlate(audio, *how).square().sum().backward()
    assert torch.isfinite(audio.grad).all() and audio.grad.abs().max() > 0


def test_kept_matrices_are_bounded():
    # the largest matrices that a call of `correlate` keeps, in bytes
    worst = 8 * correlations._MATRIX * block_matrices.cache_info().maxsize
    assert worst <= 64 * 2**20
    for n, lag in ((4320, 32), (15_000, 100), (9_600_040, 400)):
        width = block_width(n, lag)
        assert takes_blocks(n, lag) and 2 * width * lag <= n and width <= correlations._WIDEST


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("quiet", [False, True])
def test_frames_that_are_not_plain_give_the_same(dtype, tolerance, quiet):
    audio = noise(5, 3, 1000).to(dtype)
    if quiet: audio[1] *= 1e-30 if dtype == torch.float32 else 1e-200
    audio[2, 1], audio[3] = 0, torch.nn.functional.avg_pool1d(audio[3], 9, 1, 4)
    found = gcc_phat(audio, max_lag=20)
    for k in (0, 1, 4):
        scaled = audio[k].double() / audio[k].double().abs().max()
        np.testing.assert_allclose(found[k], by_numpy(scaled, 20, (0, 8000), 16000), rtol=0,
                                   atol=tolerance)
    assert found[2, 0].abs().max() == 0 and found[2, 1].abs().max() > 0


def test_noise_of_one_source_is_taken_off():
    # a delay of 6 in white noise; the same hum in both channels, at lag 0, known from before
    sound, hum = noise(1, 6000), torch.zeros(1, 14000, dtype=torch.float64)
    t = torch.arange(14000).double() / 16000
    for h in range(1, 400): hum += torch.sin(2 * torch.pi * 20 * h * t + h)
    hum = 2 * hum / hum.std()
    pair = torch.cat([torch.roll(sound, 6, -1), sound])[:, :4000] + hum[:, :4000]
    silence = hum[:, 4000:].expand(2, -1) + 0.01 * noise(2, 10000, seed=1)
    usual, less = gcc_phat(pair, max_lag=20)[0], gcc_phat(pair, max_lag=20, noise=silence)[0]
    assert usual.argmax() == 20 and less.argmax() == 26 and less[20] < 0.5 * usual[20]
    # noise that is not there takes nothing off
    torch.testing.assert_close(gcc_phat(pair, max_lag=20, noise=1e-12 * silence)[0], usual, rtol=0,
                               atol=1e-6)


def test_ambiguity_tells_a_tone_from_a_sound_with_one_delay():
    white = noise(2000)
    tone = torch.sin(2 * torch.pi * torch.arange(2000).double() / 16)
    pair = lambda x: gcc_phat(torch.stack([x.roll(3), x]), max_lag=40, weighting="none")
    assert peak_ambiguity(pair(tone), 16000) > 0.95 and peak_ambiguity(pair(white), 16000) < 0.2
    # the only lag that the limit leaves has no rival; silence knows nothing
    assert peak_ambiguity(pair(tone), 16000, max_delay=4 / 16000) < 0.05
    assert peak_ambiguity(torch.zeros(3, 9), 16000).equal(torch.ones(3))
    fine = torch.tensor([[0.0, 0.2, 0.1, 0.8, 0.8, 0.3, 0.4]])
    torch.testing.assert_close(peak_ambiguity(fine, 16000), torch.tensor([0.5]))


def test_layout_of_the_spectrum():
    for n in (8, 9):
        assert bin_weights(n, torch.ones(1)).sum() == n
    assert band_bins(None, 16, 16000) == (0, 9) and band_bins((1000, 3000), 16, 16000) == (1, 4)
    assert pair_runs([[0, 1], [0, 2], [1, 3], [0, 1]]) == [[0, 1, 2], [1, 3, 1], [0, 1, 1]]


def test_numpy_and_lists_are_taken():
    audio = noise(2, 400).float()
    expected = gcc_phat(audio, max_lag=10)
    torch.testing.assert_close(gcc_phat(audio.numpy(), [[0, 1]], max_lag=10), expected)
    torch.testing.assert_close(gcc_phat(audio.tolist(), max_lag=10), expected)
    assert delays_from_gcc(expected.numpy(), 16000, max_delay=1e-4).abs().max() <= 1e-4
    assert peak_heights(expected, 16000, max_delay=[1e-4]).shape == (1,)


def test_one_frame_costs_less_than_forty():
    steered, frames = SteeredPower(robot_head_array(), sphere_grid(8.0), 16000), noise(40, 12, 1000)
    def seconds(audio):
        steered(audio)  # what is kept for later calls is not counted
        spent = []
        for _ in range(5):
            start = time.process_time()
            steered(audio)
            spent.append(time.process_time() - start)
        return min(spent)
    assert seconds(frames[:1]) < 0.5 * seconds(frames)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_frame_is_read_as_many_are(dtype):
    frames = noise(3, 12, 1000).to(dtype)
    steered = SteeredPower(robot_head_array(), sphere_grid(15.0), 16000)
    together = steered(frames)
    for frame, power in zip(frames, together):
        torch.testing.assert_close(steered(frame), power, rtol=0, atol=1e-5)
