"""Models by their names on Hugging Face's hub, ``hf:owner/name`` or ``hf:owner/name@revision``.

Of a repository only weights as safetensors, configs and the files of tokenizers are downloaded, so that nothing is ever
unpickled. What has been downloaded once is found without a network, in the cache of ``huggingface_hub``.
"""

from __future__ import annotations

import re
from pathlib import Path

from speechkit.pretrained.weights import holds_weights

PREFIX = "hf:"
NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
TOKENIZERS = ("vocab.*", "tokenizer*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
FILES = ("*.safetensors", "*.safetensors.index.json", "*config.json", *TOKENIZERS)


def fetch(name: str, *, local: bool = False) -> Path:
    """The folder of a model, downloaded where the cache has not got it.

    Args:
        name: ``hf:owner/name``, of a revision other than main ``hf:owner/name@revision``.
        local: ask no network. ``HF_HUB_OFFLINE=1`` in the environment does so too, and ``speechkit --local``.

    Raises:
        ValueError: where the name is none, there is no such model, it has no safetensors, or it is not in the cache and
            the hub cannot be reached.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"A model on the hub must be named hf:owner/name or hf:owner/name@revision, but is {name!r}.")
    folder = _snapshot(name, match[1], match[2], local)
    if not holds_weights(folder):
        raise ValueError(
            f"{name} must have its weights as safetensors, but has none; choose a revision that has them (the hub's "
            f"own conversion is often {PREFIX}{match[1]}@refs/pr/1), or convert them where you trust their author."
        )
    return folder


def _snapshot(name: str, model: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*FILES], local_files_only=local))
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"{name} must be a model that the hub has and lets you read, but is not ({type(error).__name__}); check "
            f"its name, or log in with: hf auth login"
        ) from error
    except Exception as error:  # whatever a network, its proxies and the disk come to
        asked = "the network was not asked" if local else f"the hub cannot be reached ({type(error).__name__})"
        raise ValueError(
            f"{name} must be in the local cache or on a hub that can be reached, but is not in "
            f"{constants.HF_HUB_CACHE}, and {asked}; load it once where there is a network, set HF_HOME to a cache "
            f"that has it, or name a folder with its files."
        ) from error
