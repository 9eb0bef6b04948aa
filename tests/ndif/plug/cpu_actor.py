"""Model actors of NDIF that compute on the CPU; runs in the server's environment."""

from functools import partial
from typing import Any

import ray
import torch
from ndif.services.ray.deployments.modeling.base import BaseModelDeployment
from ndif.services.ray.sandbox import host
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel

# A sandbox builds the model without weights before it answers: on a machine without a network it
# would ask the hub first, and on a small one that is busy half a minute is not enough.
host.RUNNER_ENV += ("HF_HUB_OFFLINE",)
host.spawn = partial(host.spawn, timeout=180.0)


class _OnCpu:
    # A model that is parked in memory already lies where it computes.
    CACHEABLE = False

    def load_from_disk(self) -> HuggingFaceModel:
        """Load as the actor does, without the cards that it would spread the weights over."""
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model

    def cleanup(self) -> None:
        """Clean up without waiting for a card, which raises where there is none."""
        torch.cuda.synchronize = lambda *_args, **_options: None
        super().cleanup()


@ray.remote(num_cpus=1, max_restarts=0)
class TrustedActor(_OnCpu, BaseModelDeployment):
    """Runs requests in the process that holds the model."""


@ray.remote(num_cpus=1, max_restarts=0)
class SandboxActor(_OnCpu, SandboxModelDeployment):
    """Runs requests in a process that holds no weights."""

    async def run(self, request: Any) -> Any:
        """Run as for a key that is not trusted: a server without accounts trusts everybody."""
        request.trusted = False
        return await super().run(request)
