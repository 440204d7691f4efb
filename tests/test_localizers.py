"""One interface for every method: arrays, frames, refusals, the classical methods and files."""
import math, re, warnings

import numpy as np
import pytest
import soundfile
import torch
from ssl_nb.acoustics.geometry import circular_array, far_field_tdoas, linear_array
from ssl_nb.acoustics.geometry import tetrahedral_array, to_direction, wall_array
from ssl_nb.acoustics.rooms import Room, make_scene
from ssl_nb.acoustics.signals import add_noise, speech_like
from ssl_nb.classical.over_time import GccMultilateration, Music, SrpPhat, canonical, directions_of
from ssl_nb.classical.over_time import follow
from ssl_nb.workbench.locating import estimate_figure, estimate_table, locate_file, method_table
from ssl_nb.workbench.locating import save_estimate
from ssl_nb.workshop import localizers as lz

FS = 16000


def generator(seed=0): return torch.Generator().manual_seed(seed)


def rotation(seed):
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator(seed), dtype=torch.float64))
    return q * r.diagonal().sign()


def plane_wave(mics, toward, seconds=1.0, snr_db=20.0, seed=0):
    "Speech-like sound from far away, delayed by exact phases, between stretches of noise alone."
    n = round(seconds * FS)
    spectrum = torch.fft.rfft(speech_like(seconds, FS, seed))
    f = torch.linspace(0, FS / 2, len(spectrum))
    late = -(mics @ toward) / 343
    wave = torch.fft.irfft(spectrum * torch.exp(-2j * math.pi * f * late[:, None]), n)
    quiet = torch.zeros(len(mics), FS)
    return add_noise(torch.cat([quiet, wave, quiet], -1), snr_db, generator(seed))


# --- arrays ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", lz.known_arrays())
def test_known_arrays_are_whole(name):
    array = lz.read_array(name)
    assert array.source and array.name != name and 4 <= len(array.positions) <= 32
    assert torch.pdist(array.positions).min() > 0.01 and torch.pdist(array.positions).max() < 0.3


@pytest.mark.parametrize("name, radius", [("eigenmike_32", 0.042), ("dcase_mic", 0.042),
                                          ("respeaker_6", 0.0463), ("matrix_creator", 0.0525)])
def test_radii_of_devices(name, radius):
    "From the makers' data sheets."
    lengths = lz.read_array(name).positions.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, radius), rtol=0, atol=1e-4)


def test_capsules_of_the_tetrahedron_are_those_of_the_sphere():
    "DCASE: channels 6, 10, 26 and 22 of the em32, to the rounding of its angles."
    sphere = lz.read_array("eigenmike_32").positions[[5, 9, 25, 21]]
    torch.testing.assert_close(lz.read_array("dcase_mic").positions, sphere, rtol=0, atol=1e-3)


@pytest.mark.parametrize("text, told", [
    ("positions: [[0, 0, 0], [0, 0]]", "different lengths"), ("positions: [[0, 0], [1, 0]]", "3"),
    ("name: x", "positions"),
    ("positions: [[0, 0, .nan]]", "finite"), ("positions: x", "positions"),
    ("positions: [[0, 0, 0], [0, 0, 0]]", "same place"), ("[1, 2", "cannot be read"),
    ("positions: [[0, 0, 0]]\nrate: -1", "rate"), ("positions: [[0, 0, 0]]\nratte: 1", "ratte")])
def test_bad_array_files(text, told, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=told): lz.read_array(tmp_path / "a.yaml")


def test_arrays_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"): lz.read_array(tmp_path / "b.yaml")
    with pytest.raises(ValueError, match="did you mean 'respeaker_6'"): lz.read_array("respeaker6")


@pytest.mark.parametrize("seed", range(4))
def test_dimensions_do_not_depend_on_turning_and_scale(seed):
    turn = rotation(seed)
    for mics, dimensions in ((linear_array(4, 0.05), 1), (circular_array(6, 0.1), 2),
                             (tetrahedral_array(0.1), 3)):
        assert lz.spans((mics.double() @ turn * 7 + 3).float())[0] == dimensions


# --- what sounds alike ----------------------------------------------------------------------------

@pytest.mark.parametrize("mics", [linear_array(4, 0.05), circular_array(6, 0.1),
                                  tetrahedral_array(0.1)], ids=["line", "plane", "space"])
@pytest.mark.parametrize("seed", range(3))
def test_canonical_directions_have_the_delays_of_the_originals(mics, seed):
    mics = mics.double() @ rotation(seed)
    u = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator(seed)).double(),
                                      dim=-1)
    one = canonical(u, *lz.spans(mics))
    torch.testing.assert_close(far_field_tdoas(mics, one), far_field_tdoas(mics, u), rtol=0,
                               atol=1e-9)
    torch.testing.assert_close(canonical(one, *lz.spans(mics)), one, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(50).double(), rtol=0, atol=1e-6)


def test_flat_arrays_warn_and_are_searched_on_one_side():
    for mics, words, share in ((circular_array(6, 0.1), "plane", 0.5),
                               (linear_array(4, 0.1), "line", 0),
                               (tetrahedral_array(0.1), None, 1)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            grid = directions_of(mics)[0]
        assert [words in str(w.message) for w in caught] == ([True] if words else [])
        if share: assert abs(len(grid.points) * grid.spacing ** 2 / (4 * math.pi) - share) < 0.05


# --- the classical methods ------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:mics")
@pytest.mark.parametrize("method", [SrpPhat(), Music()], ids=["srp_phat", "music"])
@pytest.mark.parametrize("mics",
                         [lz.read_array("locata_robot_head").positions, circular_array(6, 0.1),
                          linear_array(6, 0.06)], ids=["head", "ring", "line"])
def test_directions_of_plane_waves(method, mics):
    toward = to_direction(torch.tensor(0.7), torch.tensor(0.5))
    found = method(plane_wave(mics, toward), mics, FS)
    heard = (found.times > 1.2) & (found.times < 1.8) & (found.activity[:, 0] > 0.5)
    assert found.far_field and heard.sum() >= 3 and found.spread.isnan().all()
    there = canonical(toward, *lz.spans(mics))
    angle = torch.atan2(torch.linalg.cross(found.points[heard, 0],
                                           there.expand(int(heard.sum()), 3))
                        .norm(dim=-1), found.points[heard, 0] @ there).rad2deg()
    assert angle.median() < 4
    quiet = (found.times < 0.8) | (found.times > 2.3)
    assert found.points[quiet].isnan().all() and (found.activity[quiet] < 0.5).all()


def test_positions_in_a_room_by_both_methods():
    room, mics = Room((5.0, 4.0, 3.0), t60=0.2), wall_array((5.0, 4.0, 3.0), generator(1))
    talker = torch.tensor([3.2, 1.4, 1.5])
    voice = torch.cat([torch.zeros(FS), speech_like(1.0, FS, 3), torch.zeros(FS)])
    scene = make_scene(room, voice, talker, mics, snr_db=20, generator=generator())
    for method, most in ((SrpPhat(), 0.1), (GccMultilateration(), 0.1)):
        found = method(scene.audio, mics, FS, room=room.size, hop=0.25)
        off = (found.points[:, 0] - talker).norm(dim=-1)
        heard = ~off.isnan()
        assert not found.far_field and heard.any() and off[heard].median() < most
    assert (found.spread[off < 0.1] > 0).all() and found.spread[~heard].isnan().all()
    assert (found.trust[off < 0.1] > 0.5).all() and found.trust[~heard].isnan().all()


def test_lists_and_arrays_are_taken_and_bad_calls_refused():
    mics = circular_array(4, 0.05)
    audio = plane_wave(mics, torch.tensor([1.0, 0, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(SrpPhat()(audio.numpy(), mics.tolist(), np.int64(FS)).points,
                                   SrpPhat()(audio, mics, FS).points, equal_nan=True)
    for options, told in (
            ({"sources": 5}, "at most 4"), ({"sources": 0}, "sources=0"),
            ({"hop": -1}, "hop"), ({"hop": 1e-9}, "hop"), ({"room": (5, 4)}, "room"),
            ({"room": (1, 1, 1)}, "outside"), ({"room": (9, 9, 9), "sources": 3}, "at most 2"),
            ({"fs": 0}, "fs"),
            ({"mics": mics[:3]}, "needs one for each of 3"), ({"audio": audio.T}, "time"),
            ({"audio": audio[None]}, "one recording"), ({"mics": mics * 0}, "same place"),
            ({"audio": audio * math.nan}, "finite")):
        with pytest.raises(ValueError, match=re.escape(told)):
            SrpPhat()(**({"audio": audio, "mics": mics, "fs": FS} | options))


@pytest.mark.filterwarnings("ignore:mics")
def test_a_short_and_a_silent_recording():
    mics = circular_array(4, 0.05)
    short = SrpPhat()(plane_wave(mics, torch.tensor([0.0, 1, 0]))[:, FS:FS + 1000], mics, FS)
    assert short.times.shape == (1,) and short.activity[0] == 1 and not short.points.isnan().any()
    silent = SrpPhat()(torch.zeros(4, 3 * FS), mics, FS)
    assert silent.points.isnan().all() and (silent.activity < 0.5).all()


def test_times_are_the_middles_of_frames():
    mics = circular_array(4, 0.05)
    call = lz.check_call(SrpPhat(), torch.randn(4, FS, generator=generator()), mics, FS, hop=0.15)
    pieces, times = lz.cut(call)  # frames of twice the hop
    torch.testing.assert_close(times, 0.15 + 0.15 * torch.arange(len(pieces)), rtol=0, atol=1e-6)
    assert pieces.shape == (5, 4, round(0.3 * FS))


# --- trust, nobody, tracks ------------------------------------------------------------------------

@pytest.mark.parametrize("seconds", [1.5, 4.0])
def test_noise_alone_gets_no_confident_answer(seconds):
    "In a recording too short to know its floor the activity is 1, and the trust must tell."
    mics, told = lz.read_array("locata_robot_head").positions, []
    for seed in range(4):
        found = SrpPhat()(torch.randn(12, round(seconds * FS), generator=generator(seed)), mics, FS)
        told.append((found.activity > 0.5) & (found.trust > 0.5))
    assert torch.cat(told).float().mean() < 0.05


@pytest.mark.parametrize("hop", [0.1, 0.5, 1.0, 2.0])
def test_someone_who_talks_all_the_time_is_heard_at_every_hop(hop):
    "Frames as long as sentences hold no pause, but their pieces do; steady noise stays nobody."
    from ssl_nb.workshop.speech import speech
    talk = speech("test", fs=FS).talk(20.0, generator(3))
    array = tetrahedral_array(0.06)
    heard = add_noise(talk.expand(4, -1), 20.0, generator(4))
    loud = SrpPhat()(heard, array, FS, hop=hop).activity[:, 0]
    steady = SrpPhat()(torch.randn(heard.shape, generator=generator(5)), array, FS, hop=hop)
    assert (loud > 0.5).float().mean() > 0.6 and (steady.activity[:, 0] < 0.5).all()


def test_pauses_of_noisy_speech_get_no_confident_answer():
    mics = lz.read_array("locata_robot_head").positions
    toward = to_direction(torch.tensor(-2.0), torch.tensor(0.2))
    found = SrpPhat()(plane_wave(mics, toward, 2.0, snr_db=10), mics, FS)
    quiet = (found.times < 0.8) | (found.times > 3.2)
    speaks = (found.times > 1.2) & (found.times < 2.8) & (found.activity[:, 0] > 0.5)
    assert not ((found.activity > 0.5) & (found.trust > 0.5))[quiet].any()
    assert (found.trust[speaks] > 0.5).float().mean() > 0.8


def walk(far, frames=60, seed=0):
    "A known path with gaps and outliers: an estimate and the truth."
    t, g = torch.arange(frames) * 0.1, generator(seed)
    if far:  # through the seam of the azimuth and close to the pole
        truth = to_direction(math.pi - 0.6 + 0.2 * t, 1.4 - 0.2 * t)
        points = torch.nn.functional.normalize(truth + 0.03 * torch.randn(frames, 3, generator=g),
                                               dim=-1)
    else:
        truth = torch.stack([1 + 0.5 * t, 2 + 0.2 * t, 1.5 + 0 * t], -1)
        points = truth + 0.05 * torch.randn(frames, 3, generator=g)
    points[[7, 23, 41]] = torch.tensor([0.0, 0.6, -0.8])  # outliers
    points[30:34] = torch.nan  # a gap of 0.4 s
    ones = torch.ones(frames, 1)
    return lz.Estimate(t, points[:, None], ones * torch.nan, ones, far), truth


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_track_bridges_gaps_and_refuses_outliers(far, seed):
    estimate, truth = walk(far, seed=seed)
    found = follow(estimate)
    off = (found.points[:, 0] - truth).norm(dim=-1)
    assert not off.isnan().any() and off.max() < 0.2 and off[5:].mean() < 0.06
    assert (found.spread > 0).all() and (found.spread[32] > found.spread[28]).all()
    if far:
        torch.testing.assert_close(found.points[:, 0].norm(dim=-1), torch.ones(60))
    short = follow(estimate, bridge=0.2).points[:, 0]
    assert short[30:34].isnan().all() and not short[34:].isnan().any()


@pytest.mark.parametrize("far", [True, False])
def test_a_track_that_began_at_an_outlier_is_dropped(far):
    estimate, truth = walk(far)
    estimate.points[0, 0] = torch.tensor([0.0, 0.6, -0.8])
    found = follow(estimate, bridge=0.5).points[:, 0]
    assert found[0].isnan().all()
    assert (found[1:] - truth[1:]).norm(dim=-1).max() < 0.2


def test_tracks_that_cannot_be():
    estimate, _ = walk(False)
    none = follow(estimate._replace(points=estimate.points * torch.nan))
    assert none.points.isnan().all() and none.spread.isnan().all()
    doubted = follow(estimate._replace(trust=torch.full((60, 1), 0.1)))
    assert doubted.points.isnan().all()
    two = lz.Estimate(*(torch.cat([p, p], 1) if p.ndim > 1 else p for p in estimate[:4]), False)
    with pytest.raises(ValueError, match="2 talkers"): follow(two)
    for options, told in (({"bridge": -1}, "bridge"), ({"least_trust": 2}, "least_trust"),
                          ({"sigma": 0}, "sigma"), ({"acceleration": "x"}, "acceleration")):
        with pytest.raises(ValueError, match=told): follow(estimate, **options)


@pytest.mark.parametrize("wide, told", [(3.0, "too wide"), (0.0003, "in metres"), (0.1, None)])
def test_arrays_that_do_not_fit_the_grid_are_named(wide, told):
    mics = tetrahedral_array(0.1) * wide / 0.1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SrpPhat()(torch.randn(4, FS, generator=generator()), mics, FS)
    assert [told in str(w.message) for w in caught] == ([True] if told else [])


# --- the registry ---------------------------------------------------------------------------------

def test_the_registry_holds_the_classical_methods_and_a_strangers(monkeypatch):
    assert {"srp_phat", "music", "gcc_multilateration"} <= set(lz.localizers())
    assert lz.localizer("srp_phat", c=340.0).c == 340
    from importlib.metadata import EntryPoint
    strange = [EntryPoint("mine", "ssl_nb.classical.over_time:Music", lz.GROUP),
               EntryPoint("broken", "nowhere.at_all:X", lz.GROUP)]
    monkeypatch.setattr(lz, "entry_points", lambda group: strange if group == lz.GROUP else [])
    assert lz.localizers() == ["broken", "mine"] and lz.localizer("mine").name == "music"
    with pytest.raises(ValueError, match="cannot be loaded"): lz.localizer("broken")
    with pytest.raises(ValueError, match="did you mean 'mine'"): lz.localizer("mime")


def test_the_table_of_methods_tells_their_needs():
    table = method_table().set_index("method")
    assert table.loc["gcc_multilateration", "room"] == "needed"
    assert table.loc["music", "finds"] == "directions"


# --- files ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ring_file(tmp_path_factory):
    path, mics = (tmp_path_factory.mktemp("files") / "ring.wav",
                  lz.read_array("respeaker_4").positions)
    soundfile.write(path,
                    plane_wave(mics, to_direction(torch.tensor(2.0), torch.tensor(0.3))).T, FS)
    return path


@pytest.mark.filterwarnings("ignore:mics")
def test_blocks_tile_the_file(ring_file):
    whole, cut = (locate_file(ring_file, "respeaker_4", block=b) for b in (60.0, 0.7))
    torch.testing.assert_close(cut.times, whole.times, rtol=0, atol=1e-6)
    both = (cut.activity > 0.5) & (whole.activity > 0.5)
    assert both.sum() >= 5
    torch.testing.assert_close(cut.points[both], whole.points[both], rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:mics")
def test_channels_are_chosen_by_number(ring_file, tmp_path):
    samples, fs = soundfile.read(ring_file)
    soundfile.write(tmp_path / "six.wav", np.column_stack([samples[:, 0] * 0, samples[:, ::-1],
                                                           samples[:, 0] * 0]), fs)
    chosen = locate_file(tmp_path / "six.wav", "respeaker_4", channels=[5, 4, 3, 2])
    torch.testing.assert_close(chosen.points, locate_file(ring_file, "respeaker_4").points,
                               rtol=0, atol=2e-3, equal_nan=True)


@pytest.mark.filterwarnings("ignore:mics")
def test_table_picture_and_page(ring_file, tmp_path):
    estimate = locate_file(ring_file, "respeaker_4", sources=2)
    table = estimate_table(estimate)
    assert list(table.columns) == ["time_s", "talker", "azimuth_deg", "elevation_deg", "spread_deg",
                                   "activity", "trust"] and len(table) == 2 * len(estimate.times)
    first = table[(table.talker == 1) & (table.activity > 0.5)]
    assert abs(first.azimuth_deg.median() - math.degrees(2.0)) < 4
    written = save_estimate(estimate, ring_file, tmp_path / "<out>", "words & <more>")
    page = written[-1].read_text()
    assert "words &amp; &lt;more&gt;" in page and "<script" not in page and "http" not in page
    assert soundfile.info(written[2]).frames == soundfile.info(ring_file).frames
    assert estimate_figure(estimate).axes[0].get_ylim() == (-180, 180)


@pytest.mark.filterwarnings("ignore:mics")
@pytest.mark.parametrize("change, told", [
    (lambda x: x[:, 0], "1 channel,"), (lambda x: x[:0], "no samples"),
    (lambda x: np.where(np.arange(len(x))[:, None] == 5000, np.nan, x), "at 0.312 s"),
    (lambda x: np.column_stack([x[:, :3], 0 * x[:, 3]]), "channel 4 is silent"),
    (lambda x: np.column_stack([x[:, :3], x[:, 2]]), "channels 3 and 4 hold the same"),
    (lambda x: (30 * x).clip(-1, 1), "full scale")])
def test_files_that_are_not_well(change, told, ring_file, tmp_path):
    samples, fs = soundfile.read(ring_file)
    soundfile.write(tmp_path / "x.wav", change(samples), fs, subtype="FLOAT")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: locate_file(tmp_path / "x.wav", "respeaker_4")
        except ValueError as e: caught = [e]
    assert any(told in str(getattr(w, "message", w)) and "x.wav" in str(getattr(w, "message", w))
               for w in caught)


@pytest.mark.filterwarnings("ignore:mics")
def test_a_tracked_file_and_other_rates(ring_file):
    found = locate_file(ring_file, "respeaker_4", track=True)
    assert (found.spread[~found.points[..., 0].isnan()] > 0).all()
    with pytest.raises(ValueError, match="one talker"):
        locate_file(ring_file, "respeaker_4", sources=2, track=True)
    with pytest.raises(ValueError, match="twice"):
        locate_file(ring_file, "respeaker_4", channels=[1, 2, 3, 3])
    array = lz.read_array("respeaker_4")._replace(rate=48000.0)
    with pytest.warns(UserWarning, match="usually delivers"): locate_file(ring_file, array)
