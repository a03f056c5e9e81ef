"""Names of adapters, and which adapters no name means any more."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pomona.adapters.catalogue import AdapterState, Catalogue
from pomona.core.adapter import AdapterInfo
from pomona.core.errors import InvalidRequestError, ModelNotFoundError
from pomona.core.ids import AdapterId


def make_info(adapter_id: str) -> AdapterInfo:
    return AdapterInfo(adapter_id=AdapterId(adapter_id), lora_rank=4, num_pages=1, num_host_bytes=1)


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue("base")


def test_plain_and_prefixed_names_mean_the_adapter_and_the_base_name_means_none(catalogue: Catalogue) -> None:
    catalogue.register("sql", make_info("a"), "/sql")
    assert catalogue.resolve_model("sql") == "a"
    assert catalogue.resolve_model("base:sql") == "a"
    assert catalogue.resolve_model("base") is None


@pytest.mark.parametrize("model", ["", "nothing", "base:", "base:nothing", "sql:base", "base:base:sql", "Base", "sql "])
def test_other_names_are_not_found(model: str, catalogue: Catalogue) -> None:
    catalogue.register("sql", make_info("a"), "/sql")
    with pytest.raises(ModelNotFoundError):
        catalogue.resolve_model(model)


@pytest.mark.parametrize("name", ["", "a:b", "base", "a b", "a\n", "ü", "x" * 129, "a?b"])
def test_a_name_that_cannot_be_used_is_refused_naming_the_field(name: str, catalogue: Catalogue) -> None:
    for operation in (lambda: catalogue.register(name, make_info("a"), "/a"), lambda: catalogue.begin_load(name, "/a")):
        with pytest.raises(InvalidRequestError) as caught:
            operation()
        assert caught.value.field == "name"
        assert "letters" not in str(caught.value)  # "ü" is one
    assert catalogue.list() == ()


@pytest.mark.parametrize("name", ["a", "x" * 128, "org/name-1.2_b", "0"])
def test_usual_names_are_accepted(name: str, catalogue: Catalogue) -> None:
    catalogue.register(name, make_info("a"), "/a")
    assert catalogue.get(name).info == make_info("a")


def test_replacing_returns_the_adapter_nobody_means_any_more(catalogue: Catalogue) -> None:
    assert catalogue.register("sql", make_info("a"), "/1") is None
    assert catalogue.register("sql", make_info("b"), "/2") == "a"
    assert catalogue.resolve_model("sql") == "b"
    assert (catalogue.get("sql").version, catalogue.get("sql").source) == (2, "/2")


def test_registering_the_same_adapter_again_frees_nothing(catalogue: Catalogue) -> None:
    catalogue.register("sql", make_info("a"), "/1")
    assert catalogue.register("sql", make_info("a"), "/1") is None
    assert catalogue.adapter_ids == {"a"}


def test_an_adapter_under_two_names_is_freed_with_the_last(catalogue: Catalogue) -> None:
    catalogue.register("one", make_info("a"), "/1")
    catalogue.register("two", make_info("a"), "/2")
    assert catalogue.begin_unload("one") is None
    assert catalogue.remove("one") is None
    assert catalogue.begin_unload("two") == "a"
    assert catalogue.remove("two") == "a"


def test_a_name_being_loaded_is_listed_but_not_found_until_it_is_registered(catalogue: Catalogue) -> None:
    catalogue.begin_load("sql", "/sql")
    assert [entry.state for entry in catalogue.list()] == [AdapterState.LOADING]
    with pytest.raises(ModelNotFoundError):
        catalogue.resolve_model("sql")
    catalogue.register("sql", make_info("a"), "/sql")
    assert catalogue.resolve_model("sql") == "a"


def test_a_refused_first_load_leaves_no_trace_and_a_refused_reload_leaves_the_old_version(catalogue: Catalogue) -> None:
    catalogue.begin_load("new", "/new")
    catalogue.abandon_load("new")
    assert catalogue.list() == ()
    catalogue.register("sql", make_info("a"), "/sql")
    catalogue.begin_load("sql", "/sql-2")
    catalogue.abandon_load("sql")
    assert catalogue.resolve_model("sql") == "a"


def test_a_name_being_unloaded_is_listed_but_not_found(catalogue: Catalogue) -> None:
    catalogue.register("sql", make_info("a"), "/sql")
    catalogue.begin_unload("sql")
    assert [entry.state for entry in catalogue.list()] == [AdapterState.DRAINING]
    for operation in (catalogue.resolve_model, catalogue.begin_unload):
        with pytest.raises(ModelNotFoundError):
            operation("sql")


def test_the_list_is_sorted_by_name(catalogue: Catalogue) -> None:
    for name in ("b", "c", "a"):
        catalogue.register(name, make_info(name), "/")
    assert [entry.name for entry in catalogue.list()] == ["a", "b", "c"]


class CatalogueMachine(RuleBasedStateMachine):
    """Whatever happens, ids in use are exactly those some name means, and each is reported unused exactly once."""

    names = st.sampled_from(["x", "y", "z"])
    ids = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.catalogue = Catalogue("base")
        self.model: dict[str, str] = {}
        self.held: set[str] = set()

    def _freed(self, freed: str | None) -> None:
        if freed is not None:
            assert freed not in self.model.values()
            self.held.remove(freed)

    @rule(name=names, adapter_id=ids)
    def register(self, name: str, adapter_id: str) -> None:
        self.model[name] = adapter_id
        self.held.add(adapter_id)
        self._freed(self.catalogue.register(name, make_info(adapter_id), "/"))

    @rule(name=names)
    def remove(self, name: str) -> None:
        if name not in self.model:
            with pytest.raises(ModelNotFoundError):
                self.catalogue.remove(name)
            return
        del self.model[name]
        self._freed(self.catalogue.remove(name))

    @rule(name=names)
    def begin_unload(self, name: str) -> None:
        if name in self.model and self.catalogue.get(name).state is AdapterState.READY:
            others = [adapter_id for other, adapter_id in self.model.items() if other != name]
            last = self.model[name] not in others
            assert self.catalogue.begin_unload(name) == (self.model[name] if last else None)

    @invariant()
    def ids_in_use_are_those_that_names_mean(self) -> None:
        assert self.catalogue.adapter_ids == set(self.model.values()) == self.held


CatalogueMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
TestCatalogueMachine = CatalogueMachine.TestCase
