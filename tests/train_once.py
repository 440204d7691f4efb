"""A small training run, made to be killed, resumed and started on several processes.

`python tests/train_once.py kill FOLDER`: every run of `KILLED` in a child of its own, each killed
by SIGKILL.
`python tests/train_once.py several FOLDER`: the same runs by one process and by two, which find one
another as torchrun's do.
The children are forked from a process that has everything imported: that is what costs."""
import functools, os, signal, socket, sys, time, traceback
from pathlib import Path

import torch
from ssl_nb.workshop import training
from ssl_nb.workshop.training import Cosine, Exponential, Plateau, fit, save_history
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

SCHEDULES = {"none": None, "cosine": Cosine(warmup=1.5, floor=0.1), "exponential": Exponential(0.7),
             "plateau": Plateau(cut=0.5, patience=0)}
# schedule, where the blow falls: at a call of the loss (8 training batches an epoch), or at the
# rename of a checkpoint
KILLED = [("none", "loss", 3), ("none", "loss", 8), ("cosine", "loss", 13), ("cosine", "rename", 3),
          ("exponential", "loss", 17), ("plateau", "loss", 44), ("plateau", "rename", 6)]
EPOCHS = 6


class Noisy(Dataset):
    "Examples with noise that is drawn from the global generator whenever they are fetched."
    def __init__(self, n=61): self.x, self.y = data(n)
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return {"x": self.x[i] + 0.01 * torch.randn(4), "y": self.y[i]}


def data(n=61, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, x @ torch.tensor([1.0, -2, 3, 0.5]) + 0.1 * torch.randn(n, generator=g)


def net(dropout=0.2):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def loss(model, batch, epoch):
    error = model(batch["x"])[:, 0] - batch["y"]
    return {"loss": error.square().mean(), "absolute": error.abs().mean()}


def train(folder, schedule="none", epochs=EPOCHS, loss=loss, workers=0, model=None, **options):
    """The run that all tests here share: shuffled, with dropout, noise, a last batch of 5, early
    stopping out of reach."""
    loader = DataLoader(Noisy(), 8, shuffle=True, num_workers=workers,
                        generator=torch.Generator().manual_seed(7))
    valid = DataLoader([{"x": a, "y": b} for a, b in zip(*data(23, 5))], 8)
    model = net() if model is None else model
    return model, fit(model, loader, valid, loss, epochs=epochs,
                      **{"lr": 0.02, "schedule": SCHEDULES[schedule], "clip": 1.0, "folder": folder,
                         "patience": 50, "device": "cpu", **options})


def kill_at(kind, count):
    "Arrange for SIGKILL at the given call; returns the loss to train with."
    calls = iter(range(1, 10**6))
    blow = lambda: next(calls) == count and os.kill(os.getpid(), signal.SIGKILL)
    if kind == "loss":
        @functools.wraps(loss)  # the same loss, as far as a run can tell
        def deadly(model, batch, epoch):
            if model.training: blow()
            return loss(model, batch, epoch)
        return deadly
    replace = os.replace
    def deadly_replace(source, target):
        if Path(target).suffix == ".safetensors": blow()
        replace(source, target)
    training.os.replace = deadly_replace
    return loss


def fork(action):
    "The number of a child that performs the action and ends."
    child = os.fork()
    if child: return child
    try: action()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(action, folder):
    train(None, epochs=1)  # imports and sets up what every run needs
    if action == "kill":
        for schedule, kind, count in KILLED:
            child = fork(lambda: train(folder / f"{schedule}-{kind}-{count}", schedule,
                                       loss=kill_at(kind, count)))
            print(schedule, kind, count, os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
        return
    several(folder / "one", 0)
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    children = [fork(lambda: one_of_two(folder / "two", rank, port)) for rank in range(2)]
    if any(os.waitpid(child, 0)[1] for child in children): sys.exit("a child failed")


def one_of_two(folder, rank, port):
    "What torchrun arranges for each of two processes on this machine."
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    several(folder, rank)
    torch.distributed.destroy_process_group()  # close the connections in order


def several(folder, rank):
    "What is the same with one process and with two; two also stop, go on, and meet a bad example."
    x, y = data(33)  # a last batch of 1: one of two processes gets nothing
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True)
    squared = lambda model, batch, epoch: (model(batch[0])[:, 0] - batch[1]).square().mean()
    misses = lambda model, batch: ((model(batch[0])[:, 0] - batch[1]).abs() > 1).float()
    history = fit(net(0.0), loader, DataLoader(TensorDataset(*data(23, 5)), 8), squared, epochs=5,
                  lr=0.02, schedule="cosine", clip=1.0, accumulate=2,
                  metrics={"misses": misses}, folder=folder / "run", device="cpu")
    if rank == 0: save_history(history, folder / "curve.json")
    replace = os.replace
    # a slow disk: nobody may run ahead of a save
    training.os.replace = lambda source, target: (time.sleep(0.2), replace(source, target))
    for name, epochs in (("whole", 4), ("parts", 2), ("parts", 4)):
        train(folder / name, epochs=epochs)
        # in every process
        assert training.load_checkpoint(folder / name, which="last").epoch == epochs
    training.os.replace = replace
    x[17] = float("nan")
    try: fit(net(0.0), loader, None, squared, epochs=1, folder=folder / "bad", device="cpu")
    except training.NonFiniteLoss as e: (folder / f"message{rank}.txt").write_text(str(e))


if __name__ == "__main__": main(sys.argv[1], Path(sys.argv[2]))
