"""The base model: a checkpoint in the layout of diffusers, and how its components are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from crepa_cli.errors import UserError, listed
from crepa_cli.hub.download import Need, fetch, local_folder
from crepa_cli.hub.needed import read_json, weight_files
from crepa_cli.hub.read import fingerprint, read_config

CARD = "README.md"
"""The model card, which states the license."""


class BaseCheckpoint:
    """A base model on the Hub or in a local folder.

    Creating one reads nothing.

    Args:
        name: a local folder in the layout of diffusers, or a Hub id.
        revision: branch, tag or commit on the Hub.
        unused: components that are left where they are.
    """

    def __init__(self, name: str, revision: str | None = None, unused: Sequence[str] = ()) -> None:
        self.name = name
        self.revision = revision
        self._unused = unused
        self._configs: dict[str, dict[str, Any]] = {}
        self._fingerprints: dict[str, str] = {}
        self.file: Path | None = None
        """The file of the transformer, if it is not in the repository; see `SingleFile`."""

    def read_config(self, filename: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, such as `vae/config.json`, read once.

        Raises:
            UserError: if it cannot be found, fetched or parsed.
        """
        if filename not in self._configs:
            self._configs[filename] = read_config(self.name, filename, self.revision)
        return self._configs[filename]

    @property
    def shown_name(self) -> str:
        """The Hub id, or the name of the local folder without the path to it."""
        return Path(self.name).name if Path(self.name).exists() else self.name

    @property
    def license(self) -> str | None:
        """The license in the model card, if there is one."""
        card = local_folder(self.name, self.revision) / CARD
        if not card.is_file():
            return None
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
        license_ = data.get("license_name") or data.get("license")
        return None if license_ is None else str(license_)

    @property
    def components(self) -> list[str]:
        """The folders that `model_index.json` names, without those of components that are not used."""
        index = self.read_config("model_index.json")
        found = (name for name, library in index.items() if isinstance(library, list) and library[0])
        return [name for name in found if name not in self._unused]

    @property
    def extra_files(self) -> tuple[str, ...]:
        """Files that are of use beside the components."""
        return (CARD,)

    def component_class(self, component: str) -> str:
        """The class of a component in `model_index.json`."""
        return str(self.read_config("model_index.json")[component][1])

    def fetch(self, *components: str) -> Path:
        """The local folder, with these components; of a repository on the Hub they are downloaded if need be.

        Raises:
            UserError: if they cannot be found or fetched.
        """
        return fetch(Need(self.name, self.revision, components))

    def fingerprints(self, *components: str) -> list[str]:
        """The digest of each component's files, read once: a run asks for every caption.

        Raises:
            UserError: if they cannot be found or fetched.
        """
        missing = [name for name in components if name not in self._fingerprints]
        if missing:
            folder = self.fetch(*missing)
            self._fingerprints |= {name: fingerprint(folder / name) for name in missing}
        return [self._fingerprints[name] for name in components]

    def load_model(self, class_name: str, component: str, dtype: torch.dtype) -> ModelMixin:
        """A component by its class in diffusers, on the CPU.

        Raises:
            UserError: if weights are missing.
        """
        model_class = getattr(diffusers, class_name)
        folder = self.fetch(component)
        model, report = model_class.from_pretrained(
            folder, subfolder=component, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        require_whole(folder / component, report["missing_keys"])
        return model

    def weight_files(self, component: str) -> list[Path]:
        """The files of a component's weights, in safetensors; those of the Hub are downloaded if need be.

        Raises:
            UserError: if they cannot be found or fetched.
        """
        folder = self.fetch(component)
        paths = {f"{component}/{path.name}" for path in (folder / component).iterdir()}
        names = weight_files(paths, component, lambda path: read_json(folder / path))
        return [folder / name for name in names if name.endswith(".safetensors")]

    def source(self, component: str) -> str:
        """The folder of a component, for messages."""
        return str(self.fetch(component) / component)

    def stored(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """The weights of a component by their names, one after the other.

        Raises:
            UserError: if a file cannot be found, fetched or read.
        """
        for path in self.weight_files(component):
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 (no dictionary)
                        yield name, file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read: {error}; download it anew") from error

    def empty_model(self, component: str, dtype: torch.dtype) -> Any:
        """A component of transformers, or of a pipeline's own, by its configuration alone, on the meta device."""
        config = self.read_config(f"{component}/config.json")
        library, name = self.read_config("model_index.json")[component]
        with torch.device("meta"):
            if library == "transformers":
                model = getattr(transformers, name)._from_config(AutoConfig.for_model(**config), dtype=dtype)
            else:
                model = getattr(import_module(f"diffusers.pipelines.{library}"), name).from_config(config).to(dtype)
        return model.requires_grad_(False).eval()

    def load_pipeline(
        self, class_name: str, *, dtype: torch.dtype, without: tuple[str, ...], **components: Any
    ) -> DiffusionPipeline:
        """A pipeline of diffusers by its class.

        Args:
            class_name: of the pipeline.
            dtype: of the components that are loaded.
            without: components that are not loaded.
            components: components that are loaded already.
        """
        given = dict.fromkeys((*without, *self._unused)) | components
        pipeline_class = getattr(diffusers, class_name)
        folder = self.fetch(*(name for name in self.components if name not in given))
        pipeline = pipeline_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, **given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def require_whole(source: Path | str, missing: Sequence[str]) -> None:
    """Raise a UserError if the weights of a folder or file lack some that the model needs."""
    if missing:
        raise UserError(f"{source} is incomplete: it lacks {listed(sorted(missing))}; download it anew")


def check_embedding(text_encoder: nn.Module) -> None:
    """Check that a T5 encoder reads the embedding of its checkpoint, which may hold it as `shared` alone.

    Raises:
        UserError: if the embedding is another one, or empty: every caption would become the same noise.
    """
    shared = getattr(text_encoder, "shared", None)
    used = getattr(getattr(text_encoder, "encoder", None), "embed_tokens", None)
    if shared is None or used is None:
        return
    if used.weight.data_ptr() != shared.weight.data_ptr() or not used.weight.any():
        raise UserError(
            f"the text encoder {type(text_encoder).__name__} was loaded without its embedding, as transformers 5.0 to "
            "5.2 do: pip install 'transformers>=5.3', and delete the folder prompts of the cache"
        )
