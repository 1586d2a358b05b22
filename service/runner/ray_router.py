"""Which replica Ray Serve gives a job to: a free one, among those one that has the job's weights or conditioning."""

import random
from collections import defaultdict, deque
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    MultiplexMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from .runner_pool import KEPT

ASKED = 2
"""How many replicas are asked at once whether they are free, if none is known to be."""


class FreeReplicaRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Chooses among the replicas that are free as far as this server knows.

    Ray's own router draws two of all replicas and pauses before it draws again. A replica takes one job at a time: if
    one of eight is free, it draws four times on average.

    Replicas tell all servers which weights they have, as the id of a multiplexed model. Conditionings change too often
    for that: they are ids of sessions, and each server knows those of its own jobs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._kept: defaultdict[ReplicaID, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Ray Serve. Returns groups of replicas, the best group first."""
        weights = conditioning = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # Ray pauses before the next attempt
            weights = pending_request.metadata.multiplexed_model_id
            conditioning = pending_request.metadata.session_id
        free = self.select_available_replicas(candidate_replicas)
        if not free:  # unless another server has left one
            return [random.sample(candidate_replicas, min(ASKED, len(candidate_replicas)))]
        if weights:
            return self.rank_replicas_via_multiplex(free, weights)  # type: ignore[no-any-return]

        def place(replica: RunningReplica) -> tuple[bool, int]:
            kept = self._kept[replica.replica_id]
            return conditioning not in kept, len(kept)

        return [[replica] for replica in sorted(random.sample(free, len(free)), key=place)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Ray Serve when a replica has taken a job."""
        kept, conditioning = self._kept[replica_id], pending_request.metadata.session_id
        if conditioning in kept:
            kept.remove(conditioning)
        kept.append(conditioning)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Ray Serve when replicas have come or gone."""
        super().update_replicas(replicas)
        for gone in self._kept.keys() - self.curr_replicas.keys():
            del self._kept[gone]
