"""Localizers in label codes: what is refused, what must not move the answer, assignments against
SciPy, recipes and recordings."""
import copy, itertools, math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.signal import get_window
from ssl_nb.workshop import recordings
from ssl_nb.workshop.recordings import ADHOC40_LOUDSPEAKERS
from ssl_nb.workshop.scene_bank import SceneBank
from ssl_nb.acoustics.geometry import distances
from ssl_nb.labels.adhoc_arrays import (
    BANDS, SIZES, AdhocLocalizer, AdhocRecordings, AdhocSplitLocalizer, GridLocalizer, ad1, ad2,
    adr1, adr2, answers, best_order, l1, label_loss, line_arrays, locate_all, located, node_example,
    node_features, node_weights, plot_outputs, short_spectra, smooth_rows, train_localizer, turned)
from ssl_nb.labels.label_codes import CODES, CellGrid, OneHot, RefinedGrid, UnbiasedLabel

CELLS = CellGrid((4, 4))
ULD = UnbiasedLabel(CELLS)


def generator(seed=0): return torch.Generator().manual_seed(seed)
def noise(*shape, seed=0): return torch.randn(*shape, generator=generator(seed))
def places(*batch, nodes=6, code=ULD, seed=0):
    return code.encode(4 * torch.rand(*batch, nodes, 2, generator=generator(seed)),
                       torch.tensor([4.0, 4.0]))


def nodes_batch(n=3, nodes=6, talkers=1, seed=0):
    "Random node examples of rooms of several sizes."
    g = generator(seed)
    size = 4 + 4 * torch.rand(n, 3, generator=g)
    somewhere = lambda count: torch.rand(n, count, 3, generator=g) * size[:, None]
    return {"features": torch.randn(n, nodes, 2, BANDS, generator=g), "mics": somewhere(nodes),
            "sources": somewhere(talkers), "size": size}


def examples(**options):
    batch = nodes_batch(**options)
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["size"]))]


# --- recipes --------------------------------------------------------------------------------------

def test_recipes_hold_the_papers_figures():
    for spec, talkers in ((ad1(), 1), (ad2(), 2)):
        assert (spec.size == ((4, 10), (4, 10), (4.2, 4.2)) and spec.t60 == (0.2, 1.2)
                and spec.snr_db == (0, 50) and spec.n_mics == 30 and spec.seconds == 2
                and spec.n_sources == talkers)
        assert (spec.mic_height == (0.9, 0.9) and spec.source_height == (0.95, 0.95)
                and spec.margin == 0 and spec.min_distance == 0.1)
    for split in ("valid", "test"):
        assert ad1(split).snr_db == ad2(split).snr_db == (10, 20) and ad1(split).speech == split
    assert (ad1("my/voices").snr_db == (0, 50)
            and ad1("my/voices", snr_db=(10, 20)).snr_db == (10, 20))  # a folder counts as training
    spec = l1("test")
    assert (round(spec.seconds * spec.fs) == 2560 and spec.noise == "none"
            and spec.method == "anechoic" and spec.source_height == (0.95, 0.95)
            and spec.speech == "test" and spec.size[2] == (4.2, 4.2))
    assert (SIZES["l1"] == (100_000, 5_000, 5_000) and SIZES["ad2"] == (18_000, 1_800, 1_800)
            and SIZES["adr2"] == (18_000, 1_800, 2_468))
    assert ad2(n_sources=3, seconds=1.0).n_sources == 3 and l1(noise="sensor").noise == "sensor"


def test_line_arrays_stand_on_two_walls():
    mics = line_arrays(5.0, 0.3)
    left, bottom = mics[:4], mics[4:]
    assert ((left[:, 0] == 0).all() and (bottom[:, 1] == 0).all()
            and torch.allclose(mics[:, 2], torch.tensor(0.9)))
    for line in (left[:, 1], bottom[:, 0]):
        assert (torch.allclose(line.diff(), torch.tensor(0.3))
                and abs(float(line.mean()) - 2.5) < 1e-6)
    torch.testing.assert_close(torch.tensor(l1().mics), line_arrays())


def test_l1_scenes_are_what_the_recipe_says():
    scene = SceneBank(l1("valid"), 40, 0, per_room=40, fresh=False)
    at = torch.stack([scene[k]["sources"][0] for k in range(40)])
    assert (scene[0]["audio"].shape == (8, 2560) and (at[:, 2] == 0.95).all()
            and at[:, :2].min() < 1 and at[:, :2].max() > 5 and math.isinf(scene[0]["snr_db"]))


# --- bad input ------------------------------------------------------------------------------------

net = lambda **o: AdhocLocalizer(ULD, width=16, heads=2, **o)

@pytest.mark.parametrize("make, words", [
    (lambda: line_arrays(1.0, 0.4), "spacing=0.4 m"),
    (lambda: line_arrays(6.0, 0.0), "spacing=0.0 m"), (lambda: l1(seconds=0.0), "seconds=0.0"),
    (lambda: ad1(n_mics=0), "n_mics=0"),
    (lambda: short_spectra(noise(3, 511)), "audio: has 511 samples, needs at least 512"),
    (lambda: node_features(noise(3, 2303)), "audio: has 2303 samples, needs at least 2304"),
    (lambda: node_features(torch.full((2, 2304), math.nan)), "audio: nan .*4608 such values"),
    (lambda: GridLocalizer(0), "n_outputs=0"), (lambda: GridLocalizer(4, arrays=0), "arrays=0"),
    (lambda: GridLocalizer(4, mics=1), "mics=1: must be a whole number, at least 2"),
    (lambda: GridLocalizer(4, width=0), "width=0"),
    (lambda: GridLocalizer(4, hidden=0), "hidden=0"),
    (lambda: GridLocalizer(4).eval()(noise(7, 2560)), "audio: 7 microphones, needs 8"),
    (lambda: GridLocalizer(4).eval()(noise(8, 500)), "audio: has 500 samples"),
    (lambda: GridLocalizer(4).eval()(noise(8, 2560) * math.inf), "must be finite"),
    (lambda: AdhocLocalizer(ULD, width=0), "width=0"),
    (lambda: AdhocLocalizer(ULD, heads=0), "heads=0"),
    (lambda: AdhocLocalizer(ULD, width=20, heads=4), "multiple of 2 x heads = 8"),
    (lambda: AdhocSplitLocalizer(ULD, talkers=0), "talkers=0"),
    (lambda: net()(noise(2, 6, 3, 31), places(2)), r"features: shape \(2, 6, 3, 31\)"),
    (lambda: net()(noise(2, 6, 3, BANDS),
                   places(2, code=OneHot(CELLS))), r"places: shape \(2, 6, 16\)"),
    (lambda: net()(noise(2, 5, 3, BANDS), places(2)), r"places: shape \(2, 6, 25\), must be one "
     r"per node"), (lambda: net()(noise(2, 6, 3, BANDS), places(2),
                                torch.ones(2, 5, dtype=torch.bool)), r"present: shape \(2, 5\)"),
    (lambda: net()(noise(2, 6, 3, BANDS), places(2), torch.tensor([6 * [True], 6 * [False]])),
     "present: a recording without any node"),
    (lambda: net()(noise(2, 6, 3, BANDS) * math.nan, places(2)), "must be finite"),
    (lambda: best_order(noise(2, 3)), "must end in two equal sizes"),
    (lambda: locate_all(net(), ULD, []), "data: there are no recordings"),
    (lambda: node_weights(AdhocSplitLocalizer(ULD, width=16, heads=2), noise(2, 6, 3, BANDS),
                          places(2)), "needs an AdhocLocalizer"),
    (lambda: answers(net(), ULD, nodes_batch(), 7), "nodes=7: must be from 1 to the 6"),
    (lambda: answers(net(), ULD, nodes_batch(), 0), "nodes=0"),
])
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words): make()


# --- spectra --------------------------------------------------------------------------------------

def test_spectra_are_numpys():
    sound = noise(3, 1300).double()
    windows = np.lib.stride_tricks.sliding_window_view(sound.numpy(), 512, axis=-1)[:, ::256]
    # 4 whole windows, nothing added at the ends
    expected = np.fft.rfft(windows * get_window("hann", 512))[..., 1:].swapaxes(1, 2)
    np.testing.assert_allclose(torch.view_as_complex(short_spectra(sound)).numpy(), expected,
                               atol=1e-10)


# --- the net for fixed arrays ---------------------------------------------------------------------

@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2)])
def test_grid_localizer_any_batch(batch):
    torch.manual_seed(0)
    model, x = GridLocalizer(9, width=8, hidden=16).eval(), noise(*batch, 8, 2560)
    with torch.no_grad():
        y, alone = model(x), torch.stack([model(one) for one in x.reshape(-1, 8, 2560)])
    assert y.shape == (*batch, 9)
    torch.testing.assert_close(y.reshape(-1, 9), alone, rtol=1e-4, atol=1e-5)


def test_phases_are_those_of_the_delay():
    """A pure circular delay within one window: equation (1) against exp(-2 pi i f tau), and the
    level against its closed form."""
    delay, gain = 3, 0.5
    sound = noise(2600)
    audio = torch.stack([gain * sound[20 - delay:20 - delay + 2560], *7 * [sound[20:2580]]])
    phases, levels = GridLocalizer(4).features(audio[None])
    found = torch.complex(phases[0, 0], phases[0, 12])  # microphones 0 and 1
    expected = torch.exp(-2j * math.pi * torch.arange(1, 257) / 512 * delay)
    assert (((found / expected).angle().abs() < 0.3).float().mean() > 0.95
            and float((found / expected).angle().mean().abs()) < 0.02)
    torch.testing.assert_close(phases[0, :12].square() + phases[0, 12:].square(),
                               torch.ones(12, 256), rtol=1e-3, atol=1e-3)
    # all other pairs hear the same
    assert torch.allclose(phases[0, 3:12], torch.ones(9, 256), atol=1e-4)
    assert (abs(float(levels[0, 0] - levels[0, 1]) - 2 * math.log(gain)) < 0.02
            and abs(float(levels.sum())) < 1e-4)


def test_pairs_stay_within_a_line():
    pairs = GridLocalizer(4, arrays=2, mics=4).pairs.T.tolist()
    assert pairs == [list(p) for a in (0, 4) for p in itertools.combinations(range(a, a + 4), 2)]


def test_loudness_does_not_move_the_grid_localizer():
    torch.manual_seed(0)
    model, x = GridLocalizer(9).eval(), noise(2, 8, 2560)
    with torch.no_grad(): torch.testing.assert_close(model(30 * x), model(x), rtol=1e-3, atol=1e-4)
    with torch.no_grad(): assert model(torch.zeros(8, 2560)).isfinite().all()


# --- the nets for scattered nodes -----------------------------------------------------------------

NETS = [AdhocLocalizer, AdhocSplitLocalizer]

@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2)])
def test_adhoc_any_batch_and_any_number_of_nodes(kind, batch):
    torch.manual_seed(0)
    model = kind(ULD, width=16, heads=2).eval()
    for count in (1, 6, 11):
        x, p = noise(*batch, count, 3, BANDS), places(*batch, nodes=count)
        with torch.no_grad(): y = model(x, p)
        assert (y.shape == (*batch, *((2,) if kind is AdhocSplitLocalizer else ()), 25)
                and y.isfinite().all())
        with torch.no_grad():
            alone = torch.stack([model(a, b) for a, b in zip(x.reshape(-1, count, 3, BANDS),
                                                             p.reshape(-1, count, 25))])
        torch.testing.assert_close(y.reshape(alone.shape), alone, rtol=1e-4, atol=1e-5)


def test_the_direct_way_begins_with_the_place_of_the_node():
    """One node, nothing from the other layers: the refined grid's offsets must not start in the
    flat part of the logistic function."""
    # cells of 1 m
    code, extent, place = RefinedGrid(CELLS), torch.tensor([4.0, 4.0]), torch.tensor([[2.1, 1.9]])
    model = AdhocLocalizer(code, width=8, heads=1).eval()
    torch.nn.init.zeros_(model.head[-1].weight), torch.nn.init.zeros_(model.head[-1].bias)
    with torch.no_grad():
        found = code.decode(model(noise(1, 3, BANDS), code.encode(place, extent)), extent)
    assert (found - place[0]).norm() < 0.2


def test_as_many_answers_as_talkers():
    for count in (1, 3):
        model = AdhocSplitLocalizer(ULD, width=8, heads=1, talkers=count).eval()
        with torch.no_grad(): answers = model(noise(2, 6, 3, BANDS), places(2))
        assert (answers.shape == (2, count, 25)
                and len({round(float(a), 5) for a in answers[0, :, 0]}) == count)


@pytest.mark.parametrize("kind", NETS)
@given(order=st.permutations(range(6)), gone=st.sets(st.integers(0, 5), max_size=5),
       shift=st.floats(-5, 5))
@settings(deadline=None, max_examples=15)
def test_order_missing_nodes_and_loudness_do_not_matter(kind, order, gone, shift):
    torch.manual_seed(0)
    model, x, p = kind(ULD, width=16, heads=2).eval(), noise(2, 6, 3, BANDS), places(2)
    stay = [k for k in range(6) if k not in gone]
    present = torch.tensor([k in stay for k in order]).expand(2, 6)
    damaged = x[:, list(order)].clone()
    damaged[~present] = math.nan
    with torch.no_grad():
        torch.testing.assert_close(model(damaged + shift, p[:, list(order)], present),
                                   model(x[:, stay], p[:, stay]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", NETS)
def test_every_node_and_parameter_matters(kind):
    torch.manual_seed(0)
    model, x, p = kind(ULD, width=16,
                       heads=2), noise(2, 6, 3, BANDS).requires_grad_(), places(2).requires_grad_()
    model(x, p).square().sum().backward()
    assert (x.grad.abs().sum((0, 2, 3)) > 0).all() and (p.grad.abs().sum((0, 2)) > 0).all()
    still = {name for name, q in model.named_parameters()
             if q.grad is None or not q.grad.abs().sum() > 0}
    assert still <= {"score.bias"}, still  # one number for all nodes cancels in the softmax


def test_places_go_straight_to_the_outputs():
    """With dense layers that say nothing, the outputs are 10 times the mean of the places, equation
    (7)."""
    torch.manual_seed(0)
    model, x, p = AdhocLocalizer(ULD, width=16, heads=2).eval(), noise(2, 6, 3, BANDS), places(2)
    with torch.no_grad():
        model.head[-1].weight.zero_(), model.head[-1].bias.zero_(), model.pointed.bias.zero_()
        torch.testing.assert_close(model(x, p), 10 * (node_weights(model, x, p)[..., None] * p)
                                                .sum(1), rtol=1e-4, atol=1e-5)


def test_node_weights_are_those_of_the_fusion():
    torch.manual_seed(0)
    model, x, p = AdhocLocalizer(ULD, width=16, heads=2).eval(), noise(2, 6, 3, BANDS), places(2)
    w = node_weights(model, x, p)
    torch.testing.assert_close(w.sum(-1), torch.ones(2))
    assert (w > 0).all() and w.std() > 0
    with torch.no_grad(): model.score.weight.zero_()
    torch.testing.assert_close(node_weights(model, x, p), torch.full((2, 6), 1 / 6))


@pytest.mark.parametrize("name", CODES)
def test_smooth_rows_put_neighbours_together(name):
    code = CODES[name](CellGrid((8, 8)))
    rows = smooth_rows(code, 8000)
    assert (rows.shape == (code.n_outputs, 8000) and torch.equal(rows, smooth_rows(code, 8000))
            and not torch.equal(rows, smooth_rows(code, 8000, seed=1)))
    each = code.n_outputs // math.prod(code.shape)
    cells = rows[::each].unflatten(0, code.shape)
    for axis in (0, 1):
        step = (cells * cells.roll(-1, axis)).mean(-1).narrow(axis, 0, code.shape[axis] - 1)
        assert (step - 0.5 * math.exp(-32 / 64)).abs().max() < 0.05
    if each > 1: assert torch.equal(rows[0], rows[1])


def test_smooth_rows_know_circles_and_single_axes():
    code = UnbiasedLabel(CellGrid((16, 4), circular=(0,)))
    cells = smooth_rows(code, 20_000).unflatten(0, code.shape)
    around = [float((cells[0, 0] * cells[k % 16, 0]).mean()) for k in (-3, -1, 1, 3)]
    chord = [math.sin(math.pi * k / 16) / math.pi for k in (3, 1, 1, 3)]  # on a circle of length 1
    assert np.allclose(around, [0.5 * math.exp(-32 * c**2) for c in chord], atol=0.02)
    line = smooth_rows(OneHot(CellGrid((8,))), 20_000)
    assert (line.shape == (8, 20_000)
            and abs(float((line[3] * line[4]).mean()) - 0.5 * math.exp(-0.5)) < 0.02)


def test_locating_does_not_depend_on_the_batch_and_leaves_the_net_alone():
    torch.manual_seed(0)
    data, net = SceneBank(l1("test"), 10, 1, per_room=10,
                          fresh=False), GridLocalizer(25, width=8, hidden=16)  # in training mode
    before = {k: v.clone() for k, v in net.state_dict().items()}
    outputs = [locate_all(net, ULD, data, batch=n)["outputs"] for n in (1, 4, 10)]
    for other in outputs[1:]: torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_levels_follow_the_inverse_square_law():
    tone = noise(2304)
    found = node_features(torch.stack([tone, tone / 2, tone / 4]))
    assert found.shape == (3, 1, BANDS)
    torch.testing.assert_close(found[0] - found[1], torch.full((1, BANDS), 2 * math.log(2)),
                               rtol=1e-4, atol=1e-4)
    # white noise of power 1 through a Hann window: the sum of its squares
    assert abs(float(found[0].exp().mean()) / 192 - 1) < 0.15
    assert node_features(torch.zeros(2, 2304)).isfinite().all()


def test_bands_are_in_order_of_frequency():
    t = torch.arange(2304) / 16000
    for band in (0, 5, 31):
        tone = torch.sin(2 * math.pi * (band + 0.5) * 250 * t)
        assert int(node_features(tone[None])[0, 0].argmax()) == band


# --- assignments ----------------------------------------------------------------------------------

@given(n=st.integers(1, 4), seed=st.integers(0, 10_000))
@settings(deadline=None, max_examples=40)
def test_best_order_is_scipys(n, seed):
    costs = torch.rand(3, n, n, generator=generator(seed))
    least, order = best_order(costs)
    for k in range(3):
        rows, columns = linear_sum_assignment(costs[k].numpy())
        assert abs(float(least[k]) - costs[k].numpy()[rows, columns].mean()) < 1e-6
        assert order[k].tolist() == [int(rows[list(columns).index(t)]) for t in range(n)]


@pytest.mark.parametrize("name", CODES)
def test_loss_and_metric_do_not_see_the_order_of_answers(name):
    code, extent = CODES[name](CELLS), torch.tensor([[4.0, 5.0], [6.0, 4.0]])
    at = torch.rand(2, 2, 2, generator=generator(1)) * extent[:, None]
    outputs = noise(2, 2, code.n_outputs, seed=2).requires_grad_()
    loss = label_loss(code, outputs, at, extent)
    torch.testing.assert_close(label_loss(code, outputs.flip(1), at, extent), loss)
    both = torch.stack([code.loss(outputs[:, list(order)], code.encode(at, extent[:, None]))
                        .mean(-1) for order in ((0, 1), (1, 0))])
    torch.testing.assert_close(loss, both.amin(0))
    assert torch.equal(located(code, outputs, at, extent),
                       located(code, outputs.flip(1), at, extent))
    loss.sum().backward()
    assert outputs.grad.isfinite().all()


def test_located_takes_the_smallest_total_error():
    extent, at = torch.tensor([[4.0, 4.0]]), torch.tensor([[[1.0, 1.0], [3.0, 3.0]]])
    swapped = 50 * ULD.encode(torch.tensor([[[2.9, 3.0], [1.0, 1.2]]]), extent)
    found = located(ULD, swapped, at, extent)
    assert (found - at).norm(dim=-1).max() < 0.5


# --- rooms seen in a mirror -----------------------------------------------------------------------

def test_turned_rooms_keep_all_distances_and_fit():
    torch.manual_seed(0)
    batch = nodes_batch(n=64, talkers=2)
    before = copy.deepcopy(batch)
    seen = turned(batch)
    assert all(torch.equal(batch[k], before[k]) for k in batch)  # not in place
    for k in (0, 1):
        torch.testing.assert_close(distances(seen["mics"], seen["sources"][:, k]),
                                   distances(batch["mics"], batch["sources"][:, k]))
    assert (((seen["mics"] >= -1e-6) & (seen["mics"] <= seen["size"][:, None] + 1e-6)).all()
            and torch.equal(seen["mics"][..., 2], batch["mics"][..., 2]))
    torch.testing.assert_close(seen["size"].prod(-1), batch["size"].prod(-1))
    kinds = {(bool((s["size"] != b["size"]).any()), *(torch.isclose(
        s["mics"][0, :2].sort().values, b["mics"][0, :2].sort().values).tolist())) for s, b in
        zip([{k: v[i] for k, v in seen.items()} for i in range(64)],
            [{k: v[i] for k, v in batch.items()} for i in range(64)])}
    assert len(kinds) > 3


# --- training and evaluation ----------------------------------------------------------------------

def test_training_draws_nodes_anew_and_tests_on_all(monkeypatch):
    seen = []
    class Spy(AdhocLocalizer):
        def forward(self, features, places, present=None):
            seen.append((self.training, features.shape[1]))
            return super().forward(features, places, present)
    torch.manual_seed(0)
    train_localizer(Spy(ULD, width=8, heads=1), ULD, examples(n=8), examples(n=4, seed=1), nodes=3,
                    epochs=2, batch=4)
    assert ({count for training, count in seen if training} == {3}
            and {count for training, count in seen if not training} == {6})


def test_drawn_nodes_keep_their_own_places():
    "A node's features name it; its place must come along."
    class Echo(torch.nn.Module):
        def forward(self, features, places): return torch.cat([features[:, :, 0, :1], places], -1)
    batch = nodes_batch(n=5)
    batch["features"][:, :, 0, 0] = torch.arange(6.0)
    torch.manual_seed(0)
    drawn = [answers(Echo(), ULD, batch, 4) for _ in range(5)]
    all_places = ULD.encode(batch["mics"][..., :2], batch["size"][:, None, :2])
    for out in drawn:
        for k in range(5):
            number = out[k, :, 0].long()
            assert (len(set(number.tolist())) == 4
                    and torch.equal(out[k, :, 1:], all_places[k, number]))
    assert len({tuple(out[..., 0].flatten().tolist()) for out in drawn}) > 1


def test_training_is_repeatable_and_by_the_papers_rules():
    def once():
        torch.manual_seed(3)
        model = AdhocSplitLocalizer(ULD, width=8, heads=1)
        history = train_localizer(model, ULD, examples(n=8, talkers=2),
                                  examples(n=4, talkers=2, seed=1), nodes=3, epochs=6, batch=4,
                                  seed=5)
        return history, locate_all(model, ULD, examples(n=4, talkers=2, seed=1))
    (first, a), (second, b) = once(), once()
    assert (first.best == "mae_m" and list(first["train_loss"]) == list(second["train_loss"])
            and torch.equal(a["outputs"], b["outputs"]))
    assert abs(float(a["errors"].mean()) - min(first["mae_m"])) < 1e-5  # the best epoch's weights
    assert a["outputs"].shape == (4, 2, 25) and a["extent"].shape == (4, 1, 2)


def test_rooms_are_turned_in_training_only(monkeypatch):
    from ssl_nb.labels import adhoc_arrays
    seen = []
    monkeypatch.setattr(adhoc_arrays, "turned",
                        lambda batch: seen.append(len(batch["size"])) or turned(batch))
    torch.manual_seed(0)
    train_localizer(AdhocLocalizer(ULD, width=8, heads=1), ULD, examples(n=6),
                    examples(n=5, seed=1), epochs=2, batch=3)
    assert seen == [3, 3, 3, 3]  # two batches an epoch, none of the 5 others


def test_fewer_examples_than_a_batch_are_one_batch_and_a_rest_is_left_out():
    torch.manual_seed(0)
    seen, model = [], AdhocLocalizer(ULD, width=8, heads=1)
    model.register_forward_pre_hook(lambda net, inputs: seen.append((net.training, len(inputs[0]))))
    for count in (3, 10):
        train_localizer(model, ULD, examples(n=count), examples(n=5, seed=1), epochs=1, batch=8)
    assert ([n for training, n in seen if training] == [3, 8]
            and {n for training, n in seen if not training} == {5})


def test_learning_rate_falls_after_three_epochs_without_progress():
    """A net that cannot learn: 1e-3, a tenth after the fourth epoch without progress, stop after
    ten."""
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(25))
        def forward(self, features, places): return 0 * self.unused + torch.zeros(len(features), 25)
    history = train_localizer(Deaf(), ULD, examples(n=4), examples(n=4, seed=1), epochs=30, batch=4,
                              weight_decay=0.0)
    rates = history["lr"].round(8).tolist()
    # once a tenth, as the paper says
    assert rates[:5] == [1e-3] * 5 and rates[5:] == pytest.approx([1e-4] * 6) and len(history) == 11


def test_plot_outputs_draws_a_panel_a_code_and_talker():
    batch = examples(n=3)
    torch.manual_seed(0)
    found = {name: locate_all(AdhocLocalizer(CODES[name](CELLS), width=8, heads=1).eval(),
                              CODES[name](CELLS), batch) for name in ("refined_grid", "uld")}
    fig = plot_outputs({k: CODES[k](CELLS) for k in found}, found, (0, 2))
    assert len(fig.axes) == 5 and "cm off" in fig.axes[0].get_title()


# --- recordings -----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def adhoc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adhoc")
    for position in ("2", "5", "9d", "9u"):
        recordings.write_libriadhoc40(folder, "train", position,
                                  ADHOC40_LOUDSPEAKERS["train"][int(position[0])], seconds=0.25)
    return folder


def test_recordings_become_examples(adhoc):
    one, two = adr1(adhoc, count=12, seconds=0.2), adr2(adhoc, count=12, seconds=0.2, nodes=20)
    known = {tuple(round(float(c), 3) for c in p) for p in ADHOC40_LOUDSPEAKERS["train"].values()}
    assert (len(one) == 12 and one[0]["audio"].shape == (30, 3200)
            and two[0]["audio"].shape == (20, 3200) and two[0]["sources"].shape == (2, 3))
    for k in range(12):
        a, b = two[k]["sources"]
        # never 9u with 9d
        assert (a - b).norm() > 0.5 and tuple(round(float(c), 3) for c in a) in known
        assert len({tuple(m) for m in two[k]["mics"].tolist()}) == 20
    assert (torch.equal(one[3]["audio"], one[-9]["audio"])
            and not torch.equal(one[3]["mics"], one[4]["mics"]))
    assert (torch.equal(one[3]["audio"], adr1(adhoc, count=12, seconds=0.2)[3]["audio"])
            and not torch.equal(one[3]["mics"],
                                adr1(adhoc, count=12, seconds=0.2, seed=1)[3]["mics"]))
    assert node_example(one[0])["features"].shape[::2] == (30, BANDS)
    ULD.encode(one[0]["mics"][:, :2], one[0]["size"][:2])  # all within the room


def test_two_talkers_are_two_recordings_added(adhoc):
    data = adr2(adhoc, count=1, seconds=0.25, nodes=40)  # as long as the recordings
    scene, recordings = data[0], [data.set[k] for k in range(len(data.set))]
    by_place = {tuple(r.positions[0, 0].tolist()): r.audio for r in recordings}
    order = (scene["mics"][:, None] == recordings[0].mics).all(-1).float().argmax(1)
    assert sorted(order.tolist()) == list(range(40))
    torch.testing.assert_close(scene["audio"], sum(by_place[tuple(place.tolist())]
                                                   for place in scene["sources"])[order])


def test_nearest_microphones_of_a_recording_are_loudest(adhoc):
    scene = adr1(adhoc, count=3, seconds=0.2, nodes=40)[0]
    level, away = (node_features(scene["audio"]).mean((-1, -2)),
                   distances(scene["mics"], scene["sources"])[0])
    assert np.corrcoef(level.numpy(), away.log().numpy())[0, 1] < -0.9


def test_a_recording_that_is_too_short_ends_in_silence(adhoc):
    audio = adr1(adhoc, count=1, seconds=0.5)[0]["audio"]
    assert (audio.shape == (30, 8000) and (audio[:, 4000:] == 0).all()
            and audio[:, :4000].abs().max() > 0)


@pytest.mark.parametrize("options, words",
                         [(dict(nodes=41), "nodes=41: must be a whole number from 1 to 40"),
                          (dict(count=0), "count=0"), (dict(n_sources=0), "n_sources=0"),
                          (dict(n_sources=4), "n_sources=4: the split 'train' has recordings from "
                           "3 places only"), (dict(split="tests"), "split='tests'")])
def test_recordings_refuse(adhoc, options, words):
    with pytest.raises(ValueError, match=words): AdhocRecordings(adhoc, **options)


def test_recordings_have_an_end(adhoc):
    with pytest.raises(IndexError, match="index=2: there are 2 examples"): adr1(adhoc, count=2)[2]
    with pytest.raises(FileNotFoundError): adr1(adhoc / "nowhere")
