"""Which replica a job goes to: Ray's own router with the rule of this package, over stand-ins for replicas."""

import asyncio
from collections.abc import Sequence

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest
from sparsectrl_lcm.service.runner.ray_router import FreeReplicaRouter
from sparsectrl_lcm.service.runner.runner_pool import KEPT

CLIPS = DeploymentID("clips")


class Replica:
    """A replica that says how many jobs it has when it is asked."""

    max_ongoing_requests = 1

    def __init__(self, name: str, jobs: int, weights: str = "") -> None:
        self.replica_id = ReplicaID(name, CLIPS)
        self.jobs = jobs
        self.multiplexed_model_ids = {weights} - {""}
        self.asked = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.asked += 1
        return self.jobs


def job(name: str, conditioning: str, weights: str = "") -> PendingRequest:
    said = {"session_id": conditioning, "multiplexed_model_id": weights}
    return PendingRequest([], {}, RequestMetadata(request_id=name, internal_request_id=name, **said))


def routed(
    replicas: list[Replica],
    conditioning: str,
    *,
    weights: str = "",
    made: Sequence[tuple[str, str]] = (),
    left: Replica | None = None,
) -> str:
    """The name of the replica for a job, once the server knows how many jobs each has; `left` then loses its one.

    `made` has the replicas that took the server's earlier jobs, and the conditionings of these.
    """

    async def main() -> str:
        options = {"handle_source": DeploymentHandleSource.UNKNOWN, "use_replica_queue_len_cache": True}
        router = FreeReplicaRouter(deployment_id=CLIPS, **options)
        router.update_replicas(replicas)
        while not all(replica.asked for replica in replicas):
            await asyncio.sleep(0.01)
        for _ in range(50):  # the answers are noted
            await asyncio.sleep(0)
        for replica in replicas:
            assert replica.asked == 1
            replica.asked = 0
        for name, earlier in made:
            router.on_request_routed(job("earlier", earlier), ReplicaID(name, CLIPS), None)
        if left is not None:
            left.jobs = 0
        async with asyncio.timeout(20):
            chosen = await router._choose_replica_for_request(job("a", conditioning, weights))
        return str(chosen.replica_id.unique_id)

    return asyncio.run(main())


def test_the_only_free_replica_is_taken_at_once() -> None:
    replicas = [Replica(f"busy-{number}", 1) for number in range(7)]
    assert routed([*replicas, Replica("free", 0)], "") == "free"
    assert not any(replica.asked for replica in replicas)


def test_a_free_replica_that_made_the_conditioning_comes_first() -> None:
    replicas = [Replica("busy", 1), *(Replica(name, 0) for name in ("empty", "other", "same"))]
    made = [("busy", "a star"), ("other", "a boat"), ("same", "a star"), ("same", "a tree")]
    assert routed(replicas, "a star", made=made) == "same"
    assert routed(replicas[:3], "a star", made=made[:2]) == "empty"


def test_a_replica_keeps_the_last_conditionings() -> None:
    replicas = [Replica("old", 0), Replica("new", 0)]
    others = [("old", f"{number}") for number in range(KEPT - 1)]
    boat = ("new", "a boat")
    assert routed(replicas, "a star", made=[("old", "a star"), *others, boat]) == "old"
    assert routed(replicas, "a star", made=[("old", "a star"), *others, ("old", "more"), boat]) == "new"
    assert routed(replicas, "a star", made=[("old", "a star"), *others, ("old", "a star"), ("old", "more")]) == "old"


def test_a_free_replica_with_the_weights_comes_first() -> None:
    free = [Replica("own", 0, "-"), Replica("anime", 0, "anime")]
    assert routed([Replica("busy", 1, "anime"), *free], "a star", weights="anime", made=[("own", "a star")]) == "anime"
    assert routed(free, "a star", weights="-", made=[("anime", "a star")]) == "own"


def test_a_replica_that_another_server_has_left_is_found() -> None:
    replicas = [Replica(f"busy-{number}", 1) for number in range(3)]
    assert routed(replicas, "a star", left=replicas[1]) == "busy-1"
