"""From a request's frame to the reply's: what one policy server does, without sockets.

service = Service(options)
service.start(policy)          # compiles, measures; then `metadata` is there
reply = await service.answer(frame, session)
"""

import asyncio
import collections
import dataclasses
import heapq
import math
import time
import traceback
import typing

import numpy as np

from lightwam_jax import config as config_lib
from lightwam_jax.data import cameras as cameras_lib
from lightwam_jax.data import normalize
from lightwam_jax.inference import batching, latency, observations, wire
from lightwam_jax.inference import keys as keys_lib
from lightwam_jax.inference import serving_metadata as metadata_lib
from lightwam_jax.inference import serving_metrics as metrics_lib
from lightwam_jax.inference import serving_options as options_lib

_SMALL = 2**20  # bytes of a frame that are read in the event loop itself
_NEAREST = 5  # known prompts that a refusal lists
_MEASURED, _MEASURED_S = 20, 2.0  # calls at the start, and seconds after which they are enough


class Answered(typing.NamedTuple):
    """What a listener hears of each request.

    Attributes:
      session: number. code: "ok" or of `wire.CODES`; message: of the error.
      observation: `Observation`; `policy.canvas` of its images is what the policy saw. None where
        the request was not one.
      actions: f32 [T,A] as sent; None with an error. taps: see `Planned`.
      times: {"decode_ms", "queue_ms", "infer_ms", "total_ms"}, those that are known.
      frame, reply: bytes.
    """

    session: int
    code: str
    message: str
    observation: typing.Any
    actions: np.ndarray | None
    taps: dict
    times: dict
    frame: bytes
    reply: bytes


class Session:
    """What a service remembers of a connection."""

    _numbers = iter(range(1, 2**62))

    def __init__(self, rules):
        self.number, self.reader = next(self._numbers), observations.Reader(rules)
        self.codes, self.previous_ms = collections.Counter(), 0.0


class Service:
    """One policy and what stands around it.

    Attributes:
      options: `Options`. metrics: `Metrics`. listeners: functions of an `Answered`, called in the
        event loop: they must return at once and not raise.
      policy, rules, guard, batcher, metadata (bytes): after `start`.
    """

    def __init__(self, options):
        self.options, self.metrics, self.listeners = options, metrics_lib.Metrics(), []
        self.policy = self.metadata = self.batcher = None
        self.on_warning = lambda session, text: None

    # ---- start ---------------------------------------------------------------------------------

    def start(self, policy):
        """Compiles and measures, some seconds to minutes; may run in any thread.

        Raises:
          ValueError: options that do not fit the policy.
        """
        options, config = self.options, policy.config
        if options.taps and not hasattr(policy, "canvas"):
            raise ValueError("taps need a policy with a canvas")
        if options.taps and not config.model.attends:  # nothing to show: compile nothing for it
            options = self.options = dataclasses.replace(options, taps=False)
        width = config_lib.state_width(config)
        tables = keys_lib.choose(
            options.keys, config.data.cameras, width, tuple(config.data.orientation)
        )
        self.policy, self.guard = policy, options_lib.make_guard(policy, options)
        self.fps = options_lib.control_rate(policy, options)
        self.rules = observations.Rules(
            tables,
            config.data,
            width,
            _state_range(policy),
            options.default_prompt,
            options.float_images,
            options.jpeg,
            options.frozen,
        )
        self._compile()
        self._worker = batching.Worker()
        self.batcher = batching.Batcher(
            policy, options.max_batch, options.exact, options.max_wait_ms / 1e3, taps=options.taps
        )
        measured = self._measure()
        self._traces = policy.traces
        described = metadata_lib.describe(policy, options, self.rules, self.guard, measured)
        self.described = described
        self.metadata = wire.encode(described)
        names = ("config", "step", "weights_hash")
        info = {name: described.get(name, "") for name in names}
        self.metrics.put("info", 1, **info)

    def _compile(self):
        options, policy = self.options, self.policy
        self._prompt = next(iter(policy.known_prompts), latency.PROMPT)
        policy.warm_up(options_lib.batch_sizes(options), prompt=self._prompt, taps=options.taps)
        self._sizes = {latency_sizes(policy.config)}
        for size in options.image_sizes:
            self._add_sizes((tuple(size),) * len(policy.config.data.cameras))
        self._first_sizes, self._tried_sizes = set(self._sizes), set()
        self.metrics.put("compilations_total", 0, what="image_size")

    def _add_sizes(self, sizes):
        if sizes not in self._sizes:
            named = dict(zip(self.policy.config.data.cameras, sizes))
            self.policy.warm_up_images(named, options_lib.batch_sizes(self.options))
            self._sizes.add(sizes)
            self.metrics.count("compilations_total", what="image_size")

    def _measure(self):
        """Seconds of each of some calls with one observation, as the first robot will find it."""
        config, taken = self.policy.config, []
        height_width = latency_sizes(config)
        state = np.zeros(config_lib.state_width(config), np.float32)
        images = {
            camera: np.zeros((*size, 3), np.uint8)
            for camera, size in zip(config.data.cameras, height_width)
        }
        observation = batching.Observation(images, state, self._prompt)
        while len(taken) < _MEASURED and sum(taken) < _MEASURED_S:
            taken.append(self.batcher.submit(observation).result().infer_s)
        return taken

    def close(self):
        """Ends the threads; what is being computed is waited for a second."""
        if self.batcher is not None:
            self.batcher.close(timeout=1)
            self._worker.close()

    # ---- a request -----------------------------------------------------------------------------

    async def answer(self, frame, session):
        """Returns (reply: bytes, or str for an error, fault: whether it is the server's).

        Args:
          frame: bytes, or str of a text message. session: `Session`.
        """
        began, known = time.monotonic(), {"times": {}}
        self.metrics.count("bytes_total", len(frame), direction="in")
        try:
            async with asyncio.timeout(self.options.request_timeout_s):
                reply = await self._plan(frame, session, began, known)
            code, message, fault = "ok", "", False
        except wire.WireError as error:
            code, message, fault = error.code, error.message, error.code == "internal"
        except TimeoutError:
            code, fault = "timeout", False
            message = f"no plan within {self.options.request_timeout_s:g} s; ask again"
        except Exception as error:  # of the policy or of ours: this connection ends, others go on
            code, fault = "internal", True
            message = f"{type(error).__name__} in the server; its log says more"
            self.on_warning(session, traceback.format_exc())
            if self.options.debug:
                message += "\n" + traceback.format_exc()
        if code != "ok":
            reply = f"{code}: {message}"
            known |= {"actions": None, "taps": {}}
        self._account(session, code, message, frame, reply, began, known)
        return reply, fault

    async def _plan(self, frame, session, began, known):
        observation, optional = await self._read(frame, session)
        known["observation"] = observation
        decoded = time.monotonic()
        known["times"]["decode_ms"] = 1e3 * (decoded - began)
        self.metrics.observe("decode_seconds", decoded - began)
        expires = began + self._patience(optional)
        _check_age(expires)
        await self._prepare(observation)
        try:
            future = self.batcher.submit(observation, session.number, expires)
        except batching.Overloaded as error:
            wait = math.ceil(1e3 * self._recent_s()) or 1
            raise wire.WireError("overloaded", f"{error}; ask again; retry_ms={wait}") from None
        try:
            planned = await asyncio.wrap_future(future)
        except batching.Expired as error:
            raise wire.WireError("stale", f"the observation is {error}; ask anew") from None
        known["taps"] = planned.taps
        known["times"] |= {"queue_ms": 1e3 * planned.queue_s, "infer_ms": 1e3 * planned.infer_s}
        for name, value in (
            ("queue_seconds", planned.queue_s),
            ("infer_seconds", planned.infer_s),
            ("batch_size", planned.batch),
        ):
            self.metrics.observe(name, value)
        _check_age(expires)
        actions, changed = self.guard.check(planned.actions, observation.state)
        known["actions"] = actions
        for kind, counts in changed.items():
            for dim in np.flatnonzero(counts):
                self.metrics.count("guard_total", int(counts[dim]), kind=kind, dim=int(dim))
        timing = {
            "infer_ms": 1e3 * planned.infer_s,
            "prev_total_ms": session.previous_ms,
            "queue_ms": 1e3 * planned.queue_s,
            "batch": planned.batch,
        }
        # No array but actions: openpi's ActionChunkBroker slices every array of a reply.
        reply = {"actions": actions, "server_timing": timing}
        reply |= {key: optional[key] for key in ("step", "request_id") if key in optional}
        reply["guard"] = {kind: int(counts.sum()) for kind, counts in changed.items()}
        if self.options.debug and optional.get("stages"):
            reply["stages"] = await self._worker.run(self._stages, observation, planned.actions)
        return wire.encode(reply)

    def _stages(self, observation, planned):
        """What came through the wire, and what it became on its way to the model; rows of one."""
        images = {camera: image[None] for camera, image in observation.images.items()}
        made = self.policy.stages(images, observation.state[None], [observation.prompt])
        came = {"images": observation.images, "state": observation.state}
        came |= {"prompt": observation.prompt, "planned": planned}
        return came | {name: value[0] for name, value in made.items()}

    async def _read(self, frame, session):
        limits = wire.Limits(frame=self.options.max_frame)

        def read():
            request = wire.decode(frame, limits)
            optional = _optional(request)
            return session.reader.read(request), optional

        # A large frame, or a JPEG, would keep the event loop from the others.
        aside = len(frame) > _SMALL or self.options.jpeg
        warnings, extra = len(session.reader.warnings), session.reader.extra
        try:
            return await asyncio.to_thread(read) if aside else read()
        finally:
            for text in session.reader.warnings[warnings:]:
                self.metrics.count("warnings_total")
                self.on_warning(session, text)
            if session.reader.extra > extra:
                self.metrics.count("extra_keys_total", session.reader.extra - extra)

    async def _prepare(self, observation):
        """What would otherwise keep the device thread from others: a new prompt, a new size."""
        policy = self.policy
        if not policy.known_prompt(observation.prompt):
            if self.options.new_prompts == "refuse":
                raise self._unknown_prompt(observation.prompt, "new prompts are refused")
            try:
                await self._worker.run(self._add_prompt, observation.prompt)
            except (FileNotFoundError, ValueError) as error:
                raise self._unknown_prompt(observation.prompt, str(error)) from None
        if observation.sizes not in self._sizes:
            # What fails, or is given up by its client, must not use up the others' sizes.
            new = (self._sizes - self._first_sizes) | self._tried_sizes
            if len(new | {observation.sizes}) > self.options.max_new_sizes:
                raise wire.WireError(
                    "bad_image",
                    f"images of {observation.sizes}: {len(new)} new sizes came before, "
                    f"and each costs a compilation; send one of {sorted(self._sizes)}",
                )
            self._tried_sizes.add(observation.sizes)
            try:
                await self._worker.run(self._add_sizes, observation.sizes)
            finally:
                self._tried_sizes.discard(observation.sizes)

    def _add_prompt(self, prompt):
        if not self.policy.known_prompt(prompt):
            self.policy.add_prompt(prompt)
            self.metrics.count("prompts_encoded_total")

    def _unknown_prompt(self, prompt, why):
        words = set(prompt.split())  # edits take long, so only of those that share most words
        alike = heapq.nlargest(
            4 * _NEAREST, self.policy.known_prompts, key=lambda text: len(words & set(text.split()))
        )
        near = keys_lib.nearest(prompt, alike, _NEAREST)
        hint = f"; the nearest known ones: {', '.join(map(repr, near))}" if near else ""
        return wire.WireError("bad_prompt", f"prompt {prompt[:200]!r}: {why}{hint}")

    def _patience(self, optional):
        """Seconds from now that the plan of an observation is worth having."""
        options, data = self.options, self.policy.config.data
        most = options.max_age_ms / 1e3
        if not most:
            most = 2 * data.action_horizon / self.fps if self.fps else math.inf
        patience = most - optional.get("age_ms", 0) / 1e3
        return min(patience, optional.get("deadline_ms", math.inf) / 1e3)

    def _recent_s(self):
        return self.metrics.percentiles().get("p50_ms", 100) / 1e3

    def _account(self, session, code, message, frame, reply, began, known):
        total = time.monotonic() - began
        session.previous_ms = known["times"]["total_ms"] = 1e3 * total
        session.codes[code] += 1
        self.metrics.count("requests_total", code=code)
        self.metrics.count("bytes_total", len(reply), direction="out")
        if code == "ok":
            self.metrics.observe("request_seconds", total)
            self.metrics.replied()
        if code == "stale":
            self.metrics.count("stale_total")
        if self.listeners:
            observation = known.get("observation")
            event = Answered(
                session.number, code, message, observation, known.get("actions"),
                known.get("taps", {}), known["times"], frame, reply,
            )  # fmt: skip
            for listener in self.listeners:
                listener(event)

    def metrics_text(self, sessions, ready):
        """Returns the page of /metrics."""
        self.metrics.put("sessions", sessions)
        self.metrics.put("ready", int(ready))
        self.metrics.put("queue_depth", self.batcher.depth if self.batcher else 0)
        if ready:
            compiled = self.policy.traces - self._traces
            self.metrics.put("compilations_total", compiled, what="action")
        return self.metrics.text()


def latency_sizes(config):
    """Returns ((height, width) of each camera): what `Policy.warm_up` compiles by default."""
    sizes = cameras_lib.given_sizes(config.data)
    return tuple(sizes[camera] for camera in config.data.cameras)


def _state_range(policy):
    if not policy.assets.statistics:
        return None
    table = normalize.table_of(policy.assets.statistics, "state")
    return table["global_min"], table["global_max"]


def _check_age(expires):
    if time.monotonic() > expires:
        raise wire.WireError(
            "stale", "the observation is older than max_age_ms or deadline_ms allow; ask anew"
        )


def _optional(request):
    """The optional keys of a request, as plain values."""
    found = {}
    for key in keys_lib.OPTIONAL:
        value = request.get(key)
        value = value.item() if isinstance(value, np.generic) else value
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == "stages":
            fits = isinstance(value, bool)
        elif key == "request_id":
            fits = number or (isinstance(value, str) and len(value) <= 200)
        else:
            fits = number and math.isfinite(value) and value >= 0
        if not fits:
            wanted = {"request_id": "text or a number", "stages": "true or false"}
            wanted = wanted.get(key, "a number of at least 0")
            raise wire.WireError("bad_key", f"{key} is {value!r:.40}; send {wanted}")
        found[key] = value
    return found
