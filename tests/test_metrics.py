"""Metrics against hand-computed cases, closed forms, simulated coverage, and bad calls."""
import math

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from ssl_nb.workshop import metrics
from ssl_nb.workshop.metrics import (Evaluation, accuracy_within, azimuth_errors,
                                     bootstrap_interval, by_distance, mae, mean_angular_error_deg,
                                     median_error, position_errors, rmsae_deg, rmse, share_interval)

settings.register_profile("house", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("house")
seeds = st.integers(0, 10_000)


def generator(seed): return torch.Generator().manual_seed(seed)
def drawn(seed, *shape): return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


# --- errors ---------------------------------------------------------------------------------------

@given(seeds, st.integers(1, 30), st.sampled_from([torch.float32, torch.float64]))
def test_summaries_agree_with_numpy_and_keep_batches_and_type(seed, n, dtype):
    errors = drawn(seed, 2, 3, n).to(dtype)
    for ours, theirs in ((mae, np.mean), (median_error, np.median),
                         (rmse, lambda e, axis: np.sqrt(np.mean(e**2, axis)))):
        value = ours(errors)
        assert value.shape == (2, 3) and value.dtype == dtype
        np.testing.assert_allclose(value, theirs(errors.numpy(), axis=-1), rtol=1e-5)
        assert value[1, 2] == ours(errors[1, 2])
    assert (mae(errors) <= rmse(errors) + 1e-6).all()
    np.testing.assert_allclose(accuracy_within(errors, 0.5), (errors.numpy() < 0.5).mean(-1),
                               rtol=1e-6)


def test_lists_and_arrays_are_taken():
    assert mae([1, 2, 6]) == 3 and rmse(np.array([3.0, 3.0])) == 3 and median_error((1, 5)) == 3
    assert position_errors([[3, 4]], np.zeros((1, 2))).tolist() == [5]
    assert bootstrap_interval([1.0, 1.0, 1.0]) == (1, 1)


def test_accuracy_is_strict_and_positions_broadcast():
    assert accuracy_within(torch.tensor([0.1, 0.3, 0.5]), 0.5) == torch.tensor(2 / 3)
    assert (position_errors(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]]]), torch.zeros(5, 2)).tolist()
            == [[5.0] * 5, [0.0] * 5])


@given(st.floats(-6.2, 6.2), st.floats(-3.1, 3.1), st.integers(-3, 3))
def test_azimuth_errors_go_the_short_way(truth, off, turns):
    estimate = torch.tensor([math.fmod(truth + off + 2 * math.pi * turns, 2 * math.pi)],
                            dtype=torch.float64)
    torch.testing.assert_close(azimuth_errors(estimate, torch.tensor([truth], dtype=torch.float64)),
                               torch.tensor([abs(off)], dtype=torch.float64), rtol=0, atol=1e-9)
    # no rounding floor near zero in float32
    tiny = azimuth_errors(torch.tensor([1e-6]), torch.tensor([0.0]))
    torch.testing.assert_close(tiny, torch.tensor([1e-6]), rtol=1e-3, atol=0)


@given(seeds)
def test_mean_never_exceeds_rmsae_and_padding_does_not_count(seed):
    errors, active = drawn(seed, 4, 9), drawn(seed + 1, 4, 9) < 0.6
    active[:, 0] = True
    padded = torch.where(active, errors, torch.nan)  # what does not count may be anything
    assert mean_angular_error_deg(padded, active) <= rmsae_deg(padded, active) + 1e-9
    by_hand = np.mean([np.degrees(np.sqrt(np.mean(e[a].numpy() ** 2)))
                       for e, a in zip(errors, active)])
    assert abs(rmsae_deg(padded, active) - by_hand) < 1e-9
    plain = np.mean([np.degrees(np.mean(e[a].numpy())) for e, a in zip(errors, active)])
    assert abs(mean_angular_error_deg(padded, active) - plain) < 1e-9


def test_rmsae_is_a_mean_of_recordings_and_not_one_rms():
    errors = torch.tensor([[1.0, 1.0], [7.0, 7.0]]).deg2rad()
    assert abs(rmsae_deg(errors) - 4) < 1e-5  # one RMS over all would be 5
    assert abs(rmsae_deg(errors[1]) - 7) < 1e-5  # a single recording needs no batch


@given(seeds, st.integers(1, 60))
def test_by_distance_drops_nothing(seed, n):
    errors, distances = drawn(seed, n), 8 * drawn(seed + 1, n)
    table = by_distance(errors, distances, (1, 2.5, 4))
    assert table["count"].sum() == n
    assert (("< 1" in table.index) == bool((distances < 1).any())
            and (">= 4" in table.index) == bool((distances >= 4).any()))
    inside = errors[(distances >= 1) & (distances < 2.5)]
    if len(inside):
        assert (abs(table.loc["1 to 2.5", "rmse"] - rmse(inside)) < 1e-12
                and abs(table.loc["1 to 2.5", "median"] - median_error(inside)) < 1e-12)
    weighted = (table["mean"] * table["count"]).sum() / n
    assert abs(weighted - errors.mean()) < 1e-12
    assert (by_distance(errors[:1], torch.ones(1, dtype=torch.float64), (0, 1, 2))["count"].tolist()
            == [0, 1])  # an edge belongs to the bin above it


# --- intervals and evaluations --------------------------------------------------------------------

@pytest.mark.parametrize("statistic, true", [(mae, 5.0), (median_error, 5.0)])
def test_coverage_of_the_interval(statistic, true):
    trials, hits = 600, 0
    values = (5 + torch.randn(trials, 200, generator=generator(0))).abs()
    for k, x in enumerate(values):
        low, high = bootstrap_interval(x, statistic, n=300, seed=k)
        hits += low <= true <= high
    # Monte Carlo, and the known narrowness of percentiles
    assert abs(hits / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials) + 0.005


def test_coverage_when_recordings_are_drawn():
    trials, recordings, frames, hits, naive = 300, 50, 10, 0, 0
    recording = torch.arange(recordings).repeat_interleave(frames)
    for k in range(trials):
        g = generator(k)
        errors = (5 + torch.randn(recordings, 1, generator=g)
                  + 0.5 * torch.randn(recordings, frames, generator=g)).flatten().abs()
        low, high = bootstrap_interval(errors, mae, n=200, seed=k, groups=recording)
        hits += low <= 5 <= high
        low, high = bootstrap_interval(errors, mae, n=200, seed=k)
        naive += low <= 5 <= high
    assert (abs(hits / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials) + 0.01
            and naive / trials < 0.6)


@pytest.mark.parametrize("sizes", [(40, 40, 40, 40), (20, 60, 40, 40)])
def test_two_levels_have_the_variance_of_two_levels(sizes):
    "Davison and Hinkley (1997), section 3.8: between groups over their number, plus within."
    g = generator(3)
    parts = [k + (1 + k) * torch.randn(n, generator=g).double() for k, n in enumerate(sizes)]
    groups = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    total = lambda x: x.sum(-1)  # linear, so that its variance is known in unlike groups, too
    low, high = bootstrap_interval(torch.cat(parts), total, n=20000, groups=groups, nested=True)
    sums = torch.stack([part.sum() for part in parts])
    within = torch.stack([len(part) * part.var(correction=0) for part in parts])
    sigma = (4 * sums.var(correction=0) + within.sum()).sqrt()
    assert abs((high - low) / (2 * 1.96 * sigma) - 1) < 0.06
    whole = bootstrap_interval(torch.cat(parts), total, n=20000, groups=groups)
    assert whole[1] - whole[0] < high - low


def test_interval_of_a_share_has_the_binomial_variance_where_seeds_agree():
    "With equal shares only the scenes vary: p (1 - p) / (seeds * scenes)."
    low, high = share_interval([0.3] * 5, [100] * 5)
    assert abs((high - low) / (2 * 1.96 * math.sqrt(0.3 * 0.7 / 500)) - 1) < 0.12
    apart = share_interval([0.1, 0.5, 0.1, 0.5, 0.3], [100] * 5)
    assert apart[1] - apart[0] > 2 * (high - low) and share_interval([1, 1], [5, 9]) == (1, 1)


def test_interval_is_seeded_and_level_widens_it():
    x = torch.rand(50, generator=generator(0))
    assert (bootstrap_interval(x, rmse, seed=3) == bootstrap_interval(x, rmse, seed=3)
            != bootstrap_interval(x, rmse, seed=4))
    (low,
     high), (lower, higher) = bootstrap_interval(x, level=0.8), bootstrap_interval(x, level=0.99)
    assert lower < low < high < higher
    # recordings of one value each are values
    own = bootstrap_interval(x, mae, seed=5, groups=torch.arange(50))
    np.testing.assert_allclose(own, bootstrap_interval(x, mae, seed=5), atol=0.02)
    many = torch.rand(9000, generator=generator(1))  # drawn in several chunks
    np.testing.assert_allclose(bootstrap_interval(many, mae),
                               [0.5 - 1.96 / math.sqrt(12 * 9000),
                                0.5 + 1.96 / math.sqrt(12 * 9000)], atol=0.01)


def test_evaluation_counts_everything_and_merges():
    parts = [(torch.tensor([0.1, 0.5]), "a", 0.2, "x"),
             (torch.tensor([[0.2], [0.9]]), "b", 0.2, "y"), (torch.tensor([0.4]), "a", 0.6, "x")]
    whole, left, right = Evaluation(0.45), Evaluation(0.45), Evaluation(0.45)
    for k, (errors, recording, t60, room) in enumerate(parts):
        for e in (whole, left if k == 0 else right):
            e.add(errors, recording=recording, t60=t60, room=room)
    table = whole.table(by=["t60", "room"])
    assert (table.n.tolist() == [2, 2, 1] and table.units.tolist() == [1, 1, 1]
            and table.low.isna().all())  # one recording tells nothing about the next
    assert (table.loc[(0.2, "x")]["mean"] == pytest.approx(0.3)
            and table.loc[(0.2, "x")].accuracy == 0.5)
    pd.testing.assert_frame_equal((left + right).table(by=["t60", "room"]), table)
    total = whole.table()
    assert total.index.tolist() == ["all"] and total.n.item() == 5 and total.units.item() == 2
    assert (total["median"].item() == pytest.approx(0.4) and total.rmse.item()
            == pytest.approx(math.sqrt((0.01 + 0.25 + 0.04 + 0.81 + 0.16) / 5)))
    assert (total.low.item() == pytest.approx(np.mean([0.1, 0.5, 0.4]))
            and total.high.item() == pytest.approx(0.55))  # b, b is 0.55; a, a is 1 / 3


def test_evaluation_without_recordings_and_one_value_each():
    e = Evaluation(5.0).add(torch.rand(400, generator=generator(0)) * 10, t60=torch.arange(400) % 2)
    table = e.table("t60")
    assert (table.units.tolist() == [200, 200] and (table.high - table.low < 2).all()
            and table.index.tolist() == [0, 1])
    with pytest.raises(ValueError, match="distances: 400 of 400"): e.by_distance()
    assert (Evaluation(5.0) + e).table("t60").equals(table)
    far = Evaluation(1.0).add(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 6.0])).by_distance()
    assert far["count"].tolist() == [1, 0, 0, 0, 1]


def test_same_table_whatever_the_rows_around_it():
    "The seed belongs to a row: adding another condition does not change the interval of this one."
    e = Evaluation(0.5).add(torch.rand(50, generator=generator(0)), snr_db=5)
    before = e.table("snr_db").loc[5]
    after = e.add(torch.rand(30, generator=generator(1)), snr_db=0).table("snr_db").loc[5]
    assert before.equals(after)


# --- bad calls ------------------------------------------------------------------------------------

E = torch.tensor([0.1, 0.2, 0.3])

@pytest.mark.parametrize("call, words", [
    (lambda: position_errors(torch.tensor([[1.0, torch.nan]]),
                             torch.zeros(2)), r"estimates: nan at index \[0, 1\]"),
    (lambda: position_errors(torch.zeros(2), torch.tensor([torch.inf, 0.0])), "truth: inf"),
    (lambda: mae(torch.zeros(0)), "errors: shape"),
    (lambda: rmse(torch.tensor([-1.0])), "errors: -1"),
    (lambda: median_error(torch.tensor([torch.nan])), "errors: nan"),
    (lambda: position_errors(torch.ones(5, 3), torch.ones(5, 1)), r"estimates: .*\(5, 1\)"),
    (lambda: position_errors(torch.ones(5, 3), torch.ones(4, 3)), r"estimates: .*\(4, 3\)"),
    (lambda: azimuth_errors(torch.tensor([179.0]), torch.tensor([-179.0])), "degrees"),
    (lambda: rmsae_deg(torch.tensor([[5.0, 10.0]])), "errors: .*degrees"),
    (lambda: mean_angular_error_deg([[5.0, 90.0]]), "errors: .*degrees"),
    (lambda: rmsae_deg(E, torch.ones(3)), "active: type"),
    (lambda: accuracy_within(E, 0.0), "radius=0.0"),
    (lambda: azimuth_errors(E * torch.inf, E), "estimates: inf"),
    (lambda: rmsae_deg(E, torch.zeros(3).bool()), "has no active frame"),
    (lambda: rmsae_deg(torch.tensor([[1.0], [torch.nan]])), "errors: nan"),
    (lambda: by_distance(E, -E), "distances: -0.1 m"),
    (lambda: by_distance(E, E, (2, 1)), "edges="),
    (lambda: by_distance(E, E, (2,)), "edges="),
    (lambda: bootstrap_interval(E[:1]), "values: 1 to draw from"),
    (lambda: bootstrap_interval(E, groups=torch.zeros(3).long()), "groups: 1 to draw"),
    (lambda: bootstrap_interval(E, nested=True), "nested=True"),
    (lambda: share_interval([0.5], [10]), "groups: 1 to draw"),
    (lambda: share_interval([0.5, 1.5], [10, 10]), "shares"),
    (lambda: share_interval([0.5, 0.5], [10]), "counts"),
    (lambda: bootstrap_interval(E, level=1.0), "level=1.0"),
    (lambda: bootstrap_interval(E, n=10), "n=10"),
    (lambda: Evaluation(0.0), "radius=0.0"),
    (lambda: Evaluation(1.0).table(), "nothing has been added"),
    (lambda: Evaluation(1.0).add(E, t60=1).add(E, snr=2), "conditions: "),
    (lambda: Evaluation(1.0).add(E, t60=1).table("snr"), "by: "),
    (lambda: Evaluation(1.0).add(E, error=1), "own columns"),
    (lambda: Evaluation(1.0).add(E, t60=[1, 2]), "t60: 2 values for 3"),
    (lambda: Evaluation(1.0).add(E, recording=["a"]), "recording: 1 values"),
    (lambda: Evaluation(1.0) + Evaluation(2.0), "radius: 1.0 and 2.0"),
])
def test_bad_calls_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words): call()


# --- timing ---------------------------------------------------------------------------------------

def test_warm_up_calls_do_not_count_and_one_slow_call_does_not_move_the_median(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ssl_nb.workshop.metrics.time.perf_counter", lambda: now[0])
    durations = iter([9.0, 9.0, 1.0, 2.0, 100.0, 1.0, 2.0])
    def action(): now[0] += next(durations)
    assert (metrics.time_calls(action, repeats=5, warmup=2) == (2.0, 1.0, 2.0)
            and next(durations, None) is None)


@pytest.mark.parametrize("options, words",
                         [({"repeats": 0}, "repeats=0"), ({"warmup": -1}, "warmup=-1")])
def test_bad_timings_are_refused(options, words):
    with pytest.raises(ValueError, match=words): metrics.time_calls(lambda: None, **options)
