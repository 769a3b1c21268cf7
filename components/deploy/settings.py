"""Settings of the deploy step."""

from typing import Literal

from pydantic import Field

from components.settings import Group, StepSettings


class KServe(Group):
    """The InferenceService of target kserve."""

    namespace: str = Field("plumbline", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    """The Kubernetes namespace it lives in."""
    service: str = Field("", pattern=r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$", max_length=63)
    """Its name; empty takes the model's name."""
    image: str = Field("plumbline/serve:0.1.0", min_length=1)
    """The image that holds `plumbline serve`."""
    service_account: str = ""
    """The service account that may read the registry's bucket; empty takes the namespace's default."""
    min_replicas: int = Field(1, ge=0)
    """Pods that always run; 0 lets the service sleep when nobody asks."""
    gpus: int = Field(0, ge=0)
    """GPUs of a pod."""
    cpu: str = Field("4", pattern=r"^[0-9]+(\.[0-9]+)?m?$")
    """CPU cores of a pod as Kubernetes writes them: 4, 0.5 or 500m."""
    memory: str = Field("16Gi", pattern=r"^[0-9]+(\.[0-9]+)?(E|P|T|G|M|K|Ei|Pi|Ti|Gi|Mi|Ki)?$")
    """Memory of a pod as Kubernetes writes it: 64Gi."""
    wait_s: int = Field(900, ge=0)
    """Seconds to wait until the service answers with the new version; 0 does not wait."""


class DeploySettings(StepSettings):
    """Where a published version is served."""

    target: Literal["local", "kserve"] = "local"
    """local: the folder that `plumbline serve` watches; kserve: a Kubernetes cluster."""
    serving_dir: str = Field("serving", min_length=1)
    """Target local: that folder."""
    kserve: KServe = KServe()
    """Target kserve: the service."""
