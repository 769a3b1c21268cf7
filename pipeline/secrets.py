"""What the tasks on a cluster find in their environment: secrets by name, and plain variables that are none.

Kubernetes holds the secrets; settings, compiled pipelines, logs and manifests hold their names alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from components.mlflow_server import NEED
from components.settings import Group

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET_WORDS = {
    "APIKEY", "AUTH", "CREDENTIAL", "CREDENTIALS", "KEY", "PASS", "PASSWD", "PASSWORD", "PWD", "SECRET", "TOKEN",
    "WEBHOOK",
}  # fmt: skip
OURS = "PLUMBLINE_"
"""Variables that start like this are set by the pipeline itself; the webhook's address comes from a secret. Whether
MLflow must answer (NEED) is for a person to say."""


def plain(variables: Any) -> Any:
    """The variables themselves. Raises ValueError, which shows no value, for a name or a value that looks secret."""
    for name, value in variables.items() if isinstance(variables, Mapping) else ():
        if not isinstance(name, str) or not VARIABLE.fullmatch(name):
            raise ValueError(f"has {name!r}, which is no name of a variable; accepted: letters, digits and _.")
        if name.startswith(OURS) and name != NEED:
            raise ValueError(f"has {name}; names that start with {OURS} are the pipeline's own: leave it out.")
        if SECRET_WORDS & set(name.upper().split("_")) and not str(value).startswith("/"):
            raise ValueError(
                f"has {name}, which looks like a secret and would be readable in the compiled pipeline; accepted: a "
                f"path of a mounted file. Name the Kubernetes secret in secrets: {{name: ..., env: {{key: {name}}}}}."
            )
        if _names_a_user(str(value)):
            raise ValueError(
                f"has {name}, an address with a user or a password, which would be readable in the compiled pipeline. "
                f"Leave them out and name a Kubernetes secret in secrets: {{name: ..., env: {{key: {name}}}}}."
            )
    return variables


def _names_a_user(text: str) -> bool:
    try:
        return "://" in text and "@" in urlsplit(text).netloc
    except ValueError:  # half an IPv6 address
        return False


def _variables(names: dict[str, str]) -> dict[str, str]:
    for name in names.values():
        if not VARIABLE.fullmatch(name):
            raise ValueError(f"has {name!r}, which is no variable's name; accepted: {{key of the secret: VARIABLE}}.")
    return names


Environment = Annotated[dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]], BeforeValidator(plain)]
"""Variables by name; none that looks like a secret."""
SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
"""The name of a secret in the namespace of the runs."""


class Secret(Group):
    """A secret that lies in the runs' namespace, as variables or as files."""

    name: SecretName
    """Its name in Kubernetes: kubectl create secret generic NAME --from-literal=KEY=..."""
    env: Annotated[dict[str, str], AfterValidator(_variables)] = Field({})
    """The variable for each of its keys: {token: HF_TOKEN}."""
    mount: str = Field("", pattern=r"^$|^(/[A-Za-z0-9._-]+)+$")
    """The folder in which each of its keys is a file: /var/secrets/gcs."""
    tasks: tuple[str, ...] = ()
    """The tasks that get it, sources and notify among them; empty stands for all."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.env) == bool(self.mount):
            raise ValueError("needs one of env ({key: VARIABLE}) and mount (/folder); list it twice for both.")
        if self.mount and "." in self.name:
            raise ValueError(f"is mounted and named {self.name}; Kubeflow names the volume like it, which has no dots.")
        if self.mount.startswith(("/dev", "/proc", "/sys")):
            raise ValueError(f"is mounted at {self.mount}, where the system's own files are; such as /var/secrets/gcs.")
        return self

    def reaches(self, task: str) -> bool:
        """Whether a task gets it."""
        return not self.tasks or task in self.tasks


def contradictions(secrets: Sequence[Secret], environment: Mapping[str, str], tasks: Sequence[str]) -> Iterator[str]:
    """What cannot be done for all of the `tasks`, a sentence each that begins with the key."""
    for number, secret in enumerate(secrets):
        if unknown := set(secret.tasks) - set(tasks):
            yield f"secrets.{number}.tasks has {', '.join(sorted(unknown))}; accepted: {', '.join(tasks)}."
        if twice := set(secret.env.values()) & set(environment):
            yield f"secrets.{number}.env sets {', '.join(sorted(twice))}, and so does environment. Keep one of them."
    for (first, one), (second, other) in combinations(enumerate(secrets), 2):
        if not any(one.reaches(task) and other.reaches(task) for task in tasks):
            continue
        if twice := set(one.env.values()) & set(other.env.values()):
            yield f"secrets.{first} and secrets.{second} both set {', '.join(sorted(twice))}. Keep one of them."
        if one.mount and other.mount and (one.mount == other.mount or one.name == other.name):
            yield (
                f"secrets.{first} and secrets.{second} mount the same secret, or in the same folder. Kubernetes "
                "accepts a secret once in a pod, and one in a folder: keep one of them."
            )
