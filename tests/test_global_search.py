"""The highest point of a map: against brute force on random scenes, its invariances, bad input."""
import re, sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from ssl_nb.acoustics.geometry import random_array, tdoas, wall_array
from ssl_nb.acoustics.rooms import Room, make_scene
from ssl_nb.acoustics.signals import speech_like
from ssl_nb.classical.gcc_phat import gcc_phat
from ssl_nb.classical.global_search import cell_bounds, highest_point, highest_points
from ssl_nb.classical.global_search import position_signs, position_trust, read_map
from ssl_nb.classical.global_search import running_maxima, without
from ssl_nb.classical import global_search
from ssl_nb.workshop.speech import speech

ROOT = Path(__file__).resolve().parent.parent
FS, SIZE = 16000, (2.4, 2.0, 1.6)


def generator(seed): return torch.Generator().manual_seed(seed)


def scene(seed, t60=0.3, mics=None, snr_db=10.0):
    g = generator(seed)
    mics = wall_array(SIZE, g) if mics is None else mics
    talker = 0.3 + torch.rand(3, generator=g) * (torch.tensor(SIZE) - 0.6)
    heard = make_scene(Room(SIZE, t60=t60), speech_like(0.25, FS, seed), talker, mics,
                       snr_db=snr_db, generator=g)
    return heard.audio, mics, talker


def by_numpy(gcc, rate, delays):
    "Equation (1) by NumPy's interpolation."
    lags = (np.arange(gcc.shape[-1]) - gcc.shape[-1] // 2) / rate
    return sum(np.interp(delays[:, k].numpy(), lags, gcc[k].numpy()) for k in range(len(gcc)))


def map_of(audio, mics):
    lags = int(float(torch.pdist(mics).max()) / 343 * FS) + 2
    return gcc_phat(audio, max_lag=lags, interpolation=4, band=(100.0, 6000.0), fs=FS)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_in_the_room_is_higher_than_power_and_margin(seed):
    audio, mics, _ = scene(seed, t60=(0.0, 0.3, 0.5)[seed % 3], snr_db=(-5.0, 20.0)[seed % 2])
    found, gcc = highest_point(audio, mics, SIZE, FS), map_of(audio, mics)
    axes = [torch.arange(0.01, side, 0.02) for side in SIZE]
    brute = max(by_numpy(gcc, 4 * FS, tdoas(mics, torch.cartesian_prod(axes[0], axes[1], z[None])))
                .max() for z in axes[2])
    assert 0 <= found.margin < 0.2 and brute <= found.power + found.margin + 1e-4
    here = by_numpy(gcc, 4 * FS, tdoas(mics, found.position[None]))
    np.testing.assert_allclose(here, found.power, rtol=0, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_talker_without_echoes_is_found_to_the_finest_cell(seed):
    audio, mics, talker = scene(10 + seed, t60=0.0, snr_db=40.0)
    assert (highest_point(audio, mics, SIZE, FS).position - talker).norm() < 0.01


def test_bounds_hold_for_cells_of_any_size_and_place():
    g = generator(3)
    audio, mics, _ = scene(3, mics=random_array(8, SIZE, generator(5)))
    gcc = map_of(audio, mics)
    for side in (0.3, 0.05, 0.01):
        radius = side * 3 ** 0.5 / 2
        maps = global_search._maps(gcc[None], mics, 4 * FS / 343, radius)
        centres = torch.rand(60, 3, generator=g) * torch.tensor(SIZE)
        centres[:8] = mics + 0.2 * side  # cells around microphones, where directions turn fast
        bound, power = cell_bounds(maps, centres, torch.zeros(60, dtype=torch.long), radius)
        inside = centres[:, None] + side * (torch.rand(60, 500, 3, generator=g) - 0.5)
        highest = read_map(gcc, 4 * FS, tdoas(mics, inside).flatten(0, 1)).view(60, 500).amax(-1)
        assert (highest <= bound + 1e-4).all() and (power <= bound + 1e-4).all()
        # and say something
        assert (bound / highest).median() < (9, 5, 3)[(0.3, 0.05, 0.01).index(side)]


@pytest.mark.parametrize("side", [0.2, 0.05, 0.0125])
def test_the_bound_of_one_pair_sees_a_spike_anywhere_in_its_cell(side):
    "One pair and one narrow spike a cell, read by a corner or a point inside: nothing is hidden."
    g, rate, cells = generator(round(1e4 * side)), 4 * FS, 400
    mics = torch.tensor([[0.3, 0.4, 0.9], [1.9, 1.4, 0.8]])
    centres = 0.1 + torch.rand(cells, 3, generator=g) * (torch.tensor(SIZE) - 0.2)
    centres[:50] = mics[0] + side * torch.randn(50, 3, generator=g)  # where directions turn fast
    where = torch.rand(cells, 3, generator=g) - 0.5
    where[::2] = torch.where(where[::2] > 0, 0.5, -0.5)  # corners
    delays = tdoas(mics, centres + side * where)
    half = int(float((mics[0] - mics[1]).norm()) / 343 * rate) + 8
    lags = torch.arange(2 * half + 1) - half
    gcc = (1 - (lags - (delays * rate)[:, :, None]).abs()).clamp(min=0)
    maps = global_search._maps(gcc, mics, rate / 343, side * 3 ** 0.5 / 2)
    bound, _ = cell_bounds(maps, centres, torch.arange(cells), side * 3 ** 0.5 / 2)
    assert (bound >= gcc.amax((-2, -1)) - 1e-6).all()


def test_running_maxima_are_those_of_scipy():
    from scipy.ndimage import maximum_filter1d
    x = torch.randn(2, 3, 50, generator=generator(0))
    levels = running_maxima(x, 20)
    assert len(levels) == 5  # 1, 2, 4, 8, 16
    for k, level in enumerate(levels):
        wanted = maximum_filter1d(x.numpy(), 2 ** k, origin=-(2 ** k // 2), mode="nearest")
        np.testing.assert_array_equal(level[..., :50 - 2 ** k], wanted[..., :50 - 2 ** k])


def test_a_batch_is_its_recordings_one_by_one():
    mics = wall_array(SIZE, generator(1))
    audio = torch.stack([scene(k, mics=mics)[0] for k in range(4)])
    together = highest_point(audio.view(2, 2, *audio.shape[1:]), mics, SIZE, FS)
    assert together.position.shape == (2, 2, 3) and together.power.shape == (2, 2)
    for k, one in enumerate(audio):
        alone = highest_point(one, mics, SIZE, FS)
        torch.testing.assert_close(together.position.view(4, 3)[k], alone.position, rtol=0,
                                   atol=1e-5)
        torch.testing.assert_close(together.power.flatten()[k], alone.power, rtol=0, atol=1e-5)


def test_fewer_cells_leave_a_larger_margin_that_still_holds():
    audio, mics, _ = scene(4, t60=0.5, snr_db=0.0)
    whole, cut = (highest_point(audio, mics, SIZE, FS, most=m) for m in (2e6, 200))
    assert cut.margin > whole.margin and whole.power <= cut.power + cut.margin


@pytest.mark.parametrize("most", [8, 100, 2000])
def test_a_peak_planted_between_the_points_of_a_grid_is_within_the_bound(most):
    "Correlations of noise with one narrow spike a pair, all at one point: the truth is known."
    g = generator(most)
    mics, truth = wall_array(SIZE, g), torch.tensor([1.237, 0.911, 0.573])
    gcc = map_of(torch.randn(6, 4000, generator=g), mics)[None]
    rate, half = 4 * FS, gcc.shape[-1] // 2
    lag = tdoas(mics, truth[None])[0] * rate + half
    spike = (1 - (torch.arange(gcc.shape[-1]) - lag[:, None]).abs() / 2).clamp(min=0)
    gcc = gcc + 0.3 * spike
    there = float(by_numpy(gcc[0], rate, tdoas(mics, truth[None])).item())
    best, margin = global_search._highest(gcc, mics, torch.tensor(SIZE), rate / 343, most)
    assert there <= best[0, 3] + margin[0] + 1e-4 and margin[0] >= 0
    if most == 2000: assert (best[0, :3] - truth).norm() < 0.01


def test_two_talkers_without_echoes_are_both_found():
    mics, places = wall_array(SIZE, generator(8)), torch.tensor([[0.6, 0.5, 1.2], [1.9, 1.5, 0.9]])
    audio = sum(make_scene(Room(SIZE, t60=0.0), speech_like(0.4, FS, k), p, mics, snr_db=30,
                           generator=generator(k)).audio[:, :6000] for k, p in enumerate(places))
    found = highest_points(audio, mics, SIZE, FS, 2)
    assert (torch.cdist(found.position, places) < 0.05).any(0).all()
    assert found.position.shape == (2, 3) and (found.trust > 0.5).all()
    one = highest_point(audio, mics, SIZE, FS)
    torch.testing.assert_close(one.position, found.position[0])


@pytest.mark.parametrize("extent", [0.01, 0.08])
def test_an_array_smaller_than_the_cells_is_answered(extent):
    mics = torch.tensor(SIZE) / 2 + extent * torch.randn(5, 3, generator=generator(1))
    found = highest_point(scene(2, mics=mics)[0], mics, SIZE, FS)
    assert 0 <= found.trust <= 1 and (found.position >= 0).all()
    assert (found.position <= torch.tensor(SIZE)).all()


# --- trust ----------------------------------------------------------------------------------------

def answers():
    table = pd.read_csv(ROOT / "data" / "trust" / "positions.csv")
    signs = table[["over_noise", "consent", "log_mics", "second", "geometry", "log_aperture",
                   "mirror"]]
    return table.assign(trust=position_trust(signs.to_numpy()).numpy(),
                        right=table.error_m < 0.3)


def test_of_the_test_answers_that_state_nine_tenths_nine_in_ten_are_right():
    test = answers().query("split == 'test'")
    nearly = test[test.trust.between(0.85, 0.95)]
    assert len(nearly) >= 200 and 0.85 <= nearly.right.mean() <= 0.95
    assert (test.trust[test.talkers == 0] > 0.5).mean() < 0.01  # noise alone


def test_no_kind_of_array_overclaims():
    for kind, rows in answers().query("split == 'test'").groupby("kind"):
        assert rows.trust.mean() - rows.right.mean() < 0.04, kind
        sure = rows[rows.trust >= 0.85]
        if len(sure):
            assert binomtest(int(sure.right.sum()), len(sure), 0.85,
                             alternative="less").pvalue > 0.01, kind


def test_the_stored_answers_are_what_the_library_computes_now():
    sys.path.insert(0, str(ROOT / "data"))
    import make_trust_positions
    table, voices = answers(), speech("test")
    for scene_ in (7, 14):
        now = pd.DataFrame(make_trust_positions.rows("test", voices, scene_))
        then = table[(table.split == "test") & (table.scene == scene_)][list(now)]
        pd.testing.assert_frame_equal(now, then.reset_index(drop=True), check_dtype=False, rtol=0,
                                      atol=0.02)


def test_where_a_mirror_image_lies_in_the_room_the_trust_is_halved():
    signs = torch.tensor([[3.0, 0.9, 2.0, 0.0, 0.02, 1.5, mirror] for mirror in (0.0, 1.0)])
    trust = position_trust(signs.double())
    assert trust[0] > 0.9 and trust[1] == trust[0] / 2
    level = torch.rand(6, 3, generator=generator(0)) * torch.tensor(SIZE)
    for height, halved in ((0.8, 1.0), (SIZE[2], 0.0)):  # on the ceiling the image is outside
        level[:, 2] = height
        gcc = torch.rand(2, 15, 801, generator=generator(1))
        point = torch.tensor([[1.0, 1.0, 1.3], [1.0, 1.0, 0.81]])
        told = position_signs(gcc, FS, level, point, torch.ones(2), torch.tensor(SIZE), 5900.0, 0.2,
                              False, 343.0)
        assert told[0, 6] == halved and (told[1, 6] == 0 or height != 0.8)


def test_taking_out_a_talker_leaves_other_lags():
    gcc = torch.ones(1, 2, 101)
    left = without(gcc, torch.tensor([[0.0, 1e-3]]), 40000.0)[0]  # 40 lags a millisecond
    assert left.sum(-1).tolist() == [80, 80] and (left[0, 40:61] == 0).all()
    assert (left[1, 80:101] == 0).all()


@pytest.mark.parametrize("change, told", [
    ({"audio": torch.zeros(5, 4000)}, "needs one for each of 6"),
    ({"room_size": (2, 0, 2)}, "room_size"), ({"fs": -1}, "fs"), ({"band": (500, 100)}, "band"),
    ({"mics": torch.zeros(6, 2)}, "mics"), ({"audio": torch.full((6, 4000), torch.nan)}, "audio"),
    ({"c": 0}, "c="), ({"most": 0}, "most")])
def test_bad_input_is_refused_by_name(change, told):
    good = {"audio": torch.randn(6, 4000), "mics": wall_array(SIZE), "room_size": SIZE, "fs": FS}
    with pytest.raises(ValueError, match=re.escape(told)): highest_point(**(good | change))


def test_lists_and_arrays_are_taken():
    audio, mics, _ = scene(2)
    here = highest_point(audio.numpy(), mics.tolist(), list(SIZE), np.int64(FS))
    torch.testing.assert_close(here.position, highest_point(audio, mics, SIZE, FS).position)
