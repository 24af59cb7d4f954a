"""The form of a model that only acts: fewer blocks, fewer products, the same actions."""

import dataclasses

from lightwam_jax import params as params_lib
from lightwam_jax.models import dit, lora


def deployed(params, config):
    """Returns (parameters, `ModelConfig`) of the deployment form.

    LoRA is merged into its kernels; the blocks after the last adapter and the video head, which
    no action depends on, are gone.

    Args:
      params: all parameters of `LightWAM`, in-memory layout; arrays, or shapes under
        `jax.eval_shape`.
      config: their `ModelConfig`.
    """
    last = config.adapter_layers[-1]
    smaller = dataclasses.replace(config, num_layers=last + 1, lora_rank=0, lora_layers=())
    unused = {
        segment.name
        for segment in dit.segments(config.num_layers, config.adapter_layers, config.lora_layers)
        if segment.start > last
    }
    kept = {name: child for name, child in params["dit"].items() if name not in (*unused, "head")}
    merged = {**params, "dit": lora.merge_lora(kept, config.lora_alpha)}
    wanted = {cut.name for cut in dit.segments(last + 1, config.adapter_layers, ())}
    if wanted == {name for name in kept if name.startswith("blocks_")}:
        return merged, smaller
    # LoRA in some layers only had cut the runs further: join them.
    return params_lib.segmented(params_lib.canonical(merged), smaller), smaller
