"""Which replica Ray Serve gives a job to: a free one, among those one that has the job's weights or conditioning."""

import random

from ray.serve.request_router import FIFOMixin, MultiplexMixin, PendingRequest, RequestRouter, RunningReplica

ASKED = 2
"""How many replicas are asked at once whether they are free, if none is known to be."""


class FreeReplicaRouter(FIFOMixin, MultiplexMixin, RequestRouter):
    """Chooses among the replicas that are free as far as this server knows.

    Ray's own router draws two of all replicas and pauses before it draws again. A replica takes one job at a time: if
    one of eight is free, it draws four times on average.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Called by Ray Serve. Returns groups of replicas, the best group first."""
        needed = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # Ray pauses before the next attempt
            needed = pending_request.metadata.multiplexed_model_id
        free = self.select_available_replicas(candidate_replicas)
        if not free:  # unless another server has left one
            return [random.sample(candidate_replicas, min(ASKED, len(candidate_replicas)))]
        return self.rank_replicas_via_multiplex(free, needed)  # type: ignore[no-any-return]
