"""What a user of `benchmarks/serving.py` does: post one input after the other, without a pause."""

import itertools
import os
from pathlib import Path

from locust import FastHttpUser, constant, task

BODIES = Path(os.environ["SERVING_BODIES"]).read_text(encoding="utf-8").splitlines()
NEXT = itertools.cycle(BODIES)


class Asking(FastHttpUser):
    """Asks for predictions."""

    wait_time = constant(0)

    @task
    def predict(self) -> None:
        """One request, of the next input."""
        headers = {"Content-Type": "application/json"}
        self.client.post("/v1/predict", data=next(NEXT).encode(), headers=headers)
