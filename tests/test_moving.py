"""Trajectories, moving sources, noise with a place, and displaced microphones."""
import math

import pytest
import torch
from ssl_nb.acoustics.geometry import distances, robot_head_array
from ssl_nb.acoustics.rooms import Room, make_scene, reverberate, rirs
from ssl_nb.acoustics.moving_sources import (Trajectory, corrupt_metadata, directional_noise,
                                             jitter_mics, line_trajectory, mix_at_snr,
                                             moving_source, random_trajectory, random_walk)
from ssl_nb.acoustics.signals import speech_like, voice_activity

ROOM = Room((5, 4, 3), 0.25)
MICS = torch.tensor([[2.0, 2.0, 1.2], [2.1, 2.0, 1.2]])
generator = lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(10))
def test_drawn_trajectories_stay_in_the_room(seed):
    low, high = torch.full((3,), 0.3) - 1e-4, torch.tensor(ROOM.size) - 0.3 + 1e-4
    for track in (random_trajectory(ROOM, 8, generator(seed)),
                  random_walk(ROOM, 30, generator(seed)),
                  random_walk(ROOM, 30, generator(seed), height=1.6)):
        assert ((track.positions >= low) & (track.positions <= high)).all()
    walk = random_walk(ROOM, 30, generator(seed)).positions
    assert (walk.equal(random_walk(ROOM, 30, generator(seed)).positions)
            and not walk.equal(random_walk(ROOM, 30, generator(seed + 1)).positions))


def test_walks_have_the_speed_that_was_asked_for():
    room = Room((50, 50, 50))
    speeds = torch.stack([random_walk(room, 60, generator(s), speed=0.7).positions.diff(dim=0)
                          .norm(dim=1) / 0.02 for s in range(20)])
    assert abs(speeds.square().mean().sqrt() / 0.7 - 1) < 0.1
    assert (speeds.sub(speeds.mean()).abs().max() < 3
            and (random_walk(room, 10, generator(), speed=0.0).positions.std(0) < 1e-6).all())


def test_a_wiggly_line_is_its_formula():
    start, end, amplitude, turns = (torch.tensor([1.0, 1, 1]), torch.tensor([3.0, 2, 1.5]),
                                    torch.tensor([0.2, 0.0, 0.1]), torch.tensor([1.5, 1.0, 2.0]))
    track, t = line_trajectory(start, end, 4.0, amplitude, turns), torch.linspace(0, 4, 33)
    closed = (start + t[:, None] / 4 * (end - start)
              + amplitude * torch.sin(2 * math.pi * turns * t[:, None] / 4))
    torch.testing.assert_close(track.at(t), closed, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["anechoic", "image", "hybrid"])
@pytest.mark.parametrize("samples, interval",
                         [(1000, 0.1), (16000, 0.1), (12345, 0.033), (8001, 1.0)])
def test_standing_still_equals_the_static_simulation(method, samples, interval):
    signal, spot = torch.randn(samples, generator=generator()), torch.tensor([1.0, 3.0, 1.6])
    moving = moving_source(signal, ROOM, Trajectory(torch.zeros(1), spot[None]), MICS,
                           method=method, generator=generator(1), interval=interval)
    still = reverberate(signal, rirs(ROOM, spot, MICS, method=method, generator=generator(1)))
    assert moving.audio.shape == still.shape == (2, samples)
    # the cubic's error at the highest frequencies
    assert (moving.audio - still).norm() < 2e-3 * still.norm()


def test_a_walk_takes_lists_arrays_and_single_numbers():
    track = line_trajectory([1, 1, 1.5], MICS[0].numpy(), 1, amplitude=0.1, oscillations=[1, 2, 0])
    same = line_trajectory(torch.tensor([1.0, 1, 1.5]), MICS[0], 1.0, torch.full((3,), 0.1),
                           torch.tensor([1.0, 2, 0]))
    assert track.positions.equal(same.positions)
    path = Trajectory([0, 1], [[1, 1, 1.5], [2, 1, 1.5]])
    assert path.at(0.5).tolist() == [1.5, 1, 1.5]
    sound = torch.randn(2000, generator=generator())
    heard = moving_source(sound.numpy(), ROOM, path, MICS.tolist(), method="anechoic").audio
    assert heard.equal(moving_source(sound, ROOM, path, MICS, method="anechoic").audio)
    assert jitter_mics(MICS.tolist(), 0, generator()).equal(MICS)


def test_the_scene_knows_place_and_speech():
    voice, track = speech_like(2.0, seed=1), line_trajectory(torch.tensor([1.0, 1.0, 1.5]),
                                                             torch.tensor([4.0, 3.0, 1.5]), 2.0)
    scene = moving_source(voice, ROOM, track, MICS, snr_db=20, generator=generator())
    assert (scene.sources.shape == (100, 3) and scene.hop == 320
            and scene.activity.equal(voice_activity(voice, 16000)))
    torch.testing.assert_close(scene.sources, track.at((torch.arange(100) + 0.5) * 0.02))
    clean = moving_source(voice, ROOM, track, MICS, generator=generator()).audio
    assert abs(10 * torch.log10(clean.square().mean() / (scene.audio - clean).square().mean())
               - 20) < 0.3


def test_direct_sound_of_a_walker_arrives_on_time_at_every_microphone():
    track = line_trajectory(torch.tensor([0.5, 0.5, 1.0]), torch.tensor([4.5, 3.5, 2.0]), 1.0,
                            0.3, 1.0)
    clicks = torch.zeros(16000)
    clicks[::800] = 1
    audio = moving_source(clicks, ROOM, track, robot_head_array() + MICS[0],
                          method="anechoic").audio
    for k in range(2, 18):
        heard_at = torch.arange(k * 800, k * 800 + 400)
        peak = audio[:, heard_at].abs().argmax(-1)
        delay = (distances(robot_head_array() + MICS[0], track.at((k * 800 + peak) / 16000))
                 .diagonal() / 343 * 16000)  # each at its own arrival
        assert (peak - delay).abs().max() < 0.6


@pytest.mark.parametrize("call, words", [
    (lambda: Trajectory(torch.tensor([0.0, 0.0]), torch.zeros(2, 3)), "times: must grow"),
    (lambda: Trajectory(torch.zeros(1), torch.full((1, 3), torch.nan)), "finite"),
    (lambda: line_trajectory(torch.zeros(3), torch.ones(3), 0.0), "seconds=0.0"),
    (lambda: random_trajectory(ROOM, 1.0, generator(), margin=2.0), "margin=2.0"),
    (lambda: random_walk(ROOM, 1.0, generator(), turning=0.0), "turning=0.0"),
    (lambda: moving_source(torch.ones(100), ROOM, Trajectory(torch.zeros(1), torch.tensor([
        [9.0, 1, 1]])), MICS), "outside"),
    (lambda: moving_source(torch.ones(100), ROOM, Trajectory(torch.zeros(1), torch.ones(1, 3)),
                           MICS, method="ray"), "method='ray'"),
    (lambda: moving_source(torch.ones(100), ROOM, Trajectory(torch.zeros(1), torch.ones(1, 3)),
                           MICS, interval=0.0), "interval=0.0"),
    (lambda: moving_source(torch.ones(100), ROOM, Trajectory(torch.zeros(1), torch.ones(1, 3)),
                           MICS, interval=1e-5), "at least one sample"),
    (lambda: moving_source(torch.ones(0), ROOM, Trajectory(torch.zeros(1), torch.ones(1, 3)),
                           MICS), "signal: has 0 samples"),
    (lambda: moving_source(torch.ones(2, 100), ROOM, Trajectory([0], [[1, 1, 1]]), MICS),
     "signal: shape .* one signal"),
    (lambda: line_trajectory([0, 0], [1, 1, 1], 1.0), "start: shape"),
    (lambda: mix_at_snr(torch.ones(9, 2), torch.ones(9, 2), 10), "time must come last"),
    (lambda: random_trajectory(ROOM, 1.0, generator(), amplitude=(1.0, 0.0)), "amplitude="),
    (lambda: mix_at_snr(torch.ones(2, 9), torch.zeros(2, 9), 10), "silent"),
    (lambda: mix_at_snr(torch.ones(2, 9), torch.ones(2, 9), math.inf), "snr_db=inf"),
    (lambda: jitter_mics(MICS, -1.0, generator()), "sigma=-1.0"),
    (lambda: corrupt_metadata(MICS, math.nan, generator()), "percent=nan"),
    (lambda: directional_noise(ROOM, torch.ones(3), MICS, 0, generator()), "time=0"),
])
def test_bad_walks_are_refused(call, words):
    with pytest.raises(ValueError, match=words): call()


def test_directional_noise_is_steady_and_comes_from_its_place():
    noise = directional_noise(Room((5, 4, 3)), torch.tensor([4.0, 2.0, 1.2]), MICS, 16000,
                              generator(), method="anechoic")
    lag = torch.tensor([float((noise[0, 20:-20] * noise[1].roll(k)[20:-20]).sum())
                        for k in range(-8, 9)]).argmax() - 8
    assert (lag == 5 and abs(noise[:, :8000].square().mean() / noise[:, 8000:].square().mean() - 1)
            < 0.1)  # 0.1 m nearer: 4.7 samples earlier at the second


def test_hybrid_scenes_follow_their_generator():
    make = lambda seed: make_scene(ROOM, speech_like(0.3), torch.tensor([1.0, 1, 1]), MICS,
                                   snr_db=20, method="hybrid", generator=generator(seed)).audio
    assert make(0).equal(make(0)) and not make(0).equal(make(1))
