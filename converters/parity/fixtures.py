"""What verification is made of: a check, its tolerance, and the models of a fixture directory."""

import dataclasses
import fnmatch
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from converters import files, layouts, rules, umt5, wan_dit, wan_vae
from converters import lightwam as lightwam_lib
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


@dataclasses.dataclass
class Fixtures:
    """A directory laid out like the golden fixtures, of any sizes."""

    root: Path
    suffixes: tuple = (".safetensors", ".pt")  # of checkpoints to read, preferred first

    def __post_init__(self):
        self.root = Path(self.root)
        self.manifest = self.json("manifest.json") if self.has("manifest.json") else {}
        self._checkpoint, self._vaes = None, None

    def has(self, name):
        return (self.root / name).exists()

    def json(self, name):
        return files.read_json(self.root / name)

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
        return sorted(
            found,
            key=lambda path: ("bf16" in path.name, self.suffixes.index(path.suffix), path.name),
        )

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
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
        fields = dict(
            wan_dit.model_fields(shapes, told["attn_head_dim"]),
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

    def lightwam(self):
        """(LightWAM module, params in memory layout, ModelConfig) of the checkpoint; read once."""
        if self._checkpoint is None:
            path = self.checkpoint_files()[0]
            tensors, _ = files.read_checkpoint(path)
            config = self.model_config(tensors)
            model = build.build_model(config)
            flat = rules.to_params(lightwam_lib.CHECKPOINT, tensors, str(path))
            tree = params.segmented(params.unflatten(flat), config)
            shapes = jax.eval_shape(
                lambda key: build.init_params(model, key, config), jax.random.key(0)
            )
            params.check_same_structure(tree, shapes, str(path))
            self._checkpoint = model, tree, config
        return self._checkpoint

    def vae(self, version):
        """(module, params) of the "wan21" or "wan22" VAE in f_vae, or None; read once."""
        if self._vaes is None:
            self._vaes = dict(self._read_vae(path) for path in self.weight_files("f_vae"))
        return self._vaes.get(version)

    def _read_vae(self, path):
        tensors = files.read_tensors(path)
        flat = rules.to_params(layouts.detect(tensors, str(path)).table, tensors, str(path))
        fields = wan_vae.model_fields({name: leaf.shape for name, leaf in flat.items()})
        version = fields.pop("version")
        if self.has("f_vae/info.json"):
            told = self.json("f_vae/info.json").get(version.replace("wan", "vae"), {})
            fields.update(
                {f"latent_{name}": tuple(told[name]) for name in ("mean", "std") if name in told}
            )
        return version, (wan.VAES[version](**fields), params.unflatten(flat))

    def text_encoder(self):
        """(module, params) of the umT5 encoder in g_text."""
        path = next(iter(self.weight_files("g_text")), None)
        if path is None:
            raise FileNotFoundError(f"{self.root}/g_text holds no weights of a text encoder")
        tensors = files.read_tensors(path)
        flat = rules.to_params(layouts.detect(tensors, str(path)).table, tensors, str(path))
        told = self.json("g_text/config.json") if self.has("g_text/config.json") else {}
        fields = umt5.model_fields({name: leaf.shape for name, leaf in flat.items()})
        fields.update(
            {
                ours: told[theirs]
                for ours, theirs in (("eps", "eps"), ("max_distance", "max_dist"))
                if theirs in told
            }
        )
        return t5.UMT5Encoder(**fields), params.unflatten(flat)

    def model_config(self, tensors):
        """ModelConfig of a checkpoint: keys, shapes, and what the fixture's JSON files tell."""
        told = self.json("a_dit/dit_config.json")
        pooling = self.manifest.get("state_fusion_config", {})
        return lightwam_lib.model_config(
            {key: tensor.shape for key, tensor in tensors.items()},
            head_dim=told["attn_head_dim"],
            lora_alpha=told["lora_alpha"],
            adapter_scale=float(told["adapter_scale"]),
            attention_mask=told["video_attention_mask_mode"],
            pool_heads=pooling.get("token_pooling_num_heads"),
        )


def compare(group, component, tensor, got, expected, noise=None, tolerance=None):
    """A `Check` of two arrays: tolerance is 10x the reference's own float32 noise.

    Args:
      noise: recorded absolute noise, if any; tolerance: overrides it (exact: 0).
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        return Check(
            group,
            component,
            f"{tensor} {got.shape} not {expected.shape}",
            float("inf"),
            float("inf"),
            0.0,
        )
    size = float(np.abs(expected).max(initial=0.0))
    error = float(np.abs(got - expected).max(initial=0.0))
    if tolerance is None:
        tolerance = FACTOR * max(noise or 0.0, RELATIVE_NOISE * max(size, 1.0))
    return Check(group, component, tensor, error, error / size if size else error, tolerance)


def channels_last(x):
    """[B,C,F,H,W] of the fixtures -> [B,F,H,W,C]."""
    return np.moveaxis(x, 1, -1)


def channels_first(x):
    """The inverse of `channels_last`."""
    return np.moveaxis(np.asarray(x), -1, 1)


def matching(names, pattern):
    """Names that fit a shell pattern, sorted."""
    return sorted(fnmatch.filter(names, pattern))
