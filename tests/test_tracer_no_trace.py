"""A loop that is watched by a tracer is bit for bit the loop that is not."""

import random
import threading
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import wandb
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests import tiny
from tests.own_loop import Loop, adapted, rows, tracer
from tests.test_no_trace import differences, fingerprint, state_of
from tests.training import Pace
from tlens_callback import LocalSink, MemorySink

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def accelerator_state():
    """One for all accelerators of a process, which keeps the precision of the first."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


class Watched(Loop):
    """Shuffles, drops out and keeps the gradients of its last step."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__(model, shuffle=True, **settings)
        self.tokenizer = tiny.tokenizer()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.2

    def state(self) -> dict[str, Any]:
        as_trainer = SimpleNamespace(
            model=getattr(self.model, "_orig_mod", self.model),
            processing_class=self.tokenizer,
            optimizer=self.optimizer,
            state=SimpleNamespace(log_history=[{"loss": loss} for loss in self.losses]),
        )
        gradients = {n: fingerprint(p.grad) for n, p in self.model.named_parameters()}
        return {**state_of(as_trainer), "gradients": gradients, "next batch": self._next()}

    def _next(self) -> Any:
        """Draws as the loop would go on to."""
        return fingerprint(self._batch())


def run(watch: Any = None, model: Any = adapted, steps: int = 5, **settings: Any) -> dict[str, Any]:
    """The state after a loop of a fixed seed; `watch(loop)` gives what its steps call."""
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    autocast = settings.pop("autocast", False)
    loop = Watched(model(), **settings)
    with watch(loop) if watch else nullcontext() as watching:
        loop.run(steps, watching, autocast=autocast)
        # Gradients of the next step wait while the last look is taken.
        loop.model(**loop._batch()).loss.backward()
        if isinstance(watching, Stepper):
            watching.step()
    return loop.state()


unwatched = cache(run)
"""The state after the same loop alone, run once."""


class Stepper:
    """What a culprit has in common with a tracer."""

    def __init__(self, loop: Watched) -> None:
        self.loop = loop

    def __enter__(self) -> "Stepper":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def step(self, **logged: Any) -> None:
        raise NotImplementedError


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batches": 2},
        {"autocast": True},
        {"model": lambda: tiny.model("llama")},
        {"model": lambda: adapted("gpt2")},
        {"model": lambda: tiny.model("gpt_neox")},
        {"model": lambda: torch.compile(adapted(), backend="eager")},
    ],
    ids=["lora", "accumulation", "bf16", "full", "gpt2", "gpt_neox", "compiled"],
)
def test_a_loop_is_left_as_it_was(settings):
    sink = MemorySink()
    watched = run(lambda loop: tracer(loop.model, sinks=[sink], every_n_steps=2), **settings)
    assert differences(unwatched(**settings), watched) == []
    assert sorted(sink.readings["target_scores/loss/capital"]) == [0, 2, 4, 5]
    moved = {float(r.values) for r in sink.readings["target_scores/loss/capital"].values()}
    assert len(moved) == 4, "the loop watched was one that changes the model"


@pytest.mark.slow
@pytest.mark.parametrize("writing", ["wait", "drop_old", "inline"])
def test_default_probes_and_sinks_leave_no_trace(tmp_path, writing):
    """The first rows are read, the store and its page are written, a checkpoint is kept."""

    class Saving:
        def __init__(self, loop):
            self.inner = tracer(
                loop.model, probes=None, sinks=None, output_dir=tmp_path, writing=writing,
                train_dataset=rows(),
            )  # fmt: skip

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *error):
            self.inner.__exit__(*error)

        def step(self, **logged):
            self.inner.step(**logged)
            self.inner.save(tmp_path / "checkpoint")

    assert differences(unwatched(), run(Saving)) == []
    assert (tmp_path / "tlens" / "page.html").exists()
    assert (tmp_path / "checkpoint" / "tlens.memory").exists()


def test_a_sink_slower_than_the_loop_leaves_no_trace(tmp_path):
    pace = Pace()

    class Slow(LocalSink):
        def write(self, readings, *, step):
            if step > 0:  # the first is written before the loop goes on
                pace.reaches(min(step + 2, 5))
            super().write(readings, step=step)

    def watch(loop):
        loop.optimizer.register_step_pre_hook(lambda *_: pace.next())
        return tracer(loop.model, sinks=[Slow(tmp_path / "store")])

    assert differences(unwatched(), run(watch)) == []


@pytest.mark.slow
def test_pictures_in_wandb_leave_no_trace(offline):
    wandb.init(project="own")
    watched = run(lambda loop: tracer(loop.model, sinks=None, output_dir=offline), steps=3)
    wandb.finish()
    assert differences(run(steps=3), watched) == []
    assert list(offline.glob("wandb/offline-*/files/media/images/**/*.png"))


@pytest.mark.parametrize("mode", ["eval", "mixed"])
def test_modes_of_the_modules_stay_what_they_were(mode):
    """A loop that evaluates between its steps, or that holds some modules in eval."""
    model = adapted().train()
    for i, module in enumerate(model.modules()):
        module.training = mode == "mixed" and i % 2 == 0
    found = [module.training for module in model.modules()]
    frozen = [p.requires_grad for p in model.parameters()]
    with tracer(model) as watching:
        watching.step()
        assert [module.training for module in model.modules()] == found
    assert [module.training for module in model.modules()] == found
    assert [p.requires_grad for p in model.parameters()] == frozen


def test_an_accelerator_s_model_keeps_its_forward(accelerator_state):
    """`prepare` puts a forward of its own on the instance under mixed precision."""
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(adapted())
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    forward, sink = vars(model)["forward"], MemorySink()
    with tracer(model, sinks=[sink]) as watching:
        watching.step()
    assert vars(model)["forward"] is forward
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert max(r.values for r in sink.readings["fidelity/max_abs_diff"].values()) < 1e-4


class Noisy(Dataset):
    """Draws when a row is read."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = rows()[i]["input_ids"].clone()
        ids[random.randrange(4)] = int(torch.randint(5, 30, ()))
        return {"input_ids": ids, "labels": ids}


def accelerated(watch: Any, draws: bool = False) -> dict[str, Any]:
    """Processes that load, accumulation, clipping and a scheduler; the tracer reads the data."""
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data = Noisy()
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2)
    loop = Loop(adapted())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(loop.optimizer, 6)
    model, optimizer, loader, scheduler = accelerator.prepare(
        loop.model, loop.optimizer, loader, scheduler
    )
    settings = {"probes": None, "train_dataset": data, "every_n_steps": 2}
    seen: list[Any] = []
    with tracer(model, **settings) if watch else nullcontext() as watching:
        for batch in (batch for _ in range(2) for batch in loader):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    seen.append(float(accelerator.clip_grad_norm_(model.parameters(), 1.0)))
                optimizer.step(), scheduler.step(), optimizer.zero_grad()
            seen += [fingerprint(batch["input_ids"]), loss.item(), scheduler.get_last_lr()]
            if accelerator.sync_gradients:
                if watch:
                    watching.step(loss=loss.item())
                torch.rand(int(draws))
    return {
        "seen": seen,
        "parameters": fingerprint(dict(model.named_parameters())),
        "torch": fingerprint(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
    }


@pytest.mark.slow
def test_a_loop_as_accelerate_has_it_is_left_as_it_was(accelerator_state):
    """The control draws one number a step."""
    plain = accelerated(watch=False)
    assert accelerated(watch=True) == plain
    assert accelerated(watch=False, draws=True)["seen"] != plain["seen"]


class Draws(Stepper):
    def step(self, **logged):
        torch.rand(1)


class DrawsOnAThread(Stepper):
    def step(self, **logged):
        thread = threading.Thread(target=torch.rand, args=(1,))
        thread.start()
        thread.join()


class DrawsNumpy(Stepper):
    def step(self, **logged):
        np.random.rand()


class DrawsPython(Stepper):
    def step(self, **logged):
        random.random()


class LeavesEval(Stepper):
    def step(self, **logged):
        self.loop.model.eval()


class Freezes(Stepper):
    def step(self, **logged):
        next(p for p in self.loop.model.parameters() if p.requires_grad).requires_grad = False


class ClearsGradients(Stepper):
    def step(self, **logged):
        self.loop.optimizer.zero_grad()


class LeavesAHook(Stepper):
    def step(self, **logged):
        self.loop.model.register_forward_hook(lambda *_: None)


class Merges(Stepper):
    def step(self, **logged):
        self.loop.model.merge_adapter()
        self.loop.model.unmerge_adapter()


class TouchesTheOptimizer(Stepper):
    def step(self, **logged):
        next(iter(self.loop.optimizer.state.values()))["exp_avg"].add_(1e-6)


class Pads(Stepper):
    def step(self, **logged):
        self.loop.tokenizer.padding_side = "left"


@pytest.mark.parametrize(
    ("culprit", "found"),
    [
        (Draws, {"torch", "next batch", "parameters"}),
        (DrawsOnAThread, {"torch"}),
        (DrawsNumpy, {"numpy"}),
        (DrawsPython, {"python"}),
        (LeavesEval, {"training", "parameters", "history"}),
        (Freezes, {"gradients wanted"}),
        (ClearsGradients, {"gradients"}),
        (LeavesAHook, {"hooks"}),
        (Merges, {"parameters"}),
        (TouchesTheOptimizer, {"optimizer"}),
        (Pads, {"tokenizer"}),
    ],
)
def test_the_check_finds_what_leaves_a_trace(culprit, found):
    assert found <= set(differences(unwatched(), run(culprit)))


def test_the_loop_learns():
    """Else nothing could be found in its weights."""
    loop = Watched(tiny.model("llama"))
    before = fingerprint(dict(loop.model.named_parameters()))
    loop.run(12)
    after = fingerprint(dict(loop.model.named_parameters()))
    assert all(before[name] != after[name] for name in before)
    assert loop.losses[-1] < loop.losses[0]
