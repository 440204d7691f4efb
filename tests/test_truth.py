"""Numbers that come from outside: closed forms, exact delays, another library, the Cramér-Rao
bound."""
import math

import numpy as np
import pyroomacoustics as pra
import pytest
import torch
from ssl_nb.classical.gcc_phat import delay_bound, delays_from_gcc, gcc_phat, pair_recording
from ssl_nb.acoustics.geometry import (circular_array, linear_array, mic_pairs, max_pair_tdoas,
                                       pair_differences, random_array, tdoas, wall_array)
from ssl_nb.classical.multilateration import (closed_form, direction_bound, multilaterate,
                                              position_bound)
from ssl_nb.acoustics.rooms import Room, make_scene, measure_t60, reverberate, rirs
from ssl_nb.acoustics.signals import (add_noise, fractional_delay, power_db, resample, speech_like,
                                      stft, voice_activity)


# --- rooms against pyroomacoustics ----------------------------------------------------------------

def library_rirs(size, t60, source, mics, fs):
    "pyroomacoustics by itself: its filter switched off, its 40 samples taken away."
    pra.constants.set("rir_hpf_enable", False)
    absorption, order = pra.inverse_sabine(t60, size)
    room = pra.ShoeBox(size, fs=fs, materials=pra.Material(absorption), max_order=order)
    room.add_source(source)
    room.add_microphone_array(np.asarray(mics).T)
    room.compute_rir()
    pra.constants.set("rir_hpf_enable", True)
    complete = int(order * min(size) / 343 * fs)  # later, images of more reflections are missing
    return [row[0][40:][:complete] for row in room.rir]


@pytest.mark.parametrize("size, t60, fs", [((5, 4, 3), 0.25, 16000), ((3, 7, 2.5), 0.3, 8000),
                                           ((9, 6, 3.5), 0.35, 16000)])
def test_image_method_equals_the_library(size, t60, fs):
    generator = torch.Generator().manual_seed(0)
    mics = wall_array(size, generator)
    source = 0.5 + torch.rand(3, generator=generator) * (torch.tensor(size) - 1)
    ours, theirs = rirs(Room(size, t60), source, mics,
                        fs), library_rirs(size, t60, source.numpy(), mics.numpy(), fs)
    assert ours.dtype == torch.float32
    for own, other in zip(ours.numpy(), theirs):
        np.testing.assert_allclose(own[:len(other)], other[:len(own)], rtol=0,
                                   atol=1e-3 * np.abs(other).max())
        assert len(other) > 0.4 * len(own)


@pytest.mark.parametrize("method", ["anechoic", "image"])
@pytest.mark.parametrize("c", [343.0, 331.0])
def test_direct_path_lies_at_distance_over_c(method, c):
    sources = 0.3 + torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [29.0, 24.0, 19.0])
    # a huge room: the first echo comes late
    mics = torch.tensor([[15.0, 12.0, 10.0], [14.0, 3.0, 9.0]])
    d = torch.linalg.vector_norm(sources[:, None] - mics, dim=-1)
    h = rirs(Room((30, 25, 20), 2.0), sources, mics, 16000, method, c, max_order=0)
    delay = d.double() * 16000 / c
    f = torch.fft.rfftfreq(8192).double()
    band = (f > 0.02) & (f < 0.4)
    phase = torch.angle(torch.fft.rfft(h.double(), 8192)
                        * torch.exp(2j * torch.pi * f * delay[..., None]))[..., band]
    left_over = -(phase * f[band]).sum(-1) / (2 * torch.pi * f[band].square().sum())
    assert left_over.abs().max() < 0.05
    peaks = h.abs().argmax(-1)
    assert (peaks - delay).abs().max() <= 0.51


@pytest.mark.parametrize("t60", [0.2, 0.4, 0.8, 1.2])
@pytest.mark.parametrize("fs", [8000, 16000])
def test_measured_t60_of_synthetic_decays(t60, fs):
    t = torch.arange(int(1.6 * t60 * fs)) / fs
    decays = torch.randn(50, len(t),
                         generator=torch.Generator().manual_seed(2)) * 10 ** (-3 * t / t60)
    torch.testing.assert_close(measure_t60(decays, fs), torch.full((50,), t60), rtol=0.10, atol=0)


def test_measured_t60_of_a_pure_exponential_is_exact_and_agrees_with_the_library():
    decay = 10 ** (-3 * torch.arange(16000, dtype=torch.float64) / 16000 / 0.5)
    assert abs(measure_t60(decay, 16000, above=0).item() - 0.5) < 1e-3
    h = rirs(Room((5, 4, 3), 0.3), torch.tensor([1.0, 1, 1]), torch.tensor([[3.0, 2, 2]]))[0]
    theirs = pra.experimental.measure_rt60(h.double().numpy(), fs=16000, decay_db=20)
    assert abs(measure_t60(h, 16000, above=0).item() / theirs - 1) < 0.05


@pytest.mark.parametrize("call, words", [
    (lambda: Room((5, 4, 3), -1), "t60=-1"), (lambda: Room((5, 4, 3), float("nan")), "t60=nan"),
    (lambda: Room((5, 4), 0.3), "size: shape"), (lambda: Room((5, 0, 3), 0.3), "size.*positive"),
    (lambda: Room((6, 5, 3), 0.1), "smallest T60 it can have is 0.115"),
    (lambda: rirs(Room((5, 4, 3)), torch.tensor([5.1, 1, 1]), torch.ones(1, 3)),
     r"sources: \[5.1, 1.0, 1.0\] m is outside"),
    (lambda: rirs(Room((5, 4, 3)), torch.tensor([float("nan"), 1, 1]), torch.ones(1, 3)),
     "sources: nan at index"), (lambda: rirs(Room((5, 4, 3)), torch.tensor([1.0, 1, 1]),
                                             torch.tensor([[1.0, 1, -0.1]])), "mics: .* outside"),
    (lambda: rirs(Room((5, 4, 3)), torch.tensor([1.0, 1, 1]),
                  torch.tensor([[2.0, 1, 1], [1.0, 1, 1]])), "microphone 1 is 0 mm from a source"),
    (lambda: rirs(Room((5, 4, 3)), torch.tensor([1.0, 1, 1]),
                  torch.tensor([[2.0, 1, 1]]), method="ism"), "method='ism'"),
    (lambda: rirs(Room((5, 4, 3)), torch.tensor([1.0, 1, 1]), torch.tensor([[2.0, 1, 1]]), fs=0),
     "fs=0"),
    (lambda: rirs(Room((5, 4, 3)), torch.tensor([1.0, 1, 1]), torch.tensor([[2.0, 1, 1]]), c=-3.0),
     "c=-3.0"), (lambda: measure_t60(torch.zeros(1000), 16000), "silent"),
    (lambda: measure_t60(torch.eye(1000)[0], 16000), "at least 10"),
    (lambda: measure_t60(torch.ones(1000), 16000, fit=(-25.0, -5.0)), "fit="),
])
def test_impossible_rooms_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_reverberate_keeps_length_or_tail():
    x, h = torch.randn(3, 100), torch.randn(3, 2, 30)
    full = reverberate(x, h, tail=True)
    assert full.shape == (3, 2, 129) and reverberate(x, h).equal(full[..., :100])
    np.testing.assert_allclose(full[1, 0], np.convolve(x[1], h[1, 0]), rtol=0, atol=1e-5)


def test_scene_is_repeatable_and_its_snr_is_right():
    make = lambda seed, snr: make_scene(Room((5, 4, 3), 0.2), speech_like(1.0),
                                        torch.tensor([1.0, 1, 1]), circular_array(4, 0.1) + 2,
                                        snr_db=snr, generator=torch.Generator().manual_seed(seed))
    noisy, same, other, clean = make(0, 10.0), make(0, 10.0), make(1, 10.0), make(0, math.inf)
    assert noisy.audio.equal(same.audio) and not noisy.audio.equal(other.audio)
    snr = 10 * (clean.audio.square().mean() / (noisy.audio - clean.audio).square().mean()).log10()
    assert abs(snr - 10) < 0.2


# --- delays ---------------------------------------------------------------------------------------

def delayed_pairs(draws, samples, snr_db, seed, dtype=torch.float32):
    "White noise at two microphones with exact fractional delays: audio and delays in samples."
    generator = torch.Generator().manual_seed(seed)
    delay = (torch.rand(draws, generator=generator, dtype=dtype) - 0.5) * 30
    source = torch.randn(draws, samples + 400, generator=generator, dtype=dtype)
    return add_noise(torch.stack([fractional_delay(source, delay), source], 1)[..., 200:-200],
                     snr_db, generator), delay


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("weighting", ["phat", "scot", "none"])
def test_delay_accuracy_on_white_noise(seed, weighting):
    audio, delay = delayed_pairs(200, 4096, 20.0, seed)
    gcc = gcc_phat(audio, max_lag=24, weighting=weighting)
    refined = delays_from_gcc(gcc, 16000.0)[:, 0] * 16000 - delay
    whole = delays_from_gcc(gcc, 16000.0, "none")[:, 0] * 16000 - delay
    assert refined.square().mean().sqrt() <= 0.05 and whole.abs().max() <= 0.5 + 0.02


def test_nobody_beats_the_delay_bound():
    audio, delay = delayed_pairs(300, 4096, 0.0, 3)
    rmse = (delays_from_gcc(gcc_phat(audio, max_lag=24), 1.0)[:, 0] - delay).square().mean().sqrt()
    bound = delay_bound(torch.full((4001,), 1.0), 1.0, 4096.0)
    assert 0.9 * bound < rmse < 3 * bound
    rho, B, T = 1.0, 0.5, 4096.0
    assert abs(bound.item() / (3 * (1 + 2 * rho) / (8 * math.pi**2 * T * B**3 * rho**2)) ** 0.5
               - 1) < 1e-4


def test_interpolated_correlation_and_parabola():
    audio, delay = delayed_pairs(50, 4096, 40.0, 4)
    fine = delays_from_gcc(gcc_phat(audio, max_lag=24, interpolation=8), 1.0, "parabolic",
                           interpolation=8)[:, 0]
    assert (fine - delay).square().mean().sqrt() < 0.01


def test_search_limits_are_kept():
    audio, delay = delayed_pairs(50, 2048, 20.0, 5)
    limit = torch.full((1,), 3.0)
    found = delays_from_gcc(gcc_phat(audio, max_lag=24), 1.0, max_delay=limit)[:, 0]
    assert (found.abs() <= 3).all() and ((found - delay).abs()[delay.abs() < 2.5] < 0.1).all()


def test_delay_of_a_simulated_pair():
    for delay in (-2.5e-3, -4e-4, 0.0, 1.7e-3):
        found = delays_from_gcc(gcc_phat(pair_recording(delay, 30, t60=0), max_lag=60), 16000)[0]
        assert abs(found - delay) < 5e-6


@pytest.mark.parametrize("call, words", [
    (lambda x: gcc_phat(x[:, :1], max_lag=9), "needs at least 2"),
    (lambda x: gcc_phat(x, max_lag=500), "max_lag=500"),
    (lambda x: gcc_phat(x, max_lag=0), "max_lag=0"),
    (lambda x: gcc_phat(x, weighting="ml"), "weighting='ml'"),
    (lambda x: gcc_phat(x, interpolation=0), "interpolation=0"),
    (lambda x: gcc_phat(x, beta=1.5), "beta=1.5"),
    (lambda x: gcc_phat(x, beta=0.5, weighting="scot"), "only the weighting 'phat'"),
    (lambda x: gcc_phat(x / 0), "finite"),
    (lambda x: gcc_phat(x[0].T, max_lag=2), "time must come last"),
    (lambda x: gcc_phat(x, band=(300, 3400)), "needs fs"),
    (lambda x: gcc_phat(x, band=(3400, 300), fs=16000), "band="),
    (lambda x: gcc_phat(x, band=(9000, 9900), fs=16000), "band="),
    (lambda x: gcc_phat(x, torch.tensor([[0, 4]])), r"pairs: \[0, 4\]"),
    (lambda x: gcc_phat(x, torch.tensor([[1, 1]])), "pairs: .*different"),
    (lambda x: delays_from_gcc(torch.ones(1, 4), 16000), "odd number"),
    (lambda x: delays_from_gcc(torch.ones(1, 5), 0), "fs=0"),
    (lambda x: delays_from_gcc(torch.ones(1, 5), 16000, "cubic"), "refine='cubic'"),
    (lambda x: delay_bound(-torch.ones(9), 16000, 1.0), "snr: -1"),
    (lambda x: pair_recording(0.003), "delay=0.003"),
])
def test_bad_correlation_calls(call, words):
    with pytest.raises(ValueError, match=words): call(torch.randn(2, 3, 500))


# --- positions ------------------------------------------------------------------------------------

GEOMETRIES = {
    "walls": (wall_array([6.0, 5.0, 3.0], torch.Generator().manual_seed(3)).double(),
              [3.9, 1.2, 1.1]),
    "spread": (random_array(8, [6.0, 5.0, 3.0], torch.Generator().manual_seed(4)).double(),
               [1.2, 3.8, 1.9]),
    "plane": (torch.tensor([[0.0, 0.0], [6, 0], [6, 5], [0, 5], [3, 0]]).double(), [2.2, 3.4]),
}


@pytest.mark.parametrize("sigma", [1e-7, 1e-6, 1e-5])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_multilateration_reaches_the_bound(name, sigma):
    mics, source = GEOMETRIES[name]
    source = torch.tensor(source).double()
    errors = torch.randn(1000, len(mics), generator=torch.Generator().manual_seed(7),
                         dtype=torch.float64) * sigma
    fix = multilaterate(mics, tdoas(mics, source) + pair_differences(errors))
    rmse = (fix.position - source).square().sum(-1).mean().sqrt()
    assert 0.9 < rmse / position_bound(mics, source, sigma).trace().sqrt() < 1.1
    assert fix.converged.all()


def test_unequal_microphones_in_the_bound():
    mics, source = GEOMETRIES["walls"]
    source, sigma = (torch.tensor(source).double(),
                     torch.tensor([1.0, 1, 1, 1, 1, 1e4]).double() * 1e-6)
    without = position_bound(mics[:5], source, 1e-6)
    torch.testing.assert_close(position_bound(mics, source, sigma), without, rtol=0.02, atol=0)


def test_weight_zero_drops_a_pair_and_cauchy_finds_it():
    mics, source = GEOMETRIES["walls"]
    source = torch.tensor(source).double()
    delays = tdoas(mics, source)
    delays[4] += 3e-3
    trust = torch.ones(15).double()
    trust[4] = 0
    box = [[0.0, 0, 0], [6.0, 5, 3]]
    assert torch.linalg.vector_norm(multilaterate(mics, delays, weights=trust, bounds=box).position
                                    - source) < 1e-4
    assert torch.linalg.vector_norm(multilaterate(mics, delays, bounds=box, loss="cauchy").position
                                    - source) < 1e-3
    assert (torch.linalg.vector_norm(multilaterate(mics, delays, bounds=box).position - source)
            > 0.05)


def test_bounds_hold_and_equal_bounds_fix_a_coordinate():
    mics, source = GEOMETRIES["walls"]
    noisy = tdoas(mics, torch.tensor(source).double()) + 2e-3 * torch.randn(
        200, 15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = noisy.clamp(-max_pair_tdoas(mics), max_pair_tdoas(mics))
    low, high = torch.tensor([[1.0, 1.0, 1.1], [4.0, 2.0, 1.1]]).double()
    position = multilaterate(mics, noisy, bounds=torch.stack([low, high])).position
    assert ((position >= low) & (position <= high)).all()
    exact = multilaterate(mics[:3], tdoas(mics[:3], torch.tensor([3.9, 1.2, 1.1]).double()),
                          bounds=[[2.0, 0.5, 1.1], [6.0, 3.0, 1.1]])
    torch.testing.assert_close(exact.position, torch.tensor([3.9, 1.2, 1.1]).double(), rtol=0,
                               atol=1e-6)


def test_ceiling_array_with_bounds_below_it():
    ceiling = torch.cat([torch.rand(6, 2, generator=torch.Generator().manual_seed(1)) * 4,
                         torch.full((6, 1), 3.0)], 1).double()
    source = torch.tensor([1.5, 2.5, 1.2]).double()
    fix = multilaterate(ceiling, tdoas(ceiling, source), bounds=[[0.0, 0, 0], [5.0, 5, 3]])
    torch.testing.assert_close(fix.position, source, rtol=0, atol=1e-5)


@pytest.mark.parametrize("call, words", [
    (lambda m, t: multilaterate(m[:3], t[:3]), "at least 4"),
    (lambda m, t: multilaterate(m[:2, :2], t[:1]), "at least 3"),
    (lambda m, t: multilaterate(m * torch.tensor([1.0, 1, 0]).double(), t), "in a plane, so the "
     "mirror image"), (lambda m, t: multilaterate(linear_array(6, 0.1).double(), t), "on a line"),
    (lambda m, t: multilaterate(linear_array(6, 0.1)[:, :2].double(), t),
     "on a line, so the mirror image"), (lambda m, t: multilaterate(m, t[:-1]), "delays: 14"),
    (lambda m, t: multilaterate(m, t * float("nan")), "finite"),
    (lambda m, t: multilaterate(m, t, weights=-torch.ones(15).double()), "weights"),
    (lambda m, t: multilaterate(m, t, weights=torch.zeros(15).double()), "all 0"),
    (lambda m, t: multilaterate(m, t, loss="l1"), "loss='l1'"),
    (lambda m, t: multilaterate(m, t, scale=0.0), "scale=0"),
    (lambda m, t: multilaterate(m, t, bounds=[[0.0, 0, 0]]), "bounds: shape"),
    (lambda m, t: multilaterate(m, t, bounds=[[1.0, 0, 0], [0.0, 1, 1]]), "above the high corner"),
    (lambda m, t: position_bound(m, m.mean(0), 0.0), "sigma=0"),
    (lambda m, t: direction_bound(m, torch.tensor([1.0, 0, 0]), -1.0), "sigma=-1"),
])
def test_bad_positions_calls(call, words):
    mics, source = GEOMETRIES["walls"]
    with pytest.raises(ValueError, match=words):
        call(mics, tdoas(mics, torch.tensor(source).double()))


def test_closed_form_is_exact_and_the_bound_is_infinite_where_nothing_is_known():
    mics = random_array(5, [4.0, 4, 3], torch.Generator().manual_seed(5)).double()
    sources = torch.rand(50, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 3
    toas = torch.linalg.vector_norm(sources[:, None] - mics, dim=-1) / 343.0 + 0.123
    torch.testing.assert_close(closed_form(mics, toas), sources, rtol=0, atol=1e-6)
    line = linear_array(4, 0.1).double()
    assert torch.isinf(position_bound(line, torch.tensor([0.0, 1.0, 0.0]).double(), 1e-6)).any()
    assert torch.isfinite(position_bound(line[:, :2], torch.tensor([0.1, 1.0]).double(),
                                         1e-6)).all()
    assert (max_pair_tdoas(line) > 0).all()


# --- signals --------------------------------------------------------------------------------------

def test_power_resampling_activity():
    t = torch.arange(16000) / 16000
    assert abs(power_db(torch.sin(2 * math.pi * 100 * t)) + 3.0103) < 1e-3
    # above the new Nyquist frequency: must vanish
    aliased = resample(torch.sin(2 * math.pi * 7000 * t), 16000, 8000)
    assert power_db(aliased[400:-400]) < -50
    assert (not voice_activity(torch.zeros(4000), 16000).any()
            and voice_activity(torch.ones(4000), 16000).all())
    assert stft(torch.randn(2, 3, 4000)).shape == (2, 3, 257, 16)
    with pytest.raises(ValueError, match="silent"): add_noise(torch.zeros(2, 2, 100), 10.0)
    with pytest.raises(ValueError, match="kind='brown'"):
        add_noise(torch.ones(2, 100), 10.0, kind="brown")


# --- faults that were found once, so that they stay away ------------------------------------------

def test_too_few_independent_delays_are_refused():
    mics, source = GEOMETRIES["walls"]
    source = torch.tensor(source).double()
    for pairs in ([[0, 1]], [[0, 1], [2, 3]], [[0, 1], [1, 2], [0, 2]]):
        pairs = torch.tensor(pairs)
        with pytest.raises(ValueError, match="independent delays"):
            multilaterate(mics, tdoas(mics, source, pairs=pairs), pairs)
    few = torch.zeros(15).double()
    few[:2] = 1
    with pytest.raises(ValueError, match="2 independent delays"):
        multilaterate(mics, tdoas(mics, source), weights=few)


def test_mirror_image_at_a_fixed_height_is_noticed():
    # in the plane y = 0
    upright = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1.3]]).double()
    source = torch.tensor([0.3, -1.5, 1.0]).double()
    with pytest.raises(ValueError, match="mirror image"):
        multilaterate(upright, tdoas(upright, source), bounds=[[-3.0, -3, 1], [3.0, 3, 1]])
    fix = multilaterate(upright, tdoas(upright, source), bounds=[[-3.0, -3, 1], [3.0, 0, 1]])
    torch.testing.assert_close(fix.position, source, rtol=0, atol=1e-5)
    # its mirror turns z, and z is known
    level = torch.tensor([[0.0, 0, 2], [1, 0, 2], [0, 1, 2], [1, 1.3, 2]]).double()
    below = torch.tensor([0.3, 1.5, 1.0]).double()
    torch.testing.assert_close(multilaterate(level, tdoas(level, below),
                                             bounds=[[-3.0, -3, 1], [3.0, 3, 1]]).position, below,
                               rtol=0, atol=1e-5)


def test_a_microphone_in_no_pair_does_not_hide_the_mirror():
    flat = torch.tensor([[0.0, 0, 1], [4, 0, 1], [0, 4, 1], [4, 4, 1], [2, 1, 1],
                         [2, 2, 2.5]]).double()  # only the last is off the plane
    source, within = torch.tensor([1.0, 2.5, 1.6]).double(), mic_pairs(5)
    with pytest.raises(ValueError, match="mirror image"):
        multilaterate(flat, tdoas(flat, source, pairs=within), within,
                      bounds=[[0.0, 0, 0], [4.0, 4, 3]])
    fix = multilaterate(flat, tdoas(flat, source), bounds=[[0.0, 0, 0], [4.0, 4, 3]])
    torch.testing.assert_close(fix.position, source, rtol=0, atol=1e-5)


def test_residual_is_the_rms_of_what_is_not_explained():
    mics, source = GEOMETRIES["walls"]
    source = torch.tensor(source).double()
    delays = tdoas(mics, source)
    delays[3] -= 5e-3
    fix = multilaterate(mics, delays, bounds=[[0.0, 0, 0], [6.0, 5, 3]], loss="cauchy")
    torch.testing.assert_close(fix.residual, torch.tensor(5e-3 / 15**0.5).double(), rtol=1e-2,
                               atol=0)


def test_direction_bound_keeps_what_is_known():
    ring, flat = circular_array(6, 0.1).double(), torch.tensor([1.0, 0, 0]).double()
    bound = direction_bound(ring, flat, 1e-5)
    # sum of y^2 over the ring: 3 r^2
    assert torch.isinf(bound[1, 1]) and abs(bound[0, 0].sqrt() - 343e-5 / (0.1 * 3**0.5)) < 1e-6


def test_silent_channel_has_a_gradient_and_inference_does_not_spoil_training():
    x = torch.randn(3, 1000)
    x[1] = 0
    with torch.inference_mode(): gcc_phat(x, max_lag=11)
    x.requires_grad_()
    gcc_phat(x, max_lag=11).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[0].abs().max() > 0


def test_empty_batches_stay_empty():
    mics = GEOMETRIES["walls"][0].float()
    assert gcc_phat(torch.zeros(0, 3, 100), max_lag=9).shape == (0, 3, 19)
    assert delays_from_gcc(torch.zeros(0, 3, 19), 16000).shape == (0, 3)
    assert multilaterate(mics, torch.zeros(0, 15)).position.shape == (0, 3)
    assert rirs(Room((6, 5, 3)), torch.zeros(0, 3), mics).shape[:2] == (0, 6)
    assert fractional_delay(torch.zeros(0, 50), torch.zeros(0)).shape == (0, 50)


def test_long_delays_are_exact():
    x = torch.randn(160_000, generator=torch.Generator().manual_seed(0))
    single, double = (fractional_delay(x, torch.tensor(20000.3)),
                      fractional_delay(x.double(), torch.tensor(20000.3).double()))
    assert (single - double).abs().max() < 5e-3 and (
        fractional_delay(x, torch.tensor(20000.0))[20000:] - x[:-20000]).abs().max() < 1e-4


@pytest.mark.parametrize("call, words", [
    (lambda: delays_from_gcc(torch.full((1, 5), math.nan), 16000), "gcc: .* finite"),
    (lambda: delays_from_gcc(torch.ones(1, 5), 16000, max_delay=-torch.ones(1)), "max_delay: -1"),
    (lambda: delays_from_gcc(torch.ones(1, 5), 16000, max_delay=torch.full((1,), math.nan)),
     "max_delay: nan"), (lambda: add_noise(torch.ones(2, 50), -math.inf), "snr_db=-inf"),
    (lambda: add_noise(torch.ones(2, 50), math.nan), "snr_db=nan"),
    (lambda: make_scene(Room((5, 4, 3)), speech_like(0.5), torch.tensor([1.0, 1, 1]),
                        torch.ones(2, 3) * 2, snr_db=math.nan), "snr_db=nan"),
    (lambda: stft(torch.ones(900), 511), "length=511"),
    (lambda: stft(torch.ones(900), 512, 0), "hop=0"),
    (lambda: fractional_delay(torch.ones(50), torch.tensor(math.nan)), "delay"),
    (lambda: speech_like(0.0), "seconds=0"),
    (lambda: position_bound(torch.eye(3), torch.ones(3)), "one of the two"),
])
def test_bad_calls_that_used_to_pass(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_short_speech():
    assert [len(speech_like(s)) for s in (0.001, 0.01, 0.05)] == [16, 160, 800]


@pytest.mark.parametrize("call, words", [
    (lambda m, t: multilaterate(m, t * 16000),
     r"delays: -?\d\S* s for the pair \[\d, \d\], must be at most \d\S* s"),
    (lambda m, t: multilaterate(m[:1].expand(6, 3), 0 * t), "mics: 1 different positions"),
    (lambda m, t: multilaterate(m[[0, 0, 0, 1, 1, 2]], 0 * t), "mics: 3 different positions"),
    (lambda m, t: closed_form(m[:4], t[:4]), "mics: 4 different positions, at least 5"),
    (lambda m, t: closed_form(m[[0, 0, 1, 2, 3]], t[:5]), "mics: 4 different positions"),
    (lambda m, t: closed_form(m[:3, :2], t[:3]), "mics: 3 different positions, at least 4"),
    (lambda m, t: closed_form(linear_array(6, 0.1).double(), t[:6]), "mics: on a line"),
    (lambda m, t: closed_form(circular_array(6, 0.1).double(), t[:6]), "mics: in a plane"),
    (lambda m, t: closed_form(m, t[:6], c=0.0), "c=0"),
    (lambda m, t: direction_bound(m, torch.tensor([2.0, 0, 0]), 1e-5), "directions: .* length 2"),
    (lambda m, t: direction_bound(m[:, :2], torch.tensor([1.0, 0, 0]), 1e-5), "mics"),
    (lambda m, t: multilaterate(m.tolist(), "delays"), "delays='delays'"),
    (lambda m, t: multilaterate(m, t, weights=None, bounds="room"), "bounds='room'"),
    (lambda m, t: multilaterate(m, t, c=-343.0), "c=-343"),
    (lambda m, t: position_bound(m, m.mean(0), "fine"), "sigma"),
])
def test_positions_that_cannot_be_found_are_refused_by_name(call, words):
    mics, source = GEOMETRIES["walls"]
    with pytest.raises(ValueError, match=words):
        call(mics, tdoas(mics, torch.tensor(source).double()))


def test_noise_may_stretch_a_delay_a_little_and_a_dropped_one_at_will():
    mics, source = GEOMETRIES["walls"]
    end = mics[0] + 1.5 * (mics[0] - mics[1])  # on the line of a pair: its delay is the longest
    delays = tdoas(mics, end)
    delays[0] *= 1.01
    assert (multilaterate(mics, delays).position - end).norm() < 0.5
    delays = tdoas(mics, torch.tensor(source).double())
    delays[7] = 1.0
    trust = torch.ones(15).double()
    trust[7] = 0
    fix = multilaterate(mics, delays, weights=trust)
    assert (fix.position - torch.tensor(source)).norm() < 1e-4


def test_a_fix_on_the_bounds_says_so():
    mics, source = GEOMETRIES["walls"]
    sources = torch.stack([torch.tensor(source), torch.tensor([5.9, 4.9, 2.9])]).double()
    fix = multilaterate(mics, tdoas(mics, sources), bounds=[[0.0, 0, 0], [5.0, 4, 2]])
    assert fix.on_bounds.tolist() == [False, True] and fix._fields[3] == "on_bounds"
    known = multilaterate(mics, tdoas(mics, sources), bounds=[[0.0, 0, 1.1], [6.0, 5, 1.1]])
    assert not known.on_bounds[0]  # a coordinate that is known sits on no bounds


def test_lists_and_arrays_are_located_as_tensors_are():
    mics, source = GEOMETRIES["walls"]
    delays, box = tdoas(mics, torch.tensor(source).double()), np.array([[0.0, 0, 0], [6.0, 5, 3]])
    expected = multilaterate(mics, delays, bounds=box).position
    for kind in (torch.Tensor.tolist, torch.Tensor.numpy):
        fix = multilaterate(kind(mics), kind(delays), bounds=box.tolist()).position
        torch.testing.assert_close(fix.double(), expected, rtol=0, atol=1e-5)
        arrivals = torch.linalg.vector_norm(torch.tensor(source) - mics, dim=-1) / 343.0
        torch.testing.assert_close(closed_form(kind(mics), kind(arrivals)).double(), expected,
                                   rtol=0, atol=1e-3)
        bound = position_bound(kind(mics), source, kind(torch.full((6,), 1e-5).double()))
        torch.testing.assert_close(bound.double(), position_bound(mics, expected, 1e-5), rtol=1e-3,
                                   atol=0)
        assert direction_bound(kind(mics), [1, 0, 0], 1e-5).shape == (2, 2)
