"""Chunks that arrive late: random schedules of latency, jitter, loss, duplicates and resets."""

import numpy as np

from lightwam_jax.inference.realtime import Realtime

HORIZON, DT = 6, 0.1


class Schedule:
    """One random run: latency, jitter, loss, duplicates, reordering, bad chunks, resets.

    A chunk's delta dimension is random; the gripper's dimension holds its number and row, so that
    what is executed says where it comes from.
    """

    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        self.hold_s = float(rng.choice([0.3, 1.0]))
        self.trained, self.replan = int(rng.integers(2, HORIZON + 1)), int(rng.integers(1, 5))
        self.spread, self.stalls, self.held = int(rng.integers(1, 3)), 0, None
        self.state = Realtime(
            HORIZON,
            DT,
            ("delta", "gripper"),
            self.trained,
            self.replan,
            spread=self.spread,
            hold_s=self.hold_s,
            on_stall=self.stalled,
            warn=lambda text: None,
        )
        self.latency, self.jitter = rng.uniform(0, 0.4), rng.choice([0, 0.3])
        self.loss, self.bad = rng.choice([0, 0.2]), rng.choice([0, 0.1])
        self.step, self.used, self.plans, self.moved, self.coming = 0, set(), {}, [], []

    def stalled(self, seconds):
        self.stalls += 1

    def ask(self, now):
        number = self.state.request(now)
        if number is None:
            return
        plan = self.rng.uniform(-1, 1, (HORIZON, 2))
        plan[:, 1] = 100 * number + np.arange(HORIZON)
        self.plans[number] = self.step, plan
        if self.rng.random() < self.bad:
            plan = plan * np.nan
        if self.rng.random() >= self.loss:
            late = self.latency + self.jitter * self.rng.random()
            self.coming.append((now + late, number, plan))
            if self.rng.random() < 0.1:  # once more, perhaps much later
                self.coming.append((now + late + self.rng.random(), number, plan))

    def deliver(self, now):
        for due, number, plan in sorted(self.coming, key=lambda each: each[:2]):
            if due <= now:
                self.state.receive(number, plan, due)
        self.coming = [each for each in self.coming if each[0] > now]

    def act(self, now):
        before = self.stalls
        action, source = self.state.action(now), self.state.source
        if source is None:
            assert action is None or action[0] == 0
            self.held = now if self.held is None else self.held
            assert (self.stalls > before) == (now - self.held >= self.hold_s - 1e-6)
            return
        self.held = None
        assert self.stalls == before and source not in self.used
        self.used.add(source)
        number, row = source
        origin, plan = self.plans[number]
        assert action[1] == 100 * number + row, "it is not what it says it is"
        assert row == self.step - origin < self.trained
        self.moved.append(float(action[0]))
        self.step += 1
        # `spread` rows after the splice, the robot is where the plan wanted it at this row.
        first = min(r for n, r in self.used if n == number)
        if row >= first + self.spread - 1 or not first:
            wanted, done = plan[: row + 1, 0].sum(), sum(self.moved[origin : self.step])
            assert abs(wanted - done) <= 1e-6

    def reset(self):
        self.state.reset()
        self.step, self.moved, self.held = 0, [], None
        self.plans = {}

    def run(self, ticks):
        for tick in range(ticks):
            if self.rng.random() < 0.02:
                self.reset()
            now = tick * DT
            self.ask(now)
            self.deliver(now)
            self.act(now)


def test_ten_thousand_random_schedules():
    """Each action once; row = steps since its observation; displacement kept; no endless hold."""
    total = dict.fromkeys(("holds", "skipped", "late", "failed", "discarded", "shortened"), 0)
    stalls = executed = 0
    for seed in range(10_000):
        schedule = Schedule(seed)
        schedule.run(ticks=16)
        stalls, executed = stalls + schedule.stalls, executed + len(schedule.used)
        for name in total:
            total[name] += schedule.state.counts[name]
    assert min(*total.values(), stalls) > 500, f"the schedules leave something out: {total}"
    assert executed > 60_000
