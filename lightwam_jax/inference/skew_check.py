"""The skew check itself: windows to a server and back, compared stage by stage."""

import asyncio
import dataclasses

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import normalize
from lightwam_jax.inference import keys as keys_lib
from lightwam_jax.inference import observations, skew_causes, skew_stages, skew_windows, wire
from lightwam_jax.inference import service as service_lib
from lightwam_jax.inference import serving_options as options_lib


@dataclasses.dataclass
class Result:
    """What a check found.

    Attributes:
      stages: `skew_stages.Stage`s. causes: `skew_causes.Cause`s. notes: further sentences.
      what: is compared: "windows". where: the server is. recomputed: a sentence, which stages are
        not the server's own. about: plain values: server and checkpoint.
      planned: f32 [N,T,A], normalised, what training's form plans.
      canvases: (names, training's, the server's), for `skew_report.write`.
    """

    stages: list
    causes: list
    notes: list
    what: str
    where: str
    recomputed: str = ""
    about: dict = dataclasses.field(default_factory=dict)
    canvases: tuple = ()
    planned: np.ndarray | None = None

    @property
    def verdict(self):
        """Of the worst stage."""
        return skew_stages.worst(stage.verdict for stage in self.stages)

    @property
    def first(self):
        """Name of the first stage that deviates; None."""
        names = [stage.name for stage in self.stages if stage.verdict != skew_stages.PASS]
        return names[0] if names else None


class InProcess:
    """A server without a socket: the same frames, key table, guard and batcher.

    Attributes:
      metadata: as a client gets it. service: `Service`.
    """

    def __init__(self, deployed, keys="auto", **options):
        """Args: deployed: `Policy` that acts. keys: of the table. options: of `Options`."""
        given = {"debug": True, "max_batch": 1, "request_timeout_s": 600.0} | options
        self.service = service_lib.Service(options_lib.Options(keys=keys, **given))
        self.service.start(deployed)
        self._session = service_lib.Session(self.service.rules)
        self._loop = asyncio.new_event_loop()
        self.metadata = self.service.described

    def infer(self, request):
        """Returns the reply to a request; raises `WireError` where it is refused."""
        frame = wire.encode(request)
        reply, _ = self._loop.run_until_complete(self.service.answer(frame, self._session))
        if isinstance(reply, str):
            raise wire.WireError.from_text(reply)
        return wire.decode(reply)

    def close(self):
        """Ends its threads."""
        self.service.close()
        self._loop.close()


def check(policy, run_config, server, count=64, where="in process", adapter=None, checksum=""):
    """Returns the `Result` of sending windows to a server.

    Args:
      policy: `Policy` of the run, not deployed. run_config: `Config` of the run.
      server: `InProcess` or `Client`: metadata and infer(request). count: windows.
      adapter: function (`Window`, request) -> request: what a robot does to it; default: nothing.
      checksum: of the run's checkpoint, as the server's metadata have it; "": unknown.

    Raises:
      ValueError: nothing is held out. WireError: the server refuses an observation.
    """
    windows = skew_windows.draw(run_config, policy, count)
    return check_windows(policy, windows, server, where, adapter, checksum)


def check_windows(policy, windows, server, where="in process", adapter=None, checksum=""):
    """Returns the `Result` of sending these `Window`s to a server; see `check`."""
    orientation = dict(zip(policy.config.data.cameras, policy.config.data.orientation))
    served, requests = [], []
    for window in windows:
        described, moment = server.metadata["keys"], window.moment()
        request = keys_lib.compose(described, *moment, orientation)
        request = adapter(window, request) if adapter else request
        requests.append(request)
        served.append(served_of(server.infer({**request, "stages": True})))
    return compare(policy, windows, requests, served, server.metadata, where, checksum)


def served_of(reply):
    """Returns the `Served` of a decoded reply."""
    guard = sum(reply.get("guard", {}).values())
    return skew_stages.Served(reply["actions"], guard, reply.get("stages", {}))


def compare(policy, windows, requests, served, metadata, where, checksum="", what="windows"):
    """Returns the `Result` of windows whose replies are known.

    Args:
      requests: that were sent, one per window. served: `Served`s. The others: see `check`.
    """
    deployed, recomputed = skew_windows.deployed_form(policy), ""
    if not all(each.stages for each in served):
        recomputed = (
            "The server did not tell its stages (start it with --debug): those before the actions "
            "were computed here, from the requests."
        )
        local = [stages_of(deployed, request, metadata) for request in requests]
        served = [each._replace(stages=stages) for each, stages in zip(served, local)]
    moments = [window.moment() for window in windows]
    trained = skew_windows.trained(policy, windows)
    stages = skew_stages.inputs(moments, trained, [each.stages for each in served])
    search = skew_causes.Search(policy, deployed, windows)
    for stage in stages:
        if stage.verdict != skew_stages.PASS:
            search.of_stage(stage.name, served)
    inputs_pass = skew_stages.worst(stage.verdict for stage in stages) == skew_stages.PASS
    unknown = search if inputs_pass and recomputed else None
    acted, causes, notes = compare_actions(
        policy, served, trained, moments, metadata, checksum, unknown, inputs_pass
    )
    names = [window.name for window in windows]
    canvases = names, trained.canvas, np.stack([each.stages["canvas"] for each in served])
    about_ = about(policy, metadata, checksum)
    about_["range of the actions, normalised"] = round(float(np.ptp(trained.normalised)), 3)
    found = search.causes + causes
    return Result(
        stages + acted, found, notes, what, where, recomputed, about_, canvases, trained.normalised
    )


def compare_actions(policy, served, trained, moments, metadata, checksum, search, inputs_pass):
    """Returns (the stages of the actions, [`Cause`], notes).

    Args:
      search: `Search` where the server's inputs are not known; None. inputs_pass: whether all
        stages before pass.
    """
    dtype = metadata.get("dtype", policy.config.model.dtype)
    actions = np.stack([each.actions for each in served])
    stages = skew_stages.actions(policy, actions, trained, dtype)
    causes, notes, name = [], [], "actions physical"
    other = metadata.get("weights_hash", "")
    if checksum and other and other != checksum:
        said = f"another checkpoint: the server's is {other}, this one {checksum}"
        causes.append(skew_causes.Cause(name, said, 1.0))
    if skew_stages.worst(stage.verdict for stage in stages) == skew_stages.PASS or not inputs_pass:
        return stages, causes, notes
    scale = np.abs(policy.assets.action.scale) / 2
    limit = skew_stages.ACTIONS[dtype][0]
    if skew_causes.of_guard(metadata, served, trained, moments, scale, limit):
        changed = sum(each.guard for each in served)
        said = f"the server's guard changed {changed} values; without it they are training's"
        causes.append(skew_causes.Cause(name, said, 1.0))
        soften = lambda stage: stage._replace(
            verdict=min(stage.verdict, skew_stages.REPORT, key=_mild)
        )
        return [soften(stage) for stage in stages], causes, notes
    width = actions.shape[-1]
    words = skew_causes.lines(
        trained.physical.reshape(-1, width), actions.reshape(-1, width), "action"
    )
    if words:
        said = f"other statistics or units of the actions: {words}"
        causes.append(skew_causes.Cause(name, said, 1.0))
    elif search is not None:
        search.of_actions(served, trained)
    if not causes and not (search and search.causes):
        notes.append(
            "no known mistake explains the actions: compare the server's checkpoint, its --dtype, "
            "and the versions of jax on both sides"
        )
    return stages, causes, notes


def _mild(verdict):
    return (skew_stages.PASS, skew_stages.REPORT, skew_stages.FAIL).index(verdict)


def stages_of(deployed, request, metadata):
    """Returns what a server's stages are for a request, computed here; see `Served`."""
    seen, _ = read_request(deployed, request, metadata)
    images = {camera: image[None] for camera, image in seen.images.items()}
    made = deployed.stages(images, seen.state[None], [seen.prompt])
    return seen._asdict() | {name: value[0] for name, value in made.items()}


def read_request(deployed, request, metadata):
    """Returns (`Observation` of a request as a server with these metadata reads it, warnings)."""
    data, width = deployed.config.data, config_lib.state_width(deployed.config)
    name = metadata.get("keys", {}).get("name", "auto")
    tables = keys_lib.choose(name, data.cameras, width, tuple(data.orientation))
    default = metadata.get("default_prompt", "")
    statistics, ends = deployed.assets.statistics, None
    if statistics:
        table = normalize.table_of(statistics, "state")
        ends = table["global_min"], table["global_max"]
    rules = observations.Rules(tables, data, width, ends, default, float_images=True, jpeg=True)
    reader = observations.Reader(rules)
    return reader.read(wire.decode(wire.encode(request))), reader.warnings


def about(policy, metadata, checksum):
    """Returns what a report says of server and checkpoint: plain values."""
    names = ("config", "step", "weights_hash", "dtype", "guard", "batching", "server_version")
    return {
        "server": {name: metadata[name] for name in names if name in metadata},
        "here": {
            "config": policy.config.name,
            "step": policy.step,
            "weights_hash": checksum,
            "dtype": policy.config.model.dtype,
        },
    }
