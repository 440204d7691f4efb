"""Rows of the bench: impulse responses of rooms and talkers that walk."""
import numpy as np
import torch
from bench import Case, Peer, growth, memory, row
from ssl_nb.acoustics.geometry import robot_head_array
from ssl_nb.acoustics.moving_sources import moving_source, random_trajectory
from ssl_nb.acoustics.rooms import Room, rirs
from ssl_nb.acoustics.signals import speech_like

SIZE = (7.0, 7.0, 4.2)  # m


def points(count, seed=0):
    "One source and so many microphones in the room."
    draw = torch.rand(count + 1, 3, generator=torch.Generator().manual_seed(seed))
    return draw[0] * torch.tensor(SIZE), draw[1:] * torch.tensor(SIZE)


def pyroomacoustics(room, source, mics):
    "Full image order; returns what computes and gives the responses."
    import pyroomacoustics as pra
    pra.constants.set("rir_hpf_enable", False)  # its high-pass is no part of the image method
    absorption, order = pra.inverse_sabine(room.t60, room.size)
    def compute():
        box = pra.ShoeBox(room.size, fs=16000, materials=pra.Material(absorption), max_order=order)
        box.add_source(source.double().numpy())
        box.add_microphone_array(mics.double().numpy().T)
        box.compute_rir()
        return [r[0] for r in box.rir]
    return compute


def rir_generator(room, source, mics):
    "Habets' generator, all images, without its high-pass."
    from rir_generator import generate
    return lambda: generate(343.0, 16000, mics.double().numpy(), source.double().numpy(),
                            list(room.size), reverberation_time=room.t60,
                            nsample=round(room.t60 * 16000), hp_filter=False).T


def similar(seconds, least, delay=40):
    """Correlation of the first `seconds` of the responses, theirs `delay` samples later (the
    library's fractional-delay filter)."""
    def agree(ours, theirs):
        n = round(seconds * 16000)
        a = ours.double().numpy()[:, :n].ravel()
        b = np.stack([t[delay:delay + n] for t in theirs]).ravel()
        found = float(a @ b / np.sqrt((a @ a) * (b @ b)))
        assert found >= least, f"correlation {found:.4f}"
        return f"correlation {found:.4f}"
    return agree


def image_row(t60, part=30):
    room, (source, mics) = Room(SIZE, t60), points(30)
    first = lambda agree: lambda a, b: agree(a[:part], b)
    return Case(lambda: rirs(room, source, mics, method="image"),
                [Peer("pyroomacoustics", lambda: pyroomacoustics(room, source, mics[:part]),
                      first(similar(0.05, 0.99)), 30 / part),
                 Peer("rir-generator", lambda: rir_generator(room, source, mics[:3]),
                      lambda a, b: similar(0.05, 0.9, delay=0)(a[:3], b), 10)])


for t60, part in ((0.2, 30), (0.6, 10)):
    row(f"rir_image_{round(10 * t60):02d}", f"RIR by all images, 30 microphones, T60 {t60} s")(
        lambda t60=t60, part=part: image_row(t60, part))


# commit dd71899 took 1.6 times as long, and 1.5 times at T60 0.2 s, measured in turns in one
# process on the AMD EPYC of data/bench, load 7
@row("rir_hybrid_06", "RIR, hybrid, 30 microphones, T60 0.6 s")
def _():
    room, (source, mics) = Room(SIZE, 0.6), points(30)
    def torchrir():
        from torchrir import MicrophoneArray, Room as Theirs, Source, StaticScene
        from torchrir.config import SimulationConfig
        from torchrir.sim import simulate
        scene = StaticScene(room=Theirs.shoebox(list(SIZE), fs=16000, t60=0.6),
                            sources=Source.from_positions(source[None]),
                            mics=MicrophoneArray.from_positions(mics))
        config = SimulationConfig(max_order=12, nsample=9600, tdiff=0.08, seed=0)
        return lambda: simulate(scene, config).rirs[0]
    return Case(lambda: rirs(room, source, mics, method="hybrid"), [
        Peer("torchrir with its diffuse tail from 80 ms", torchrir,
             similar(0.05, 0.9, delay=0))])


@row("moving_20", "moving source, 20 s, 12 microphones, T60 0.7 s, 156 positions")
def _():
    room, mics = Room((6, 5, 3), 0.7), robot_head_array() + torch.tensor([3.0, 2.5, 1.2])
    track, voice = random_trajectory(room, 20, torch.Generator().manual_seed(0)), speech_like(20.0)
    spot = track.at(torch.tensor([7.0]))[0]
    return Case(lambda: moving_source(voice, room, track, mics, interval=20 / 155),
                [Peer("pyroomacoustics at every position, without convolutions",
                      lambda: pyroomacoustics(room, spot, mics),
                      "ours is hybrid, theirs all images", 156)])


@growth("rir_hybrid_t60", "RIR, hybrid, 30 microphones, against T60", (0.2, 0.4, 0.8))
def _(t60):
    room, (source, mics) = Room(SIZE, t60), points(30)
    return lambda: rirs(room, source, mics, method="hybrid")


@growth("rir_hybrid_mics", "RIR, hybrid, T60 0.4 s, against microphones", (8, 16, 32, 64))
def _(count):
    room, (source, mics) = Room(SIZE, 0.4), points(count)
    return lambda: rirs(room, source, mics, method="hybrid")


@growth("rir_image_t60", "RIR by all images, 30 microphones, against T60", (0.2, 0.4, 0.8))
def _(t60):
    room, (source, mics) = Room(SIZE, t60), points(30)
    return lambda: rirs(room, source, mics, method="image")


@memory("moving_120", "moving source, 120 s, 4 microphones, T60 0.3 s")
def _():
    room = Room((6, 5, 3), 0.3)
    mics = robot_head_array()[:4] + torch.tensor([3.0, 2.5, 1.2])
    track = random_trajectory(room, 120, torch.Generator().manual_seed(0))
    voice = speech_like(120.0)
    moving_source(voice[:16000], room, random_trajectory(
        room, 1, torch.Generator().manual_seed(0)), mics)
    return lambda: moving_source(voice, room, track, mics).audio


@memory("moving_noisy", "moving source, 600 s, 8 microphones, anechoic, with noise at 20 dB")
def _():
    room = Room((6, 5, 3), 0.0)
    mics = robot_head_array()[:8] + torch.tensor([3.0, 2.5, 1.2])
    g = torch.Generator().manual_seed(0)
    track, voice = random_trajectory(room, 600, g), speech_like(600.0)
    moving_source(voice[:16000], room, random_trajectory(room, 1, g), mics)
    return lambda: moving_source(voice, room, track, mics, snr_db=20.0, method="anechoic").audio
