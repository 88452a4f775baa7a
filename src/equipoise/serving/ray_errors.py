"""What a caller in Ray Serve may have to catch. Not beside the router: Ray copies its module, and so its classes."""

from ray.serve.exceptions import DeploymentUnavailableError


class NoReplicasError(DeploymentUnavailableError):
    """No replica is running; Ray Serve answers HTTP requests with 503."""

    @property
    def message(self) -> str:
        """What happened, and what to do."""
        return f"No replica of {self._deployment_id} is running; try again soon."

    def __str__(self) -> str:
        return self.message


class ReplicaLostError(Exception):
    """The replica that had the request is gone, or gave no sign of life; the request can be sent again."""
