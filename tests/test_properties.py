"""Properties that must hold for any input: sign, symmetry, shifts, scale, batches, precision."""
import math

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from ssl_nb.classical.gcc_phat import delays_from_gcc, gcc_phat
from ssl_nb.acoustics.geometry import (angular_error, circular_array, far_field_tdoas,
                                       hyperbola, max_pair_tdoas, mic_pairs, random_array, tdoas,
                                       tetrahedral_array, to_angles, to_direction, wall_array)
from ssl_nb.classical.multilateration import multilaterate
from ssl_nb.acoustics.rooms import Room, rirs

settings.register_profile("house", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("house")

seeds = st.integers(0, 10_000)
dtypes = st.sampled_from([torch.float32, torch.float64])
angles = st.tuples(st.floats(-3.14, 3.14), st.floats(-1.57, 1.57))


def drawn(seed, *shape, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 4


@given(seeds, st.integers(2, 9), st.sampled_from([2, 3]), dtypes)
def test_tdoa_symmetry_bound_and_type(seed, n, dim, dtype):
    mics, sources = drawn(seed, n, dim, dtype=dtype), drawn(seed + 1, 2, 5, dim, dtype=dtype)
    pairs = mic_pairs(n)
    forward, backward = tdoas(mics, sources, pairs=pairs), tdoas(mics, sources, pairs=pairs.flip(1))
    assert forward.shape == (2, 5, n * (n - 1) // 2) and forward.dtype == dtype
    assert forward.equal(-backward)  # tau_ji = -tau_ij
    assert (forward.abs() <= max_pair_tdoas(mics) + 1e-7).all()
    torch.testing.assert_close(tdoas(mics, sources[1, 3]), forward[1, 3])  # a batch is its elements


@given(seeds, st.floats(0.1, 10))
def test_tdoa_translation_rotation_scale(seed, scale):
    mics, source = drawn(seed, 5, 3), drawn(seed + 1, 3)
    turn = torch.linalg.qr(drawn(seed + 2, 3, 3) - 2)[0]
    expected = tdoas(mics, source)
    torch.testing.assert_close(tdoas(mics @ turn.T + 7, source @ turn.T + 7), expected, rtol=0,
                               atol=1e-12)
    torch.testing.assert_close(tdoas(mics * scale, source * scale), expected * scale, rtol=0,
                               atol=1e-12)
    torch.testing.assert_close(tdoas(mics, source, c=343.0 * scale), expected / scale, rtol=0,
                               atol=1e-12)


@given(seeds, angles)
def test_far_field_is_the_limit(seed, angle):
    mics, u = drawn(seed, 4, 3) / 10, to_direction(*torch.tensor(angle, dtype=torch.float64))
    torch.testing.assert_close(tdoas(mics, 1e5 * u), far_field_tdoas(mics, u), rtol=0, atol=1e-7)


@given(angles)
def test_angles_round_trip(angle):
    azimuth, elevation = torch.tensor(angle, dtype=torch.float64)
    back = to_direction(*to_angles(3.0 * to_direction(azimuth, elevation)))
    assert angular_error(back, to_direction(azimuth, elevation)) < 1e-12


@given(angles, st.floats(-9, math.log10(math.pi)))
def test_angular_error_finds_any_angle(angle, exponent):
    size = 10.0**exponent
    u = to_direction(*torch.tensor(angle, dtype=torch.float64))
    side = torch.linalg.cross(u,
                              torch.roll(u, 1) + torch.tensor([0.3, 0.1, 0.7], dtype=torch.float64))
    turned = math.cos(size) * u + math.sin(size) * side / torch.linalg.vector_norm(side)
    assert abs(angular_error(u, 5 * turned) - size) < 1e-6 * size + 1e-15


@given(seeds)
def test_hyperbola_holds_its_delay(seed):
    mics, source = drawn(seed, 3, 2), drawn(seed + 1, 2)
    tau = tdoas(mics, source)
    curve = hyperbola(mics, tau)
    torch.testing.assert_close(tdoas(mics, curve)[torch.arange(3), :, torch.arange(3)],
                               tau[:, None].expand(3, 201), rtol=0, atol=1e-9)


@given(seeds, st.sampled_from(["phat", "scot", "none"]), dtypes, st.sampled_from([10, 80]))
def test_gcc_antisymmetry_scale_batch(seed, weighting, dtype, max_lag):
    generator = torch.Generator().manual_seed(seed)
    audio = torch.randn(2, 3, 400, generator=generator, dtype=dtype)
    tolerance = dict(rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-10)
    gcc = gcc_phat(audio, max_lag=max_lag, weighting=weighting)
    assert (gcc.dtype == dtype and gcc.shape == (2, 3, 2 * max_lag + 1)
            and gcc.abs().max() <= 1 + 1e-5)
    swapped = gcc_phat(audio, mic_pairs(3).flip(1), max_lag=max_lag, weighting=weighting)
    torch.testing.assert_close(swapped, gcc.flip(-1), **tolerance)  # r_ji(t) = r_ij(-t)
    scaled = audio * torch.tensor([1e-9, 3.0, 1e9], dtype=dtype)[:, None]
    torch.testing.assert_close(gcc_phat(scaled, max_lag=max_lag, weighting=weighting), gcc,
                               **tolerance)
    torch.testing.assert_close(gcc_phat(audio[1], max_lag=max_lag, weighting=weighting), gcc[1],
                               **tolerance)
    negative = gcc_phat(audio * torch.tensor([1.0, -1.0, 1.0], dtype=dtype)[:, None],
                        max_lag=max_lag, weighting=weighting)
    # a swapped plug turns the sign
    torch.testing.assert_close(negative[:, [0, 2]], -gcc[:, [0, 2]], **tolerance)


@given(seeds, st.integers(-15, 15), st.sampled_from(["phat", "scot", "none"]))
def test_gcc_shift_equivariance(seed, shift, weighting):
    x = torch.randn(2, 600, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # silence around it: a roll loses nothing
    x = torch.nn.functional.pad(x[:1] + 0.1 * x, (40, 40))
    before = delays_from_gcc(gcc_phat(x, max_lag=30, weighting=weighting), 1.0)
    moved = torch.stack([torch.roll(x[0], shift), x[1]])
    torch.testing.assert_close(delays_from_gcc(gcc_phat(moved, max_lag=30, weighting=weighting),
                                               1.0), before + shift, rtol=0, atol=0.02)
    both = torch.roll(x, shift, -1)
    torch.testing.assert_close(gcc_phat(both, max_lag=30, weighting=weighting),
                               gcc_phat(x, max_lag=30, weighting=weighting), rtol=0, atol=1e-10)


@given(seeds, st.sampled_from([2, 3]), dtypes)
def test_multilateration_inverts_tdoas(seed, dim, dtype):
    size = torch.tensor([6.0, 5.0, 3.0])[:dim]
    mics = random_array(dim + 4, [6.0, 5.0, 3.0], torch.Generator().manual_seed(seed),
                        spacing=0.5)[:, :dim].to(dtype)
    sources = (0.2 + 0.6 * torch.rand(2, 3, dim, generator=torch.Generator()
                                      .manual_seed(seed + 1))).to(dtype) * size.to(dtype)
    fix = multilaterate(mics, tdoas(mics, sources), bounds=torch.stack([torch.zeros(dim), size]))
    assert fix.position.shape == (2, 3, dim) and fix.position.dtype == dtype
    torch.testing.assert_close(fix.position, sources, rtol=0,
                               atol=2e-3 if dtype == torch.float32 else 1e-5)


@given(seeds, dtypes)
def test_anechoic_responses_batch_and_reciprocity(seed, dtype):
    room, points = Room((5, 5, 5)), 0.1 + drawn(seed, 4, 3, dtype=dtype)
    many = rirs(room, points[:2].reshape(1, 2, 3), points[2:])
    assert many.shape[:3] == (1, 2, 2) and many.dtype == dtype
    back = rirs(room, points[2], points[:1])[0]  # source and microphone change places
    common = min(len(back), many.shape[-1])
    torch.testing.assert_close(back[:common], many[0, 0, 0, :common], rtol=0,
                               atol=1e-5 * float(many.abs().max()))


@given(seeds, st.lists(st.floats(2.0, 10.0), min_size=3, max_size=3))
def test_arrays_keep_their_promises(seed, size):
    generator = torch.Generator().manual_seed(seed)
    walls, top = wall_array(size, generator), torch.tensor(size)
    assert ((((walls == 0) | (walls == top)).sum(-1) == 1).all()
            and ((walls >= 0) & (walls <= top)).all())
    spread = random_array(5, size, generator, spacing=0.2)
    assert (torch.pdist(spread).min() >= 0.2
            and ((spread >= 0.1) & (spread <= top - 0.1 + 1e-6)).all())
    for array in (circular_array(5, size[0]), tetrahedral_array(size[1])):
        assert array.mean(0).abs().max() < 1e-5
