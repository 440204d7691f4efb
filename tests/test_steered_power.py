"""Steered power against brute force, closed forms, another library and the Cramér-Rao bound."""
import itertools, math, subprocess, sys

import numpy as np
import pytest
import scipy.fft
import torch
from ssl_nb.classical import correlations
from ssl_nb.classical import steered_power as sp
from ssl_nb.classical.correlations import band_bins
from ssl_nb.classical.gcc_phat import arrival_information, gcc_phat
from ssl_nb.acoustics.geometry import (angular_error, circular_array, linear_array,
                                       robot_head_array, tetrahedral_array, to_angles, to_direction,
                                       wall_array)
from ssl_nb.classical.multilateration import direction_bound
from ssl_nb.acoustics.rooms import Room, reverberate, rirs
from ssl_nb.acoustics.signals import add_noise, speech_like
from ssl_nb.classical.steered_power import (Grid, SteeredPower, direction_grid, find_peaks, locate,
                                            music, position_grid, sphere_grid, srp_figure)

FS, HEAD = 16000, robot_head_array()


COARSE = pytest.mark.filterwarnings("ignore:grid. .* is coarse")


def seeded(seed): return torch.Generator().manual_seed(seed)


def directions(n, seed):
    return torch.nn.functional.normalize(torch.randn(n, 3, generator=seeded(seed)), dim=-1)


def plane_waves(mics, towards, time, seed, fs=FS):
    """White noise from far away: exact delays of a signal of period `time` + 200, cut to `time`;
    (n, mics, time)."""
    early = (towards.double() @ mics.double().T / 343.0)[..., None]
    spectrum = np.fft.rfft(np.random.default_rng(seed)
                           .standard_normal((len(towards), 1, time + 200)))
    f = np.fft.rfftfreq(time + 200, 1 / fs)
    return torch.from_numpy(np.fft.irfft(spectrum * np.exp(2j * np.pi * f * early.numpy()),
                                         time + 200)[..., 100:-100]).float()


def brute_force(audio, mics, points, fs, n, band=(0, math.inf), far=True, beta=1.0):
    """Equation (1) in NumPy: all pairs by two loops, all frequencies of the band; audio (mics,
    time)."""
    audio, mics, points = (np.asarray(v, dtype=float) for v in (audio, mics, points))
    X, f = np.fft.fft(audio, n), np.abs(np.fft.fftfreq(n, 1 / fs))
    signed, keep = np.fft.fftfreq(n, 1 / fs), (f > band[0] - 1e-6) & (f < band[1] + 1e-6)
    W = np.where(keep & (np.abs(X) > 0), X / np.maximum(np.abs(X), 1e-300) ** beta, 0)
    W = W / np.maximum(np.sqrt((np.abs(W) ** 2).sum(-1, keepdims=True)), 1e-300)
    arrive = (-points @ mics.T / 343.0 if far
              else np.linalg.norm(points[:, None] - mics, axis=-1) / 343.0)
    return np.array(
        [sum((W[i] * W[j].conj() * np.exp(2j * np.pi * signed * (t[i] - t[j]))).sum().real
             for i, j in itertools.combinations(range(len(mics)), 2)) for t in arrive])


# --- grids ----------------------------------------------------------------------------------------

def test_rectangular_grid_by_hand():
    grid = direction_grid(4, 2)
    azimuth, elevation = (a.rad2deg().reshape(grid.shape) for a in to_angles(grid.points))
    torch.testing.assert_close(elevation, torch.tensor([-45.0, 45.0]).expand(4, 2), rtol=0,
                               atol=1e-4)
    torch.testing.assert_close(azimuth[:3, 0], torch.tensor([-90.0, 0.0, 90.0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(azimuth[3].abs(), torch.tensor([180.0, 180.0]), rtol=0, atol=1e-4)
    assert grid.spacing == math.pi / 2 and grid.far_field
    ring = direction_grid(8, 1)
    assert ring.points[:, 2].abs().max() < 1e-7 and ring.spacing == math.pi / 4
    assert (direction_grid(8, 4, (0.0, 90.0)).points[:, 2] > 0).all()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("degrees", [3.0, 10.0, 25.0])
def test_the_spiral_covers_evenly(degrees, upper):
    grid = sphere_grid(degrees, upper)
    anywhere = directions(3000, 0)
    if upper: anywhere[:, 2] = anywhere[:, 2].abs()
    to_next = angular_error(anywhere[:, None], grid.points).amin(-1)
    apart = angular_error(grid.points[:, None], grid.points + 0.0).fill_diagonal_(9).amin(-1)
    assert (to_next.max() < grid.spacing and apart.min() > 0.5 * grid.spacing
            and grid.spacing <= math.radians(degrees))
    torch.testing.assert_close(torch.linalg.vector_norm(grid.points, dim=-1),
                               torch.ones(len(grid.points)), rtol=0, atol=1e-6)
    assert (abs(grid.points.mean(0)[2] - (0.5 if upper else 0)) < 1e-6
            and len(sphere_grid(n_points=77).points) == 77)


def test_position_grid_fills_the_room_with_equal_cells():
    grid = position_grid((4.0, 3.0, 2.5), 0.3)
    cells = grid.points.reshape(*grid.shape, 3)
    assert grid.shape == (9, 10, 14) and not grid.far_field
    steps = [cells[1, 0, 0, 2] - cells[0, 0, 0, 2], cells[0, 1, 0, 1] - cells[0, 0, 0, 1],
             cells[0, 0, 1, 0] - cells[0, 0, 0, 0]]
    torch.testing.assert_close(torch.stack(steps), torch.tensor([2.5 / 9, 3 / 10, 4 / 14]), rtol=0,
                               atol=1e-6)
    torch.testing.assert_close(cells.reshape(-1, 3).mean(0), torch.tensor([2.0, 1.5, 1.25]), rtol=0,
                               atol=1e-5)
    part = position_grid((4.0, 3.0, 2.5), 0.5, height=(1.0, 2.0), margin=0.5).points
    assert (part[:, 2].min() >= 1 and part[:, 2].max() <= 2 and part[:, 0].min() > 0.5
            and part[:, 0].max() < 3.5)


# --- the map --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.float32, 3e-5)])
@pytest.mark.parametrize("band", [None, (500.0, 4000.0), (0.0, 1000.0), (3000.0, 8000.0)])
@pytest.mark.parametrize("fs", [8000, 16000, 48000])
def test_table_equals_brute_force_far(fs, band, dtype, tolerance):
    if band and band[1] > fs / 2: band = (band[0], fs / 2)
    audio = torch.randn(5, 900, generator=seeded(0), dtype=dtype)
    grid, mics = sphere_grid(25.0), HEAD[:5]
    steered = SteeredPower(mics, grid, fs, band=band)
    n = scipy.fft.next_fast_len(900 + steered.max_lag, real=True)
    expected = brute_force(audio, mics, grid.points, fs, n, band or (0, math.inf))
    # of 10 pairs
    np.testing.assert_allclose(steered(audio).numpy(), expected, rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("height", [None, 1.2])
@pytest.mark.parametrize("time", [1500, 1501])
def test_table_equals_brute_force_near(time, height):
    size = (4.0, 3.0, 2.5)
    mics, grid = wall_array(size, seeded(1)), position_grid(size, 0.8, height)
    audio = torch.randn(6, time, generator=seeded(2), dtype=torch.float64)
    steered = SteeredPower(mics, grid, FS, beta=0.7)
    n = scipy.fft.next_fast_len(time + steered.max_lag, real=True)
    np.testing.assert_allclose(steered(audio).numpy(),
                               brute_force(audio, mics, grid.points, FS, n, far=False, beta=0.7),
                               rtol=0, atol=15e-5)


@pytest.mark.parametrize("c", [330.0, 343.0])
def test_one_pair_is_its_correlation(c):
    lags = torch.arange(-12, 13) / 4  # samples, on the table and within the pair's reach
    pair = linear_array(2, 3.5 * c / FS)
    x = (lags / FS * c / (pair[1, 0] - pair[0, 0])).clamp(-1, 1)
    points = torch.stack([x, (1 - x.square()).sqrt(), torch.zeros_like(x)], -1)
    steered = SteeredPower(pair, Grid(points, (25,), 0.1, True), FS, c=c)
    audio = torch.randn(2, 2000, generator=seeded(0), dtype=torch.float64)
    gcc = gcc_phat(audio, max_lag=steered.max_lag, interpolation=4)[0]
    torch.testing.assert_close(
        steered(audio), gcc[steered.max_lag * 4 - 12:steered.max_lag * 4 + 13], rtol=0, atol=1e-5)


def test_perfect_agreement_is_the_number_of_pairs_and_the_least_is_minus_half_the_microphones():
    same = torch.randn(1, 2000, generator=seeded(3)).expand(6, 2000)
    broadside = Grid(torch.tensor([[0.0, 0.6, 0.8]]), (1,), 0.1, True)
    assert abs(SteeredPower(linear_array(6, 0.05), broadside, FS)(same).item() - 15) < 1e-3
    alternating = same * torch.tensor([1.0, -1, 1, -1, 1, -1])[:, None]
    assert abs(SteeredPower(linear_array(6, 0.05), broadside, FS)(alternating).item() + 3) < 1e-3
    assert SteeredPower(HEAD, sphere_grid(10.0),
                        FS)(torch.randn(4, 12, 500, generator=seeded(4))).min() > -6


@pytest.mark.parametrize("name", ["head", "tetrahedron"])
def test_a_plane_wave_peaks_at_its_direction(name):
    mics = {"head": HEAD, "tetrahedron": tetrahedral_array(0.1)}[name]
    towards, grid = directions(30, 5), sphere_grid(3.0)
    found = find_peaks(SteeredPower(mics, grid, FS)(plane_waves(mics, towards, 2048, 6)), grid)
    assert angular_error(found.points[:, 0], towards).max() < grid.spacing
    ring = direction_grid(120, 1)
    level = torch.nn.functional.normalize(towards * torch.tensor([1.0, 1, 0]), dim=-1)
    flat = circular_array(6, 0.06)
    assert angular_error(find_peaks(SteeredPower(flat, ring, FS)(plane_waves(flat, level, 2048, 7)),
                                    ring).points[:, 0], level).max() < ring.spacing


def test_a_point_source_in_a_room_peaks_in_its_cell():
    room = Room((5.0, 4.0, 3.0))
    mics, grid = wall_array(room.size, seeded(8)), position_grid(room.size, 0.1, height=1.4)
    sources = (torch.rand(10, 3, generator=seeded(9)) * torch.tensor([4.0, 3.0, 0.0])
               + torch.tensor([0.5, 0.5, 1.4]))
    audio = reverberate(torch.randn(6000, generator=seeded(10)),
                        rirs(room, sources, mics, FS, "anechoic"))[..., 1000:]
    found = find_peaks(SteeredPower(mics, grid, FS, band=(100.0, 1700.0))(audio), grid).points[:, 0]
    # the cell or, where the source is near its edge, the next one
    assert (found - sources).abs().max() < 0.1


def test_turning_and_moving_the_array():
    audio = plane_waves(HEAD, directions(3, 11), 1000, 12)
    grid, turn = sphere_grid(10.0), torch.linalg.qr(torch.randn(3, 3, generator=seeded(13),
                                                                dtype=torch.float64))[0].float()
    expected = SteeredPower(HEAD, grid, FS)(audio)
    turned = Grid(grid.points @ turn.T, grid.shape, grid.spacing, True)
    torch.testing.assert_close(SteeredPower(HEAD @ turn.T, turned, FS)(audio), expected, rtol=0,
                               atol=1e-3)
    # 5 m away: single precision of positions
    torch.testing.assert_close(SteeredPower(HEAD + 5, grid, FS)(audio), expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(
        SteeredPower(HEAD, grid, FS)(audio * torch.rand(12, 1, generator=seeded(14)) * 1e-3),
        expected, rtol=0, atol=1e-3)


def test_silent_channels_drop_out():
    audio = plane_waves(HEAD, directions(1, 15), 1000, 16)[0].double()
    audio[[2, 7]] = 0
    grid, kept = sphere_grid(20.0), [m for m in range(12) if m not in (2, 7)]
    steered = SteeredPower(HEAD, grid, FS)
    n = scipy.fft.next_fast_len(1000 + steered.max_lag, real=True)
    np.testing.assert_allclose(steered(audio).numpy(),
                               brute_force(audio[kept], HEAD[kept], grid.points, FS, n), rtol=0,
                               atol=45e-5)
    silence = torch.zeros(2, 12, 1000)
    assert (steered(silence).equal(torch.zeros(2, len(grid.points)))
            and torch.isfinite(locate(steered, silence, 2).points).all())


def test_batches_and_pieces_change_nothing(monkeypatch):
    audio, grid = torch.randn(2, 5, 12, 700, generator=seeded(17)), sphere_grid(8.0)
    whole = SteeredPower(HEAD, grid, FS)
    expected, found = whole(audio), locate(whole, audio, 2)
    assert (expected.shape == (2, 5, len(grid.points)) and found.points.shape == (2, 5, 2, 3)
            and found.power.shape == (2, 5, 2))
    torch.testing.assert_close(whole(audio[1, 3]), expected[1, 3], rtol=0, atol=1e-4)
    monkeypatch.setattr(sp, "_STORED", 0)
    monkeypatch.setattr(sp, "_PIECE", 66 * 8 * 100)
    monkeypatch.setitem(correlations._AT_ONCE, "cpu", 66 * 800)
    pieces = SteeredPower(HEAD, grid, FS)
    assert pieces.index is None and len(list(pieces.taps())) > 5
    torch.testing.assert_close(pieces(audio), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(locate(pieces, audio, 2).power, found.power, rtol=0, atol=1e-3)
    empty = whole(audio[:0])
    assert (empty.shape == (0, 5, len(grid.points))
            and locate(whole, audio[:0], 2).points.shape == (0, 5, 2, 3))


def test_gradient():
    steered = SteeredPower(HEAD[:3], sphere_grid(60.0), FS)
    audio = torch.randn(1, 3, 24, generator=seeded(18), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(steered, audio, atol=1e-4)
    audio.data[0, 1] = 0
    steered(audio).sum().backward()
    assert torch.isfinite(audio.grad).all()


def test_map_and_music_equal_the_library():
    import pyroomacoustics as pra
    towards = directions(2, 19)
    audio = plane_waves(HEAD, towards, 4096,
                        20).sum(0) + 0.1 * torch.randn(12, 4096, generator=seeded(21))
    azimuth, elevation = np.linspace(-3, 3, 16), np.linspace(-1.4, 1.4, 9)
    # the library's order: colatitude by azimuth
    a, e = np.meshgrid(azimuth, np.sort(np.pi / 2 - elevation))
    grid = Grid(to_direction(torch.from_numpy(a), torch.from_numpy(np.pi / 2 - e)).reshape(-1, 3)
                .float(), (9, 16), 0.4, True)
    steered = SteeredPower(HEAD, grid, FS, band=(500.0, 4000.0))
    n = scipy.fft.next_fast_len(4096 + steered.max_lag, real=True)
    angles = dict(azimuth=azimuth, colatitude=np.pi / 2 - elevation, dim=3)
    theirs = pra.doa.SRP(HEAD.double().numpy().T, FS, n, **angles)
    theirs.locate_sources(np.fft.rfft(audio.numpy(), n)[:, :, None],
                          freq_bins=list(range(*band_bins((500.0, 4000.0), n, FS))))
    np.testing.assert_allclose((12 + 2 * steered(audio).numpy()) / 66, theirs.grid.values, rtol=0,
                               atol=1e-5)
    subspace = pra.doa.MUSIC(HEAD.double().numpy().T, FS, 512, num_src=2,
                             frequency_normalization=True, **angles)
    window = torch.hann_window(512, dtype=torch.float64).sqrt()
    spectra = torch.stft(audio.double(), 512, 256, window=window, pad_mode="constant",
                         return_complex=True)
    subspace.locate_sources(spectra.numpy(), freq_range=[500.0, 4000.0 + 31.25])
    np.testing.assert_allclose(music(audio, HEAD, FS, grid, 2)[0].numpy(), subspace.grid.values,
                               rtol=1e-5, atol=1e-5)


# --- one talker or several ------------------------------------------------------------------------

@pytest.mark.parametrize("separation", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("grid", [sphere_grid(8.0),
                                  direction_grid(24, 12), position_grid((4.0, 3.0, 2.5), 0.4)],
                         ids=["spiral", "rectangle", "room"])
def test_peaks_equal_brute_force(grid, separation):
    power = torch.randn(3, len(grid.points), generator=seeded(22))
    apart = (angular_error(grid.points[:, None], grid.points + 0.0) if grid.far_field
             else torch.cdist(grid.points, grid.points))
    found = find_peaks(power, grid, 6, separation)
    for values, points, heights in zip(power, found.points, found.power):
        peak = [k for k in range(len(values))
                if not ((apart[k] < separation - 1e-6) & (values > values[k])).any()]
        best = sorted(peak, key=lambda k: -values[k])[:6]
        assert (points[:len(best)].equal(grid.points[best])
                and heights[:len(best)].equal(values[best]))
        assert (heights[len(best):] == -math.inf).all()


def two_talkers(seed):
    """Both errors of the better assignment, degrees: two equally loud talkers in a room, 70 to 120
    degrees apart, one second."""
    room, centre = Room((6.0, 5.0, 3.0), 0.25), torch.tensor([2.9, 2.6, 1.4])
    azimuth = torch.rand(1, generator=seeded(seed)) * 6 + torch.tensor([0.0, 1.2 + 0.1 * seed])
    towards = to_direction(azimuth, torch.tensor([0.1, 0.2]))
    each = [reverberate(speech_like(1.5, FS, 100 * seed + k),
                        rirs(room, centre + 1.3 * towards[k], HEAD + centre, FS)) for k in range(2)]
    audio = sum(talk / talk.std() for talk in each)[:, 4000:20384]
    steered = SteeredPower(HEAD, sphere_grid(6.0), FS)
    found = find_peaks(steered(audio.unflatten(-1, (4, 4096)).movedim(1, 0)).mean(0), steered.grid,
                       2, math.radians(30))
    errors = angular_error(found.points[:, None], towards).rad2deg()
    return min((errors.diagonal(), errors.flip(0).diagonal()), key=lambda e: float(e.max()))


def test_two_talkers_at_once_in_a_room():
    worst = torch.stack([two_talkers(seed) for seed in range(10)]).amax(-1)
    assert (worst < 10).sum() >= 8, worst


def test_the_search_finds_what_the_whole_fine_map_finds():
    towards = directions(100, 23)
    audio = add_noise(plane_waves(HEAD, towards, 1024, 24), 0.0, seeded(25))
    coarse, fine = SteeredPower(HEAD, sphere_grid(6.0),
                                FS), SteeredPower(HEAD, sphere_grid(1.0), FS)
    quick, full = locate(coarse, audio,
                         resolution=math.radians(0.05)), find_peaks(fine(audio), fine.grid)
    agree = (angular_error(quick.points, full.points)[:, 0]
             < fine.grid.spacing) & (quick.power >= full.power - 1e-3)[:, 0]
    assert agree.float().mean() >= 0.97
    n = scipy.fft.next_fast_len(1024 + coarse.max_lag, real=True)
    np.testing.assert_allclose(quick.power[0], brute_force(audio[0], HEAD, quick.points[0], FS, n),
                               rtol=0, atol=1e-2)


@COARSE
def test_the_search_keeps_the_dimensions_of_its_grid():
    ring, flat = direction_grid(36, 1, (10.0, 50.0)), circular_array(6, 0.06)
    towards = to_direction(torch.linspace(-3, 3, 12), torch.tensor(math.radians(30)))
    found = locate(SteeredPower(flat, ring, FS), plane_waves(flat, towards, 2048, 26),
                   resolution=1e-3).points[:, 0]
    torch.testing.assert_close(found[:, 2], torch.full((12,), 0.5), rtol=0, atol=1e-5)
    assert angular_error(found, towards).max() < 0.01
    room = Room((4.0, 3.0, 2.5))
    mics = wall_array(room.size, seeded(27))
    sources = torch.rand(8, 3, generator=seeded(28)) * torch.tensor([3.6, 2.6, 2.1]) + 0.2
    audio = reverberate(torch.randn(6000, generator=seeded(29)),
                        rirs(room, sources, mics, FS, "anechoic"))[..., 1000:]
    anywhere = locate(SteeredPower(mics, position_grid(room.size, 0.15), FS, band=(100.0, 1200.0)),
                      audio, resolution=1e-3).points[:, 0]
    assert torch.linalg.vector_norm(anywhere - sources, dim=-1).max() < 0.02
    at_height = locate(SteeredPower(mics, position_grid(room.size, 0.15, 1.1), FS), audio).points
    assert (at_height[..., 2].eq(1.1).all() and (at_height >= 0).all()
            and (at_height <= torch.tensor(room.size)).all())


def test_candidates_that_climb_to_one_peak_count_once():
    points = torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [2.0, 0, 0], [2.1, 0, 0]]])
    found = sp._apart(points, torch.tensor([[1.0, 4.0, 2.0, 3.0]]), 3, 0.5)
    assert (found.points[0, :2, 0].tolist() == pytest.approx([0.1, 2.1])
            and found.power[0].tolist() == [4.0, 3.0, -math.inf])


@COARSE
def test_the_search_stays_in_the_room():
    grid = position_grid((4.0, 3.0, 2.5), 0.5, margin=0.5)
    found = locate(SteeredPower(wall_array((4.0, 3.0, 2.5), seeded(40)), grid, FS),
                   torch.randn(40, 6, 1000, generator=seeded(41))).points
    assert (found >= 0.5 - 1e-5).all() and (found <= torch.tensor([3.5, 2.5, 2.0]) + 1e-5).all()


@COARSE
def test_following_several_candidates_helps_a_coarse_grid(monkeypatch):
    room = Room((6.0, 5.0, 3.0))
    mics, sources = (wall_array(room.size, seeded(3)), torch.rand(60, 3, generator=seeded(42))
                     * torch.tensor([5.0, 4.0, 0.0]) + torch.tensor([0.5, 0.5, 1.5]))
    audio = reverberate(torch.randn(5000, generator=seeded(43)),
                        rirs(room, sources, mics, FS, "anechoic"))[..., 1000:]
    coarse = SteeredPower(mics, position_grid(room.size, 0.4, 1.5), FS, band=(100.0, 2000.0))
    hits = lambda: (torch.linalg.vector_norm(locate(coarse, audio, resolution=2e-3).points[:, 0]
                                             - sources, dim=-1) < 0.02).sum()
    several = hits()
    monkeypatch.setattr(sp, "_CANDIDATES", 0)
    assert several > hits() and several >= 45, (several, hits())


def test_two_sources_by_the_search():
    towards = directions(12, 30).reshape(6, 2, 3)
    towards[:, 1] = -towards[:, 0] + 0.4 * towards[:, 1]
    towards = torch.nn.functional.normalize(towards, dim=-1)
    audio = plane_waves(HEAD, towards[:, 0], 4096, 31) + plane_waves(HEAD, towards[:, 1], 4096, 32)
    found = locate(SteeredPower(HEAD, sphere_grid(6.0), FS), audio, 2, separation=math.radians(25))
    errors = angular_error(found.points[:, :, None], towards[:, None]).rad2deg()
    either = torch.minimum(errors.diagonal(dim1=1, dim2=2).amax(-1),
                           errors.flip(1).diagonal(dim1=1, dim2=2).amax(-1))
    assert either.max() < 2.0 and (found.power[:, 0] >= found.power[:, 1]).all()


@pytest.mark.parametrize("snr", [-10.0, 0.0])
def test_the_search_reaches_the_bound_and_does_not_beat_it(snr):
    towards = directions(200, 33)
    audio = add_noise(plane_waves(HEAD, towards, 2048, 34), snr, seeded(35))
    rmse = angular_error(locate(SteeredPower(HEAD, sphere_grid(6.0), FS), audio,
                                resolution=1e-4).points[:, 0], towards).square().mean().sqrt()
    information = arrival_information(torch.full((12, 1025), 10 ** (snr / 10)), FS, 2048 / FS)
    sigma = float(information.diagonal().mean() * 12 / 11) ** -0.5
    bound = direction_bound(HEAD, towards, sigma).diagonal(dim1=-2, dim2=-1).sum(-1).mean().sqrt()
    assert 0.9 * bound < rmse < 1.4 * bound


@pytest.mark.parametrize("near", [False, True])
def test_music_finds_two_sources_on_either_kind_of_grid(near):
    if near:
        room = Room((4.0, 3.0, 2.5))
        mics, grid = wall_array(room.size, seeded(36)), position_grid(room.size, 0.1, height=1.2)
        truth = torch.tensor([[1.05, 1.05, 1.2], [2.85, 1.95, 1.2]])
        audio = sum(reverberate(torch.randn(16000, generator=seeded(37 + k)),
                                rirs(room, truth[k], mics, FS, "anechoic")) for k in range(2))
        found = music(audio, mics, FS, grid, 2, band=(100.0, 900.0), length=2048,
                      separation=0.5)[1].points
        errors = torch.cdist(found, truth)
    else:
        truth = to_direction(torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.1]))
        grid, audio = sphere_grid(3.0), plane_waves(HEAD, truth, 16000, 39).sum(0)
        audio = torch.stack([audio, audio.flip(0) * 0 + audio])  # a batch
        power, peaks = music(audio, HEAD, FS, grid, 2)
        assert (power.shape == (2, len(grid.points)) and power[0].equal(power[1])
                and 0 < power.min() and power.max() <= 1 + 1e-6)
        errors = angular_error(peaks.points[0][:, None], truth)
    limit = 0.1 if near else grid.spacing
    assert min(errors.diagonal().max(), errors.flip(0).diagonal().max()) < limit


# --- mirror images, silence, coarse grids --------------------------------------------------------

RING = circular_array(6, 0.05)
MIRRORED = pytest.mark.parametrize("grid", [sphere_grid(4.0), direction_grid(90, 45)],
                                   ids=["spiral", "rectangle"])


def worst_of_two(found, truth):
    errors = angular_error(found[:, None], truth).rad2deg()
    return min(errors.diagonal().max(), errors.flip(0).diagonal().max())


@MIRRORED
def test_two_talkers_and_not_their_mirror_images_are_found_by_a_ring(grid):
    truth = to_direction(*torch.deg2rad(torch.tensor([[60.0, -100.0], [20.0, 10.0]])))
    audio = sum(plane_waves(RING, truth[k:k + 1], 16000, 60 + k)[0] for k in range(2))
    steered = SteeredPower(RING, grid, FS)
    with pytest.warns(UserWarning, match="in a plane"): by_search = locate(steered, audio, 2)
    with pytest.warns(UserWarning, match="in a plane"):
        by_map = find_peaks(steered(audio), grid, 2, mics=RING)
    with pytest.warns(UserWarning, match="in a plane"):
        by_music = music(audio, RING, FS, grid, 2)[1]
    for found, limit in ((by_search, 3), (by_map, 6), (by_music, 6)):
        assert worst_of_two(found.points, truth) < limit and (found.points[:, 2] > -0.02).all()


def test_a_line_finds_the_angle_to_its_axis():
    line, truth = linear_array(6, 0.04), directions(5, 62)
    with pytest.warns(UserWarning, match="on a line"):
        found = locate(SteeredPower(line, sphere_grid(4.0), FS), plane_waves(line, truth, 4096, 63))
    axis = torch.nn.functional.normalize(line[1] - line[0], dim=0)
    error = (found.points[:, 0] @ axis).arccos() - (truth @ axis).arccos()
    assert error.rad2deg().abs().max() < 4
    ring = direction_grid(120, 1)
    level = torch.nn.functional.normalize(truth * torch.tensor([1.0, 1, 0]), dim=-1)
    with pytest.warns(UserWarning, match="on a line"):
        found = locate(SteeredPower(line, ring, FS), plane_waves(line, level, 4096, 64))
    mirrored = found.points[:, 0] * torch.tensor([1.0, -1, 1])
    errors = torch.stack([angular_error(p, level) for p in (found.points[:, 0], mirrored)]).amin(0)
    assert errors.rad2deg().max() < 4


def test_positions_behind_a_table_are_not_searched():
    mics = torch.tensor([[1.0, 1, 1], [3, 1, 1], [1, 2, 1], [3, 2.2, 1], [2, 1.5, 1]])
    source, grid = torch.tensor([2.6, 1.2, 1.45]), position_grid((4.0, 3.0, 2.0), 0.1)
    audio = reverberate(torch.randn(6000, generator=seeded(65)),
                        rirs(Room((4.0, 3.0, 2.0)), source, mics, FS, "anechoic"))[..., 1000:]
    with pytest.warns(UserWarning, match="in a plane"):
        found = locate(SteeredPower(mics, grid, FS, band=(100.0, 1500.0)), audio).points[0]
    # a flat array tells heights worst
    assert (found - source)[:2].norm() < 0.05 and abs(found[2] - source[2]) < 0.2


@pytest.mark.parametrize("mics, grid", [
    (RING, sphere_grid(5.0, upper=True)), (RING, direction_grid(72, 1)), (HEAD, sphere_grid(10.0)),
    (RING, direction_grid(36, 9, (0.0, 90.0)))], ids=["upper", "ring", "head", "half"])
def test_where_no_mirror_image_is_searched_nothing_is_said(mics, grid, recwarn):
    locate(SteeredPower(mics, grid, FS), torch.randn(len(mics), 1000, generator=seeded(66)))
    assert not len(recwarn)


def test_music_of_silence_has_no_direction():
    power, peaks = music(torch.zeros(2, 12, 4000), HEAD, FS, sphere_grid(20.0))
    assert power.isnan().all() and peaks.power.isnan().all() and peaks.points.isnan().all()
    mixed = torch.stack([torch.zeros(12, 4000), torch.randn(12, 4000, generator=seeded(67))])
    power, peaks = music(mixed, HEAD, FS, sphere_grid(20.0))
    assert power[0].isnan().all() and 0.5 < power[1].max() <= 1 and peaks.points[1].isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
def test_music_in_the_near_field_equals_brute_force(normalize):
    mics, grid = wall_array((4.0, 3.0, 2.5), seeded(70)), position_grid((4.0, 3.0, 2.5), 0.9)
    audio = torch.randn(6, 5000, generator=seeded(71), dtype=torch.float64)
    window, frames = np.sqrt(np.hanning(257)[:256]), 1 + 5000 // 128
    padded = np.pad(audio.numpy(), ((0, 0), (128, 128)))
    X = np.stack([np.fft.rfft(padded[:, 128 * m:128 * m + 256] * window) for m in range(frames)])
    tau = np.linalg.norm(grid.points.double().numpy()[:, None] - mics.double().numpy(), axis=-1)
    expected, bins = 0, range(8, 65)  # 500 to 4000 + 62.5 / 2 Hz
    for k in bins:
        R = np.einsum("mi,mj->ij", X[:, :, k], X[:, :, k].conj())
        noise = np.linalg.eigh(R)[1][:, :4]  # all but two
        a = np.exp(-2j * np.pi * k * FS / 256 * tau / 343.0)
        each = 1 / (np.abs(a @ noise.conj())**2).sum(-1)
        expected = expected + (each / each.max() if normalize else each) / len(bins)
    power, _ = music(audio, mics, FS, grid, 2, length=256, normalize=normalize)
    np.testing.assert_allclose(power, expected, rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lines_and_taps_read_the_same(dtype, monkeypatch):
    audio = torch.randn(2, 12, 900, generator=seeded(72)).to(dtype)
    for mics, grid in ((HEAD, sphere_grid(15.0)), (HEAD + 2, position_grid((4, 4, 3), 0.8))):
        steered = SteeredPower(mics, grid, FS)
        lines = steered(audio)
        with monkeypatch.context() as m:
            m.setattr(sp, "_STORED", 0)
            torch.testing.assert_close(SteeredPower(mics, grid, FS)(audio), lines, rtol=0,
                                       atol=66e-6)
            m.setattr(sp, "_FEW", 0)
            torch.testing.assert_close(steered(audio), lines, rtol=0, atol=66e-6)


def test_a_coarse_grid_of_positions_is_named(recwarn):
    mics, audio = (wall_array((4.0, 3.0, 2.5), seeded(68)),
                   torch.randn(6, 1500, generator=seeded(69)))
    grid = position_grid((4.0, 3.0, 2.5), 0.1, 1.2)
    locate(SteeredPower(mics, grid, FS, band=(100.0, 1700.0)), audio)
    close = position_grid((4.0, 3.0, 2.5), 0.1, 1.25)
    locate(SteeredPower(HEAD + torch.tensor([-20.0, 1.5, 1.2]), close, FS), torch.randn(12, 1500))
    assert not len(recwarn)  # fine enough; and a small array far away sees no difference
    with pytest.warns(UserWarning, match=r"grid: 0.1 m .* 8000 Hz.* needs 0.02"):
        locate(SteeredPower(mics, grid, FS), audio)


# --- the figure, bad calls, imports ---------------------------------------------------------------

def test_figure_marks_truth_and_estimate():
    ax = srp_figure(-60.0, 0.0, 30.0).axes[0]
    marks = {line.get_label(): np.degrees(line.get_xydata()) for line in ax.lines}
    assert abs(marks["talker"] - [-60, 15]).max() < 0.1
    assert abs(marks["found"] - [-60, 15]).max() <= 5 and len(marks["microphone"]) == 12
    assert srp_figure(-60.0, 0.0, -20.0).axes[0].get_title() != ax.get_title()


NOISE, TEN = torch.randn(2, 12, 500), sphere_grid(20.0)


@pytest.mark.parametrize("call, words", [
    (lambda: direction_grid(0, 4), "n_azimuth=0"),
    (lambda: direction_grid(4, 4, (50.0, 20.0)), "elevation_deg="),
    (lambda: direction_grid(4, 4, (0.0, 100.0)), "elevation_deg="),
    (lambda: sphere_grid(0.0), "resolution_deg=0"), (lambda: sphere_grid(n_points=0), "n_points=0"),
    (lambda: position_grid((4, 3), 0.1), "room_size:"),
    (lambda: position_grid((4, 3, 2), 0.0), "spacing=0"),
    (lambda: position_grid((4, 3, 2), 0.1, 2.5), "height=.*2.5"),
    (lambda: position_grid((4, 3, 2), 0.1, (1.5, 0.5)), "height="),
    (lambda: position_grid((4, 3, 2), 0.1, margin=1.0), "margin=1"),
    (lambda: SteeredPower(HEAD[:1], TEN, FS), "mics: .*at least 2"),
    (lambda: SteeredPower(HEAD, TEN, 0), "fs=0"),
    (lambda: SteeredPower(HEAD, TEN, FS, band=(4000.0, 500.0)), "band="),
    (lambda: SteeredPower(HEAD, TEN, FS, c=-1.0), "c=-1"),
    (lambda: SteeredPower(HEAD, Grid(2 * TEN.points, TEN.shape, 0.3, True), FS), "unit vector"),
    (lambda: SteeredPower(HEAD, TEN, FS, band=(9000.0, 9500.0))(NOISE), "band="),
    (lambda: SteeredPower(HEAD, TEN, FS, "ml"), "weighting='ml'"),
    (lambda: SteeredPower(HEAD[:4], TEN, FS)(NOISE), "for each of 4 microphones"),
    (lambda: SteeredPower(HEAD[:3], TEN, FS)(NOISE[:, :3, :4]), "4 samples"),
    (lambda: SteeredPower(HEAD, TEN, FS)(NOISE / 0), "finite"),
    (lambda: find_peaks(NOISE, TEN), "500 points, the grid has"),
    (lambda: find_peaks(torch.zeros(len(TEN.points)), TEN, 0), "n_sources=0"),
    (lambda: find_peaks(torch.zeros(len(TEN.points)), TEN, 1, 0.0), "separation=0"),
    (lambda: locate(SteeredPower(HEAD, TEN, FS), NOISE, 0), "n_sources=0"),
    (lambda: locate(SteeredPower(HEAD, TEN, FS), NOISE, resolution=0.0), "resolution=0"),
    (lambda: music(NOISE, HEAD, FS, TEN, 12), "n_sources=12"),
    (lambda: music(NOISE, HEAD, FS, TEN), "500 samples"),
    (lambda: music(NOISE / 0, HEAD, FS, TEN), "finite"),
    (lambda: music(NOISE, HEAD, FS, TEN, length=33), "length=33"),
    (lambda: music(torch.randn(12, 9000), HEAD, FS, TEN, band=(10.0, 20.0)), "band="),
])
def test_bad_calls_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_importing_stays_light():
    code = ("import sys; from ssl_nb.classical import steered_power; print([m for m in "
            "('matplotlib', 'pyroomacoustics', 'anywidget') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"
