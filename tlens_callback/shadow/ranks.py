"""`Ranks`: lets rank 0 observe a model that several processes train, while the others serve it."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tlens_callback.shadow.gather import Gather, Shards
from tlens_callback.shadow.layers import layer_of, layer_paths
from tlens_callback.shadow.live import logits_of
from tlens_callback.shadow.refusals import language_model, refuse
from tlens_callback.shadow.shards import FSDP1, ZERO3, sharded, share_again, zero_forward
from tlens_callback.shadow.skeleton import skeleton
from tlens_callback.shadow.weights import parts, resolve, unwrap

_END, _GATHER, _RUN = range(3)

_MEET = timedelta(minutes=2)
"""How long rank 0 waits at the start for the other processes, whose help it needs."""

_MEET_WHOLE = timedelta(seconds=20)
"""The same for a model that is not sharded: it can do without them."""

_WAIT = timedelta(hours=6)
"""How long they wait for rank 0, whose observation may take minutes. If it dies, they are told."""

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
"""For which precisions of autocast a pass can be asked."""

_met: dict[str, int] = {}

_ALONE, _TOGETHER = "alone", "together"


def has_other_processes() -> bool:
    """Whether `torch.distributed` has connected this process with others."""
    connected = dist.is_available() and dist.is_initialized()
    return connected and dist.get_world_size() > 1


def is_first_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return not has_other_processes() or dist.get_rank() == 0


class RankError(RuntimeError):
    """Raised in the other processes if rank 0 has stopped."""


class Ranks:
    """What the processes of a run agree on: when rank 0 observes, and what it needs from them.

    Rank 0 has the shadow, the probes, the instruments and the sinks. While it `leads`, the others
    `serve`: they wait for what it asks, which is a gather of parameters or a forward pass of the
    live model, and for its end. Whatever fails in rank 0 between two wishes, it says so in place of
    its next wish, and no process is left waiting. Only within a wish can the processes not part: if
    one fails there, the training ends. Between observations no process waits for another.

    Attributes:
        first: whether this process is rank 0.
        world: number of processes.
        model: the live model, without what DDP or DeepSpeed have put around it.
        sharded: the name of what has spread the parameters over the processes, or None.
        watching: whether rank 0 wants to observe again.
        next_check: the step from which on it wants to compare shadow and model again, or None.
        next_step: the step from which on it wants to observe again.
        steps: the steps after which it has observed.
        gathers: how often it has asked for parameters.
        broken: whether something has failed within a wish, so that no other can be asked.
        shards: of a sharded model, while rank 0 leads.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.first = dist.get_rank() == 0
        self.world = dist.get_world_size()
        self.gathers = 0
        self.broken = False

    def begin(self, model: nn.Module, step: int) -> None:
        """Begins a run whose first observation is at `step`; every process calls it, with what its
        trainer has made of the model.

        Raises:
            ValueError: for a sharded model that cannot have a shadow, or after a failure that the
                processes cannot mend.
        """
        if self.broken:
            raise ValueError(
                "An earlier training ended while the processes gathered parameters, and they are "
                "not in step any more. Start the processes anew."
            )
        while not isinstance(model, FSDP1) and "module" in model._modules:
            # Around DDP and DeepSpeed's engine, whose hooks are on the modules inside.
            model = model.get_submodule("module")
        self.model = model
        self.sharded = sharded(model)
        if self.sharded is not None:
            refuse(model, together=True)
            language_model(model)
        self.watching = True
        self.next_check: int | None = None
        self.next_step = 0
        self.steps = {step}
        self.shards: Shards | None = None
        self._paths: tuple[list[str], list[str]] | None = None

    @classmethod
    def meet(cls, model: nn.Module, name: str) -> "Ranks | None":
        """Finds out which processes watch this run; every one that does calls it.

        Args:
            name: of the callback or tracer.

        Returns None if the model is not sharded, and there is one process or not all have come.

        Raises:
            ValueError: if the model is sharded and not all processes have come.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return None
        rank, world, how = dist.get_rank(), dist.get_world_size(), sharded(model)
        if world == 1 and how is None:
            return None
        within: Any = dist.distributed_c10d
        store = within.PrefixStore(f"tlens/{name}/{_times(name)}", within._get_default_store())
        store.set(str(rank), "here")
        if rank == 0:
            try:
                store.wait([str(one) for one in range(world)], _MEET if how else _MEET_WHOLE)
                store.set("said", _TOGETHER)
            except RuntimeError:
                store.set("said", _ALONE)
        else:
            store.wait(["said"], _WAIT)
        if store.get("said").decode() == _TOGETHER:
            group: Any = dist.new_group(backend="gloo", timeout=_WAIT)
            return cls(group)
        if how is not None:
            raise ValueError(_not_all(how))
        return None

    def demand_alike(self, own: Mapping[str, object]) -> None:
        """Compares what the processes were given; every one calls it.

        Raises:
            ValueError: in all of them, if it is not the same: they would wait for each other.
        """
        each: list[Any] = [None] * self.world
        dist.all_gather_object(each, dict(own), group=self.group)
        for name in own:
            values = [one.get(name) for one in each]
            if any(other != values[0] for other in values):
                said = ", ".join(f"{other!r} in rank {i}" for i, other in enumerate(values))
                raise ValueError(
                    f"The callback of each process has to be the same, and {name} is {said}. Make "
                    f"it, and attach it to the trainer, in all processes in the same way."
                )

    def due(self, step: int, *, observe: bool, last: bool = False) -> bool:
        """Whether all processes observe after this step; each of them comes to the same answer."""
        check = self.next_check is not None and step >= self.next_check
        return self.watching and (observe or last or check)

    @contextmanager
    def leading(self, *, fatal: bool) -> Iterator[None]:
        """In rank 0: the others serve inside the `with` block.

        Args:
            fatal: whether an error in the block ends the training. They then raise a `RankError`.
        """
        try:
            # Rollouts are looked at in the middle of the engine's own pass.
            with zero_forward(self.model, going_on=False):
                self._find_shards()
                yield
        except BaseException as error:
            self.watching = False
            fatal = fatal or not isinstance(error, Exception)
            if not self.broken:
                with suppress(Exception):
                    self._end(f"{type(error).__name__}: {error}" if fatal else "")
            raise
        self._end("")

    def serve(self) -> None:
        """In the other processes: does what rank 0 asks for, until its end.

        Raises:
            RankError: if rank 0 has failed in a way that ends its training, or this process cannot
                serve it: rank 0 then waits for it until it ends.
        """
        try:
            with zero_forward(self.model, going_on=False):
                self._serve()
        except RankError:
            raise
        except Exception as error:
            raise RankError(f"tlens: this process could not help rank 0: {error}") from error

    def _serve(self) -> None:
        self._find_shards()
        while True:
            wish = torch.zeros(5, dtype=torch.int64)
            dist.broadcast(wish, 0, group=self.group)
            kind, *of = wish.tolist()
            if kind == _GATHER:
                self._gather(of[0], bool(of[1])).run()
            elif kind == _RUN:
                shape = torch.zeros(2, dtype=torch.int64)
                dist.broadcast(shape, 0, group=self.group)
                tokens = torch.zeros(tuple(shape.tolist()), dtype=torch.int64)
                dist.broadcast(tokens, 0, group=self.group)
                self._logits(tokens, of[0], of[1])
            else:
                watching, next_check, self.next_step, length = of
                self.watching = bool(watching)
                self.next_check = None if next_check < 0 else next_check
                if length:
                    text = torch.zeros(length, dtype=torch.uint8)
                    dist.broadcast(text, 0, group=self.group)
                    why = bytes(text.tolist()).decode(errors="replace")
                    raise RankError(f"tlens: rank 0 has stopped ({why}), and so does this process.")
                return

    @contextmanager
    def gathered(self, group: int, *, adapters: bool = False) -> Iterator[Gather]:
        """In rank 0, while it leads: the whole parameters of one group of `shards`.

        Args:
            adapters: only of shares with parameters of adapters.
        """
        gather = self._gather(group, adapters)
        if not gather.empty:
            with self._collective():
                self._wish(_GATHER, group, int(adapters))
                gather.run()
            self.gathers += 1
        yield gather

    def logits(self, tokens: Tensor, *, eager: bool, autocast: torch.dtype | None) -> Tensor:
        """In rank 0, while it leads: the live model's logits; all processes run it."""
        kind = -1 if autocast is None else _DTYPES.index(autocast)
        sent = tokens.cpu()
        with self._collective():
            self._wish(_RUN, int(eager), kind)
            dist.broadcast(torch.tensor(sent.shape), 0, group=self.group)
            dist.broadcast(sent, 0, group=self.group)
            return self._logits(sent, int(eager), kind)

    def close(self) -> None:
        """Frees the connection of the processes; every one calls it."""
        if not self.broken:
            with suppress(Exception):
                dist.destroy_process_group(self.group)

    def _logits(self, tokens: Tensor, eager: int, autocast: int) -> Tensor:
        assert self.shards is not None
        kind = None if autocast < 0 else _DTYPES[autocast]
        # ZeRO-3 learns the order of modules from the first pass that its outermost hook sees, and
        # would learn that of a pass without gradients.
        wrapped = self.sharded != ZERO3
        model = self.model if wrapped else unwrap(self.model)
        tokens = tokens.to(self.shards.device)
        with zero_forward(model, going_on=True):
            logits = logits_of(model, tokens, eager=bool(eager), autocast=kind, wrapped=wrapped)
        share_again(self.model)
        return logits

    def _gather(self, group: int, adapters: bool) -> Gather:
        assert self.shards is not None
        wanted = self.shards.groups[group]
        return Gather([s for s in wanted if s in self.shards.adapters] if adapters else wanted)

    def _find_shards(self) -> None:
        """Where the shares are now: training may have moved them, or exchanged adapters."""
        if self.sharded is None:
            return
        base: Any = unwrap(self.model)
        if self._paths is None:
            empty = skeleton(base)
            layers = layer_paths(empty)
            paths = [path for path, module in empty.named_modules() if module._parameters]
            self._paths = layers, [path for path in paths if layer_of(path, layers) is None]
        layers, others = self._paths
        self.shards = Shards(
            self.model,
            [[*resolve(base, path).modules()] for path in layers],
            # With the originals of `modules_to_save`, for the base.
            [
                [*parts(resolve(base, path)), *parts(resolve(base, path, adapted=False))]
                for path in others
            ],
        )

    def _wish(self, kind: int, *of: int) -> None:
        wish = torch.tensor([kind, *of, *[0] * (4 - len(of))], dtype=torch.int64)
        dist.broadcast(wish, 0, group=self.group)

    def _end(self, why: str) -> None:
        text = why.encode()[:1000]
        next_check = -1 if self.next_check is None else self.next_check
        with self._collective():
            self._wish(_END, int(self.watching), next_check, self.next_step, len(text))
            if text:
                dist.broadcast(torch.tensor(list(text), dtype=torch.uint8), 0, group=self.group)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Ctrl-C waits until the collective is over, which the others could not leave; a second one
        does not."""
        if self.broken:
            raise RuntimeError("The processes are not in step any more; nothing can be gathered.")
        interrupted: list[Any] = []
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if main else None

        def interrupt(*of: Any) -> None:
            interrupted.append(of)
            if len(interrupted) > 1 and callable(before):
                before(*of)

        if main and before is not None:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        except BaseException:
            self.broken = True
            raise
        finally:
            if main and before is not None:
                signal.signal(signal.SIGINT, before)
        if interrupted and callable(before):
            before(*interrupted[0])


def _times(name: str) -> int:
    """How often processes have met under this name: each run has a place of its own."""
    _met[name] = _met.get(name, 0) + 1
    return _met[name]


def _not_all(how: str) -> str:
    return (
        f"The model is sharded ({how}), and not all processes have begun to watch it within "
        f"{_MEET.total_seconds():.0f} s. No process holds whole weights, so all have to help rank "
        f"0 to gather them. Use the callback or tracer in every process, not only in the first."
    )
