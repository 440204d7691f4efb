"""Measures of the field against hand-computed cases, brute force over permutations, and bad
calls."""
import itertools, math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from ssl_nb.acoustics.geometry import angular_error, to_direction
from ssl_nb.workshop.metrics import azimuth_errors
from ssl_nb.workshop.field_measures import (Events, associate, locata_measures, ospa,
                                            seld_frame_scores, seld_scores)

settings.register_profile("house", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("house")
seeds = st.integers(0, 10_000)


def generator(seed): return torch.Generator().manual_seed(seed)
def drawn(seed, *shape): return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)
def at_deg(degrees, elevation_deg=0.0):
    degrees = torch.as_tensor(degrees, dtype=torch.float64)
    return to_direction(degrees.deg2rad(), torch.full_like(degrees, math.radians(elevation_deg)))


# --- association and OSPA, by brute force over permutations ---------------------------------------

def best_pairs(cost, allowed):
    "(number of pairs, sum of distances) of the best one-to-one pairing, trying them all."
    m, n = cost.shape
    best = (0, 0.0)
    for columns in itertools.permutations([*range(n), *[None] * m], m):
        pairs = [(i, j) for i, j in enumerate(columns) if j is not None]
        if all(allowed[i, j] for i, j in pairs):
            best = min(best, (-len(pairs), sum(float(cost[i, j]) for i, j in pairs)))
    return -best[0], best[1]


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.floats(0.1, 1.1))
def test_association_is_the_best_of_all(seed, m, n, gate):
    cost, gate = 100 * drawn(seed, 3, m, n), 100 * gate
    chosen = associate(cost, cost <= gate)
    assert chosen.shape == (3, m)
    for c, pick in zip(cost, chosen.tolist()):
        used = [j for j in pick if j >= 0]
        assert len(set(used)) == len(used) and all(c[i, j] <= gate for i, j in enumerate(pick)
                                                   if j >= 0)
        count, total = best_pairs(c, c <= gate)
        assert (len(used) == count
                and abs(sum(float(c[i, j]) for i, j in enumerate(pick) if j >= 0) - total) < 1e-9)


def ospa_by_permutations(a, b, cutoff, order):
    if len(a) > len(b): a, b = b, a
    if len(b) == 0: return 0.0
    cut = [[min(cutoff, math.dist(x, y)) ** order for y in b] for x in a]
    least = min(sum(cut[i][j] for i, j in enumerate(p))
                for p in itertools.permutations(range(len(b)), len(a)))
    return ((least + cutoff**order * (len(b) - len(a))) / len(b)) ** (1 / order)


@given(seeds, st.integers(0, 4), st.integers(0, 4), st.floats(0.05, 2),
       st.sampled_from([1.0, 1.5, 2.0]))
def test_ospa_is_the_best_of_all_permutations(seed, n, m, cutoff, order):
    estimates, truth = drawn(seed, n, 2), drawn(seed + 1, m, 2)
    expected = ospa_by_permutations(estimates.tolist(), truth.tolist(), cutoff, order)
    assert abs(ospa(estimates, truth, cutoff, order) - expected) < 1e-9
    assert abs(ospa(truth, estimates, cutoff, order) - expected) < 1e-9  # a metric is symmetric


@given(seeds, st.floats(0.1, 2), st.sampled_from([1.0, 2.0]))
def test_ospa_is_a_metric(seed, cutoff, order):
    a, b, c = drawn(seed, 2, 3), drawn(seed + 1, 3, 3), drawn(seed + 2, 1, 3)
    assert ospa(a, a.flip(0), cutoff, order) < 1e-12
    assert ospa(a, c, cutoff, order) <= ospa(a, b, cutoff,
                                             order) + ospa(b, c, cutoff, order) + 1e-12


def test_ospa_masks_batches_and_directions():
    estimates, truth = drawn(0, 5, 3, 2), drawn(1, 5, 2, 2)
    present, active = drawn(2, 5, 3) < 0.5, drawn(3, 5, 2) < 0.7
    hidden = torch.where(present[..., None], estimates, torch.nan)
    batched = ospa(hidden, truth, 0.4, 1.0, present, active)
    for k in range(5):
        assert abs(batched[k] - ospa(estimates[k][present[k]], truth[k][active[k]], 0.4)) < 1e-12
    assert ospa(torch.zeros(0, 3, 2), torch.zeros(0, 2, 2), 1.0).shape == (0,)
    assert abs(ospa(at_deg([20.0]), at_deg([10.0]), 1.0, distance=angular_error)
               - math.radians(10)) < 1e-9


# --- LOCATA ---------------------------------------------------------------------------------------

def test_two_talkers_by_hand():
    # eight stamps of half a second; the clock does not start at 0
    times = torch.arange(8) * 0.5 + 10
    truth = torch.stack([at_deg([0.0] * 8), at_deg([60.0] * 8, 10)])
    active = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    estimates = torch.stack([at_deg([5.0] * 8), at_deg([56.0] * 8, 12), at_deg([-150.0] * 8)])
    present = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1, 0, 0],
                            [0, 0, 0, 0, 0, 0, 1, 0]]).bool()
    m = locata_measures(times, truth, active, estimates, present)
    assert abs(m.detection_probability - 5 / 10) < 1e-12  # 3 of 4, 0 of 2, 2 of 4
    # track 0 at stamp 4 (its talker is silent, 60 degrees are beyond the gate), track 2 at stamp 6
    assert abs(m.false_alarm_rate - 2 / 4) < 1e-12
    assert abs(m.false_alarm_rate_active - 2 / 4) < 1e-12
    assert m.periods.start.tolist() == [10.0, 13.0, 11.0] and m.periods.source.tolist() == [0, 0, 1]
    assert m.periods.track_latency.tolist() == [0.5, 1.0, 0.5]  # never detected: the whole stretch
    assert abs(m.track_latency - 2 / 3) < 1e-12 and m.swap_rate == 0
    # source 1 is lost at stamp 4 and found again at 5; ten stamps are 5 s
    assert abs(m.fragmentation_rate - 1 / 5) < 1e-12
    assert (abs(m.azimuth_error_deg - (3 * 5 + 2 * 4) / 5) < 1e-9
            and abs(m.elevation_error_deg - 2 * 2 / 5) < 1e-9)
    # 0: missed; 4: 55 degrees cost the cut-off; 6: 150 degrees off
    stamps = [30, 5, (5 + 30) / 2, (5 + 4) / 2, 30, 4, 30, 30]
    assert abs(m.ospa_deg - np.mean(stamps)) < 1e-9


def test_azimuths_wrap_and_the_gate_decides():
    times, on = torch.arange(4.0), torch.ones(1, 4).bool()
    measures = lambda gate: locata_measures(times, at_deg([175.0] * 4)[None], on,
                                            at_deg([-170.0] * 4)[None], on, gate)
    assert (abs(measures(30.0).azimuth_error_deg - 15) < 1e-9
            and measures(30.0).detection_probability == 1)
    narrow = measures(10.0)
    assert (narrow.detection_probability == 0 and narrow.false_alarm_rate == 1
            and math.isnan(narrow.azimuth_error_deg) and narrow.track_latency == 4)


def test_identity_is_remembered_over_pauses_and_gaps():
    times, active = torch.arange(9.0), torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1]]).bool()
    truth, estimates = at_deg([0.0] * 9)[None], at_deg([1.0] * 9).expand(2, 9, 3)
    new = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1]]).bool()
    same = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 0, 1], [0] * 9]).bool()
    assert abs(locata_measures(times, truth, active, estimates, new).swap_rate - 1 / 6) < 1e-12
    kept = locata_measures(times, truth, active, estimates, same)
    assert kept.swap_rate == 0 and abs(kept.fragmentation_rate - 1 / 6) < 1e-12
    # goes on through the pause
    coasting = locata_measures(times, truth, active, estimates[:1], torch.ones(1, 9).bool())
    assert abs(coasting.false_alarm_rate - 3 / 9) < 1e-12 and coasting.false_alarm_rate_active == 0


def test_no_tracks_at_all_and_absent_directions_may_be_nan():
    times, active = torch.arange(5.0), torch.ones(2, 5).bool()
    nothing = locata_measures(times, at_deg([[0.0] * 5, [90.0] * 5]), active, torch.zeros(0, 5, 3),
                              torch.zeros(0, 5).bool())
    assert (nothing.detection_probability == nothing.false_alarm_rate == 0
            and abs(nothing.ospa_deg - 30) < 1e-9 and nothing.track_latency == 5)
    estimates, present = at_deg([[0.0] * 5]), torch.tensor([[1, 0, 1, 1, 1]]).bool()
    estimates[0, 1] = torch.nan
    half = locata_measures(times, at_deg([[0.0] * 5, [90.0] * 5]), active, estimates, present)
    assert abs(half.detection_probability - 0.4) < 1e-12 and abs(half.azimuth_error_deg) < 1e-9


@given(seeds)
def test_more_noise_is_never_a_higher_detection_and_order_of_tracks_is_free(seed):
    truth, active = 3 * drawn(seed, 2, 12), drawn(seed + 1, 2, 12) < 0.7
    active[:, 0] = True
    estimates, present = 3 * drawn(seed + 2, 3, 12), drawn(seed + 3, 3, 12) < 0.7
    flat = lambda x: to_direction(x, torch.zeros_like(x))
    a = locata_measures(torch.arange(12.0), flat(truth), active, flat(estimates), present)
    b = locata_measures(torch.arange(12.0), flat(truth), active, flat(estimates).flip(0),
                        present.flip(0))
    np.testing.assert_allclose(a[:-1], b[:-1], rtol=0, atol=1e-9)
    pairs = sum(best_pairs(azimuth_errors(estimates[present[:, t], t][None],
                                          truth[active[:, t], t][:, None]), azimuth_errors(
        estimates[present[:, t], t][None], truth[active[:, t], t][:, None]) <= math.radians(30))[0]
                for t in range(12) if active[:, t].any() and present[:, t].any())
    assert abs(a.detection_probability - pairs / int(active.sum())) < 1e-12
    assert abs(a.false_alarm_rate - (int(present.sum()) - pairs) / 12) < 1e-12


# --- SELD -----------------------------------------------------------------------------------------

def random_events(seed, frames=14, classes=3, most=2):
    "Up to `most` events of each class in each frame."
    g = generator(seed)
    rows = [(f, c) for f in range(frames) for c in range(classes)
            for _ in range(int(torch.randint(most + 2, (1,), generator=g)) - 1)] or [(0, 0)]
    frame, label = torch.tensor(rows).T
    azimuth, elevation = 1.2 * torch.rand(2, len(rows), generator=g, dtype=torch.float64)
    return Events(frame, label, to_direction(azimuth, elevation),
                  0.5 + 3 * torch.rand(len(rows), generator=g, dtype=torch.float64))


def pairs_by_permutations(truth, estimates, frame, label):
    "Rows (i, j, angle in degrees) of the cheapest pairing in one frame and class, trying all."
    rows = lambda e: [k for k in range(len(e.frame)) if e.frame[k] == frame and e.label[k] == label]
    i, j = rows(truth), rows(estimates)
    angle = lambda a, b: math.degrees(float(angular_error(truth.direction[a],
                                                          estimates.direction[b])))
    if len(i) <= len(j): options = [list(zip(i, p)) for p in itertools.permutations(j, len(i))]
    else: options = [sorted(zip(p, j)) for p in itertools.permutations(i, len(j))]
    best = min(options, key=lambda pairs: sum(angle(*p) for p in pairs))
    return i, j, [(a, b, angle(a, b)) for a, b in best]


def seld_2023_by_loops(estimates, truth, classes, per_segment, threshold):
    "The 2023 scores as plain loops over segments, classes and frames."
    TP, SP, FP, FN, angles, found = ([0.0] * classes for _ in range(6))
    errors = reference = 0
    last = int(max(truth.frame.max(), estimates.frame.max()))
    for start in range(0, last + 1, per_segment):
        false = missed = 0
        for c in range(classes):
            of_track, n_true, n_est = {}, 0, 0
            for f in range(start, start + per_segment):
                i, j, pairs = pairs_by_permutations(truth, estimates, f, c)
                n_true, n_est = max(n_true, len(i)), max(n_est, len(j))
                for a, _, angle in pairs: of_track.setdefault(i.index(a), []).append(angle)
            reference += n_true
            if n_true and n_est and not of_track: extra, lost = 0, n_est
            else: extra, lost = max(0, n_est - n_true), max(0, n_true - n_est)
            right = sum(np.mean(x) <= threshold for x in of_track.values())
            TP[c] += right; SP[c] += len(of_track) - right; FP[c] += extra; FN[c] += lost
            angles[c] += sum(np.mean(x) for x in of_track.values()); found[c] += len(of_track)
            false += extra + len(of_track) - right; missed += lost
        errors += min(false, missed) + max(0, missed - false) + max(0, false - missed)
    ratio = lambda a, b: a / b if b else 0.0
    f = np.mean([ratio(TP[c], TP[c] + SP[c] + (FP[c] + FN[c]) / 2) for c in range(classes)])
    le = np.mean([angles[c] / found[c] if found[c] else 180 for c in range(classes)])
    lr = np.mean([ratio(found[c], found[c] + FN[c]) for c in range(classes)])
    er = errors / reference
    return er, f, le, lr, (er + 1 - f + le / 180 + 1 - lr) / 4


@settings(max_examples=15)
@given(seeds, st.sampled_from([1, 4, 10]), st.sampled_from([15.0, 20.0, 30.0]))
def test_seld_scores_against_loops_and_permutations(seed, per_segment, threshold):
    truth, estimates = random_events(seed), random_events(seed + 1)
    ours = seld_scores(estimates, truth, 4, per_segment, threshold)  # class 3 never occurs
    np.testing.assert_allclose(ours[:-1], seld_2023_by_loops(estimates, truth, 4, per_segment,
                                                             threshold), rtol=0, atol=1e-9)
    assert ours.classes.loc[3].tolist() == [0, 180, 0]


@settings(max_examples=15)
@given(seeds)
def test_frame_scores_against_loops_and_permutations(seed):
    truth, estimates = random_events(seed, frames=8), random_events(seed + 1, frames=8)
    f, doae, rde = [], [], []
    for c in range(3):
        right = wrong = count = 0
        angles, relative = [], []
        for frame in range(8):
            i, j, pairs = pairs_by_permutations(truth, estimates, frame, c)
            far = [abs(float(estimates.distance[b] - truth.distance[a])) / float(truth.distance[a])
                   for a, b, _ in pairs]
            good = [angle <= 20 and r <= 0.5 for (_, _, angle), r in zip(pairs, far)]
            right += sum(good); wrong += len(good) - sum(good); count += abs(len(i) - len(j))
            angles += [angle for *_, angle in pairs]; relative += far
        f.append(right / max(right + wrong + count / 2, 1e-12))
        doae.append(np.mean(angles or np.nan))
        rde.append(np.mean(relative or np.nan))
    ours = seld_frame_scores(estimates, truth, 3, max_relative=0.5)
    np.testing.assert_allclose(ours[:-1], [np.mean(f), np.nanmean(doae), np.nanmean(rde)], rtol=0,
                               atol=1e-9)


def test_two_events_of_one_class_are_paired_by_the_least_sum():
    truth = Events(torch.tensor([0, 0]), torch.tensor([0, 0]), at_deg([0.0, 30.0]))
    close = Events(torch.tensor([0, 0]), torch.tensor([0, 0]), at_deg([29.0, 5.0]))
    scores = seld_scores(close, truth, 1)
    assert scores.f == 1 and abs(scores.le_deg - 3) < 1e-6 and scores.er == 0 and scores.lr == 1
    one = Events(torch.tensor([0]), torch.tensor([0]), at_deg([29.0]))
    half = seld_scores(one, truth, 1)
    # one hit, one missed
    assert abs(half.f - 1 / 1.5) < 1e-12 and half.lr == 0.5 and half.er == 0.5


def test_nothing_reported():
    none = Events(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long),
                  torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    truth = random_events(0)
    scores = seld_scores(none, truth, 3)
    assert scores[:-1] == (1.0, 0.0, 180.0, 0.0, 1.0)
    frame = seld_frame_scores(none, truth, 3)
    assert frame.f == 0 and math.isnan(frame.doae_deg) and math.isnan(frame.rde)


# --- bad calls ------------------------------------------------------------------------------------

ON, T3 = torch.ones(1, 3).bool(), torch.arange(3.0)
D3 = at_deg([[0.0, 0.0, 0.0]])
NO_WAY = torch.zeros(1, 3, 3)
EV = Events(torch.tensor([0]), torch.tensor([1]), at_deg([0.0]), torch.tensor([1.0]))

@pytest.mark.parametrize("call, words", [
    (lambda: associate(-torch.ones(1, 2, 2), torch.ones(1, 2, 2).bool()), "distances: -1"),
    (lambda: associate(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), "allowed: type"),
    (lambda: ospa(torch.zeros(1, 2), torch.zeros(1, 2), 0.0), "cutoff=0.0"),
    (lambda: ospa(torch.zeros(1, 2), torch.zeros(1, 2), 1.0, 0.5), "order=0.5"),
    (lambda: ospa(torch.zeros(1, 3), D3[0], 1.0, distance=angular_error), "estimates: .* is zero"),
    (lambda: ospa(D3[0], torch.zeros(1, 3), 1.0, distance=angular_error), "truth: .* is zero"),
    (lambda: ospa(at_deg([0.0])[:, :2], D3[0, :, :2], 1.0, distance=angular_error),
     "estimates: .*not angles"),
    (lambda: ospa(torch.zeros(1, 2) / 0, torch.zeros(1, 2), 1.0), "estimates: nan"),
    (lambda: locata_measures(T3.flip(0), D3, ON, D3, ON), "times"),
    (lambda: locata_measures(T3, D3, ~ON, D3, ON), "no source is ever active"),
    (lambda: locata_measures(T3, D3, ON, D3, ON, 0.0), "gate_deg=0.0"),
    (lambda: locata_measures(T3, D3 * torch.nan, ON, D3, ON), "truth: nan"),
    (lambda: locata_measures(T3, D3, ON, D3 * torch.nan, ON), "estimates: nan"),
    (lambda: locata_measures(T3, D3, ON, NO_WAY[0][None], ON), "estimates: .* is zero"),
    (lambda: locata_measures(T3, NO_WAY[0][None], ON, D3, ON), "truth: .* is zero"),
    (lambda: seld_scores(EV, EV, 1), "labels from 1 to 1"),
    (lambda: seld_scores(EV, EV._replace(frame=torch.tensor([-1])), 2), "truth: frame -1"),
    (lambda: seld_scores(EV._replace(direction=torch.zeros(1, 3)), EV, 2), "direction: .* is zero"),
    (lambda: seld_scores(EV, EV, 2, 0), "frames_per_segment=0"),
    (lambda: seld_scores(EV, EV, 2, 1, 0.0), "threshold_deg=0.0"),
    (lambda: seld_scores(EV, EV._replace(direction=EV.direction * torch.nan),
                         2), "truth.direction: nan"),
    (lambda: seld_frame_scores(EV._replace(distance=None), EV, 2), "estimates: has no distance"),
    (lambda: seld_frame_scores(EV, EV._replace(distance=torch.tensor([0.0])), 2), "distance: 0 m"),
    (lambda: seld_scores(EV, EV._replace(label=torch.tensor([0, 1])), 2), "equally long"),
    (lambda: seld_scores(EV, Events(*(x[:0] for x in EV)), 2), "truth: no events"),
])
def test_bad_calls_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words): call()
