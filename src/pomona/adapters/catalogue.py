"""Catalogue: which adapter each name means now. Bookkeeping only: no files, no locks, no weights; its owner (the
server) calls it from one thread, one operation per name at a time: after staging, before unloading.
"""

import enum
import re
from dataclasses import dataclass, replace

from pomona.core.adapter import AdapterInfo
from pomona.core.errors import InvalidRequestError, ModelNotFoundError
from pomona.core.ids import AdapterId, TenantId

MAX_NAME_CHARS = 128
_NAME = re.compile(rf"[A-Za-z0-9._/-]{{1,{MAX_NAME_CHARS}}}")


class AdapterState(enum.StrEnum):
    """What a name can be used for now."""

    LOADING = "loading"
    """Its first version is being read; requests for it are not found yet."""
    READY = "ready"
    """Requests may use it; where its weights are is another matter."""
    DRAINING = "draining"
    """Being unloaded: running requests finish, new ones are not found."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One name, and the adapter it means now."""

    name: str
    source: str
    state: AdapterState
    version: int
    """1 for the first adapter under this name since start, then 2, ...; 0 while the first is loading."""
    info: AdapterInfo | None
    """None until the first version has been read."""
    owner: TenantId | None = None
    """None: everybody may use it."""
    expected_id: AdapterId | None = None
    """What the source must hold when it is read again; None takes what is found, as a new version."""


class Catalogue:
    """Names of adapters of one base model.

    Invariant: ``adapter_ids`` is exactly the set of ids of entries that have an info.
    """

    def __init__(self, base_name: str) -> None:
        """Create an empty catalogue beside the base model's own name."""
        self.base_name = base_name
        self._entries: dict[str, CatalogueEntry] = {}
        self._names: dict[AdapterId, set[str]] = {}

    def validate_name(self, name: str) -> None:
        """Check that an adapter may be called so.

        Raises:
            InvalidRequestError: field ``name``.
        """
        if not _NAME.fullmatch(name):
            shown = name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "..."
            raise InvalidRequestError.out_of_range(
                "name", shown, f"1 to {MAX_NAME_CHARS} of a to z, A to Z, 0 to 9, '.', '_', '-' and '/'"
            )
        if any(part in ("", ".", "..") for part in name.split("/")):
            # Clients rewrite such parts of an address, so the name could never be asked for.
            raise InvalidRequestError.out_of_range("name", name, "without empty, '.' or '..' parts between slashes")
        if name == self.base_name:
            raise InvalidRequestError.out_of_range("name", name, "another name than the base model's")

    def begin_load(self, name: str, source: str, owner: TenantId | None = None) -> None:
        """Announce that ``name`` is being loaded. A name that is already ready stays as it is until ``register``."""
        self.validate_name(name)
        if name not in self._entries:
            self._entries[name] = CatalogueEntry(name, source, AdapterState.LOADING, 0, None, owner)

    def announce(self, name: str, source: str, expected_id: AdapterId | None = None) -> None:
        """Let requests use ``name`` without its adapter having been read: the first of them has it read. A name that
        is there already stays what it is.

        Raises:
            InvalidRequestError: field ``name``.
        """
        self.validate_name(name)
        if name not in self._entries:
            self._entries[name] = CatalogueEntry(
                name, source, AdapterState.READY, 1, None, None, expected_id=expected_id
            )

    def learn(self, read: CatalogueEntry, info: AdapterInfo) -> AdapterId | None:
        """Take note of what was found at the source of an entry; other bytes than last time are a new version. Nothing
        changes if the name has come to mean something else meanwhile.

        Returns:
            The id of the adapter it meant before, if no name means that one any more; else None.
        """
        entry = self._entries.get(read.name)
        if entry is None or entry.version != read.version or entry.source != read.source:
            return None
        if entry.info is not None and entry.info.adapter_id == info.adapter_id:
            return None
        version = entry.version if entry.info is None else entry.version + 1
        self._entries[read.name] = replace(entry, version=version, info=info)
        self._names.setdefault(info.adapter_id, set()).add(read.name)
        return self._release(entry)

    def abandon_load(self, name: str) -> None:
        """Take back ``begin_load`` after the adapter was refused; a version that was ready before stays."""
        entry = self._entries.get(name)
        if entry is not None and entry.state is AdapterState.LOADING:
            del self._entries[name]

    def register(self, name: str, info: AdapterInfo, source: str, owner: TenantId | None = None) -> AdapterId | None:
        """Let ``name`` mean this adapter, and none with other bytes, from now on, whatever it meant before.

        Returns:
            The id of the adapter it meant before, if no name means that one any more; else None.
        """
        self.validate_name(name)
        before = self._entries.get(name)
        version = 1 if before is None else before.version + 1
        self._entries[name] = CatalogueEntry(
            name, source, AdapterState.READY, version, info, owner, expected_id=info.adapter_id
        )
        self._names.setdefault(info.adapter_id, set()).add(name)
        return None if before is None else self._release(before)

    def begin_unload(self, name: str) -> AdapterId | None:
        """Find ``name`` no more for new requests; ``remove`` follows once it is drained.

        Returns:
            The adapter to drain and free, or None if another name means it too.

        Raises:
            ModelNotFoundError: no adapter of that name is ready.
        """
        entry = self.get(name)
        if entry.state is not AdapterState.READY:
            raise ModelNotFoundError(name)
        self._entries[name] = replace(entry, state=AdapterState.DRAINING)
        if entry.info is None:
            return None
        adapter_id = entry.info.adapter_id
        return adapter_id if len(self._names[adapter_id]) == 1 else None

    def remove(self, name: str) -> AdapterId | None:
        """Forget ``name``.

        Returns:
            Its adapter's id, if no other name means that one; else None.

        Raises:
            ModelNotFoundError: there is no such name.
        """
        entry = self.get(name)
        del self._entries[name]
        return self._release(entry)

    def get(self, name: str) -> CatalogueEntry:
        """Look up a name in any state.

        Raises:
            ModelNotFoundError: there is no such name.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ModelNotFoundError(name)
        return entry

    def list(self) -> tuple[CatalogueEntry, ...]:
        """All entries, sorted by name."""
        return tuple(self._entries[name] for name in sorted(self._entries))

    def has(self, name: str) -> bool:
        """True if there is such a name, in any state."""
        return name in self._entries

    def is_current(self, entry: CatalogueEntry) -> bool:
        """True if an entry's name still means what the entry says."""
        return self._entries.get(entry.name) == entry

    def names_of(self, adapter_id: AdapterId) -> tuple[str, ...]:
        """Every name that means an adapter, sorted."""
        return tuple(sorted(self._names.get(adapter_id, ())))

    @property
    def num_ready(self) -> int:
        """Names that requests may use."""
        return sum(entry.state is AdapterState.READY for entry in self._entries.values())

    @property
    def adapter_ids(self) -> frozenset[AdapterId]:
        """Every adapter that some name means."""
        return frozenset(self._names)

    def find(self, model: str) -> CatalogueEntry | None:
        """Return the entry that the API's ``model`` means, read or not; None for the base model.

        Raises:
            ModelNotFoundError: neither the base nor a name that requests may use.
        """
        if model == self.base_name:
            return None
        entry = self._entries.get(model.removeprefix(self.base_name + ":"))
        if entry is None or entry.state is not AdapterState.READY:
            raise ModelNotFoundError(model)
        return entry

    def resolve_model(self, model: str) -> AdapterId | None:
        """Return what the API's ``model`` means: None for the base model, else an adapter.

        Both ``adapter`` and ``base:adapter`` are understood.

        Raises:
            ModelNotFoundError: neither the base nor an adapter that is ready.
        """
        entry = self.find(model)
        if entry is not None and entry.info is None:
            raise ModelNotFoundError(model)
        return None if entry is None or entry.info is None else entry.info.adapter_id

    def _release(self, entry: CatalogueEntry) -> AdapterId | None:
        if entry.info is None:
            return None
        adapter_id = entry.info.adapter_id
        now = self._entries.get(entry.name)
        if now is not None and now.info is not None and now.info.adapter_id == adapter_id:
            return None
        names = self._names[adapter_id]
        names.remove(entry.name)
        if names:
            return None
        del self._names[adapter_id]
        return adapter_id
