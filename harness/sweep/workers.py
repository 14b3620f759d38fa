"""The hosts on which trials run concurrently, each with its own server and one trial at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from harness.errors import HarnessError, ServerError
from harness.identity import StageIdentity
from harness.sweep.trial import Driver, Measured, TrialFailed, TrialRequest


class HostLost(ServerError):
    """A host that takes no more trials: its server does not answer, and is external."""


class TrialAborted(HarnessError):
    """A trial that we aborted: it is not recorded."""


class Host:
    """A server and the load generator beside it; use it as a context manager.

    ``open_server`` gives the server, as a context manager; ``open_driver`` what runs trials on it. ``ours``: we may
    restart it after a failed trial.
    """

    def __init__(
        self,
        name: str,
        open_server: Callable[[], AbstractContextManager],
        open_driver: Callable[[object], Driver],
        *,
        ours: bool,
    ):
        self.name, self.ours = name, ours
        self._open_server, self._open_driver = open_server, open_driver
        self._aborted = False

    def __enter__(self) -> Host:
        self._stack = ExitStack()
        self._driver = self._open_driver(self._stack.enter_context(self._open_server()))
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return self._driver.server.url

    @property
    def stages(self) -> tuple[StageIdentity, ...]:
        """What the processes of its server report that they run on."""
        return self._driver.server.stages

    def run(self, request: TrialRequest) -> Measured:
        """Run one trial. Raises TrialFailed, or TrialAborted after ``abort``."""
        try:
            return self._driver.run(request)
        except TrialFailed:
            if self._aborted:
                raise TrialAborted(f"a trial on {self.name} was aborted") from None
            raise

    def recover(self) -> None:
        """After a failed trial: restart our server. Raises HostLost where an external one does not answer."""
        if self.ours:
            self._driver.server.stop()
            self._driver.server = self._stack.enter_context(self._open_server())
        elif not self._driver.server.alive():
            raise HostLost(f"{self.name} no longer answers")

    def abort(self) -> None:
        """Abort the running trial, from another thread."""
        self._aborted = True
        self._driver.abort()


class Fleet:
    """Several hosts; ``lost``: why each lost host was lost. All methods but ``each`` must be called from one thread."""

    def __init__(self, hosts: Sequence[Host]):
        self.hosts, self.lost = list(hosts), []
        self._stopping = threading.Event()

    def __enter__(self) -> Fleet:
        self._stack = ExitStack()
        try:
            for host in self.hosts:
                self._stack.enter_context(host)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def each(self, work: Callable[[Host], bool]) -> None:
        """Call ``work(host)`` on every host concurrently, again and again while it returns True.

        A host whose work raises HostLost gets no more work; when all are lost, the last reason is raised. Any other
        error ends the work of all, after the running trials, and is raised. An interrupt aborts those trials.
        """
        self._stopping.clear()
        if len(self.hosts) == 1:  # in this thread: what a host starts must not end with a pool's thread
            self._keep_working(self.hosts[0], work)
        else:
            self._side_by_side(work)
        if not self.hosts:
            raise HostLost(self.lost[-1])

    def _side_by_side(self, work: Callable[[Host], bool]) -> None:
        with ThreadPoolExecutor(len(self.hosts), thread_name_prefix="host") as pool:
            begun = [pool.submit(self._keep_working, host, work) for host in tuple(self.hosts)]
            try:
                wait(begun, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop_all()
                raise
            self._stopping.set()
        for each in begun:
            each.result()

    def take_lost(self) -> list[str]:
        """Why hosts were lost since the last call."""
        lost, self.lost = self.lost, []
        return lost

    def _keep_working(self, host: Host, work: Callable[[Host], bool]) -> None:
        try:
            while not self._stopping.is_set() and work(host):
                pass
        except HostLost as error:
            self.lost.append(str(error))
            self.hosts.remove(host)

    def _stop_all(self) -> None:
        self._stopping.set()
        for host in self.hosts:
            host.abort()


def on(host: Host, measured: Measured) -> Measured:
    """The trial with the name of the host that it ran on."""
    return replace(measured, trial=replace(measured.trial, target=host.name))
