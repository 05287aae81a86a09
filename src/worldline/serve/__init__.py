"""Playing a world: the server, its page, and clients for programs."""

from worldline.serve.client import AsyncClient, Client, Saved

__all__ = ["AsyncClient", "Client", "Saved"]
