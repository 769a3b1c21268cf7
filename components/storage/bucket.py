"""A bucket of Cloud Storage: what is in it, one object at a time, and what Google says when it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from components.errors import InputError
from components.storage import patience
from components.storage.addresses import GS, bucket_and_name
from components.storage.checksum import bytes_crc32c
from components.storage.patience import Patience, is_transient, reason

MARK = "plumbline-write"


class Overtaken(InputError):
    """Another process wrote there since it was looked at."""

    def __init__(self, address: str) -> None:
        super().__init__(f"{address}: another process wrote it meanwhile. Look at what is there, then try again.")


@dataclass(frozen=True)
class Stored:
    """An object as the store states it."""

    name: str
    generation: int
    """Changes whenever the object is written; 0 is that of an object that is not there."""
    size: int
    """In bytes, as they are stored."""
    crc32c: str
    zipped: bool
    """Whether it was stored gzipped by whoever wrote it (Content-Encoding), which its name does not say."""
    mark: str = ""
    """What its writer called this one write, so that one whose answer was lost is known for what it is."""

    @classmethod
    def of(cls, blob: Any) -> "Stored":
        """What google's object says after it was listed, asked for or written."""
        zipped, mark = blob.content_encoding == "gzip", (blob.metadata or {}).get(MARK, "")
        return cls(blob.name, int(blob.generation), int(blob.size), blob.crc32c or "", zipped, mark)


@dataclass(frozen=True)
class Bucket:
    """One bucket, asked with patience."""

    place: Any
    """google's bucket."""
    patience: Patience

    def address(self, name: str) -> str:
        """The object's gs:// address."""
        return f"{GS}{self.place.name}/{name}"

    def find(self, name: str) -> Stored | None:
        """The object of that name, or None."""
        blob = self.patience.insist(
            lambda: self.place.get_blob(name, retry=None, timeout=self.patience.timeout), self.address(name)
        )
        return None if blob is None else Stored.of(blob)

    def listed(self, prefix: str) -> list[Stored]:
        """The object of that name and those in the folder of that name, in order."""

        def attempt() -> list[Any]:
            return list(self.place.list_blobs(prefix=prefix, retry=None, timeout=self.patience.timeout))

        blobs = self.patience.insist(attempt, self.address(prefix))
        return [Stored.of(blob) for blob in blobs if _belongs(blob.name, prefix)]

    def read(self, found: Stored) -> bytes:
        """The content of a small object. Raises google's NotFound when it was replaced or removed since."""
        blob = self.place.blob(found.name, generation=found.generation)

        def attempt() -> bytes:
            content: bytes = blob.download_as_bytes(
                raw_download=True, checksum=None, retry=None, timeout=self.patience.timeout
            )
            if bytes_crc32c(content) != found.crc32c:
                raise ConnectionError("what arrived has another crc32c than the object")
            return content

        return self.patience.insist(attempt, self.address(found.name))

    def delete(self, found: Stored) -> None:
        """Delete an object; one that is gone already is no error. Raises Overtaken if it was written again since."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        def attempt() -> None:
            # by name: a delete that names the generation in its address would also take it from a bucket's history
            self.place.delete_blob(
                found.name, if_generation_match=found.generation, retry=None, timeout=self.patience.timeout
            )

        try:
            self.patience.insist(attempt, self.address(found.name))
        except NotFound:
            return
        except PreconditionFailed:
            raise Overtaken(self.address(found.name)) from None


@contextmanager
def opened(address: str) -> Iterator[tuple[Bucket, str]]:
    """The bucket and the object name of a gs:// address; what Google refuses meanwhile is an InputError."""
    bucket, name = bucket_and_name(address)
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
    from requests.exceptions import RequestException  # type: ignore[import-untyped]
    from urllib3.exceptions import HTTPError

    try:
        client = storage.Client()
        place = client.bucket(bucket)
    except (OSError, ValueError, GoogleAuthError) as error:  # OSError: no project; ValueError: no bucket's name
        raise refusal(address, error) from None
    try:
        yield Bucket(place, patience.PATIENCE), name
    except (GoogleAPIError, GoogleAuthError, RequestException, HTTPError, ConnectionError, TimeoutError) as error:
        raise refusal(address, error) from None
    finally:
        client.close()


def refusal(address: str, error: Exception) -> InputError:
    """What Google says about the address, and what to do about it."""
    from google.api_core import exceptions
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, RefreshError, TransportError
    from urllib3.exceptions import HTTPError

    sign_in = "Sign in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS."
    moves: dict[type[Exception], str] = {
        DefaultCredentialsError: sign_in,
        RefreshError: sign_in,
        TransportError: "Check the network, then try again.",
        exceptions.Unauthorized: sign_in,
        exceptions.NotFound: "Create the bucket or correct the address.",
        exceptions.Forbidden: "Allow this account to read and write objects there, or sign in with another one.",
        exceptions.BadRequest: "Correct the address.",
        exceptions.GoogleAPIError: "Try again later.",
        GoogleAuthError: sign_in,
        ValueError: "Correct the address.",
        HTTPError: "Check the network, then try again.",
        OSError: "Check the network and the setup of Google Cloud (GOOGLE_CLOUD_PROJECT), then try again.",
    }
    move = next((move for kind, move in moves.items() if isinstance(error, kind)), "")
    tried = f" (tried for {patience.PATIENCE.total_s:.0f} s)" if is_transient(error) else ""
    return InputError(f"{address}: {reason(error)}{tried}. {move}".rstrip())


def _belongs(name: str, prefix: str) -> bool:
    """Whether an object is the one asked for or lies in the folder asked for.

    Neither a name-alike beside it, nor the empty object ending in a slash by which consoles mark a folder.
    """
    return name == prefix or (name.startswith(prefix + "/") and not name.endswith("/"))
