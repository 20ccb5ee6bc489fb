"""Uploading an exported folder to the Hugging Face hub.

The token is the hub library's affair (HF_TOKEN, or what ``hf auth login`` keeps): it is never read
into a message, a file or an argument here.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from llmrec.encoders.loading import hub_failures
from llmrec.errors import UsageError

KINDS = {"encoder": "model", "items": "dataset"}
"""What the hub calls an export of each kind."""


def check_destination(name: str) -> None:
    """Refuse early what an upload would end with.

    Raises:
        UsageError: The name is not USER/NAME, or there is no token.
    """
    try:
        validate_repo_id(name)
        whole = name.count("/") == 1
    except HFValidationError:
        whole = False
    if not whole:
        raise UsageError(f"--push_to_hub={name} is not of the form USER/NAME.")
    if not huggingface_hub.get_token():
        raise UsageError(
            "--push_to_hub needs a token that may write: set HF_TOKEN, or run `hf auth login`."
        )


def push(folder: Path, name: str, what: str, public: bool) -> str:
    """Upload all files of a folder; returns the address.

    Args:
        folder: a finished export.
        name: USER/NAME; made where it is not there.
        what: encoder (becomes a model) or items (a data set).
        public: whether a new one is seen by everybody.

    Raises:
        UsageError: The hub refuses or is not reached; or `name` is there and public, unasked.
    """
    kind = KINDS[what]
    try:
        address = huggingface_hub.create_repo(
            name, private=not public, repo_type=kind, exist_ok=True
        )
        if not public and not huggingface_hub.repo_info(name, repo_type=kind).private:
            raise UsageError(
                f"--push_to_hub={name} is there already and public. Name another, or say --public."
            )
        huggingface_hub.upload_folder(
            repo_id=name, folder_path=folder, repo_type=kind, commit_message="Exported by llmrec"
        )
    except hub_failures() as error:
        # The hub's own words may repeat a request, so only its kind and number are shown.
        number = f" {error.response.status_code}" if isinstance(error, HfHubHTTPError) else ""
        raise UsageError(
            f"{folder} could not be uploaded to {name} ({type(error).__name__}{number}). It is "
            f"whole on disk: check token and network, then run hf upload {name} {folder} "
            f"--repo-type {kind}."
        ) from error
    return str(address)
