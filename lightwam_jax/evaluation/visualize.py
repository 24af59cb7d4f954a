"""The page of `--mode visualize`: attention and imagined video on held-out episodes."""

from lightwam_jax import html_report
from lightwam_jax.data import episodes
from lightwam_jax.evaluation import closed_loop, draw, imagined

_WINDOWS = 6  # episodes that video is imagined for
_SEEN = 3  # of them, those whose attention is drawn


def write(policy, directory):
    """Writes the images, future.json and visualize.html into `directory`.

    Returns:
      (the path of the page, lines to print).

    Raises:
      ValueError: the config holds no episode out.
    """
    config = policy.config
    recorded = episodes.load_episodes(config)
    _, held_out = episodes.split(recorded, config.data.val_fraction)
    if not held_out:
        raise ValueError(
            "config.data.val_fraction holds no episode out: every image would show training data"
        )
    chosen = held_out[:_WINDOWS]
    directory.mkdir(parents=True, exist_ok=True)
    sections, lines = [], []
    if config.model.attends:
        sections.append(_attention(policy, chosen[:_SEEN], directory))
    else:
        lines.append(
            "no attention.png: only learned queries attend (config.model.action_head="
            "'state_fusion' with pooling='learned_query')"
        )
    numbers = closed_loop.draw_future(policy, directory, chosen)
    lines.append(imagined.verdict(numbers))
    sections.append(
        html_report.Section(
            "What it imagines",
            "The same backbone predicts video from the first frame and the instruction. Three rows "
            "each: what was recorded, at the resolution of the video loss; the most that the "
            "latent codec can show of it; and what the policy imagines. Below each frame: PSNR and "
            "SSIM against what was recorded.",
            imagined.media(directory, numbers),
        )
    )
    path = directory / "visualize.html"
    headline = (f"{len(chosen)}", "held-out episodes, none of which the policy was trained on")
    facts = [
        (f"{policy.step:,}", "training steps"),
        (f"{numbers['windows'][0]}", "windows of imagined video"),
    ]
    manifest = {
        "run": config.name,
        "step": policy.step,
        "data": config.data.path,
        "episodes": ", ".join(episode.id for episode in chosen),
    }
    title = f"Attention and imagined video · {config.name}"
    html_report.write_html(path, title, headline, facts, sections, manifest, "What was evaluated")
    return path, lines


def _attention(policy, chosen, directory):
    seen = []
    for episode in chosen:
        step = episode.length // 3
        cameras = policy.config.data.cameras
        images = {camera: episode.frames(camera, [step])[0] for camera in cameras}
        state, prompt = episode.state[step], episode.task_at(step)
        seen.append({"images": images, "state": state, "prompt": prompt})
    path = directory / "attention.png"
    html_report.save_png(path, draw.attention_grid(policy, seen))
    return html_report.Section(
        "Query attention, layer by layer",
        "Attention of the learned queries, weighted by their importance, a third of the way "
        "through each episode. Each layer has one scale for all cameras. What gets less attention "
        "than average turns grey.",
        (html_report.Media(path, drawn=True),),
    )
