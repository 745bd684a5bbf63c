"""T5: a training step of EchoIR by ASBLO, in steps of single-level training on as many patches."""

from __future__ import annotations

from dataclasses import dataclass

import echoir_step
import torch

from speed.race import OURS, Contender, Result, Rules, Run, race, rows
from speed.work import Answer

CPU = torch.device("cpu")
SINGLE = "single level"  # in the same loop, with the same optimizer: the measure of the others
BATCH = 4
HALF_GOALS = {"restoration": 1.6, "echo": 1.3, "both": 2.3}  # where F and f share the batch


@dataclass(frozen=True)
class Training:
    """One way to train.

    Attributes:
        method: `single-level` or `asblo`.
        lower: the lower objective.
        batch: patches on each level.
        goal: what a step may cost, in steps of the single level.
    """

    method: str
    lower: str
    batch: int
    goal: str

    def run(self) -> echoir_step.Run:
        scene = echoir_step.Arguments(batch=self.batch, lower_batch=self.batch, device="cpu")
        return echoir_step.prepare(scene, self.lower, self.method, CPU)

    def prepare(self) -> Run:
        """One more step, at each call."""
        steps = echoir_step.stepping(self.run())
        states = [next(steps)]

        def run() -> Answer:
            states.append(next(steps))
            before, after = states.pop(0).evaluations, states[0].evaluations
            gradients = after.gradients - before.gradients
            if not gradients:  # the single level does not count
                return Answer(torch.zeros(()))
            return Answer(torch.zeros(()), (), gradients, after.hvp - before.hvp)

        return run


def trainings() -> dict[Contender, Training]:
    found = {SINGLE: Training("single-level", "restoration", BATCH, "")}
    for lower, goal in echoir_step.GOALS.items():
        found[f"ASBLO, {lower}"] = Training("asblo", lower, BATCH, str(goal))
    for lower, goal in HALF_GOALS.items():
        name = f"ASBLO, {lower}, the batch in halves"
        found[name] = Training("asblo", lower, BATCH // 2, str(goal))
    return {
        Contender(SINGLE if name == SINGLE else OURS, name, training.prepare): training
        for name, training in found.items()
    }


def tables(rules: Rules) -> str:
    entries = trainings()

    def extra(result: Result, _: Answer) -> list[str]:
        training = entries[result.contender]
        memory = echoir_step.live_memory(training.run()) / 2**20
        return [training.goal, f"{memory:.0f}"]

    about = (
        f"{BATCH} patches of 64 x 64 on each level, float32; the words name the lower objective. "
        "The ratios are to single-level training in the same loop, with the same optimizer.\n\n"
    )
    return about + rows(race(list(entries), rules), extra, ("goal", "MiB"), floor=SINGLE)
