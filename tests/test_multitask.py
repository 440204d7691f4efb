"""Several tasks in one net: what the chapter cannot show, namely bad input, invariances, gradients
and reference formulas."""
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from ssl_nb.end_to_end import multitask as mt
from ssl_nb.workshop.training import fit

SIZE, SMALL = (5.0, 4.0, 3.0), {"size": (5.0, 4.0, 3.0), "widths": (8, 12, 16)}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(kind, **options):
    torch.manual_seed(0)
    return kind(**(SMALL | options)).eval()


# --- SI-SDR ---------------------------------------------------------------------------------------

def test_si_sdr_is_a_function_of_the_angle_alone():
    a, n = randn(2, 7, 500, dtype=torch.float64)
    b = 0.3 * a + n
    # NumPy's correlation removes means, too
    cosine = np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
    np.testing.assert_allclose(mt.si_sdr(a, b), 10 * np.log10(cosine**2 / (1 - cosine**2)),
                               atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10), seed=st.integers(0, 99))
def test_si_sdr_ignores_level_sign_and_offset(scale, offset, seed):
    a, b = randn(2, 300, seed=seed, dtype=torch.float64)
    for x, y in ((-scale * a + offset, b), (a, -scale * b + offset)):
        torch.testing.assert_close(mt.si_sdr(x, y), mt.si_sdr(a, b), rtol=0, atol=1e-4)


def test_si_sdr_of_a_perfect_or_useless_estimate_is_finite_and_has_a_gradient():
    s = randn(200, dtype=torch.float64)
    n = torch.linalg.qr(torch.stack([torch.ones(200, dtype=torch.float64), s,
                                     randn(200, seed=1, dtype=torch.float64)], 1)).Q[:, 2]
    for estimate, least, most in ((s, 90, 110), (n, -110, -90)):
        x = estimate.clone().requires_grad_()
        value = mt.si_sdr(x, s)
        assert least < value < most
        value.backward()
        assert torch.isfinite(x.grad).all()


def test_si_sdr_has_the_right_gradient():
    a, b = randn(2, 3, 40, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mt.si_sdr(x, b), a.requires_grad_())


def test_si_sdr_refuses_silence_and_unequal_lengths():
    s = randn(3, 100)
    for bad, words in ((torch.zeros(3, 100), "signal .*not defined"),
                       (torch.ones(3, 100), "signal .*not defined"),
                       (torch.full((3, 100), math.nan), "nan at index .*must be finite")):
        with pytest.raises(ValueError, match=f"estimates: {words}"): mt.si_sdr(bad, s)
        with pytest.raises(ValueError, match=f"references: {words}"): mt.si_sdr(s, bad)
    with pytest.raises(ValueError, match="99 samples, references: 100"): mt.si_sdr(s[:, :99], s)


# --- order ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_permutation_is_the_assignment_of_scipy(n):
    costs = randn(4, 6, n, n)
    expected = [scipy.optimize.linear_sum_assignment(c)[1] for c in costs.reshape(-1, n, n).numpy()]
    np.testing.assert_array_equal(mt.best_permutation(costs).reshape(-1, n), expected)


@pytest.mark.parametrize("shape", [(2, 3), (7, 7), (0, 0)])
def test_best_permutation_refuses(shape):
    with pytest.raises(ValueError, match="costs"): mt.best_permutation(torch.zeros(*shape))


def test_in_order_puts_values_of_any_shape():
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])
    for shape in ((), (3,), (2, 5)):
        values = randn(2, 3, *shape)
        assert torch.equal(mt.in_order(values, order),
                           torch.stack([v[o] for v, o in zip(values, order)]))


def test_one_order_serves_both_tasks():
    truth = {"sources": 4 * randn(20, 3, 3).abs(), "images": randn(20, 3, 400),
             "audio": torch.zeros(20)}
    shuffle = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(k))
                           for k in range(20)])
    outputs = {"positions": mt.in_order(truth["sources"], shuffle),
               "signals": mt.in_order(truth["images"], shuffle)}
    loss = mt.MultiTaskLoss({"position": mt.pair_position_costs, "signal": mt.pair_signal_costs},
                            permuted=True)
    costs = {name: task(outputs, truth) for name, task in loss.tasks.items()}
    order = loss.order(costs)
    assert (torch.equal(mt.in_order(outputs["positions"], order), truth["sources"])
            and torch.equal(mt.in_order(outputs["signals"], order), truth["images"]))
    parts = loss(lambda audio: outputs, truth)
    assert parts["position"] == 0 and parts["signal"] < -90
    # positions in one order, signals in another
    crossed = outputs | {"signals": outputs["signals"].flip(1)}
    parts = loss(lambda audio: crossed, truth)
    assert parts["position"] > 0.1 or parts["signal"] > 0


# --- separation -----------------------------------------------------------------------------------

@pytest.mark.parametrize("decoder", ["mask", "draw"])
@pytest.mark.parametrize("samples", [1088, 1089, 2048, 3001])
def test_signals_have_the_length_of_the_input(decoder, samples):
    out = net(mt.SeparatingLocalizer, decoder=decoder, n_sources=3)(randn(2, 4, samples))
    assert out["signals"].shape == (2, 3, samples) and out["positions"].shape == (2, 3, 3)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_any_leading_dimensions(lead):
    audio = randn(*lead, 4, 1600)
    for kind, name, shape in ((mt.SeparatingLocalizer, "signals", (2, 1600)),
                              (mt.SeparatingLocalizer, "positions", (2, 3)),
                              (mt.RecognizingLocalizer, "logits", (1, 10))):
        model = net(kind)
        assert model(audio)[name].shape == (*lead, *shape)
        torch.testing.assert_close(model(audio)[name].reshape(-1, *shape),
                                   model(audio.reshape(-1, 4, 1600))[name], rtol=1e-4, atol=1e-5)
    model = mt.TrackingLocalizer(size=SIZE, widths=(8, 12), hidden=6).eval()
    assert model(randn(*lead, 5, 4, 800))["velocities"].shape == (*lead, 5, 3)


def test_open_masks_give_back_the_reference_microphone_sample_by_sample():
    model = net(mt.SeparatingLocalizer, n_basis=80)
    with torch.no_grad():
        model.decoder.masks.weight.zero_(); model.decoder.masks.bias.fill_(50.0)
        model.decoder.analysis.weight.copy_(torch.eye(80).unsqueeze(1))
        model.decoder.synthesis.weight.copy_(torch.eye(80).unsqueeze(1) / 5)
        model.decoder.synthesis.bias = None
    audio = 0.01 * randn(2, 4, 2501)
    torch.testing.assert_close(model(audio)["signals"], audio[:, :1].expand(-1, 2, -1), rtol=1e-4,
                               atol=1e-7)


def test_loudness_moves_signals_and_not_positions():
    model, audio = net(mt.SeparatingLocalizer), randn(2, 4, 2000)
    quiet, loud = model(audio), model(100 * audio)
    torch.testing.assert_close(quiet["positions"], loud["positions"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(100 * quiet["signals"], loud["signals"], rtol=1e-3, atol=1e-3)
    assert not model(torch.zeros(1, 4, 2000))["signals"].any()


def test_positions_alone_are_the_same_positions():
    model, audio = net(mt.SeparatingLocalizer), randn(2, 4, 2000)
    assert torch.equal(model.locate(audio), model(audio)["positions"])


def test_positions_start_in_the_middle_of_the_room():
    model = net(mt.SeparatingLocalizer)
    with torch.no_grad(): model.head[-1].weight.zero_(); model.head[-1].bias.zero_()
    assert torch.equal(model.locate(randn(1, 4, 1600))[0, 0], torch.tensor(SIZE) / 2)
    with torch.no_grad(): model.head[-1].bias.fill_(1.0)
    assert torch.equal(model.locate(randn(1, 4, 1600))[0, 1], torch.tensor(SIZE))


@pytest.mark.parametrize("decoder", ["mask", "draw"])
def test_every_weight_of_a_separator_is_trained(decoder):
    model = net(mt.SeparatingLocalizer, decoder=decoder).train()
    loss = mt.MultiTaskLoss({"position": mt.pair_position_costs, "signal": mt.pair_signal_costs},
                            permuted=True)
    loss(model, {"audio": randn(4, 4, 2000), "images": randn(4, 2, 2000),
                 "sources": randn(4, 2, 3)})["loss"].backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [name for name in still if not name.endswith("blocks.0.0.bias")
                and ".0.bias" not in name], still  # batch norm removes biases before it


# --- tracking -------------------------------------------------------------------------------------

def tracker(**options):
    torch.manual_seed(0)
    return mt.TrackingLocalizer(size=SIZE, widths=(8, 12), hidden=10, **options).eval()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_causal_tracker_does_not_hear_the_future_and_the_other_does(layers):
    audio = randn(2, 6, 4, 800)
    for t in range(1, 6):
        later = torch.cat([audio[:, :t], randn(2, 6 - t, 4, 800, seed=t)], 1)
        for name in ("positions", "velocities"):
            a, b = (tracker(causal=True, layers=layers)(x)[name] for x in (audio, later))
            assert torch.equal(a[:, :t], b[:, :t]) and not torch.allclose(a[:, t], b[:, t])
    a, b = (tracker(layers=layers)(x)["positions"] for x in (audio, later))
    assert not torch.allclose(a[:, :t], b[:, :t])


def test_folded_frames_are_frames_one_by_one():
    model, audio = tracker(), randn(3, 5, 4, 800)
    torch.testing.assert_close(model.features(audio),
                               torch.stack([model.encoder(audio[:, t]).mean(-1) for t in range(5)],
                                           1), rtol=1e-4, atol=1e-5)
    # time has a direction
    assert not torch.equal(*[model(x)["positions"].sum(1) for x in (audio, audio.flip(1))])


def test_cut_frames_starts_frame_k_at_k_hops():
    audio = randn(3, 2, 100)
    cut = mt.cut_frames(audio, 30, 20)
    assert cut.shape == (3, 4, 2, 30) and all(torch.equal(cut[:, k], audio[..., 20 * k:20 * k + 30])
                                              for k in range(4))


def test_velocity_residual_vanishes_for_constant_acceleration_and_measures_a_wrong_speed():
    t = torch.arange(0, 3, 0.2, dtype=torch.float64)[:, None]
    start, speed, push = randn(3, 4, 1, 3, dtype=torch.float64)
    p, v = start + speed * t + push * t**2 / 2, speed + push * t
    assert mt.velocity_residual(p, v, 0.2).abs().max() < 1e-12
    torch.testing.assert_close(mt.velocity_residual(p, v - 0.7, 0.2),
                               torch.full((4, 14, 3), 0.7, dtype=torch.float64))
    cost = mt.tie_costs(0.2)({"positions": p, "velocities": v - 0.7}, {})
    # Huber with its corner at 0.2
    torch.testing.assert_close(cost, torch.full((4, 14), 0.7 - 0.1, dtype=torch.float64))


# --- recognition ----------------------------------------------------------------------------------

def test_word_costs_are_the_cross_entropy():
    logits, words = randn(6, 1, 10,
                          dtype=torch.float64), torch.tensor([[0], [9], [3], [3], [1], [5]])
    expected = (np.log(np.exp(logits[:, 0].numpy()).sum(-1))
                - logits[:, 0].numpy()[range(6), words[:, 0]])
    np.testing.assert_allclose(mt.word_costs({"logits": logits}, {"words": words})[:, 0], expected)


def test_the_mean_forgets_the_order_of_frames_and_the_gru_does_not():
    for listen, same in (("mean", True), ("order", False)):
        model = net(mt.RecognizingLocalizer, listen=listen)
        features, answers = randn(3, 16, 9), []
        for frames in (features, features.flip(-1)):
            model.encoder.forward = lambda audio: frames
            answers.append(model(randn(3, 4, 1600)))
        torch.testing.assert_close(answers[0]["positions"], answers[1]["positions"], rtol=1e-4,
                                   atol=1e-5)
        assert torch.allclose(answers[0]["logits"], answers[1]["logits"], atol=1e-5) == same


# --- the loss -------------------------------------------------------------------------------------

def constant(value): return lambda outputs, batch: outputs["x"] * 0 + value


def test_weights_by_hand_are_a_weighted_sum_and_parts_stay_in_the_graph():
    loss = mt.MultiTaskLoss({"a": lambda o, b: o["x"], "b": lambda o, b: o["x"] ** 2},
                            {"a": 2.0, "b": 0.5})
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    parts = loss(lambda audio: {"x": x}, {"audio": torch.zeros(1)})
    assert set(parts) == {"loss", "a", "b"} and all(isinstance(p, torch.Tensor) and p.requires_grad
                                                    and p.numel() == 1 for p in parts.values())
    torch.testing.assert_close(parts["loss"], torch.tensor(2 * 2.0 + 0.5 * 5.0))
    parts["b"].backward()
    torch.testing.assert_close(x.grad, x.detach())  # of the mean of squares of two


def test_learned_weights_start_where_told_and_have_the_gradient_of_the_paper():
    loss = mt.MultiTaskLoss({"a": constant(3.0), "b": constant(0.2)}, {"a": 2.0, "b": 0.5},
                            learned=True)
    parts = loss(lambda audio: {"x": torch.zeros(4)}, {"audio": torch.zeros(1)})
    s = -np.log([2.0, 0.5])
    np.testing.assert_allclose(parts["loss"].item(), 2 * 3 + 0.5 * 0.2 + s.sum() / 2, rtol=1e-5)
    parts["loss"].backward()
    np.testing.assert_allclose(loss.log_variances.grad, [0.5 - 2 * 3, 0.5 - 0.5 * 0.2], rtol=1e-5)
    assert parts["weight_a"] == 2.0 and not parts["weight_a"].requires_grad


def test_the_order_is_chosen_by_the_weights():
    costs = {"a": torch.tensor([[[0.0, 1], [1, 0]]]), "b": torch.tensor([[[1.0, 0], [0, 1]]])}
    tasks = {name: (lambda o, b, name=name: costs[name] + o["x"]) for name in costs}
    for weights, chosen in (({"a": 2.0, "b": 1.0}, 0.0), ({"a": 1.0, "b": 2.0}, 1.0)):
        for learned in (False, True):
            loss = mt.MultiTaskLoss(tasks, weights, learned, permuted=True)
            assert loss(lambda audio: {"x": 0}, {"audio": torch.zeros(1)})["a"] == chosen


def test_fit_trains_the_weights_with_the_net_and_reads_the_named_input():
    data = [{"features": x, "sources": 2 * x} for x in randn(40, 1, 3)]
    class Line(torch.nn.Linear):
        def forward(self, x): return {"positions": super().forward(x)}
    torch.manual_seed(0)
    loss = mt.MultiTaskLoss({"position": mt.position_costs,
                             "other": lambda o, b: o["positions"].square().mean(-1) * 0 + 8.0},
                            learned=True, inputs="features")
    history = fit(Line(3, 3), DataLoader(data, 10), None, loss, 150, 0.03, progress=False)
    assert history["train_position"].iloc[-1] < 0.05 * history["train_position"].iloc[0]
    assert (history["train_weight_other"].iloc[-1] == pytest.approx(1 / 16, rel=0.1)
            and history["train_weight_position"].iloc[-1] > 5)


@pytest.mark.parametrize("make, message", [
    (lambda: mt.SeparatingLocalizer(size=SIZE, decoder="magic"), "decoder='magic'"),
    (lambda: mt.SeparatingLocalizer(size=SIZE, n_sources=0), "n_sources=0"),
    (lambda: mt.SeparatingLocalizer(size=(5, -4, 3)), "-4"),
    (lambda: mt.SeparatingLocalizer(size=SIZE)(torch.zeros(1, 3, 2000)),
     "3 channels, needs one for each of 4"),
    (lambda: mt.SeparatingLocalizer(size=SIZE)(torch.zeros(1, 4, 1087)),
     "1087 samples, needs at least 1088"),
    (lambda: mt.SeparatingLocalizer(size=SIZE).locate(torch.zeros(1, 4, 5)), "5 samples"),
    (lambda: mt.TrackingLocalizer(size=SIZE)(torch.zeros(4, 2000)), "cut_frames"),
    (lambda: mt.TrackingLocalizer(size=SIZE, hidden=0), "hidden=0"),
    (lambda: mt.RecognizingLocalizer(size=SIZE, listen="well"), "listen='well'"),
    (lambda: mt.RecognizingLocalizer(size=SIZE, n_classes=0), "n_classes=0"),
    (lambda: mt.RecognizingLocalizer(size=SIZE)(torch.zeros(4, 100)), "100 samples"),
    (lambda: mt.MultiTaskLoss({}), "weights"),
    (lambda: mt.MultiTaskLoss({"a": constant(1)}, {"b": 1.0}), "weights"),
    (lambda: mt.MultiTaskLoss({"a": constant(1)}, {"a": -1.0}), "weights"),
    (lambda: mt.MultiTaskLoss({"a": constant(1)}, {"a": math.nan}), "weights"),
    (lambda: mt.MultiTaskLoss({"a": constant(1)}, {"a": 0.0},
                              learned=True), "positive where learned"),
    (lambda: mt.MultiTaskLoss({"loss": constant(1)}), "named 'loss'"),
    (lambda: mt.MultiTaskLoss({"a": constant(-1.0)}, learned=True)(lambda x: {"x": torch.zeros(
        2)}, {"audio": torch.zeros(1)}), "never negative"),
    (lambda: mt.position_costs({"positions": torch.zeros(2, 1, 3)},
                               {"sources": torch.zeros(2, 3)}), "sources"),
    (lambda: mt.velocity_costs({"velocities": torch.zeros(2, 5, 3)},
                               {"velocities": torch.zeros(2, 1, 3)}), "velocities"),
    (lambda: mt.velocity_residual(torch.zeros(1, 3), torch.zeros(1, 3), 0.1), "two frames"),
    (lambda: mt.velocity_residual(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "interval"),
    (lambda: mt.word_costs({"logits": torch.zeros(2, 1, 10)},
                           {"words": torch.tensor([[-1], [3]])}), "kind='digit'"),
    (lambda: mt.word_costs({"logits": torch.zeros(2, 1, 10)},
                           {"words": torch.tensor([[10], [3]])}), "0 to 9"),
    (lambda: mt.word_costs({"logits": torch.zeros(2, 1, 10)},
                           {"words": torch.tensor([3, 3])}), "words"),
    (lambda: mt.cut_frames(torch.zeros(2, 10), 11, 5), "10 samples"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message): make()
