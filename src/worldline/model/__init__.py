"""Latent world models: encoder, predictor, decoder, drift gauge, and their files. Imports only `core`."""

from worldline.model.checkpoint import load_world, read_card, save_world
from worldline.model.gauge import Gauge
from worldline.model.picture import filmstrip
from worldline.model.world import State, World, WorldConfig

__all__ = ["Gauge", "State", "World", "WorldConfig", "filmstrip", "load_world", "read_card", "save_world"]
