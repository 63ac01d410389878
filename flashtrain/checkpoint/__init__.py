"""Checkpoints that survive a kill at any moment and load on any mesh: sharded safetensors and a manifest."""

from flashtrain.checkpoint.background import BackgroundSaver, Saved
from flashtrain.checkpoint.manifest import FileEntry, Manifest, TensorEntry
from flashtrain.checkpoint.store import CheckpointStore

__all__ = ["BackgroundSaver", "CheckpointStore", "FileEntry", "Manifest", "Saved", "TensorEntry"]
