"""One piece of work at a time beside the main thread, whose error is not lost."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Runs a job in a thread, or at once. An error of the job is raised by the next `check`, `wait` or `run`."""

    def __init__(self) -> None:
        self.given_up = threading.Event()
        """Set once nobody wants the result: a job that waits for others should end."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def run(self, job: Callable[[], None], *, background: bool) -> None:
        """Wait for the job before, then start this one; without `background` it is done on return."""
        self.wait()
        if not background:
            job()
            return
        self._thread = threading.Thread(target=self._work, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def _work(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error

    @property
    def busy(self) -> bool:
        """Whether a job is running."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise the error of a job that has failed."""
        if self._error is not None and not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the job; raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def give_up(self) -> None:
        """Wait for what the job can finish by itself; its error is of no interest beside the one that ends the run."""
        self.given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._error = None
