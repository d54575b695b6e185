"""The Hugging Face hub: whether it can be reached, and the local copy of a model."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.request import getproxies

from huggingface_hub import constants

from gptxs.cli import first_line

MODEL_FILES = ["config.json", "model*.safetensors*"]
TOKENIZER_FILES = ["vocab.json", "tokenizer.json", "added_tokens.json"]


def require_hub() -> None:
    """Raise in seconds for what the hub's client would try for minutes: a wrong name or proxy."""
    if constants.HF_HUB_OFFLINE:  # the client reads only its cache
        return
    if not constants.ENDPOINT.startswith(("https://", "http://")):
        raise ValueError(f"HF_ENDPOINT {constants.ENDPOINT} must begin with https://")
    from huggingface_hub import get_session  # takes a moment

    try:
        # As the client itself asks, through proxies and with its certificates; any answer will do.
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # the client's own have no base in common
        # A message must not show a proxy's password.
        proxies = [f"{k.upper()}_PROXY {v.rpartition('@')[2]}" for k, v in getproxies().items()]
        raise ConnectionError(
            f"the hub cannot be reached with HF_ENDPOINT {constants.ENDPOINT} and"
            f" {', '.join(proxies) or 'no proxy'} ({first_line(error)}); HF_HUB_OFFLINE=1 uses what"
            " was downloaded before, and local files need no hub"
        ) from None


def local_folder(source: str | Path) -> Path:
    """A model's folder: ``source`` itself, or the local copy of a hub id such as "gpt2"."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that it is in")
    if not re.fullmatch(r"gpt2(-medium|-large|-xl)?|[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(f"{source}: no such folder, and no hub id such as gpt2")
    from huggingface_hub import errors, snapshot_download  # half a second

    try:
        require_hub()
        return Path(snapshot_download(str(source), allow_patterns=MODEL_FILES + TOKENIZER_FILES))
    except errors.RepositoryNotFoundError:  # also where it is gated or private: `hf auth login`
        raise FileNotFoundError(f"{source}: no such folder, and not (for you) on the hub") from None
    except Exception as error:
        kind = ValueError if isinstance(error, ValueError) else ConnectionError
        raise kind(f"{source}: no such folder, and no download: {first_line(error)}") from None
