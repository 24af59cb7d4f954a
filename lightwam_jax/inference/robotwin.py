"""A policy for RoboTwin 2.0's evaluation: `get_model`, `eval` and `reset_model`, as it calls them.

In RoboTwin's checkout, `policy/LightWAM/__init__.py` says

    from lightwam_jax.inference.robotwin import eval, get_model, reset_model

The policy then runs inside RoboTwin's process. Or it runs in an environment of its own,

    python -m lightwam_jax.inference.robotwin --workdir runs/robotwin --port 9999

and RoboTwin, whose environment then needs numpy only, asks it over TCP: through the client of its
own script/eval_policy_client.py, or through `Client` where deploy_policy.yml gives a `port`.
A message is its length, 4 bytes big-endian, and JSON: {"cmd": name, "obs": value} is answered with
{"res": value}, or with {"error": text}. An array is {"__numpy_array__": true, "data": base64,
"dtype": name, "shape": [...]}.

Actions are the absolute joint targets of both arms, 14 numbers: six joints and a gripper, left
before right; images are as RoboTwin's cameras take them, and `config.data` makes the canvas.
"""

import base64
import json
import socket
import socketserver

import numpy as np

from lightwam_jax.inference import arrays, batching, chunking, safety

# Policies of RoboTwin name their cameras as its datasets do.
CAMERAS = {
    "cam_high": "head_camera",
    "cam_left_wrist": "left_camera",
    "cam_right_wrist": "right_camera",
}
JOINTS = 14


# ---- what RoboTwin calls -----------------------------------------------------------------------


def get_model(usr_args):
    """Returns the `Model` that deploy_policy.yml asks for, or the `Client` of one.

    Args:
      usr_args: dict of that file. `port` (and `host`, by default this machine) of a running
        server; or `workdir` of a run, and optionally `step`, `embodiment`, `max_batch` (of
        simulators that ask at once; default 1) and `replan_steps`, the actions to execute of each
        plan (default: config.evaluation.replan_steps).

    Raises:
      ValueError: neither, or a policy of other cameras or joints than RoboTwin's.
      ConnectionError: nobody answers at that port.
    """
    if "replan" in usr_args:
        raise ValueError("deploy_policy.yml has the key replan: since version 0.2.0, replan_steps")
    if usr_args.get("port"):
        return Client(usr_args.get("host") or "localhost", int(usr_args["port"]))
    if not usr_args.get("workdir"):
        raise ValueError(
            "deploy_policy.yml gives neither workdir (the run of a trained policy) nor port (of a "
            "policy server): add one of them"
        )
    from lightwam_jax.inference import serving_options
    from lightwam_jax.inference.policy import Policy  # and with it jax

    embodiment = usr_args.get("embodiment") or ""
    policy = Policy.load(
        usr_args["workdir"], usr_args.get("step"), deploy=True, embodiment=embodiment
    )
    replan_steps = usr_args.get("replan_steps") or policy.config.evaluation.replan_steps
    options = serving_options.Options(max_batch=int(usr_args.get("max_batch") or 1))
    guard = serving_options.make_guard(policy, options)
    model = Model(policy, int(replan_steps), guard, options.max_batch)
    policy.warm_up(serving_options.batch_sizes(options))
    return model


def eval(TASK_ENV, model, observation):
    """Executes one plan: `replan_steps` actions, fewer if the episode ends first.

    RoboTwin renders an observation before each call and none during it, so that only what the
    policy sees is rendered.

    Args:
      TASK_ENV: RoboTwin's task. model: of `get_model`, or RoboTwin's own client of a server.
      observation: of TASK_ENV.get_obs().
    """
    request = encode_observation(observation, TASK_ENV.get_instruction())
    remote = hasattr(model, "call")
    plan = model.call("get_action", request) if remote else model.get_action(request)
    queue = chunking.ChunkQueue(len(plan))
    queue.push(plan)
    while not queue.empty:
        TASK_ENV.take_action(queue.pop(), action_type="qpos")
        if TASK_ENV.eval_success or TASK_ENV.take_action_cnt >= TASK_ENV.step_lim:
            return


def reset_model(model):
    """Begins another episode."""
    if hasattr(model, "call"):
        model.call("reset_model", None)
    else:
        model.reset_model()


# ---- between them and the policy ---------------------------------------------------------------


def encode_observation(observation, instruction):
    """From RoboTwin's observation to what `Model.get_action` takes; arrays, strings and dicts.

    Returns:
      {"images": {camera: uint8 [h,w,3]}, "state": f32 [14], "prompt": str}.

    Raises:
      ValueError: a camera is missing or gives no colour images, or other joints.
    """
    images = {}
    for ours, theirs in CAMERAS.items():
        seen = observation["observation"].get(theirs, {})
        if "rgb" not in seen:
            raise ValueError(
                f"the observation has no rgb of {theirs}: collect it "
                "(task_config: camera and data_type)"
            )
        image = images[ours] = np.asarray(seen["rgb"])
        if image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ValueError(
                f"{theirs} gives {image.dtype} {list(image.shape)}; expected uint8 [h,w,3]"
            )
    state = np.asarray(observation["joint_action"]["vector"], np.float32)
    if state.shape != (JOINTS,):
        raise ValueError(
            f"joint_action has {state.size} numbers; expected {JOINTS}: two arms of six joints and "
            "a gripper"
        )
    return {"images": images, "state": state, "prompt": str(instruction)}


class Model:
    """A policy that plans for one robot, or for several that ask at once."""

    def __init__(self, policy, replan_steps, guard=None, max_batch=1):
        """Args:

        policy: see `inference/policy.py`. replan_steps: actions executed of each plan.
        guard: `safety.Guard`; default: no limits. max_batch: robots planned for together.

        Raises:
          ValueError: a policy of other cameras or joints than RoboTwin's, or a replan_steps that is
            longer than its plans.
        """
        data = policy.config.data
        if set(data.cameras) - set(CAMERAS):
            raise ValueError(
                f"the policy sees {', '.join(data.cameras)}; RoboTwin has "
                f"{', '.join(CAMERAS)}: train it with configs/robotwin.py"
            )
        if not 1 <= replan_steps <= data.action_horizon:
            raise ValueError(
                f"replan_steps is {replan_steps}; the policy plans {data.action_horizon} actions"
            )
        self._cameras, self._replan = data.cameras, replan_steps
        self._batcher = batching.Batcher(policy, max_batch)
        no_limits = safety.Limits.none(JOINTS)
        self._guard = guard or safety.Guard(no_limits, data.action_horizon)

    def get_action(self, request):
        """Returns the next actions f32 [replan_steps,14] for a request of `encode_observation`.

        Raises:
          ValueError: what came, or what the policy plans, is not that.
        """
        observation = self._checked(request)
        plan = self._batcher.submit(observation).result().actions
        if plan.shape[1:] != (JOINTS,):
            raise ValueError(f"the policy has {plan.shape[-1]} actions; RoboTwin takes {JOINTS}")
        plan, _ = self._guard.check(plan, observation.state)
        return plan[: self._replan]

    def _checked(self, request):
        """The `Observation` of a request: a bad one must not fail the batch it would be in."""
        images = {camera: request["images"][camera] for camera in self._cameras}
        for camera, image in images.items():
            fits = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
            if not fits or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"{camera} is no image; expected uint8 [h,w,3]")
        state = np.asarray(request["state"], np.float32)
        if state.shape != (JOINTS,) or not np.isfinite(state).all():
            raise ValueError(f"the state has shape {list(state.shape)}; expected {JOINTS} numbers")
        if not isinstance(request["prompt"], str):
            raise ValueError("the prompt is no text")
        return batching.Observation(images, state, request["prompt"])

    def reset_model(self, request=None):
        """Nothing to forget: each plan depends on its observation only."""


# ---- over TCP ----------------------------------------------------------------------------------


class Server(socketserver.ThreadingTCPServer):
    """Serves a `Model` to any number of simulators; those that ask at once share a batch.

    `serve_forever()` until `shutdown()`; `server_address` tells the port where 0 was given.
    """

    daemon_threads = allow_reuse_address = True

    def __init__(self, model, host="localhost", port=9999):
        """Listens at once. Anyone who reaches the port may ask for actions."""
        super().__init__((host, port), _Handler)
        self._model = model

    def answer(self, message):
        """Returns the reply to a message."""
        commands = {"get_action": self._model.get_action, "reset_model": self._model.reset_model}
        try:
            name = message.get("cmd")
            if name not in commands:
                raise ValueError(f"cmd is {name!r}; expected one of {', '.join(commands)}")
            return {"res": commands[name](message.get("obs"))}
        except Exception as error:  # of this request; the simulator is told, and others go on
            return {"error": f"{type(error).__name__}: {error}"}


class _Handler(socketserver.StreamRequestHandler):
    """One connection."""

    def handle(self):
        while True:
            try:
                message = receive(self.rfile)
            except ConnectionError:
                return
            except ValueError as error:
                send(self.wfile, {"error": str(error)})
                continue
            if message is None:
                return
            send(self.wfile, self.server.answer(message))


class Client:
    """Asks a `Server`, or RoboTwin's script/policy_model_server.py."""

    def __init__(self, host="localhost", port=9999, timeout=60.0):
        """Connects; `timeout` is the longest wait for a reply, in seconds.

        Raises:
          ConnectionError: nobody listens there.
        """
        try:
            self._socket = socket.create_connection((host, port), timeout)
        except OSError as error:
            raise ConnectionError(
                f"no policy answers at {host}:{port} ({error}); start one: "
                f"python -m lightwam_jax.inference.robotwin --workdir DIR --port {port}"
            ) from error
        self._file = self._socket.makefile("rwb")

    def call(self, func_name, obs=None):
        """Returns what the server's method `func_name` returns for `obs`.

        Raises:
          RuntimeError: the server could not do it; says why.
          ConnectionError: the server is gone.
        """
        send(self._file, {"cmd": func_name, "obs": obs})
        reply = receive(self._file)
        if reply is None:
            raise ConnectionError("the policy's server closed the connection")
        if "res" not in reply:
            raise RuntimeError(f"the policy's server failed:\n{reply.get('error')}")
        return reply["res"]

    def close(self):
        """Hangs up."""
        self._file.close()
        self._socket.close()


def send(file, message):
    """Sends a message: None, bools, numbers, strings, lists, dicts and numpy arrays."""
    content = json.dumps(message, default=_encode).encode()
    file.write(len(content).to_bytes(4, "big") + content)
    file.flush()


def receive(file):
    """Returns the next message, or None when the other side has hung up between two.

    Raises:
      ConnectionError: it hung up within one, or began one that is too long.
      ValueError: not a message.
    """
    head = file.read(4)
    if not head:
        return None
    size = int.from_bytes(head, "big")
    if size > arrays.MAX_FRAME:
        raise ConnectionError(f"a message of {size} bytes; expected at most {arrays.MAX_FRAME}")
    content = file.read(size)
    if len(head) < 4 or len(content) < size:
        raise ConnectionError("the other side hung up within a message")
    message = json.loads(content, object_hook=_decode)
    if not isinstance(message, dict):
        raise ValueError(f"the message is {type(message).__name__}; expected an object")
    return message


def _encode(value):
    if isinstance(value, np.ndarray):
        return {
            "__numpy_array__": True,
            "data": base64.b64encode(value.tobytes()).decode(),
            "dtype": str(value.dtype),
            "shape": list(value.shape),
        }
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot send {type(value).__name__}")


def _decode(value):
    if "__numpy_array__" not in value:
        return value
    data = base64.b64decode(value.get("data", ""), validate=True)
    return arrays.array(data, value.get("dtype"), value.get("shape"))


def main(argv):
    """Serves the policy of a run until it is interrupted."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    from lightwam_jax import command_line

    given = flags.FLAGS
    names = ("workdir", "step", "replan_steps", "embodiment", "max_batch")
    try:
        model = get_model({name: given[name].value for name in names})
    except (OSError, ValueError) as error:
        command_line.fail(error)
    with Server(model, given.host, given.port) as server:
        print(f"serving {given.workdir} at {given.host}:{server.server_address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    from absl import app, flags

    from lightwam_jax import command_line

    flags.DEFINE_string("workdir", None, "Run directory of train.py.")
    flags.DEFINE_integer("step", None, "Checkpoint to serve; default: the newest.")
    flags.DEFINE_integer(
        "replan_steps", None, "Actions executed of each plan; default: the config's."
    )
    flags.DEFINE_string("embodiment", "", "Whose cameras and units, where a mixture had several.")
    flags.DEFINE_integer("max_batch", 1, "Simulators that are planned for together: 1, 2, 4, ...")
    flags.DEFINE_string("host", "localhost", "Address to listen at; 0.0.0.0: anyone may connect.")
    flags.DEFINE_integer("port", 9999, "Port; 0: any that is free.")
    flags.mark_flag_as_required("workdir")
    command_line.run(main, again="run the same command again")
