"""Light-WAM on the Wan2.2-TI2V-5B backbone: `configs/wan22_5b.py:spatial|object|goal|10|all`.

    python -m converters dit --in Wan2.2-TI2V-5B --out weights/wan22_5b
    python -m converters vae --in Wan2.2-TI2V-5B/Wan2.2_VAE.pth --out weights/wan22_vae
    python -m converters t5 --in Wan2.2-TI2V-5B --out weights/umt5
    python -m lightwam_jax.precompute --config configs/wan22_5b.py:spatial --what all \\
        --config.data.codec_weights=weights/wan22_vae --config.data.text_weights=weights/umt5
    python train.py --config configs/wan22_5b.py:spatial --workdir runs/wan22_5b \\
        --config.train.init=weights/wan22_5b

LIBERO data and recipe on another backbone: 48 latent channels, 16 pixels per latent cell. The paper
has no such model, so there is no number to expect; LoRA, adapters and expert follow its 1.3B model
(see `models/variants.py`). The latents are coarser and not pooled for the video loss: the network
then sees 7x14 patches per frame, as many as the 1.3B model sees of its pooled latents.

Hardware (computed, not yet run): 5.63 billion parameters, 0.63 of them trained. In bfloat16, with
float32 values, gradients and Adam moments for what learns, 19 GiB before activations, divided by
config.mesh.fsdp: one GPU of 80 GB, or four of 24 GB with --config.mesh.fsdp=4.
"""

from configs import base, libero


def get_config(suite="all"):
    c = libero.get_config(suite)
    c.model = base.get_config("wan22_5b", action_dim=7, proprio_dim=8, remat="linears").model
    c.name = f"wan22_5b_libero_{suite}"
    c.data.cache = f"data/wan22_libero_cache/{suite}"
    c.data.codec = "wan22"
    c.loss.downsample = 1
    return c
