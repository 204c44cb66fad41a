"""Makes damaged entries of the cache again while a run trains."""

from __future__ import annotations

import torch

from crepa_cli.data.ahead import cores, is_small
from crepa_cli.data.cache import Cache, DamagedEntryError
from crepa_cli.data.clips import ClipError, file_digest
from crepa_cli.data.compact import stored_features
from crepa_cli.data.encoder import load_encoding_vae, load_teacher, teacher_input
from crepa_cli.data.prepare import clip_latents
from crepa_cli.data.scan import PreparedClip, clip_name, clip_pixels
from crepa_cli.data.stages import store
from crepa_cli.errors import UserError
from crepa_cli.events import Event, Notice
from crepa_cli.heap import release_memory
from crepa_cli.models.family import Family, Tensors
from crepa_cli.profile import CrepaSettings, FeatureDtype

CPU = torch.device("cpu")


class Healing:
    """Makes single entries again, on the CPU: the memory of a GPU is full of what is trained.

    The models are loaded for one entry and released. Only the main thread may do this, between micro-batches, because
    loading draws random numbers.

    Args:
        family: encodes captions and clips.
        crepa: settings of the encoder.
        cache: stores the entries.
        dtype: dtype of the text encoder.
        feature_dtype: dtype of the entries of features.

    Attributes:
        news: events that have not been passed on yet.
    """

    def __init__(
        self, family: Family, crepa: CrepaSettings, cache: Cache, dtype: torch.dtype, feature_dtype: FeatureDtype
    ) -> None:
        self.family = family
        self.crepa = crepa
        self.cache = cache
        self.dtype = dtype
        self.feature_dtype = feature_dtype
        self.news: list[Event] = []

    def heal(self, damage: DamagedEntryError, clip: PreparedClip) -> None:
        """Make a damaged entry of a clip again, unless it is whole by now.

        Raises:
            ClipError: if it cannot be made.
        """
        if self.cache.has(damage.kind, damage.key):
            return
        try:
            with torch.no_grad():
                store(self.cache, damage.kind, damage.key, self._made(damage, clip))
        except (UserError, OSError, RuntimeError, MemoryError) as error:
            raise ClipError(f"its {damage.kind} in the cache are damaged and cannot be made again: {error}") from error
        finally:
            release_memory()
        if not self.cache.has(damage.kind, damage.key):
            raise ClipError(f"its {damage.kind} in the cache were made again, and are damaged again")
        self.news.append(
            Notice(
                f"{clip_name(clip)}: its {damage.kind} in the cache were damaged ({damage.reason}) and have been made "
                "again on the CPU; --verify-cache checks all entries before a run"
            )
        )

    def _made(self, damage: DamagedEntryError, clip: PreparedClip) -> Tensors:
        """The tensors of an entry."""
        if damage.kind == "prompts":
            captions = dict(zip(clip.prompt_keys, clip.clip.captions, strict=True))
            pipeline = self.family.load_text_pipeline(self.dtype)
            with cores(small=is_small(pipeline.components.values())):
                return self.family.encode_prompt(pipeline, captions.get(damage.key, ""))
        if file_digest(clip.clip.path) != clip.digest:
            raise ClipError("its file has changed since the start of the run, and its entry in the cache is damaged")
        if damage.kind == "latents":
            pipeline = load_encoding_vae(self.family, CPU)
            with cores(small=is_small(pipeline.components.values())):
                return clip_latents(self.family, pipeline, clip, clip_pixels(clip))
        latents = self.cache.read("latents", clip.latents_key)["latents"]
        read, teacher = teacher_input(self.family, self.crepa, clip.bucket, latents), load_teacher(self.crepa, CPU)
        with cores(small=is_small([teacher.model])):
            return stored_features(teacher.features(clip_pixels(clip)[read.frames], read.size), self.feature_dtype)
