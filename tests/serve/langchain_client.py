"""What LangChain makes of a server: a program of its own, for LangChain is not among what the tests install."""

import json
import sys

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Person(BaseModel):
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=99)


url = sys.argv[1]
options = {"base_url": url, "api_key": "none", "model": "bundled", "temperature": 0, "max_tokens": 20}
chat, items = ChatOpenAI(**options), ChatOpenAI(**options, use_responses_api=True)
whole = chat.invoke("Who?")
person = ChatOpenAI(**options | {"max_tokens": 100}).with_structured_output(Person, method="json_schema").invoke("Who?")
first = items.invoke("Who?")
second = items.invoke("And then?", previous_response_id=first.response_metadata["id"])
embeddings = OpenAIEmbeddings(base_url=url, api_key="none", model="bundled", check_embedding_ctx_length=False)
found = {
    "text": whole.content,
    "usage": [whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]],
    "reason": whole.response_metadata["finish_reason"],
    "stream": "".join(chunk.content for chunk in chat.stream("Who?")),
    "batch": [message.content for message in chat.batch(["Who?", "A dog"])],
    "person": person.model_dump(),
    "response": first.text,
    "cached": second.usage_metadata["input_token_details"]["cache_read"],
    "embedding": embeddings.embed_query("a dog"),
}
print(json.dumps(found))
