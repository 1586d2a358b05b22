"""Tells early whether a source that is no folder is on the Hugging Face hub: the loaders try for a minute."""

from functools import cache
from pathlib import Path

TIMEOUT = 10
"""Seconds for the hub's answer."""


@cache
def fault_of_hub_name(name: str) -> str:
    """Says why a model cannot come from the hub or its cache on this machine; empty if nothing speaks against it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        return ""
    fault = ""
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except GatedRepoError:
        pass  # the loader says how to get access
    except (RepositoryNotFoundError, HFValidationError):
        fault = "there is no such folder, and no such model on the hub"
    except HfHubHTTPError:
        pass  # a mirror may know only files
    except OfflineModeIsEnabled:
        fault = "there is no such folder, and HF_HUB_OFFLINE turns the hub off"
    except Exception:  # of the HTTP client, which is another one in each major version
        fault = "there is no such folder, and the hub cannot be reached"
    return fault
