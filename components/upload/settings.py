"""Settings of the upload step."""

from pydantic import Field

from components.settings import StepSettings


class UploadSettings(StepSettings):
    """Where a model that passed is published."""

    registry: str = Field("models", min_length=1)
    """Local folder or gs:// address that holds every model's versions."""
    name: str = Field("plumbline", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)
    """The model's name, in the registry and towards clients: lower case, digits and dashes."""
