"""The Hugging Face hub: whether it can be reached, and the local copy of a model."""

from __future__ import annotations

import re
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants

from gptxs.cli import first_line

MODEL_FILES = ["config.json", "model*.safetensors*"]
TOKENIZER_FILES = ["vocab.json", "tokenizer.json", "added_tokens.json"]


def require_hub() -> None:
    """Raise in seconds for what the hub's client would try for minutes: a wrong name or proxy."""
    if constants.HF_HUB_OFFLINE:  # the client reads only its cache
        return
    url = urlsplit(constants.ENDPOINT)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"HF_ENDPOINT {constants.ENDPOINT} must begin with https://")
    proxies = urllib.request.getproxies()
    kind = "all" if "all" in proxies and url.scheme not in proxies else url.scheme
    proxy = "" if urllib.request.proxy_bypass(url.hostname) else proxies.get(kind, "")
    proxy = proxy.rpartition("@")[2]  # a message must not show its password
    target = urlsplit(f"//{proxy.rpartition('//')[2]}") if proxy else url
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        # The hub's name has up to four addresses, which are tried one after the other.
        socket.create_connection((target.hostname, port), timeout=4).close()
    except OSError as error:
        raise ConnectionError(
            f"the hub cannot be reached ({error}) with HF_ENDPOINT {constants.ENDPOINT} and"
            f" {kind.upper()}_PROXY {proxy or 'not set'}; HF_HUB_OFFLINE=1 uses what was"
            " downloaded before, and local files need no hub"
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
    except errors.RepositoryNotFoundError:  # private ones too, unless `hf auth login`
        raise FileNotFoundError(f"{source}: no such folder, and not on the hub") from None
    except Exception as error:  # the client's own have no base in common
        kind = ValueError if isinstance(error, ValueError) else ConnectionError
        raise kind(f"{source}: no such folder, and no download: {first_line(error)}") from None
