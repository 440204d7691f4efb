"""Neural-SRP and Cross3D against the published counts of parameters, an independent count of
operations, plane waves, and what a causal net and a set of pairs must do."""
import json, math


import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_nb.acoustics.geometry import angular_error, circular_array, linear_array
from ssl_nb.acoustics.geometry import robot_head_array
from ssl_nb.settings import load_settings
from ssl_nb.variational import supervised_trackers as m
from ssl_nb.workshop.localizers import localizer, localizers, spans
from ssl_nb.workshop.speech import speech

FS = 16000
MODEL = load_settings().data / "models" / "neural_srp"


def gen(seed=0): return torch.Generator().manual_seed(seed)


def directions(n, seed=0):
    u = torch.randn(n, 3, generator=gen(seed))
    return u / u.norm(dim=-1, keepdim=True)


def plane_wave(mics, u, seconds=1.1, seed=0, fs=FS):
    "White noise from afar, delays as phases of one long transform: no code of ours."
    n = round(seconds * fs)
    X = np.fft.rfft(np.random.RandomState(seed).standard_normal(n))
    advance = (mics.double() @ u.double()).numpy() / 343.0
    f = np.fft.rfftfreq(n, 1 / fs)
    audio = np.fft.irfft(X * np.exp(2j * np.pi * f * advance[:, None]), n)
    return torch.tensor(audio, dtype=torch.float32)


# --- counts from the papers -----------------------------------------------------------------------

@pytest.mark.parametrize("shape, published", [((4, 8), 526_372), ((8, 16), 946_340),
                                              ((16, 32), 1_693_988), ((32, 64), 5_626_148)])
def test_cross3d_has_the_published_number_of_parameters(shape, published):
    assert sum(p.numel() for p in m.Cross3D(*shape).parameters()) == published


def test_neural_srp_has_the_published_number_of_parameters():
    "923,792 with the branch for activity, which has 33,284."
    net = m.NeuralSrp()
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert parts == {"convolutions": 297_219, "memory": 542_208, "per_pair": 33_794,
                     "together": 17_287}
    assert sum(parts.values()) == 923_792 - 33_284


def test_operations_of_the_nets():
    "PyTorch's own counter and sums over the layers by hand agree."
    with torch.no_grad(), FlopCounterMode(display=False) as pair:
        m.NeuralSrp().eval()(torch.zeros(1, 100, 64), torch.zeros(1, 6))
    by_hand = (64 * 100 * 9 * 128 + (32 + 16) * 20 * 9 * 128**2 + 20 * 3 * 128 * (1024 + 3 * 128)
               + 20 * 128 * (134 + 3 * 128 + 6))
    assert abs(pair.get_total_flops() / 2 / by_hand - 1) < 0.01
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        m.Cross3D(8, 16).eval()(torch.zeros(3, 10, 8, 16))
    branch = 5 * 9 * 32 * 32 * (128 + 64 + 32)
    frame = 125 * 3 * 32 * 128 + 2 * branch + 5 * 128 * 32 * (8 * 2 + 1 * 16) + 5 * 128 * 3
    assert abs(whole.get_total_flops() / 2 / (10 * frame) - 1) < 0.01


# --- what they are told ---------------------------------------------------------------------------

@pytest.mark.parametrize("mics", [robot_head_array(), circular_array(5, 0.2), 0.05 * torch.eye(3)],
                         ids=["head", "ring", "corner"])
def test_a_plane_wave_peaks_where_geometry_says(mics):
    for u in directions(3):
        gcc, places = m.pair_features(plane_wave(mics, u), mics, FS)
        i, j = m.oriented_pairs(mics).T
        delay = (mics[j] - mics[i]) @ u / 343  # positive: i hears later
        reach = torch.pdist(mics).max() / 343
        bin_ = (delay / reach + 1) / 2 * 63
        peak = gcc.mean(-2).argmax(-1)
        step = 2 * reach / 63 * FS  # samples
        assert ((peak - bin_).abs() * step < 0.3 + step / 2).all()
        torch.testing.assert_close(places[:, 3:] - places[:, :3],
                                   10 * (mics[j] - mics[i]) / torch.pdist(mics).max())


def test_an_array_twice_as_large_in_a_medium_twice_as_fast_is_the_same():
    mics, sound = robot_head_array(), torch.randn(12, 8000, generator=gen())
    large = m.pair_features(sound, 2 * mics, FS, c=686.0)
    for a, b in zip(m.pair_features(sound, mics, FS), large):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_order_and_place_of_the_array_do_not_matter():
    mics, sound = robot_head_array(), torch.randn(12, 20000, generator=gen())
    net, order = m.load_trained(), torch.randperm(12, generator=gen(1))
    with torch.no_grad():
        one = net(*m.pair_features(sound, mics, FS))
        other = net(*m.pair_features(sound[order], mics[order], FS))
        moved = net(*m.pair_features(sound, mics + torch.tensor([2.0, 1.0, 0.5]), FS))
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    torch.testing.assert_close(one, moved, atol=1e-3, rtol=0)
    maps = m.PowerMaps(mics, FS)(sound)
    torch.testing.assert_close(maps, m.PowerMaps(mics[order], FS)(sound[order]), atol=1e-3, rtol=0)


def test_a_higher_rate_tells_the_same():
    "Of sound below 8 kHz, up to the ends of the frames."
    mics, u = robot_head_array(), directions(1)[0]
    n = 17600
    X = np.fft.rfft(np.random.RandomState(0).standard_normal(n))
    advance = (mics.double() @ u.double()).numpy() / 343.0
    f = np.arange(len(X)) / n * FS
    Y = X * np.exp(2j * np.pi * f * advance[:, None])
    Y[:, -1] = 0
    slow = torch.tensor(np.fft.irfft(Y, n), dtype=torch.float32)
    fast = torch.tensor(np.fft.irfft(Y, 3 * n) * 3, dtype=torch.float32)
    a, b = (m.pair_features(x, mics, fs)[0] for x, fs in ((slow, FS), (fast, 3 * FS)))
    assert a.shape == b.shape and float((a - b).abs().max()) < 0.12 * float(a.max())


def test_maps_point_at_a_plane_wave_and_their_planes_at_its_cell():
    mics = robot_head_array()
    maps = m.PowerMaps(mics, FS)
    for u in directions(3, seed=4):
        power = maps(plane_wave(mics, u))
        assert (angular_error(maps.peaks(power), u).rad2deg() < 6).all()
        planes = m.map_planes(power)
        row = round((math.degrees(math.asin(u[2])) + 90) / 180 * 32 - 0.5)
        column = round((math.degrees(math.atan2(u[1], u[0])) + 180) / 360 * 64 - 1)
        assert (planes[1] * 32 - row).abs().max() <= 1
        assert ((planes[2] * 64 - column + 32) % 64 - 32).abs().max() <= 1
        assert planes[0].amax((-2, -1)).allclose(torch.ones(len(power)))


def test_planes_are_empty_where_nobody_talks_and_finite_in_silence():
    maps = torch.rand(2, 4, 8, 16, generator=gen())
    active = torch.tensor([[True, False, True, False], [False] * 4])
    planes = m.map_planes(maps, active)
    assert planes.shape == (2, 3, 4, 8, 16)
    assert (planes.abs().amax((1, 3, 4)) > 0).equal(active)
    assert m.map_planes(torch.zeros(4, 8, 16)).isfinite().all()


@pytest.mark.parametrize("margin", [1, 2])
def test_beyond_the_poles_a_smooth_function_goes_on(margin):
    up = (torch.arange(-margin, 16 + margin) + 0.5) * math.pi / 16 - math.pi / 2
    around = torch.arange(-margin, 32 + margin) * 2 * math.pi / 32
    f = lambda e, a: e.cos() * a.cos() + 0.3 * (e.cos() * a.sin()) ** 2 - e.sin()
    whole = f(up[:, None], around[None])
    inner = whole[margin:-margin, margin:-margin]
    torch.testing.assert_close(m.over_the_poles(inner, margin), whole, atol=1e-5, rtol=0)


# --- causality, batches, pairs --------------------------------------------------------------------

def first_and_last(a, b):
    moved = ((a - b).abs().amax(-1) > 0).nonzero()[:, 0]
    return int(moved[0]), int(moved[-1])


@torch.no_grad()
def test_cross3d_hears_no_future_and_37_frames_of_the_past():
    torch.manual_seed(0)
    net, planes = m.Cross3D(16, 32).eval(), torch.randn(3, 60, 16, 32, generator=gen())
    other = planes.clone()
    other[:, 12] += 1
    assert first_and_last(net(planes), net(other)) == (12, 12 + 36)


@torch.no_grad()
def test_neural_srp_looks_eleven_frames_ahead():
    "One frame of the first convolution and, behind the pool, two steps of the others."
    torch.manual_seed(0)
    net, gcc = m.NeuralSrp().eval(), torch.randn(1, 100, 64, generator=gen())
    for frame in (59, 60, 64, 65):
        other = gcc.clone()
        other[:, frame] += 1
        first, _ = first_and_last(net(gcc, torch.zeros(1, 6)), net(other, torch.zeros(1, 6)))
        assert first == (frame - 15 + 4) // 5  # the answers k with 5 k + 15 >= frame


@torch.no_grad()
def test_batches_are_answered_one_by_one():
    torch.manual_seed(0)
    net, places = m.NeuralSrp().eval(), torch.randn(2, 3, 4, 6, generator=gen())
    gcc = torch.randn(2, 3, 4, 11, 64, generator=gen())
    answers = net(gcc, places)
    assert answers.shape == (2, 3, 2, 3)
    torch.testing.assert_close(answers[1, 2], net(gcc[1, 2], places[1, 2]), atol=1e-5, rtol=1e-4)
    cross, planes = m.Cross3D(4, 8).eval(), torch.randn(2, 2, 3, 5, 4, 8, generator=gen())
    torch.testing.assert_close(cross(planes)[1, 0], cross(planes[1, 0]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_pairs_are_a_set_and_their_number_does_not_matter(monkeypatch):
    torch.manual_seed(0)
    net = m.NeuralSrp().eval()
    gcc, places = torch.randn(5, 20, 64, generator=gen()), torch.randn(5, 6, generator=gen())
    one = net(gcc, places)
    order = torch.randperm(5, generator=gen(1))
    torch.testing.assert_close(net(gcc[order], places[order]), one, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(gcc.repeat(3, 1, 1), places.repeat(3, 1)), one, atol=1e-5,
                               rtol=1e-4)
    monkeypatch.setattr(m, "_AT_ONCE", 1)  # one pair at a time
    torch.testing.assert_close(net(gcc, places), one, atol=1e-5, rtol=1e-4)


def test_pooling_before_the_prelu_is_the_published_order():
    "Convolution, norm, PReLU, pool: the same as long as the slope is not negative."
    block, z = m.NeuralSrp().convolutions[0].eval(), torch.randn(2, 1, 10, 64, generator=gen())
    conv, norm, pool, prelu = block
    assert isinstance(pool, nn.MaxPool2d) and isinstance(prelu, nn.PReLU)
    torch.testing.assert_close(block(z), pool(prelu(norm(conv(z)))))
    assert all(float(b[3].weight.detach()) >= 0 for b in m.load_trained().convolutions)


# --- training -------------------------------------------------------------------------------------

def test_times_of_frames_and_steps():
    "Twenty seconds: 103 frames, as in the paper, and twenty answers."
    times, steps = m.frame_times(320_000, FS), m.step_times(320_000, FS)
    assert len(times) == 103 and len(steps) == 20
    torch.testing.assert_close(steps, times[:100].unflatten(0, (20, 5)).mean(-1))
    active = torch.zeros(1000, dtype=torch.bool)
    active[:96] = True  # 1.92 s: two steps, of which the second lasts until 1.984 s
    assert m.step_activity(active, 20).tolist() == [True, True] + [False] * 18


def test_walks_are_turned_with_everything_that_belongs_to_them():
    mics = m.draw_array(5, gen(2))
    u = directions(2, seed=3)
    sound = torch.cat([plane_wave(mics, v, 0.96 + 0.064, seed=k) for k, v in enumerate(u)], -1)
    gcc = m.pair_features(sound, mics, FS)[0][None, :, :10]
    walks = m.Walks(gcc, mics[None], u[None], torch.ones(1, 2, dtype=torch.bool), visits=20)
    torch.manual_seed(0)
    azimuths = []
    for k in range(20):
        item = walks[k]
        assert item["gcc"].shape == (8, 10, 64) and len(walks) == 20
        steps = item["places"][:, 3:] - item["places"][:, :3]
        assert (steps[:, 0] > 0).all()  # oriented anew
        ideal = ((steps @ item["directions"].T / 10) + 1) / 2 * 63
        peak = item["gcc"].unflatten(1, (2, 5))[:, :, 1:4].mean(2).argmax(-1)
        assert (peak - ideal).abs().max() < 4
        assert torch.allclose(item["directions"][:, 2], u[:, 2], atol=1e-5)
        azimuths.append(float(torch.atan2(*item["directions"][0, [1, 0]])))
    assert np.std(azimuths) > 1


def test_the_loss_counts_steps_with_speech_only():
    model = lambda gcc, places: torch.zeros(2, 3, 3)
    u = torch.tensor([[[1.0, 0, 0], [0, 0.6, 0.8], [9.0, 9, 9]], [[9.0, 9, 9]] * 3])
    batch = {"gcc": None, "places": None, "directions": u,
             "active": torch.tensor([[True, True, False], [False] * 3])}
    assert math.isclose(float(m.direction_loss(model, batch, 1)), (1 / 3 + 1.4 / 3) / 2 / 2,
                        rel_tol=1e-6)


def test_a_drawn_walk_is_what_it_says():
    walk = m.draw_walk(6, 3.0, speech("train"), gen(1))
    assert walk["audio"].shape == (6, 48000) and walk["directions"].shape == (3, 3)
    assert walk["active"].shape == (3,) and walk["directions"].norm(dim=-1).allclose(torch.ones(3))
    again = m.draw_walk(6, 3.0, speech("train"), gen(1))
    assert all(walk[k].equal(again[k]) for k in walk)


# --- the trained net ------------------------------------------------------------------------------

def check_value():
    "Mean angle, degrees, of 24 plane waves of noise that the robot's head hears."
    mics, net = robot_head_array(), m.load_trained()
    with torch.no_grad():
        found = torch.cat([net(*m.pair_features(plane_wave(mics, u, seed=k), mics, FS))
                           for k, u in enumerate(level_directions())])
    return float(angular_error(found, level_directions()).rad2deg().mean())


def level_directions():
    azimuth = torch.arange(24) * 2 * math.pi / 24 + 0.05
    up = 0.4 * torch.sin(5 * torch.arange(24.0))
    return torch.stack([up.cos() * azimuth.cos(), up.cos() * azimuth.sin(), up.sin()], -1)


def test_the_card_tells_the_truth():
    card = json.loads((MODEL / "card.json").read_text(encoding="utf-8"))
    assert (MODEL / "weights.safetensors").stat().st_size < 4e6
    assert abs(check_value() - card["check"]["mean_error_deg"]) < 0.3
    assert {"trained_on", "seed", "hardware", "licence", "limits"} <= set(card)


def test_localizer_of_the_registry():
    assert "neural_srp" in localizers()
    method, mics, u = localizer("neural_srp"), robot_head_array(), level_directions()[3]
    estimate = method(plane_wave(mics, u, 1.9), mics, FS)
    assert estimate.far_field and estimate.points.shape == (len(estimate.times), 1, 3)
    off = angular_error(estimate.points[:, 0], u).rad2deg()
    assert off.median() < 30
    again = method(plane_wave(mics, u, 1.9).double().numpy(), mics.tolist(), FS)
    torch.testing.assert_close(again.points, estimate.points, atol=1e-3, rtol=0)


def test_a_plane_is_turned_and_its_answer_turned_back():
    "A ring on the wall is heard as a level one, on the side of +x."
    turn = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # z to x
    wall, u = circular_array(6, 0.05) @ turn.T, level_directions()[4]
    R = m._upright(*spans(wall)).float()
    torch.testing.assert_close(R @ R.T, torch.eye(3), atol=1e-5, rtol=0)
    assert abs(float(torch.linalg.det(R)) - 1) < 1e-5
    level = wall @ R.T
    assert level[:, 2].abs().max() < 1e-6
    sound, method = plane_wave(wall, u, 1.9), localizer("neural_srp")
    on_wall = method(sound, wall, FS).points[:, 0]
    on_table = method(sound, level, FS).points[:, 0]
    assert (on_wall[:, 0] >= -1e-6).all() and (on_table[:, 2] >= -1e-6).all()
    torch.testing.assert_close(on_wall, on_table @ R, atol=1e-3, rtol=0)


# --- refusals -------------------------------------------------------------------------------------

def bad_calls():
    mics, sound = robot_head_array(), torch.zeros(12, 20000)
    net, places = m.NeuralSrp(), torch.zeros(3, 6)
    yield lambda: m.pair_features(sound[:3], mics, FS), "audio"
    yield lambda: m.pair_features(sound[:, :100], mics, FS), "audio"
    yield lambda: m.pair_features(sound * math.nan, mics, FS), "audio"
    yield lambda: m.pair_features(sound, mics * 10, FS), "mics"
    yield lambda: m.pair_features(sound, mics * 0, FS), "mics"
    yield lambda: m.pair_features(sound, mics, -1), "fs"
    yield lambda: m.pair_features(sound, mics, FS, bins=1), "bins"
    yield lambda: net(torch.zeros(3, 20, 32), places), "gcc"
    yield lambda: net(torch.zeros(3, 4, 64), places), "gcc"
    yield lambda: net(torch.zeros(3, 20, 64) * math.nan, places), "gcc"
    yield lambda: net(torch.zeros(3, 20, 64), torch.zeros(2, 6)), "places"
    yield lambda: net(torch.zeros(3, 20, 64), torch.zeros(3, 5)), "places"
    yield lambda: m.NeuralSrp(bins=4), "bins"
    yield lambda: m.Cross3D(1, 8), "elevations"
    yield lambda: m.Cross3D(4, 9), "azimuths"
    yield lambda: m.Cross3D(4, 8)(torch.zeros(2, 5, 4, 8)), "planes"
    yield lambda: m.Cross3D(4, 8)(torch.zeros(3, 5, 8, 4)), "planes"
    yield lambda: m.map_planes(torch.zeros(5, 4, 8) / 0), "maps"
    yield lambda: m.PowerMaps(mics, FS)(sound[:5]), "audio"
    yield lambda: m.map_planes(torch.zeros(5, 4, 8), torch.ones(4, dtype=torch.bool)), "active"
    yield lambda: m.PowerMaps(mics, FS).peaks(torch.zeros(4, 8)), "maps"
    yield lambda: m.draw_array(3, gen()), "n_mics"
    yield lambda: m.draw_walk(4, 0.5, speech("train"), gen()), "seconds"
    yield lambda: m.Walks(torch.zeros(1, 6, 10, 64), torch.zeros(1, 4, 3), torch.zeros(1, 2, 3),
                          torch.ones(1, 2, dtype=torch.bool), visits=1, steps=3), "steps"
    method = m.NeuralSrpLocalizer()
    yield lambda: method(sound, mics, 8000), "fs"
    yield lambda: method(sound[:, :9000], mics, FS), "audio"
    yield lambda: method(sound[:4], linear_array(4, 0.05), FS), "mics"
    yield lambda: method(sound[:3], mics[:3], FS), "mics"
    yield lambda: method(sound, mics, FS, sources=2), "sources"


@pytest.mark.parametrize("number", range(len(list(bad_calls()))))
def test_bad_arguments_are_named(number):
    call, name = list(bad_calls())[number]
    # where the tests' checks of shapes come first, they name it as well
    with pytest.raises((ValueError, TypeCheckError), match=f"(?m)^({name}|.*'{name}')"): call()


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="card.json"): m.load_trained(tmp_path)
