"""The Ray Serve application of the replicas: of several servers that start at once, one deploys it.

Also what its replicas publish for all servers in Ray's key-value store, which answers while all of them are busy.
"""

import json
from typing import Any

from .ray_cluster import needs_of

NAMESPACE = "sparsectrl-lcm"
"""Of the actors and keys in the cluster."""
DEPLOY_SECONDS = 300.0
"""Longest wait for a deployment to be accepted, which may have to wait for those of other servers."""


class Deployer:
    """An actor that deploys for all servers of a cluster, one after the other."""

    def deploy(self, name: str, replicas: tuple[int, int], gpus: float, setup: dict[str, Any]) -> None:
        """Deploys an application unless it is there.

        Args:
            name: of the application.
            replicas, gpus, setup: as `RayPool` takes them.
        """
        from ray import serve
        from ray.serve.config import RequestRouterConfig

        if name in serve.status().applications:
            return
        from .ray_replica import ClipReplica
        from .ray_router import FreeReplicaRouter

        low, high = replicas
        deployment = serve.deployment(
            ClipReplica,
            name="clips",
            logging_config={"enable_access_log": False},
            max_ongoing_requests=1,
            ray_actor_options=needs_of(gpus, setup["options"]["threads"]),
            health_check_period_s=5,
            request_router_config=RequestRouterConfig(request_router_class=FreeReplicaRouter),
            autoscaling_config={
                "min_replicas": low,
                "max_replicas": high,
                "target_ongoing_requests": 1,
                "upscale_delay_s": 1,
                "downscale_delay_s": 60,
            },
        )
        target = serve.RunTarget(deployment.bind(**setup), name=name, route_prefix=None)
        serve.run_many([target], wait_for_applications_running=False)


def deploy_once(ray: Any, *application: Any) -> None:
    """Has the one deployer of the cluster deploy an application, as `Deployer.deploy` takes it. Blocks.

    The deployer ends with the server that started it. Then the calls of others fail, and find the application later.
    """
    one = {"name": "deployer", "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0}
    deployer = ray.remote(Deployer).options(**one).remote()
    ray.get(deployer.deploy.remote(*application), timeout=DEPLOY_SECONDS)


def publish_about(name: str, about: dict[str, Any]) -> None:
    """Publishes what the replicas of an application run, as `Runner.about` describes it. Blocks."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(name, json.dumps(about), namespace=NAMESPACE)


def published_about(name: str) -> dict[str, Any]:
    """Returns what a replica of an application has published; empty until one has loaded. Blocks."""
    from ray.experimental import internal_kv

    return json.loads(internal_kv._internal_kv_get(name, namespace=NAMESPACE) or "{}")  # type: ignore[no-any-return]
