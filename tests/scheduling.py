"""Which worker of pytest-xdist runs which tests.

Importing torch and diffusers takes most of a worker's collection. So only some workers collect the files that import
them, or another large package; the others collect the rest: tests that wait for servers, engines and programs.
"""

import re
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

HEAVY = re.compile(
    r"(?m)^(?:from|import) (?:torch|diffusers|transformers|references|lease_stages|sparsectrl_lcm\.export)\b"
    r"|^import schemathesis\b|^from .* import ray_replica\b"
)
"""Imports of a test file that load torch, schemathesis or Ray."""
SEPARATE = ("runtime/test_gpu_executor.py", "cli/test_cli.py")
"""Long files whose tests share no slow fixture; their tests are spread over the workers."""

TOGETHER = ("service/page/",)
"""Folders whose tests share servers and a browser; one worker runs all of them."""


def imports_much(path: Path) -> bool:
    """Tells whether a test file loads torch, or another large package, as soon as it is collected."""
    return path.parent.name == "torch_engines" or bool(HEAVY.search(path.read_text()))


def collects_all(worker: str, workers: int) -> bool:
    """Tells whether a worker (`gw0`, `gw1`, ...) collects every file: half of them do, at least two.

    A worker that replaces a crashed one has a number past the others. It collects every file too.
    """
    number = int(worker.removeprefix("gw"))
    return number < max(2, workers // 2) or number >= workers


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Sends a file, or a folder in `TOGETHER`, to one worker; the tests for each exported architecture go apart."""

    def _split_scope(self, nodeid: str) -> str:
        path, _, test = nodeid.partition("::")
        if path.removeprefix("tests/") in SEPARATE:
            return nodeid
        for folder in TOGETHER:
            if path.removeprefix("tests/").startswith(folder):
                return folder
        words = re.split(r"[-\[\]]", test)
        return " ".join([path, *(name for name in ("sd15_like", "other") if name in words)])

    def _check_nodes_have_same_collection(self) -> bool:
        """Compares the workers that collect every file, and puts them first: the first one's tests are all tests."""
        collections = self.registered_collections
        complete = {node: tests for node, tests in collections.items() if self._collects_all(node)}
        self.registered_collections = complete
        same: bool = super()._check_nodes_have_same_collection()
        self.registered_collections = complete | collections
        self.assigned_work = {node: self.assigned_work[node] for node in self.registered_collections}
        return same

    def _assign_work_unit(self, node: WorkerController) -> None:
        """Gives a worker the next file that it has collected; files that few workers have collected come first."""
        if node not in self.registered_collections:  # replaces a crashed worker and has yet to collect
            return
        common = [scope for scope in self.workqueue if self._in_every_collection(scope)]
        rare = [scope for scope in self.workqueue if scope not in common]
        choices = [*rare, *common] if self._collects_all(node) else common
        if not choices:
            node.shutdown()
            return
        self.workqueue.move_to_end(choices[0], last=False)
        super()._assign_work_unit(node)

    def _in_every_collection(self, scope: str) -> bool:
        test = next(iter(self.workqueue[scope]))
        return all(test in tests for tests in self._test_sets())

    def _test_sets(self) -> list[set[str]]:
        if not hasattr(self, "_sets"):
            self._sets = [set(tests) for tests in self.registered_collections.values()]
        return self._sets

    def _collects_all(self, node: WorkerController) -> bool:
        return collects_all(node.gateway.id, self.numnodes)
