"""Where the processes of a run meet before anything else: at the address of rank 0, each with a card.

A card says where its process stands, on which host, and what it is about to run. Rank 0 reads all of them and tells
everybody what it found, so that a mistake ends all processes with the same words: two with one rank, nodes of unequal
size, another configuration or version on one node. Only then are collectives made. While it waits, a process says for
whom and at which address; every few seconds, so that a log tells what a run hangs on.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from dlcm_lightning import __version__
from dlcm_lightning.cluster.world import World
from dlcm_lightning.compose import differences_of
from dlcm_lightning.config import Config
from dlcm_lightning.errors import RunError
from dlcm_lightning.ops.collectives import COLLECTIVE_TIMEOUT, ControlGroup

FIRST_WORD_SECONDS, WORD_SECONDS, POLL_SECONDS = 5.0, 15.0, 0.1
READING = timedelta(seconds=10)
SHOWN = 8
NOT_COMPARED = ("train.devices", "train.nodes", "data.root", "data.workers")
"""Of the configuration: how many processes there are is on the cards, and shards may lie elsewhere on each node."""


@dataclass(frozen=True)
class Card:
    """What a process says of itself."""

    rank: int
    size: int
    host: str
    local_rank: int | None
    local_size: int | None
    node: int | None
    versions: str
    config: dict[str, Any]

    @property
    def words(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def place(self) -> tuple[str, int | None]:
        """Its node: a host, and a number where its launcher gives one, since nodes may be tried out on one host."""
        return self.host, self.node


def meet(world: World, config: Config, distributed: bool) -> tuple[World, ControlGroup]:
    """The world as it is known when all have met, and their control group. distributed: whether one process alone needs
    a process group, too. RunError: somebody does not come, or what comes does not belong together."""
    if world.size == 1 and not distributed:
        return world, ControlGroup()
    patience = timedelta(minutes=config.job.start_minutes)
    store = PrefixStore(f"dlcm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _store(world, patience))
    card = Card(world.rank, world.size, socket.gethostname(), world.local_rank, world.local_size,
                world.node, f"dlcm_lightning {__version__}, torch {torch.__version__}", asdict(config))
    if store.add(f"here/{world.rank}", 1) > 1:
        raise RunError(f"{card.words}: another process has come to {_place(world)} with this rank before; is another "
                       "run meeting there (then set MASTER_PORT), or are RANK and WORLD_SIZE left over in a shell?")
    store.set(f"card/{world.rank}", json.dumps(asdict(card)))
    if world.rank == 0:
        cards, missing = _all_cards(store, world, patience)
        objection = missing or _objection(cards)
        store.set("verdict", json.dumps([objection, [] if objection else _local_places(cards)]))
    objection, places = json.loads(_waited_for(store, "verdict", patience))
    store.set(f"read/{world.rank}", "")
    if objection:
        if world.rank == 0:
            _wait_for_readers(store, [card.rank for card in cards])
        raise RunError(objection)
    local_rank, local_size = places[world.rank]
    world = replace(world, local_rank=local_rank, local_size=local_size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=PrefixStore("groups", store), rank=world.rank, world_size=world.size,
                            timeout=COLLECTIVE_TIMEOUT)
    return world, ControlGroup()


def leave_group() -> None:
    """The process group is no more, where there was one. Not after an error on a GPU: taking it down waits for what the
    device has to do, and so for peers that may have left."""
    if dist.is_available() and dist.is_initialized() and not (torch.cuda.is_initialized() and sys.exc_info()[0]):
        dist.destroy_process_group()


def _place(world: World) -> str:
    return f"{world.address}:{world.port}"


def _store(world: World, patience: timedelta) -> Store:
    """Rank 0 serves it, unless torchrun does."""
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and world.launcher == "torchrun"
    alone = world.size == 1 and not served
    with _saying(lambda: f"{world.here} waits for rank 0 at {_place(world)}"):
        try:
            return TCPStore(world.address, 0 if alone else world.port, None, world.rank == 0 and not served,
                                 patience, wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            raise RunError(f"{world.here}: no meeting at {_place(world)} ({str(error).partition(chr(10))[0]}); correct "
                           "MASTER_ADDR, or choose another MASTER_PORT where that one is in use") from error


@contextlib.contextmanager
def _saying(words: Callable[[], str]) -> Iterator[None]:
    """Says them again and again for as long as it takes."""
    done = threading.Event()
    began = time.monotonic()

    def speak() -> None:
        pause = FIRST_WORD_SECONDS
        while not done.wait(pause):
            pause = WORD_SECONDS
            print(f"{words()}, {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _all_cards(store: Store, world: World, patience: timedelta) -> tuple[list[Card], str]:
    """The cards that have come, and what there is to say where some have not."""
    missing = list(range(world.size))
    said = ""
    deadline = time.monotonic() + patience.total_seconds()
    with _saying(lambda: f"{world.here} waits at {_place(world)} for {_listed(missing)}"):
        while missing and not said:
            missing = [rank for rank in missing if not store.check([f"card/{rank}"])]
            if missing and time.monotonic() > deadline:
                said = (f"{_listed(missing)} did not come to {_place(world)} within "
                        f"{patience.total_seconds() / 60:g} minutes (job.start_minutes); see their logs")
            elif missing:
                time.sleep(POLL_SECONDS)
    come = sorted(set(range(world.size)) - set(missing))
    return [Card(**json.loads(store.get(f"card/{rank}"))) for rank in come], said


def _wait_for_readers(store: Store, ranks: Sequence[int]) -> None:
    """Rank 0 may serve the store: who leaves first takes its words along."""
    with contextlib.suppress(RuntimeError):  # one that died in between is not waited for any longer
        store.wait([f"read/{rank}" for rank in ranks], READING)


def _listed(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:SHOWN]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}" + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")


def _waited_for(store: Store, key: str, patience: timedelta) -> bytes:
    """Behind the server's own patience, whose error says more."""
    try:
        store.wait([key], patience + timedelta(seconds=60))
        return bytes(store.get(key))
    except RuntimeError as error:
        raise RunError(f"rank 0 has left before all had met ({str(error).partition(chr(10))[0]}); see what it said"
                       ) from error


def _objection(cards: Sequence[Card]) -> str:
    """Why these processes are not those of one run, or nothing."""
    first = cards[0]
    nodes = Counter(card.place for card in cards)
    for card in cards:
        for what, mine, firsts in (("says that there are", f"{card.size} processes", f"{first.size} processes"),
                                   ("runs", card.versions, first.versions)):
            if mine != firsts:
                return f"{card.words} {what} {mine}, {first.words} {firsts}; start all of them in the same way"
        if fields := [name for name in differences_of(first.config, card.config) if name not in NOT_COMPARED]:
            return (f"{card.words} was given another configuration than {first.words}: {', '.join(fields[:SHOWN])}; "
                    "start all of them with the same run file and overrides")
        if card.local_size is not None and card.local_size != nodes[card.place]:
            return (f"{card.words} says that its node has {card.local_size} processes, {nodes[card.place]} have come "
                    "from there; start as many on every node, or set LOCAL_WORLD_SIZE")
    if len(set(nodes.values())) > 1:
        return (f"{', '.join(f'{count} on {host}' for (host, _), count in nodes.most_common(SHOWN))}: every node needs "
                "as many processes as the others")
    places = {(card.place, card.local_rank): card for card in cards if card.local_rank is not None}
    for card in cards:
        if card.local_rank is not None and places[card.place, card.local_rank] is not card:
            other = places[card.place, card.local_rank]
            return (f"ranks {card.rank} and {other.rank} on {card.host} both say LOCAL_RANK = {card.local_rank}; give "
                    "each process of a node its own")
    return ""


def _local_places(cards: Sequence[Card]) -> list[tuple[int, int]]:
    """(local rank, processes of the node) of every rank; where nobody has said, in the order of ranks on a host."""
    nodes = Counter(card.place for card in cards)
    seen: Counter[tuple[str, int | None]] = Counter()
    found = []
    for card in cards:
        found.append((seen[card.place] if card.local_rank is None else card.local_rank, nodes[card.place]))
        seen[card.place] += 1
    return found
