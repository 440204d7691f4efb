"""wav2pos against what the published code (github.com/axeber01/wav2pos, commit a90d2dc) gave for
weights that both sides make from the names of its tensors: outputs of every stage, losses and the
gradient of every parameter, for four ways of masking."""
import json, re
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from filled_weights import filled, ngcc_shapes
from run_command import in_process
from ssl_nb.acoustics.rooms import Room, reverberate, rirs
from ssl_nb.acoustics.signals import add_noise
from ssl_nb.masked.ngcc_phat import load_published, load_trained
from ssl_nb.masked import wav2pos
from ssl_nb.masked.wav2pos import (Known, PairWords, Wav2pos, decode, encode, fill_in, fill_loss,
                                   known, load_wav2pos, make_recipe, pair_lags, spread_out,
                                   standardized, steered_answers, wall_scenes)
from ssl_nb.workbench.experiments import find_experiment, resolve_parameters

PUBLISHED = next((p / "shared" / "reference_weights" for p in Path(__file__).resolve().parents
                  if (p / "shared" / "reference_weights").is_dir()), Path("nowhere"))
ORACLE = PUBLISHED / "wav2pos_golden_filled.safetensors"
needs_oracle = pytest.mark.skipif(not ORACLE.is_file(),
                                  reason="the published code's tensors are not on this machine")


def blocks(theirs, ours, depth):
    "Names of the transformer blocks."
    parts = {"norm1": "norm1", "attn.qkv": "qkv", "attn.proj": "proj", "norm2": "norm2",
             "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    return {f"{theirs}.{k}.{a}": f"{ours}.{k}.{b}" for k in range(depth) for a, b in parts.items()}


def names(depth=4):
    "Published name of a layer: ours, and of a learned token: ours."
    layers = {"patch_embed.proj": "embed_audio", "patch_embed.projT": "to_audio",
              "encoder_embed_locs.0": "embed_place.0", "encoder_embed_locs.1.bn": "embed_place.1",
              "encoder_embed_locs.3": "embed_place.3", "encoder_embed_locs.4.bn": "embed_place.4",
              "get_decoder_mic_feature.0": "from_audio.0",
              "get_decoder_mic_feature.1": "from_audio.1",
              "decoder_fproj.0": "from_audio.3", "decoder_fproj.1": "from_audio.4",
              "get_decoder_audio_features.0": "from_place.0",
              "get_decoder_audio_features.1": "from_place.1", "patch_norm": "unused",
              "norm": "encoded", "decoder_embed": "to_decoder", "decoder_norm": "decoded",
              "decoder_max": "overall", "loc_mlp.0": "mixer.first", "loc_mlp.1.bn": "mixer.norm",
              "loc_mlp.3": "mixer.second", "loc_proj": "mixer.proj"}
    for theirs, ours in (("decoder_pred_source", "to_talker"), ("decoder_pred_locs", "to_mic")):
        layers |= {f"{theirs}.{k}{'.bn' * (k in (1, 4))}": f"{ours}.{k}" for k in (0, 1, 3, 4, 6)}
    tokens = {"enc_audio_modality": "kind_audio", "enc_loc_modality": "kind_place",
              "dec_audio_modality": "decoded_audio", "dec_loc_modality": "decoded_place",
              "mask_token_source": "no_talker", "mask_token_mic": "no_place",
              "mask_token_audio": "no_audio"}
    return layers | blocks("blocks", "encoder", depth) | blocks("decoder_blocks", "decoder",
                                                               depth), tokens


def published_name(name):
    "The published name of one of our tensors outside NGCC-PHAT."
    layers, tokens = names()
    if name in tokens.values(): return next(k for k, v in tokens.items() if v == name)
    layer, kind = name.rsplit(".", 1)
    return next(k for k, v in layers.items() if v == layer) + "." + kind


def published_shape(name, shape):
    if name.endswith("modality") or name.startswith("mask_token"): return (1, 1, *shape)
    return (shape[0], 1, 1, shape[1]) if name == "patch_embed.proj.weight" else tuple(shape)


def fill(net):
    "Give the net weights made from the published names; NGCC-PHAT and our two buffers stay."
    state = {k: v for k, v in net.state_dict().items()
             if not k.startswith("ngcc.") and k not in ("centre", "scale")}
    shapes = {published_name(k): published_shape(published_name(k), v.shape)
              for k, v in state.items()}
    values = filled(shapes)
    for name, value in state.items():
        value.copy_(values[published_name(name)].reshape(value.shape))
    return shapes


SETUPS = {"1a": known(6), "1b_notebook": known(6, emitted=True),
          "2a_tdoa": known(6, unplaced=[5])}


@pytest.fixture(scope="module")
def oracle():
    from safetensors.torch import load_file
    return load_file(ORACLE)


@pytest.fixture(scope="module")
def net():
    filled_net = Wav2pos("ngcc", load_published(PUBLISHED / "ngcc_phat.safetensors", 314))
    fill(filled_net)
    return filled_net.eval()


def given_of(oracle, setup):
    "The masks of a set-up from the slots that the published code was told to keep."
    if setup in SETUPS: return SETUPS[setup]
    kept = torch.zeros(3, 14, dtype=torch.bool)
    kept.scatter_(1, oracle[f"{setup}.ids_keep"].long(), True)
    return Known(kept[:, :7], kept[:, 7:])


@needs_oracle
@pytest.mark.parametrize("setup", ["1a", "1b_train", "1b_notebook", "2a_tdoa"])
def test_every_stage_is_that_of_the_published_code(oracle, net, setup):
    given, audio, places = given_of(oracle, setup), standardized(oracle["audio"][:, 0]), oracle[
        "locations"]
    mask = torch.cat([m.expand(3, -1) for m in given], 1)
    torch.testing.assert_close(mask, oracle[f"{setup}.mask"] == 0)
    tight = dict(atol=1e-4, rtol=1e-4)
    tokens = encode(net, audio, places, given)
    torch.testing.assert_close(tokens, oracle[f"{setup}.latent"], **tight)
    torch.testing.assert_close(spread_out(net, net.to_decoder(tokens), given),
                               oracle[f"{setup}.decoder_in"], **tight)
    features = pair_lags(net, wav2pos._chosen(audio, given.heard))
    if setup == "1a":
        half = features.shape[1] // 2
        both = torch.stack([features[:, :half], features[:, half:]], 2).flatten(1, 2)
        torch.testing.assert_close(both, oracle["1a.pair_in"][..., 512:], **tight)
    filled_in = decode(net, tokens, PairWords(features, None), given)
    torch.testing.assert_close(filled_in.places, oracle[f"{setup}.pred_locs"], **tight)
    torch.testing.assert_close(filled_in.audio[..., ::16], oracle[f"{setup}.pred_audio_every16"],
                               **tight)


@needs_oracle
@pytest.mark.parametrize("setup", ["1a", "1b_train", "1b_notebook", "2a_tdoa"])
def test_losses_and_gradients_are_those_of_the_published_code(oracle, net, setup):
    given, audio = given_of(oracle, setup), oracle["audio"][:, 0]
    norms = json.loads((PUBLISHED / "wav2pos_golden_gradnorms.json").read_text())[setup]
    sound, place = fill_loss(net(audio, oracle["locations"], given), audio, oracle["locations"],
                             given, net.scale)
    torch.testing.assert_close(sound, oracle[f"{setup}.loss_audio"][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(place, oracle[f"{setup}.loss_locs"][0], atol=1e-4, rtol=1e-4)
    net.zero_grad()
    (0.1 * sound + place).backward()
    compared = 0
    for name, p in net.named_parameters():
        if name.startswith("ngcc."):
            assert p.grad is None
            continue
        theirs = norms[published_name(name)] if published_name(name) in norms else None
        own = 0.0 if p.grad is None else float(p.grad.norm())
        if theirs is None: assert own == 0
        else:
            assert own == pytest.approx(theirs, rel=2e-4, abs=1e-4), name
            compared += 1
    assert compared == len(norms)


# what the published code gives for the filled weights and inputs drawn below: position of the
# talker (item 0) and of the last microphone (item 1), sound of slot 0 (item 1, every 512th sample),
# losses of sound and positions, norm of the whole gradient
CONSTANTS = {
    ("ngcc", "1a"): ([-0.02444, -0.23128, 0.13753], [0.4505, -0.2032, -0.11464],
        [1.03268, -0.14146, -1.00651, -1.48929], [2.05919, 1.07774], 17.9832),
    ("ngcc", "1b_train"): ([0.0817, -0.47017, 0.35256], [0.57483, -0.24535, -0.10473],
        [0.38702, -0.18951, -1.73015, -0.84927], [2.06505, 1.38813], 21.7348),
    ("ngcc", "1b_notebook"): ([0.06515, -0.50813, 0.27037], [0.59954, -0.24852, -0.11148],
        [0.61436, -0.04074, -1.87585, -0.96912], [2.05851, 1.37252], 21.5342),
    ("ngcc", "2a_tdoa"): ([-0.04115, -0.29752, 0.10856], [0.417, -0.48808, 0.03703],
        [1.12755, -0.1242, -0.9762, -1.68375], [2.06062, 1.58746], 22.6367),
    ("gcc", "1a"): ([-0.0261, -0.22806, 0.13753], [0.45135, -0.20458, -0.11431],
        [1.03268, -0.14146, -1.00651, -1.48929], [2.05919, 1.07587], 17.9492),
    ("gcc", "1b_train"): ([0.0789, -0.46717, 0.35453], [0.57546, -0.24818, -0.10376],
        [0.38702, -0.18951, -1.73015, -0.84927], [2.06505, 1.38757], 21.7218),
    ("gcc", "1b_notebook"): ([0.06355, -0.5068, 0.27136], [0.60058, -0.25109, -0.10876],
        [0.61436, -0.04074, -1.87585, -0.96912], [2.05851, 1.37238], 21.5002),
    ("gcc", "2a_tdoa"): ([-0.0453, -0.29425, 0.10904], [0.41742, -0.48909, 0.0384],
        [1.12755, -0.1242, -0.9762, -1.68375], [2.06062, 1.58595], 22.667),
}


@pytest.fixture(scope="module", params=["ngcc", "gcc"])
def filled_everywhere(request, tmp_path_factory):
    "A net all of whose weights follow from the names of its tensors."
    if request.param == "gcc": model = Wav2pos("gcc")
    else:
        from safetensors.torch import save_file
        file = tmp_path_factory.mktemp("ngcc") / "ngcc.safetensors"
        save_file(filled(ngcc_shapes()), file)
        model = Wav2pos("ngcc", load_published(file, 314))
    fill(model)
    return model.eval()


def plain_gcc(audio, given):
    "GCC-PHAT as the published code computes it: transforms of twice the window, 0.001 added."
    heard = standardized(audio)[:, given.heard]
    spectra = torch.fft.rfft(heard, 4096)
    i, j = torch.triu_indices(heard.shape[1], heard.shape[1], 1)
    cross = spectra[:, i] * spectra[:, j].conj()
    gcc = torch.fft.irfft(cross / (cross.abs() + 1e-3)).roll(314, -1)[..., :629]
    return torch.cat([gcc, gcc.flip(-1)], 1)


@pytest.mark.parametrize("setup", ["1a", "1b_train", "1b_notebook", "2a_tdoa"])
def test_a_clone_alone_gets_the_numbers_of_the_published_code(filled_everywhere, setup):
    talker, mic, sound, losses, slope = CONSTANTS[filled_everywhere.pairs, setup]
    audio, places = (torch.tensor(np.random.RandomState(seed).standard_normal((2, 7, size)),
                                  dtype=torch.float32) for seed, size in ((7, 2048), (8, 3)))
    given = known(6, emitted=True, silent=[2]) if setup == "1b_train" else SETUPS[setup]
    lags = None if filled_everywhere.pairs == "ngcc" else plain_gcc(audio, given)
    answer = filled_everywhere(audio, places, given, lags)
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(answer.places[0, 0], torch.tensor(talker), **close)
    torch.testing.assert_close(answer.places[1, 6], torch.tensor(mic), **close)
    torch.testing.assert_close(answer.audio[1, 0, ::512], torch.tensor(sound), **close)
    both = fill_loss(answer, audio, places, given, filled_everywhere.scale)
    torch.testing.assert_close(torch.stack(both), torch.tensor(losses), **close)
    filled_everywhere.zero_grad()
    (0.1 * both[0] + both[1]).backward()
    squares = [p.grad.square().sum() for p in filled_everywhere.parameters() if p.grad is not None]
    assert float(sum(squares)) ** 0.5 == pytest.approx(slope, rel=3e-4)


# --- sizes, masks, refusals -----------------------------------------------------------------------

def test_the_published_numbers_of_parameters():
    sizes = [sum(p.numel() for p in Wav2pos(pairs).parameters()) for pairs in ("ngcc", "gcc")]
    assert sizes == [10_646_535, 9_758_342]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return Wav2pos("map", width=16, depth=1, hidden=32).eval()


def recording(mics=6, seed=0, batch=()):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*batch, mics, 2048, generator=g),
            torch.rand(mics, 3, generator=g) * torch.tensor([5.0, 5.0, 2.0]))


def test_order_of_microphones_and_hidden_values_do_not_matter(tiny):
    audio, mics = recording()
    order = [4, 2, 0, 5, 1, 3]
    one = fill_in(tiny, audio, mics, unplaced=[5], silent=[0])
    other = fill_in(tiny, audio[order], mics[order], unplaced=[3], silent=[2])
    torch.testing.assert_close(one.talker, other.talker, atol=1e-4, rtol=1e-4)
    audio[0], mics[5] = 0.0, 9.9
    torch.testing.assert_close(one.talker, fill_in(tiny, audio, mics, unplaced=[5],
                                                   silent=[0]).talker)


def test_steered_answers_know_a_straight_line():
    """Two pairs on two axes and one answer each: curves with one peak put the last answer where the
    peaks say, by hand."""
    line = torch.linspace(-1, 1, 21)[:, None]  # points
    mics = torch.tensor([-1.0, 1.0])
    apart = (line - mics).abs().T[None] * 10  # samples
    curves = torch.zeros(1, 1, 41)
    curves[0, 0, 20 + 6] = 1.0  # 6 samples later at the first: 0.3 towards the second
    answers = steered_answers(curves, apart, line)
    torch.testing.assert_close(answers[0, -1], torch.tensor([0.3]), atol=1e-3, rtol=0)


REFUSED = {
    "window": (lambda net: fill_in(net, recording()[0][:, :2000], recording()[1]), "2000 samples"),
    "few": (lambda net: fill_in(net, *recording(3)), "mics: 3, this net was trained with 4 to 8"),
    "many": (lambda net: fill_in(net, *recording(9)), "mics: 9"),
    "no number": (lambda net: fill_in(net, recording()[0], recording()[1] * torch.nan),
                  "mics: nan"),
    "no sound": (lambda net: fill_in(net, recording()[0] * 0, recording()[1]),
                 "channel 0 is silent"),
    "all hidden": (lambda net: known(6, silent=range(6)), "heard: from 0"),
    "one place": (lambda net: known(6, unplaced=range(5)), "placed: from 1"),
    "no such": (lambda net: known(6, unplaced=[6]), "unplaced="),
    "width": (lambda net: Wav2pos("gcc", width=30, heads=4), "multiple of heads"),
    "lags": (lambda net: Wav2pos("gcc", window=200), "max_lag=314"),
    "repair": (lambda net: make_recipe("ours", undo="frozen"), "undo='frozen'"),
    "kind": (lambda net: Wav2pos("phat"), "pairs='phat'"),
    "recipe": (lambda net: make_recipe("theirs"), "recipe='theirs'"),
    "sound of another length": (lambda net: fill_in(net, *recording(), torch.randn(2000)),
                                "emitted: has 2000 samples"),
    "endless place": (lambda net: fill_in(net, recording()[0], recording()[1] / 0), "mics: inf"),
    "no number in sound": (lambda net: fill_in(net, recording()[0] * torch.nan, recording()[1]),
                           "audio"),
    "uneven masks": (lambda net: net(torch.randn(2, 7, 2048), torch.rand(2, 7, 3),
                                     Known(known(6).placed.expand(2, -1), torch.stack(
                                         [known(6).heard, known(6, silent=[0]).heard]))),
                     "heard: from 5 to 6"),
    "masks of numbers": (lambda net: net(torch.randn(1, 7, 2048), torch.rand(1, 7, 3),
                                         Known(torch.ones(7), torch.ones(7))), "placed: shape"),
    "told where she is": (lambda net: net(torch.randn(1, 7, 2048), torch.rand(1, 7, 3),
                                          Known(*torch.ones(2, 7, dtype=torch.bool))),
                          "slot 0 is the talker"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(tiny, name):
    tiny.counts = (4, 8)
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words): call(tiny)


def test_weights_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="card.json"): load_wav2pos(tmp_path)
    with pytest.raises(FileNotFoundError, match="card.json"): load_trained(tmp_path)


@pytest.mark.parametrize("given, told", [
    ([], "pairs='ngcc' needs the trained net"),
    (["-p", "ngcc=nowhere"], "ngcc='nowhere': is no file, and no folder with weights.safetensors")])
def test_an_experiment_without_its_ngcc_names_it(given, told, tmp_path):
    "The cells up to the check, without a kernel."
    notebook = find_experiment("wav2pos")
    values = dict(word.split("=") for word in given if word != "-p") | {"pairs": "ngcc"}
    names = resolve_parameters(notebook, values, "smoke", 0)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(told)):
        for cell in nbformat.read(notebook, as_version=4).cells:
            if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
                exec(cell.source, names)


def test_a_run_of_ngcc_phat_serves_the_next_command(tmp_path):
    "Two commands and a folder of runs that was empty."
    done = in_process("run", "ngcc_reference", "--profile", "smoke", "-p", "n_places=2", "-p",
                      "windows=1", runs=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / "ngcc_reference").iterdir()
    assert load_trained(folder).front.layers[3].in_channels == 32
    done = in_process("run", "wav2pos", "--profile", "smoke", "-p", "pairs=ngcc", "-p",
                      f"ngcc={folder}", "-p", "n_scenes=32", "-p", "n_test=2", "-p", "n_slow=1",
                      runs=tmp_path)
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path / "wav2pos").iterdir()
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    assert {"wav2pos", "NGCC-PHAT + multilateration"} <= {row["method"] for row in rows}


@pytest.mark.parametrize("method", ["wav2pos", "ngcc_multilateration"])
def test_locate_on_a_recording(method, tmp_path):
    "A noise in a room without echoes, from the file to the table; both methods find it."
    mics = torch.tensor([[1.7, 2.1, 0.0], [3.2, 1.9, 2.0], [2.4, 0.0, 1.1], [0.0, 3.3, 0.7],
                         [5.0, 1.4, 1.4], [2.9, 5.0, 0.6]])
    talker, g = torch.tensor([3.1, 3.6, 1.2]), torch.Generator().manual_seed(0)
    if method == "ngcc_multilateration":  # its weights know small arrays
        mics = torch.tensor([2.5, 2.5, 1.0]) + 0.25 * torch.cat([torch.eye(3), -torch.eye(3)])
    sound = torch.randn(16000, generator=g)
    heard = reverberate(sound, rirs(Room(wav2pos.ROOM, 0.0), talker, mics, 16000))
    heard = add_noise(heard, 20.0, g)
    soundfile.write(tmp_path / "six.wav", (heard / heard.abs().max() / 2).T.numpy(), 16000)
    (tmp_path / "array.yaml").write_text(
        "name: six\nsource: a test\nrate: 16000\npositions:\n"
        + "".join(f"  - {[round(v, 4) for v in m]}\n" for m in mics.tolist()))
    done = in_process("locate", tmp_path / "six.wav", "--array", tmp_path / "array.yaml",
                      "--method", method, "--room", "5,5,2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(next((tmp_path / "out").glob("*.csv")))
    off = ((table[["x_m", "y_m", "z_m"]] - talker.numpy()) ** 2).sum(axis=1) ** 0.5
    assert off.median() < 0.4


def test_scenes_are_kept_resumed_and_others_refused(tmp_path, monkeypatch):
    made = wall_scenes(tmp_path / "a", 6, seed=1, per_room=2, n_mics=6)
    whole = [np.array(v) for v in made.arrays.values()]
    about = json.loads((tmp_path / "a" / "about.json").read_text())
    for values in ("audio", "places"):  # as if killed after two scenes
        rows = np.load(tmp_path / "a" / f"{values}.npy", mmap_mode="r+")
        rows[2:] = 0
        rows.flush()
    (tmp_path / "a" / "about.json").write_text(json.dumps(about | {"done": 2}))
    again = wall_scenes(tmp_path / "a", 6, seed=1, per_room=2, n_mics=6)
    for one, two in zip(whole, again.arrays.values()): np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="holds arrays with seed=1, wanted 2"):
        wall_scenes(tmp_path / "a", 6, seed=2, per_room=2, n_mics=6)


# --- the weights that come with the book ----------------------------------------------------------

def test_the_weights_reproduce_a_number_of_their_card(tmp_path):
    """Mean error without echoes on the experiment's own 64 scenes and noise, made again here."""
    net = load_wav2pos()
    made = wall_scenes(tmp_path / "test", 64, 3 * net.card["seed"] + 2, "test", n_mics=8,
                       anechoic_prob=1.0, t60=(0.3, 0.3), samples=2048, per_room=1)
    rows = made.__getitems__(range(64))
    clean, places = (torch.stack([r[k] for r in rows]).float() for k in ("audio", "places"))
    torch.manual_seed(net.card["seed"])
    noisy = clean + torch.randn_like(clean) * 0.1  # 20 dB
    off = (fill_in(net, noisy[:, 1:7], places[:, 1:7]).talker - places[:, 0]).norm(dim=-1).mean()
    assert float(off) == pytest.approx(net.card["mean_m"]["1a, T60 0 s"], abs=0.002)


def test_the_localizer_refuses_what_its_weights_do_not_know():
    method = wav2pos.Wav2posLocalizer()
    audio, mics = recording()
    audio, mics[:, 2] = audio.repeat(1, 4), 0.0  # all on the floor
    with pytest.raises(ValueError, match="know rooms of"):
        method(audio, mics, 16000, room=(6.0, 5.0, 2.0))
    mics[0] = torch.tensor([2.5, 2.5, 1.0])
    with pytest.raises(ValueError, match="number 0 is 1.00 m"):
        method(audio, mics, 16000, room=wav2pos.ROOM)
