"""Where things lie: this user's directories and the data that ships with the package. Creates nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Directories:
    """This user's directories; each exists only once something was written to it."""

    config: Path
    """`config.toml`."""
    data: Path
    """Models, chats: what must not be lost."""
    cache: Path
    """What can be made again: saved KV states."""
    state: Path
    """Prompt history, logs, measurements of this machine."""

    @property
    def config_file(self) -> Path:
        return self.config / "config.toml"

    @property
    def models(self) -> Path:
        """Downloaded models: `<publisher>/<repo>/<file>.gguf`, LM Studio's layout."""
        return self.data / "models"

    @property
    def catalog_file(self) -> Path:
        """The user's own `models.toml`, laid over the shipped one."""
        return self.config / "models.toml"

    @property
    def kv_states(self) -> Path:
        """Saved sequence states of the prefix cache."""
        return self.cache / "kv"


def directories(env: Mapping[str, str] = os.environ) -> Directories:
    """The directories of this user: all under LOCALLLM_HOME where it is set, else where the platform wants them."""
    if home := env.get("LOCALLLM_HOME"):
        root = Path(home).expanduser().absolute()
        return Directories(config=root, data=root, cache=root / "cache", state=root / "state")
    import platformdirs

    user = platformdirs.PlatformDirs("localllm", appauthor=False)
    return Directories(config=user.user_config_path, data=user.user_data_path, cache=user.user_cache_path, state=user.user_state_path)


def package_data(name: str) -> Path:
    """The shipped file `name`, such as `models.toml`: inside an installed package, beside it in a checkout.

    Raises FileNotFoundError: a broken installation.
    """
    for root in (PACKAGE, PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is missing from the installation at {PACKAGE}")
