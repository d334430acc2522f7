"""The JSON that a backend must return: a pydantic model with the run's limits, and its JSON schema."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model


class Interest(BaseModel):
    """One interest of a user."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(min_length=1)]
    item_ids: list[int]


class Answer(BaseModel):
    """What a backend answers about one user."""

    model_config = ConfigDict(extra="forbid")

    interests: Annotated[list[Interest], Field(min_length=1)]


def answer_model(
    *,
    max_interests: int,
    max_interest_chars: int,
    max_items_per_interest: int,
    max_item_index: int,
    categories: bool = False,
) -> type[Answer]:
    """`Answer` with limits on every array, string and number, without which a constrained model may never stop.

    Args:
        max_interests: interests in an answer.
        max_interest_chars: characters of one text.
        max_items_per_interest: cited ids per interest.
        max_item_index: largest item number of the catalogue; bounds the digits of an id.
        categories: whether each interest names its category first.
    """
    item_id = Annotated[int, Field(ge=1, le=max_item_index)]
    category = (Annotated[str, Field(min_length=1, max_length=max_interest_chars // 2)], ...)
    first: dict[str, Any] = {"category": category} if categories else {}
    interest = create_model(
        "Interest",
        __base__=Interest,
        **first,
        text=(Annotated[str, Field(min_length=1, max_length=max_interest_chars)], ...),
        item_ids=(
            Annotated[list[item_id], Field(min_length=1, max_length=max_items_per_interest)],  # type: ignore[valid-type]
            ...,
        ),
    )
    return create_model(
        "Answer",
        __base__=Answer,
        interests=(
            Annotated[list[interest], Field(min_length=1, max_length=max_interests)],  # type: ignore[valid-type]
            ...,
        ),
    )


def json_schema(model: type[Answer]) -> dict[str, Any]:
    """JSON schema of an answer model, with definitions in place and without titles and descriptions."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})
    return _inline(schema, definitions)


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inline(v, definitions) for v in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rsplit("/", 1)[1]], definitions)
    properties = node.get("properties")
    out = {
        k: _inline(v, definitions) for k, v in node.items() if k not in ("title", "description", "properties")
    }
    if properties is not None:
        out["properties"] = {k: _inline(v, definitions) for k, v in properties.items()}
    return out
