"""Adapters as one caller sees them.

A tenant's adapter ``legal`` is in the catalogue as ``acme/legal``; its owner calls it ``legal``, whoever it is shared
with calls it ``acme/legal``, and to everybody else it does not exist. The operator's adapters have no owner and are for
all. On a server without accounts everybody sees everything under its own name.
"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from starlette.requests import HTTPConnection

from pomona.accounts.accounts import Accounts
from pomona.accounts.principal import Principal
from pomona.adapters.catalogue import CatalogueEntry
from pomona.core.errors import (
    AdapterFailedError,
    AdapterUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
)
from pomona.server.adapter_service import AdapterService, Lease
from pomona.server.context import context_of
from pomona.server.errors import UnknownAdapterError
from pomona.server.tenant import principal_of

_MAX_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class SeenAdapter:
    """An adapter of the catalogue, and what the caller may know of it."""

    name: str
    """What the caller calls it."""
    entry: CatalogueEntry
    is_own: bool
    """The caller may replace and unload it, and see where it came from."""


def adapters_of(connection: HTTPConnection) -> "TenantAdapters":
    """Return the adapters as this request's caller sees them."""
    context = context_of(connection)
    return TenantAdapters(context.adapters, context.accounts, principal_of(connection), context.model.name)


class TenantAdapters:
    """One caller's view of all adapters.

    Args:
        service: has all adapters.
        accounts: knows the owners; None without accounts.
        principal: the caller; None without accounts.
        base_name: the base model's name.
    """

    def __init__(
        self, service: AdapterService, accounts: Accounts | None, principal: Principal | None, base_name: str
    ) -> None:
        self._service = service
        self._accounts = accounts
        self._tenant_id = None if principal is None else principal.tenant_id
        self._base_name = base_name

    @contextlib.asynccontextmanager
    async def lease(self, model: str) -> AsyncIterator[Lease]:
        """``AdapterService.lease`` of a model under the caller's name for it.

        Why an adapter cannot be used is told to those who may change it: it says where its files are.

        Raises:
            ModelNotFoundError: there is none for this caller.
            AdapterUnavailableError, AdapterFailedError, EngineUnavailableError: as ``AdapterService.lease``.
        """
        catalogue_name = self._catalogue_name(model)
        with self._named(model):
            try:
                async with self._service.lease(catalogue_name) as lease:
                    yield lease
            except (AdapterFailedError, AdapterUnavailableError) as error:
                if self._is_own(catalogue_name):
                    raise
                shown = model[:_MAX_SHOWN_CHARS]
                if isinstance(error, AdapterUnavailableError):
                    message = f"The adapter {shown!r} cannot be brought in now."
                    raise AdapterUnavailableError(message, error.retry_after_s) from error
                raise AdapterFailedError(f"The adapter {shown!r} cannot be used.") from error

    async def find(self, model: str) -> CatalogueEntry | None:
        """``AdapterService.find`` of a model under the caller's name for it.

        Raises:
            ModelNotFoundError: there is none for this caller.
        """
        with self._named(model):
            return await self._service.find(self._catalogue_name(model))

    def seen(self) -> list[SeenAdapter]:
        """All adapters that exist for the caller, by the caller's names, in their order."""
        found = {}
        for entry in self._service.entries:
            name = self._shown_name(entry.name)
            if name is not None and (name not in found or self._is_own(entry.name)):
                found[name] = SeenAdapter(name, entry, self._is_own(entry.name))
        return [found[name] for name in sorted(found)]

    def get(self, name: str) -> SeenAdapter:
        """Look one up, in any state.

        Raises:
            UnknownAdapterError: there is none of that name for this caller.
        """
        catalogue_name = self._catalogue_name(name)
        try:
            entry = self._service.get(catalogue_name)
        except UnknownAdapterError:
            entry = None
        if entry is None or self._shown_name(entry.name) is None:
            raise UnknownAdapterError(f"No adapter is called {name[:_MAX_SHOWN_CHARS]!r}.")
        return SeenAdapter(name, entry, self._is_own(entry.name))

    async def look_up(self, name: str) -> SeenAdapter:
        """``get``, but a name that only a store knows is found as well.

        Raises:
            UnknownAdapterError: there is none of that name for this caller.
        """
        with contextlib.suppress(ModelNotFoundError):
            await self.find(name)
        return self.get(name)

    async def load(self, name: str, source: str, owner: str | None = None) -> SeenAdapter:
        """Load an adapter for the caller, or for ``owner`` if an administrator says so.

        A tenant may load from the sub-folder of every allowed root that bears its id.

        Raises:
            InvalidRequestError, AdapterError, EngineUnavailableError: as ``AdapterService.load``.
            AccountNotFoundError: there is no tenant ``owner``.
        """
        if owner is not None and (self._accounts is None or self._tenant_id not in (None, owner)):
            raise InvalidRequestError.out_of_range(
                "tenant", owner[:_MAX_SHOWN_CHARS], "left out: it is not yours to say"
            )
        owner = self._tenant_id or owner
        if self._accounts is not None and "/" in name:
            raise InvalidRequestError.out_of_range("name", name[:_MAX_SHOWN_CHARS], "without a slash")
        if self._accounts is None or owner is None:
            return SeenAdapter(name, await self._service.load(name, source), is_own=True)
        if name == self._base_name:
            raise InvalidRequestError.out_of_range("name", name, "another name than the base model's")
        catalogue_name = f"{owner}/{name}"
        sources = self._service.sources if self._tenant_id is None else self._service.sources.below(owner)
        await self._accounts.database.run(self._accounts.tenants.tenant, owner)
        # What is loaded, and written down for other servers, is the folder that the source means now.
        source = await asyncio.to_thread(sources.settled, source)
        write_down = functools.partial(self._accounts.change, self._accounts.shares.put, owner, name, source)
        entry = await self._service.load(catalogue_name, source, sources, write_down)
        return SeenAdapter(name if self._tenant_id else catalogue_name, entry, is_own=True)

    async def unload(self, name: str) -> None:
        """Unload one of the caller's adapters.

        Raises:
            UnknownAdapterError: the caller has none of that name.
        """
        adapter = self.get(name)
        if not adapter.is_own:
            raise UnknownAdapterError(f"No adapter is called {name[:_MAX_SHOWN_CHARS]!r}.")
        owner, _, own_name = adapter.entry.name.partition("/")
        if self._accounts is None or not own_name:
            await self._service.unload(adapter.entry.name)
            return
        strike_out = functools.partial(self._accounts.change, self._accounts.shares.remove, owner, own_name)
        await self._service.unload(adapter.entry.name, strike_out)

    def _catalogue_name(self, model: str) -> str:
        """Return what the catalogue calls a model: the caller's own first, then the operator's, then what is shared."""
        if self._accounts is None or model == self._base_name:
            return model
        name = model.removeprefix(self._base_name + ":")
        if self._tenant_id is None:
            return model
        own = f"{self._tenant_id}/{name}"
        if own in self._accounts.adapters:
            return own
        # A name that is neither the operator's nor shared becomes one that nothing can have.
        return name if self._is_visible(name) else f"{name[:_MAX_SHOWN_CHARS]}//"

    def _is_visible(self, catalogue_name: str) -> bool:
        if self._accounts is None or self._tenant_id is None or "/" not in catalogue_name:
            return True
        owned = self._accounts.adapters.get(catalogue_name)
        return owned is not None and owned.is_visible_to(self._tenant_id)

    def _is_own(self, catalogue_name: str) -> bool:
        return self._tenant_id is None or catalogue_name.startswith(f"{self._tenant_id}/")

    def _shown_name(self, catalogue_name: str) -> str | None:
        """Return what the caller calls an adapter of the catalogue; None if it does not exist for the caller."""
        if not self._is_visible(catalogue_name):
            return None
        return catalogue_name.removeprefix(f"{self._tenant_id}/") if self._tenant_id is not None else catalogue_name

    @contextlib.contextmanager
    def _named(self, model: str) -> Iterator[None]:
        """Errors speak of the name that the caller used."""
        try:
            yield
        except ModelNotFoundError as error:
            raise ModelNotFoundError(model[:_MAX_SHOWN_CHARS]) from error
