"""What queries may say: names that are known, and pages of lists, ``after`` and ``limit`` as OpenAI's API has them."""

from collections.abc import Container, Iterable

from starlette.requests import Request

from pomona.core.errors import InvalidRequestError

_PAGING = ("after", "limit")


def page_of(
    request: Request, default: int = 20, most: int = 100, others: tuple[str, ...] = ()
) -> tuple[str | None, int]:
    """Return ``after`` and ``limit`` of the query.

    Args:
        request: for a list.
        default: the limit if there is none.
        most: largest limit.
        others: names that the query may have besides.

    Raises:
        InvalidRequestError: the limit is not a number between 1 and ``most``, or a name is unknown.
    """
    check_names(request.query_params, _PAGING + others)
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= most):
        raise InvalidRequestError.out_of_range("limit", text[:20], f"between 1 and {most}")
    return request.query_params.get("after"), int(text)


def check_names(names: Iterable[str], known: Container[str]) -> None:
    """Refuse parameters that would be ignored.

    Raises:
        InvalidRequestError: a name is not among those known.
    """
    for name in names:
        if name not in known:
            raise InvalidRequestError(name[:100], f"Unknown parameter: {name[:100]!r}.")
