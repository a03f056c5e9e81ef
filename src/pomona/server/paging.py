"""Pages of lists: ``after`` and ``limit`` of a query, as OpenAI's API has them."""

from starlette.requests import Request

from pomona.core.errors import InvalidRequestError


def page_of(request: Request, default: int = 20, most: int = 100) -> tuple[str | None, int]:
    """Return ``after`` and ``limit`` of the query.

    Raises:
        InvalidRequestError: the limit is not a number between 1 and ``most``.
    """
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= most):
        raise InvalidRequestError.out_of_range("limit", text[:20], f"between 1 and {most}")
    return request.query_params.get("after"), int(text)
