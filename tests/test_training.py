"""Training: what a run must survive, and numbers from outside: closed forms, PyTorch's own
schedulers, hand-made steps, a second process."""
import copy, functools, json, math, os, shutil, signal, subprocess, sys, warnings

import pandas as pd
import pytest
import torch
import train_once
from run_notebook import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from ssl_nb.workshop import training
from ssl_nb.workshop.training import (Cosine, Exponential, NonFiniteLoss, Plateau, fit,
                                      load_checkpoint, load_history)
from torch import nn
from torch.utils.data import (DataLoader, Dataset, IterableDataset, TensorDataset,
                              WeightedRandomSampler)

fit = functools.partial(fit, device="cpu")
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "IN_TEST": "1"}


@pytest.fixture(autouse=True)
def in_test(monkeypatch): monkeypatch.setenv("IN_TEST", "1")  # no progress bars


def same_run(a, b):
    "Same history but for the seconds, same weights, bit for bit."
    (net_a, history_a), (net_b, history_b) = a, b
    pd.testing.assert_frame_equal(history_a.table.drop(columns="seconds"),
                                  history_b.table.drop(columns="seconds"), check_exact=True)
    assert (history_a.best_epoch, history_a.stopped) == (history_b.best_epoch, history_b.stopped)
    for (name, x), y in zip(net_a.state_dict().items(), net_b.state_dict().values()):
        assert x.equal(y), name


def rows(n=40, seed=0):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x @ torch.tensor([1.0, -2, 0.5]))


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(3, 1, dtype=dtype)


def squared(model, batch, epoch): return (model(batch[0])[:, 0] - batch[1]).square().mean()


# --- resume ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "Folders of runs that SIGKILL ended."
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, ROOT / "tests/train_once.py", "kill", folder],
                          env=ENVIRON, capture_output=True, text=True, check=True)
    assert ([int(line.split()[-1]) for line in done.stdout.splitlines()]
            == [signal.SIGKILL] * len(train_once.KILLED)), done.stdout
    return folder


@pytest.fixture(scope="module")
def whole():
    "Runs that nobody stopped, by schedule."
    return {name: train_once.train(None, name) for name in train_once.SCHEDULES}


@pytest.mark.parametrize("schedule, kind, count", train_once.KILLED)
def test_a_killed_run_goes_on_bit_for_bit(killed, whole, schedule, kind, count, tmp_path):
    folder = shutil.copytree(killed / f"{schedule}-{kind}-{count}", tmp_path / "run")
    done = load_checkpoint(folder, which="last").epoch
    # the first file holds epoch 0
    assert done == ((count - 1) // 8 if kind == "loss" else count - 2)
    # half-way through a save
    assert kind == "loss" or any(p.suffix == ".tmp" for p in folder.iterdir())
    torch.manual_seed(99); torch.rand(5)  # a new process would have other random numbers
    same_run(train_once.train(folder, schedule,
                              model=nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2),
                                                  nn.Linear(16, 1))), whole[schedule])
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint.safetensors", "history.csv"]
    saved = load_checkpoint(folder)
    assert saved.weights["0.weight"].equal(whole[schedule][0].state_dict()["0.weight"])


def test_the_schedules_did_something(whole):
    rates = {name: tuple(run[1]["lr"]) for name, run in whole.items()}
    assert (len(set(rates.values())) == 4 and set(rates["none"]) == {0.02}
            and rates["plateau"][-1] < 0.02)


def test_a_finished_run_is_not_trained_again(tmp_path, whole):
    train_once.train(tmp_path, "cosine")
    @functools.wraps(train_once.loss)
    def never(model, batch, epoch): raise AssertionError("trained")
    same_run(train_once.train(tmp_path, "cosine", loss=never), whole["cosine"])


def test_more_epochs_go_on_where_no_schedule_depends_on_the_end(tmp_path, whole):
    for name in ("none", "exponential", "plateau"):
        train_once.train(tmp_path / name, name, epochs=3)
        same_run(train_once.train(tmp_path / name, name), whole[name])
    train_once.train(tmp_path / "cosine", "cosine", epochs=3)
    with pytest.raises(ValueError, match="epochs: 3 in the checkpoint, 6 now"):
        train_once.train(tmp_path / "cosine", "cosine")


def test_resume_false_starts_anew_and_true_needs_a_checkpoint(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        train_once.train(tmp_path, resume=True)
    train_once.train(tmp_path, "cosine", seed=3)
    same_run(train_once.train(tmp_path, resume=False), whole["none"])


class Scripted(nn.Module):
    "A model whose validation loss follows a script, and whose weight counts the steps."
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


def scripted(values, stop=None):
    stops = [stop]  # a list is nothing that a fingerprint looks into
    def loss(model, batch, epoch):
        if epoch in stops: signal.raise_signal(signal.SIGINT)
        return model.weight if model.training else model.weight.detach() * 0 + values[epoch - 1]
    loss.__qualname__ = "scripted"
    return loss


def follow(values, folder=None, stop=None, **options):
    model, batch = Scripted(), DataLoader(TensorDataset(torch.zeros(1)), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model, fit(model, batch, batch, scripted(values, stop), optimizer=optimizer,
                      epochs=len(values), folder=folder, **options)


@pytest.mark.parametrize("mode, sign", [("min", 1), ("max", -1)])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_early_stopping_survives_a_stop(tmp_path, mode, sign, stop):
    # best in epoch 3; a tie is no progress
    values = [sign * v for v in (5.0, 4, 3, 3.5, 3, 3.2, 1, 0)]
    with pytest.raises(KeyboardInterrupt, match=f"epoch {stop} of 8.*same call"):
        follow(values, tmp_path, stop, mode=mode, patience=3)
    model, history = follow(values, tmp_path, mode=mode, patience=3)
    assert (len(history), history.best_epoch,
            history.stopped) == (6, 3, "no better valid_loss in 3 epochs")
    # one step of 1 an epoch, from 0
    assert float(model.weight.detach()) == -3 and not model.training
    assert (load_checkpoint(tmp_path, which="last").weights["weight"] == -6
            and load_checkpoint(tmp_path).epoch == 3)
    assert (float(follow(values, tmp_path, mode=mode, patience=3, keep="last")[0].weight.detach())
            == -6)


@pytest.mark.parametrize("floor", [0.0, 0.4])
def test_plateau_cuts_like_pytorchs(tmp_path, floor):
    values = [5.0, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4]
    model = Scripted()
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(model.parameters(), lr=1.0),
                                                        factor=0.5, patience=1, threshold=0,
                                                        min_lr=floor)
    expected = []
    for value in values:
        expected.append(theirs.optimizer.param_groups[0]["lr"])
        theirs.step(value)
    schedule = Plateau(cut=0.5, patience=1, floor=floor)
    with pytest.raises(KeyboardInterrupt): follow(values, tmp_path, 4, schedule=schedule)
    assert (list(follow(values, tmp_path, schedule=schedule)[1]["lr"]) == expected
            and (expected[-1] == 0.4 if floor else expected[-1] < 0.2))


# --- another run is refused -----------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({"lr": 0.1}, r"optimizer.groups.0.lr: 0.02 in the checkpoint, 0.1 now"),
    ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
    ({"schedule": "cosine"}, "schedule: None in the checkpoint, .*Cosine.* now"),
    ({"clip": 2.0}, "clip: 1.0 in"), ({"patience": 3}, "patience: 50 in"),
    ({"mode": "max"}, "mode: 'min' in"), ({"best": "train_loss"}, "best: 'valid_loss' in"),
    ({"precision": "bf16"}, "precision: 'no' in"),
    ({"accumulate": 2}, "accumulate: 1 in"), ({"weight_decay": 0.5}, "weight_decay: 0.01 in"),
    ({"loss": lambda model, batch, epoch: 0}, "loss: 'loss' in the checkpoint, .*lambda"),
    ({"metrics": {"m": lambda model, batch: 0}}, "metrics.m: None in"),
    ({"model": train_once.net(0.3)}, "Dropout.p=0.2.* in the checkpoint, .*Dropout.p=0.3"),
    ({"model": nn.Sequential(nn.Linear(4, 17), nn.ReLU(), nn.Dropout(0.2), nn.Linear(17, 1))},
     r"weights model.0.weight: '\(16, 4\) float32' in the"),
    ({"model": train_once.net().double()},
     r"weights model.0.weight: .*float32' in the checkpoint, '\(16, 4\) float64' now"),
])
def test_other_settings_are_refused_by_name(tmp_path, change, words):
    train_once.train(tmp_path, epochs=1)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    options = {"schedule": "none"} | change
    with pytest.raises(ValueError, match=words): train_once.train(tmp_path, epochs=1, **options)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_other_data_are_refused_by_name(tmp_path):
    fit(linear(), DataLoader(rows(40), 8), None, squared, epochs=1, folder=tmp_path)
    for loader, words in ((DataLoader(rows(41), 8), "train.examples: 40 in the checkpoint, 41 now"),
                          (DataLoader(rows(40), 10), "train.batch_size: 8 in"),
                          (DataLoader(rows(40), 8, shuffle=True),
                           "train.sampler: 'SequentialSampler' in")):
        with pytest.raises(ValueError, match=words):
            fit(linear(), loader, None, squared, epochs=1, folder=tmp_path)
    with pytest.raises(ValueError, match="weights weight"):
        load_checkpoint(tmp_path, nn.Linear(4, 1))


def scaled(scale): return lambda model, batch, epoch: scale * squared(model, batch, epoch)


def test_data_and_losses_of_the_same_size_and_name_are_told_apart(tmp_path):
    run = lambda data, loss, **k: fit(linear(), DataLoader(data, 8), DataLoader(rows(16, 5), 8),
                                      loss, epochs=1, folder=tmp_path, **k)
    first = run(rows(40), scaled(1.0))
    assert run(rows(40), scaled(1.0)).table.equals(first.table)  # the same run: read, not trained
    with pytest.raises(ValueError, match="train.fingerprint: '.*' in the checkpoint, '.*' now"):
        run(rows(40, seed=1), scaled(1.0))
    with pytest.raises(ValueError, match="loss_fingerprint: "): run(rows(40), scaled(2.0))
    with pytest.raises(ValueError, match="loss: .*squared' now"): run(rows(40), squared)
    with pytest.raises(ValueError, match="valid.fingerprint: "):
        fit(linear(), DataLoader(rows(40), 8), DataLoader(rows(16, 6), 8), scaled(1.0), epochs=1,
            folder=tmp_path)
    assert len(run(rows(40, seed=1), scaled(1.0), resume=False)) == 1


class WithScale:
    def __init__(self, scale): self.scale = scale
    def __call__(self, model, batch, epoch): return self.scale * squared(model, batch, epoch)
    def method(self, model, batch, epoch): return self(model, batch, epoch)


def test_fingerprints_of_losses_of_every_kind():
    parts = lambda loss: training._fingerprint(training._parts_of(loss))
    times = lambda m, b, e, scale=1.0: scale * squared(m, b, e)
    kinds = [squared, times, scaled(1.0), scaled(2.0), functools.partial(times, scale=2.0),
             functools.partial(times, scale=3.0), WithScale(1.0), WithScale(2.0),
             WithScale(1.0).method, nn.MSELoss(), nn.L1Loss(), scaled(torch.ones(2))]
    assert len({parts(k) for k in kinds}) == len(kinds)
    assert [parts(k) for k in kinds] == [parts(k) for k in kinds]
    assert parts(WithScale(1.0)) == parts(WithScale(1.0))
    assert parts(functools.wraps(squared)(times)) == parts(squared)
    assert parts(abs) == parts(abs)  # no source: the name


def test_a_checkpoint_from_before_fingerprints_is_accepted(tmp_path):
    run = lambda epochs: fit(linear(), DataLoader(rows(40), 8), None, squared, epochs=epochs,
                             folder=tmp_path)
    run(1)
    path = tmp_path / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as f:
        plain = json.loads(f.metadata()["json"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    del plain["settings"]["train"]["fingerprint"], plain["settings"]["loss_fingerprint"]
    save_file(tensors, path, metadata={"json": json.dumps(plain)})
    assert len(run(2)) == 2
    assert "fingerprint" in load_checkpoint(tmp_path).settings["train"]  # from now on it is there


def test_a_look_into_the_data_changes_no_number(tmp_path):
    class Drawing(Dataset):
        "Examples with noise from a generator of its own."
        def __init__(self): self.chance = torch.Generator().manual_seed(0)
        def __len__(self): return 40
        def __getitem__(self, i): return rows()[i][0] + torch.randn(3, generator=self.chance), i
    loss = lambda model, batch, epoch: model(batch[0]).square().mean()
    runs = []
    for folder in (None, tmp_path):
        model = linear()
        runs.append((model, fit(model, DataLoader(Drawing(), 8), None, loss, epochs=2,
                                folder=folder)))
    same_run(*runs)


def test_a_history_that_is_a_row_short_is_written_again(tmp_path):
    run = lambda: fit(linear(), DataLoader(rows(40), 8), None, squared, epochs=3, folder=tmp_path)
    run()
    table = tmp_path / "history.csv"
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # killed before the last row
    (tmp_path / ".history.csv.123.tmp").write_text("half")
    run()
    assert table.read_text() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "history.csv"]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    fit(linear(), DataLoader(rows(), 8), None, squared, epochs=1, folder=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="damaged"): load_checkpoint(tmp_path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no checkpoint of this library"): load_checkpoint(tmp_path)
    assert b"pickle" not in whole and whole[8:9] == b"{"  # safetensors: a length, then JSON


# --- chance ---------------------------------------------------------------------------------------

def test_same_seed_same_result_and_the_callers_generators_are_left_alone():
    torch.manual_seed(5); expected = torch.rand(1)
    model = train_once.net()
    torch.manual_seed(5)
    first = train_once.train(None, epochs=2, model=model)
    assert torch.rand(1) == expected
    same_run(first, train_once.train(None, epochs=2))
    other = train_once.train(None, epochs=2, seed=1)
    assert other[1]["train_loss"][0] != first[1]["train_loss"][0]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    same_run(train_once.train(None, epochs=2), train_once.train(None, epochs=2, workers=workers))


def test_persistent_workers_and_a_stop(tmp_path):
    def run(folder, epochs):
        loader = DataLoader(train_once.Noisy(), 8, shuffle=True, num_workers=2,
                            persistent_workers=True)
        model = train_once.net()
        return model, fit(model, loader, None, train_once.loss, epochs=epochs, folder=folder)
    run(tmp_path, 2)
    same_run(run(tmp_path, 4), run(None, 4))


def test_a_loader_can_be_used_twice_and_other_samplers_work(tmp_path):
    sampler = WeightedRandomSampler(torch.arange(1.0, 41), 40, generator=torch.Generator())
    loader = DataLoader(rows(), 8, sampler=sampler)
    runs = []
    for folder, epochs in ((None, 4), (tmp_path, 2), (tmp_path, 4)):
        model = linear()
        runs.append((model, fit(model, loader, None, squared, epochs=epochs, folder=folder)))
    same_run(runs[0], runs[2])


def test_validation_draws_the_same_numbers_in_every_epoch_and_none_of_the_trainings():
    drawn = []
    def noisy(model, batch, epoch):
        if not model.training: drawn.append(float(torch.rand(())))
        return squared(model, batch, epoch)
    a, b = linear(), linear()
    with_valid = fit(a, DataLoader(rows(), 8, shuffle=True), DataLoader(rows(16), 8), noisy,
                     epochs=3)
    without = fit(b, DataLoader(rows(), 8, shuffle=True), None, noisy, epochs=3)
    assert len(drawn) == 6 and drawn[:2] == drawn[2:4] == drawn[4:] and drawn[0] != drawn[1]
    assert list(with_valid["train_loss"]) == list(without["train_loss"])


# --- numbers from outside -------------------------------------------------------------------------

def test_least_squares_reaches_the_closed_form():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    y = (x @ torch.tensor([1.0, -2, 0.5], dtype=torch.float64) + 0.3
         + torch.randn(60, generator=g, dtype=torch.float64))
    model = linear(torch.float64)
    history = fit(model, DataLoader(TensorDataset(x, y), 60), None, squared, epochs=600, lr=0.05,
                  weight_decay=0.0, schedule="cosine")
    design = torch.cat([x, torch.ones(60, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat([model.weight.detach()[0], model.bias.detach()]), solution,
                               rtol=0, atol=1e-6)
    torch.testing.assert_close(history["train_loss"].iloc[-1],
                               float((design @ solution - y).square().mean()), rtol=1e-9, atol=0)


def rates(schedule, epochs, **options):
    "The learning rate at every step of 5 steps an epoch."
    seen, model = [], linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    def loss(model, batch, epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        return squared(model, batch, epoch)
    fit(model, DataLoader(rows(40), 8), None, loss, optimizer=optimizer, epochs=epochs,
        schedule=schedule, **options)
    return seen


def test_learning_rates_of_every_step():
    assert rates(Cosine(), 4) == pytest.approx([0.1 * (1 + math.cos(math.pi * s / 20)) / 2
                                                for s in range(20)], rel=1e-12)
    warm = rates(Cosine(warmup=2, floor=0.01), 4)
    assert warm == pytest.approx([0.1 * (s + 1) / 10 for s in range(10)] + [
        0.1 * (0.01 + 0.99 * (1 + math.cos(math.pi * s / 10)) / 2) for s in range(10)], rel=1e-12)
    assert rates(Exponential(0.5), 3) == pytest.approx([0.1 * 0.5 ** (s / 5) for s in range(15)],
                                                       rel=1e-12)
    assert rates(None, 2) == [0.1] * 10
    sgd = torch.optim.SGD(linear().parameters(), lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20, eta_min=0.001)
    for ours in rates(Cosine(floor=0.01), 4):
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        sgd.step(); theirs.step()


def test_one_step_of_adamw_by_hand():
    x, y = torch.tensor([[1.0, 2, -1]]), torch.tensor([3.0])
    model = linear()
    w, b = model.weight.detach().clone()[0], model.bias.detach().clone()
    fit(model, DataLoader(TensorDataset(x, y), 1), None, squared, epochs=1, lr=0.01,
        weight_decay=0.1)
    error = x[0] @ w + b - y
    for old, gradient, new in ((w, 2 * error * x[0], model.weight[0]), (b, 2 * error, model.bias)):
        m_hat, v_hat = 0.1 * gradient / (1 - 0.9), 0.001 * gradient**2 / (1 - 0.999)
        torch.testing.assert_close(new.detach(), old - 0.01 * 0.1 * old
                                   - 0.01 * m_hat / (v_hat.sqrt() + 1e-8), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_clipped_gradient(clip):
    model = linear()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x, y = rows(8).tensors
    reference = copy.deepcopy(model)
    squared(reference, (x, y), 1).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters()))
    assert norm > 0.5
    fit(model, DataLoader(TensorDataset(x, y), 8), None, squared,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0), epochs=1, clip=clip)
    moved = {k: before[k] - v for k, v in model.state_dict().items()}
    assert (math.sqrt(sum(float(d.square().sum()) for d in moved.values()))
            == pytest.approx(min(norm, clip), rel=1e-4))
    scale = min(1.0, clip / norm)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(moved[name], p.grad * scale, rtol=1e-4, atol=1e-6)


def test_means_count_examples_not_batches():
    values = torch.tensor([[0.0], [0], [0], [0], [5]])
    model = Scripted()
    def loss(model, batch, epoch):
        return {"loss": model.weight * 0 + batch[0].mean(), "twice": 2 * batch[0].mean()}
    loader = DataLoader(TensorDataset(values), 2)
    history = fit(model, loader, loader, loss, epochs=1,
                  metrics={"each": lambda m, b: b[0][:, 0], "mean": lambda m, b: b[0].mean()})
    assert dict(history.table.loc[0, ["train_loss", "train_twice", "valid_loss", "valid_twice",
                                      "each", "mean"]]) == {
        "train_loss": 1, "train_twice": 2, "valid_loss": 1, "valid_twice": 2, "each": 1, "mean": 1}


def test_accumulated_batches_equal_one_large_batch():
    runs = []
    for size, accumulate in ((30, 1), (10, 3)):  # 40 examples: the last group is smaller
        model = linear(torch.float64)
        data = TensorDataset(*(t.double() for t in rows(40).tensors))
        history = fit(model, DataLoader(data, size), None, squared, epochs=3, accumulate=accumulate,
                      clip=1.0, schedule="cosine")
        runs.append((model.weight.detach(), torch.tensor(history["lr"].to_numpy())))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-10, atol=1e-12)


def test_the_loss_may_hold_weights_and_needs_the_epoch():
    class Balanced(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))
        def forward(self, model, batch, epoch):
            return squared(model, batch,
                           epoch) * (-self.log_scale).exp() + self.log_scale + 0 * epoch
    loss = Balanced()
    fit(linear(), DataLoader(rows(), 8), None, loss, epochs=3)
    assert loss.log_scale != 0
    seen = []
    fit(linear(), DataLoader(rows(), 40), None,
        lambda m, b, epoch: seen.append(epoch) or squared(m, b, epoch), epochs=3)
    assert seen == [1, 2, 3]


def test_bf16_trains_in_bf16_and_keeps_float32_weights():
    seen = set()
    def loss(model, batch, epoch):
        out = model(batch[0])[:, 0]
        seen.add(out.dtype)
        return (out.float() - batch[1]).square().mean()
    model = linear()
    history = fit(model, DataLoader(rows(), 8), DataLoader(rows(), 8), loss, epochs=20, lr=0.05,
                  precision="bf16")
    assert (seen == {torch.bfloat16} and model.weight.dtype == torch.float32
            and history["valid_loss"].iloc[-1] < 0.05)
    seen.clear()
    # the precision of the run before is forgotten
    fit(linear(), DataLoader(rows(), 8), None, loss, epochs=1)
    assert seen == {torch.float32}


class WrongInHalf(nn.Linear):
    "A layer that a processor computes wrongly in bfloat16; by oneDNN only, or always."
    def __init__(self, always):
        super().__init__(3, 1)
        self.always = always

    def forward(self, x):
        y = super().forward(x)
        broken = torch.is_autocast_enabled("cpu") and (self.always or torch.backends.mkldnn.enabled)
        return -y if broken else y


def test_a_processor_that_is_wrong_in_bf16_is_noticed():
    run = lambda layer, precision: fit(nn.Sequential(layer), DataLoader(rows(), 8), None, squared,
                                       epochs=60, lr=0.1, precision=precision)
    with pytest.warns(UserWarning, match=r"bf16.* 0 \(relative error 2\) wrongly by oneDNN"):
        healed = run(WrongInHalf(always=False), "bf16")
    assert healed["train_loss"].iloc[-1] < 0.05 and torch.backends.mkldnn.enabled
    with pytest.raises(ValueError, match="bf16.* 0 .*wrongly; use precision='no'"):
        run(WrongInHalf(always=True), "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(WrongInHalf(always=True), "no")


# --- what is no number ----------------------------------------------------------------------------

class OneBad(Dataset):
    def __len__(self): return 37
    def __getitem__(self, i):
        return {"x": {"audio": torch.full((3,), float("nan") if i == 23 else 1.0)},
                "y": (torch.tensor(1.0), f"file{i}.wav")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_example_is_found_and_kept(tmp_path, workers):
    loss = lambda model, batch, epoch: (model(batch["x"]["audio"])[:, 0]
                                        - batch["y"][0]).square().mean()
    model = linear()
    with pytest.raises(NonFiniteLoss, match=r"the loss is nan in epoch 1, step \d+, examples "
                                            r"\[.*23.*nonfinite.safetensors and .json") as caught:
        fit(model, DataLoader(OneBad(), 5, shuffle=True, num_workers=workers), None, loss, epochs=2,
            folder=tmp_path)
    about, batch = (json.loads((tmp_path / "nonfinite.json").read_text()),
                    load_file(tmp_path / "nonfinite.safetensors"))
    row = about["indices"].index(23)
    assert (set(batch) == {"x.audio", "y.0"} and batch["x.audio"][row].isnan().all()
            and not batch["x.audio"].isnan().all())
    assert about["not_finite"] == ["x.audio"] and "file23.wav" in list(about["rest"].values())[row]
    assert (about["epoch"], about["step"],
            about["indices"]) == (1, caught.value.step, caught.value.indices)
    assert all(p.isfinite().all() for p in model.parameters())  # stopped before the step


def test_a_bad_gradient_and_a_bad_validation_loss_stop_too(tmp_path):
    root = lambda model, batch, epoch: (model(batch[0])
                                        - model(batch[0]).detach()).abs().sqrt().mean()
    model = linear()
    with pytest.raises(NonFiniteLoss, match="norm of the gradient is .* epoch 1, step 1"):
        fit(model, DataLoader(rows(), 8), None, root, epochs=1)
    assert all(p.isfinite().all() for p in model.parameters())
    valid_nan = (lambda model, batch, epoch: squared(model, batch, epoch)
                 * (1 if model.training or epoch < 2 else math.nan))
    with pytest.raises(NonFiniteLoss, match="the validation loss is nan in epoch 2, step 1"):
        fit(linear(), DataLoader(rows(), 8), DataLoader(rows(), 8), valid_nan, epochs=3,
            folder=tmp_path)


# --- two processes --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def several(tmp_path_factory):
    "Folders of the same runs by one process and by two."
    folder = tmp_path_factory.mktemp("several")
    for name in ("one", "two"): (folder / name).mkdir()
    done = subprocess.run([sys.executable, ROOT / "tests/train_once.py", "several", folder],
                          env=ENVIRON, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-8000:]}"
    assert [load_checkpoint(folder / name / "run").settings["processes"]
            for name in ("one", "two")] == [1, 2]
    return folder


def test_two_processes_give_the_curve_of_one(several):
    one, two = (load_history(several / name / "curve.json").table for name in ("one", "two"))
    assert len(one) == 5 and one["valid_loss"].iloc[-1] < 0.9 * one["valid_loss"].iloc[0]
    columns = ["train_loss", "valid_loss", "misses", "lr"]
    # float32 sums in another order
    pd.testing.assert_frame_equal(one[columns], two[columns], check_exact=False, rtol=1e-5, atol=0)
    weights = [load_checkpoint(several / name / "run").weights for name in ("one", "two")]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-6)


def test_two_processes_go_on_bit_for_bit_each_with_its_own_chance(several):
    whole, parts = (load_checkpoint(several / "two" / name, which="last")
                    for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole.history.table.drop(columns="seconds"),
                                  parts.history.table.drop(columns="seconds"), check_exact=True)
    assert (all(whole.weights[k].equal(parts.weights[k]) for k in whole.weights)
            and whole.epoch == parts.epoch == 4)
    states = load_file(several / "two/whole/checkpoint.safetensors")
    assert not states["random/0.torch"].equal(states["random/1.torch"])


def test_a_bad_example_stops_both_processes(several):
    messages = [(several / f"two/message{rank}.txt").read_text() for rank in (0, 1)]
    bad, good = sorted(messages, key=lambda m: "another process" in m)
    assert ("is nan in epoch 1" in bad and "17" in bad.split("[")[1]
            and "happened on another process" in good)
    rank = messages.index(bad)
    assert 17 in json.loads((several / f"two/bad/nonfinite{f'-process{rank}' if rank else ''}.json")
                            .read_text())["indices"]
    with pytest.raises(ValueError, match="processes: 2 in the checkpoint, 1 now"):
        train_once.train(several / "two/whole", epochs=4)


# --- what is seen ---------------------------------------------------------------------------------

def test_the_bar_is_on_the_error_stream_and_silent_in_tests(capsys, monkeypatch):
    run = lambda **options: fit(linear(), DataLoader(rows(), 8), DataLoader(rows(), 8), squared,
                                epochs=2, metrics={"error": squared_metric}, **options)
    run()
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv("IN_TEST")
    run(progress=False)
    assert capsys.readouterr() == ("", "")
    run()
    out, err = capsys.readouterr()
    assert (out == "" and "epoch 2/2" in err and "10/10" in err and "loss=" in err
            and "error=" in err)


def squared_metric(model, batch): return (model(batch[0])[:, 0] - batch[1]).square()


# --- bad arguments --------------------------------------------------------------------------------

class Stream(IterableDataset):
    def __iter__(self): return iter([torch.zeros(3)])


@pytest.mark.parametrize("options, words", [
    ({"epochs": 0}, "epochs=0"), ({"lr": -1.0}, "lr=-1.0"), ({"lr": math.nan}, "lr=nan"),
    ({"clip": 0.0}, "clip=0.0"), ({"patience": 0}, "patience=0"),
    ({"accumulate": 0}, "accumulate=0"), ({"mode": "less"}, "mode='less'"),
    ({"precision": "fp8"}, "precision='fp8'"), ({"precision": "fp16"}, "fp16.*needs a GPU"),
    ({"resume": "yes"}, "resume='yes'"), ({"resume": True}, "resume=True: needs the folder"),
    ({"keep": "first"}, "keep='first'"), ({"seed": -1}, "seed=-1"),
    ({"schedule": "linear"}, "schedule='linear'"),
    ({"metrics": {"m": abs}}, "metrics=.'m'.: are measured on validation"),
    ({"best": "valid_loss"}, "best='valid_loss'"),
    ({"train": DataLoader(Stream())}, "train: needs a dataset with a length"),
    ({"train": DataLoader(rows(4), 8, drop_last=True)}, "train: the loader has no batch"),
    ({"valid": DataLoader(rows(), 8), "metrics": {"lr": abs}}, "name 'lr' is taken"),
    ({"loss": lambda m, b, e: {"error": m(b[0]).mean()}}, "needs an entry 'loss'"),
    ({"loss": lambda m, b, e: m(b[0])}, r"the entry 'loss' is \(8, 1\)"),
    ({"loss": lambda m, b, e: 3.0}, "the entry 'loss' is float"),
    ({"model": nn.ReLU()}, "model: has no parameter"),
])
def test_bad_arguments_are_refused_in_words(options, words):
    given = {"model": linear(), "train": DataLoader(rows(), 8), "valid": None, "loss": squared,
             "epochs": 1} | options
    with pytest.raises(ValueError, match=words): fit(**given)
    for schedule in (lambda: Cosine(warmup=-1.0), lambda: Cosine(floor=2.0), lambda:
                     Exponential(0.0), lambda: Plateau(cut=1.0), lambda: Plateau(floor=1.5)):
        with pytest.raises(ValueError, match="must"): schedule()


class Counting(torch.optim.Optimizer):
    "Steps of 0.1 / k, where k, a plain number in its state, counts them."
    def __init__(self, parameters): super().__init__(parameters, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["k"] = self.state[p].get("k", 0) + 1
                p.data -= group["lr"] / self.state[p]["k"] * p.grad


def test_a_given_optimizer_has_its_own_rate_and_its_state_must_be_plain(tmp_path):
    model = linear()
    with pytest.raises(ValueError, match="lr=0.1: the given optimizer"):
        fit(model, DataLoader(rows(), 8), None, squared, lr=0.1,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for make in (lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9, centered=True),
                 Counting):  # tensors; plain numbers
        runs = []
        for folder, epochs in ((None, 4), (tmp_path / make.__name__, 2),
                               (tmp_path / make.__name__, 4)):
            model = linear()
            optimizer = make(model.parameters())
            runs.append((model, fit(model, DataLoader(rows(), 8, shuffle=True), None, squared,
                                    optimizer=optimizer, epochs=epochs, folder=folder)))
        same_run(runs[0], runs[2])
    model = linear()
    with pytest.raises(ValueError, match="optimizer: LBFGS"):
        fit(model, DataLoader(rows(), 8), None, squared,
            optimizer=torch.optim.LBFGS(model.parameters()))
    listing = Counting(model.parameters())
    listing.state[model.weight]["history"] = [1]
    with pytest.raises(TypeError,
                       match="its state 'history' is list, only tensors and numbers can be saved"):
        fit(model, DataLoader(rows(), 8), None, squared, optimizer=listing,
            folder=tmp_path / "list")
