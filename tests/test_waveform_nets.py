"""End-to-end nets: what is refused, what must not move the answer, and gradients that cannot break
a filter."""
import copy

import numpy as np
import pytest
import scipy.signal, scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from ssl_nb.end_to_end.waveform_nets import (
    LOSSES, AttentionLocalizer, ChannelAttention, DirectionTarget, RoomTarget, SincConv,
    SincLocalizer, WaveformCNN, WaveformEncoder, attention_weights, coverage, delay_responses,
    dense_head, gaussian, input_gradient, localization_loss, mc_dropout, multiply_accumulates,
    n_parameters, position_metric, receptive_field, run_batched, sinc_filters, unit_level)
from torch import nn

NETS = [WaveformCNN, AttentionLocalizer, SincLocalizer]


def audio(*batch, mics=4, time=2000, seed=0):
    return torch.randn(*batch, mics, time, generator=torch.Generator().manual_seed(seed))


# --- shapes and bad input -------------------------------------------------------------------------

@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_any_batch_and_the_same_answers_in_it(net, batch):
    model, x = net().eval(), audio(*batch)
    with torch.no_grad(): y = model(x)
    assert y.shape == (*batch, 3)
    with torch.no_grad():
        alone = torch.stack([model(one) for one in x.reshape(-1, 4, 2000)]).reshape(y.shape)
    torch.testing.assert_close(y, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net",
                         [*NETS, lambda **o: SincLocalizer(stride=4, pool=2, **o),
                          lambda **o: WaveformCNN(kernel=40, stride=8, widths=(8, 8, 8, 8), **o)])
def test_least_samples_is_the_least(net):
    model = net().eval()
    least = model.encoder.least_samples if hasattr(model, "encoder") else model.least_samples
    assert model(audio(time=least)).isfinite().all()
    with pytest.raises(ValueError, match=f"audio: has {least - 1} samples, needs at least {least}"):
        model(audio(time=least - 1))
    # one sample less really is too short, not just forbidden
    inner = model.encoder.blocks if hasattr(model, "encoder") else model.blocks
    with pytest.raises(RuntimeError):
        inner(audio(1, time=least - 1) if hasattr(model, "encoder")
              else model.sinc(audio(1, time=least - 1)))


@pytest.mark.parametrize("net", NETS)
def test_microphones_are_counted(net):
    with pytest.raises(ValueError, match="audio: has 3 channels, needs one for each of 4"):
        net()(audio(2, mics=3))
    assert net(n_channels=6, n_outputs=5).eval()(audio(2, mics=6)).shape == (2, 5)


@pytest.mark.parametrize("make, words", [
    (lambda: WaveformCNN(n_channels=0), "n_channels=0"),
    (lambda: WaveformCNN(n_outputs=0), "n_outputs=0"),
    (lambda: WaveformCNN(widths=(4, 0)), r"widths\[1\]=0"),
    (lambda: WaveformCNN(dropout=1.0), "dropout=1.0"),
    (lambda: WaveformEncoder(stride=0), "stride=0"),
    (lambda: ChannelAttention(8, 9), "reduction=9"),
    (lambda: SincConv(taps=250), "taps=250"), (lambda: SincConv(n_filters=0), "n_filters=0"),
    (lambda: SincConv(min_low=7990.0), "min_low=7990.0"),
    (lambda: SincConv(min_band=0.0), "min_band=0.0"),
    (lambda: sinc_filters(torch.tensor([300.0]), torch.tensor([200.0]), 51), "low < high"),
    (lambda: sinc_filters(torch.tensor([300.0]), torch.tensor([9000.0]), 51), "8000"),
    (lambda: sinc_filters(torch.tensor([300.0]), torch.tensor([float("nan")]), 51),
     "high: nan at index"),
    (lambda: dense_head((4, 4), -0.1), "dropout=-0.1"),
    (lambda: RoomTarget((5, 0, 3)), "size=.*three positive"),
    (lambda: RoomTarget((5, float("inf"), 3)), "size=.*three positive"),
    (lambda: localization_loss(RoomTarget((1, 1, 1)), "l1"), "loss='l1'"),
    (lambda: gaussian(torch.zeros(2, 5)), "shape .2, 5."),
    (lambda: mc_dropout(WaveformCNN(dropout=0.0), audio(2)), "WaveformCNN has no dropout"),
    (lambda: mc_dropout(WaveformCNN(), audio(2), 0), "draws=0"),
    (lambda: attention_weights(WaveformCNN(), audio(2)), "has no ChannelAttention"),
    (lambda: receptive_field([(3, 0)]), "stride=0"), (lambda: delay_responses(3, [50]), "lags=50"),
    (lambda: coverage(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0.5])),
     "sigma: .*must be positive"),
])
def test_bad_input_is_refused(make, words):
    with pytest.raises(ValueError, match=words): make()


# --- levels and parameters ------------------------------------------------------------------------

@pytest.mark.parametrize("net", NETS)
def test_a_gain_on_all_microphones_changes_nothing_and_silence_gives_numbers(net):
    model, x = net().eval(), audio(2)
    torch.testing.assert_close(model(1e-3 * x), model(x), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(model(x * torch.tensor([1.0, 0.3, 1.0, 1.0])[:, None]), model(x),
                              atol=1e-4)
    assert model(torch.zeros(2, 4, 2000)).isfinite().all()


def test_the_sizes_are_the_tutorials():
    assert n_parameters(WaveformCNN()) == 186_051 and n_parameters(AttentionLocalizer()) == 220_995
    assert (n_parameters(SincConv()) == 160 and n_parameters(SincLocalizer()) == 160
            + (320 * 60 * 5 + 60) + (60 * 60 * 5 + 60) + 4 * 60 + (60 * 128 + 128) + (128 * 3 + 3))


def test_multiply_accumulates_of_a_linear_layer():
    assert multiply_accumulates(nn.Linear(7, 5), torch.zeros(2, 3, 7)) == 2 * 3 * 7 * 5


# --- sinc filters ---------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.floats(1, 7900), st.floats(1, 7900)), min_size=1, max_size=5),
       st.integers(5, 150))
@settings(max_examples=40, deadline=None)
def test_filters_are_those_of_scipy(bands, half):
    low, high = (torch.tensor([f(a, b + 20 if a <= b else b) for a, b in bands],
                              dtype=torch.float64)
                 for f in (min, lambda a, b: min(max(a, b) + 20, 7990)))
    low = torch.minimum(low, high - 10)
    outside = np.stack([scipy.signal.firwin(2 * half + 1, [max(float(a), 1e-3), float(b)],
                                            pass_zero=False, window="hamming", fs=16000)
                        for a, b in zip(low, high)])
    np.testing.assert_allclose(sinc_filters(low.clamp(min=1e-3), high, 2 * half + 1).numpy(),
                               outside, atol=1e-8 * np.abs(outside).max())


@pytest.mark.parametrize("optimizer, lr", [(torch.optim.SGD, 1e4), (torch.optim.AdamW, 1.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_steps_cannot_break_the_bands(optimizer, lr, sign):
    layer = SincConv(n_filters=10, taps=31)
    step = optimizer(layer.parameters(), lr=lr)
    for _ in range(50):
        step.zero_grad()
        low, high = layer.cutoffs()
        (sign * (high - 2 * low).sum()).backward()
        step.step()
    low, high = layer.cutoffs()
    assert ((low >= 50 - 1e-2).all() and (high - low >= 50 - 1e-1).all() and (high <= 8000).all()
            and layer(audio(1)).isfinite().all())


def test_initial_bands_meet_and_are_even_on_the_mel_scale():
    low, high = (f.detach().double() for f in SincConv(n_filters=20).cutoffs())
    mel = lambda f: 2595 * torch.log10(1 + f / 700)
    assert ((mel(high) - mel(low)).std() < 0.03 * (mel(high) - mel(low)).mean()
            and (high[:-1] - low[1:]).abs().max() < 2 and abs(float(high[-1]) - 8000) < 10)


def test_cutoffs_get_gradients_that_finite_differences_confirm():
    layer = SincConv(n_filters=4, taps=31).double()
    x = audio(1).double()
    loss = lambda: (layer(x)[..., ::7] ** 2).sum()
    loss().backward()
    for p in (layer.low_raw, layer.band_raw):
        with torch.no_grad():
            p[2] += 1e-6; up = loss(); p[2] -= 2e-6; down = loss(); p[2] += 1e-6
        torch.testing.assert_close(p.grad[2], (up - down) / 2e-6, rtol=1e-4, atol=1e-7)


def test_every_filter_hears_every_microphone_in_the_documented_order():
    layer, x = SincConv(n_filters=5, taps=31), audio(2, mics=3)
    out, filters = layer(x), sinc_filters(*layer.cutoffs(), 31).detach().numpy()
    assert out.shape == (2, 15, 2000)
    np.testing.assert_allclose(out[1, 2 * 5 + 4].detach().numpy(),
                               np.convolve(x[1, 2].numpy(), filters[4], "same"), atol=1e-4)


# --- hearing delays -------------------------------------------------------------------------------

@given(st.integers(-39, 40))
@settings(max_examples=20, deadline=None)
def test_the_filter_with_the_right_lag_answers_most(delay):
    assert int(delay_responses(delay).argmax()) - 39 == delay


def test_a_delay_beyond_the_kernel_leaves_no_trace():
    heard = delay_responses(200)
    assert float(heard.max() - heard.min()) < 0.02


# --- targets, losses, error bars ------------------------------------------------------------------

def test_targets_go_there_and_back():
    places = torch.rand(2, 5, 3,
                        generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 4.0, 3.0])
    room, direction = RoomTarget((5, 4, 3)), DirectionTarget((1.0, 2.0, 0.5))
    torch.testing.assert_close(room.decode(room.encode(places)), places)
    assert room.encode(places).abs().max() <= 1
    torch.testing.assert_close(direction.encode(places).norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(direction.decode(3 * direction.encode(places)),
                               direction.encode(places))


def test_losses_against_numpy_and_scipy():
    g = torch.Generator().manual_seed(0)
    outputs, target = torch.randn(6, 3, generator=g), torch.randn(6, 3, generator=g)
    d = (outputs - target).numpy()
    assert abs(float(LOSSES["mse"](outputs, target)) - (d**2).mean()) < 1e-6
    assert (abs(float(LOSSES["euclidean"](outputs, target)) - np.linalg.norm(d, axis=1).mean())
            < 1e-6)
    assert abs(float(LOSSES["huber"](outputs, target))
               - np.where(abs(d) < 1, d**2 / 2, abs(d) - 0.5).mean()) < 1e-6
    both = torch.randn(6, 6, generator=g)
    mean, sigma = gaussian(both)
    np.testing.assert_allclose(sigma.numpy(), np.log1p(np.exp(both[:, 3:].numpy())) + 1e-3,
                               rtol=1e-5)
    outside = -scipy.stats.norm.logpdf(target.numpy(), mean.numpy(),
                                       sigma.numpy()).sum(1).mean() - 1.5 * np.log(2 * np.pi)
    assert abs(float(LOSSES["gaussian"](both, target)) - outside) < 1e-5
    same = torch.zeros(2, 3, requires_grad=True)
    LOSSES["euclidean"](same, torch.zeros(2, 3)).backward()
    assert same.grad.isfinite().all()


def test_loss_and_metric_on_a_batch():
    room, x = RoomTarget((5, 4, 3)), audio(6)
    batch = {"audio": x,
             "sources": torch.rand(6, 1, 3, generator=torch.Generator().manual_seed(1)) * 3}
    perfect = lambda a: room.encode(batch["sources"][:, 0])
    for name in ("mse", "huber", "euclidean"):
        assert float(localization_loss(room, name)(perfect, batch, 0)) < 1e-5
    assert float(position_metric(room)(perfect, batch)) < 1e-5
    off = lambda a: torch.cat([room.encode(batch["sources"][:, 0] + torch.tensor([0.3, 0.4, 0.0])),
                               torch.zeros(6, 3)], -1)
    assert abs(float(position_metric(room, "gaussian")(off, batch)) - 0.5) < 1e-5


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_coverage_is_that_of_the_chi_squared_distribution(dim):
    noise, levels = (torch.randn(20_000, dim, generator=torch.Generator().manual_seed(dim)),
                     torch.tensor([0.1, 0.5, 0.9]))
    for wide in (0.5, 1.0, 2.0):
        outside = scipy.stats.chi2.cdf(wide**2 * scipy.stats.chi2.ppf(levels.numpy(), dim), dim)
        np.testing.assert_allclose(coverage(noise, torch.full_like(noise, wide),
                                            torch.zeros_like(noise), levels).numpy(), outside,
                                   atol=0.015)


# --- helpers that must leave a net as it was ------------------------------------------------------

def test_helpers_leave_modes_statistics_and_the_global_generator_alone():
    net, x = AttentionLocalizer(), audio(5)
    net.train(); net.encoder.eval()
    modes, weights, state = ([m.training for m in net.modules()], copy.deepcopy(net.state_dict()),
                             torch.get_rng_state())
    run_batched(net, x, 2)
    net.encoder.eval()
    mc_dropout(net, x, 3)
    attention_weights(net, x)
    net.encoder.eval()
    input_gradient(net, x)
    net.encoder.eval()
    assert (torch.equal(state, torch.get_rng_state())
            and all(torch.equal(a, b) for a, b in zip(weights.values(), net.state_dict().values())))
    assert (net.training and all(p.grad is None for p in net.parameters())
            and not any(m._forward_hooks for m in net.modules()))
    mc_dropout(net, x, 3); assert [m.training for m in net.modules()] == modes


def test_dropout_draws_differ_follow_the_seed_and_average_to_the_nets_answer():
    net, x = WaveformCNN(dropout=0.3).eval(), audio(3)
    draws = mc_dropout(net, x, 400, seed=1)
    assert (torch.equal(draws, mc_dropout(net, x, 400, seed=1))
            and not torch.equal(draws, mc_dropout(net, x, 400, seed=2))
            and (draws.std(0) > 0).all())
    torch.testing.assert_close(draws.mean(0), run_batched(net, x), rtol=0,
                               atol=4 * float(draws.std(0).max()))


def test_the_input_gradient_is_that_of_finite_differences():
    net, x = WaveformCNN(widths=(4, 4, 4)).double().eval(), audio(2, time=1200).double()
    found = input_gradient(net, x)
    bump = torch.zeros_like(x); bump[1, 2, 600] = 1e-5
    with torch.no_grad(): outside = ((net(x + bump) - net(x - bump)) / 2e-5)[1].norm()
    torch.testing.assert_close(found[1, 2, 600], outside, rtol=1e-3, atol=1e-9)


def test_attention_scales_each_channel_by_its_weight():
    layer, x = ChannelAttention(8), audio(2, mics=8, time=30)
    w = layer.weights(x)
    hidden = lambda v: layer.mlp[2].weight @ torch.relu(layer.mlp[0].weight @ v)
    torch.testing.assert_close(w[1],
                               torch.sigmoid(hidden(x[1].mean(-1)) + hidden(x[1].max(-1).values)))
    torch.testing.assert_close(layer(x), x * w[..., None])


def test_receptive_field_against_gradients_of_plain_convolutions():
    layers = [(5, 2), (3, 1), (4, 3)]
    net = nn.Sequential(*[nn.Conv1d(1, 1, k, s) for k, s in layers])
    x = torch.zeros(1, 1, 200, requires_grad=True)
    net(x)[0, 0, 5].backward()
    touched = x.grad[0, 0].nonzero()
    assert int(touched.max() - touched.min()) + 1 == receptive_field(layers)[-1]


def test_unit_level_is_one_number_per_recording():
    x = audio(2) * torch.tensor([1.0, 2, 3, 4])[:, None]
    y = unit_level(x)
    torch.testing.assert_close(y.square().mean((-2, -1)), torch.ones(2))
    torch.testing.assert_close(y[0, 1] / y[0, 0], x[0, 1] / x[0, 0])


@pytest.mark.parametrize("net", [WaveformCNN, AttentionLocalizer, SincLocalizer])
def test_the_head_gets_the_mean_over_time(net):
    model, x, got, frames = net().eval(), audio(2), [], []
    model.head.register_forward_pre_hook(lambda m, inputs: got.append(inputs[0]))
    (model.encoder if hasattr(model, "encoder")
     else model).blocks.register_forward_hook(lambda m, inputs, output: frames.append(output))
    model(x)
    torch.testing.assert_close(got[0], frames[0].sum(-1) / frames[0].shape[-1])


# --- what is taken where a person would pass it ---------------------------------------------------

def test_arrays_and_lists_are_taken():
    model, x = WaveformCNN().eval(), audio(2)
    torch.testing.assert_close(run_batched(model, x.numpy()), run_batched(model, x))
    torch.testing.assert_close(input_gradient(model, x.numpy()), input_gradient(model, x))
    assert RoomTarget([5, 4, 3]).encode([[5, 4, 3]]).tolist() == [[1.0, 1.0, 1.0]]
    values = coverage(np.zeros((4, 2)), np.ones((4, 2)), [[0, 0], [9, 9], [9, 9], [9, 9]], [0.5])
    assert values.tolist() == [0.25]
