"""Closed-loop evaluation: trained policy, untrained policy and expert on the same episodes.

Not every task has a scripted expert. Where none has, there are only the two policies. A language
control (`instructions.py`) is run by the trained policy alone: the others are told nothing.
"""

import json
import time

import jax
import numpy as np

from lightwam_jax import html_report
from lightwam_jax.data import episodes as episodes_lib
from lightwam_jax.evaluation import (
    draw,
    imagined,
    instructions,
    libero_published,
    report,
    rollout,
    side_by_side,
    tables,
)
from lightwam_jax.evaluation import suites as suites_lib
from lightwam_jax.training import metrics

VIDEO_SIZE = 192  # edge of a camera, pixels
CONTROL_VIDEOS = 4  # at most, of a language control: its failures take minutes to draw
VIDEO_FPS = 20  # at most; videos are in real time
_WHOLE = 60  # tasks; a longer table scrolls


def evaluate(policy, suite, workdir, out, began, remote=None, instruction="right"):
    """Evaluates; writes `<out>/summary.json`, `report.html` and, in `report/`, logs and images.

    For LIBERO also `summary_libero_*.json`, see `libero_published.py`. An evaluation that was
    interrupted continues where it was: the logs hold its episodes.

    Args:
      policy: `Policy` trained for the suite. suite: of `envs.SUITES`.
      workdir: pathlib.Path of the run. out: that of the results.
      began: unix time at which the pipeline began.
      remote: `remote.RemotePolicy` that acts as the trained policy; None: the policy itself. What
        a server does not give (imagined video, attention, the untrained policy) is still made here.
      instruction: of `instructions.CONTROLS`. Results of another one than "right" go into a
        directory of their own in `out`.

    Returns:
      {"trained", "untrained", "expert": {task: `report.Rate`}}. The expert has only its own tasks,
      and is left out if it has none; of a control there is only "trained". Where there are several
      tasks, the rates of groups of them (suites, say) follow, and that of all of them as "all".

    Raises:
      ValueError: a policy of another suite, seeds that were demonstrated, logs of another
        evaluation, or an instruction that cannot be given.
      RuntimeError: no episode could be run.
    """
    suite_run = suites_lib.of_policy(policy, suite, instruction)
    base, out = out, instructions.directory(out, instruction)
    (directory := out / "report").mkdir(parents=True, exist_ok=True)
    results, manifest = _run_all(policy, suite_run, directory, remote)
    published = libero_published.published(results["trained"], manifest)
    libero_published.write_summaries(out, results["trained"], manifest, workdir)
    rates = {who: report.rate(played) for who, played in results.items()}
    times = report.mean_times(results["trained"])
    found = dict(manifest=manifest, published=published, times=times)
    found["tasks"] = {who: report.by_task(played) for who, played in results.items()}
    found["groups"] = {
        who: report.by_group(played, suite_run.groups) for who, played in results.items()
    }
    totals = {"untrained": None, "expert": None, **rates}
    summarize = lambda: report.write_summary(
        out / "summary.json", seconds=time.time() - began, **totals, **found
    )
    summarize()  # so that no image can cost the numbers

    sections = _sections(policy, workdir, directory, suite_run, results, rates)
    sections[1:1] = [
        *side_by_side.sections(base, out, directory),
        *_published_section(published),
    ]
    html_report.write_html(
        out / "report.html",
        f"Light-WAM JAX · {policy.config.name}",
        tables.headline(rates["trained"], suite_run),
        # Summarised again: the seconds include the images.
        tables.facts(policy, results, rates, summarize()["seconds"], manifest.get("remote")),
        sections,
        manifest,
    )
    every = {who: {"all": r} if len(suite_run.tasks) > 1 else {} for who, r in rates.items()}
    return {who: found["tasks"][who] | found["groups"][who] | every[who] for who in results}


def manifest_of(policy, suite_run=None):
    """Returns the `report.manifest` of a policy here and now.

    With a `suites.SuiteRun` it starts an environment, to have it described.
    """
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    driver = report.gpu_driver(jax.default_backend())
    environment = rollout.describe(suite_run.played, suite_run.episodes[0]) if suite_run else None
    return report.manifest(
        policy.config, policy.step, _hash(policy), device, suite_run, environment, driver
    )


def _hash(policy):
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(policy.params))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}
    return report.weights_hash(sorted(named.items()))


def _run_all(policy, suite_run, directory, remote):
    """Returns {"trained", "untrained" and, if there is one, "expert": [`EpisodeResult`]}, manifest.

    Of a language control only "trained".
    """
    if remote is not None and suite_run.instruction == "empty":
        raise ValueError(
            "--instruction empty: a policy server refuses requests without an instruction; "
            "evaluate it without --server"
        )
    manifest = manifest_of(policy, suite_run)
    if remote is not None:
        manifest["remote"] = remote.describe()
    e, env, results = policy.config.evaluation, suite_run.played, {}
    trained, control = policy.deployed(), suite_run.instruction != "right"
    trained.warm_up([e.batch])
    actors = {"trained": (trained, manifest["weights"])}
    if not control:
        untrained = trained.untrained(policy.config.seed)
        actors["untrained"] = untrained, _hash(untrained)
    for who, (actor, weights) in actors.items():
        log, decisive = directory / f"{who}.jsonl", report.log_manifest(manifest, weights)
        act = actor.act
        if remote is not None and who == "trained":
            act, decisive = remote.act, decisive | {"remote": remote.decisive()}
        results[who] = rollout.run(act, env, suite_run.episodes, e, log, decisive, who)
    if suite_run.expert_tasks and not control:
        known = [
            episode for episode in suite_run.episodes if episode.task in suite_run.expert_tasks
        ]
        log, decisive = directory / "expert.jsonl", report.log_manifest(manifest, "expert")
        results["expert"] = rollout.run(None, env, known, e, log, decisive, "expert")
    if remote is not None:
        manifest["remote"]["guard_changed"] = dict(remote.guarded)
    return results, manifest


# ---- sections of the page ------------------------------------------------------------------------


def _sections(policy, workdir, directory, suite_run, results, rates):
    """Draws everything and returns the report's sections."""
    e, fps = policy.config.evaluation, suite_run.fps
    every = max(1, round(fps / VIDEO_FPS))
    most = e.videos if suite_run.instruction == "right" else min(e.videos, CONTROL_VIDEOS)
    shown = tables.choose(results["trained"], most)
    videos = rollout.replay(suite_run.played, shown, every, VIDEO_SIZE, e.replan_steps)
    size = next(iter(videos[0]["observations"][0]["images"].values())).shape[0]
    return [
        _success_section(directory, suite_run, results, rates),
        html_report.Section(
            "Watch it",
            "The cameras in real time, rendered again for this page. The policy sees "
            f"{size} x {size} pixels of each and plans anew every {e.replan_steps} steps.",
            tuple(
                _video(directory, policy.config, round(fps / every), *each)
                for each in zip(shown, videos)
            ),
        ),
        *_episode_sections(policy, directory, suite_run.suite, shown[0], videos),
        _imagined_section(policy, directory, suite_run.played, results, size),
        *_learning_section(workdir, directory),
        html_report.Section("Every episode", "", table=tables.episodes(results)),
    ]


def _success_section(directory, suite_run, results, rates):
    labels = dict(trained="trained policy", untrained="untrained policy", expert="scripted expert")
    report.success_chart(directory / "success.png", {labels[who]: rates[who] for who in rates})
    known, tasks = len(suite_run.expert_tasks), len(suite_run.tasks)
    fresh = "The untrained policy is the same network with fresh random parameters. "
    if "untrained" not in results:
        told = instructions.LABELS[suite_run.instruction]
        same, fresh = f"A control: in every episode the policy is given {told}.", ""
    elif not known:
        same = "The same episodes for both. No task evaluated here has a scripted expert."
    elif known < tasks:
        same = (
            f"The same episodes for both policies. There is a scripted expert for {known} of the "
            f"{tasks} tasks, and its rate is over those alone."
        )
    else:
        same = "The same episodes for all three."
    return html_report.Section(
        "How often it succeeds",
        f"{same} {fresh}In brackets: 95 % Wilson intervals.",
        _wide(directory / "success.png"),
        tables.tasks(results, suite_run.groups) if tasks > 1 else (),
        whole=tasks <= _WHOLE,
    )


def _published_section(published):
    """[the section], or [] where nothing was published of these tasks."""
    if not published:
        return []
    text = (
        "The authors published these numbers for the PyTorch Light-WAM, with a checkpoint of its "
        "own for each suite."
    )
    table = libero_published.table(published)
    return [html_report.Section("Beside the published numbers", text, table=table, whole=True)]


def _episode_sections(policy, directory, suite, result, videos):
    """One episode as a strip of images, then the attention in several of them.

    A policy without learned queries has no attention to draw, and no second section.
    """
    strip = directory / f"{suite}.png"
    html_report.save_png(strip, draw.episode_strip(policy, result, videos[0]))
    if not policy.config.model.attends:
        text = "This policy reads without learned queries: there is no attention to draw."
        return [html_report.Section("One episode", text, _drawn(strip))]
    seen = [each["observations"][len(each["observations"]) // 3] for each in videos[:3]]
    html_report.save_png(directory / "attention.png", draw.attention_grid(policy, seen))
    return [
        html_report.Section(
            "One episode, and where the policy looked",
            "Learned queries read the states of the video backbone. The image is bright where the "
            "queries of the last adapter layer attended when the plan in execution was made.",
            _drawn(strip),
        ),
        html_report.Section(
            "Query attention, layer by layer",
            "Attention of the learned queries, weighted by their importance. Each layer has one "
            "scale for all cameras, so that brightness compares between them. What gets less "
            "attention than average turns grey.",
            _drawn(directory / "attention.png"),
        ),
    ]


def _imagined_section(policy, directory, env, results, size):
    """Imagined video beside what happened: in the expert's episodes, or the trained policy's."""
    episodes = [result for result in results.get("expert", ()) if result.error is None][:6]
    acted = "the expert" if episodes else "the trained policy"
    episodes = episodes or tables.choose(results["trained"], 6)
    longest = max(result.steps for result in episodes)
    replays = rollout.replay(env, episodes, longest, size, replan_steps=1)
    moments = [_as_episode(*each) for each in zip(episodes, replays)]
    numbers = draw_future(policy, directory, moments)
    return html_report.Section(
        "What it imagines",
        "The same backbone predicts video from the first frame and the instruction. Three rows "
        f"each: what happened when {acted} acted, at the resolution of the video loss; the most "
        "that the latent codec can show of it; and what the policy imagines. Below each frame: "
        "PSNR and SSIM against what happened.",
        imagined.media(directory, numbers),
    )


def _learning_section(workdir, directory):
    """[the section], or [] for a policy that was exported without its run's metrics."""
    if not (workdir / "metrics.jsonl").exists():
        return []
    return [html_report.Section("How it learned", "", _curves(workdir, directory))]


def _curves(workdir, directory):
    """Draws the learning curves and returns their media."""
    series = metrics.read_series(workdir / "metrics.jsonl")
    names = {"total": "loss", "video": "loss_video", "action": "loss_action"}
    losses = {label: series[f"train/{name}"] for label, name in names.items()}
    errors = {
        f"dimension {name.rsplit('/', 1)[1]}": values
        for name, values in series.items()
        if name.startswith("eval/l1/")
    }
    loss, validation = directory / "loss.png", directory / "validation.png"
    html_report.curve_chart(loss, losses, "training loss", log=True)
    media = (html_report.Media(loss, "Mean of each log window."),)
    if not errors:
        return media
    html_report.curve_chart(validation, errors, "action L1, normalised")
    return (*media, html_report.Media(validation, "Open-loop error on held-out demonstrations."))


def _drawn(path):
    return (html_report.Media(path, drawn=True),)


def _wide(*paths):
    return tuple(html_report.Media(path, wide=True) for path in paths)


def _video(directory, config, fps, result, video):
    path = directory / f"episode_{result.episode.key.replace('/', '_')}.mp4"
    draw.save_mp4(path, draw.side_by_side(video["frames"], config.data.cameras), fps)
    caption = f"“{result.prompt}” · {result.steps} steps · {result.episode.key}"
    return html_report.Media(path, caption, "solved" if result.success else "not solved")


def _as_episode(result, video):
    """A replayed episode with an observation at every step, as data."""
    seen = video["observations"]
    images = {c: np.stack([o["images"][c] for o in seen]) for c in seen[0]["images"]}
    state = np.stack([o["state"] for o in seen])
    return episodes_lib.ArrayEpisode(
        result.episode.key, 0.0, result.prompt, state, result.actions, images
    )


def draw_future(policy, directory, episodes):
    """Imagines from moments of the episodes and compares with what was recorded.

    Writes into `directory`, of three windows: future.png, frame by frame, and future.mp4, imagined
    beside real; of up to 32: psnr.png, ssim.png and future.json, the means per offset, which are
    also returned.
    """
    span = policy.config.data.num_frames
    windows = [
        (episode, int(share * max(0, episode.length - span)))
        for share in (0.2, 0.5, 0.8, 0.0, 1.0, 0.35, 0.65)
        for episode in episodes
    ][:32]
    result = draw.future(policy, windows)
    shown = sorted({min(k * (len(episodes) + 1), len(windows) - 1) for k in range(3)})
    html_report.save_png(directory / "future.png", draw.future_grid(result, shown))
    draw.save_mp4(directory / "future.mp4", draw.future_video(result, shown), fps=4)
    labels = {"codec": "codec limit", "predicted": "imagined", "still": "first frame repeated"}
    later = result["valid"].any(axis=0)  # the offsets that any window reaches ...
    later[0] = False  # ... of which frame 0 is given
    offsets = result["offsets"][later]
    numbers = {
        "lambda_video": policy.config.loss.lambda_video,
        "windows": result["valid"][:, later].sum(axis=0).tolist(),
        "offsets": offsets.tolist(),
        "nearer": {},
    }
    for kind, unit in (("psnr", "PSNR, dB"), ("ssim", "SSIM")):
        means = {
            name: np.ma.masked_array(each, ~result["valid"])[:, later].mean(axis=0)
            for name, each in result[kind].items()
        }
        numbers[kind] = {name: mean.tolist() for name, mean in means.items()}
        nearer = result[kind]["predicted"] > result[kind]["still"]
        numbers["nearer"][kind] = (nearer & result["valid"])[:, later].sum(axis=0).tolist()
        series = {labels[name]: (offsets, means[name]) for name in labels}
        title = f"{unit} (mean of {len(windows)} windows)"
        path = directory / f"{kind}.png"
        html_report.curve_chart(path, series, title, xlabel="steps ahead", width=9.4)
    (directory / "future.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return numbers
