"""NGCC-PHAT and PGCC-PHAT against tensors of the published code (where those lie at hand), against
numbers of that code for weights made from a rule, and against closed forms."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from filled_weights import filled, ngcc_shapes, pgcc_shapes
from ssl_nb.acoustics.geometry import mic_pairs
from ssl_nb.acoustics.rooms import Room, reverberate, rirs
from ssl_nb.acoustics.signals import add_noise, fractional_delay
from ssl_nb.masked import ngcc_phat as m
from ssl_nb.settings import load_settings
from ssl_nb.workshop.localizers import localizer, localizers

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT.parent / "shared" / "reference_weights"
golden = pytest.mark.skipif(not (GOLDEN / "ngcc_phat.safetensors").is_file(),
                            reason="needs the published tensors in ../shared/reference_weights")


def drawn(n=4, time=2048, mics=2, seed=0):
    "Recordings of NumPy's frozen generator."
    values = np.random.RandomState(seed).standard_normal((n, mics, time))
    return torch.tensor(values, dtype=torch.float32)


def largest(a, b): return float((a - b).abs().max())


@pytest.fixture(scope="module")
def filled_net(tmp_path_factory):
    "NGCC-PHAT with weights from the rule, read from a file as the published ones are."
    path = tmp_path_factory.mktemp("ngcc") / "filled.safetensors"
    save_file(filled(ngcc_shapes()), path)
    return m.load_published(path)


# --- the published code ---------------------------------------------------------------------------

@golden
@torch.no_grad()
def test_published_net_and_its_inner_tensors():
    net = m.load_published(GOLDEN / "ngcc_phat.safetensors")
    there = load_file(GOLDEN / "ngcc_phat_golden.safetensors")
    audio = torch.cat([there["x1"], there["x2"]], 1)
    first, layers = audio[:2, 0], net.front.layers
    bank = m.sinc_bank(layers[0].low, layers[0].width, 1023, 16000)
    assert largest(bank, there["sinc_filters"]) < 1e-4
    assert largest(layers[:2](first).mT[..., ::8], there["backbone_bn0_x1_first2"]) < 1e-4
    assert largest(net.front(first)[..., ::8], there["backbone_x1_first2"]) < 1e-4
    gcc = net.correlations(audio)[:, 0]
    assert largest(gcc, there["gcc"]) < 1e-4
    for k in range(3): assert largest(net.head[:4 * k + 4](gcc), there[f"mlp{k}"]) < 1e-4
    scores = net(audio)
    assert largest(scores, there["logits"]) < 1e-4
    assert largest(net.double()(audio.double()), there["logits_float64"]) < 1e-4
    assert (scores.argmax(-1) - 23).tolist() == there["argmax_delay"].tolist() == [7, -12, 16, 3]
    plain = m.channel_gcc(audio[:, :, None], mic_pairs(2), 23)[:, 0, 0]
    assert largest(plain, there["plain_gcc_phat"]) < 1e-4


@golden
@pytest.mark.parametrize("head", m.HEADS)
@torch.no_grad()
def test_published_image_net(head, tmp_path):
    there = load_file(GOLDEN / "pgcc_phat_golden_filled.safetensors")
    save_file(filled(pgcc_shapes(47 if head == "classifier" else 1)), tmp_path / "p.safetensors")
    net = m.load_published(tmp_path / "p.safetensors")
    audio = torch.cat([there["x1"], there["x2"]], 1)
    assert net.kind == head
    image = m.beta_image(audio, 23)
    # the row without whitening has values in the thousands
    torch.testing.assert_close(image, there["pgcc_features"], rtol=1e-4, atol=1e-4)
    assert largest(net.convs(image).flatten(1)[:, :64], there["flat_first64"]) < 1e-4
    assert largest(net(audio), there[f"out_{head}"]) < 1e-4


# outputs of the published code (axeber01/ngcc at 2210bf5, MIT) for these weights and `drawn()`, run
# with torch 2.13.0+cpu in float32
# windows 0, 1 at indices 0, 11, 23, 30, 46
NGCC = [[0.04221, -0.00337, -0.01101, -0.00051, -0.09317],
        [0.04453, 0.00199, 0.01456, -0.02118, -0.09197]]
NGCC_40 = [0.04423, -0.01101, -0.09354]  # lags up to 40: window 0 at indices 0, 40, 80
REGRESSION = [0.04745, 0.04672, 0.04406, 0.04633]  # without sinc filters
PGCC = [[-0.45888, -0.14044, 0.1775], [-0.29674, 0.25609, 0.27231]]  # windows 0, 1 at 0, 23, 46


@torch.no_grad()
def test_numbers_of_the_published_code_for_filled_weights(filled_net, tmp_path):
    audio = drawn()
    assert largest(filled_net(audio)[:2, [0, 11, 23, 30, 46]], torch.tensor(NGCC)) < 1e-4
    wide = filled_net.pairwise(audio[:1], max_lag=40)[0, 0, [0, 40, 80]]
    assert largest(wide, torch.tensor(NGCC_40)) < 1e-4
    for shapes, expected, at in ((ngcc_shapes(True, False), REGRESSION, ...),
                                 (pgcc_shapes(), PGCC, (slice(2), [0, 23, 46]))):
        save_file(filled(shapes), tmp_path / "w.safetensors")
        found = m.load_published(tmp_path / "w.safetensors")(audio)
        assert largest(found[at], torch.tensor(expected)) < 1e-4


def test_sizes():
    size = lambda net: sum(p.numel() for p in net.parameters())
    assert size(m.NgccPhat()) == 888_193
    assert size(m.PgccPhat()) == 11_558_639 and size(m.PgccPhat(head="regression")) == 11_535_041


def test_files_that_do_not_hold_the_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        m.load_published(tmp_path / "none.safetensors")
    tensors, path = filled(ngcc_shapes()), tmp_path / "w.safetensors"
    for change, message in ((lambda t: t.pop("mlp.1.0.bias"), "missing.*mlp.1.0.bias"),
                            (lambda t: t.update(more=torch.zeros(1)), "unknown.*more"),
                            (lambda t: t.update({"final_conv.bias": torch.zeros(2)}), "shape")):
        changed = dict(tensors)
        change(changed)
        save_file(changed, path)
        with pytest.raises(ValueError, match=message): m.load_published(path)
    with pytest.raises(FileNotFoundError, match="card.json"): m.load_trained(tmp_path)


# --- equivariance ---------------------------------------------------------------------------------

@torch.no_grad()
def test_a_turned_recording_gives_turned_features_and_padding_does_not(filled_net):
    x = drawn(1)[0]
    features = filled_net.front(x)
    for shift in (1, 37, 1000):
        assert largest(filled_net.front(x.roll(shift, -1)), features.roll(shift, -1)) < 1e-3
    weight = filled_net.front.layers[3].weight
    padded = lambda z: F.conv1d(z[None], weight, padding=5)[0]
    z = filled_net.front.layers[:3](x[:1])[0].mT
    assert largest(padded(z.roll(37, -1)), padded(z).roll(37, -1)) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("seed", range(5))
def test_random_weights_cannot_move_a_delay(seed):
    torch.manual_seed(seed)
    front = m.FrontEnd(width=6, taps=101, use_sinc=bool(seed % 2)).eval()
    sound = torch.randn(1, 2048)
    features = front(torch.stack([sound.roll(-14, -1), sound], 1))
    gcc = m.channel_gcc(features, mic_pairs(2), 23)
    assert (gcc.argmax(-1) - 23 == -14).all()  # every channel of its own


# --- the fast ways against torch's own ------------------------------------------------------------

@pytest.mark.parametrize("time, taps", [(64, 11), (70, 7), (45, 9)])
def test_tiles_are_the_circular_convolution_and_its_slope(time, taps):
    g = torch.Generator().manual_seed(time)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)
    x, w, b = draw(9, time, 5), draw(6, 5, taps), draw(6)
    ours = m.circular_conv(x, w, b)
    theirs = F.conv1d(F.pad(x.mT, (taps // 2, taps // 2), mode="circular"), w, b).mT
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slope = torch.randn(ours.shape, generator=g, dtype=torch.float64)
    for a, e in zip(torch.autograd.grad(ours, (x, w, b), slope),
                    torch.autograd.grad(theirs, (x, w, b), slope)):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize("max_lag", [5, 60])  # by matrices, by a transform
def test_correlations_and_their_slope(max_lag):
    g = torch.Generator().manual_seed(max_lag)
    z = torch.randn(3, 3, 40, 100, generator=g, dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    ours = m.channel_gcc(z, pairs, max_lag)
    spectrum = torch.fft.rfft(z, 200)
    cross = spectrum[:, pairs[:, 0]] * spectrum[:, pairs[:, 1]].conj()
    gcc = torch.fft.irfft(cross / (cross.abs() + 1e-3), 200)
    theirs = torch.cat([gcc[..., -max_lag:], gcc[..., :max_lag + 1]], -1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    slope = torch.randn(ours.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(r, z, slope)[0] for r in (ours, theirs)),
                               rtol=0, atol=1e-12)


# --- labels and answers ---------------------------------------------------------------------------

def test_labels():
    shared, rounded = (m.lag_targets(torch.tensor([2.25, -3.0, 5.4]), 5, split)
                       for split in (True, False))
    assert shared[0, 7:9].tolist() == [0.75, 0.25]
    assert rounded[0].tolist() == [0.0] * 7 + [1.0] + [0.0] * 3
    assert shared[2, -1] == rounded[2, -1] == 1 and shared[1, 2] == 1
    torch.testing.assert_close(shared.sum(-1), torch.ones(3))
    with pytest.raises(ValueError, match="delay: 5.50 samples"):
        m.lag_targets(torch.tensor(-5.5), 5)


def test_answers():
    p = torch.tensor([0.1, 0.0, 0.0, 0.5, 0.4]).clamp(min=1e-12)
    peak, refined, median = (m.decode_lags(p.log(), how) for how in m.DECODINGS)
    assert peak.delay == 1 and abs(refined.delay - (0.5 * 1 + 0.4 * 2) / 0.9) < 1e-6
    assert abs(median.delay - (0.5 + 0.4 / 0.5)) < 1e-5  # 0.1 before, 0.4 of the 0.5 of this lag
    assert abs(peak.spread - (0.1 * 3**2 + 0.4 * 1) ** 0.5) < 1e-6
    with pytest.raises(ValueError, match="odd"): m.decode_lags(torch.zeros(4))


# --- what is refused ------------------------------------------------------------------------------

@pytest.mark.parametrize("audio, message", [
    (torch.randn(3, 2048), "audio: has 3 channels"),
    (torch.randn(1, 2048), "audio: has 1 channels"),
    (torch.randn(2, 1000), "audio: has 1000 samples.*1023 taps"),
    (torch.full((2, 2048), torch.nan), "audio")])
def test_windows_that_are_refused(audio, message):
    with pytest.raises(ValueError, match=message): m.NgccPhat(width=4)(audio)


def test_other_refusals():
    with pytest.raises(ValueError, match="odd"): m.NgccPhat(taps=100)
    with pytest.raises(ValueError, match="head"): m.NgccPhat(head="both")
    with pytest.raises(ValueError, match="max_lag"): m.PgccPhat(max_lag=4)
    with pytest.raises(ValueError, match="audio: has 20 samples"): m.PgccPhat()(torch.randn(2, 20))


@torch.no_grad()
def test_silence_and_lists_are_answered():
    net = m.NgccPhat(width=4, taps=101).eval()
    assert net(torch.zeros(2, 512)).isfinite().all()
    x = np.random.RandomState(0).standard_normal((2, 512)).astype("float32")
    assert net(x.tolist()).equal(net(torch.tensor(x)))


# --- the weights of the book ----------------------------------------------------------------------

@torch.no_grad()
def test_card_of_the_weights():
    folder = load_settings().data / "models" / "ngcc_phat"
    card, net = json.loads((folder / "card.json").read_text(encoding="utf-8")), m.load_trained()
    assert (folder / "weights.safetensors").stat().st_size < 4e6
    check = card["check"]  # noise, delayed by a closed form; other numbers of the card take minutes
    g = torch.Generator().manual_seed(check["seed"])
    sound, delay = torch.randn(64, 2304, generator=g), 40 * torch.rand(64, generator=g) - 20
    audio = torch.stack([fractional_delay(sound, delay), sound], 1)[..., 128:-128]
    scores = net(m.unit_level(add_noise(audio, check["snr_db"], g)))
    error = (m.decode_lags(scores).delay - delay).abs().median()
    assert float(error) == pytest.approx(check["median_error_samples"], abs=0.02)


@torch.no_grad()
def test_a_saved_net_comes_back_the_same(tmp_path):
    net = m.NgccPhat(max_lag=8, width=4, taps=101, use_sinc=False).eval()
    audio = torch.randn(2, 512)
    back = m.load_trained(m.save_trained(net, tmp_path / "run"))
    assert back(audio).equal(net(audio)) and back.max_lag == 8
    with pytest.raises(ValueError, match="at most 4 MB"):
        m.save_trained(m.NgccPhat(width=144), tmp_path / "large")


def test_localizer_finds_a_talker_and_says_what_it_needs():
    assert "ngcc_multilateration" in localizers()
    method, g = localizer("ngcc_multilateration"), torch.Generator().manual_seed(1)
    mics = torch.tensor([3.0, 2.0, 1.2]) + 0.25 * torch.cat([torch.eye(3), -torch.eye(3)])
    talker = torch.tensor([2.2, 2.6, 1.5])
    sound = torch.randn(16000, generator=g)
    response = rirs(Room((6, 4, 2.5), 0.0), talker, mics, 16000)
    audio = add_noise(reverberate(sound, response), 20.0, g)
    found = method(audio, mics, 16000, room=(6, 4, 2.5), hop=0.2)
    assert (found.points[:, 0] - talker).norm(dim=-1).nanmedian() < 0.2 and not found.far_field
    assert found.points.shape == (len(found.times), 1, 3) and (found.spread >= 0).all()
    for changed, message in (((audio, mics, 8000), "16000 Hz only"),
                             ((audio[:4], mics[:4], 16000), "at least 5")):
        with pytest.raises(ValueError, match=message): method(*changed, room=(6, 4, 2.5))
