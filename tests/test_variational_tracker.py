"""The variational tracker against sums in NumPy, plane waves, counts, and what must not matter."""
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ssl_nb.acoustics.geometry import mic_pairs, robot_head_array, tdoas, tetrahedral_array
from ssl_nb.acoustics.signals import fractional_delay
from ssl_nb.variational import variational_tracker as v
from ssl_nb.workshop.training import fit

FS = 16000
HEAD = robot_head_array() - robot_head_array().mean(0)


def chance(seed=0): return torch.Generator().manual_seed(seed)


def directions(n, seed=0): return F.normalize(torch.randn(n, 3, generator=chance(seed)), dim=-1)


def plane_wave(u, mics, seconds=1.2, seed=0):
    "White noise from far away: each microphone earlier by its part along u."
    source = torch.randn(int(seconds * FS), generator=chance(seed))
    return fractional_delay(source, 40 - mics @ u * FS / 343.0)


# --- features -------------------------------------------------------------------------------------

def test_features_are_the_correlation_at_the_delays_of_the_array():
    mics = tetrahedral_array(0.09)
    audio = plane_wave(directions(1)[0], mics)
    features = v.pair_features(audio, mics, FS)
    assert features.shape == (6, 1 + (audio.shape[-1] - 4096) // 3072, 64)
    window = np.hanning(4097)[:-1]
    frame = audio[:, 3072:3072 + 4096].double().numpy() * window
    spectra = np.fft.fft(frame, 8192)
    axis = v.delay_axis(mics, FS).double().numpy()
    np.testing.assert_allclose(axis, np.linspace(-1, 1, 64) * 0.09 / 343 * FS, rtol=1e-5)
    k = np.fft.fftfreq(8192, 1 / 8192)
    for pair, (i, j) in enumerate(mic_pairs(4).tolist()):
        cross = spectra[i] * spectra[j].conj()
        exact = (cross / np.abs(cross) @ np.exp(2j * np.pi * np.outer(k, axis) / 8192)).real / 8192
        # straight lines between quarters of samples take the tip off a peak
        np.testing.assert_allclose(features[pair, 1], exact, atol=0.05)


def test_peaks_lie_where_the_decoder_says_and_not_opposite():
    axis = v.delay_axis(HEAD, FS)
    for k, u in enumerate(directions(6, seed=1)):
        features = v.pair_features(plane_wave(u, HEAD, seed=k), HEAD, FS)
        said = v.predicted_lags(u[None], HEAD, FS)[:, 0]
        peaks = axis[features[:, 1].argmax(-1)]
        assert float((peaks - said).abs().max()) < 0.3
        decoder, heard = v.PhysicsDecoder(1.0), v.heard_distribution(features[:, 1])
        loss = lambda z: float(v.physics_loss(decoder(z[None], HEAD, FS)[:, 0].detach(),
                                              heard).mean())
        assert loss(u) < 3 and loss(-u) > loss(u) + 3


def test_predicted_lags_are_those_of_a_far_source():
    z = directions(5, seed=2)
    exact = tdoas(HEAD.double(), 1e5 * z.double()) * FS
    torch.testing.assert_close(v.predicted_lags(z, HEAD, FS).mT.double(), exact, rtol=0, atol=1e-3)


def test_the_level_of_a_recording_does_not_matter_and_silence_is_uniform():
    audio = plane_wave(directions(1)[0], HEAD)
    one, other = (v.pair_features(gain * audio, HEAD, FS) for gain in (1.0, 1e-4))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
    quiet = v.heard_distribution(v.pair_features(torch.zeros(12, 20000), HEAD, FS))
    torch.testing.assert_close(quiet, torch.full_like(quiet, 1 / 64))


def test_frame_activity_is_two_thirds_of_a_frame():
    steps = torch.rand(300, generator=chance()) > 0.35
    found = v.frame_activity(steps, 320)
    wanted = [steps[round(k * 9.6):round(k * 9.6) + 13].double().mean() >= 2 / 3
              for k in range(len(found))]
    assert found.tolist() == wanted and len(found) == math.floor((300 - 13) / 9.6) + 1
    assert v.frame_activity(steps[:5], 320).shape == (0,)


def test_a_choice_of_microphones_hears_what_a_smaller_array_hears():
    torch.manual_seed(0)
    u = directions(1, seed=3)[0]
    scene = {"audio": plane_wave(u, HEAD, 1.4), "mics": HEAD + 2.0,
             "activity": torch.ones(1, 70, dtype=torch.bool),
             "sources": (HEAD.mean(0) + 2.0 + 9 * u).expand(1, 70, 3)}
    data = v.Subarrays([scene], FS, 4, 7)
    example = data[0]
    kept = torch.cdist(example["mics"], HEAD).argmin(-1)
    alone = v.pair_features(scene["audio"][kept], HEAD[kept], FS)
    assert len(data) == 1  # a stretch of five frames, the sixth is left over
    torch.testing.assert_close(example["features"], alone[:, :5], rtol=0, atol=2e-3)
    torch.testing.assert_close(example["directions"][0], u, rtol=0, atol=1e-5)
    sizes = {len(data[0]["mics"]) for _ in range(30)}
    assert sizes == {4, 5, 6, 7}
    batch = torch.utils.data.default_collate(data.__getitems__([0, 0]))
    assert batch["features"].shape[0] == 2


# --- loss -----------------------------------------------------------------------------------------

def numpy_parts(features, lags, axis, sigma, sharpness=8.0):
    "What is heard and what is said, in NumPy."
    r = features.double().numpy()
    r = (r - r.mean(-1, keepdims=True)) / r.std(-1, keepdims=True)
    heard = np.exp(sharpness * r)
    heard /= heard.sum(-1, keepdims=True)
    said = np.exp(-((axis.double().numpy() - lags.double().numpy()[..., None]) ** 2) / 2 / sigma**2)
    return r, heard, said / said.sum(-1, keepdims=True)


def test_both_forms_of_the_loss_by_sums():
    features = torch.randn(66, 2, 64, generator=chance())
    axis, lags = v.delay_axis(HEAD, FS), v.predicted_lags(directions(2), HEAD, FS)
    _, heard, said = numpy_parts(features, lags, axis, 1.3)
    ours = v.delay_log_probabilities(lags, axis, torch.tensor(1.3)), v.heard_distribution(features)
    crossed = -(heard * np.log(said)).sum(-1)
    evidence = -np.log((heard * said).sum(-1))
    np.testing.assert_allclose(v.physics_loss(*ours, "cross_entropy"), crossed, rtol=1e-4)
    np.testing.assert_allclose(v.physics_loss(*ours), evidence, rtol=1e-4)
    assert (evidence <= crossed).all()


def test_a_sharp_decoder_is_steered_power_and_a_sharp_ear_hears_the_peak():
    features = 0.1 * torch.randn(66, 1, 64, generator=chance(1))
    axis = v.delay_axis(HEAD, FS)
    number = torch.randint(0, 64, (66, 1), generator=chance(2))
    lags = axis[number]  # on the axis, so that the delay of the decoder is one of its own
    r, *_ = numpy_parts(features, lags, axis, 1.0)
    power = np.take_along_axis(r, number.numpy()[..., None], -1)[..., 0]
    loss = v.physics_loss(v.delay_log_probabilities(lags, axis, torch.tensor(0.01)),
                          v.heard_distribution(features))
    norm = np.log(np.exp(8 * r).sum(-1))
    np.testing.assert_allclose(loss, norm - 8 * power, rtol=1e-4, atol=1e-3)
    for form in v.FORMS:
        said = v.delay_log_probabilities(lags, axis, torch.tensor(2.0))
        loss = v.physics_loss(said, v.heard_distribution(features, 1e4), form)
        peak = axis[features.argmax(-1)]
        squares = (peak - lags).square() / 8
        rest = loss - squares  # the normalization of the decoder, the same for all delays heard
        norm = torch.logsumexp(-(axis - lags.unsqueeze(-1)).square() / 8, -1)
        torch.testing.assert_close(rest, norm, rtol=1e-3, atol=1e-3)


class Fixed(torch.nn.Module):
    "An encoder that always says the same."
    def __init__(self, mean, kappa):
        super().__init__()
        self.mean, self.kappa = mean, kappa

    def forward(self, features, mics): return v.Answer(self.mean, self.kappa)


def test_the_whole_bound_is_divided_by_the_pairs_and_silence_does_not_count():
    mics = HEAD[:5].expand(2, 5, 3)
    features = torch.randn(2, 10, 10, 64, generator=chance())
    activity = torch.tensor([[True] * 5 + [False] * 5, [True] * 10])
    mean, kappa = directions(4).reshape(2, 2, 3), torch.tensor([[3.0, 50.0], [9.0, 0.5]])
    model = v.VariationalAutoencoder(v.VariationalTracker(4), FS)
    model.encoder = Fixed(mean, kappa)
    parts = {k: float(x.detach()) for k, x in model(
        {"features": features, "mics": mics, "activity": activity}, 2.0, draw=False).items()}
    axis = v.delay_axis(HEAD[:5], FS)
    total, kl = 0.0, 0.0
    for item, frame in ((0, 0), (1, 0), (1, 1)):  # the second of the first item is silent
        lags = v.predicted_lags(mean[item, frame][None], HEAD[:5], FS)[:, 0]
        _, heard, said = numpy_parts(features[item, :, 5 * frame + 2], lags, axis, 2.001)
        total += -np.log((heard * said).sum(-1)).sum()
        k = float(kappa[item, frame])
        kl += k / np.tanh(k) - 1 + math.log(k) - math.log(math.sinh(k))
    assert abs(parts["physics"] - total / 3 / 10) < 1e-3
    assert abs(parts["divergence"] - kl / 3) < 1e-4
    assert abs(parts["loss"] - (total + 2 * kl) / 3 / 10) < 1e-3


def scenes_of_noise(labels_seed, n=4):
    "Examples without any sense; the directions are drawn from a seed of their own."
    rows = []
    for k in range(n):
        rows.append({"features": torch.randn(6, 10, 64, generator=chance(k)),
                     "mics": tetrahedral_array(0.1), "activity": torch.ones(10, dtype=torch.bool),
                     "directions": directions(10, seed=labels_seed + k)})
    return rows


def test_labels_change_nothing_neither_the_weights_nor_the_chosen_epoch():
    ends = []
    for labels in (100, 200):
        torch.manual_seed(0)
        model = v.VariationalAutoencoder(v.VariationalTracker(4))
        data = scenes_of_noise(labels)
        history = fit(model, DataLoader(data, 2, shuffle=True), DataLoader(data, 4),
                      v.variational_loss(1), epochs=3, lr=1e-2, seed=3, device="cpu",
                      metrics={"bound": v.bound_metric}, best="bound", progress=False)
        ends.append((history, {k: x.clone() for k, x in model.state_dict().items()}))
    (one, first), (other, second) = ends
    assert one.best_epoch == other.best_epoch and one["bound"].tolist() == other["bound"].tolist()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert len(set(one["bound"])) == 3  # something was learned at all


def test_warm_up_has_no_divergence_and_no_draws():
    torch.manual_seed(0)
    model = v.VariationalAutoencoder(v.VariationalTracker(4))
    batch = torch.utils.data.default_collate(scenes_of_noise(0))
    early = [v.variational_loss(2)(model, batch, 2) for _ in range(2)]
    late = [v.variational_loss(2)(model, batch, 3) for _ in range(2)]
    assert early[0]["loss"] == early[1]["loss"] == early[0]["physics"]
    assert late[0]["physics"] != late[1]["physics"] and late[0]["loss"] > late[0]["physics"]


# --- the net --------------------------------------------------------------------------------------

def test_count_and_shapes_of_the_published_net():
    net = v.VariationalTracker()
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert sizes == {"blocks": 300_288, "gru": 542_208, "pair": 33_280, "head": 17_156}
    assert sum(p.numel() for p in net.parameters()) == 892_932
    with torch.no_grad(): mean, kappa = net(torch.randn(1, 6, 12, 64), tetrahedral_array(0.1)[None])
    assert mean.shape == (1, 2, 3) and kappa.shape == (1, 2) and (kappa > 0).all()
    torch.testing.assert_close(mean.norm(dim=-1), torch.ones(1, 2))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return v.VariationalTracker(8).eval()


@torch.no_grad()
def test_what_must_not_matter(small):
    features, mics = torch.randn(2, 10, 15, 64, generator=chance()), HEAD[:5].expand(2, 5, 3)
    answer = small(features, mics)
    close = lambda a: [torch.testing.assert_close(x, y, rtol=0, atol=2e-5)
                       for x, y in zip(a, answer)]
    order = [3, 0, 4, 1, 2]  # a pair that is turned has the mirrored correlation
    number = {tuple(p): k for k, p in enumerate(mic_pairs(5).tolist())}
    rows = [features[:, number[order[i], order[j]]] if order[i] < order[j]
            else features[:, number[order[j], order[i]]].flip(-1)
            for i, j in mic_pairs(5).tolist()]
    close(small(torch.stack(rows, 1), mics[:, order]))
    close(small(features, mics + torch.tensor([5.0, -3.0, 1.0])))  # where the array stands
    close(small(features, 2 * mics))  # its size, the delays being those of the axis
    close(small(7 * features + 0.3, mics))  # level and offset of the correlations
    single = [small(f, m) for f, m in zip(features, mics)]
    close(tuple(torch.stack(part) for part in zip(*single)))
    other = small(features, mics.flip(-2))
    assert float((other.mean - answer.mean).abs().max()) > 1e-3  # but the places do matter


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_reach_the_answers(causal):
    torch.manual_seed(1)
    net = v.VariationalTracker(8, causal=causal)
    features, mics = torch.randn(1, 6, 20, 64, generator=chance()), tetrahedral_array(0.1)[None]
    alone = net(features, mics)
    junk = torch.cat([features, torch.randn(1, 6, 15, 64, generator=chance(1))], 2)
    padded = net(junk, mics, torch.tensor([20]))
    for a, b in zip(alone, padded): torch.testing.assert_close(a, b[:, :4], rtol=0, atol=1e-5)
    assert causal == all(torch.allclose(a, b[:, :4], atol=1e-5)
                         for a, b in zip(alone, net(junk, mics)))


def test_rotation_turns_the_law_and_leaves_what_is_heard():
    turn = torch.linalg.qr(torch.randn(3, 3, generator=chance(4)))[0]
    turn = turn * torch.linalg.det(turn).sign()
    u = directions(1, seed=5)[0]
    one = v.pair_features(plane_wave(u, HEAD), HEAD, FS)
    other = v.pair_features(plane_wave(turn @ u, HEAD @ turn.T), HEAD @ turn.T, FS)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    torch.testing.assert_close(v.predicted_lags(u[None], HEAD, FS),
                               v.predicted_lags((turn @ u)[None], HEAD @ turn.T, FS), rtol=0,
                               atol=1e-4)


def test_silent_and_constant_frames_have_gradients_that_are_numbers():
    torch.manual_seed(0)
    model = v.VariationalAutoencoder(v.VariationalTracker(8))
    features = torch.zeros(1, 6, 10, 64)
    features[..., 5:, :] = 0.25
    model({"features": features, "mics": tetrahedral_array(0.1)[None],
           "activity": torch.ones(1, 10, dtype=torch.bool)})["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    still = model({"features": features, "mics": tetrahedral_array(0.1)[None],
                   "activity": torch.zeros(1, 10, dtype=torch.bool)})
    assert float(still["loss"].detach()) == 0


# --- certainty, and recordings --------------------------------------------------------------------

def test_one_factor_repairs_concentrations():
    import scipy.stats
    mean, true = directions(3000, seed=6).double(), np.random.default_rng(0).uniform(5, 80, 3000)
    drawn = np.stack([scipy.stats.vonmises_fisher(m, k, seed=n).rvs(1)[0]
                      for n, (m, k) in enumerate(zip(mean.numpy(), true))])
    stated = torch.tensor(true / 0.3)
    factor = v.concentration_factor(mean, stated, torch.tensor(drawn))
    assert abs(float(factor) - 0.3) < 0.02


@torch.no_grad()
def test_a_recording_gives_an_estimate_and_pauses_give_nan(small):
    audio = 1e-4 * torch.randn(12, 10 * FS, generator=chance(7))
    audio[:, 4 * FS:8 * FS] += plane_wave(directions(1)[0], HEAD, 4.0)
    found = v.VariationalLocalizer(small)(audio, HEAD, FS)
    assert found.points.shape == (len(found.times), 1, 3) and found.far_field
    torch.testing.assert_close(found.times.diff(), torch.full((len(found.times) - 1,), 0.96))
    assert abs(float(found.times[0]) - (2 * 3072 + 2048) / FS) < 1e-6
    loud = (found.times > 5) & (found.times < 7)
    assert found.points[loud].isfinite().all() and found.spread[loud].isfinite().all()
    assert found.points[found.times < 3].isnan().all()
    often = v.VariationalLocalizer(small)(audio, HEAD, FS, hop=0.1)
    torch.testing.assert_close(often.times.diff(), torch.full((len(often.times) - 1,), 0.1),
                               rtol=0, atol=1e-4)
    assert often.points.shape[0] > 5 * found.points.shape[0]
    quiet = v.VariationalLocalizer(small)(torch.zeros(12, 2 * FS), HEAD, FS)
    assert quiet.points.isnan().all() and (quiet.activity == 0).all()


NAN = torch.zeros(12, 20000)
NAN[3, 700] = math.nan


@pytest.mark.parametrize("audio, mics, fs, words", [
    (torch.zeros(1, 20000), HEAD[:1], FS, "mics: 1"),
    (torch.zeros(3, 20000), HEAD[[0, 0, 1]], FS, "mics: two stand at the same place"),
    (torch.zeros(12, 20000), 10 * HEAD, FS, "mics: the largest delay is .* at most 31.5"),
    (NAN, HEAD, FS, "audio: nan at index"),
    (torch.zeros(12, 9000), HEAD, FS, "audio: 9000 samples, needs at least 16384"),
    (torch.zeros(11, 20000), HEAD, FS, "audio: has 11 channels"),
    (torch.zeros(12, 20000), HEAD, 48000, "fs=48000"),
])
def test_what_cannot_be_done_is_refused_in_words(small, audio, mics, fs, words):
    with pytest.raises(ValueError, match=words): v.VariationalLocalizer(small)(audio, mics, fs)


@pytest.mark.parametrize("call, words", [
    (lambda net: net(torch.zeros(6, 4, 64), tetrahedral_array(0.1)), "features: 4 frames"),
    (lambda net: net(torch.zeros(5, 9, 64), tetrahedral_array(0.1)), "features.*6 pairs"),
    (lambda net: net(torch.zeros(6, 9, 32), tetrahedral_array(0.1)), "features.*64"),
    (lambda net: net(torch.full((6, 9, 64), math.nan), tetrahedral_array(0.1)), "features: nan"),
    (lambda net: v.VariationalTracker(0), "width=0"),
    (lambda net: v.PhysicsDecoder(-1.0), "sigma=-1"),
    (lambda net: v.VariationalLocalizer("net"), "net"),
    (lambda net: v.physics_loss(torch.zeros(3), torch.zeros(3), "evidense"), "form.*evidence"),
    (lambda net: v.Subarrays([], FS, 2, 3), "least=2, most=3"),
])
def test_bad_arguments_are_named(small, call, words):
    with pytest.raises(ValueError, match=words): call(small)
