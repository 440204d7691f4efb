"""Figures draw the data they were given: nothing lost, pairs joined, wraps broken, silence shaded,
power where it belongs."""
import io, math

import numpy as np
import pytest
import soundfile
import torch
from matplotlib import pyplot as plt
from ssl_nb.acoustics.geometry import to_direction
from ssl_nb.plots import (DragRoom, new_figure, place_legend, play, plot_angles, plot_errors,
                          plot_lines, plot_map, plot_positions_3d, plot_power_map, plot_room,
                          plot_trajectory)

SIZE, MICS = [6.0, 5.0, 3.0], torch.tensor([[0.0, 1, 1], [6, 2, 1]])
TRUTH = torch.tensor([[1.0, 1, 1], [2, 3, 1.5], [5, 4, 2]])
T = torch.arange(3.0)


@pytest.fixture(autouse=True)
def nothing_left_open():
    yield
    assert plt.get_fignums() == []


def rendered(fig):
    fig.canvas.draw()  # labels and layout can fail only here
    return fig


def test_positions_are_joined_in_order_in_every_type():
    estimates = TRUTH.flip(0) + 0.1
    for kind in (lambda x: x, lambda x: x.double().numpy(), lambda x: x.tolist()):
        ax = rendered(plot_positions_3d(kind(torch.tensor(SIZE)), kind(MICS), kind(TRUTH),
                                        kind(estimates))).axes[0]
        data = {line.get_label(): np.stack(line.get_data_3d(), -1) for line in ax.lines}
        np.testing.assert_allclose(data["microphone"], MICS)
        np.testing.assert_allclose(data["talker"], TRUTH)
        np.testing.assert_allclose(data["estimate"], estimates, rtol=1e-6)
        joins = np.stack(ax.lines[2].get_data_3d(), -1).reshape(3, 3, 3)
        np.testing.assert_allclose(joins[:, 0], TRUTH)
        np.testing.assert_allclose(joins[:, 1], estimates, rtol=1e-6)
        assert np.isnan(joins[:, 2]).all()
        # a box has 12 edges, each along one axis
        edges = np.stack(ax.lines[0].get_data_3d(), -1).reshape(12, 3, 3)
        assert ((np.abs(edges[:, 0] - edges[:, 1]) > 0).sum(-1) == 1).all()
        assert (sorted(np.linalg.norm(edges[:, 0] - edges[:, 1], axis=-1))
                == [3.0] * 4 + [5.0] * 4 + [6.0] * 4)


def legend_of(fig): return [t.get_text() for t in fig.axes[0].get_legend().get_texts()]


def test_a_top_view_tells_heights_and_numbers():
    mics = [[0, 0, 1.2], [6, 0, 1.2], [3, 5, 2.0], [3, 2, 0], [3, 2, 3.0]]
    fig = rendered(plot_room(SIZE, mics, TRUTH[:1], {"found": TRUTH[1]}))
    assert legend_of(fig) == ["microphone, 1.20 to 2.00 m high", "microphone on the floor",
                              "microphone on the ceiling", "talker, 1.00 m high", "found"]
    places = {line.get_label(): line.get_xydata().tolist() for line in fig.axes[0].lines}
    assert places["microphone on the floor"] == places["microphone on the ceiling"] == [[3, 2]]
    # those above one another share a label
    assert sorted(t.get_text() for t in fig.axes[0].texts) == ["0", "1", "2", "3, 4"]
    flat = rendered(plot_room([4, 3], [[1, 1], [1.05, 1]], [2, 2]))
    assert legend_of(flat) == ["microphone", "talker"] and not flat.axes[0].texts  # too close


def test_a_single_line_keeps_its_label():
    alone = lambda **k: plot_lines([1, 2], {"falling": [2, 1]}, "time (s)", "error (m)", **k)
    assert alone().axes[0].get_title() == "falling" and alone().axes[0].get_legend() is None
    titled = alone(title="One night")
    assert titled.axes[0].get_title() == "One night" and legend_of(titled) == ["falling"]
    assert plot_lines([1], {"": [1]}, "x", "y", title="no name").axes[0].get_legend() is None


def test_a_legend_covers_no_line():
    fig, ax = new_figure()
    for k in range(60): ax.plot([0, 1], [k, k], label="line" if k == 0 else None)  # a full picture
    place_legend(ax)
    rendered(fig)
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1


def test_a_map_marks_what_it_is_told():
    fig = rendered(plot_map(np.ones((3, 4)), SIZE, "power", MICS, sources=TRUTH, estimates=[1, 2]))
    marks = {line.get_label(): line.get_xydata().tolist() for line in fig.axes[0].lines}
    assert marks["talker"] == TRUTH[:, :2].tolist() and marks["found"] == [[1, 2]]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["microphone", "talker", "found"]


def test_a_dragged_point_may_be_whole_and_an_error_is_seen():
    def update(mics, source):
        if source[0] > 4: raise ValueError("too far")
        return [{"points": torch.linalg.eigh(mics.T @ mics)[1].tolist()}], f"at {source.tolist()}"
    pad = DragRoom([5, 4], [[0, 0], [5, 0], [2, 4]], [2, 1], update)
    pad.source = [3, 2]  # a browser sends whole numbers for whole metres
    assert pad.note == "at [3.0, 2.0]" and pad.curves
    pad.mics = [[1, 0], [5, 0], [2, 4]]
    pad.source = [5, 2]
    assert pad.note == "ValueError: too far" and pad.curves == []
    pad.source = [1, 2]  # and it goes on
    assert pad.note == "at [1.0, 2.0]" and pad.curves
    with pytest.raises(ValueError, match="too far"): DragRoom([5, 4], [[0, 0]], [5, 1], update)


def heard(player): return soundfile.read(io.BytesIO(player.data))


def test_what_is_played_is_what_was_given():
    time = np.arange(8000) / 8000
    left = np.sin(2 * np.pi * 440 * time)
    sound, rate = heard(play(np.stack([left, 0.5 * left]), 8000))
    assert rate == 8000 and sound.shape == (8000, 2)
    levels = np.abs(sound[1000:7000]).max(0)
    np.testing.assert_allclose(levels, [0.7, 0.35], atol=0.05)  # one gain for both ears
    assert np.abs(np.fft.rfft(sound[:, 0])).argmax() == 440
    quiet, _ = heard(play(torch.from_numpy(0.1 * left), 8000, peak=None))
    np.testing.assert_allclose(np.abs(quiet).max(), 0.1, atol=0.02)
    assert not heard(play([0] * 800, 8000))[0].any()  # silence stays silence


def test_errors_are_all_counted_and_marked():
    errors = torch.tensor([0.0, 0.1, 0.2, 0.3, 4.4])
    ax = rendered(plot_errors(errors, "m", bins=7)).axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 5 and len(ax.patches) == 7
    marks = {line.get_label().split()[0]: line.get_xdata()[0] for line in ax.lines}
    assert marks == pytest.approx({"median": 0.2, "mean": 1.0}) and ax.get_xlabel() == "error (m)"
    x, y = rendered(plot_errors(errors, "deg", cumulative=True)).axes[0].lines[0].get_data()
    np.testing.assert_allclose(x, errors)
    np.testing.assert_allclose(y, [0.2, 0.4, 0.6, 0.8, 1.0])


def test_trajectory_errors_pauses_and_absent_estimates():
    estimates, active = TRUTH + torch.tensor([3.0, 4.0, 0.0]), torch.tensor([True, False, True])
    estimates[2] = torch.nan
    fig = rendered(plot_trajectory(T, TRUTH, estimates, SIZE, MICS, active))
    top, space, error = fig.axes
    np.testing.assert_allclose(error.lines[0].get_ydata(), [5, 5, np.nan])
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in error.patches] == [(0.5, 1.5)]
    shown = {line.get_label(): line.get_xydata() for line in top.lines}
    np.testing.assert_allclose(shown["talker"], TRUTH[:, :2])
    np.testing.assert_allclose(shown["in silence"], estimates[1:2, :2])
    np.testing.assert_allclose(np.stack(space.lines[1].get_data_3d(), -1), TRUTH)
    plain = rendered(plot_trajectory(T, TRUTH, TRUTH))
    assert (len(plain.axes[2].patches) == 0
            and [t.get_text() for t in plain.legends[0].get_texts()] == ["talker", "estimate"])


def test_angles_are_right_and_broken_at_the_wrap():
    azimuth = torch.tensor([170.0, 178.0, -174.0, -178.0, 176.0]).deg2rad()
    fig = rendered(plot_angles(torch.arange(5.0), to_direction(azimuth, 0.2 + 0 * azimuth),
                               2 * to_direction(azimuth, 0 * azimuth),
                               [True, True, False, False, True]))
    x, y = fig.axes[0].lines[0].get_data()
    np.testing.assert_allclose(y, [170, 178, np.nan, -174, -178, np.nan, 176], atol=1e-4)
    np.testing.assert_allclose(x, [0, 1, 2, 2, 3, 4, 4])
    np.testing.assert_allclose(fig.axes[0].lines[1].get_ydata(), [170, 178, -174, -178, 176],
                               atol=1e-4)
    np.testing.assert_allclose(fig.axes[1].lines[0].get_ydata(), math.degrees(0.2), rtol=1e-5)
    for ax in fig.axes:
        assert [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches] == [(1.5, 3.5)]


def test_angles_of_several_talkers_are_shaded_when_all_are_silent():
    directions = to_direction(torch.zeros(2, 4), torch.zeros(2, 4))
    active = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    found = torch.where(torch.tensor([True, False, True, True])[:, None], directions, torch.nan)
    fig = rendered(plot_angles(torch.arange(4.0), directions, found, active))
    assert len(fig.axes[0].lines) == 4 and [(p.get_x(), p.get_x() + p.get_width())
                                            for p in fig.axes[0].patches] == [(0.5, 2.5)]
    assert np.isnan(fig.axes[0].lines[2].get_ydata()[1])


def cells_of(fig):
    return np.asarray(rendered(fig).axes[0].collections[0].get_array()).reshape(90, 180)


@pytest.mark.parametrize("azimuth_deg, elevation_deg",
                         [(0, 0), (179, 10), (-179, -40), (90, 85), (-60, -88)])
@pytest.mark.parametrize("full_turn", [False, True])
def test_peak_of_the_map_lies_where_the_power_is(azimuth_deg, elevation_deg, full_turn):
    aim = to_direction(*torch.tensor([azimuth_deg, elevation_deg]).double().deg2rad())
    columns, rows = (torch.arange(0 if full_turn else -180, 360 if full_turn else 180, 3.0).double()
                     .deg2rad(), torch.arange(-90, 91, 3.0).double().deg2rad())
    index = torch.arange(5000).double()
    spiral = index * math.pi * (3 - 5**0.5), torch.asin(1 - (2 * index + 1) / 5000)
    power = lambda a, e: torch.exp(20 * (to_direction(a, e) @ aim - 1))
    for fig in (plot_power_map(power(columns, rows[:, None]), columns, rows, aim, aim),
                plot_power_map(power(*spiral), *spiral)):
        cells = cells_of(fig)
        row, column = np.unravel_index(cells.argmax(), cells.shape)
        peak = to_direction(*torch.tensor([2.0 * column - 179, 2.0 * row - 89]).double().deg2rad())
        assert math.degrees(math.acos(min(1.0, float(peak @ aim)))) < 3.5
        centre = to_direction(torch.arange(-179, 180, 2.0).double().deg2rad(),
                              torch.arange(-89, 90, 2.0).double().deg2rad()[:, None])
        # nearest direction, at most 2.5 degrees away
        assert np.abs(cells - torch.exp(20 * (centre @ aim - 1)).numpy()).max() < 0.2


def test_map_marks_truth_and_estimates_and_keeps_areas():
    fig = plot_power_map(torch.ones(19, 36), torch.arange(-180, 180, 10.0).deg2rad(),
                         torch.arange(-90, 91, 10.0).deg2rad(),
                         to_direction(torch.tensor([0.5, 1.0]), torch.tensor([0.1, 0.2])),
                         to_direction(torch.tensor(3.0), torch.tensor(-0.3)))
    ax = rendered(fig).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0.5, 0.1], [1.0, 0.2]], atol=1e-6)
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[3.0, -0.3]], atol=1e-6)
    on_paper = lambda a, e: ax.transProjection.transform([(a, e)])[0]
    def magnification(a, e, h=0.05):  # matplotlib solves for the projection to 0.001 only
        "Area on paper of a small patch, over its solid angle."
        return abs(np.linalg.det([on_paper(a + h, e) - on_paper(a - h, e),
                                  on_paper(a, e + h) - on_paper(a, e - h)])) / math.cos(e)
    for a, e in ((0.0, 1.0), (2.5, 0.3), (-2.0, -1.1)):
        assert magnification(a, e) == pytest.approx(magnification(0.0, 0.0), rel=0.02)


@pytest.mark.parametrize("call, words", [
    (lambda: plot_positions_3d([6.0, 5], MICS, TRUTH, TRUTH), "size: shape"),
    (lambda: plot_room(SIZE, [1.0, 2, 3, 4], TRUTH), "mics: shape"),
    (lambda: plot_room(SIZE, MICS * math.nan, TRUTH), "mics: nan"),
    (lambda: plot_map(np.ones((3, 4)), SIZE, "power", sources=TRUTH / 0), "sources: inf"),
    (lambda: play(torch.zeros(3, 100), 16000), "audio: shape"),
    (lambda: play([0.0], 16000), "audio: has 1 samples"),
    (lambda: play([0.0, math.nan], 16000), "audio: nan"),
    (lambda: play([0.0, 2.0], 16000, peak=None), "audio: peak 2"),
    (lambda: play([0.0, 1.0], 0), "fs=0"),
    (lambda: play(np.random.default_rng(0).standard_normal((2, 160_000)), 16000), "play less"),
    (lambda: plot_positions_3d(SIZE, MICS[:, :2], TRUTH, TRUTH), "mics: shape"),
    (lambda: plot_positions_3d(SIZE, MICS, TRUTH, TRUTH[:2]), "estimates: 2 rows, must be 3"),
    (lambda: plot_positions_3d(SIZE, MICS, TRUTH, TRUTH / 0), "estimates: inf"),
    (lambda: plot_errors([], "m"), "errors: 0 values"),
    (lambda: plot_errors([-1.0], "m"), "errors: 1 values"),
    (lambda: plot_errors([math.nan], "m"), "errors"),
    (lambda: plot_trajectory(T[:2], TRUTH, TRUTH), "times: shape"),
    (lambda: plot_trajectory(-T, TRUTH, TRUTH), "times"),
    (lambda: plot_trajectory(T, TRUTH, TRUTH[:1]), "estimates: 1 rows"),
    (lambda: plot_trajectory(T, TRUTH, TRUTH, active=[True]), "active: 1 frames"),
    (lambda: plot_angles(T, TRUTH, TRUTH[:2]), "estimates: 2 frames"),
    (lambda: plot_angles(T, TRUTH[:, :2], TRUTH), "truth: shape"),
    (lambda: plot_angles(T, TRUTH * math.nan, TRUTH), "truth: directions"),
    (lambda: plot_angles(T, 0 * TRUTH, TRUTH), "truth: .* is zero"),
    (lambda: plot_angles(T, TRUTH, 0 * TRUTH), "estimates: .* is zero"),
    (lambda: plot_power_map(torch.ones(2), torch.zeros(2), torch.zeros(2), truth=[0.0, 0, 0]),
     "truth: .* is zero"),
    (lambda: DragRoom([5, 4], [[0, 0, 0]], [1, 1], lambda m, s: ([], "")), "mics: shape"),
    (lambda: plot_power_map(torch.ones(3, 4), torch.zeros(3), torch.zeros(4)), "power: shape"),
    (lambda: plot_power_map(torch.ones(5), torch.zeros(4), torch.zeros(5)), "power: shape"),
    (lambda: plot_power_map(torch.ones(2), torch.zeros(2), torch.tensor([0.0, 45.0])), "radians"),
    (lambda: plot_power_map(torch.tensor([math.nan]), T[:1], T[:1]), "finite"),
    (lambda: plot_power_map(torch.ones(2), torch.zeros(2), torch.zeros(2), truth=[1.0, 0.0]),
     "truth: shape"),
])
def test_bad_calls_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words): call()
