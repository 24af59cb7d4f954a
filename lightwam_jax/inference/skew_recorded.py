"""The skew check on recorded traffic: what a robot sent, and what a server answered.

Where the robot replayed held-out episodes, each request is compared with its own window. Elsewhere
nobody knows what training would have seen: there, the replies are compared with what the training's
way makes of the same requests, and the pictures with those of the most similar held-out moments.
"""

import numpy as np

from lightwam_jax.data import loader
from lightwam_jax.data import windows as windows_lib
from lightwam_jax.inference import (
    recorder,
    skew_causes,
    skew_check,
    skew_stages,
    skew_windows,
    wire,
)

_REPLAYED = 1e-4  # largest difference of a normalised state to that of the window it replays
_LONGEST = 2**30  # bytes of a recorded reply


def check(policy, run_config, directory, count, checksum="", keys="auto"):
    """Returns the `skew_check.Result` of recorded traffic.

    Args:
      policy, run_config, checksum: see `skew_check.check`. directory: of the records.
      count: requests, spread evenly over those that were answered. keys: table of the server,
        where it kept no metadata.

    Raises:
      ValueError: no request there that was answered.
    """
    metadata = recorder.read_metadata(directory) or {"keys": {"name": keys}}
    total = sum(record["code"] == "ok" for record in recorder.read(directory))
    if not total:
        raise ValueError(f"{directory} holds no request that was answered with actions")
    chosen, deployed = set(windows_lib.spread(total, count)), skew_windows.deployed_form(policy)
    answered = (r for r in recorder.read(directory) if r["code"] == "ok")
    requests, served, seen, warnings = [], [], [], []
    for record in (r for i, r in enumerate(answered) if i in chosen):
        request = wire.decode(record["frame"])
        reply = wire.decode(record["reply"], wire.Limits(frame=_LONGEST))
        observation, said = skew_check.read_request(deployed, request, metadata)
        warnings += said
        requests.append(request)
        seen.append(skew_windows.Moment(*observation))
        served.append(skew_check.served_of(reply))
    where = f"recorded in {directory}"
    nearest, apart = _nearest(policy, run_config, seen)
    if np.median(apart) <= _REPLAYED:
        some = [i for i, distance in enumerate(apart) if distance <= _REPLAYED]
        pick = lambda values: [values[i] for i in some]
        result = skew_check.compare(
            policy, pick(nearest), pick(requests), pick(served), metadata, where, checksum,
            "replayed windows",
        )  # fmt: skip
    else:
        result = _of_others(policy, nearest, requests, seen, served, metadata, where, checksum)
    result.notes += sorted(set(warnings))
    return result


def _of_others(policy, nearest, requests, seen, served, metadata, where, checksum):
    """The `Result` of requests that replay no window."""
    deployed = skew_windows.deployed_form(policy)
    trained = skew_windows.recomputed(policy, seen)
    made = [skew_check.stages_of(deployed, request, metadata) for request in requests]
    stages = skew_stages.inputs(seen, trained, made)[1:]  # the raw frames are all that is known
    inputs_pass = skew_stages.worst(stage.verdict for stage in stages) == skew_stages.PASS
    acted, causes, notes = skew_check.compare_actions(
        policy, served, trained, seen, metadata, checksum, None, inputs_pass
    )
    search = skew_causes.Search(policy, deployed, nearest)
    search.of_looks([moment.images for moment in seen])
    notes.append(
        "These requests replay no held-out window: what the robot itself does to pictures and "
        "state shows only in how they look beside similar moments."
    )
    said = "Stages are of the same requests here, by the deployed form and by training's way."
    about = skew_check.about(policy, metadata, checksum)
    return skew_check.Result(
        stages + acted, search.causes + causes, notes, "recorded requests", where, said, about
    )


def _nearest(policy, run_config, moments):
    """([the held-out `Window` most similar in state, of its task where known], [N] how far)."""
    found = []
    for config, samples in loader.val_samples(run_config):
        if skew_windows.fits(config, policy):
            places, _ = windows_lib.open_windows(config, "val")
            found += [(config, samples, places, row) for row in range(len(places))]
    if not found:
        raise ValueError("no window is held out: there is nothing to compare with")
    states, tasks = [], []
    for _, _, places, row in found:
        episode, start = places.place(row)
        states.append(episode.state[start])
        tasks.append(" ".join(episode.task_at(start).split()))
    scale = policy.assets.state.normalize
    states, tasks = scale(np.asarray(states, np.float32)), np.array(tasks)
    windows, apart = [], []
    for moment in moments:
        distance = np.abs(states - scale(moment.state)).max(axis=1)
        known = tasks == moment.prompt
        if known.any():
            distance = np.where(known, distance, np.inf)
        best = int(distance.argmin())
        windows.append(skew_windows.window(*found[best]))
        apart.append(distance[best])
    return windows, np.array(apart)
