"""The Ray Serve application of the replicas: of several servers that start at once, one deploys it."""

from typing import Any

from .ray_cluster import needs_of

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

        if name in serve.status().applications:
            return
        from .ray_replica import ClipReplica

        low, high = replicas
        deployment = serve.deployment(
            ClipReplica,
            name="clips",
            logging_config={"enable_access_log": False},
            max_ongoing_requests=1,
            ray_actor_options=needs_of(gpus, setup["options"]["threads"]),
            health_check_period_s=5,
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
    one = {"name": "deployer", "namespace": "sparsectrl-lcm", "get_if_exists": True, "num_cpus": 0}
    deployer = ray.remote(Deployer).options(**one).remote()
    ray.get(deployer.deploy.remote(*application), timeout=DEPLOY_SECONDS)
