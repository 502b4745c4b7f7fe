"""Adapters loaded and removed while the server runs, in the words of rwkv_lightning and of vLLM; see AdapterFolder."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from .bodies import DialectBody
from .errors import ApiError
from .lightning_bodies import identify
from .server import server_of

router = APIRouter(dependencies=[Depends(identify)])  # rwkv_lightning's
vllm_router = APIRouter()


class AdapterBody(DialectBody):
    adapter_id: str
    path: str


class RemoveBody(DialectBody):
    adapter_id: str
    adapter_version: str | None = None


class LoadBody(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadBody(BaseModel):
    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    lora_name: str


@router.post("/v1/adapters")
async def add_adapter(body: AdapterBody, request: Request) -> dict[str, str]:
    """Loads an adapter, which is a model of its own from now on."""
    adapter = await asyncio.to_thread(server_of(request).adapters.load, body.adapter_id, body.path)
    return {"version": adapter.version}


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> dict[str, Any]:
    loaded = [*server_of(request).adapters.loaded.values()]
    return {"data": [{"id": x.name, "version": x.version, "manifest": {"path": x.path}} for x in loaded]}


@router.delete("/v1/adapters")
async def remove_adapter(body: RemoveBody, request: Request) -> dict[str, bool]:
    """Whether it was there or not, it is not any more."""
    await asyncio.to_thread(server_of(request).adapters.remove, body.adapter_id, body.adapter_version)
    return {"deleted": True}


@vllm_router.post("/v1/load_lora_adapter")
async def load_lora_adapter(body: LoadBody, request: Request) -> PlainTextResponse:
    adapters = server_of(request).adapters
    if body.lora_name in adapters.loaded and not body.load_inplace:
        raise ApiError(400, f"the adapter {body.lora_name!r} is loaded already", "lora_name")
    await asyncio.to_thread(adapters.load, body.lora_name, body.lora_path)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@vllm_router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadBody, request: Request) -> PlainTextResponse:
    if not await asyncio.to_thread(server_of(request).adapters.remove, body.lora_name):
        raise ApiError(404, f"there is no adapter {body.lora_name!r} that was loaded", "lora_name")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
