"""The ranks of a job, or of a part of it, and their private communicators."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from mpiddl.base.log import logger, name_rank
from mpiddl.base.settings import Settings, read
from mpiddl.base.units import integer
from mpiddl.comm import gpus
from mpiddl.comm.layout import exchange, find_layout
from mpiddl.comm.messages import Messages, Tags
from mpiddl.comm.native import Native
from mpiddl.comm.peer_memory import find_reach
from mpiddl.comm.reporting import begin_reporting
from mpiddl.comm.tuning import Choice, read_choices
from mpiddl.comm.windows import Windows
from mpiddl.errors import LaunchError, NotInitializedError, SettingsError
from mpiddl.launch import launchers, library, offers, pmix
from mpiddl.launch.exit import watch_exits
from mpiddl.launch.processes import refuse_child_process
from mpiddl.launch.threads import share_cores
from mpiddl.observe.activity import waiting

if TYPE_CHECKING:
    import torch
    from mpi4py import MPI

__all__ = ["World", "current_world", "init", "is_running"]

Service = TypeVar("Service")

LANE_BYTES = 4 << 20
"""Shared memory that a rank gives to collectives of buffers that others cannot reach."""


class World:
    """The ranks that train together.

    Holds private duplicates of the communicator it was given, so that its messages never meet
    those of the user or of another library. Made by ``mpiddl.init()`` and ``world.split()``.
    Usable as a context manager; leaving it closes the world.

    Attributes:
        rank: This process among all, ``0 <= rank < size``.
        size: Number of ranks (the world size).
        local_rank: This process among those of its node, in the launcher's order.
        local_size: Ranks on this node.
        node_rank: This node among all, in the order of their lowest ranks.
        num_nodes: Number of nodes.
        hostname: Name of this node.
        device: Where tensors of this rank belong.
        on_gpu: Whether that is a GPU.
        gpu_sharers: The most ranks of the job that use one GPU; 0 without GPUs.
        layout: The four above, and the cores of this rank.
        launch: What the launcher announced.
        settings: The MPIDDL_* settings of rank 0, the same on every rank.
        messages: Byte messages between the ranks.
        tags: Allots the messages' tags.
        native: The MPI library's own collectives.
        windows: Memory that the ranks of this node share.
        reach: The other memory of the ranks of this node; None where the system forbids it.
        tuned: What ``mpiddl tune`` found for these ranks and that kind of device, from small to
            large sizes.
        lane_window: The window through which collectives that users start meet; None without.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        launch: launchers.Launch,
        settings: Settings,
        device: str | torch.device = "cpu",
    ) -> None:
        self._comm = comm.Dup()
        self.native = Native(comm)
        self._bucket_native: Native | None = None
        self.launch = launch
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self.hostname = socket.gethostname()
        self.messages = Messages(self._comm)
        self.tags = Tags()
        self._device = device
        self._at_close: dict[Callable[[World], None], None] = {}
        self._services: dict[Callable[[World], Any], Any] = {}
        self._closed = False
        self._node = _node_of(self._comm)
        self.layout = find_layout(self._comm, self._node, launch.local_rank)
        self.windows = Windows(self._comm, self._node)
        self.lane_window = self.windows.allocate(LANE_BYTES) if self.size > 1 else None
        self.reach = find_reach(self._comm, self._node, settings.single_copy)
        kind = str(device).partition(":")[0]
        self.on_gpu = kind != "cpu"
        self.gpu_sharers = 0
        choices = read_choices(settings.tune, self.layout, kind) if self.rank == 0 else []
        self.tuned = [Choice(*choice) for choice in exchange(self._comm, choices)[0]]
        self.settings = settings

    @property
    def allows_threads(self) -> bool:
        """Whether several threads may call MPI."""
        from mpi4py import MPI

        return MPI.Query_thread() == MPI.THREAD_MULTIPLE

    @property
    def local_rank(self) -> int:
        return self.layout.local_rank

    @property
    def local_size(self) -> int:
        return self.layout.local_size

    @property
    def node_rank(self) -> int:
        return self.layout.node_rank

    @property
    def num_nodes(self) -> int:
        return self.layout.num_nodes

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self._device)

    @waiting()
    def split(self, color: int | None, key: int = 0) -> World | None:
        """The ranks that gave the same ``color``, as a world of their own. Collective.

        Ranks are ordered by ``key``, then by their rank here. ``None`` takes no part and gets it.

        Raises:
            ValueError: ``color`` is negative.
            TypeError: ``color`` or ``key`` is no integer, and would be cut off to one.
        """
        from mpi4py import MPI

        self.check_open()
        key = integer(key, "key")
        color = None if color is None else integer(color, "color")
        if color is not None and color < 0:
            raise ValueError(f"color must not be negative, got {color}; None takes no part")
        part = self._comm.Split(MPI.UNDEFINED if color is None else color, key)
        if color is None:
            return None
        group = World(part, self.launch, self.settings, self._device)
        # The others still want their cores.
        crowded = group.layout.crowded or self.layout.crowded
        group.gpu_sharers = self.gpu_sharers
        group.layout = dataclasses.replace(group.layout, crowded=crowded)
        part.Free()
        return group

    def has_ranks_of(self, comm: MPI.Comm) -> bool:
        """Whether ``comm`` holds the same ranks in the same order."""
        from mpi4py import MPI

        return comm.Compare(self._comm) in (MPI.IDENT, MPI.CONGRUENT)

    @property
    def comms(self) -> tuple[MPI.Comm, MPI.Comm]:
        """All ranks, and those of this node: for what is agreed on while memory is made."""
        return self._comm, self._node

    @property
    def bucket_native(self) -> Native:
        """The MPI library's collectives for gradient buckets. Collective at the first use."""
        if self._bucket_native is None:
            self._bucket_native = Native(self._comm)
        return self._bucket_native

    def check_open(self) -> None:
        """Raise NotInitializedError if the world was closed."""
        if self._closed:
            raise NotInitializedError("this world was closed; call mpiddl.init() again")

    def service(self, make: Callable[[World], Service]) -> Service:
        """Something that belongs to this world and ends with it: ``make(world)``, made at the first
        call."""
        try:
            service: Service = self._services[make]
        except KeyError:
            service = self._services[make] = make(self)
        return service

    def at_close(self, action: Callable[[World], None]) -> None:
        """Call ``action`` with this world before its communicators go, and before all actions that
        are known already; once, if told twice."""
        self._at_close[action] = None

    @waiting()
    def close(self) -> None:
        """Stop what runs on this world and free its communicators. Collective; idempotent."""
        global _current
        if self._closed:
            return
        for action in reversed(list(self._at_close)):
            action(self)
        self._closed = True
        self._services.clear()
        self.lane_window = None
        self._node.Free()
        self._comm.Free()
        self.native.free()
        if self._bucket_native is not None:
            self._bucket_native.free()
        if _current is self:
            offers.withdraw()
            _current = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception the other ranks are not here: a collective close would hang.
        if kind is None:
            self.close()

    def __deepcopy__(self, memo: object) -> World:
        return self  # copies of a model are on the same ranks

    def __repr__(self) -> str:
        names = ("rank", "size", "local_rank", "node_rank", "hostname")
        return f"World({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _node_of(comm: MPI.Comm) -> MPI.Comm:
    """The ranks of ``comm`` that can share memory with this one, in the same order."""
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.Get_rank())


_current: World | None = None


def init(comm: MPI.Comm | None = None, *, device: str | torch.device | None = None) -> World:
    """Join the job: start MPI if nobody has, and return this rank's ``World``.

    Collective over ``comm``. Idempotent: later calls return the same world.

    Args:
        comm: An mpi4py communicator to duplicate; default MPI.COMM_WORLD.
        device: Where tensors of this rank belong; default this rank's GPU where torch sees GPUs
            (local rank modulo their number), else the CPU.

    Raises:
        ValueError: ``device`` does not exist.
        NoMpiError: No MPI library could be loaded.
        SingletonError: The launcher announced several ranks and MPI found one, or it starts no
            MPI (torchrun).
        LaunchError: Called in a data loader's worker or another child process.
        SettingsError: An MPIDDL_* variable is unknown or has a bad value.
    """
    global _current
    refuse_child_process(running=_current is not None)
    if _current is not None:
        if comm is not None and not _current.has_ranks_of(comm):
            raise LaunchError("mpiddl.init() was called before with another communicator")
        return _current
    launch = launchers.read_launch()
    launchers.refuse_launcher_without_mpi(launch)
    # Before MPI starts: it may need the GPU that this rank uses, and keeps the one it finds.
    place = gpus.choose_device(device, launch.local_rank)
    MPI = library.load(launch)
    everyone = MPI.COMM_WORLD
    watch_exits(everyone.Get_rank(), everyone.Get_size(), socket.gethostname(), everyone.Abort)
    name_rank(everyone.Get_rank())
    name = library.library_name(MPI.Get_library_version())
    launchers.refuse_singleton(launch, everyone.Get_size(), name)
    if comm is None:  # whoever has one has sent messages already
        pmix.fence()
    settings = _settings_of_first(comm or everyone)
    world = World(comm or everyone, launch, settings, place)
    world.gpu_sharers = gpus.sharing(exchange(world._comm, gpus.identity(place)), world.layout)
    gpus.report(world.gpu_sharers, world.rank)
    if launch.local_rank not in (None, world.local_rank) and world.size == everyone.Get_size():
        logger.warning(
            "%s announced local rank %d, but those of this node are not 0 to n-1: it is %d",
            launch.launcher,
            launch.local_rank,
            world.local_rank,
        )
    begin_reporting(world._comm, world.layout, world.messages, world.windows, settings)
    share_cores(world.layout.cores, world.layout.sharers)
    if settings.offer_rank:
        offers.offer(world.rank, world.size, world.local_rank)
    _current = world
    return world


def _settings_of_first(comm: MPI.Comm) -> Settings:
    """Rank 0's settings, or its error, on every rank.

    Ranks that chose differently, or of which one gave up, would wait for each other for ever.
    """
    problem = None
    try:
        settings = read(os.environ)
    except SettingsError as error:
        settings, problem = Settings(), str(error)
    values, problem = exchange(comm, [dataclasses.asdict(settings), problem])[0]
    if problem is not None:
        raise SettingsError(problem)
    return Settings(**values)


def is_running() -> bool:
    """Whether ``init()`` has succeeded in this process."""
    return _current is not None


def current_world() -> World:
    """The world that ``mpiddl.init()`` made.

    Raises:
        NotInitializedError: There is none.
    """
    if _current is None:
        raise NotInitializedError("call mpiddl.init() first, on every rank")
    return _current
