"""Training strategies: what the chapter cannot hold: bad input, properties, gradients,
resumption."""
import dataclasses, math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ssl_nb.end_to_end.training_strategies import (
    STAGES, AdversarialLoss, DomainAdversarialLocalizer, DomainPairs, MicGains, ShiftPretraining,
    Stage, TransferLocalizer, _Part, domain_probe, few_shot, fine_tune, principal_components,
    reversal_strength, reverse_gradient, ridge_head, shift_channels, stage_spec, train_curriculum)
from ssl_nb.end_to_end.waveform_nets import WaveformCNN, WaveformEncoder
from ssl_nb.workshop.scenes import SceneSpec
from ssl_nb.classical.gcc_phat import delays_from_gcc, gcc_phat
from ssl_nb.acoustics.rooms import Room
from ssl_nb.workshop.training import Cosine, fit, load_checkpoint

few = settings(max_examples=30, deadline=None)


def small_encoder():
    torch.manual_seed(0)
    return WaveformEncoder(4, widths=(4, 6, 8), kernel=16, stride=4)


def audio(n=8, seed=0): return torch.randn(n, 4, 600, generator=torch.Generator().manual_seed(seed))


class Scenes(Dataset):
    "Dictionaries with `audio` and `sources`, as a bank gives them; `offset` is added to the audio."
    def __init__(self, n, offset=0.0):
        self.audio, self.sources = (audio(n) + offset,
                                    torch.rand(n, 1, 3, generator=torch.Generator().manual_seed(1)))
    def __len__(self): return len(self.audio)
    def __getitem__(self, i): return {"audio": self.audio[i], "sources": self.sources[i]}
    def __getitems__(self, indices): return [self[i] for i in indices]


def position(answers, scenes): return F.mse_loss(answers, scenes["sources"][:, 0])
def position_loss(model, scenes, epoch): return position(model(scenes["audio"]), scenes)


# --- curriculum -----------------------------------------------------------------------------------

def test_the_stages_are_the_tutorials():
    assert [(s.name, s.changes["snr_db"], s.changes["t60"])
            for s in STAGES] == [("easy", (20, 30), (0.1, 0.2)), ("medium", (10, 20), (0.2, 0.4)),
                                 ("hard", (0, 10), (0.4, 0.6))]


@few
@given(st.floats(3, 12), st.floats(3, 12), st.floats(2.5, 5), st.floats(0.01, 0.5),
       st.floats(0, 0.5))
def test_a_stage_is_changed_only_where_no_room_could_have_it(x, y, z, low, more):
    base = SceneSpec(size=((3, x), (3, y), (2.5, z)), t60=(0.5, 1.0))
    spec, least = stage_spec(base,
                             Stage("s", {"t60": (low, low + more)}, 1)), Room((x, y, z)).min_t60()
    if low + more > least * 1.001: assert spec.t60 == (low, low + more)
    elif low + more < least: assert spec.t60[0] == spec.t60[1] == pytest.approx(least, rel=1e-5)
    assert dataclasses.replace(spec, t60=base.t60) == base


@pytest.mark.parametrize("base, changes, message", [
    (SceneSpec(), {"t_60": (0.1, 0.2)}, "changes 't_60', needs a field of SceneSpec"),
    (SceneSpec(method="anechoic", t60=(0, 0)), {"t60": (0.1, 0.2)},
     "method='anechoic' has no reflections"),
    (SceneSpec(), {"method": "anechoic", "t60": (0.1, 0.2)},
     "method='anechoic' has no reflections"),
    (SceneSpec(), {"snr_db": (20, 10)}, "snr_db"),
])
def test_bad_stages_are_refused(base, changes, message):
    with pytest.raises(ValueError, match=message): stage_spec(base, Stage("s", changes, 1))


@few
@given(st.integers(0, 20), st.integers(1, 20), st.floats(0, 3), st.floats(0, 1))
def test_parts_play_one_long_cosine(done, left, warmup, share):
    part, whole, t = _Part(warmup=warmup, done=done,
                           total=done + left), Cosine(warmup=warmup), share * left
    assert part.factor(t, 0.1, left) == whole.factor(done + t, 0.1, done + left)


def linear_problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=g)
    return TensorDataset(x,
                         x @ torch.randn(5, 1, generator=g) + 0.1 * torch.randn(40, 1, generator=g))

def squared(model, batch, epoch): return F.mse_loss(model(batch[0]), batch[1])

def line():
    torch.manual_seed(0)
    return nn.Linear(5, 1)


def test_stages_that_do_not_differ_are_plain_training():
    # no shuffling: every epoch is the same
    data, plain, staged = DataLoader(linear_problem(), batch_size=8), line(), line()
    fit(plain, data, None,
        squared, 6, optimizer=torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=0.02),
        schedule=Cosine(warmup=1), keep="last")
    table = train_curriculum(staged, lambda stage: (data, None), squared,
                             [Stage("a", {}, 1), Stage("b", {}, 3), Stage("c", {}, 2)], lr=0.05,
                             weight_decay=0.02)
    torch.testing.assert_close(staged.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    assert (table.epoch.tolist() == [1, 2, 3, 4, 5, 6]
            and table.stage.tolist() == ["a", "b", "b", "b", "c", "c"])


def test_a_plateau_ends_a_stage_and_the_last_gets_what_is_left():
    data, asked = DataLoader(linear_problem(), batch_size=8), []
    worse = iter(range(100))
    def rising(model, batch, epoch):  # the validation loss only rises
        return (squared(model, batch, epoch) if model.training
                else squared(model, batch, epoch) * 0 + next(worse))
    table = train_curriculum(line(), lambda stage: asked.append(stage.name) or (data, data), rising,
                             [Stage("a", {}, 5), Stage("b", {}, 5), Stage("c", {}, 2)], patience=2)
    assert table.stage.tolist() == ["a"] * 3 + ["b"] * 3 + ["c"] * 6 and asked == ["a", "b", "c"]


def test_every_stage_draws_other_numbers():
    drawn = []
    def noting(model, batch, epoch):
        drawn.append(float(torch.rand(())))
        return squared(model, batch, epoch)
    train_curriculum(line(),
                     lambda stage: (DataLoader(linear_problem(), batch_size=40, shuffle=True),
                                    None), noting, [Stage("a", {}, 1), Stage("b", {}, 1)])
    assert len(set(drawn)) == 2


@pytest.mark.parametrize("patience", [None, 1])
def test_a_killed_curriculum_goes_on_bit_for_bit(tmp_path, patience):
    data, stages = DataLoader(linear_problem(), batch_size=8,
                              shuffle=True), [Stage("a", {}, 2), Stage("b", {}, 3)]
    calls = iter(range(1, 1000))
    def interrupted(model, batch, epoch):
        if next(calls) == 37: raise KeyboardInterrupt
        return squared(model, batch, epoch)
    interrupted.__qualname__ = squared.__qualname__
    call = lambda model, loss, folder: train_curriculum(
        model, lambda stage: (data, data), loss, stages, lr=0.1, patience=patience, folder=folder)
    straight, resumed = line(), line()
    whole = call(straight, squared, None)
    with pytest.raises(KeyboardInterrupt): call(line(), interrupted, tmp_path)
    again = call(resumed, squared, tmp_path)
    assert (straight.weight.equal(resumed.weight)
            and whole.valid_loss.tolist() == again.valid_loss.tolist())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0_a", "1_b"]


def test_no_stage_is_refused():
    with pytest.raises(ValueError, match="needs at least one stage"):
        train_curriculum(line(), lambda stage: (None, None), squared, [])


# --- transfer -------------------------------------------------------------------------------------

@pytest.mark.parametrize("n_blocks", range(4))
def test_frozen_blocks_do_not_change_by_a_bit(n_blocks):
    model = TransferLocalizer(small_encoder()).unfreeze(n_blocks)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, DataLoader(Scenes(16), batch_size=8), None, position_loss, 2,
        optimizer=torch.optim.AdamW(model.parameter_groups(0.01, 1.0)), keep="last")
    moved = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    frozen = {k for k in before
              if any(k.startswith(f"encoder.blocks.{b}.") for b in range(3 - n_blocks))}
    assert not moved & frozen
    # weights, running mean and variance, and the count of batches
    assert {k for k in before if "encoder" in k and k not in frozen} <= moved
    assert any(k.startswith("head") for k in moved)


def test_modes_follow_and_frozen_blocks_stay_in_evaluation_mode():
    model = TransferLocalizer(small_encoder()).unfreeze(1)
    norms = [block[1].training for block in model.train().encoder.blocks]
    assert (norms == [False, False, True] and model.head.training
            and not any(m.training for m in model.eval().modules()))
    assert not any(m.training for m in model.unfreeze(3).modules())  # the mode is kept
    model.train().unfreeze(0)
    assert not any(m.training for m in model.encoder.blocks)


def test_the_pretrained_net_is_left_alone():
    encoder = small_encoder()
    model = TransferLocalizer(encoder)
    assert all(p.requires_grad for p in encoder.parameters()) and encoder.training
    assert not any(a is b for a, b in zip(encoder.parameters(), model.encoder.parameters()))


def test_parameter_groups_hold_what_is_trained_once():
    model = TransferLocalizer(small_encoder()).unfreeze(2)
    head, blocks = model.parameter_groups(0.01, 0.1)
    assert head["lr"] == 0.01 and blocks["lr"] == pytest.approx(0.001)
    assert ({id(p) for g in (head, blocks) for p in g["params"]}
            == {id(p) for p in model.parameters() if p.requires_grad})
    assert len(model.unfreeze(0).parameter_groups(0.01)) == 1


@pytest.mark.parametrize("n_blocks", [-1, 4])
def test_more_blocks_than_there_are_are_refused(n_blocks):
    with pytest.raises(ValueError, match=f"n_blocks={n_blocks}: must be from 0 to the encoder's 3"):
        TransferLocalizer(small_encoder()).unfreeze(n_blocks)


def test_fine_tuning_has_two_phases_and_resumes(tmp_path):
    scenes = DataLoader(Scenes(16), batch_size=8, shuffle=True)
    def tuned(folder):
        torch.manual_seed(1)
        model = TransferLocalizer(small_encoder())
        return model, fine_tune(model, scenes, None, position_loss, head_epochs=1, epochs=2,
                                n_blocks=1, folder=folder)
    (first, table), (again, same) = tuned(tmp_path), tuned(tmp_path)
    assert (table.phase.tolist() == ["head", "blocks", "blocks"]
            and table.train_loss.tolist() == same.train_loss.tolist())
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    groups = load_checkpoint(tmp_path / "blocks").settings["optimizer"]["groups"]
    assert (groups["1"]["lr"] == pytest.approx(0.1 * groups["0"]["lr"])
            and len(load_checkpoint(tmp_path / "head").settings["optimizer"]["groups"]) == 1)
    weights = [load_checkpoint(tmp_path / phase).weights for phase in ("head", "blocks")]
    assert all(weights[0][k].equal(v) for k, v in small_encoder().state_dict(prefix="encoder.")
               .items())  # the head's phase leaves the encoder alone
    assert not weights[0]["encoder.blocks.2.0.weight"].equal(
        weights[1]["encoder.blocks.2.0.weight"])


# --- gradient reversal ----------------------------------------------------------------------------

@few
@given(st.floats(-3, 3), st.integers(0, 1000))
def test_the_gradient_is_exactly_minus_alpha_times(alpha, seed):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed),
                    requires_grad=True)
    f = lambda v: (v.tanh() * torch.arange(12.0, dtype=torch.float64).view(3, 4)).sum()
    turned, = torch.autograd.grad(f(reverse_gradient(x, alpha)), x)
    plain, = torch.autograd.grad(f(x), x)
    assert reverse_gradient(x, alpha).equal(x) and turned.equal(-alpha * plain)
    step = 1e-6
    slope = torch.stack([(f(x + step * e) - f(x - step * e)) / (2 * step) for e in torch.eye(
        12, dtype=torch.float64).view(12, 3, 4)]).view(3, 4).detach()
    torch.testing.assert_close(turned, -alpha * slope, rtol=1e-5, atol=1e-7)


def test_the_strength_is_a_hyperbolic_tangent():
    assert reversal_strength(0) == 0 and reversal_strength(1) == pytest.approx(0.9999092, abs=1e-7)
    assert all(reversal_strength(p / 10) == pytest.approx(math.tanh(p / 2)) for p in range(11))


@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_progress_outside_of_the_training_is_refused(progress):
    with pytest.raises(ValueError, match="progress=.*must be from 0 to 1"):
        reversal_strength(progress)


def gradients(weight, epoch, epochs=10):
    torch.manual_seed(0)
    model = DomainAdversarialLocalizer(small_encoder(), dropout=0.0)
    scenes = {"audio": audio(), "target_audio":
              audio(seed=5) * torch.tensor([1.0, 2, 3, 4])[:, None], "sources": Scenes(8).sources}
    parts = AdversarialLoss(position, epochs, weight)(model, scenes, epoch)
    parts["loss"].backward()
    return parts, {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_the_encoder_gets_the_critics_gradient_turned_and_the_critic_does_not():
    epoch, weight = 4, 0.7
    alpha = math.tanh(5 * 0.3)  # three of ten epochs are done
    (parts, both), (_, alone) = gradients(weight, epoch), gradients(0.0, epoch)
    torch.manual_seed(0)
    model = DomainAdversarialLocalizer(small_encoder(), dropout=0.0)
    joint = torch.cat([audio(), audio(seed=5) * torch.tensor([1.0, 2, 3, 4])[:, None]])
    # without the layer
    F.binary_cross_entropy_with_logits(model.critic(model.features(joint))[:, 0],
                                       torch.cat([torch.zeros(8), torch.ones(8)])).backward()
    for name, p in model.named_parameters():
        if name.startswith("encoder"):
            torch.testing.assert_close(both[name], alone[name] - weight * alpha * p.grad, rtol=1e-4,
                                       atol=1e-6)
        if name.startswith("critic"):
            torch.testing.assert_close(both[name], weight * p.grad, rtol=1e-4, atol=1e-6)
        if name.startswith("head"): torch.testing.assert_close(both[name], alone[name])
    torch.testing.assert_close(parts["loss"], parts["position"] + weight * parts["critic"])
    # positions of the source only
    torch.testing.assert_close(parts["position"],
                               position(model(joint)[:8], {"sources": Scenes(8).sources}))
    assert 0 <= parts["told_apart"] <= 1


def test_in_the_first_epoch_the_encoder_hears_nothing_of_the_critic():
    first, alone = gradients(1.0, 1)[1], gradients(0.0, 1)[1]
    assert (all(first[k].equal(alone[k]) for k in first if k.startswith("encoder"))
            and not first["critic.0.weight"].equal(alone["critic.0.weight"]))


@pytest.mark.parametrize("arguments, message",
                         [(dict(epochs=0), "epochs=0: must be a whole number, at least 1"),
                          (dict(epochs=5, weight=-1.0), "weight=-1.0: must be at least 0")])
def test_bad_adversarial_losses_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message): AdversarialLoss(position, **arguments)


def test_pairs_keep_the_source_and_draw_the_target():
    source, target = Scenes(6), Scenes(3, offset=100.0)
    pairs = DomainPairs(source, target)
    torch.manual_seed(0); scenes = pairs.__getitems__([4, 1])
    torch.manual_seed(0); same = pairs.__getitems__([4, 1])
    assert len(pairs) == 6 and all(s["audio"].equal(source[i]["audio"]) and s["sources"]
                                   .equal(source[i]["sources"]) for s, i in zip(scenes, (4, 1)))
    assert (all(any(s["target_audio"].equal(t) for t in target.audio) for s in scenes)
            and all(a["target_audio"].equal(b["target_audio"]) for a, b in zip(scenes, same)))
    drawn = {float(s["target_audio"][0, 0]) for s in pairs.__getitems__([0] * 60)}
    assert len(drawn) == 3  # all of the target comes up
    assert pairs[2]["audio"].equal(source[2]["audio"])


def test_gains_are_decibels_of_each_microphone():
    louder = MicGains(Scenes(2), (0.0, 20.0, -20.0, 6.0))
    torch.testing.assert_close((louder[1]["audio"] / Scenes(2)[1]["audio"])[:, 0],
                               torch.tensor([1.0, 10.0, 0.1, 1.9953]), rtol=1e-4, atol=0)
    assert len(louder) == 2 and louder[1]["sources"].equal(Scenes(2)[1]["sources"])


@pytest.mark.parametrize("gains, message", [((0.0, 1.0), "has 2 gains, needs one for each of 4"),
                                            ((0.0, math.nan, 0.0, 0.0),
                                             "gains_db: nan at index .*finite")])
def test_bad_gains_are_refused(gains, message):
    with pytest.raises(ValueError, match=message): MicGains(Scenes(2), gains)[0]


# --- views and closed forms -----------------------------------------------------------------------

def test_principal_components_are_those_of_the_covariance():
    x = (torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
         @ torch.diag(torch.tensor([3.0, 1, 0.3, 0.1], dtype=torch.float64)) + 7)
    points = principal_components(x, 3)
    np.testing.assert_allclose(np.cov(points.T.numpy()),
                               np.diag(np.linalg.eigvalsh(np.cov(x.T.numpy()))[::-1][:3]),
                               atol=1e-10)


@pytest.mark.parametrize("n", [0, 5])
def test_components_that_do_not_exist_are_refused(n):
    with pytest.raises(ValueError, match=f"n_components={n}: must be "):
        principal_components(torch.randn(9, 4), n)


def test_the_probe_knows_alike_and_apart():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 6, generator=g)
    assert (abs(domain_probe(a, b) - 0.5) < 0.08
            and domain_probe(a, b + torch.tensor([6.0, 0, 0, 0, 0, 0])) > 0.98)
    assert (domain_probe(torch.randn(400, 300, generator=g), torch.randn(400, 300, generator=g))
            < 0.6)  # held out: many features do not fake a difference
    with pytest.raises(ValueError, match="need 4 each"): domain_probe(a[:3], b)


@few
@given(st.integers(2, 30), st.integers(1, 40), st.floats(1e-3, 10), st.integers(0, 100))
def test_ridge_solves_the_augmented_least_squares(n, d, penalty, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=g, dtype=torch.float64) + 1,
            torch.randn(n, 2, generator=g, dtype=torch.float64))
    layer = ridge_head(x, y, penalty)
    rows = np.vstack([np.hstack([x, np.ones((n, 1))]),
                      np.hstack([math.sqrt(penalty * n) * np.eye(d), np.zeros((d, 1))])])
    expected = np.linalg.lstsq(rows, np.vstack([y, np.zeros((d, 2))]), rcond=None)[0]
    np.testing.assert_allclose(np.hstack([layer.weight, layer.bias[:, None]]).T, expected,
                               rtol=1e-6, atol=1e-8)
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("n, penalty, message", [
    (0, 1.0, "features: shape"), (5, 0.0, "penalty=0.0: must be positive"),
    (5, -1.0, "penalty=-1.0"), (5, math.inf, "penalty=inf"), (5, math.nan, "penalty=nan")])
def test_ridge_refuses_what_has_no_solution(n, penalty, message):
    with pytest.raises(ValueError, match=message):
        ridge_head(torch.randn(n, 3), torch.randn(n, 2), penalty)


@pytest.mark.parametrize("make", [lambda: WaveformCNN(widths=(4, 6, 8), kernel=16, stride=4),
                                  lambda: TransferLocalizer(small_encoder()),
                                  lambda: DomainAdversarialLocalizer(small_encoder())])
def test_few_shots_between_the_old_answers_and_the_labels(make):
    model = make().eval()
    heard, labels = audio(5), torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        old, exact, stiff = (model(heard), few_shot(model, heard, labels, 1e-9)(heard),
                             few_shot(model, heard, labels, 1e9)(heard))
    # 5 examples, 8 features: it can obey
    torch.testing.assert_close(exact, labels, rtol=0, atol=1e-2)
    # only the bias is free
    torch.testing.assert_close(stiff, old + (labels - old).mean(0), rtol=0, atol=1e-4)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


# --- pre-training on shifts -----------------------------------------------------------------------

@few
@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 1000))
def test_shifts_are_rolls(mics, n, seed):
    g = torch.Generator().manual_seed(seed)
    x, shifts = torch.randn(2, mics, n, generator=g), torch.randint(-40, 41, (2, mics), generator=g)
    y = shift_channels(x, shifts)
    assert all(np.array_equal(y[b, m], np.roll(x[b, m], int(shifts[b, m]))) for b in range(2)
               for m in range(mics))


class Oracle(ShiftPretraining):
    "Answers by GCC-PHAT: the delay of channel j after channel 0."
    def forward(self, audio):
        pairs = delays_from_gcc(gcc_phat(audio, max_lag=2 * self.max_shift + 2), 1,
                                "none")[:, :audio.shape[1] - 1]  # (0, 1), (0, 2), (0, 3)
        return -pairs / self.max_shift


@pytest.mark.parametrize("noise, least, most",
                         [(0.0, 0.0, 1e-6), (0.1, 0.0, 1e-6), (30.0, 0.2, 5.0)])
def test_the_task_asks_for_the_delays_after_the_first_channel(noise, least, most):
    torch.manual_seed(0)
    model = Oracle(small_encoder(), max_shift=12, noise=noise)
    loss = ShiftPretraining.loss(model, {"audio": torch.randn(32, 4, 2000)}, 1)
    assert least <= float(loss) <= most


def test_the_task_uses_one_channel_only():
    model, x = ShiftPretraining(small_encoder()).eval(), audio()
    other = x.clone(); other[:, 1:] = 0
    losses = []
    for heard in (x, other):
        torch.manual_seed(0)
        losses.append(ShiftPretraining.loss(model, {"audio": heard}, 1))
    assert losses[0].equal(losses[1])


@pytest.mark.parametrize("arguments, message", [
    (dict(n_channels=1), "n_channels=1: .*at least 2"), (dict(max_shift=0), "max_shift=0"),
    (dict(noise=-1.0), "noise=-1.0: must be at least 0")])
def test_bad_shift_tasks_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message): ShiftPretraining(small_encoder(), **arguments)
