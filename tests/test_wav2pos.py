"""wav2pos against what the published code (github.com/axeber01/wav2pos, commit a90d2dc) gave for
weights that both sides make from the names of its tensors: outputs of every stage, losses and the
gradient of every parameter, for four ways of masking."""
import json, math
from pathlib import Path

import numpy as np
import pytest
import torch
from filled_weights import filled, norm
from ssl_nb.masked.ngcc_phat import load_published
from ssl_nb.masked.wav2pos import (Known, PairWords, Wav2pos, _chosen, decode, encode, fill_loss, known,
                                   pair_lags, spread_out, standardized)

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
              "get_decoder_mic_feature.0": "from_audio.0", "get_decoder_mic_feature.1": "from_audio.1",
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
    kept = torch.zeros(3, 14, dtype=torch.bool).scatter_(1, oracle[f"{setup}.ids_keep"].long(), True)
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
    features = pair_lags(net, _chosen(audio, given.heard))
    if setup == "1a":
        half = features.shape[1] // 2
        torch.testing.assert_close(torch.stack([features[:, :half], features[:, half:]], 2).flatten(1, 2),
                                   oracle["1a.pair_in"][..., 512:], **tight)
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
