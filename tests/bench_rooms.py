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
    absorption, order = pra.inverse_sabine(room.t60, room.size)
    def compute():
        box = pra.ShoeBox(room.size, fs=16000, materials=pra.Material(absorption), max_order=order)
        box.add_source(source.double().numpy())
        box.add_microphone_array(mics.double().numpy().T)
        box.compute_rir()
        return [r[0] for r in box.rir]
    return compute


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
                      first(similar(0.05, 0.99)), 30 / part)])


for t60, part in ((0.2, 30), (0.6, 10)):
    row(f"rir_image_{round(10 * t60):02d}", f"RIR by all images, 30 microphones, T60 {t60} s")(
        lambda t60=t60, part=part: image_row(t60, part))


@growth("rir_image_t60", "RIR by all images, 30 microphones, against T60", (0.2, 0.4, 0.8))
def _(t60):
    room, (source, mics) = Room(SIZE, t60), points(30)
    return lambda: rirs(room, source, mics, method="image")


@memory("moving_600", "moving source, 600 s, 4 microphones")
def _():
    room = Room((6, 5, 3), 0.4)
    mics = robot_head_array()[:4] + torch.tensor([3.0, 2.5, 1.2])
    track = random_trajectory(room, 600, torch.Generator().manual_seed(0))
    voice = speech_like(600.0)
    moving_source(voice[:16000], room, random_trajectory(
        room, 1, torch.Generator().manual_seed(0)), mics)
    return lambda: moving_source(voice, room, track, mics).audio
