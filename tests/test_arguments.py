"""The door: what each kind of argument becomes, every way to be refused, and what the decorator
leaves alone."""
import dataclasses, functools, inspect, math, pickle, subprocess, sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from beartype import beartype
from fastcore.docments import docments
from jaxtyping import Float, jaxtyped
from ssl_nb.arguments import (as_angles, as_audio, as_delays, as_device, as_directions, as_finite,
                              as_mask, as_numbers, as_pairs, as_path, as_points, as_positions,
                              as_range, as_rate, as_room_size, as_seed, as_signal, as_speed,
                              as_tensor, as_unit_vectors, choice, count, door, match_channels,
                              match_shapes, number, span)
from ssl_nb.settings import torch_device
from torch import Tensor

GENERATOR = np.random.default_rng(0)
TABLE = GENERATOR.normal(size=(4, 3))


def refused(check, value, *words, name="x", **options):
    "The message names the argument first and holds the words."
    with pytest.raises(ValueError) as refusal: check(value, name, **options)
    message = str(refusal.value)
    assert message.startswith((f"{name}:", f"{name}=")), message
    for word in words: assert word in message, message
    return message


# --- what becomes a tensor ------------------------------------------------------------------------

@pytest.mark.parametrize("given", [
    TABLE, TABLE.tolist(), tuple(map(tuple, TABLE)), TABLE.astype(">f8"), np.asfortranarray(TABLE),
    TABLE[::-1][::-1], pd.DataFrame(TABLE), list(TABLE), [torch.tensor(row) for row in TABLE],
    [[torch.tensor(v) for v in row] for row in TABLE], np.broadcast_to(TABLE, (4, 3)),
], ids=lambda v: type(v).__name__)
def test_numbers_of_every_kind_become_the_same_tensor(given):
    out = as_tensor(given, "x", torch.zeros(1, dtype=torch.float64))
    assert out.dtype == torch.float64 and out.shape == (4, 3)
    assert np.array_equal(out.numpy(), TABLE)


@pytest.mark.parametrize("given, wanted", [
    (3, 3.0), (2.5, 2.5), (np.float64(2.5), 2.5), (np.int16(-7), -7.0), ([1, 2], [1.0, 2.0]),
    (pd.Series([1, 2], index=[5, 9]), [1.0, 2.0]), (np.array([1, 2], dtype=np.uint8), [1.0, 2.0]),
    (torch.tensor([1, 2]), [1.0, 2.0]), (np.array([0.5], dtype=np.float16), [0.5]), ([], []),
    (range(3), [0.0, 1.0, 2.0])])
def test_without_a_floating_tensor_it_becomes_float32_on_the_cpu(given, wanted):
    out = as_tensor(given, "x")
    assert out.dtype == torch.float32 and out.device.type == "cpu" and out.tolist() == wanted


def test_a_floating_tensor_is_returned_itself_with_dtype_and_device():
    for x in (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.float64),
              torch.nn.Parameter(torch.ones(4, 3))):
        for check in (as_tensor, as_finite, as_numbers, as_positions, as_points, as_directions,
                      as_angles, as_signal, as_delays):
            assert check(x, "x", torch.zeros(1, dtype=torch.float64)) is x
        assert (as_audio(x.T, "x").data_ptr() == x.data_ptr()
                and as_unit_vectors(x[:, :1] * torch.eye(3)[0], "x").dtype == x.dtype)
    size, pairs, mask = torch.ones(3), torch.tensor([[0, 1]]), torch.tensor([True])
    assert (as_room_size(size, "x") is size and as_pairs(pairs, "x") is pairs
            and as_mask(mask, "x") is mask)
    meta = torch.empty(3, 3, device="meta")
    assert as_positions(meta, "x") is meta and as_tensor([1.0], "x", meta).device.type == "meta"


def test_gradients_pass_through():
    x = torch.ones(4, 3, requires_grad=True)
    door(x=as_positions)(lambda x: x.sum())(x).backward()
    assert torch.equal(x.grad, torch.ones(4, 3))
    rows = [torch.ones(3, requires_grad=True) for _ in range(2)]
    as_points(rows, "x").square().sum().backward()
    assert torch.equal(rows[0].grad, 2 * torch.ones(3))
    assert torch.autograd.gradcheck(lambda v: as_directions(v, "v").square().sum(),
                                    torch.rand(2, 3, dtype=torch.float64, requires_grad=True))


def test_it_can_be_vectorized_traced_and_compiled():
    norm = door(x=as_points, u=as_directions,
                w=as_angles)(lambda x, u, w: (x + u).norm(dim=-1) * w.sum())
    x = torch.rand(5, 3)
    wanted = torch.stack([norm(row, row, row) for row in x])
    torch.testing.assert_close(torch.vmap(norm)(x, x, x), wanted)
    assert torch.func.jacrev(norm)(x[0], x[0], x[0]).shape == (3,)

    class Net(torch.nn.Module):
        @door(audio=as_audio)
        def forward(self, audio): return audio * 2
    assert torch.equal(torch.export.export(Net(), (torch.ones(2, 8),)).module()(torch.ones(2, 8)),
                       2 * torch.ones(2, 8))


def test_a_read_only_array_is_copied_and_never_written(recwarn):
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    given.flags.writeable = False
    as_positions(given, "x").zero_()
    assert given.sum() == 15 and not recwarn.list


@pytest.mark.parametrize("given, words", [
    ("abc", ["x='abc'", "numbers"]), (b"abc", ["x=b'abc'"]), (None, ["x=None", "numbers"]),
    (True, ["x=True"]), (np.True_, ["x=True"]), (["a", "b"], ["text"]),
    ([1.0, None], ["no number"]), ([True, False], ["truth values"]),
    (torch.tensor([True]), ["torch.bool", "real"]),
    (torch.ones(2, dtype=torch.complex64), ["complex64", "real"]), ([1j], ["complex"]),
    ([[1, 2], [3]], ["different lengths"]), ([torch.ones(2), torch.ones(3)], ["different lengths"]),
    (np.array([1, None]), ["no number"]), ({"a": 1}, ["x={'a': 1}"]), (object(), ["<object>"]),
    (torch.ones(2).half(), ["float16", "half precision", ".float()"]),
    (torch.ones(2).bfloat16(), ["bfloat16", "half precision"]),
    (np.ma.masked_array([1.0, 2.0], [False, True]), ["masked"]),
    (np.array(["2020-01-01"], dtype="datetime64[D]"), ["no number"]), (1j, ["x=1j"])])
def test_what_are_no_numbers(given, words):
    for check in (as_tensor, as_finite, as_positions, as_points, as_directions, as_unit_vectors,
                  as_angles, as_audio, as_signal, as_delays, as_room_size, as_numbers):
        refused(check, given, *words)


def test_what_is_not_finite_is_named():
    bad = torch.zeros(2, 5)
    bad[1, 3], bad[1, 4] = math.nan, math.inf
    for check in (as_finite, as_delays, as_signal, as_angles, as_numbers, as_audio):
        refused(check, bad, "nan at index [1, 3]", "must be finite", "2 such")
    for check in (as_positions, as_points, as_directions, as_unit_vectors):
        refused(check, [[0, 0, 1], [0, -math.inf, 0]], "-inf at index [1, 1]")
    refused(as_finite, [-math.inf, math.inf], "-inf at index [0]")
    refused(as_finite, np.array([1e300]), "inf at index [0]")  # float32 cannot hold it
    large = torch.full((4,), 3e38)  # finite, though its sum is not
    assert as_finite(large, "x") is large and as_finite(torch.empty(0, 3), "x").shape == (0, 3)


# --- shapes ---------------------------------------------------------------------------------------

def test_positions_and_points():
    for shape in ((4, 3), (1, 3), (2, 4, 3), (4, 2), (3, 2)):
        assert as_positions(torch.ones(shape), "x").shape == shape
    for shape in ((3,), (2, 3), (5, 4, 3), (2,), (0, 3)):
        assert as_points(torch.ones(shape), "x").shape == shape
    assert "transposed" not in refused(as_positions, [0.0, 0, 0], "shape (3,)",
                                       "(*batch, mics, 2 or 3)")
    for m in (4, 7, 1): refused(as_positions, torch.ones(3, m), f"shape (3, {m})", "transposed")
    refused(as_points, np.ones((3, 5)), "transposed")
    refused(as_positions, torch.ones(3, 2), "(*batch, mics, 3)", "transposed", axes=(3,))
    refused(as_positions, torch.ones(0, 3), "shape (0, 3)")
    refused(as_positions, torch.ones(2, 3), "at least 3 mics", least=3)
    refused(as_points, 1.0, "shape ()")
    assert as_points([[math.nan] * 3], "x", finite=False).isnan().all()


def test_directions_and_unit_vectors():
    assert as_directions([[0, 0, 1e-30], [5, 0, 0]], "u").shape == (2, 3)
    refused(as_directions, [[[0, 0, 1], [0, 0, 0]]], "index [0, 1]", "zero")
    refused(as_directions, [0.3, 0.2], "shape (2,)", "not angles")
    assert as_unit_vectors([0.6, 0.8009, 0], "u").shape == (3,)
    refused(as_unit_vectors, [[1, 0, 0], [0, 1.002, 0]], "index [1]", "1.002", "unit vector")
    refused(as_unit_vectors, torch.zeros(3), "length 0")
    unknown = torch.tensor([[math.nan] * 3, [1, 0, 0]])
    assert (as_directions(unknown, "u", finite=False) is unknown
            and as_unit_vectors(unknown, "u", finite=False) is unknown)
    refused(as_directions, torch.zeros(1, 3), "zero", finite=False)


def test_angles():
    assert (as_angles([-math.pi, 2 * math.pi], "a").shape == (2,)
            and as_angles(torch.empty(0), "a").shape == (0,))
    refused(as_angles, [0, 90], "from 0 to 90", "radians", "torch.deg2rad")
    refused(as_angles, [-7.0], "from -7 to -7", "deg2rad")
    refused(as_angles, [-0.1], "from 0 to 3.142", least=0, most=math.pi)
    assert as_angles([30.0], "a", most=math.inf).tolist() == [30]


def test_audio_and_signals():
    for shape in ((1, 1), (4, 5), (2, 4, 800), (1, 16000)):
        assert as_audio(torch.ones(shape), "x").shape == shape
    for shape in ((16000, 4), (4, 4), (2, 800, 8)):
        refused(as_audio, torch.ones(shape), str(shape), "time must come last", "soundfile",
                "transpose")
    refused(as_audio, torch.ones(800), "shape (800,)", "(*batch, mics, time)")
    refused(as_audio, torch.ones(2, 0), "0 samples", "at least 1")
    refused(as_audio, torch.ones(0, 9), "0 channels")
    refused(as_audio, torch.ones(1, 9), "1 channels", "at least 2", channels=2)
    refused(as_audio, torch.ones(2, 9), "9 samples", "at least 10", samples=10)
    for shape in ((1,), (800,), (1000, 512), (100, 4)):
        assert as_signal(torch.ones(shape), "x").shape == shape
    refused(as_signal, torch.ones(16000, 4), "time must come last")
    refused(as_signal, torch.ones(3, 0), "0 samples")
    refused(as_signal, 1.0, "single number")
    assert as_delays(1e-3, "x").shape == () and as_delays([[1e-3]], "x").shape == (1, 1)


def test_bounds_of_tensors():
    assert (as_numbers([0, 1], "x", least=0, most=1).tolist() == [0, 1]
            and as_numbers([], "x", above=0).shape == (0,))
    refused(as_numbers, [[1, 2], [3, -4]], "-4 m at index [1, 1]", "at least 0", least=0, unit="m")
    refused(as_numbers, [1, 0], "0 at index [1]", "positive", above=0)
    refused(as_numbers, [0.5, 1], "1 at index [1]", "below 1", least=0, below=1)
    refused(as_numbers, [2.0], "from 0 to 1", least=0, most=1)


def test_masks_and_pairs():
    assert (as_mask([[True, False]], "x").dtype == torch.bool
            and as_mask(pd.Series([True]), "x").tolist() == [True])
    for bad in ([0, 1], torch.ones(2), "yes", None, [True, None]):
        refused(as_mask, bad, "true or false")
    refused(as_mask, [[True], [True, False]], "different lengths")
    assert (as_pairs([(0, 1), (2, 1.0)], "x").tolist() == [[0, 1], [2, 1]]
            and as_pairs(np.array([[0, 1]]), "x").dtype == torch.int64)
    for bad, word in (([[0, 0]], "different"), ([[0, -1]], "counted from 0"), ([[0.5, 1]], "whole"),
                      ([0, 1], "shape (2,)"), ([[0, 1, 2]], "shape (1, 3)"), ("01", "numbers")):
        refused(as_pairs, bad, word)


# --- plain numbers --------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [16000, 16000.0, np.int64(16000), np.float32(16000),
                                   torch.tensor(16000), np.array(16000.0), Fraction(16000)])
def test_a_number_of_every_kind(given):
    for check, kind in ((as_rate, int), (as_speed, float), (number(), float), (count(), int)):
        assert check(given, "x") == 16000 and type(check(given, "x")) is kind


def test_rates_and_speeds():
    assert as_rate(48000.7, "fs") == 48000.7 and type(as_rate(48000.7, "fs")) is float
    for check, unit in ((as_rate, "Hz"), (as_speed, "m/s")):
        for bad in (0, -1, math.nan, math.inf, -math.inf):
            refused(check, bad, f"x={bad} {unit}:", "positive and finite")
        refused(check, 10**400, "positive and finite")


@pytest.mark.parametrize("given", ["16000", b"1", None, True, np.True_, 1j, [16000], (1,),
                                   torch.ones(1), np.ones(2), {}, object()])
def test_what_is_no_number(given):
    for check in (as_rate, as_speed, number("s"), count(), count(1, 4)):
        refused(check, given, "number")


def test_a_gradient_is_not_lost_in_silence():
    refused(as_speed, torch.tensor(343.0, requires_grad=True), "gradient", ".detach()")


@pytest.mark.parametrize("bounds, good, bad, words", [
    (dict(above=0), [1e-9, 3], [0, -1, math.inf, math.nan], "positive and finite"),
    (dict(least=0), [0, 3], [-1e-9, math.inf], "at least 0 and finite"),
    (dict(above=0, most=90), [1e-9, 90], [0, 90.1], "above 0 and at most 90"),
    (dict(least=0, below=1), [0, 0.99], [1, -0.1], "at least 0 and below 1"),
    (dict(least=-1, most=1), [-1, 1], [-1.1, 1.1, math.nan], "from -1 to 1"),
    (dict(below=0), [-1], [0, -math.inf], "below 0 and finite"),
    (dict(finite=False), [math.inf, -math.inf, 0], [math.nan], "not NaN"),
    ({}, [0, -5], [math.inf, math.nan], "finite")])
def test_number(bounds, good, bad, words):
    check = number("dB", **bounds)
    for v in good: assert check(v, "x") == v
    for v in bad: refused(check, v, f"x={v} dB: must be {words}")


def test_count():
    assert count(0)(0, "n") == 0 and count(2, 4)(4.0, "n") == 4
    for bad in (0, -3, 2.5, math.nan, math.inf):
        refused(count(), bad, f"x={bad}:", "a whole number, at least 1")
    for bad in (1, 5): refused(count(2, 4), bad, "a whole number from 2 to 4")


def test_room_size():
    for given in ((5, 4, 3), [5.0, 4, 3], np.array([5, 4, 3]),
                  torch.tensor([5, 4, 3.0], dtype=torch.float64)):
        size = as_room_size(given, "size")
        assert size.dtype == torch.float32 and size.tolist() == [5, 4, 3]
    for bad in ((5, 4, 0), (5, 4, -3), (5, 4, math.inf), (math.nan, 4, 3)):
        refused(as_room_size, bad, "m:", "three positive lengths")
    for bad in (5, (5, 4), [[5, 4, 3]]):
        refused(as_room_size, bad, "shape", "three positive lengths")


def test_ranges():
    assert (as_range(0.5, "t60") == (0.5, 0.5) and as_range(np.float32(0.5), "t60") == (0.5, 0.5)
            and as_range(torch.tensor(2), "t60") == (2, 2))
    for given in ((0, 1), [0, 1.0], np.array([0, 1]), torch.tensor([0.0, 1])):
        out = as_range(given, "t60")
        assert out == (0, 1) and type(out) is tuple and all(type(v) is float for v in out)
    for bad in ((1, 0), (1, 2, 3), (), "0-1", "12", None, True, (0, None), (0, "1"), (0, math.inf),
                (math.nan, 1), {0, 1}, {0: 1, 1: 2}, [[0, 1], [2, 3]]):
        refused(as_range, bad, "range (low, high)")
    refused(span("s", least=0), -0.5, "x=-0.5 s", "at least 0")
    refused(span(least=0, most=1), (0.5, 2), "from 0 to 1")
    assert span(finite=False)((300, math.inf), "band") == (300, math.inf)
    for bad in (300, (300, 300)): refused(span("Hz", apart=True), bad, "low below high")


def test_choices_and_paths(monkeypatch, tmp_path):
    method = choice("image", "hybrid")
    assert (method("hybrid", "method") == "hybrid" and method(np.str_("image"), "method") == "image"
            and choice(1, 2)(2, "n") == 2)
    refused(method, "imaeg", "x='imaeg'", "image, hybrid", "did you mean 'image'?")
    refused(method, "HYBRID", "did you mean 'hybrid'?")
    assert "did you mean" not in refused(method, "zzz", "image, hybrid")
    for bad in (None, 3, ["image"], np.array(["image", "hybrid"]), torch.ones(2)):
        refused(method, bad, "one of image, hybrid")
    refused(choice(0, 1), True, "one of 0, 1")
    monkeypatch.setenv("HOME", str(tmp_path))
    given = Path("a/b")
    assert (as_path(given, "path") is given and as_path("a/b", "path") == given
            and as_path("~/a", "path") == as_path(Path("~/a"), "path") == tmp_path / "a")
    for bad in ("", "  ", None, 3, b"a", ["a"], "a\0b"): refused(as_path, bad, "a path")


def test_seeds_and_devices():
    assert as_seed(7, "seed") == 7 and as_seed("7", "seed") == 7
    for bad in (-1, 1.5, True, None, 2**32): refused(as_seed, bad, "whole number")
    cpu = torch.device("cpu")
    assert (as_device("cpu", "where") == cpu and as_device(cpu, "where") is cpu
            and torch_device(cpu) is cpu)
    for bad in ("gpu", "", torch.device("meta"), 3):
        refused(as_device, bad, "must be one of auto, cpu, cuda, mps", name="where")
    if not torch.cuda.is_available():
        refused(as_device, torch.device("cuda:1"), "this machine has none")


def test_what_must_fit():
    audio = torch.zeros(2, 4, 800)
    assert match_channels(audio, torch.zeros(4, 3)) is None and match_channels(audio, 4) is None
    refused(lambda v, name: match_channels(v, torch.zeros(6, 3), name), audio, "4 channels",
            "6 microphones")
    refused(lambda v, name: match_channels(v, 800, name), audio, "time must come last")
    assert match_shapes(a=torch.ones(2, 3), b=torch.zeros(2, 3)) is None
    refused(lambda v, name: match_shapes(a=torch.ones(5, 3), x=v), torch.ones(5, 1), "shape (5, 1)",
            "that of a, (5, 3)")


# --- the door -------------------------------------------------------------------------------------

@door(mics=as_positions, source=as_points, c=as_speed)
def arrive(mics, source, c=343, *, scale: float | None = None, **more):
    "Docs."
    return mics, source, c, scale, more


def test_by_position_and_by_keyword_alike():
    for out in (arrive(TABLE, [1, 2, 3], 340), arrive(TABLE, c=340, source=[1, 2, 3]),
                arrive(source=(1, 2, 3), mics=TABLE.tolist(), c=340.0)):
        assert (np.allclose(out[0], TABLE) and out[1].tolist() == [1, 2, 3] and out[2] == 340
                and type(out[2]) is float)


def test_defaults_and_what_is_not_checked_are_untouched():
    out = arrive(TABLE, [1, 2, 3], scale="as it is", other=[1])
    assert (out[2] == 343 and type(out[2]) is int and out[3] == "as it is"
            and out[4] == {"other": [1]})
    given = {"mics": [[0, 0, 0]], "source": [1, 2, 3]}
    arrive(**given)
    # the caller's own things are not changed
    assert given == {"mics": [[0, 0, 0]], "source": [1, 2, 3]}


def test_none_goes_through_only_where_the_signature_allows_it():
    @door(a=as_points, b=as_points, c=as_points, d=as_speed)
    def f(a, b=None, c: Tensor | None = 3, d=343): return a, b, c, d
    assert f([1, 2, 3], None, None)[1:] == (None, None, 343)
    for args in ((None,), ([1, 2, 3], None, None, None)):
        with pytest.raises(ValueError, match="=None: must be"): f(*args)


def test_what_is_no_tensor_follows_the_first_floating_tensor_wherever_it_stands():
    wide = torch.ones(4, 3, dtype=torch.float64)
    assert (arrive(wide, [1, 2, 3])[1].dtype == torch.float64
            and arrive([[1, 2, 3]], wide)[0].dtype == torch.float64)
    assert arrive(wide.tolist(), torch.tensor([1, 2, 3]))[1].dtype == torch.float32
    # whole numbers follow
    assert arrive(torch.ones(4, 3, dtype=torch.int64), wide[0])[0].dtype == torch.float64
    assert arrive(wide, wide[0].float())[1].dtype == torch.float32
    assert arrive(torch.ones(4, 3, device="meta"), [1, 2, 3])[1].device.type == "meta"


def test_wrong_calls_get_pythons_own_error():
    for args, kwargs, words in (((TABLE,), {}, "missing 1 required positional argument: 'source'"),
                                ((TABLE, [1, 2, 3], 1, 2), {}, "takes"),
                                ((TABLE, [1, 2, 3]), {"mics": TABLE}, "multiple values")):
        with pytest.raises(TypeError, match=words): arrive(*args, **kwargs)
    strict = door(a=as_speed)(lambda a: a)
    with pytest.raises(TypeError, match="unexpected keyword argument 'b'"): strict(1, b=2)


def test_a_name_that_is_not_there_is_found_at_once():
    for function in (lambda mics: mics, lambda mics, *mic: mics, lambda mics, **mic: mics):
        with pytest.raises(TypeError, match="no argument 'mic'; did you mean 'mics'"):
            door(mic=as_positions)(function)


def test_methods_constructors_and_kinds_of_parameters():
    class Array:
        @door(mics=as_positions)
        def __init__(self, mics): self.mics = mics
        @door(c=as_speed)
        def speed(self, c): return c
        @classmethod
        @door(n=count(2))
        def ring(cls, n): return cls([[0, 0, k] for k in range(n)])
        @door(n=count(2))
        @classmethod
        def line(cls, n): return cls, n
        @door(n=count(2))
        @staticmethod
        def still(n): return n
    assert (Array([[1, 2, 3]]).mics.tolist() == [[1, 2, 3]]
            and type(Array([[1, 2, 3]]).speed(c=np.int8(3))) is float)
    assert (len(Array.ring(3.0).mics) == 3 and Array.line(np.int64(2)) == (Array, 2)
            and type(Array.still(2.0)) is int)
    with pytest.raises(ValueError, match="n=1"): Array.ring(1)
    only = door(a=as_speed, b=as_speed)(lambda a, /, *rest, b: (a, rest, b))
    assert only(1, "7", "8", b=2) == (1.0, ("7", "8"), 2.0) and type(only(1, 7, b=2)[2]) is float


def test_dataclasses_use_the_checks_alone():
    @dataclasses.dataclass
    class Spec:
        t60: object
        def __post_init__(self): self.t60 = as_range(self.t60, "t60")
    assert Spec(0.5).t60 == (0.5, 0.5)
    with pytest.raises(ValueError, match="t60="): Spec((1, 0))


def test_signature_documentation_and_pickling_see_the_function_within():
    def f(mics: Float[Tensor, "mics 3"],  # positions, m
          c: float = 343.0) -> float:  # s
        "Docs of f."
        return c
    through = door(mics=as_positions, c=as_speed)(f)
    assert (inspect.signature(through) == inspect.signature(f) and through.__doc__ == "Docs of f."
            and through.__name__ == "f")
    assert docments(through)["mics"] == "positions, m" and inspect.unwrap(through) is f
    assert pickle.loads(pickle.dumps(arrive)) is arrive


def test_types_are_checked_behind_the_door():
    @door(mics=as_positions, c=as_speed)
    @jaxtyped(typechecker=beartype)
    def f(mics: Float[Tensor, "mics 3"], c: float = 343.0) -> Float[Tensor, " mics"]:
        return mics.norm(dim=-1) / c
    torch.testing.assert_close(f([[3, 4, 0], [0, 0, 0]], c=5), torch.tensor([1.0, 0.0]))
    with pytest.raises(Exception, match="Type-check error"):
        f(torch.ones(4, 2))  # the inner types still count


def test_the_signature_is_read_once_and_not_per_call():
    code = """
import inspect
from ssl_nb.arguments import as_speed, door
through = door(a=as_speed)(lambda a, b=1: a)
def never(*args, **kwargs): raise AssertionError("read again")
inspect.signature = inspect.Signature.bind = inspect._signature_from_callable = never
print(through(1), through(a=2))
"""  # in a process of its own: the type checks of the tests read signatures all the time
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "1.0 2.0"


def test_finding_the_arguments_is_cheap():
    code = """
import timeit
from ssl_nb.arguments import door
f, nothing = lambda a, b, c: None, lambda value, name, like: value
through = door(a=nothing, b=nothing, c=nothing)(f)
cost = lambda g: min(timeit.repeat(lambda: g(1, 2, c=3), number=2000, repeat=20)) / 2000
print(cost(through) - cost(f))
"""
    assert float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                check=True).stdout) < 5e-6  # s


def test_each_check_runs_once_per_call():
    seen = []
    def spy(value, name, like=None):
        seen.append((name, value))
        return value
    door(a=spy, b=spy, c=spy)(lambda a, b=2, c=None: None)(1, c=None)
    assert seen == [("a", 1)]


def test_options_by_partial():
    f = door(mics=functools.partial(as_positions, least=3, axes=(3,)))(lambda mics: mics)
    assert f([[0, 0, 0]] * 3).shape == (3, 3)
    with pytest.raises(ValueError, match="at least 3 mics"): f([[0, 0, 0]] * 2)


def test_importing_it_imports_nothing_heavier():
    code = ("import sys, ssl_nb.arguments; print([m for m in ('matplotlib', 'pandas', 'scipy', "
            "'jaxtyping', 'fastcore', 'soundfile') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"
