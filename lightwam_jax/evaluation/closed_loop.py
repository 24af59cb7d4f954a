"""Closed-loop evaluation: trained policy, untrained one and expert on the same episodes.

Not every task has a scripted expert. Where none has, there are only the policies.
"""

import json
import time

import jax
import numpy as np

from lightwam_jax import html_report, params
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.evaluation import draw, libero_published, report, rollout
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.training import metrics

VIDEO_SIZE = 192  # edge of a camera, pixels
VIDEO_FPS = 20  # at most; videos are in real time
_WHOLE = 60  # tasks; a longer table scrolls


def evaluate(policy, suite, workdir, out, began):
    """Evaluates; writes `<out>/summary.json`, `report.html` and, in `report/`, logs and images.

    For LIBERO also `summary_libero_*.json`, see `reference.py`.

    An evaluation that was interrupted continues where it was: the logs hold its episodes.

    Args:
      policy: `Policy` trained for the suite.
      suite: of `envs.SUITES`.
      workdir: pathlib.Path of the run. out: that of the results.
      began: unix time at which the pipeline began.

    Returns:
      {"trained", "untrained", "expert": {task: `report.Rate`}}, without tasks that have no expert
      in the last, and without the last if none has one; and, if there are several tasks, for each
      the rates over groups of them (suites, say) and over all of them as "all".

    Raises:
      ValueError: a policy of another suite, seeds that were demonstrated, or logs of another
        evaluation.
      RuntimeError: no episode could be run.
    """
    config = policy.config
    e, setup, directory = config.evaluation, suites_lib.of_config(config, suite), out / "report"
    directory.mkdir(parents=True, exist_ok=True)

    # ---- episodes ------------------------------------------------------------------------------
    manifest = manifest_of(policy, setup)
    policy.warm_up([e.batch])
    actors, runs = {"trained": policy, "untrained": policy.untrained(config.seed)}, {}
    if setup.expert_tasks:
        actors["expert"] = None
    for name, actor in actors.items():
        decisive = report.log_manifest(manifest, _hash(actor) if actor else "expert")
        episodes = (
            setup.episodes
            if actor
            else [episode for episode in setup.episodes if episode.task in setup.expert_tasks]
        )
        runs[name] = rollout.run(
            actor and actor.act,
            setup.env,
            episodes,
            e,
            directory / f"{name}.jsonl",
            decisive,
            name,
            actor is None,
        )
    rates = {name: report.rate(records) for name, records in runs.items()}
    by_task = {name: report.by_task(records) for name, records in runs.items()}
    by_group = {name: report.by_group(records, setup.groups) for name, records in runs.items()}

    # ---- numbers -------------------------------------------------------------------------------
    published = libero_published.published(runs["trained"], manifest)
    libero_published.write_summaries(out, runs["trained"], manifest, workdir)

    def summarize():
        return report.write_summary(
            out / "summary.json",
            seconds=time.time() - began,
            manifest=manifest,
            tasks=by_task,
            groups=by_group,
            published=published,
            **{"expert": None, **rates},
        )

    summarize()  # so that no image can cost the numbers

    # ---- images ------------------------------------------------------------------------------
    sections = _sections(policy, workdir, directory, setup, runs, rates)
    if published:
        sections.insert(
            1,
            html_report.Section(
                "Beside the published numbers",
                "Those of the PyTorch Light-WAM, by its authors: a "
                "checkpoint of its own for each suite.",
                table=libero_published.table(published),
                whole=True,
            ),
        )
    summary = summarize()  # the seconds include the images
    facts = _facts(policy, runs, rates, summary["seconds"])
    html_report.write_html(
        out / "report.html",
        f"Light-WAM JAX · {config.name}",
        _headline(rates["trained"], setup),
        facts,
        sections,
        manifest,
    )
    several = len(setup.tasks) > 1
    return {
        name: by_task[name] | by_group[name] | ({"all": rates[name]} if several else {})
        for name in runs
    }


def manifest_of(policy, setup=None):
    """Returns the `report.manifest` of a policy here and now, on a `suites.Setup` if there is one.

    With a setup it starts an environment, to have it described.
    """
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    environment = rollout.describe(setup.env, setup.episodes[0]) if setup else None
    return report.manifest(
        policy.config,
        policy.step,
        _hash(policy),
        device,
        setup,
        environment,
        report.gpu_driver(jax.default_backend()),
    )


def _hash(policy):
    return report.weights_hash(sorted(params.flatten(jax.device_get(policy.params)).items()))


def draw_future(policy, directory, episodes):
    """Imagines from moments of the episodes and compares with what was recorded.

    Writes into `directory`, of three windows: future.png, frame by frame, and future.mp4, imagined
    beside real; of up to 32: psnr.png, ssim.png and future.json, the means per offset.
    """
    span = policy.config.data.num_frames
    windows = [
        (episode, int(share * max(0, episode.length - span)))
        for share in (0.2, 0.5, 0.8, 0.0, 1.0, 0.35, 0.65)
        for episode in episodes
    ][:32]
    result = draw.future(policy, windows)
    shown = sorted({min(k * (len(episodes) + 1), len(windows) - 1) for k in range(3)})
    draw.save_png(directory / "future.png", draw.future_grid(result, shown))
    draw.save_mp4(directory / "future.mp4", draw.future_video(result, shown), fps=4)
    labels = {"codec": "codec limit", "predicted": "imagined", "still": "first frame repeated"}
    later = result["valid"].any(axis=0)  # the offsets that any window reaches ...
    later[0] = False  # ... of which frame 0 is given
    numbers = {
        "windows": result["valid"][:, later].sum(axis=0).tolist(),
        "offsets": result["offsets"][later].tolist(),
    }
    for kind, title in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        means = {
            name: np.ma.masked_array(each, ~result["valid"])[:, later].mean(axis=0)
            for name, each in result[kind].items()
        }
        numbers[kind] = {name: mean.tolist() for name, mean in means.items()}
        series = {labels[name]: (result["offsets"][later], means[name]) for name in labels}
        report.curve_chart(
            directory / f"{kind}.png",
            series,
            f"{title} (mean of {len(windows)} windows)",
            xlabel="steps ahead",
            width=9.4,
        )
    (directory / "future.json").write_text(json.dumps(numbers, indent=2) + "\n")


def choose(records, count):
    """Picks episodes to show: solved ones of different instructions first, then failures.

    At most a quarter of `count` are failures (at least one, if there is any), unless there are too
    few solved ones.
    """
    solved, failed = ([r for r in records if r.success is wanted] for wanted in (True, False))
    first = list({r.prompt: r for r in reversed(solved)}.values())[::-1]
    solved = first + [r for r in solved if r not in first]
    failures = min(len(failed), max(1, count // 4))
    chosen = solved[: max(1, count - failures)]
    return chosen + failed[: max(1, count) - len(chosen)]


def _sections(policy, workdir, directory, setup, runs, rates):
    """Draws everything and returns the report's sections."""
    config, env = policy.config, setup.env
    replan_steps, every = config.evaluation.replan_steps, max(1, round(setup.fps / VIDEO_FPS))

    shown = choose(runs["trained"], config.evaluation.videos)
    videos = rollout.replay(env, shown, every, VIDEO_SIZE, replan_steps)
    fps = round(setup.fps / every)
    videos = [_video(directory, config, fps, *each) for each in zip(shown, videos)]
    size = next(iter(videos[0]["observations"][0]["images"].values())).shape[0]
    strip = f"{setup.suite}.png"
    draw.save_png(directory / strip, draw.episode_strip(policy, shown[0], videos[0]))
    labels = {
        "trained": "trained policy",
        "untrained": "untrained policy",
        "expert": "scripted expert",
    }
    report.success_chart(directory / "success.png", {labels[name]: rates[name] for name in rates})
    looks = _attention_section(policy, directory, videos[:3])

    imagined = [record for record in runs.get("expert", ()) if record.error is None][:6]
    acted = "the expert" if imagined else "the trained policy"
    imagined = imagined or choose(runs["trained"], 6)
    longest = max(record.steps for record in imagined)
    replays = rollout.replay(env, imagined, longest, size, replan_steps=1)
    draw_future(policy, directory, [_as_episode(*each) for each in zip(imagined, replays)])

    def wide(*names):
        return tuple(html_report.Media(directory / name, wide=True) for name in names)

    return [
        html_report.Section(
            "How often it succeeds",
            f"{_same_episodes(setup)} The untrained policy is the same network with fresh random "
            "parameters. In brackets: 95 % Wilson intervals.",
            wide("success.png"),
            _task_table(runs, setup.groups) if len(setup.tasks) > 1 else (),
            whole=len(setup.tasks) <= _WHOLE,
        ),
        html_report.Section(
            "Watch it",
            f"The cameras in real time, rendered again for this page; the policy sees "
            f"{size} x {size} pixels of each and plans anew every {replan_steps} steps.",
            tuple(videos),
        ),
        html_report.Section(
            "One episode, and where the policy looked" if looks else "One episode",
            "Learned queries read the states of the video backbone. Bright is where those of the "
            "last adapter layer attended when the plan being executed was made."
            if looks
            else "This policy pools without learned queries: there is no attention to draw.",
            wide(strip),
        ),
        *looks,
        html_report.Section(
            "What it imagines",
            "From the first frame and the instruction the same backbone predicts video. Above it: "
            f"what happened when {acted} acted in these episodes, at the resolution of "
            "the video loss, and the most that the latent codec can show of it. Below each frame: "
            "PSNR and SSIM against what happened.",
            wide("future.png", "future.mp4", "psnr.png", "ssim.png"),
        ),
        html_report.Section("How it learned", "", _curves(workdir, directory)),
        html_report.Section("Every episode", "", table=_table(runs)),
    ]


def _same_episodes(setup):
    """Says who was run on which episodes."""
    known, tasks = len(setup.expert_tasks), len(setup.tasks)
    if not known:
        return "The same episodes for both. No task evaluated here has a scripted expert."
    if known < tasks:
        return (
            f"The same episodes for both policies. There is a scripted expert for {known} of "
            f"the {tasks} tasks, and its rate is over those alone."
        )
    return "The same episodes for all three."


def _attention_section(policy, directory, videos):
    """[the section], or [] for a policy that pools without queries."""
    if policy.config.model.pooling != "learned_query":
        return []
    seen = [video["observations"][len(video["observations"]) // 3] for video in videos]
    draw.save_png(directory / "attention.png", draw.attention_grid(policy, seen))
    return [
        html_report.Section(
            "Query attention, layer by layer",
            "Attention of the learned queries, weighted by their importance. Each layer has one "
            "scale for both cameras, so that their brightness compares; what gets less than "
            "average turns grey.",
            (html_report.Media(directory / "attention.png", wide=True),),
        )
    ]


def _video(directory, config, fps, record, video):
    path = directory / f"episode_{record.episode.key.replace('/', '_')}.mp4"
    frames = draw.side_by_side(video["frames"], config.data.cameras)
    draw.save_mp4(path, frames, fps)
    return html_report.Media(
        path,
        f"“{record.prompt}” · {record.steps} steps · {record.episode.key}",
        "solved" if record.success else "not solved",
    )


def _as_episode(record, video):
    """A replayed episode with an observation at every step, as data."""
    seen = video["observations"]
    images = {c: np.stack([o["images"][c] for o in seen]) for c in seen[0]["images"]}
    return episodes_lib.ArrayEpisode(
        id=record.episode.key,
        fps=0.0,
        task=record.prompt,
        images=images,
        state=np.stack([o["state"] for o in seen]),
        action=record.actions,
    )


def _curves(workdir, directory):
    """Draws the learning curves and returns their media."""
    series = metrics.read_series(workdir / "metrics.jsonl")
    names = {"total": "loss", "video": "loss_video", "action": "loss_action"}
    losses = {label: series[f"train/{name}"] for label, name in names.items()}
    report.curve_chart(directory / "loss.png", losses, "training loss", log=True)
    media = [html_report.Media(directory / "loss.png", "Mean of each log window.")]
    errors = {
        f"dimension {name.rsplit('/', 1)[1]}": values
        for name, values in series.items()
        if name.startswith("eval/l1/")
    }
    if errors:
        report.curve_chart(directory / "validation.png", errors, "action L1, normalised")
        media.append(
            html_report.Media(
                directory / "validation.png", "Open-loop error on held-out demonstrations."
            )
        )
    return tuple(media)


def _headline(rate, setup):
    low, high = (100 * bound for bound in rate.interval)
    errors = f" {rate.errors} more could not be run." if rate.errors else ""
    unseen = "" if setup.demonstrated is None else ", none of which was demonstrated"
    return f"{100 * rate.value:.0f} %", (
        f"of {rate.episodes} episodes solved from camera images and an instruction{unseen} "
        f"(95 % interval {low:.0f} to {high:.0f} %).{errors}"
    )


def _facts(policy, runs, rates, seconds):
    steps = [r.steps for r in runs["trained"] if r.success]
    minutes, rest = divmod(round(seconds), 60)
    same = (
        "same episodes"
        if len(runs.get("expert", ())) == len(runs["trained"])
        else ("episodes of its tasks")
    )
    expert = (
        [(f"{100 * rates['expert'].value:.0f} %", f"scripted expert, {same}")]
        if "expert" in rates
        else []
    )
    return [
        (f"{100 * rates['untrained'].value:.0f} %", "untrained policy, same episodes"),
        *expert,
        (f"{np.mean(steps):.0f}" if steps else "none", "steps per solved episode"),
        (f"{params.count(policy.params) / 1e6:.2f} M", "parameters"),
        (f"{policy.step:,}", "training steps"),
        (f"{minutes} min {rest:02d} s", "from start to this report"),
    ]


def _task_table(runs, groups):
    rates = {
        name: report.by_group(records, groups) | report.by_task(records)
        for name, records in runs.items()
    }
    rows = [
        (
            task,
            *(
                report.brief(rates[name][task]) if task in rates[name] else "no expert"
                for name in runs
            ),
        )
        for task in rates["trained"]
    ]
    return (("task", *runs), *rows)


def _table(runs):
    names = {True: "solved", False: "not solved", None: "could not run"}
    experts = {record.episode: record for record in runs.get("expert", ())}
    rows = []
    for trained, untrained in zip(runs["trained"], runs["untrained"]):
        row = [
            trained.episode.key,
            trained.prompt or untrained.prompt,
            names[trained.success],
            trained.steps,
            names[untrained.success],
        ]
        if experts:
            expert = experts.get(trained.episode)
            row += [names[expert.success], expert.steps] if expert else ["no expert", ""]
        rows.append(row)
    head = ("episode", "instruction", "trained", "steps", "untrained")
    return ((*head, "expert", "steps") if experts else head, *rows)
