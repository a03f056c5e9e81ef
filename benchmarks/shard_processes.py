"""A shard of a simulated cluster in a process of its own."""

import gc
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext

from pomona.core.ids import ReplicaId
from pomona.sim.cluster_config import ClusterConfig
from pomona.sim.population import AdapterPages, AdapterPopulation
from pomona.sim.shard import Ended, Routed, Shard, ShardFigures


def _serve(
    pipe: Connection, config: ClusterConfig, ranks: Sequence[int], rows_per_page: int, replica_ids: list[ReplicaId]
) -> None:
    gc.disable()
    shard = Shard(config, AdapterPopulation(ranks, AdapterPages(rows_per_page)), replica_ids)
    while (order := pipe.recv()) is not None:
        if order == "figures":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            pipe.send(tuple(shard.figures()._replace(peak_rss_bytes=peak)))
            continue
        routed, until_s = order
        shard.begin([Routed(*one) for one in routed], until_s)
        pipe.send([tuple(one) for one in shard.finish()])


class ProcessShard:
    """A ``ShardHost`` whose replicas are elsewhere; ``close`` it."""

    def __init__(
        self,
        context: SpawnContext,
        config: ClusterConfig,
        ranks: Sequence[int],
        rows_per_page: int,
        replica_ids: list[ReplicaId],
    ) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, config, ranks, rows_per_page, replica_ids), daemon=True
        )
        self._process.start()

    def begin(self, routed: Sequence[Routed], until_s: float) -> None:
        self._pipe.send(([tuple(one) for one in routed], until_s))

    def finish(self) -> list[Ended]:
        return [Ended(*one) for one in self._pipe.recv()]

    def figures(self) -> ShardFigures:
        self._pipe.send("figures")
        return ShardFigures(*self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(timeout=10)
