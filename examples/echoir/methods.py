"""The ways to train one network on one set of photographs, each as a `Run` in the same form.

Two levels: ASBLO, and other methods of the library for comparison. One level: AdamW on everything.
"""

import copy
from collections.abc import Callable

import torch
from arguments import Arguments, Polynomial
from degradations import degradation
from jpeg import sometimes_saved
from model import EchoIR
from objectives import objectives
from patches import PatchSampler
from photographs import Source, Split
from processes import ALONE, Processes
from run import Done, Run
from scores import Result, mean
from single_level import SingleLevel
from stages import learning_rate, plan

import bilevel as bl

MAX_MULTIPLIER = 5.0  # lambda pulls f(x, y) and f(x, z) apart as it grows, faster than z can follow
CROP = 256  # pixels of a held-out photograph that PSNR is measured on while training


def asblo(a: Arguments, adamw: bl.optim.Torch) -> bl.Solver:
    """The paper's method: value function and barrier."""
    return bl.ASBLO(
        mu=_polynomial(a.mu),
        theta=_polynomial(a.theta),
        sigma=_polynomial(a.barrier),
        epsilon=_polynomial(a.epsilon),
        value_optimizer=adamw,
        lower_optimizer=adamw,
        upper_optimizer=adamw,
        max_multiplier=MAX_MULTIPLIER,
    )


def f2sa(a: Arguments, adamw: bl.optim.Torch) -> bl.Solver:
    """A penalty of the value gap that grows; z and y take one step each, as ASBLO's do."""
    return bl.F2SA(
        inner_steps=1, value_optimizer=adamw, lower_optimizer=adamw, upper_optimizer=adamw
    )


def bome(a: Arguments, adamw: bl.optim.Torch) -> bl.Solver:
    """A multiplier that makes the value gap fall at its own rate; again one step of each."""
    return bl.BOME(
        value_steps=1, value_optimizer=adamw, lower_optimizer=adamw, upper_optimizer=adamw
    )


def single_level(a: Arguments, adamw: bl.optim.Torch) -> bl.Solver:
    return SingleLevel(adamw)


METHODS = {"asblo": asblo, "single-level": single_level, "f2sa": f2sa, "bome": bome}


def _polynomial(numbers: Polynomial | None) -> bl.Schedule | None:
    return numbers and bl.schedules.polynomial(*numbers[:2], scale=numbers[2])


def training_runs(
    a: Arguments,
    methods: tuple[str, ...],
    data: Split,
    net: EchoIR,
    device: torch.device,
    *,
    restored: Callable[[bl.State, int], list[Result]],
    keep: Callable[[str, bl.State, float], None],
    processes: Processes = ALONE,
) -> dict[str, Run]:
    """A run of each method, from the same start.

    Args:
        a: checked arguments.
        methods: names of `METHODS`.
        data: photographs of both levels.
        net: the network with its first weights.
        device: where it is.
        restored: the held-out photographs' centers of a size, restored with the weights of a state.
        keep: called with the method's name, the state and its PSNR whenever that is the best yet.
        processes: that train together.

    Raises:
        ValueError: if they cannot share a batch equally.
    """
    degrade = sometimes_saved(degradation(a.task, a.sigma), a.jpeg)
    stages = plan(a.stages, a.steps, patch=a.patch, batch=a.batch, lower_batch=a.lower_batch)

    for stage in stages.each:
        processes.check_shares("--batch", stage.batch)
        processes.check_shares("--lower-batch", stage.lower_batch)

    def samplers(photographs: tuple[Source, ...]) -> dict[int, PatchSampler]:
        return {size: PatchSampler(photographs, degrade, size, device) for size in stages.patches}

    training, validation = samplers(data.train), samplers(data.validation)
    everything = samplers(data.train + data.validation) if "single-level" in methods else {}
    upper, lower = objectives(a.lower, alpha=a.alpha, amp=bool(a.amp), mean=processes.mean)
    if a.compile:  # a copy: whole photographs, each of its own size, would be compiled one by one
        net = copy.deepcopy(net)
        net.compile(dynamic=False)
        # F and f of each stage, and two more in which ASBLO measures the units; beyond, nothing is compiled.
        torch._dynamo.config.cache_size_limit = 2 * len(stages.each) + 8
    problem, x0, y0 = bl.from_module(
        net, lower=["upsamplers.*"], upper_loss=upper, lower_loss=lower, per_sample=True
    )

    if processes.count > 1:
        problem = bl.distributed.data_parallel(problem)
    share = processes.share

    def two_levels(step: int) -> bl.Batch:
        stage = stages.at(step)
        return bl.Batch(
            upper=validation[stage.patch].batch(stage.batch, a.seed, step, 0, share=share),
            lower=training[stage.patch].batch(stage.lower_batch, a.seed, step, 1, share=share),
        )

    def one_level(step: int) -> bl.Batch:
        stage = stages.at(step)
        patches = everything[stage.patch].batch(stage.batch, a.seed, step, 0, share=share)
        return bl.Batch(upper=patches, lower=patches)

    def rate(done: Done) -> bl.Schedule:
        lowest = a.lr / 100 if a.lr_end is None else a.lr_end
        return learning_rate(a.lr, lowest, done, warmup=a.warmup, hold=a.hold)

    def adamw(done: Done) -> bl.optim.Torch:
        return bl.optim.Torch(
            torch.optim.AdamW, lr=rate(done), max_norm=a.max_norm, weight_decay=1e-4
        )

    def psnr(state: bl.State) -> float:
        return mean(result.scores()[1] for result in restored(state, CROP)).psnr_rgb

    return {
        name: Run(
            name=name,
            problem=problem,
            solver=lambda done, make=METHODS[name]: make(a, adamw(done)),
            x0=x0,
            y0=y0,
            batch=one_level if name == "single-level" else two_levels,
            psnr=psnr,
            keep=lambda state, best, name=name: keep(name, state, best),
            facts=lambda done, state: {"lr": rate(done)(state.step - 1)},
            folder=a.output / name,
            device=device,
            ema=a.ema,
            look_every=a.look_every,
            processes=processes,
        )
        for name in methods
    }
