"""What clients ask of the form of a text: OpenAI's response_format, vLLM's structured_outputs, llama.cpp's grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from ..engine.constraints import Grammar
from ..errors import InputError
from .errors import ApiError


class NamedSchema(BaseModel):
    """name, description and strict say nothing here: every schema holds strictly."""

    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="of json_object, as in llama.cpp")

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Grammar.from_schema(True if self.schema_ is None else self.schema_)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise ApiError(400, "json_schema needs a schema", "response_format.json_schema.schema")
        return Grammar.from_schema(self.json_schema.schema_)


class StructuredOutputs(BaseModel):
    """vLLM's."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar_: str | None = Field(None, alias="grammar")
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def grammar(self) -> Grammar | None:
        for name in ("structural_tag", "disable_additional_properties"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not served here", f"structured_outputs.{name}")
        return _choose(
            {
                "json": self._schema(self.json_),
                "regex": None if self.regex is None else Grammar.from_regex(self.regex),
                "choice": None if self.choice is None else Grammar.from_choices(self.choice),
                "grammar": None if self.grammar_ is None else Grammar.from_text(self.grammar_),
                "json_object": self._schema({"type": "object"} if self.json_object else None),
            }
        )

    def _schema(self, schema: dict[str, Any] | str | None) -> Grammar | None:
        if schema is None:
            return None
        if self.whitespace_pattern is not None:
            try:
                given = json.loads(schema) if isinstance(schema, str) else schema
            except ValueError as error:
                raise InputError(f"schema is not JSON: {error}") from None
            if isinstance(given, dict):
                schema = {**given, "x-guidance": {"whitespace_pattern": self.whitespace_pattern}}
        return Grammar.from_schema(schema, compact=self.disable_any_whitespace)


class GrammarBody(BaseModel):
    """The fields of a body that ask for a form; at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    grammar: str | None = Field(None, description="GBNF or Lark, as in llama.cpp")
    guided_json: dict[str, Any] | str | None = Field(None, description="vLLM's older names")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def read_grammar(self) -> Grammar | None:
        """The form; ApiError or InputError for one that is none, or for several."""
        return _choose(
            {
                "response_format": None if self.response_format is None else self.response_format.grammar(),
                "structured_outputs": None if self.structured_outputs is None else self.structured_outputs.grammar(),
                "grammar": None if self.grammar is None else Grammar.from_text(self.grammar),
                "guided_json": None if self.guided_json is None else Grammar.from_schema(self.guided_json),
                "guided_regex": None if self.guided_regex is None else Grammar.from_regex(self.guided_regex),
                "guided_choice": None if self.guided_choice is None else Grammar.from_choices(self.guided_choice),
                "guided_grammar": None if self.guided_grammar is None else Grammar.from_text(self.guided_grammar),
            }
        )


def _choose(ways: Mapping[str, Grammar | None]) -> Grammar | None:
    given = [name for name, grammar in ways.items() if grammar is not None]
    if len(given) > 1:
        raise ApiError(400, f"give one of {' and '.join(given)}", given[1])
    return ways[given[0]] if given else None
