"""Weights made from the names of tensors, so that a clone without any weight file can compare a net
with numbers that the published code gave for the same weights."""
import zlib

import numpy as np
import torch


def filled(shapes):
    """Tensors by name. The generator is NumPy's legacy one, whose stream is frozen, seeded by the
    name; the kind of value follows from the name's ending and the shape."""
    tensors = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        seed = zlib.crc32(name.encode("utf-8")) & 0x7FFFFFFF
        z = np.random.RandomState(seed).standard_normal(shape)
        if name.endswith("running_var"): z = 1 + 0.2 * np.abs(z)
        elif name.endswith("running_mean"): z = 0.1 * z
        elif len(shape) == 1: z = 1 + 0.1 * z if name.endswith("weight") else 0.05 * z
        elif len(shape) == 3 and shape[:2] == (1, 1): z = 0.5 * z
        else: z = z / np.sqrt(np.prod(shape[1:]))
        tensors[name] = torch.tensor(z, dtype=torch.float32)
    return tensors


def norm(name, size):
    "Shapes of the tensors of a batch normalization."
    return ({f"{name}.{p}": (size,) for p in ("weight", "bias", "running_mean", "running_var")}
            | {f"{name}.num_batches_tracked": ()})


def ngcc_shapes(regression=False, use_sinc=True, lags=47):
    "Names and shapes of the published NGCC-PHAT."
    shapes = ({f"backbone.conv.0.{p}": (128, 1) for p in ("low_hz_", "band_hz_")} if use_sinc
              else {"backbone.conv.0.weight": (128, 1, 1023), "backbone.conv.0.bias": (128,)})
    for part, first, kernels in (("backbone.conv.{}", 1, (11, 9, 7)), ("mlp.{}.0", 0, (11, 9, 7))):
        for k, taps in enumerate(kernels, first):
            shapes[part.format(k) + ".weight"] = (128, 128, taps)
            shapes[part.format(k) + ".bias"] = (128,)
    for name in [f"backbone.bn.{k}" for k in range(4)] + [f"mlp.{k}.1" for k in range(3)]:
        shapes |= norm(name, 128)
    shapes |= {"final_conv.weight": (1, 128, 5), "final_conv.bias": (1,)}
    if regression:
        shapes |= norm("reg.0", lags) | {"reg.2.weight": (1, lags), "reg.2.bias": (1,)}
    return shapes


def pgcc_shapes(outputs=47, lags=47):
    "Names and shapes of the published PGCC-PHAT."
    widths, shapes = (1, 32, 64, 128, 256, 512), {}
    for k, (before, after) in enumerate(zip(widths, widths[1:]), 1):
        shapes |= {f"conv{k}.weight": (after, before, 3, 3), f"conv{k}.bias": (after,)}
        shapes |= norm(f"bn{k}", after)
    for k, size in ((0, (512, 512 * (lags - 10))), (4, (512, 512)), (8, (outputs, 512))):
        shapes |= {f"mlp.{k}.weight": size, f"mlp.{k}.bias": size[:1]}
    return shapes | norm("mlp.1", 512) | norm("mlp.5", 512)
