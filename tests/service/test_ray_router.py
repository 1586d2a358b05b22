"""Which replica a job goes to: Ray's own router with the rule of this package, over stand-ins for replicas."""

import asyncio

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest
from sparsectrl_lcm.service.runner.ray_router import FreeReplicaRouter

CLIPS = DeploymentID("clips")


class Replica:
    """A replica that says how many jobs it has when it is asked."""

    max_ongoing_requests = 1

    def __init__(self, name: str, jobs: int, keeps: str = "") -> None:
        self.replica_id = ReplicaID(name, CLIPS)
        self.jobs = jobs
        self.multiplexed_model_ids = {keeps} - {""}
        self.asked = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        return self.jobs


def routed(replicas: list[Replica], conditioning: str, left: Replica | None = None) -> str:
    """The name of the replica for a job, once the server knows how many jobs each has; `left` then loses its one."""

    async def main() -> str:
        options = {"handle_source": DeploymentHandleSource.UNKNOWN, "use_replica_queue_len_cache": True}
        router = FreeReplicaRouter(deployment_id=CLIPS, **options)
        router.update_replicas(replicas)
        await asyncio.sleep(0.05)
        for replica in replicas:
            assert replica.asked == 1
            replica.asked = 0
        if left is not None:
            left.jobs = 0
        job = RequestMetadata(request_id="a", internal_request_id="a", multiplexed_model_id=conditioning)
        async with asyncio.timeout(20):
            chosen = await router._choose_replica_for_request(PendingRequest([], {}, job))
        return str(chosen.replica_id.unique_id)

    return asyncio.run(main())


def test_the_only_free_replica_is_taken_at_once() -> None:
    replicas = [Replica(f"busy-{number}", 1) for number in range(7)]
    assert routed([*replicas, Replica("free", 0)], "") == "free"
    assert not any(replica.asked for replica in replicas)


def test_a_free_replica_that_keeps_the_conditioning_comes_first() -> None:
    free = [Replica("empty", 0), Replica("other", 0, "a boat"), Replica("same", 0, "a star")]
    assert routed([Replica("busy", 1, "a star"), *free], "a star") == "same"
    assert routed([Replica("busy", 1, "a star"), *free[:2]], "a star") == "empty"


def test_a_replica_that_another_server_has_left_is_found() -> None:
    replicas = [Replica(f"busy-{number}", 1) for number in range(3)]
    assert routed(replicas, "a star", left=replicas[1]) == "busy-1"
