"""Directions that are none, unambiguous frequencies, the free field, decays over noise, gains, long
recordings, and calls that cannot be right: against closed forms, SciPy and pyroomacoustics."""
import errno
import math, re

import numpy as np
import pyroomacoustics as pra
import pytest
import scipy.signal
import torch
from ssl_nb.acoustics import (diffuse_noise as diffuse, geometry, image_sources, moving_sources,
                              rooms, signals)
from ssl_nb.acoustics.geometry import (angular_error, circular_array, far_field_tdoas,
                                       highest_frequency, linear_array, tdoas, to_angles)
from ssl_nb.acoustics.moving_sources import Trajectory, moving_source
from ssl_nb.acoustics.rooms import Room, measure_t60, reverberate, rirs
from ssl_nb.acoustics.signals import add_noise, istft, stft

generator = lambda seed=0: torch.Generator().manual_seed(seed)


# --- geometry -------------------------------------------------------------------------------------

def test_a_fractional_rate_is_not_cut():
    heard = np.sin(2 * np.pi * 1000 * np.arange(48000) / 48000.7)
    at_48k = signals.resample(torch.from_numpy(heard), 48000.7, 48000).numpy()
    truth = np.sin(2 * np.pi * 1000 * np.arange(len(at_48k)) / 48000)
    np.testing.assert_allclose(at_48k[500:-500], truth[500:-500], rtol=0, atol=2e-3)


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_full_disk_leaves_the_old_sound_and_no_piece_of_the_new(tmp_path, monkeypatch, step):
    path = tmp_path / "a.wav"
    signals.write_audio(path, torch.zeros(100), 8000)
    before = path.read_bytes()
    def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")
    if step == "open": monkeypatch.setattr(signals, "open", full, raising=False)
    else: monkeypatch.setattr(signals.os, "replace", full)
    with pytest.raises(OSError, match="a.wav"):
        signals.write_audio(path, torch.ones(5000) * 0.5, 8000)
    monkeypatch.undo()
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("nowhere", [[0.0, 0, 0], [math.nan, 1, 0], [math.inf, 0, 0]])
def test_no_direction_has_no_angle(nowhere):
    some = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    for error in (angular_error(nowhere, some), angular_error(some, nowhere)):
        assert error.shape == (2,) and error.isnan().all()
    assert all(angle.isnan() for angle in to_angles(nowhere))


@pytest.mark.parametrize("length", [1e-40, 1e-20, 1.0, 1e30])
def test_any_length_has_its_angle(length):
    ray = torch.tensor([1.0, 1.0, 0.0])
    torch.testing.assert_close(angular_error(length * ray, [[1, 0, 0]])[0],
                               torch.tensor(math.pi / 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(to_angles(length * ray)[0], torch.tensor(math.pi / 4), rtol=0,
                               atol=1e-5)


@pytest.mark.parametrize("c", [331.0, 343.0])
def test_highest_frequency_in_closed_form(c):
    for n, d in ((2, 0.1), (8, 0.03)):
        assert highest_frequency(linear_array(n, d), c) == pytest.approx(c / (2 * d), rel=1e-5)
    for n, r in ((3, 0.1), (5, 0.04), (12, 0.2)):
        closed = c / (4 * r * math.sin(math.pi / n))
        assert highest_frequency(circular_array(n, r), c) == pytest.approx(closed, rel=1e-5)
    # two clusters: the bridge between them is the longest link, not the widest pair
    assert highest_frequency([[0, 0], [0.02, 0], [0.3, 0], [0.32, 0]], c) == pytest.approx(c / .56)


def test_below_the_highest_frequency_phases_tell_directions_apart():
    array = linear_array(4, 0.05)
    ends = far_field_tdoas(array, [[1.0, 0, 0], [-1, 0, 0]])
    turns = lambda f: ((ends[0] - ends[1]) * f).double()
    off = lambda f: float((turns(f) - turns(f).round()).abs().max())
    assert off(highest_frequency(array)) < 1e-4 < 0.05 < off(0.9 * highest_frequency(array))


def test_the_far_field_bound_is_exact():
    "On a circle around a pair's far microphone the error reaches the bound; it never passes it."
    pair = torch.tensor([[0.0, 0, 0], [0.0, 0.1, 0]], dtype=torch.float64)
    for r in (0.05, 0.5, 50.0):
        across = torch.tensor([1.0, 0, 0], dtype=torch.float64)
        error = float(tdoas(pair, r * across)[0].abs() * 343)
        assert error == pytest.approx(math.sqrt(r * r + 0.01) - r, rel=1e-6)
        assert error <= 0.01 / (2 * r)
    assert error > 0.999 * 0.01 / (2 * r)


# --- free field -----------------------------------------------------------------------------------

def test_the_free_field_is_the_librarys():
    source, mics = np.array([-3.0, 2.0, 0.5]), np.array([[4.0, -1.0, 0.0], [0.3, 0.2, -7.0]])
    pra.constants.set("rir_hpf_enable", False)
    room = pra.AnechoicRoom(dim=3, fs=16000)
    room.set_sound_speed(343.0)
    room.add_source(source)
    room.add_microphone_array(mics.T)
    room.compute_rir()
    pra.constants.set("rir_hpf_enable", True)
    for ours, row in zip(rirs(None, source, mics), room.rir):
        theirs = torch.from_numpy(row[0][40:].copy()).float()  # 1 at 1 m, as ours
        n = min(len(ours), len(theirs))
        assert (ours[:n] - theirs[:n]).norm() < 2e-3 * ours.norm()


def test_a_walk_in_the_free_field_leaves_no_room():
    path = Trajectory([0.0, 1.0], [[-30.0, 10, 0], [-29.5, 10, 0]])
    mics = torch.tensor([[0.0, 0, 0], [0.5, 0, -2.0]])
    sound = torch.sin(2 * math.pi * 500 * torch.arange(16000).double() / 16000)
    heard = moving_source(sound.float(), None, path, mics).audio.double()
    t = torch.arange(16000).double() / 16000
    d = (path.at(t).double()[:, None] - mics.double()).norm(dim=-1).T
    closed = torch.sin(2 * math.pi * 500 * (t - d / 343)) / d
    middle = slice(4000, 12000)
    assert (heard - closed)[:, middle].norm() < 0.01 * closed[:, middle].norm()


# --- decays over noise ----------------------------------------------------------------------------

@pytest.mark.parametrize("t60", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("floor", [30, 40, 50, 60])
def test_t60_over_noise(t60, floor):
    t = torch.arange(2 * 16000) / 16000
    decay = torch.randn(12, len(t), generator=generator(1)) * 10 ** (-3 * t / t60)
    noisy = decay + 10 ** (-floor / 20) * torch.randn(12, len(t), generator=generator(2))
    measured = measure_t60(noisy, 16000)
    assert abs(measured.mean() / t60 - 1) < 0.03 and (measured / t60 - 1).std() < 0.04


def test_t60_hidden_by_noise_is_no_number():
    t = torch.arange(16000) / 16000
    decay = torch.randn(3, 16000, generator=generator()) * 10 ** (-3 * t / 0.5)
    decay[1:] += 0.1 * torch.randn(2, 16000, generator=generator(3))  # 20 dB below the start
    with pytest.warns(UserWarning, match="2 of 3 decays sink into the noise"):
        measured = measure_t60(decay, 16000)
    assert measured[1:].isnan().all() and abs(measured[0] - 0.5) < 0.05
    with pytest.warns(UserWarning, match="1 of 1"):  # no decay at all
        assert measure_t60(torch.randn(16000, generator=generator()), 16000).isnan()


@pytest.mark.parametrize("method", ["image", "hybrid"])
def test_simulated_responses_have_no_floor(method):
    "Schroeder's integral as it stands, in NumPy, gives the same."
    h = rirs(Room((6, 5, 3), 0.4), [2.0, 1.5, 1.6], [[4.0, 3, 1.2], [1, 4, 2]], method=method,
             generator=1)
    sections = scipy.signal.butter(4, 88, "highpass", fs=16000, output="sos")
    energy = scipy.signal.sosfilt(sections, h.double().numpy())**2
    curve = 10 * np.log10(energy[:, ::-1].cumsum(-1)[:, ::-1] / energy.sum(-1, keepdims=True))
    for level, measured in zip(curve, measure_t60(h, 16000)):
        k = np.flatnonzero((level <= -5) & (level >= -25))
        slope = np.polyfit(k / 16000, level[k], 1)[0]
        assert float(measured) == pytest.approx(-60 / slope, rel=1e-4)


# --- microphones that are not alike ---------------------------------------------------------------

def test_noise_and_gain_of_each_microphone():
    clean = torch.randn(2, 3, 40_000, generator=generator()) * torch.tensor([[1.0], [0.1], [0.01]])
    snr, gain = torch.tensor([[0.0, 10, 20], [30, 5, math.inf]]), torch.tensor([-20.0, 0, 6])
    noisy = add_noise(clean, snr, 7, gain_db=gain.expand(2, 3))
    assert noisy.equal(add_noise(clean, snr.tolist(), 7, gain_db=[gain.tolist()] * 2))
    plain = noisy / 10 ** (gain[:, None] / 20)
    power = (plain - clean).square().mean(-1)
    measured = 10 * (clean.square().mean(-1) / power).log10()
    torch.testing.assert_close(measured[:, :2], snr[:, :2], rtol=0, atol=0.15)
    assert abs(measured[0, 2] - 20) < 0.15 and measured[1, 2] > 100
    for bad in ({"snr_db": [1.0, 2, 3]}, {"gain_db": [1.0, 2, 3, 4]}):
        with pytest.raises(ValueError, match=f"{[*bad][0]}: shape"):
            add_noise(clean, **{"snr_db": 10.0} | bad)


# --- long recordings ------------------------------------------------------------------------------

def test_long_recordings_are_scipys(monkeypatch):
    monkeypatch.setattr(rooms, "_AT_ONCE", 20_000)
    monkeypatch.setattr(signals, "AT_ONCE", 1000)
    sound = torch.randn(2, 1, 30_000, generator=generator())
    h = torch.randn(3, 700, generator=generator(1))
    for tail in (False, True):
        theirs = scipy.signal.oaconvolve(sound[:, :, None].numpy(), h[None, None].numpy(), axes=-1)
        heard = reverberate(sound, h, tail=tail)
        theirs = torch.from_numpy(theirs)[..., :heard.shape[-1]]
        assert (heard - theirs).norm() < 1e-5 * theirs.norm()
    window = scipy.signal.get_window("hann", 256)**0.5
    theirs = scipy.signal.stft(sound.numpy(), 1, window, 256, 128, padded=False)[2] * window.sum()
    ours = stft(sound, 256)
    theirs = torch.from_numpy(theirs).to(ours)
    torch.testing.assert_close(ours[..., :theirs.shape[-1]], theirs, rtol=0, atol=2e-4)
    torch.testing.assert_close(istft(ours, 30_000), sound, rtol=0, atol=1e-5)


# --- calls that cannot be right -------------------------------------------------------------------

MICS, SPOT = torch.tensor([[1.0, 1, 1], [1.2, 1, 1]]), torch.tensor([3.0, 2, 1.5])
SOUND, ROOM = torch.randn(2, 2000, generator=generator()), Room((6, 5, 3), 0.3)
PATH = Trajectory([0.0, 1.0], [[2.0, 2, 1], [3, 2, 1]])


@pytest.mark.parametrize("call, words", [
    (lambda: geometry.mic_pairs(10**12), "n_mics="),
    (lambda: geometry.check_pairs("all", 3), "pairs="),
    (lambda: geometry.distances(MICS * 1e38, SPOT), "distance of sources and mics"),
    (lambda: geometry.tdoas(MICS[:1], SPOT), "mics: shape .* at least 2 mics"),
    (lambda: geometry.pair_differences(3.0), "values: shape"),
    (lambda: geometry.hyperbola([[0, 0], [0, 0]], [0.0]), "mics: two of a pair at one place"),
    (lambda: geometry.tangent_basis([0, 0, 0]), "direction: the vector .* length 0"),
    (lambda: geometry.angular_error(torch.ones(2, 3), torch.ones(3, 3)), "a: shape"),
    (lambda: highest_frequency(torch.zeros(3, 3)), "mics: all at one place"),
    (lambda: geometry.random_array(3, [6, 5, 3], "seed"), "generator: a str"),
    (lambda: signals.noise((2.5, 10)), "shape=2.5"),
    (lambda: signals.noise(10**14), "shape="),
    (lambda: signals.fractional_delay(SOUND, [1.0, 2, 3]), "delay: shape"),
    (lambda: signals.fractional_delay(SOUND, 1e12), "delay: 1e"),
    (lambda: signals.high_pass(SOUND, 16000, "low"), "cutoff="),
    (lambda: signals.resample(SOUND, 16000, 1e12), "fs_out="),
    (lambda: signals.frames(3.0, 10, 10), "audio: a single number"),
    (lambda: istft(SOUND, 2000), "spectrum: a Tensor, must be a complex"),
    (lambda: istft(stft(SOUND)[..., :3], 2000), "time=2000: must be below 768"),
    (lambda: signals.speech_like(1e12), "seconds="),
    (lambda: rirs((6, 5, 3), SPOT, MICS), "room: a tuple, must be a Room"),
    (lambda: rirs(None, MICS[0], MICS), "mics: microphone 0 is 0 mm from a source"),
    (lambda: rirs(ROOM, SPOT, MICS, mixing_time="late", method="hybrid"), "mixing_time="),
    (lambda: rirs(None, SPOT * 1e9, MICS), "responses of"),
    (lambda: measure_t60(SOUND, 16000, fit="T20"), "fit="),
    (lambda: measure_t60(SOUND, 16000, above=9000), "above=9000"),
    (lambda: reverberate(SOUND, SOUND[None, :3].expand(3, 2, 2000)), "signal: leading shape"),
    (lambda: reverberate(SOUND, SOUND, tail="yes"), "tail="),
    (lambda: rooms.check_inside("talker", "here", ROOM), "points="),
    (lambda: diffuse.diffuse_noise(MICS, 100, batch=(-1,)), "batch=-1"),
    (lambda: diffuse.mix_diffuse(SOUND, MICS * 1e9), "mics: 2e"),
    (lambda: image_sources.image_source_rirs([6, 5, 3], 0.3, SPOT[None], MICS, 1e12), "fs="),
    (lambda: moving_source(SOUND[0], ROOM, [[1, 1, 1]], MICS), "trajectory: a list"),
    (lambda: moving_source(SOUND[0], ROOM, PATH, MICS, interval=1e12), "interval=1e"),
    (lambda: moving_sources.random_walk(ROOM, 1.0, 0, height=50.0), "height=50.0 m: must be at"),
    (lambda: moving_sources.line_trajectory([1, 1, 1], [2, 1, 1], 1.0, [1, 2]), "amplitude: shape"),
])
def test_calls_that_cannot_be_right_are_refused_by_name(call, words):
    with pytest.raises((ValueError, TypeError)) as caught: call()
    # shapes that do not fit one another are seen first by the tests' own checks of the types
    assert re.search(words, str(caught.value)) or "Type-check error" in str(caught.value)
