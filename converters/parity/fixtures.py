"""What verification is made of: a check, its tolerance, and the models of a fixture directory."""

import fnmatch
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from converters import files, layouts, lightwam, rules, umt5, wan_dit, wan_vae
from lightwam_jax import build, params
from lightwam_jax import config as config_lib
from lightwam_jax.encoders import wan
from lightwam_jax.models import t5

# Distance of the reference's own float32 result from its float64 result, relative to the largest
# value of a tensor, where the fixture's manifest does not record it. Tolerances are 10x the noise.
RELATIVE_NOISE = 4e-7
FACTOR = 10.0


class Check(NamedTuple):
    """One compared tensor. relative: error over the largest reference value."""

    group: str
    component: str
    tensor: str
    error: float
    relative: float
    tolerance: float

    @property
    def ok(self):
        return bool(self.error <= self.tolerance)  # a NaN error is not ok

    def row(self):
        """Its line of the table that `verify` prints."""
        tensor = self.tensor if len(self.tensor) <= 58 else "..." + self.tensor[-55:]
        return (
            f"{self.group:<15} {self.component:<22} {tensor:<58} {self.error:9.2e} "
            f"{self.relative:9.2e} {self.tolerance:9.2e}  {'ok' if self.ok else 'FAIL'}"
        )


class NotCovered(NamedTuple):
    """Something in the directory that no check reads yet."""

    group: str


class Compare(NamedTuple):
    """Makes the checks of one component of a group: `Compare(group, component)(tensor, ...)`."""

    group: str
    component: str

    def __call__(self, tensor, got, expected, noise=None, tolerance=None):
        """The `Check` of two arrays: the tolerance is 10x the reference's own float32 noise.

        Args:
          noise: recorded absolute noise, if any. tolerance: overrides it.
        """
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        if got.shape != expected.shape:
            tensor = f"{tensor} {got.shape} not {expected.shape}"
            return Check(*self, tensor, float("inf"), float("inf"), 0.0)
        size = float(np.abs(expected).max(initial=0.0))
        error = float(np.abs(got - expected).max(initial=0.0))
        if tolerance is None:
            tolerance = FACTOR * max(noise or 0.0, RELATIVE_NOISE * max(size, 1.0))
        return Check(*self, tensor, error, error / size if size else error, tolerance)

    def exact(self, tensor, got, expected):
        """The check of two arrays that must be equal."""
        return self(tensor, got, expected, tolerance=0.0)

    def none(self, tensor, count):
        """The check that something was found no times."""
        return self.exact(tensor, count, 0)

    def recorded(self, got, data, noise=lambda tensor: None):
        """The checks of those tensors of `got` that the fixture `data` has."""
        for tensor, value in got.items():
            if tensor in data:
                yield self(tensor, value, data[tensor], noise(tensor))


class Fixtures:
    """A directory laid out like the golden fixtures, of any sizes.

    Args:
      suffixes: of the weight files to read, preferred first.
    """

    def __init__(self, root, suffixes=(".safetensors", ".pt")):
        self.root, self.suffixes = Path(root), suffixes
        self.manifest = self.told("manifest.json")

    def has(self, name):
        return (self.root / name).exists()

    def json(self, name):
        return files.read_json(self.root / name)

    def told(self, name):
        """The content of a JSON file; {} where there is none."""
        return self.json(name) if self.has(name) else {}

    def arrays(self, name):
        with np.load(self.root / name, allow_pickle=False) as content:
            return dict(content)

    def tensors(self, name):
        return files.read_tensors(self.root / name)

    def checkpoint_files(self):
        """Light-WAM checkpoints of the directory, full precision first."""
        found = [path for path in self.root.glob("ckpt/step_*") if path.suffix in self.suffixes]
        if not found:
            raise FileNotFoundError(f"{self.root}/ckpt holds no step_*.pt")
        place = lambda path: ("bf16" in path.name, self.suffixes.index(path.suffix), path.name)
        return sorted(found, key=place)

    def weight_files(self, group):
        """Weight files of a group, one per stem, preferred suffix first."""
        suffixes = (*self.suffixes, ".pth") if ".pt" in self.suffixes else self.suffixes
        found = {}
        for suffix in suffixes:
            for path in sorted(self.root.glob(f"{group}/*{suffix}")):
                found.setdefault(path.stem, path)
        return list(found.values())

    def noise(self, name):
        """Recorded absolute noise of a tensor, or None."""
        return self.manifest.get("noise_f32_vs_f64", {}).get(name, {}).get("max_abs_diff")

    # ---- models of the directory ---------------------------------------------------------------

    def dit(self, name):
        """(WanDiT module, its params in memory layout, canonical flat params) of a_dit/<name>."""
        tensors = self.tensors(f"a_dit/{name}.safetensors")
        told = self.json(f"a_dit/{name}_config.json")
        fields = dict(
            wan_dit.model_fields(rules.shapes_of(tensors), told["attn_head_dim"]),
            dtype="float32",
            lora_alpha=float(told["lora_alpha"]),
            adapter_scale=float(told["adapter_scale"]),
            attention_mask=told["video_attention_mask_mode"],
            eps=told["eps"],
        )
        config = config_lib.model_variant("tiny", **fields)
        flat = rules.to_params(wan_dit.RULES, tensors, name)
        tree = params.segmented(params.unflatten(flat), config)["dit"]
        return build.build_model(config).dit, tree, flat

    @functools.cached_property
    def lightwam(self):
        """(LightWAM module, params in memory layout, ModelConfig) of the first checkpoint."""
        path = self.checkpoint_files()[0]
        tensors, _ = files.read_checkpoint(path)
        config = self.model_config(tensors)
        model = build.build_model(config)
        flat = rules.to_params(lightwam.CHECKPOINT, tensors, str(path))
        tree = params.segmented(params.unflatten(flat), config)
        shapes = jax.eval_shape(
            lambda key: build.init_params(model, key, config), jax.random.key(0)
        )
        params.check_same_structure(tree, shapes, str(path))
        return model, tree, config

    @functools.cached_property
    def vaes(self):
        """{"wan21" or "wan22": (module, params)} of the VAEs in f_vae."""
        return dict(self._read_vae(path) for path in self.weight_files("f_vae"))

    def _read_vae(self, path):
        flat = _read(path)
        fields = wan_vae.model_fields(rules.shapes_of(flat))
        version = fields.pop("version")
        told = self.told("f_vae/info.json").get(version.replace("wan", "vae"), {})
        for name in {"mean", "std"} & set(told):
            fields[f"latent_{name}"] = tuple(told[name])
        return version, (wan.VAES[version](**fields), params.unflatten(flat))

    def text_encoder(self):
        """(module, params) of the umT5 encoder in g_text."""
        path = next(iter(self.weight_files("g_text")), None)
        if path is None:
            raise FileNotFoundError(f"{self.root}/g_text holds no weights of a text encoder")
        flat, told = _read(path), self.told("g_text/config.json")
        fields = umt5.model_fields(rules.shapes_of(flat))
        for ours, theirs in (("eps", "eps"), ("max_distance", "max_dist")):
            if theirs in told:
                fields[ours] = told[theirs]
        return t5.UMT5Encoder(**fields), params.unflatten(flat)

    def model_config(self, tensors):
        """ModelConfig of a checkpoint: keys, shapes, and what the fixture's JSON files tell."""
        told = self.json("a_dit/dit_config.json")
        pooling = self.manifest.get("state_fusion_config", {})
        return lightwam.model_config(
            rules.shapes_of(tensors),
            head_dim=told["attn_head_dim"],
            lora_alpha=told["lora_alpha"],
            adapter_scale=float(told["adapter_scale"]),
            attention_mask=told["video_attention_mask_mode"],
            pool_heads=pooling.get("token_pooling_num_heads"),
        )


def _read(path):
    """{our path: array} of a weight file of any known layout."""
    tensors = files.read_tensors(path)
    return rules.to_params(layouts.detect(tensors, str(path)).table, tensors, str(path))


def channels_last(x):
    """[B,C,F,H,W] of the fixtures -> [B,F,H,W,C]."""
    return np.moveaxis(x, 1, -1)


def channels_first(x):
    """The inverse of `channels_last`."""
    return np.moveaxis(np.asarray(x), -1, 1)


def matching(names, pattern):
    """Names that fit a shell pattern, sorted."""
    return sorted(fnmatch.filter(names, pattern))
