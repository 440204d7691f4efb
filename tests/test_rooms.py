"""Image sources, hybrid responses, diffuse noise: against pyroomacoustics, closed forms and what
was asked for."""
import math

import numpy as np
import pyroomacoustics as pra
import pytest
import torch
from ssl_nb.acoustics.diffuse_noise import diffuse_coherence, diffuse_noise, mix_diffuse
from ssl_nb.acoustics.geometry import circular_array, distances
from ssl_nb.acoustics.image_sources import image_source_rirs
from ssl_nb.acoustics.rooms import Room, measure_t60, rirs
from ssl_nb.acoustics.signals import high_pass, stft


def inside(size, count, seed, margin=0.1):
    "Points in a room, at least a tenth of its sides from the walls."
    size = torch.tensor(size, dtype=torch.float32)
    return (margin + (1 - 2 * margin)
            * torch.rand(count, 3, generator=torch.Generator().manual_seed(seed))) * size


def relative(ours, theirs):
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


# --- image sources --------------------------------------------------------------------------------

def library(size, absorption, source, mics, seconds, fs=16000):
    "pyroomacoustics with six walls of their own, its 40 samples taken away: (mics, taps)."
    pra.constants.set("rir_hpf_enable", False)
    walls = dict(zip(("west", "east", "south", "north", "floor", "ceiling"),
                     map(pra.Material, absorption)))
    order = math.ceil(seconds * 343 / min(size)) + 3
    room = pra.ShoeBox(size, fs=fs, materials=walls, max_order=order)
    room.set_sound_speed(343.0)
    room.add_source(source)
    room.add_microphone_array(np.asarray(mics).T)
    room.compute_rir()
    pra.constants.set("rir_hpf_enable", True)
    n = round(seconds * fs)
    return torch.stack([torch.nn.functional.pad(torch.from_numpy(row[0][40:].copy()).float(),
                                                (0, n))[:n] for row in room.rir])


@pytest.mark.parametrize("size, absorption", [([5.0, 4.0, 3.0], [0.3] * 6),
                                              ([3.2, 7.0, 2.6], [0.1, 0.6, 0.3, 0.2, 0.5, 0.4]),
                                              ([9.0, 6.5, 4.2], [0.5, 0.5, 0.2, 0.2, 0.8, 0.3])])
def test_image_sources_equal_the_library_to_a_thousandth(size, absorption):
    points = inside(size, 5, 1)
    ours = image_source_rirs(torch.tensor(size), torch.tensor(absorption), points[:1], points[1:],
                             seconds=0.08)[0]
    theirs = library(size, absorption, points[0].numpy(), points[1:].numpy(), 0.08)
    for a, b in zip(ours, theirs): assert relative(a, b) < 1e-3


def test_a_batch_of_rooms_is_each_room_by_itself():
    sizes, absorption = (torch.tensor([[[5.0, 4, 3], [8, 6, 3.5]]]),
                         torch.rand(1, 2, 6, generator=torch.Generator().manual_seed(0)))
    sources, mics = inside([4, 4, 3], 6, 0).reshape(1, 2, 3,
                                                    3), inside([4, 4, 3], 8, 1).reshape(1, 2, 4, 3)
    batch = image_source_rirs(sizes, absorption, sources, mics, seconds=0.05)
    assert batch.shape == (1, 2, 3, 4, 800)
    for r in range(2):
        for s in range(3):
            alone = image_source_rirs(sizes[0, r], absorption[0, r], sources[0, r, s:s + 1],
                                      mics[0, r, 2:3], seconds=0.05)
            torch.testing.assert_close(batch[0, r, s, 2], alone[0, 0], rtol=0, atol=1e-5)


def test_small_groups_of_rows_change_nothing(monkeypatch):
    from ssl_nb.acoustics import image_sources
    arguments = (torch.tensor([5.0, 4, 3]), torch.full((6,), 0.2), inside([5, 4, 3], 7, 0),
                 inside([5, 4, 3], 5, 1))
    whole = image_source_rirs(*arguments, seconds=0.06)
    monkeypatch.setattr(image_sources, "_AT_ONCE", {True: 1e5, False: 1e5})
    torch.testing.assert_close(image_source_rirs(*arguments, seconds=0.06), whole, rtol=0,
                               atol=1e-6)


def test_orders_add_up_and_longer_responses_only_go_on():
    arguments = (torch.tensor([5.0, 4, 3]), torch.full((6,), 0.2), inside([5, 4, 3], 1, 0),
                 inside([5, 4, 3], 2, 1))
    short, long = image_source_rirs(*arguments,
                                    seconds=0.03), image_source_rirs(*arguments, seconds=0.06)
    torch.testing.assert_close(long[..., :480], short, rtol=0, atol=1e-5)
    few, many = (image_source_rirs(*arguments, seconds=0.03, max_order=0),
                 image_source_rirs(*arguments, seconds=0.03, max_order=60))
    torch.testing.assert_close(many, short, rtol=0, atol=1e-5)
    torch.testing.assert_close(few.abs().amax(-1), 1 / distances(arguments[3], arguments[2]),
                               rtol=0.4, atol=0)  # a sinc between samples


def test_open_walls_leave_the_direct_sound():
    arguments = torch.tensor([5.0, 4, 3]), inside([5, 4, 3], 1, 0), inside([5, 4, 3], 2, 1)
    open_room = image_source_rirs(arguments[0], torch.ones(6), *arguments[1:], seconds=0.05)
    torch.testing.assert_close(open_room,
                               image_source_rirs(arguments[0], torch.zeros(6), *arguments[1:],
                                                 seconds=0.05, max_order=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change, words", [
    ({"size": torch.tensor([5.0, -4, 3])}, "size:"),
    ({"absorption": torch.full((6,), 1.2)}, "absorption: 1.2 at index .* from 0 to 1"),
    ({"absorption": [0.1, 0.2]}, "absorption: shape .* one per wall"),
    ({"sources": torch.tensor([[6.0, 1, 1]])}, "sources: .* outside"),
    ({"mics": torch.tensor([[1.0, 1, 3.5]])}, "mics: .* outside"),
    ({"mics": torch.tensor([[1.0, 1, 1]])}, "lies on a source"), ({"seconds": 0.0}, "seconds=0.0"),
    ({"seconds": 30.0}, "image sources, more than"),
    ({"fs": 0}, "fs=0"), ({"c": -1.0}, "c=-1.0"), ({"max_order": -1}, "max_order=-1"),
    ({"size": [5.0, 4.0]}, "size: shape"), ({"sources": [[1.0, math.nan, 1]]}, "must be finite"),
    ({"mics": [[1.0, 1.0]]}, "mics: shape"),
])
def test_impossible_image_sources_are_refused(change, words):
    arguments = {"size": torch.tensor([5.0, 4, 3]), "absorption": torch.full((6,), 0.3),
                 "sources": torch.ones(1, 3), "mics": torch.full((1, 3), 2.0)}
    with pytest.raises(ValueError, match=words): image_source_rirs(**arguments | change)


def test_image_sources_take_lists_arrays_a_single_absorption_and_a_fractional_rate():
    points = inside([5, 4, 3], 3, 0)
    wanted = image_source_rirs(torch.tensor([5.0, 4, 3]), torch.full((6,), 0.2), points[:1],
                               points[1:], seconds=0.03)
    lists = image_source_rirs((5, 4, 3), 0.2, points[:1].numpy(), points[1:].tolist(), seconds=0.03)
    assert torch.equal(lists, wanted)
    # whole samples of a fractional rate: the direct sound lies at its delay
    odd = image_source_rirs([9, 9, 9], 1.0, [[1, 4, 4]], [[8, 4, 4]], 44100.7, 0.03)[0, 0]
    assert odd.abs().argmax() == round(7 / 343 * 44100.7)


# --- hybrid ---------------------------------------------------------------------------------------

SIZES = [(3, 3, 3), (4, 3, 2.6), (6, 5, 3), (10, 4, 3), (10, 8, 4), (10, 10, 4.2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t60", [0.2, 0.3, 0.5, 0.8, 1.2])
def test_hybrid_decays_as_asked(size, t60):
    room = Room(size, t60)
    points = inside(size, 25, 2)
    h = rirs(room, points[0], points[1:], method="hybrid",
             generator=torch.Generator().manual_seed(0))
    assert h.shape[-1] == math.ceil(t60 * 16000)
    measured = measure_t60(h, 16000, (-5, -35)).mean()
    assert abs(measured / t60 - 1) < 0.1, measured / t60


def step_db(room, seed, count=24):
    "Jump of the energy (20 ms windows, many microphones) at the mixing time, the decay taken out."
    points = inside(room.size, count + 1, seed)
    h = rirs(room, points[0], points[1:], method="hybrid",
             generator=torch.Generator().manual_seed(seed))
    energy = high_pass(h, 16000, 100).square().mean(0)
    at, w = round(room.t60 / 4 * 16000), 320
    return float(10 * torch.log10(energy[at + 160:at + 160 + w].mean() / energy[at - w:at].mean())
                 + 60 * (w + 160) / 16000 / room.t60)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t60", [0.25, 0.3, 0.6, 1.2])
def test_hybrid_has_no_step(size, t60): assert abs(step_db(Room(size, t60), 3)) < 1


@pytest.mark.parametrize("mixing_time", [None, 0.06, 0.2])
def test_hybrid_starts_as_the_image_method(mixing_time):
    room, points = Room((6, 5, 3), 0.5), inside((6, 5, 3), 5, 4)
    image, hybrid = (rirs(room, points[0], points[1:]),
                     rirs(room, points[0], points[1:], method="hybrid", mixing_time=mixing_time))
    n = round((mixing_time or 0.125) * 16000)
    assert relative(hybrid[:, :n], image[:, :n]) < 1e-5
    assert relative(hybrid[:, n:], image[:, n:]) > 0.5


def test_hybrid_noise_follows_its_generator():
    room, points = Room((6, 5, 3), 0.3), inside((6, 5, 3), 4, 5)
    make = lambda seed: rirs(room, points[:2], points[2:], method="hybrid",
                             generator=torch.Generator().manual_seed(seed))
    assert make(0).equal(make(0)) and not make(0).equal(make(1))
    # sources do not share their late sound
    assert not make(0)[0, :, 2000:].equal(make(0)[1, :, 2000:])


def test_hybrid_tail_is_coherent_as_asked():
    mics = circular_array(4, 0.05) + torch.tensor([3.0, 2.5, 1.5])
    sources = inside((6, 5, 3), 60, 6)
    f = torch.linspace(0, 8000, 129)
    law = torch.sinc(2 * f * 0.1 / 343)  # opposite microphones of the ring
    for tail, wanted in (("diffuse", law), ("independent", torch.zeros_like(law))):
        late = rirs(Room((6, 5, 3), 0.5), sources, mics, method="hybrid", tail=tail,
                    generator=torch.Generator().manual_seed(0))[:, [0, 2], 2400:]
        spectra = stft(late, 256)
        cross = ((spectra[:, 0] * spectra[:, 1].conj()).sum((0, -1)).real
                 / spectra.abs().square().sum((0, -1)).prod(0).sqrt())
        assert (cross - wanted)[2:].square().mean().sqrt() < 0.05


@pytest.mark.parametrize("options, words", [({"tail": "none"}, "tail='none'"),
                                            ({"mixing_time": 0.001}, "mixing_time=0.001"),
                                            ({"mixing_time": 0.6}, "mixing_time=0.6")])
def test_bad_hybrids_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        rirs(Room((6, 5, 3), 0.5), torch.ones(3), torch.full((2, 3), 2.0), method="hybrid",
             **options)


# --- diffuse noise --------------------------------------------------------------------------------

@pytest.mark.parametrize("spacing", [0.03, 0.2, 2.0])
def test_diffuse_noise_has_the_closed_forms_coherence(spacing):
    mics = torch.tensor([[0.0, 0, 0], [spacing, 0, 0], [0, spacing, 0]])
    spectra = stft(diffuse_noise(mics, 40 * 16000, generator=torch.Generator().manual_seed(0)),
                   1024)
    cross = (spectra[:, None] * spectra.conj()).mean(-1)
    power = spectra.abs().square().mean(-1)
    measured = (cross / (power[:, None] * power).sqrt()).movedim(-1, 0)
    law = torch.sinc(2 * torch.linspace(0, 8000, 513)[:, None, None] * torch.cdist(mics, mics)
                     / 343)
    torch.testing.assert_close(diffuse_coherence(mics, torch.linspace(0, 8000, 513)), law, rtol=0,
                               atol=1e-4)
    error = measured - law
    assert (error[4:].abs().square().mean().sqrt() < 0.04
            and abs(power.mean() / power.mean(0).mean() - 1) < 0.05)


def test_diffuse_noise_keeps_power_batch_and_seed():
    mics = circular_array(6, 0.1)
    make = lambda seed: diffuse_noise(mics, 8000, generator=torch.Generator().manual_seed(seed),
                                      batch=(2, 3))
    noise = make(0)
    assert (noise.shape == (2, 3, 6, 8000) and noise.equal(make(0))
            and abs(noise.square().mean() - 1) < 0.05)
    with pytest.raises(ValueError, match="signals: has 5 channels"):
        mix_diffuse(torch.zeros(5, 100), mics)
    with pytest.raises(ValueError, match="time must come last"):
        mix_diffuse(torch.zeros(100, 6), mics)
    with pytest.raises(ValueError, match="one array at a time"): diffuse_noise(mics[None], 100)
    with pytest.raises(ValueError, match="time=0"): diffuse_noise(mics, 0)


def test_diffuse_noise_takes_lists_and_a_few_samples_of_many_microphones():
    mics = circular_array(6, 0.1)
    make = lambda m, time: diffuse_noise(m, time, generator=torch.Generator().manual_seed(0))
    assert make(mics.tolist(), 5).equal(make(mics, 5)) and make(mics, 5).shape == (6, 5)
    assert diffuse_coherence(mics.numpy(), [500, 1000.0]).shape == (2, 6, 6)


@pytest.mark.parametrize("cutoff", [0.0, 8000.0, float("nan")])
def test_high_pass_refuses_impossible_cutoffs(cutoff):
    with pytest.raises(ValueError, match="cutoff="): high_pass(torch.zeros(10), 16000, cutoff)
