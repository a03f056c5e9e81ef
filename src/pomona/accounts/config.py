"""Settings of accounts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pomona.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AccountsConfig:
    """Settings of accounts.

    Raises:
        ConfigError: a value is out of range.
    """

    data_dir: Path
    """Folder of the journal, and of the database unless it has a URL."""
    database_url: str | None = None
    """``postgresql://...``; None is a SQLite file in ``data_dir``."""
    when_database_is_down: Literal["answer", "refuse"] = "answer"
    """Go on with the keys that are known and journal the usage, or refuse requests until it is back."""
    revision_poll_s: float = 0.5
    """A change made by one server process is known to all others after at most this long, plus one query."""
    key_cache_size: int = 10_000
    """Keys that are remembered, and unknown keys that are remembered as unknown: each at most this many."""
    known_key_ttl_s: float = 60.0
    """A key is looked up again after this long even if nothing seems to have changed."""
    unknown_key_ttl_s: float = 5.0
    """An unknown key is looked up again after this long."""
    max_outage_s: float = 3600.0
    """With "answer": known keys are accepted for so long without the database."""
    max_file_bytes: int = 200 * 2**20
    """Largest file that a tenant may upload."""
    max_tenant_file_bytes: int = 10 * 2**30
    """All files of a tenant together, those that its batches have written included; each counts 4 KiB more."""
    batch_concurrency: int = 16
    """Requests of one batch in flight at once."""
    max_journal_bytes: int = 2**30
    """Usage that waits for the database; past this, requests are refused."""

    def __post_init__(self) -> None:
        """Refuse what could not work."""
        if self.database_url is not None and not self.database_url.startswith(("postgresql", "postgres", "sqlite")):
            raise ConfigError("database_url: must begin with postgresql:// or sqlite:///")
        for name in ("revision_poll_s", "key_cache_size", "known_key_ttl_s", "max_journal_bytes"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: must be positive")

    def make_data_dir(self) -> None:
        """Make the folder, if it is not there.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(
                f"data_dir {str(self.data_dir)!r}: cannot be made: {error.strerror}; name another folder"
            ) from error

    @property
    def url(self) -> str:
        """The database's URL for SQLAlchemy, driver included."""
        url = self.database_url
        if url is None:
            return f"sqlite:///{self.data_dir / 'accounts.db'}"
        scheme, _, rest = url.partition("://")
        return f"postgresql+psycopg://{rest}" if scheme in ("postgres", "postgresql") else url
