"""The PyTorch reference (a checkout of its repository, given by its path) with random weights.

For comparisons of speed only. Importing this module needs PyTorch and what the reference imports:
transformers, einops, ftfy, imageio, safetensors, tqdm, PyYAML.
"""

import contextlib
import inspect
import pathlib
import sys

import torch
import yaml

PATTERN = 1 << 20  # random values, repeated over the weights


def build(checkout, config, dtype, device):
    """Returns the reference's `LightWAM` at the sizes of a `Config` of ours.

    Args:
      checkout: directory of its repository. dtype: "float32" or "bfloat16". device: torch's name.
    """
    sys.path.insert(0, str(pathlib.Path(checkout, "src")))
    from lightwam.models.wan22 import lightwam, mot, state_fusion_action_expert, wan_video_dit
    from lightwam.models.wan22.wan_video_vae import WanVideoVAE

    released = yaml.safe_load(
        pathlib.Path(checkout, "configs/model/lightwam.yaml").read_text(encoding="utf-8")
    )
    fields = inspect.signature(wan_video_dit.WanVideoDiT.__init__).parameters
    sizes = {k: x for k, x in _sizes(released, config.model).items() if k in fields}
    expert = state_fusion_action_expert.StateFusionActionExpert
    model, dtype = config.model, getattr(torch, dtype)
    with torch.device("meta"), _default_dtype(dtype):  # no time for initialisers
        dit = wan_video_dit.WanVideoDiT(**sizes)
        head = expert(
            video_hidden_dim=model.dim,
            action_dim=model.action_dim,
            num_fusion_layers=len(model.adapter_layers),
            **released["state_fusion_action_expert_config"],
        )
    dit.freqs = wan_video_dit.precompute_freqs_cis_3d(model.head_dim)
    whole = lightwam.LightWAM(
        video_expert=_filled(dit),
        action_expert=lightwam.DisabledActionExpert(action_dim=model.action_dim),
        mot=mot.MoT(mixtures={"video": dit}, mot_checkpoint_mixed_attn=False),
        vae=WanVideoVAE(z_dim=model.latent_channels).to(dtype),
        text_dim=model.text_dim,
        proprio_dim=model.proprio_dim,
        device=device,
        torch_dtype=dtype,
        video_backbone_type="wan2_1_t2v",
        video_latent_spatial_downsample_factor=config.loss.downsample,
        use_wam_adapter=True,
        freeze_backbone=True,
        remove_original_action_expert=True,
        state_fusion_action_expert=_filled(head),
    )
    return whole.to(device).eval()


def policy(model, config, rows):
    """Returns a function without arguments: images on the host to actions on the host, `rows`.

    As `infer_action`, whose own entry takes one image at a time. Text is given, encoded.
    """
    height, width = config.data.canvas
    images = torch.rand(rows, 3, height, width) * 2 - 1
    text = torch.randn(rows, config.data.text_len, config.model.text_dim) * 0.1
    mask = torch.ones(rows, config.data.text_len, dtype=torch.bool)
    state = torch.zeros(rows, config.model.proprio_dim)
    there = dict(device=model.device, dtype=model.torch_dtype)

    @torch.no_grad()
    def act():
        latents = model._encode_video_latents(images.to(**there).unsqueeze(2))
        context = model._prepare_infer_action_context(None, text, mask, state.to(**there))
        actions = model._predict_state_fusion_action_from_observation(
            observation_latents=latents,
            action_horizon=config.data.action_horizon,
            context=context[0],
            context_mask=context[1],
            fuse_vae_embedding_in_latents=True,
        )
        return actions.float().cpu()

    return act


def training(model, config, rows):
    """Returns a function without arguments: one optimizer step on cached latents; its loss."""
    model.configure_trainable_modules()
    learns = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-2)
    data, widths = config.data, config.model
    height, width = (side // 8 for side in data.canvas)
    values = lambda *shape: torch.randn(rows, *shape) * 0.3
    flags = lambda size, value: torch.full((rows, size), value)
    sample = {
        "video_latents": values(widths.latent_channels, data.latent_frames, height, width),
        "context": values(data.text_len, widths.text_dim),
        "context_mask": flags(data.text_len, True),
        "proprio": values(data.action_horizon, widths.proprio_dim),
        "action": values(data.action_horizon, widths.action_dim),
        "action_is_pad": flags(data.action_horizon, False),
        "image_is_pad": flags(data.video_frames, False),
    }

    def step():
        loss, _ = model.training_loss(sample)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def wait(device):
    """Waits for all work of a device."""
    if device == "cuda":
        torch.cuda.synchronize()


def _sizes(released, model):
    """The arguments of the reference's backbone: its released config, with our sizes."""
    adapter = released["wam_adapter"]
    return released["video_dit_config"] | {
        "hidden_dim": model.dim,
        "in_dim": model.latent_channels,
        "out_dim": model.latent_channels,
        "ffn_dim": model.ffn_dim,
        "num_heads": model.num_heads,
        "attn_head_dim": model.head_dim,
        "num_layers": model.num_layers,
        "text_dim": model.text_dim,
        "freq_dim": model.freq_dim,
        "action_dim": model.action_dim,
        "use_gradient_checkpointing": False,
        "use_wam_adapter": True,
        "adapter_layer_indices": list(model.adapter_layers),
        "adapter_dim": model.adapter_dim,
        "adapter_scale": 1.0,
        "use_backbone_lora": True,
        "lora_layer_indices": list(model.lora_layers),
        "lora_target_modules": adapter["lora_target_modules"],
        "lora_rank": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": 0.0,
    }


@contextlib.contextmanager
def _default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _filled(module):
    """Gives a module without memory random weights: norms are ones, products keep magnitudes."""
    module.to_empty(device="cpu")
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if x.dim() == 1 and ("norm" in name or "gamma" in name) and not name.endswith("bias"):
            x.fill_(1)
            continue
        terms = x[0].numel() if x.dim() > 1 else 1
        values = (pattern * (0.5 * terms**-0.5 if x.dim() > 1 else 0.02)).to(x.dtype)
        flat = x.view(-1)
        for start in range(0, len(flat), PATTERN):
            flat[start : start + PATTERN] = values[: len(flat) - start]
    return module
