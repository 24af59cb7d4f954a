"""The demo's evaluation: trained policy, untrained policy and expert on the same held-out scenes, and its report."""

import time

import jax
import numpy as np

from lightwam_jax import params
from lightwam_jax import visualize
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.evaluation import report
from lightwam_jax.evaluation import rollout

FILM_EVERY = 2  # steps between two frames of a video


def evaluate(policy, workdir, began):
    """Evaluates and writes `<workdir>/summary.json`, `report.html` and the pictures in `report/`.

    Args:
      policy: `Policy` trained on the demo.
      workdir: pathlib.Path of the run.
      began: unix time at which the pipeline began.

    Returns:
      {"trained", "untrained", "expert": `report.Rate`}.

    Raises:
      ValueError: not a demo policy, or seeds that were demonstrated.
      RuntimeError: no episode could be run.
    """
    config = policy.config
    e, env, seeds = config.evaluation, demo_env(config), held_out_seeds(config)
    directory = workdir / "report"
    directory.mkdir(parents=True, exist_ok=True)

    # ---- episodes
    policy.warm_up([e.batch])
    actors = {"trained": policy.act, "untrained": policy.untrained(config.seed).act, "expert": None}
    runs = {name: rollout.run(act, env, seeds, e, directory / f"{name}.jsonl", name, expert=act is None)
            for name, act in actors.items()}
    rates = {name: report.rate(records) for name, records in runs.items()}

    # ---- pictures, then the numbers, whose seconds include them
    sections = _sections(policy, workdir, env, runs, rates)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    leaves = sorted(params.flatten(jax.device_get(policy.params)).items())
    manifest = report.manifest(config, policy.step, report.weights_hash(leaves), device)
    summary = report.write_summary(workdir / "summary.json", seconds=time.time() - began, manifest=manifest, **rates)
    report.write_html(workdir / "report.html", f"Light-WAM JAX · {config.name}", _headline(rates["trained"]),
                      _facts(policy, runs, rates, summary["seconds"]), sections, manifest)
    return rates


def demo_env(config):
    """Returns the `EnvSpec` of the demo's scenes; ValueError for a policy of other data."""
    if config.data.source != "demo":
        raise ValueError(f"--mode demo evaluates policies of the embedded demo; this one was trained on "
                         f"{config.data.source!r}: use --mode open_loop or visualize")
    return rollout.EnvSpec("lightwam_jax.evaluation.envs.demo:make", {"image_size": config.demo.image_size})


def held_out_seeds(config):
    """Returns the range of evaluation seeds; ValueError if a demonstration has one of them."""
    e, d = config.evaluation, config.demo
    seeds = range(e.first_seed, e.first_seed + e.episodes)
    shown = range(d.first_seed, d.first_seed + d.episodes)
    if set(seeds) & set(shown):
        raise ValueError(f"seeds {seeds.start}..{seeds.stop - 1} are not held out: the demonstrations have "
                         f"{shown.start}..{shown.stop - 1}; choose another --seed")
    return seeds


def windows(episodes, span, apart):
    """Returns [(episode, start)] of up to 64 windows of `span` steps, a start every `apart` steps."""
    return [(episode, start) for episode in episodes
            for start in range(0, max(1, episode.length - span), max(1, apart))][:64]


def draw_future(policy, directory, episodes):
    """Writes future.png, three windows frame by frame, and psnr.png, the mean over many, into `directory`."""
    span = policy.config.data.num_frames
    shown = [(episode, int(share * max(0, episode.length - span)))
             for episode, share in zip(episodes, (0.2, 0.5, 0.8))]
    visualize.save_png(directory / "future.png", visualize.future_sheet(visualize.future(policy, shown)))
    result = visualize.future(policy, windows(episodes, span, span // 2))
    series = {}
    for name, label in (("psnr", "imagined"), ("still", "first frame repeated")):
        means = np.ma.masked_array(result[name], ~result["valid"]).mean(axis=0)
        future = slice(1, None)  # frame 0 is given
        series[label] = result["offsets"][future], means[future]
    count = len(result["prompts"])
    report.curve_chart(directory / "psnr.png", series, f"PSNR, dB (mean of {count} windows)", xlabel="steps ahead")


def _sections(policy, workdir, env, runs, rates):
    """Draws everything and returns the report's sections."""
    directory, config = workdir / "report", policy.config
    replan, size = config.evaluation.replan, config.demo.image_size

    shown = choose(runs["trained"], config.evaluation.videos)
    films = rollout.replay(env, shown, every=FILM_EVERY, size=256, replan=replan)
    videos = [_video(directory, config, record, film) for record, film in zip(shown, films)]
    visualize.save_png(directory / "demo.png", visualize.film_strip(policy, shown[0], films[0]))
    report.success_chart(directory / "success.png", {
        "trained policy": rates["trained"], "untrained policy": rates["untrained"], "scripted expert": rates["expert"]})
    seen = [film["observations"][len(film["observations"]) // 3] for film in films[:3]]
    visualize.save_png(directory / "attention.png", visualize.attention_sheet(policy, seen))

    experts = [record for record in runs["expert"] if record.error is None][:6]
    replays = rollout.replay(env, experts, every=max(r.steps for r in experts), size=size, replan=1)
    draw_future(policy, directory, [_as_episode(r, film) for r, film in zip(experts, replays)])
    curves = _curves(workdir, directory)

    wide = lambda name: (report.Media(directory / name, wide=True),)
    section = report.Section
    return [
        section("How often it succeeds", "The same scenes for all three; no demonstration showed them. The untrained "
                "policy is the same network with fresh random parameters.", wide("success.png")),
        section("Watch it", f"Scene and wrist camera, rendered again for this page; the policy sees {size} x {size} "
                f"pixels of each and plans anew every {replan} steps.", tuple(videos)),
        section("One episode, and where the policy looked", "Learned queries read the states of the video backbone. "
                "Bright is where those of the last adapter layer attended when the plan being executed was made.",
                wide("demo.png")),
        section("Query attention, layer by layer", "Attention of the learned queries, weighted by their importance. Each "
                "layer has one scale for both cameras, so their brightness compares.", wide("attention.png")),
        section("What it imagines", "The same backbone predicts video from the first frame and the instruction; above it "
                "what happened when the expert acted, on held-out scenes, at the resolution the video loss is trained at. "
                "The dashed alternative repeats the first frame.", wide("future.png") + wide("psnr.png")),
        section("How it learned", "", curves),
        section("Every episode", "", table=_table(runs)),
    ]


def choose(records, count):
    """Picks episodes to show: solved ones with different instructions first, then failures if there are any.

    At most a quarter of `count` are failures (but one at least), unless there are too few solved ones.
    """
    solved, failed = ([r for r in records if r.success is wanted] for wanted in (True, False))
    first = list({r.prompt: r for r in reversed(solved)}.values())[::-1]
    solved = first + [r for r in solved if r not in first]
    failures = min(len(failed), max(1, count // 4))
    chosen = solved[:max(1, count - failures)]
    return chosen + failed[:max(1, count) - len(chosen)]


def _video(directory, config, record, film):
    path = directory / f"episode_{record.seed}.mp4"
    visualize.save_mp4(path, visualize.side_by_side(film["frames"], config.data.cameras), fps=12)
    return report.Media(path, f"“{record.prompt}” · {record.steps} steps · seed {record.seed}",
                        "solved" if record.success else "not solved")


def _as_episode(record, film):
    """A replayed episode with an observation at every step, as data."""
    seen = film["observations"]
    images = {camera: np.stack([o["images"][camera] for o in seen]) for camera in seen[0]["images"]}
    return episodes_lib.ArrayEpisode(id=str(record.seed), fps=0.0, task=record.prompt, images=images,
                                     state=np.stack([o["state"] for o in seen]), action=record.actions)


def _curves(workdir, directory):
    """Draws the learning curves and returns their media."""
    series = report.read_metrics(workdir / "metrics.jsonl")
    losses = {label: series[f"train/{name}"]
              for label, name in (("total", "loss"), ("video", "loss_video"), ("action", "loss_action"))}
    report.curve_chart(directory / "loss.png", losses, "training loss", log=True)
    media = [report.Media(directory / "loss.png", "Mean of each log window.")]
    errors = {f"dimension {name.rsplit('/', 1)[1]}": values
              for name, values in series.items() if name.startswith("eval/l1/")}
    if errors:
        report.curve_chart(directory / "validation.png", errors, "action L1, normalised units", log=True)
        media.append(report.Media(directory / "validation.png", "Open-loop error on held-out demonstrations."))
    return tuple(media)


def _headline(rate):
    low, high = (100 * bound for bound in rate.interval)
    errors = f" {rate.errors} more could not be run." if rate.errors else ""
    return f"{100 * rate.value:.0f} %", (
        f"of {rate.episodes} episodes solved from camera images and an instruction, on scenes that no demonstration "
        f"showed (95 % interval {low:.0f} to {high:.0f} %).{errors}")


def _facts(policy, runs, rates, seconds):
    steps = [r.steps for r in runs["trained"] if r.success]
    minutes, rest = divmod(round(seconds), 60)
    return [(f"{100 * rates['untrained'].value:.0f} %", "untrained policy, same scenes"),
            (f"{100 * rates['expert'].value:.0f} %", "scripted expert, same scenes"),
            (f"{np.mean(steps):.0f}" if steps else "none", "steps per solved episode"),
            (f"{params.count(policy.params) / 1e6:.2f} M", "parameters"),
            (f"{policy.step:,}", "training steps"),
            (f"{minutes} min {rest:02d} s", "from start to this report")]


def _table(runs):
    names = {True: "solved", False: "not solved", None: "could not run"}
    rows = [(t.seed, t.prompt or x.prompt, names[t.success], t.steps, names[u.success], names[x.success], x.steps)
            for t, u, x in zip(runs["trained"], runs["untrained"], runs["expert"])]
    return (("seed", "instruction", "trained", "steps", "untrained", "expert", "steps"), *rows)
