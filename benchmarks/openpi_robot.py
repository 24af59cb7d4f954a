"""A robot that runs openpi's client as it is published; its body is in the process that started it.

    python -I openpi_robot.py HOST PORT EPISODES REPLAN_STEPS

Needs nothing but openpi-client 0.1.2, which wants numpy below 2 and therefore an interpreter of its
own. EPISODES of openpi's Runtime, with PolicyAgent and ActionChunkBroker; 0: observations one by
one, as the body gives them. It asks the body on stdout, and reads each answer on stdin: msgpack
maps as openpi's client packs them, each after its length in 4 bytes. `openpi_client.py` is the
other side.
"""

import os
import struct
import sys
import time

from openpi_client import action_chunk_broker, msgpack_numpy, websocket_client_policy
from openpi_client.runtime import environment, runtime
from openpi_client.runtime.agents import policy_agent


class Body(environment.Environment):
    """What the robot consists of, in the other process."""

    def __init__(self, answers, questions):
        self._answers, self._questions = answers, questions

    def ask(self, what, **values):
        """Returns the answer, a map, to {"ask": what, **values}."""
        frame = msgpack_numpy.packb({"ask": what, **values})
        self._questions.write(struct.pack(">I", len(frame)) + frame)
        self._questions.flush()
        (length,) = struct.unpack(">I", self._answers.read(4))
        return msgpack_numpy.unpackb(self._answers.read(length))

    def reset(self):
        """See `environment.Environment`; so are the others."""
        self.ask("reset")

    def is_episode_complete(self):
        """See `reset`."""
        return self.ask("complete")["complete"]

    def get_observation(self):
        """See `reset`."""
        return self.ask("observe")["observation"]

    def apply_action(self, action):
        """See `reset`."""
        self.ask("act", action=action["actions"])


def infer(policy, body):
    """Asks the policy what the body gives, until it gives None; errors are told as text."""
    while (observation := body.ask("next")["observation"]) is not None:
        try:
            body.ask("planned", reply=policy.infer(observation))
        except RuntimeError as error:  # what the client makes of a refusal
            body.ask("refused", text=str(error))


def main(host, port, episodes, replan_steps):
    """Connects, tells the body the metadata, and runs."""
    questions = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed goes to stderr
    body = Body(sys.stdin.buffer, questions)
    body.ask("begin")
    began = time.monotonic()
    policy = websocket_client_policy.WebsocketClientPolicy(host, int(port))
    waited = time.monotonic() - began
    body.ask("connected", metadata=policy.get_server_metadata(), waited_s=waited)
    if int(episodes):
        broker = action_chunk_broker.ActionChunkBroker(policy, int(replan_steps))
        agent = policy_agent.PolicyAgent(broker)
        runtime.Runtime(body, agent, [], num_episodes=int(episodes)).run()
    else:
        infer(policy, body)


if __name__ == "__main__":
    main(*sys.argv[1:])
