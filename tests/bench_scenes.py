"""Rows of the bench: scenes, simulated, read and drawn, beside a training step that takes them."""
import resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import torch
from bench import Case, Peer, memory, noise, report, row
from ssl_nb.end_to_end.waveform_nets import WaveformCNN
from ssl_nb.workshop.scene_bank import SceneBank
from ssl_nb.workshop.scenes import SceneDataset, SceneSpec, SceneStore, write_scenes

SQUARE = SceneSpec(seconds=1.0, array="compact", t60=(0.2, 0.6),
                   mics=((-0.2, 0, 0), (0.2, 0, 0), (0, 0.2, 0), (0, 0, 0.2)))
AD1 = SceneSpec(seconds=2.0, size=((4, 10), (4, 10), (4.2, 4.2)), t60=(0.2, 1.2), n_mics=30,
                mic_height=(0.9, 0.9), source_height=(0.95, 0.95), placement_grid=16,
                snr_db=(0, 50))


def batches(count=256, size=64):
    "Indices of one random batch after another."
    g = torch.Generator().manual_seed(0)
    while True: yield torch.randperm(count, generator=g)[:size].tolist()


def training_step(device="cpu"):
    net = WaveformCNN(4, 3).to(device)
    step = torch.optim.Adam(net.parameters())
    audio, places = noise(64, 4, 16000, device=device), noise(64, 3, device=device)
    def train():
        step.zero_grad()
        (net(audio) - places).square().mean().backward()
        step.step()
    return train


@row("training_step", "training step of WaveformCNN, 64 recordings of 4 x 16000")
def _(device="cpu"):
    # multiply-adds of its three convolutions, twice for two flop, three times for both gradients
    net, flops, shapes = WaveformCNN(4, 3), 0.0, []
    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv1d, torch.nn.Linear)):
            layer.register_forward_hook(lambda m, x, y: shapes.append((m, y.shape)))
    net(noise(1, 4, 16000))
    for layer, shape in shapes:
        flops += 2 * layer.weight.numel() * (shape[-1] if isinstance(layer, torch.nn.Conv1d) else 1)
    return Case(training_step(device), work={"matmul": 3 * 64 * flops})


def zarr_reader(store):
    "The same scenes by Zarr alone."
    import zarr
    group, order = zarr.open_group(str(store.path), mode="r"), batches()
    def read():
        return [{name: torch.as_tensor(group[name][i]) for name in store.about["arrays"]}
                for i in next(order)]
    return read


def same_scenes(ours, theirs):
    assert all(a[k].equal(b[k]) for a, b in zip(ours, theirs) for k in b)
    return "bit for bit"


@row("loading_store", "64 scenes of 4 x 16000 from a SceneStore")
def _():
    folder = Path(tempfile.mkdtemp()) / "store"
    write_scenes(folder, SQUARE, 256, workers=0, progress=False)
    store, order = SceneStore(folder), batches()
    return Case(lambda: store.__getitems__(next(order)),
                [Peer("zarr", lambda: zarr_reader(store), same_scenes)],
                work={"copy": 64 * 4 * 16000 * 4}, share="training_step")


@row("loading_bank", "64 visits of 4 x 16000 to a SceneBank, T60 0.2 to 0.6 s")
def _():
    bank, order = SceneBank(SQUARE, 256, per_room=16), batches()
    n = sum(r["n"] for r in bank.rooms) / len(bank.rooms)
    return Case(lambda: bank.__getitems__(next(order)),
                work={"fft": 5 / 4 * 2.5 * n * 14.6 * 64 * 4}, share="training_step")


@row("loading_dataset", "64 scenes of 4 x 16000 simulated by a SceneDataset")
def _():
    data, order = SceneDataset(SQUARE, 256), batches()
    return Case(lambda: [data[i] for i in next(order)], share="training_step")


@row("scene_ad1", "a scene of dataset Ad-1: 30 microphones, 2 s, T60 0.2 to 1.2 s")
def _():
    from bench_rooms import pyroomacoustics
    from ssl_nb.acoustics.rooms import Room
    data, numbers = SceneDataset(AD1, 10), iter(range(10**9))
    rooms = [data[i] for i in range(10)]
    def library():
        s = rooms[next(numbers) % 10]
        room = Room(s["size"].tolist(), float(s["t60"]))
        return pyroomacoustics(room, s["sources"][0], s["mics"])()
    count = iter(range(10**9))
    return Case(lambda: data[next(count) % 10],
                [Peer("pyroomacoustics, responses only", lambda: library,
                      "the responses' agreement is that of the image method's rows")])


def processor_seconds():
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(r.ru_utime + r.ru_stime for r in both)


WRITTEN = (32, 352)  # scenes


def cores_free(seconds=3.0):
    "How much faster two processes burn than one, beside whatever else the machine does: 1 to 2."
    burn = (f"import time\nend = time.process_time() + {seconds}\n"
            "while time.process_time() < end: pass")
    def clock(count):
        begin = time.perf_counter()
        for p in [subprocess.Popen([sys.executable, "-c", burn]) for _ in range(count)]: p.wait()
        return time.perf_counter() - begin
    return 2 * clock(1) / clock(2)


@report("writing", "a store of type Ad-1 written by 0, 1 and 2 workers, milliseconds a scene "
                   "beyond what starting them takes")
def _():
    rows, folder = [], Path(tempfile.mkdtemp())
    for workers in (0, 1, 2):
        spent = []
        for count in WRITTEN:  # the difference is free of starting
            clock, processor = time.perf_counter(), processor_seconds()
            write_scenes(folder / f"{workers}-{count}", AD1, count, shard=8, precision="float16",
                         workers=workers, progress=False)
            spent.append((time.perf_counter() - clock, processor_seconds() - processor))
            shutil.rmtree(folder / f"{workers}-{count}")
        clock, processor = ((b - a) / (WRITTEN[1] - WRITTEN[0]) * 1e3 for a, b in zip(*spent))
        rows.append({"workers": workers, "clock_ms": clock, "processor_ms": processor,
                     "start_s": spent[0][0] - clock * WRITTEN[0] / 1e3,
                     "cores_free": cores_free()})
    return rows


def hour_of_four():
    "A file of an hour, four channels of noise, and the array that recorded it."
    import numpy as np
    import soundfile
    from ssl_nb.workshop.localizers import read_array
    folder, draw = Path(tempfile.mkdtemp()), np.random.default_rng(0)
    with soundfile.SoundFile(folder / "hour.wav", "w", 16000, 4, "PCM_16") as file:
        for _ in range(60): file.write(0.1 * draw.standard_normal((60 * 16000, 4), np.float32))
    return folder / "hour.wav", read_array("respeaker_4")


@memory("hour", "an hour of four channels from disk, minute by minute, SRP-PHAT directions twice "
                "a second")
def _():
    import warnings
    from ssl_nb.workbench.locating import locate_file
    path, array = hour_of_four()
    def locate():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a flat array: above and below sound alike
            found = locate_file(path, array, hop=0.5)
        shutil.rmtree(path.parent)
        return found.points
    return locate
