"""Label codes: exact round trips anywhere in the room, symmetric decoding, losses against other
libraries, bad input that is named."""
import csv, itertools, math, subprocess, sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import special, stats
from ssl_nb.labels.label_codes import (CODES, CellGrid, HeatMap, OneHot, RefinedGrid, UnbiasedLabel,
                                       adjacent_bias, adjacent_decoding, class_accuracy,
                                       gaussian_label, label_curves, marginals, plot_labels,
                                       rectangle_floor, soft_cross_entropy)
from ssl_nb.settings import load_settings
from ssl_nb.workbench.tables import read_papers

ROOM = torch.tensor([6.0, 4.0])
GRID = CellGrid((6, 6))
by_code = pytest.mark.parametrize("kind", CODES.values(), ids=CODES)


def seeded(seed): return torch.Generator().manual_seed(seed)


def spots(n, seed=0, dtype=torch.float64):
    "Positions and the room of each."
    rooms = 4 + 6 * torch.rand(n, 2, generator=seeded(seed), dtype=dtype)
    return rooms * torch.rand(n, 2, generator=seeded(seed + 1), dtype=dtype), rooms


def by_definition(position, extent, cells):
    "The paper's equations (1) to (3) with loops, for one position, x first."
    label = np.zeros([n + 1 for n in cells])
    parts = []
    for p, side, n in zip(position, extent, cells):
        chi = p / (side / n)
        x = np.zeros(n + 1)
        x[int(chi)] = 1 - chi % 1
        if int(chi) < n: x[int(chi) + 1] = chi % 1
        parts.append(x)
    for index in np.ndindex(*label.shape):
        label[index] = math.prod(x[i] for x, i in zip(parts, index))
    return label.ravel()


# --- positions in cells ---------------------------------------------------------------------------

def test_outputs_per_code():
    sizes = {name: [kind(CellGrid(cells)).n_outputs for cells in ((5,), (6, 4), (2, 3, 4))]
                   for name, kind in CODES.items()}
    assert sizes == {"one_hot": [5, 24, 24], "heat_map": [5, 24, 24], "refined_grid": [10, 72, 96],
                     "uld": [6, 35, 60]}
    assert UnbiasedLabel(CellGrid((36, 5), circular=(0,))).n_outputs == 36 * 6


@given(st.floats(-1e4, 1e4), st.integers(3, 90), st.floats(0.5, 400))
@settings(max_examples=200, deadline=None)
def test_a_circle_has_no_seam(position, cells, period):
    code, extent = (UnbiasedLabel(CellGrid((cells,), circular=(0,))),
                    torch.tensor([period], dtype=torch.float64))
    back = code.locate(code.encode(torch.tensor([position], dtype=torch.float64), extent),
                       extent).item()
    assert -period / 2 < back <= period / 2
    assert abs(math.remainder(back - position, period)) <= 1e-12 * (abs(position) + period)


def test_half_a_period_is_positive():
    ring, full = CellGrid((8,), circular=(0,)), torch.tensor([2 * math.pi])
    for kind in (UnbiasedLabel, RefinedGrid):
        code = kind(ring)
        torch.testing.assert_close(
            code.locate(code.encode(torch.tensor([[math.pi], [-math.pi]]), full), full).abs(),
            torch.full((2, 1), math.pi))
    assert (ring.positions(torch.tensor([[4.0], [-4.0], [12.0]]), full) == math.pi).all()


# --- lossless -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [UnbiasedLabel, RefinedGrid])
@given(share=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([
    0.0, 1.0, 0.5, 0.25, math.nextafter(0.5, 1), math.nextafter(1.0, 0), 5e-324])),
    min_size=3, max_size=3), side=st.lists(st.floats(0.3, 50), min_size=3, max_size=3),
    cells=st.lists(st.integers(1, 9), min_size=3, max_size=3), axes=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_encoding_is_lossless(kind, dtype, share, side, cells, axes):
    extent = torch.tensor(side[:axes], dtype=torch.float64).to(dtype)
    p = torch.minimum(torch.tensor(share[:axes], dtype=torch.float64).to(dtype) * extent, extent)
    for window in ((2, 3, 5) if kind is UnbiasedLabel else (0,)):
        code = kind(CellGrid(cells[:axes]), *([window] if window else []))
        label = code.encode(p, extent)
        assert torch.isfinite(label).all() and (label >= 0).all()
        back = code.locate(label, extent)
        assert ((back - p).abs() <= 4 * torch.finfo(dtype).eps * extent).all()
        assert (back >= 0).all() and (back <= extent).all()


def test_one_ulp_off_a_class_keeps_its_ulp():
    tiny = torch.tensor([5e-324, 1e-300, 1e-20], dtype=torch.float64)[:, None]
    code, one = UnbiasedLabel(CellGrid((1,))), torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(code.locate(code.encode(tiny, one), one), tiny, rtol=1e-12, atol=0)


def test_labels_against_the_definition():
    points, rooms = spots(40)
    points[0], points[1] = rooms[0], torch.zeros(2)
    label = UnbiasedLabel(CellGrid((5, 3))).encode(points, rooms)
    expected = np.stack([by_definition(p, r, (5, 3))
                         for p, r in zip(points.tolist(), rooms.tolist())])
    np.testing.assert_allclose(label, expected, atol=1e-14)
    for k, part in enumerate(marginals(label, (6, 4))):
        np.testing.assert_allclose(part, expected.reshape(-1, 6, 4).sum(2 - k), atol=1e-14)


def test_heat_map_against_scipy():
    points, rooms = spots(10)
    code = HeatMap(CellGrid((4, 3)), sigma=0.2)
    for p, r, label in zip(points / rooms, rooms, code.encode(points, rooms)):
        x, y = (stats.norm.pdf((np.arange(n) + 0.5) / n, c, 0.2) / stats.norm.pdf(0, 0, 0.2)
                for n, c in zip((4, 3), p.tolist()))
        np.testing.assert_allclose(label, np.outer(x, y).ravel(), atol=1e-14)
    ring = HeatMap(CellGrid((8,), circular=(0,)))
    label = ring.encode(torch.tensor([[0.0], [0.999]]), torch.ones(1))
    torch.testing.assert_close(label[0], label[0].flip(-1))
    assert label[1, 0] > 0.7 and label[1, 7] > 0.7


@by_code
@pytest.mark.parametrize("circular", [(), (0,)])
def test_batches_and_rooms_broadcast(kind, circular):
    code = kind(CellGrid((5, 4), circular))
    points, rooms = spots(24)
    points = points * 0.99
    whole = code.encode(points, rooms)
    shaped = code.encode(points.reshape(2, 3, 4, 2), rooms.reshape(2, 3, 4, 2))
    assert shaped.shape == (2, 3, 4, code.n_outputs) and torch.equal(shaped.reshape(24, -1), whole)
    alone = torch.stack([code.encode(p, r) for p, r in zip(points, rooms)])
    assert torch.equal(alone, whole) and whole.dtype == torch.float64
    back = code.locate(whole, rooms)
    torch.testing.assert_close(torch.stack([code.locate(w, r) for w, r in zip(whole, rooms)]), back)
    assert code.encode(points[:, None] / 10, rooms[:3]).shape == (24, 3, code.n_outputs)
    assert code.classes(points, rooms).shape == (24, 2)


@by_code
def test_decode_is_activate_then_locate(kind):
    code = kind(GRID)
    outputs = torch.randn(50, code.n_outputs, generator=seeded(0))
    assert torch.equal(code.decode(outputs, ROOM), code.locate(code.activate(outputs), ROOM))
    found = code.decode(outputs, ROOM)
    assert (found >= 0).all() and (found <= ROOM).all()


@by_code
def test_scaling_the_room_scales_the_answer(kind):
    code, outputs = kind(GRID), torch.randn(50, kind(GRID).n_outputs, generator=seeded(1))
    torch.testing.assert_close(code.decode(outputs, 3 * ROOM), 3 * code.decode(outputs, ROOM))
    points, rooms = spots(50)
    torch.testing.assert_close(code.encode(2 * points, 2 * rooms), code.encode(points, rooms))


# --- losses ---------------------------------------------------------------------------------------

def test_losses_against_other_code():
    points, rooms = spots(30)
    for kind in (OneHot, UnbiasedLabel):
        code = kind(GRID)
        target, outputs = code.encode(points, rooms), torch.randn(
            30, kind(GRID).n_outputs, generator=seeded(3), dtype=torch.float64)
        expected = -(target.numpy() * special.log_softmax(outputs.numpy(), -1)).sum(-1)
        np.testing.assert_allclose(code.loss(outputs, target), expected, rtol=1e-12)
    refined = RefinedGrid(GRID)
    target, outputs = (refined.encode(points, rooms),
                       torch.randn(30, 108, generator=seeded(4), dtype=torch.float64))
    t, o = target.reshape(30, 36, 3).numpy(), outputs.reshape(30, 36, 3).numpy()
    p = special.expit(o)
    entropy = -(t[..., 0] * np.log(p[..., 0]) + (1 - t[..., 0]) * np.log(1 - p[..., 0])).sum(-1)
    cell = t[..., 0].argmax(-1)
    off = ((p[np.arange(30), cell, 1:] - t[np.arange(30), cell, 1:])**2).sum(-1)
    np.testing.assert_allclose(refined.loss(outputs, target), entropy + off, rtol=1e-12)
    heat = HeatMap(GRID)
    np.testing.assert_allclose(heat.loss(outputs[:, :36], heat.encode(points, rooms)),
                               ((outputs[:, :36] - heat.encode(points, rooms))**2).numpy().mean(-1),
                               rtol=1e-12)


@by_code
def test_losses_form_all_pairs_of_talkers_and_have_finite_gradients(kind):
    code = kind(GRID)
    points, rooms = spots(12)
    target = code.encode(points, rooms).reshape(6, 2, -1)
    outputs = (20 * torch.randn(6, 2, code.n_outputs, generator=seeded(5),
                                dtype=torch.float64)).requires_grad_()
    pairs = code.loss(outputs[:, :, None], target[:, None])
    assert pairs.shape == (6, 2, 2)
    torch.testing.assert_close(pairs.diagonal(dim1=1, dim2=2), code.loss(outputs, target))
    slope, = torch.autograd.grad(pairs.mean(), outputs)
    assert torch.isfinite(slope).all() and (slope != 0).any()


def test_cross_entropy_with_an_impossible_class():
    logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    value = soft_cross_entropy(logits, torch.tensor([0.5, 0.5, 0.0]))
    value.backward()
    assert abs(value.item() - math.log(2)) < 1e-6 and torch.isfinite(logits.grad).all()
    assert soft_cross_entropy(torch.tensor([0.0, -math.inf]), torch.tensor([0.5, 0.5])) == math.inf


def test_descending_the_loss_finds_the_average():
    points, rooms = (v.float() for v in spots(9))
    points, one_room = points / rooms * 2 + 2, torch.tensor([6.0, 6.0])
    for kind in CODES.values():
        code = kind(CellGrid((3, 3)))
        labels = code.encode(points, one_room)
        outputs = torch.zeros(code.n_outputs, requires_grad=True)
        optimizer = torch.optim.LBFGS([outputs], lr=0.5, max_iter=400, tolerance_grad=1e-9,
                                      tolerance_change=1e-12)
        def closure():
            optimizer.zero_grad()
            loss = code.loss(outputs, labels).mean()
            loss.backward()
            return loss
        optimizer.step(closure)
        best, found = code.average(labels), code.activate(outputs.detach())
        torch.testing.assert_close(code.mass(found), code.mass(best), rtol=0, atol=5e-3)
        torch.testing.assert_close(code.locate(found, one_room), code.locate(best, one_room),
                                   rtol=0, atol=2e-2)


def test_the_refined_grid_averages_offsets_within_a_cell():
    code = RefinedGrid(CellGrid((2,)))
    label = code.average(code.encode(torch.tensor([[0.2], [0.6], [1.5], [0.1]]),
                                     torch.tensor([2.0])))
    torch.testing.assert_close(label, torch.tensor([0.75, 0.3, 0.25, 0.5]))


# --- decoding -------------------------------------------------------------------------------------

def brute(mass, window, wraps):
    "Equation (10) with loops for rows without ties."
    n, k = len(mass), int(np.argmax(mass))
    near = {j: (mass[(k + j) % n] if wraps or 0 <= k + j < n else 0.0)
               for j in range(-(window // 2), window // 2 + 1)}
    if window == 2: near = {0: near[0], **({1: near[1]} if near[1] > near[-1] else {-1: near[-1]})}
    return k + sum(j * m for j, m in near.items()) / sum(near.values())


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("window", [2, 3, 5, 7])
def test_decoding_against_loops(window, wraps):
    mass = torch.rand(300, 9, generator=seeded(window), dtype=torch.float64)
    np.testing.assert_allclose(adjacent_decoding(mass, window, wraps),
                               [brute(row, window, wraps) for row in mass.numpy()], rtol=1e-12,
                               atol=1e-13)
    torch.testing.assert_close(adjacent_decoding(7 * mass, window, wraps),
                               adjacent_decoding(mass, window, wraps))


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("mass, middle",
                         [([1, 2, 1, 0, 0], 1.0), ([1, 4, 4, 1, 0], 1.5), ([2, 2, 0, 0, 0], 0.5),
                          ([0, 0, 0, 3, 3], 3.5), ([0, 0, 0, 0, 1], 4.0)])
def test_symmetric_labels_decode_to_their_middle(window, mass, middle):
    row = torch.tensor(mass, dtype=torch.float64)
    assert adjacent_decoding(row, window).item() == pytest.approx(middle)
    assert adjacent_decoding(row.flip(0), window).item() == pytest.approx(4 - middle)


def test_ties_across_the_seam():
    ends = torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0, 0.5])
    for window in (2, 3, 5):
        assert (abs(math.remainder(adjacent_decoding(ends, window, wraps=True).item() + 0.5, 6))
                < 1e-6)
        # on a line the ends are no neighbours: the first peak counts
        assert adjacent_decoding(ends, window).item() == 0
    wide = torch.tensor([0.4, 0.1, 0.0, 0.0, 0.1, 0.4])
    for turn in range(6):
        turned = adjacent_decoding(wide.roll(turn), 3, wraps=True).item()
        assert abs(math.remainder(turned + 0.5 - turn, 6)) < 1e-6


def test_decoding_is_differentiable():
    mass = torch.rand(4, 25, generator=seeded(8), dtype=torch.float64).requires_grad_()
    room = torch.tensor([3.0, 5.0], dtype=torch.float64)
    for window in (2, 3, 5):
        code = UnbiasedLabel(CellGrid((4, 4)), window)
        assert torch.autograd.gradcheck(lambda m: code.locate(m, room), (mass,), atol=1e-6)


def test_mean_labels_of_a_gaussian():
    mean, sigma = (torch.tensor([10.0, 10.3, 9.6], dtype=torch.float64),
                   torch.tensor([[0.01], [0.7], [2.0]], dtype=torch.float64))
    label = gaussian_label(mean, sigma, 21)
    assert label.shape == (3, 3, 21)
    x = np.linspace(-6, 6, 40_001)
    for row, s in zip(label, sigma[:, 0].tolist()):
        for masses, m in zip(row, mean.tolist()):
            hats = np.maximum(0, 1 - np.abs(m + s * x[:, None] - np.arange(21)))
            np.testing.assert_allclose(masses, np.trapezoid(hats * stats.norm.pdf(x)[:, None], x,
                                                            axis=0), atol=1e-6)
    assert adjacent_bias(torch.tensor(0.3).double(), torch.tensor(1.5).double(), 3) < -0.1
    assert abs(adjacent_bias(torch.tensor(0.3).double(), torch.tensor(1.5).double(), 21)) < 1e-6
    torch.testing.assert_close(adjacent_bias(torch.tensor([-0.3, 0.3]).double(), torch.tensor(1.5)
                                             .double(), 3).sum(), torch.tensor(0.0).double())


# --- floors and accuracy --------------------------------------------------------------------------

def test_the_floor_is_what_one_hot_and_the_heat_map_miss():
    rooms = torch.tensor([7.0, 4.0], dtype=torch.float64)
    points = torch.rand(200_000, 2, generator=seeded(9), dtype=torch.float64) * rooms
    expected = rectangle_floor(rooms[0] / 5, rooms[1] / 3)
    for kind in (OneHot, HeatMap):
        code = kind(CellGrid((5, 3)))
        error = torch.linalg.vector_norm(code.locate(code.encode(points, rooms), rooms) - points,
                                         dim=-1).mean()
        assert abs(error / expected - 1) < 0.004
    torch.testing.assert_close(rectangle_floor(torch.tensor(2.0), torch.tensor([1.0, 3.0])),
                               rectangle_floor(torch.tensor([1.0, 3.0]), torch.tensor(2.0)))


def test_accuracy_by_hand():
    room = torch.tensor([6.0, 6.0])
    truth, found = torch.tensor([[2.4, 2.4], [2.6, 2.6],
                                 [2.9, 1.0]]), torch.tensor([[2.6, 2.6], [2.9, 2.9], [3.1, 1.0]])
    # the third crosses the border at 3
    assert class_accuracy(OneHot(GRID), found, truth, room).item() == pytest.approx(2 / 3)
    # the first crosses 2.5, the third does not cross
    assert class_accuracy(UnbiasedLabel(GRID), found, truth, room).item() == pytest.approx(2 / 3)
    assert class_accuracy(UnbiasedLabel(GRID), torch.stack([found, truth]), truth,
                          room).tolist() == pytest.approx([2 / 3, 1])
    ring, full = CellGrid((4,), circular=(0,)), torch.tensor([4.0])
    near, far = torch.tensor([[-0.4], [3.7], [1.6]]), torch.tensor([[0.4], [0.1], [2.6]])
    assert class_accuracy(UnbiasedLabel(ring), near, far, full).item() == pytest.approx(2 / 3)
    assert class_accuracy(OneHot(ring), near, far, full).item() == 0.0


@by_code
def test_walls_belong_to_the_last_class(kind):
    code = kind(GRID)
    last = code.classes(ROOM, ROOM)
    assert (last.tolist() == [n - 1 for n in code.shape]
            and code.classes(0 * ROOM, ROOM).tolist() == [0, 0])
    assert class_accuracy(code, code.locate(code.encode(ROOM[None], ROOM), ROOM), ROOM[None],
                          ROOM) == 1


# --- pictures -------------------------------------------------------------------------------------

@by_code
def test_curves_show_the_label(kind):
    code, where = kind(CellGrid((6, 4))), torch.tensor([4.3, 2.1])
    curves = label_curves(code, where, ROOM)
    label = code.mass(code.encode(where, ROOM))
    squares = [np.array(c["points"]) for c in curves if c["color"] == "#0072B2"]
    areas = np.array([np.ptp(s[:, 0]) * np.ptp(s[:, 1]) for s in squares])
    np.testing.assert_allclose(areas / 0.9**2, label[label > 0.01], rtol=1e-4)  # cells of 1 m
    cross = np.concatenate([c["points"] for c in curves if c["color"] == "#000000"]).mean(0)
    np.testing.assert_allclose(cross, code.locate(code.encode(where, ROOM), ROOM), rtol=1e-5)
    assert Counter(c["color"] for c in curves)["#cccccc"] == 5 + 3
    stems = [np.abs(np.diff(c["points"], axis=0)).sum() for c in curves if c["color"] == "#E69F00"]
    assert sum(stems) == pytest.approx(2 * 0.9, rel=1e-5)  # each marginal has mass 1
    fig = plot_labels({"a": code}, where, ROOM)
    fig.canvas.draw()
    assert len(fig.axes[0].lines) == len(curves) + 1


# --- the paper's numbers --------------------------------------------------------------------------

def test_the_papers_tables_are_whole():
    file = load_settings().data / "papers" / "label_codes.csv"
    papers = read_papers(file)
    assert (len(papers) == 130
            and not papers.duplicated(["dataset", "code", "resolution", "metric"]).any())
    assert papers.groupby("dataset").size().to_dict() == {"l1": 10, "ad1": 37, "ad2": 37,
                                                          "adr1": 23, "adr2": 23}
    assert set(papers.code) == {"qe", *CODES} and set(papers.metric) == {"acc_percent", "mae_m"}
    cell = papers.set_index(["dataset", "code", "resolution", "metric"]).paper
    # the paper's own text: least MAE of ULD against that of one-hot
    for (dataset, gain) in (("ad1", 46.54), ("ad2", 33.56), ("adr1", 48.72), ("adr2", 47.19),
                            ("l1", 91.93)):
        best = [cell[dataset, code, :, "mae_m"].min() for code in ("uld", "one_hot")]
        assert 100 * (1 - best[0] / best[1]) == pytest.approx(gain, abs=0.01)
    assert all(len(row) == 6 for row in csv.reader(file.open(encoding="utf-8")))


# --- what is taken --------------------------------------------------------------------------------

@by_code
def test_lists_and_arrays_are_taken_like_tensors(kind):
    code, points, rooms = kind(GRID), *(v.float() for v in spots(5))
    label = code.encode(points, rooms)
    assert torch.equal(code.encode(points.tolist(), rooms.numpy()), label)
    assert torch.equal(code.locate(label.numpy(), rooms.tolist()), code.locate(label, rooms))
    assert torch.equal(code.classes(points.numpy(), rooms), code.classes(points, rooms))
    assert code.encode([1, 2], [6, 4]).dtype == torch.float32
    assert code.encode(points.double(), [10, 10]).dtype == torch.float64
    assert class_accuracy(code, points.tolist(), points.numpy(), [10, 10]) == 1


def test_single_numbers_are_taken():
    assert rectangle_floor(1, 1.0).item() == pytest.approx(0.38259786)
    assert adjacent_decoding([0, 0.7, 0.3]).item() == pytest.approx(1.3)
    assert CellGrid([3, 4.0]).cells == (3, 4)


# --- bad input ------------------------------------------------------------------------------------

ULD = UnbiasedLabel(GRID)
BAD = {
    "cells of zero": (lambda: CellGrid((0, 3)), r"cells=\(0, 3\): must be 1 to 3 positive"),
    "no cells": (lambda: CellGrid(()), "cells"),
    "four axes": (lambda: CellGrid((2, 2, 2, 2)), "cells"),
    "circular out of range": (lambda: CellGrid((4, 4), circular=(2,)),
                              r"circular=\(2,\): must be axes from 0 to 1"),
    "outside": (lambda: ULD.encode(torch.tensor([1.0, 4.1]), ROOM),
                r"positions: 1.025 of the extent on axis 1, must lie within"),
    "below": (lambda: ULD.encode(torch.tensor([-1e-6, 1.0]), ROOM), "positions: -1.66"),
    "not a number": (lambda: ULD.encode(torch.tensor([math.nan, 1.0]), ROOM),
                     r"positions: nan at index \[0\], must be finite"),
    "infinite room": (lambda: ULD.encode(torch.ones(2),
                                         torch.tensor([math.inf, 1.0])), "extent: inf"),
    "no room": (lambda: ULD.encode(torch.zeros(2), torch.tensor([0.0, 1.0])),
                "extent: 0 at index .0., must be positive"),
    "no room to decode": (lambda: ULD.decode(torch.zeros(49), torch.tensor([-1.0, 1.0])),
                          "extent: -1 at index .0., must be positive"),
    "axes": (lambda: ULD.encode(torch.ones(3), torch.ones(3)),
             r"positions: shape \(3,\), the last dimension must be 2"),
    "outputs": (lambda: ULD.decode(torch.zeros(48), ROOM),
                r"outputs: shape \(48,\), the last dimension must be 49"),
    "outputs of one-hot": (lambda: OneHot(GRID).decode(torch.zeros(49), ROOM), "must be 36"),
    "outputs of the refined grid": (lambda: RefinedGrid(GRID).decode(torch.zeros(36), ROOM),
                                    "must be 108"),
    "broken network": (lambda: ULD.decode(torch.full((49,), math.nan), ROOM),
                       "activated outputs: nan .*49 such values"),
    "broken refined grid": (lambda: RefinedGrid(GRID).decode(torch.full((108,), math.nan), ROOM),
                            "must be finite"),
    "no mass": (lambda: ULD.locate(torch.zeros(49), ROOM),
                "mass: must be positive somewhere in every row"),
    "negative mass": (lambda: adjacent_decoding(torch.tensor([1.0, -0.1])), "mass"),
    "window of 4": (lambda: UnbiasedLabel(GRID, 4), "window=4: must be 2 or an odd number"),
    "window of 1": (lambda: adjacent_decoding(torch.ones(3), 1), "window=1"),
    "small circle": (lambda: UnbiasedLabel(CellGrid((2, 8), circular=(0,))),
                     "window=3: a circle of 2 classes is too small"),
    "small circle, window of 2": (lambda: UnbiasedLabel(CellGrid((2,), circular=(0,)), 2),
                                  "too small"),
    "wide window": (lambda: adjacent_decoding(torch.ones(4), 5, wraps=True), "a circle of 4"),
    "sigma": (lambda: HeatMap(GRID, 0.0), "sigma=0.0: must be positive"),
    "sigma of a posterior": (lambda: gaussian_label(torch.zeros(1), torch.zeros(1), 3),
                             "sigma: 0 at index .0., must be positive"),
    "marginals": (lambda: marginals(torch.ones(12), (3, 3)),
                  r"joint: shape .12,., the last dimension must be 9"),
    "width": (lambda: rectangle_floor(torch.tensor(-1.0), torch.tensor(1.0)),
              "width: -1 .*must be positive"),
    "sigma that vanishes": (lambda: HeatMap(GRID, 0.005),
                            r"sigma=0.005: must be at least 0.0093 with \(6, 6\) cells"),
    "posterior without end": (lambda: gaussian_label(torch.zeros(1), torch.tensor([math.inf]), 3),
                              "sigma: inf at index .0., must be finite"),
    "posterior nowhere": (lambda: gaussian_label(torch.tensor([math.nan]), torch.ones(1), 3),
                          "mean: nan at index .0., must be finite"),
    "no estimates": (lambda: class_accuracy(ULD, torch.ones(0, 2), torch.ones(0, 2), ROOM),
                     "estimates: there are none"),
    "estimate outside": (lambda: class_accuracy(ULD, torch.full((1, 2), 7.0), torch.ones(1, 2),
                                                ROOM), "positions: 1.16667 of the extent"),
}


@pytest.mark.parametrize("call, told", BAD.values(), ids=BAD)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told): call()


UNCHECKED = """
import torch
from ssl_nb.labels.label_codes import *
for code in [kind(CellGrid((6, 6))) for kind in CODES.values()]:
    whole, one = torch.zeros(4, code.n_outputs), torch.zeros(4, 1)
    for outputs, target, name in ((one, whole, "outputs"), (whole, one, "target")):
        told = f"{name}: shape (4, 1), the last dimension must be {code.n_outputs}"
        try: code.loss(outputs, target)
        except ValueError as e: assert str(e) == told, e
        else: raise AssertionError(type(code).__name__)
try: UnbiasedLabel(CellGrid((6, 6)), 3.0)
except ValueError as e: assert "window=3.0" in str(e)
else: raise AssertionError("window")
"""

def test_what_would_be_broadcast_is_refused_without_type_checks_too():
    subprocess.run([sys.executable, "-c", UNCHECKED], check=True)


@pytest.mark.parametrize("cells, least",
                         [((6, 6), 0.00932), ((1, 1), 0.0560), ((2, 16, 5), 0.02143)])
def test_the_narrowest_heat_map_still_says_something(cells, least):
    # least: half a cell's diagonal / sqrt(160), worked out by hand
    code = HeatMap(CellGrid(cells), least * 1.001)
    with pytest.raises(ValueError, match="sigma"): HeatMap(CellGrid(cells), least * 0.99)
    corners = torch.tensor(list(itertools.product((0.0, 0.5, 1.0), repeat=len(cells))))
    assert (code.encode(corners, torch.ones(len(cells))).amax(-1) > 0).all()
